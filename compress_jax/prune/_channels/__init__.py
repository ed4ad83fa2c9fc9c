"""Removing channels: the choice, the smaller model and its table."""
