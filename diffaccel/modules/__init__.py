"""What is done to a network: put something in its place, hook it, record it."""
