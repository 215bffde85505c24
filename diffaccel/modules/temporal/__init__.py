"""Tables of what a network computes from its timestep alone (and from global conditioning), never from the sample."""
