"""Quantised checkpoints: what their packed tensors stand for, in float32, one weight at a time."""
