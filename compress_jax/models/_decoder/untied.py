"""Give a decoder whose head is its table of tokens a head of its own."""

from dataclasses import replace

from compress_jax.core.errors import WeightsError
from compress_jax.core.packed import to_dense
from compress_jax.core.types import Params
from compress_jax.models._decoder.decoder import Decoder


def untied(model: Decoder, params: Params) -> tuple[Decoder, Params]:
    """Return the same function with a head of its own.

    The table of tokens is read before the layers and, behind the last norm, as the head. That
    norm's scale can move into a head of its own alone, so a residual stream is rotated
    (`quantize.rotate`) only without the tie. It costs the bytes of one more table.

    Args:
      model: the decoder.
      params: its weights.

    Returns:
      ``(model, params)``; as they are if the head is its own already.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import compress_jax as cj
      >>> config = cj.models.DecoderConfig(50, 8, 1, heads=2, kv_heads=1, head_width=4, hidden=8)
      >>> model = cj.models.Decoder(config)
      >>> params = jax.jit(model.init)(jax.random.key(0), jnp.ones((1, 1), jnp.int32))["params"]
      >>> model, params = cj.models.untied(model, params)
      >>> model.config.tied, params["head"]["kernel"].shape
      (False, (8, 50))
    """
    if not model.config.tied:
        return model, params
    if "tokens" not in params:
        raise WeightsError(
            f"params hold {', '.join(sorted(params))}, and a decoder's hold 'tokens': give what is "
            "in {'params': ...}"
        )
    head = {"kernel": to_dense(params["tokens"]["embedding"]).T}
    return model.clone(config=replace(model.config, tied=False)), {**params, "head": head}
