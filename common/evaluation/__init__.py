"""Evaluation of frozen encoders: weighted k-NN and linear probing, of our checkpoints and of others'."""
