"""Metrics as functions of tensors: distances between sets of features, and fidelity and alignment of single images and
videos. No metric here loads a network."""
