"""Train a network: the step loop, averages of weights, checkpoints from which a run resumes to the same bits."""
