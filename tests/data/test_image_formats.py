"""BMP, WebP, TIFF and PPM beside JPEG and PNG: the same pixels by every loader, and nothing but whole single images."""

import io
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from image_folders import picture
from PIL import Image

from awp_engine.data import DataError, Loading, load_dataset
from awp_engine.data.loaders.choose import LoaderName
from awp_engine.data.loaders.dali_loader import dali_problem
from awp_engine.data.sets.inspect import check, decode, for_every_decoder
from awp_engine.data.tools.pack import pack_folder
from awp_engine.data.tools.scan import list_files

FORMATS = {".bmp": "BMP", ".WEBP": "WEBP", ".tif": "TIFF", ".Tiff": "TIFF", ".ppm": "PPM"}
SIZE = (17, 13)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", sorted(set(FORMATS.values())))
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_whole_files_are_decoded_and_cut_ones_refused(kind: str, mode: str) -> None:
    content = encoded(picture(1, SIZE).convert(mode), kind)
    # WebP knows colour alone
    expected = np.asarray(Image.open(io.BytesIO(content))).reshape(13, 17, -1)
    assert np.array_equal(decode(content, "x"), expected)
    assert np.array_equal(decode(for_every_decoder(content, "x"), "x"), expected)
    for length in range(1, len(content), 1 + len(content) // 40):
        with pytest.raises(DataError, match=r"^x"):
            decode(content[:length], "x")
    with pytest.raises(DataError, match=rf"is {kind}; expected what its name says"):
        check(content, "x", suffix=".png")


def test_other_modes_and_several_images_are_refused() -> None:
    image = picture(1, SIZE)
    for content, message in (
        (encoded(image.convert("P"), "BMP"), r"a palette image"),
        (encoded(image.convert("RGBA"), "TIFF"), r"with transparency"),
        (encoded(image.convert("F"), "TIFF"), r"a TIFF image of another kind \(mode F\)"),
        (encoded(image, "TIFF", save_all=True, append_images=[image]), "is a TIFF of several images"),
        (encoded(image, "WEBP", save_all=True, append_images=[picture(2, SIZE)]), "is a WEBP of several images"),
        (encoded(image, "GIF"), "is GIF; expected JPEG, PNG, BMP, WebP, TIFF or PPM: convert"),
        (encoded(Image.new("RGB", (1, 9)), "BMP"), "expected at least 2x2"),
    ):
        with pytest.raises(DataError, match=message):
            check(content, "x")


def test_the_command_that_a_refusal_gives_makes_the_file_usable(tmp_path: Path) -> None:
    images = {"RGBA.png": Image.new("RGBA", SIZE, (9, 9, 9, 0)), "LA.png": Image.new("LA", SIZE, (7, 255))}
    images |= {"P.png": picture(1, SIZE).convert("P"), "CMYK.jpg": picture(1, SIZE).convert("CMYK")}
    for name, image in images.items():
        image.save(tmp_path / name)
    with pytest.raises(DataError, match=r"with transparency .*convert it, such as by python -c") as found:
        check((tmp_path / "RGBA.png").read_bytes(), "x")
    command = str(found.value).partition("such as by python ")[2].removesuffix(" FILE")
    subprocess.run([sys.executable, *shlex.split(command), *(tmp_path / name for name in images)], check=True)
    found = {name: decode((tmp_path / name).read_bytes(), name) for name in images}
    assert all(pixels.shape == (13, 17, 3) for pixels in found.values())
    # what was transparent is white
    assert (found["RGBA.png"] == 255).all()
    assert (found["LA.png"] == 7).all()
    assert np.array_equal(found["P.png"], np.asarray(images["P.png"].convert("RGB")))


def test_a_folder_of_all_formats_by_every_loader_and_packed(tmp_path: Path) -> None:
    """`validation` where there is no `test`; DALI and Pillow give the same bytes; shards keep the files."""
    root = tmp_path / "images"
    for part, count in (("train", 12), ("validation", 4)):
        for number in range(count):
            folder = root / part / "ab"[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            suffix = list(FORMATS)[number % len(FORMATS)]
            file = folder / f"{number:02}{suffix}"
            file.write_bytes(encoded(picture(number, SIZE), FORMATS[suffix]))
    loaders: list[LoaderName] = ["resident", "torch", "dali"]
    found = {}
    for name in loaders if dali_problem() is None else loaders[:2]:
        loading = Loading(loader=name, workers=0 if name == "torch" else 1)
        data = load_dataset("folder", root=root, held_out_fraction=0.0, seed=0, loading=loading)
        assert data.notes == (f"{root / 'validation'} is taken as the test split, as there is no test folder",)
        found[name] = data.train.resident().images
        assert (len(data.train), len(data.test)) == (12, 4)
    assert all(torch.equal(images, found["resident"]) for images in found.values())
    assert set(list_files(root)[0].values()) == {None}
    pack_folder(root, tmp_path / "packed")
    packed = load_dataset("webdataset", root=tmp_path / "packed", held_out_fraction=0.0, seed=0)
    assert len(packed.test) == 4
    order = {bytes(image.numpy().data): n for n, image in enumerate(found["resident"].contiguous())}
    assert {order[bytes(image.contiguous().numpy().data)] for image in packed.train.resident().images} == set(range(12))
    (root / "train" / "a" / "x.gif").write_bytes(encoded(picture(1, SIZE), "GIF"))
    with pytest.raises(DataError, match=r"x.gif is GIF"):
        load_dataset("folder", root=root, held_out_fraction=0.0, seed=0)
