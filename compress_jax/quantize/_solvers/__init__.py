"""Solvers: rounding that lowers the error of each layer's outputs, from calibration data."""
