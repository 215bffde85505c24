"""Times of a comparison: turns on one machine, pictures that fit into a time, equal wall time, early stopping."""
