"""Rewrites: params changed once, so that the same function quantizes better."""
