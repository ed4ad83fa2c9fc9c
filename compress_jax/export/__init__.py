"""Leaving the lab: the artifact file. Imports the core only, so that anything can be saved from anywhere."""

from compress_jax.export.artifact import load, save, write_atomically

__all__ = ["load", "save", "write_atomically"]
