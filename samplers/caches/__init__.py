"""Step caches: at some steps a forecast stands in for the blocks of the network. One method, one file."""
