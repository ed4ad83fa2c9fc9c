"""Quantization formats of weights, one file a format or a family of them."""
