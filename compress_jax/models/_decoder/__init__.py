"""Decoders of published families: their shape, their layers, their files, and what they write."""
