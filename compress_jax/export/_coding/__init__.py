"""Entropy coding of the tensors of an artifact, and reading it leaf by leaf."""
