"""Pictures: from a file, an image or an array to rows of 48 x 48 pixels, bit for bit as transformers makes them.

What: `read_pixels` returns the pixels [3, height, width] of whatever a picture is given as; `fitted_size` is the size
at which the picture fills a budget of soft tokens; `cut_patches` enlarges or shrinks a picture to that size and cuts
it; `stack_patches` makes a model's inputs of several pictures.
How: torch's bicubic, antialiased resampling of uint8 on the CPU, which transformers' processor calls through
torchvision. Pillow's and a GPU's differ by some levels. A picture with transparency is put on white, also one from a
file, where transformers drops the transparency and shows the colour below it, most often black.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.image_utils import ChannelDimension, infer_channel_dimension_format

from specdec.media.container import OtherKindError, plays
from specdec.media.source import ADVICE, MediaError, MediaSource, as_source, media_library, readable

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 48  # pixels of a patch's side; each patch is a soft token
VALUES = 3 * SIDE * SIDE
BUDGETS = (70, 140, 280, 560, 1120)

_MOST_PIXELS = 1 << 27  # of a file; they take 7 bytes each while they are read, 8 while they are turned
_LONGEST_SIDE = 1 << 20  # pixels; resizing first widens each row of a picture to 48 pixels or more
_BAND = 1 << 20  # pixels that are converted at once
_RUNS_PROGRAMS = {"EPS"}  # Pillow would start Ghostscript
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class PicturePatches:
    """Hold a picture cut into patches [patches, 6912], in the type of its pixels; `across` of them lie in a row."""

    values: Tensor
    across: int
    budget: int


class PatchBatch(NamedTuple):
    """Hold the patches of several pictures, each padded to the budget."""

    values: Tensor  # [pictures, budget, 6912] float32, 0 after a picture's last patch
    positions: Tensor  # [pictures, budget, 2] int64: column and row of a patch, -1 after the last


def read_pixels(given: Any) -> Tensor:
    """Return the picture `given` as [3, height, width]: uint8, or the type of an array that holds other numbers.

    A file is turned upright as its EXIF data say; an image of Pillow is taken as it is. Of a moving picture it is the
    first frame. Raises ValueError when `given` holds no picture.
    """
    source = as_source(given, "picture")
    if source is not None:
        return _of_image(_open(source))
    if isinstance(given, (np.ndarray, Tensor)):
        return _of_array(given)
    if hasattr(given, "convert") and hasattr(given, "getbands"):
        with readable(MediaSource("an image of Pillow", b""), "picture"):
            return _of_image(given)
    raise ValueError(f"a picture is a path, bytes, a data URI, an image of Pillow or an array, not {type(given)}")


def _open(source: MediaSource) -> Image:
    images = media_library("PIL.Image", "picture")
    operations = media_library("PIL.ImageOps", "picture")
    with source.open() as stream, readable(source, "picture"):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", images.DecompressionBombWarning)  # the sizes are checked below
                image: Image = images.open(stream)
        except images.DecompressionBombError:
            raise MediaError(f"{source.name}: has more than {_MOST_PIXELS:,} pixels; make it smaller") from None
        except media_library("PIL", "picture").UnidentifiedImageError:
            if other := plays(source):
                raise OtherKindError(source.name, "picture", other) from None
            raise MediaError(
                f"{source.name}: cannot be read as a picture (its format is unknown); {ADVICE['picture']}"
            ) from None
        if image.format in _RUNS_PROGRAMS:
            raise MediaError(f"{source.name}: is a program for a printer ({image.format}); save it as PNG or JPEG")
        if image.width * image.height > _MOST_PIXELS or max(image.size) > _LONGEST_SIDE:
            raise MediaError(f"{source.name}: has {image.width:,} x {image.height:,} pixels; make it smaller")
        upright: Image = operations.exif_transpose(image)
        upright.load()
        return upright


def _of_image(image: Image) -> Tensor:
    pixels = torch.empty((3, image.height, image.width), dtype=torch.uint8)
    height = max(1, _BAND // max(1, image.width))
    for top in range(0, image.height, height):
        band = image.crop((0, top, image.width, min(top + height, image.height)))
        rows = torch.from_numpy(np.array(_as_rgb(band)))  # [height, width, 3]
        pixels[:, top : top + height] = rows.permute(2, 0, 1)
    return _checked(pixels)


def _as_rgb(image: Image) -> Image:
    images = media_library("PIL.Image", "picture")
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = images.alpha_composite(images.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


def _of_array(array: np.ndarray[Any, Any] | Tensor) -> Tensor:
    pixels = as_pixels(array, "picture")
    if pixels.ndim == 2:
        pixels = pixels[None]
    elif pixels.ndim != 3:
        raise ValueError(f"a picture as an array has 2 or 3 dimensions, not {list(pixels.shape)}; pass a list of them")
    else:
        pixels = channels_first(pixels)
    if pixels.shape[0] == 1:
        pixels = pixels.repeat(3, 1, 1)
    return _checked(on_white(pixels) if pixels.shape[0] == 4 else pixels)


def as_pixels(array: np.ndarray[Any, Any] | Tensor, kind: str) -> Tensor:
    """Return an array of pixels as a tensor. Raises ValueError for types and values that no pixels have."""
    try:
        pixels = torch.from_numpy(np.ascontiguousarray(array)) if isinstance(array, np.ndarray) else array.cpu()
        known = pixels.is_floating_point() or pixels.dtype in _INTEGERS
    except TypeError:  # numpy's types that torch does not have
        known = False
    if not known:
        raise ValueError(f"a {kind} as an array holds uint8 from 0 to 255, not {array.dtype}; convert it")
    if pixels.is_floating_point() and not bool(pixels.isfinite().all()):
        raise ValueError(f"a {kind} as an array holds pixels that are no finite numbers; compute it again")
    return pixels


def channels_first(pixels: Tensor) -> Tensor:
    """Return [..., channels, height, width] for an array with the 1, 3 or 4 channels before or after the sides."""
    try:
        last = infer_channel_dimension_format(pixels, num_channels=(1, 3, 4)) == ChannelDimension.LAST
    except ValueError:
        raise ValueError(
            f"an array of shape {list(pixels.shape)} is no picture: it needs 1, 3 or 4 channels, first or last"
        ) from None
    return pixels.movedim(-1, -3) if last else pixels


def on_white(pixels: Tensor) -> Tensor:
    """Return RGB on white of RGBA pixels [..., 4, height, width], in torchvision's arithmetic: floats are 0 to 1."""
    largest = None if pixels.is_floating_point() else torch.iinfo(pixels.dtype).max
    exact = pixels if largest is None else pixels.to(torch.float32) * (1.0 / largest)
    colour, opacity = exact[..., :3, :, :], exact[..., 3:, :, :]
    blended = colour * opacity + (1 - opacity)
    # A whole number is cut, not rounded, and the last thousandth keeps white from becoming one more than the largest.
    return blended if largest is None else (blended * (largest + 1.0 - 1e-3)).to(pixels.dtype)


