"""Errors a person can act on: what was wrong, which path or value, what to do about it."""


class CompressError(Exception):
    """Root of every error this library raises on purpose; catch it to catch them all.

    Example:
      >>> import compress_jax as cj
      >>> try:
      ...     cj.prune.magnitude(2.0)
      ... except cj.core.CompressError as error:
      ...     print(type(error).__name__)
      ArgumentError
    """


class ArgumentError(CompressError, ValueError):
    """An argument has a wrong type or value; the message names it and what is accepted.

    Example:
      >>> import compress_jax as cj
      >>> cj.every(0, cj.identity())  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      compress_jax.core.errors.ArgumentError: n (the period of every(n, ...) in steps) must be ...
    """


class NoMatchError(CompressError):
    """A path pattern matched no leaf; the message lists the paths there are.

    Example:
      >>> import compress_jax as cj
      >>> cj.at("**/weight", cj.identity()).init({"dense": {"kernel": 1.0}})
      Traceback (most recent call last):
      compress_jax.core.errors.NoMatchError: pattern '**/weight' matches no leaf. The leaves are:
        dense/kernel
    """


class NonFiniteError(CompressError):
    """A leaf holds NaN or infinity: no code, scale or mask of it would mean anything.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> params = {"kernel": jnp.array([1.0, jnp.nan])}
      >>> cj.prune.magnitude(0.5).init(params)  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      compress_jax.core.errors.NonFiniteError: leaf 'kernel' of shape (2,) has 1 NaN or ...
    """


class ShapeError(CompressError):
    """An array does not have the shape an algorithm needs: a group that does not divide an axis.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> params = {"kernel": jnp.ones((4, 2))}
      >>> cj.quantize.uniform(4, axis=5).init(params)  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      compress_jax.core.errors.ShapeError: leaf 'kernel': channel axis 5 does not exist ...
    """


class StateError(CompressError):
    """A compression was given a state that another compression, or other params, produced.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> params = {"kernel": jnp.ones(2)}
      >>> halved = cj.leafwise(lambda x, learned, fixed: x / 2)
      >>> cj.identity().view(params, halved.init(params))  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      compress_jax.core.errors.StateError: this state was made by...
    """


class ArtifactError(CompressError):
    """A file is not an artifact of ours, is damaged, or was written by a newer version.

    Example:
      >>> import compress_jax as cj
      >>> cj.load("no/such/file")  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      compress_jax.core.errors.ArtifactError: cannot read no/such/file: ...
    """


class CheckpointError(CompressError):
    """No checkpoint could be restored: none exists, all are damaged, or another model made them.

    Example:
      >>> import compress_jax as cj
      >>> issubclass(cj.core.CheckpointError, cj.core.CompressError)
      True
    """


class DataError(CompressError):
    """A data set is missing or damaged.

    Example:
      >>> import compress_jax as cj
      >>> cj.prune.importance.gradients(lambda params: 0.0, {}, batches=[])
      Traceback (most recent call last):
      compress_jax.core.errors.DataError: there is no batch to take gradients of
    """


class ConfigError(CompressError):
    """A config file or one of its arguments cannot be used.

    Example:
      >>> import compress_jax as cj
      >>> cj.prune.shrink(abs, {}, macs=2.0)  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      compress_jax.core.errors.ConfigError: macs=2.0: the share of multiply-accumulates to keep ...
    """


class ExportError(CompressError):
    """A model cannot be exported, or the exported file computes something else.

    Example:
      >>> import compress_jax as cj
      >>> cj.export.to_safetensors({}, "file", weights="float")  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      compress_jax.core.errors.ExportError: weights='float' is no 'dense' or 'integers', ...
    """


class WeightsError(CompressError):
    """Published weights do not fit the model they were given for.

    Example:
      >>> import compress_jax as cj
      >>> issubclass(cj.core.WeightsError, cj.core.CompressError)
      True
    """


class OtherProcessError(CompressError):
    """Another process of the run failed or was lost, and this one cannot go on without it.

    Example:
      >>> import compress_jax as cj
      >>> issubclass(cj.core.OtherProcessError, cj.core.CompressError)
      True
    """
