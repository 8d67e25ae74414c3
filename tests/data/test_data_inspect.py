"""What image files are, from their bytes: real JPEG and PNG files, and the same after damage of every sort."""

import io
import pickle
import struct
import tracemalloc
import warnings
import zlib
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from awp_engine.data import DataError
from awp_engine.data.sets.inspect import MAX_PIXELS, BadImageError, Header, check, decode, read_header


def pixels(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return noise[..., 0] if channels == 1 else noise


def encode(image: Image.Image | np.ndarray, kind: str, **options) -> bytes:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(tag: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))


def png(width: int, height: int, bits: int, colour: int, extra: bytes = b"", rows: bytes = b"\0") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def with_metadata() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a camera" * 500
    return encode(pixels(20, 30), "JPEG", exif=exif, icc_profile=b"p" * 70_000, comment=b"hello")


@cache
def sound() -> dict[str, bytes]:
    return {
        "jpeg": encode(pixels(32, 32), "JPEG", quality=90),
        "grey-jpeg": encode(pixels(9, 17, 1), "JPEG"),
        "progressive": encode(pixels(40, 24), "JPEG", progressive=True),
        "444-restarts": encode(pixels(40, 24), "JPEG", subsampling=0, restart_marker_blocks=1),
        "metadata": with_metadata(),
        "png": encode(pixels(32, 32), "PNG"),
        "grey-png": encode(pixels(9, 17, 1), "PNG"),
        "2-bit-png": png(4, 2, 2, 0, rows=b"\0\x1b\0\xe4"),
        "smallest": encode(pixels(2, 2), "PNG"),
    }


@pytest.mark.parametrize("key", list(sound()))
def test_sound_files_are_read_as_pillow_reads_them(key: str) -> None:
    content = sound()[key]
    image = Image.open(io.BytesIO(content))
    header = check(content, key, suffix="." + str(image.format).lower())
    assert header == Header(image.format, *image.size, image.mode, False)
    array = decode(content, key)
    assert array.dtype == np.uint8
    assert array.ndim == 3
    assert array.flags.writeable
    assert np.array_equal(array, np.asarray(image).reshape(array.shape))


def test_some_bytes_after_the_end_are_allowed() -> None:
    for key in ("jpeg", "png"):
        content = sound()[key] + b"left by a camera" * 200
        assert np.array_equal(decode(content, key), decode(sound()[key], key))
        with pytest.raises(DataError, match="end marker"):
            check(sound()[key] + bytes(2**20), key)


MODES = {
    "cmyk.jpg": (encode(Image.new("CMYK", (8, 8)), "JPEG"), "CMYK", "colour-mode"),
    "palette.png": (encode(Image.new("P", (8, 8)), "PNG"), "P", "colour-mode"),
    "alpha.png": (encode(Image.new("RGBA", (8, 8)), "PNG"), "RGBA", "colour-mode"),
    "grey-alpha.png": (encode(Image.new("LA", (8, 8)), "PNG"), "LA", "colour-mode"),
    "bits.png": (encode(Image.new("1", (8, 8)), "PNG"), "1", "colour-mode"),
    "grey-16.png": (encode(Image.new("I;16", (8, 8)), "PNG"), "I;16", "sixteen-bit"),
    "rgb-16.png": (png(1, 2, 16, 2, rows=bytes(14)), "RGB;16", "sixteen-bit"),
    "alpha-16.png": (png(1, 2, 16, 6, rows=bytes(18)), "RGBA;16", "sixteen-bit"),
    "12-bit.jpg": (sound()["jpeg"].replace(b"\xff\xc0\0\x11\x08", b"\xff\xc1\0\x11\x0c"), "RGB;12", "sixteen-bit"),
}


@pytest.mark.parametrize("name", list(MODES))
def test_modes_that_are_refused(name: str) -> None:
    content, mode, kind = MODES[name]
    assert read_header(content, name).mode == mode
    for function in (check, decode):
        with pytest.raises(
            BadImageError, match=rf"{name}.*; expected .*: convert it(, such as by python -c .* FILE)?$"
        ) as found:
            function(content, name)
        assert found.value.kind == kind