def _checked(pixels: Tensor) -> Tensor:
    size = f"{pixels.shape[-1]:,} x {pixels.shape[-2]:,}"
    if not pixels.numel():
        raise ValueError(f"a picture of {size} pixels shows nothing; pass another one")
    if max(pixels.shape[-2:]) > _LONGEST_SIDE:
        raise ValueError(f"a picture of {size} pixels is longer than {_LONGEST_SIDE:,}; make it smaller")
    return pixels


def fitted_size(height: int, width: int, budget: int) -> tuple[int, int]:
    """Return height and width, multiples of 48, at which a picture fills `budget` patches and keeps its proportions.

    A picture so long that its short side would vanish gets one row (or column) of patches.
    """
    factor = math.sqrt(budget * SIDE * SIDE / (height * width))
    rows, columns = math.floor(factor * height / SIDE), math.floor(factor * width / SIDE)
    if rows == 0:
        rows, columns = 1, min(width // height, budget)
    elif columns == 0:
        rows, columns = min(height // width, budget), 1
    return rows * SIDE, columns * SIDE


def cut_patches(picture: Tensor, budget: int) -> PicturePatches:
    """Return the patches of a picture [3, height, width] that fills `budget` soft tokens."""
    pixels = _resize(picture, fitted_size(picture.shape[-2], picture.shape[-1], budget))
    down, across = pixels.shape[-2] // SIDE, pixels.shape[-1] // SIDE
    patches = pixels.reshape(3, down, SIDE, across, SIDE).permute(1, 3, 2, 4, 0)  # [down, across, 48, 48, 3]
    return PicturePatches(patches.reshape(down * across, VALUES), across, budget)


def stack_patches(
    pictures: Sequence[PicturePatches], budget: int, scale: Callable[[Tensor], Tensor] = lambda x: x * (1 / 255)
) -> PatchBatch:
    """Return the patches of pictures that were cut for `budget`; `scale` brings values from 0 to 255 to 0 to 1."""
    values = torch.zeros((len(pictures), budget, VALUES), dtype=torch.float32)
    positions = torch.full((len(pictures), budget, 2), -1, dtype=torch.int64)
    for picture, rows, places in zip(pictures, values, positions, strict=True):
        count, across = len(picture.values), picture.across
        exact = picture.values.is_floating_point()
        rows[:count] = scale(picture.values if exact else picture.values.to(torch.float32))  # [count, 6912]
        places[:count, 0] = torch.arange(across, dtype=torch.int64).repeat(count // across)
        places[:count, 1] = torch.arange(count // across, dtype=torch.int64).repeat_interleave(across)
    return PatchBatch(values, positions)


def _resize(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    if pixels.shape[-2:] == size:
        return pixels
    exact = pixels.dtype in (torch.uint8, torch.float32, torch.float64)
    resized = torch.nn.functional.interpolate(
        (pixels if exact else pixels.to(torch.float32))[None], size, mode="bicubic", antialias=True, align_corners=False
    )[0]
    if exact:
        return resized
    return (resized if pixels.is_floating_point() else resized.round()).to(pixels.dtype)
