"""Train a network: the step loop, averages of weights, checkpoints that resume to the same bits."""
