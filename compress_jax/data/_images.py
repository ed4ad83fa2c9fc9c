"""Image files as one array: decoded, turned upright, brought to one size."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from compress_jax.core.errors import ArgumentError, DataError
from compress_jax.data._dataset import progress

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
GRAY = ("1", "L")
DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # more than 8 bits a channel
ORIENTATION = 0x0112  # the EXIF tag that says how a camera was held

Color = Literal["gray", "rgb"]
Source = Path | bytes
"""An image file, or what is in one."""


def read_images(
    sources: Sequence[Source],
    names: Sequence[str],
    *,
    size: int | tuple[int, int] | None = None,
    color: Color | None = None,
    notes: list[str],
) -> np.ndarray:
    """Decode images into one array.

    With a size an image is scaled until it covers it, and what stands out on two sides is cut off.

    Args:
      sources: files, or their contents.
      names: what errors call each of them.
      size: height and width, or one number for both; None if all images have one size.
      color: ``"gray"`` or ``"rgb"``; by default gray if all images are.
      notes: what is decided is added here.

    Returns:
      uint8 ``[n, height, width, 1 or 3]``.

    Raises:
      DataError: if an image cannot be read, or has another size than the first.

    Example:
      >>> notes = []
      >>> file = io.BytesIO()
      >>> Image.new("L", (4, 6)).save(file, "png")
      >>> read_images([file.getvalue()], ["a.png"], size=3, notes=notes).shape
      (1, 3, 3, 1)
      >>> notes
      ['images are gray', 'images are scaled to cover 3 x 3 pixels, and cut to them']
    """
    wanted = _size(size)
    chosen = color or _common_color(sources, names)
    notes.append(f"images are {'gray' if chosen == 'gray' else 'in color (rgb)'}")
    if wanted:
        text = f"{wanted[0]} x {wanted[1]}"
        notes.append(f"images are scaled to cover {text} pixels, and cut to them")
    images: np.ndarray | None = None
    with progress("reading images", len(sources)) as advance:
        for i, (source, name) in enumerate(zip(sources, names, strict=True)):
            pixels = _pixels(source, name, wanted, chosen)
            if images is None:
                images = np.empty((len(sources), *pixels.shape), np.uint8)
            if pixels.shape != images.shape[1:]:
                raise DataError(
                    f"{names[0]} is {_shown(images.shape[1:])} pixels and {name} is "
                    f"{_shown(pixels.shape)}; give size=(height, width) to bring all to one size"
                )
            images[i] = pixels
            advance(1)
    if images is None:
        raise DataError("there are no images to read")
    return images


def _size(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(n, int) and n > 0 for n in pair):
        raise ArgumentError(f"size must be a number of pixels, or (height, width); got {size!r}")
    return pair[0], pair[1]


def _shown(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} x {shape[1]}"


def _opened(source: Source, name: str) -> Image.Image:
    """Open an image without decoding it."""
    try:
        content = source if isinstance(source, bytes) else source.read_bytes()
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{name} cannot be read as an image: {_why(error)}") from error
    if image.mode in DEEP:
        raise DataError(
            f"{name} has more than 8 bits a pixel (mode {image.mode}); save it with 8, or give "
            "arrays: Data.from_arrays"
        )
    return image


def _why(error: Exception) -> str:
    text = str(error).split("\n")[0]
    # Pillow names the stream, which nobody knows.
    return "it is of no known format, or damaged" if "cannot identify" in text else text


def _common_color(sources: Sequence[Source], names: Sequence[str]) -> Color:
    """Return gray if all images are."""
    for source, name in zip(sources, names, strict=True):
        with _opened(source, name) as image:
            if image.mode not in GRAY:
                return "rgb"
    return "gray"


def _pixels(source: Source, name: str, size: tuple[int, int] | None, color: Color) -> np.ndarray:
    """Return the pixels of an image, ``[height, width, channels]``."""
    flat = upright(source, name, color)
    pixels = np.asarray(flat if size is None else covering(flat, size))
    return pixels[..., None] if pixels.ndim == 2 else pixels


def upright(source: Source, name: str, color: Color) -> Image.Image:
    """Decode an image, turned as its camera was held, without transparency.

    Args:
      source: a file, or its content.
      name: what errors call it.
      color: of the result.

    Returns:
      The image, of 8 bits a channel.

    Raises:
      DataError: if it cannot be read.
    """
    with _opened(source, name) as image:
        try:
            image.load()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"{name} is damaged: {_why(error)}") from error
        turned = ImageOps.exif_transpose(image)
        return _without_alpha(turned).convert("L" if color == "gray" else "RGB")


def covering(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scale an image until it covers a height and a width, and cut off what stands out."""
    if (image.height, image.width) == size:
        return image
    return ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BILINEAR)


def _without_alpha(image: Image.Image) -> Image.Image:
    """Put an image with transparent pixels on white, as a page would show it."""
    if image.mode not in ("LA", "RGBA", "PA") and "transparency" not in image.info:
        return image
    shown = image.convert("RGBA")
    white = Image.new("RGBA", shown.size, "white")
    return Image.alpha_composite(white, shown)
