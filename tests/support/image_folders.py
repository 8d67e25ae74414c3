"""Folder data sets of smooth pictures, which behave as photographs do."""

from pathlib import Path

import numpy as np
from PIL import Image


def picture(number: int, size: tuple[int, int]) -> Image.Image:
    """Smooth, so that JPEG and resizing behave as with photographs."""
    generator = np.random.default_rng(number)
    coarse = generator.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def write_images(root: Path, count: int, size: tuple[int, int] | None = (12, 10), suffix: str = ".jpg") -> None:
    """A folder data set of three classes; sizes differ where `size` is None."""
    for part, images in (("train", count), ("test", 9)):
        for number in range(images):
            folder = root / part / "abc"[number % 3]
            folder.mkdir(parents=True, exist_ok=True)
            own = size or (20 + number % 7, 18 + number % 5)
            picture(number + 1000 * (part == "test"), own).save(folder / f"{number:04}{suffix}", quality=90)
