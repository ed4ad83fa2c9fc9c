"""A private room."""