def test_what_else_is_refused_says_what_to_do() -> None:
    jpeg, png_file = sound()["jpeg"], sound()["png"]
    frames = [Image.fromarray(pixels(8, 8, seed=seed)) for seed in range(3)]
    animated = encode(frames[0], "PNG", save_all=True, append_images=frames[1:])
    cases = [
        (b"", ".jpg", "empty"),
        (encode(pixels(1, 1), "PNG"), ".png", "too-small"),
        (encode(pixels(300, 1), "JPEG"), ".jpg", "too-small"),
        (png(20_000, 20_000, 8, 2), ".png", "too-large"),
        (animated, ".png", "animated"),
        (jpeg, ".png", "wrong-extension"),
        (png_file, ".JPEG", "wrong-extension"),
        (png_file, "", "wrong-extension"),
        (encode(frames[0], "GIF"), ".png", "wrong-extension"),
        (encode(frames[0], "WEBP"), ".jpg", "wrong-extension"),
        (b"some text", ".jpg", "corrupt"),
        (jpeg[:-2], ".jpg", "truncated"),
        (jpeg[:100], ".jpg", "truncated"),
        (png_file[:-1], ".png", "truncated"),
        (png_file[:20], ".png", "truncated"),
        (jpeg.replace(b"\xff\xc0", b"\xff\xc9"), ".jpg", "unsupported"),
    ]
    for content, suffix, kind in cases:
        with pytest.raises(BadImageError) as found:
            check(content, "a/file", suffix=suffix)
        message = str(found.value)
        assert (found.value.kind, "\n" in message) == (kind, False), message
        assert message.startswith("a/file")
        assert any(word in message for word in ("replace", "remove", "convert", "rename")), message
    assert check(png_file, "x", max_pixels=32 * 32).width == 32
    with pytest.raises(DataError, match=r"32x32 pixels; expected at most 1,023"):
        check(png_file, "x", max_pixels=1023)
    assert (Image.MAX_IMAGE_PIXELS or 0) > MAX_PIXELS


def test_damage_that_pillow_passes_over_is_found() -> None:
    png_file, jpeg = sound()["png"], sound()["jpeg"]
    pixel_data = png_file.index(b"IDAT") + 4
    flipped = bytearray(png_file)
    # the checksum of the chunk, which Pillow does not read
    flipped[png_file.index(b"IEND") - 6] ^= 1
    assert flipped[pixel_data:] != png_file[pixel_data:]
    Image.open(io.BytesIO(flipped)).load()
    with pytest.raises(DataError, match="wrong checksum in chunk b'IDAT'"):
        decode(bytes(flipped), "x")
    # a marker in the middle of the pixels: decoders fill the rest with grey
    start = jpeg.index(b"\xff\xda") + 300
    cut = jpeg[:start] + b"\xff\xc4\0\x02" + jpeg[start:]
    Image.open(io.BytesIO(cut)).load()
    with pytest.raises(DataError, match="broken JPEG: no marker"):
        decode(cut, "x")
    second = png(64, 64, 8, 2, extra=chunk(b"IHDR", struct.pack(">IIBBBBB", 9_000, 9_000, 8, 2, 0, 0, 0)))
    with pytest.raises(DataError, match="second header"):
        decode(second, "x")


@pytest.mark.parametrize("interlace", [0, 1])
def test_missing_rows_are_truncation(interlace: int) -> None:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 5, 5, 8, 2, 0, 0, interlace))
    # pixels in each row of 5x5, in Adam7's order
    widths = (1, 1, 2, 1, 1, 3, 2, 2, 2, 5, 5) if interlace else (5,) * 5
    rows = b"".join(b"\0" + b"\7" * 3 * width for width in widths)
    for missing in (0, 1, 16, len(rows)):
        data = chunk(b"IDAT", zlib.compress(rows[: len(rows) - missing]))
        content = b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b"")
        if not missing:
            assert (decode(content, "x") == 7).all()
            continue
        with pytest.raises(BadImageError) as found:
            decode(content, "x")
        assert found.value.kind == "truncated"
    black = chunk(b"IDAT", zlib.compress(bytes(len(rows))))
    assert not decode(b"\x89PNG\r\n\x1a\n" + header + black + chunk(b"IEND", b""), "x").any()


