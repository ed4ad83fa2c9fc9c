"""Errors a person can act on: what was wrong, which path or value, what to do about it."""


class CompressError(Exception):
    """Root of every error this library raises on purpose; catch it to catch them all."""


class ArgumentError(CompressError, ValueError):
    """An argument has a wrong type or value; the message names it and what is accepted."""


class NoMatchError(CompressError):
    """A path pattern matched no leaf; the message lists the paths there are."""


class NonFiniteError(CompressError):
    """A leaf holds NaN or infinity: no code, scale or mask of it would mean anything."""


class ShapeError(CompressError):
    """An array does not have the shape an algorithm needs: a group that does not divide an axis."""


class StateError(CompressError):
    """A compression was given a state that another compression, or other params, produced."""


class ArtifactError(CompressError):
    """A file is not an artifact of ours, is damaged, or was written by a newer version."""


class CheckpointError(CompressError):
    """No checkpoint could be restored: none exists, all are damaged, or another model made them."""


class DataError(CompressError):
    """A data set is missing or damaged."""


class ConfigError(CompressError):
    """A config file or one of its arguments cannot be used."""


class ExportError(CompressError):
    """A model cannot be exported, or the exported file computes something else."""


class WeightsError(CompressError):
    """Published weights do not fit the model they were given for."""
