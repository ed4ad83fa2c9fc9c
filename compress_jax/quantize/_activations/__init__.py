"""Quantizers of activations and the function that applies them throughout a model."""