def test_hostile_files_are_refused_after_bounded_work() -> None:
    comments = b"\xff\xd8" + b"\xff\xfe\0\x02" * 10**6
    with pytest.raises(DataError, match="over 10,000 segments"):
        read_header(comments, "x")
    with pytest.raises(DataError, match="over 10,000 segments"):
        read_header(b"\xff\xd8" + b"\xff" * 10**6, "x")
    with pytest.raises(DataError, match="over 10,000 chunks"):
        read_header(png(4, 4, 8, 2, extra=chunk(b"tEXt", b"") * 20_000), "x")
    # each scan of a progressive file costs a pass over all pixels
    jpeg = sound()["progressive"]
    last = jpeg.rindex(b"\xff\xda")
    with pytest.raises(DataError, match="over 100 scans"):
        decode(jpeg[:last] + jpeg[last:-2] * 5_000 + jpeg[-2:], "x")


@pytest.mark.parametrize("filler", [b"\xff\xdb\0\x02", b"\xff\xfe\0\x02", b"\xff"])
def test_floods_before_the_pixels_are_refused(filler: bytes) -> None:
    jpeg = sound()["jpeg"]
    start = jpeg.index(b"\xff\xda")
    flooded = jpeg[:start] + filler * 20_000 + jpeg[start:]
    assert check(flooded, "x").mode == "RGB"
    with pytest.raises(DataError, match="over 10,000 segments before its pixels"):
        decode(flooded, "x")


def test_floods_of_png_chunks_are_refused_and_bombs_stay_packed() -> None:
    content = sound()["png"]
    start = content.index(b"IDAT") - 4
    for tag in (b"IDAT", b"tEXt"):
        flooded = content[:start] + chunk(b"IDAT", b"") + chunk(tag, b"") * 12_000 + content[start:]
        with pytest.raises(DataError, match=r"broken PNG: over 10,\d+ chunks"):
            decode(flooded, "x")
    # black, so that its data are looked at: 32 MiB of them where 14 bytes are wanted
    bomb = png(2, 2, 8, 2, rows=bytes(2**25))
    tracemalloc.start()
    try:
        assert not decode(bomb, "x").any()
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def test_the_error_keeps_its_kind_between_processes() -> None:
    with pytest.raises(BadImageError) as found:
        check(b"", "x")
    again = pickle.loads(pickle.dumps(found.value))
    assert (str(again), again.kind) == (str(found.value), "empty")


@settings(max_examples=700)
@given(
    key=st.sampled_from(list(sound())),
    damage=st.lists(
        st.tuples(
            st.sampled_from(["flip", "cut", "insert", "remove", "double"]), st.integers(0, 2**30), st.binary(max_size=9)
        ),
        min_size=1,
        max_size=4,
    ),
)
def test_damaged_files_are_decoded_or_refused(key: str, damage: list[tuple[str, int, bytes]]) -> None:
    content = bytearray(sound()[key])
    for how, place, new in damage:
        at = place % max(1, len(content))
        if how == "flip" and content:
            content[at] ^= 1 << (place >> 20) % 8
        elif how == "cut":
            del content[at:]
        elif how == "insert":
            content[at:at] = new
        elif how == "remove":
            del content[at : at + 1 + len(new)]
        elif how == "double":
            content[at:at] = content[at : at + 300]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            array = decode(bytes(content), "x")
        except DataError as error:
            refused = str(error)
        else:
            refused = ""
    assert "\n" not in refused
    if refused:
        return
    assert array.dtype == np.uint8
    assert array.shape[2] in (1, 3)
    # The checksums of a PNG file leave no damage before its end unseen.
    if "png" in key or key == "smallest":
        assert np.array_equal(array, decode(sound()[key], "x"))


@given(content=st.binary(max_size=300), start=st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8"]))
def test_any_bytes_are_refused(content: bytes, start: bytes) -> None:
    with pytest.raises(DataError):
        decode(start + content, "x")
