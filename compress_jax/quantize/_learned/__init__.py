"""Learned grids: the steps, offsets and clipping bounds that an optimizer trains."""
