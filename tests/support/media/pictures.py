"""Real pictures of two packages, and odd ones that are made here, each by a name."""

from __future__ import annotations

import io
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

# Of scikit-image. The folder of the installed package is read; the package itself is not imported.
_PHOTOS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "cell.png",
    "chelsea.png",
    "chessboard_GRAY.png",
    "chessboard_RGB.png",
    "clock_motion.png",
    "coffee.png",
    "coins.png",
    "color.png",
    "grass.png",
    "gravel.png",
    "horse.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "logo.png",
    "microaneurysms.png",
    "moon.png",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "no_time_for_that_tiny.gif",
    "page.png",
    "phantom.png",
    "retina.jpg",
    "rocket.jpg",
    "text.png",
)
_DRAWINGS = ("test/images/0.png", "test/images/1.png", "train/images/2.png")  # of easy-vqa


def package_folder(name: str) -> Path:
    spec = find_spec(name)
    assert spec is not None and spec.submodule_search_locations, f"pip install -e '.[test]' brings {name}"
    return Path(spec.submodule_search_locations[0])


def picture_files() -> dict[str, Path]:
    """Return the real pictures."""
    photos = {name: package_folder("skimage") / "data" / name for name in _PHOTOS}
    return {**photos, **{f"vqa-{name[-5]}.png": package_folder("easy_vqa") / "data" / name for name in _DRAWINGS}}


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def smooth(height: int, width: int, channels: int = 3) -> np.ndarray:
    """Return a picture that differs in every direction and channel."""
    y, x = np.mgrid[:height, :width]
    waves = [127.5 * (1 + np.sin(x / (3 + c) + y / (7 + 2 * c))) for c in range(channels)]
    return np.stack(waves, axis=-1).astype(np.uint8)


def odd_pictures() -> dict[str, Image.Image]:
    """Return images of every mode, of odd sizes, with transparency and with several frames."""
    rgb, rgba = Image.fromarray(smooth(90, 70)), Image.fromarray(smooth(64, 100, 4), "RGBA")
    palette = rgb.quantize(16)
    see_through = rgb.quantize(16)
    see_through.info["transparency"] = 3
    deep = Image.fromarray(np.arange(60 * 80, dtype=np.uint16).reshape(60, 80) * 13)
    return {
        "1x1": Image.fromarray(noise(1, 1, 3)),
        "3000x1": Image.fromarray(noise(1, 3000, 3)),
        "1x3000": Image.fromarray(noise(3000, 1, 3)),
        "47x49": Image.fromarray(noise(49, 47, 3)),
        "fits 280": Image.fromarray(noise(768, 768, 3)),
        "palette": palette,
        "palette, transparent": see_through,
        "16-bit grey": deep,
        "float grey": Image.fromarray(smooth(40, 50, 1)[..., 0].astype(np.float32)),
        "bits": rgb.convert("1"),
        "grey": rgb.convert("L"),
        "grey, alpha": rgba.convert("LA"),
        "RGBA": rgba,
        "CMYK": rgb.convert("CMYK"),
        "YCbCr": rgb.convert("YCbCr"),
        "HSV": rgb.convert("HSV"),
        "animated": reopened([palette, rgb.rotate(90).quantize(16)], "GIF"),
    }


def reopened(frames: list[Image.Image], kind: str, **options: object) -> Image.Image:
    """Return the image that the frames are in a file of `kind`."""
    stream = io.BytesIO()
    frames[0].save(stream, kind, **({"save_all": True, "append_images": frames[1:]} if frames[1:] else {}), **options)
    return Image.open(stream)


def exif_rotated(path: Path, orientation: int) -> Path:
    """Write a JPEG that says how it has to be turned."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(smooth(80, 120)).save(path, exif=exif)
    return path
