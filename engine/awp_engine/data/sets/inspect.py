"""What an image file's bytes are, found from its header, and its pixels where nothing about it is in doubt."""

import io
import re
import struct
import zlib
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from awp_engine.data.dataset import DataError
from awp_engine.files.text import reason

# 64 Mi pixels decode into 200 MB, which a loader's worker can afford; Pillow's own alarm begins a third above.
MAX_PIXELS = 64 * 2**20
# more than MAX_PIXELS take without any compression
MAX_BYTES = 256 * 2**20
MIN_SIDE = 2

# Cameras and editors write a few KB after the end of the image.
_TAIL = 64 * 2**10
# Metadata of tens of MB come in some hundred segments; more is an attack on whoever walks them.
_MAX_SEGMENTS = 10_000
# Every scan of a progressive file visits all pixels; encoders write about ten.
_MAX_SCANS = 100

Format = Literal["JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM"]
FORMAT_SUFFIXES: dict[Format, tuple[str, ...]] = {
    "JPEG": (".jpg", ".jpeg"),
    "PNG": (".png",),
    "BMP": (".bmp",),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm"),
}
_FORMATS = "JPEG, PNG, BMP, WebP, TIFF or PPM"
# whose headers are left to Pillow
_BY_PILLOW: tuple[tuple[bytes, int, Format], ...] = (
    (b"BM", 0, "BMP"),
    (b"WEBP", 8, "WEBP"),
    (b"II*\0", 0, "TIFF"),
    (b"MM\0*", 0, "TIFF"),
    (b"P5", 0, "PPM"),
    (b"P6", 0, "PPM"),
)
_OTHER_FORMATS = (
    (b"GIF8", 0, "GIF"),
    (b"ftypavif", 4, "AVIF"),
    (b"ftyphe", 4, "HEIF"),
    (b"ftypmif1", 4, "HEIF"),
    (b"\0\0\0\x0cjP  ", 0, "JPEG 2000"),
    (b"\xff\x0a", 0, "JPEG XL"),
    (b"<!DOCTYPE", 0, "HTML"),
    (b"<html", 0, "HTML"),
    (b"<svg", 0, "SVG"),
    (b"PK\x03\x04", 0, "a ZIP archive"),
)
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"IEND\xaeB`\x82"
# by colour type and bits
_PNG_MODES = {
    0: {1: "1", 2: "L", 4: "L", 8: "L", 16: "I;16"},
    2: {8: "RGB", 16: "RGB;16"},
    3: {1: "P", 2: "P", 4: "P", 8: "P"},
    4: {8: "LA", 16: "LA;16"},
    6: {8: "RGBA", 16: "RGBA;16"},
}
_JPEG_MODES = {1: "L", 3: "RGB", 4: "CMYK"}
_ADVICE = {
    "1": "a black-and-white image",
    "P": "a palette image",
    "LA": "a grey image with transparency",
    "RGBA": "a colour image with transparency",
    "CMYK": "a CMYK image for print",
}
# for a shell; what is transparent becomes white, as the colours below it may be anything
TO_RGB = (
    "python -c \"import sys; from PIL import Image; [Image.alpha_composite(Image.new('RGBA', (i := "
    "Image.open(f).convert('RGBA')).size, 'white'), i).convert('RGB').save(f) for f in sys.argv[1:]]\" FILE"
)
_CHUNK = struct.Struct(">I4s")
_IHDR = struct.Struct(">I4sIIBBBBB")
_FRAME = struct.Struct(">HBHHB")
# what ends entropy-coded data: no stuffed byte, no restart marker, no fill byte
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")

_DHT, _EOI, _SOS, _DQT, _DRI, _COM, _ADOBE = 0xC4, 0xD9, 0xDA, 0xDB, 0xDD, 0xFE, 0xEE
_FRAMES = frozenset(range(0xC0, 0xD0)) - {_DHT, 0xC8, 0xCC}
_STANDALONE = frozenset([0x00, 0x01, *range(0xD0, 0xD9), _EOI])
_BETWEEN_SCANS = frozenset([_DHT, _SOS, _DQT, _DRI, _COM, *range(0xE0, 0xF0)])


class BadImageError(DataError):
    """A file that cannot be used as an image.

    Attributes:
        kind: one word of what is wrong, as `awp data scan` counts it.
    """

    def __init__(self, message: str, kind: str = "corrupt") -> None:
        super().__init__(message)
        self.kind = kind


class Header(NamedTuple):
    """What an image file says it is.

    Attributes:
        format: of the content, whatever the name says.
        width, height: in pixels.
        mode: as Pillow calls it; with ";16" or ";12" where there are so many bits a channel (Pillow hides those of
            colour PNG files).
        animated: a PNG file with the chunk acTL, or a WebP or TIFF file of several images.
    """

    format: Format
    width: int
    height: int
    mode: str
    animated: bool


def read_header(content: bytes, name: str) -> Header:
    """Reads the header of an image file, which takes microseconds.

    Args:
        content: the file's bytes, whole.
        name: the file, for messages.

    Raises:
        DataError: the content is of no format that is read, or empty, or its header is broken.
    """
    return _header(content, name)[0]


def check(content: bytes, name: str, *, suffix: str | None = None, max_pixels: int = MAX_PIXELS) -> Header:
    """Reads the header and refuses all that can be told without decoding.

    Accepted are JPEG (baseline and progressive), PNG, BMP, WebP, TIFF and binary PPM files of one image in RGB or 8-bit
    grey, of at least 2x2 and at most `max_pixels` pixels; the first two have to end as such files do.

    Args:
        content: the file's bytes, whole.
        name: the file, for messages.
        suffix: of the file's name, such as ".png", which has to fit the content; None leaves that out.
        max_pixels: width times height.

    Raises:
        DataError: a `BadImageError`, one line with the file, what it is, what was expected and what to do.
    """
    return _check(content, name, suffix, max_pixels)[0]


def decode(content: bytes, name: str) -> NDArray[np.uint8]:
    """Decodes a file that `check` accepts; nothing is repaired or filled in.

    Every damaged byte of a PNG file is found. JPEG has no checksums: found are missing data and broken structure, while
    a flipped bit may only change the pixels. EXIF orientation is not applied: pixels come as they are stored.

    Returns:
        uint8 [H, W, C], C = 1 for grey and 3 for RGB.

    Raises:
        DataError: a `BadImageError`, for what `check` refuses and for truncated or corrupt data.
    """
    header, at = _check(content, name, None, MAX_PIXELS)
    bare = content
    if header.format == "JPEG":
        bare = _bare_jpeg(content, name, at)
    elif header.format == "PNG":
        bare = _bare_png(content, name)
    try:
        image = Image.open(io.BytesIO(bare), formats=(header.format,))
        image.load()
        pixels = np.array(image)
    except MemoryError:
        raise
    # Hostile bytes reach far corners of Pillow, which raises whatever comes up there.
    except Exception as error:
        kind = "truncated" if "truncated" in str(error) else "corrupt"
        why = "broken header" if isinstance(error, Image.UnidentifiedImageError) else reason(error)
        raise BadImageError(f"{name} cannot be decoded: {why}; replace or remove it", kind) from error
    if image.mode != header.mode or image.size != (header.width, header.height):
        raise BadImageError(
            f"{name} cannot be decoded: {image.mode} {image.size[0]}x{image.size[1]} after a header of "
            f"{header.mode} {header.width}x{header.height}; replace or remove it"
        )
    # Pillow leaves rows black that the data lack; the last one of an interlaced image is one of the last two.
    if header.format == "PNG" and not all(row.any() for row in pixels[-2:]) and _png_rows_missing(bare, header.mode):
        raise _broken(name, "PNG that lacks some of its rows", "truncated")
    return pixels.reshape(header.height, header.width, -1)


def for_every_decoder(content: bytes, name: str) -> bytes:
    """A JPEG or PNG file as it is, any other as a PNG of the same pixels: decoders agree about these two.

    Raises:
        DataError: as `decode`, for what is turned into a PNG.
    """
    if content.startswith((b"\xff\xd8\xff", _PNG_SIGNATURE)):
        return content
    pixels, file = decode(content, name), io.BytesIO()
    Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0]).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _broken(name: str, what: str, kind: str = "corrupt") -> BadImageError:
    return BadImageError(f"{name}: {what}; replace or remove it", kind)


def _header(content: bytes, name: str) -> tuple[Header, int]:
    """The header, and where what follows it begins."""
    if content.startswith(b"\xff\xd8\xff"):
        return _jpeg_header(content, name)
    if content.startswith(_PNG_SIGNATURE):
        return _png_header(content, name)
    if not content:
        raise BadImageError(f"{name} is empty; expected an image, {_FORMATS}: replace or remove it", "empty")
    for magic, at, kind in _BY_PILLOW:
        if content.startswith(magic, at):
            return _pillow_header(content, name, kind), 0
    for magic, at, other in _OTHER_FORMATS:
        if content.startswith(magic, at):
            raise BadImageError(f"{name} is {other}; expected {_FORMATS}: convert or remove it", "wrong-extension")
    raise BadImageError(f"{name} is none of {_FORMATS}; replace or remove it")


def _pillow_header(content: bytes, name: str, kind: Format) -> Header:
    try:
        with Image.open(io.BytesIO(content), formats=(kind,)) as image:
            return Header(kind, *image.size, image.mode, getattr(image, "n_frames", 1) > 1)
    except MemoryError:
        raise
    # hostile bytes reach far corners of Pillow
    except Exception as error:
        why = "broken header" if isinstance(error, Image.UnidentifiedImageError) else reason(error)
        raise _broken(name, f"{kind} that cannot be read: {why}") from error


def _segments(content: bytes, name: str, what: str, inside: str) -> Iterator[tuple[int, int, int]]:
    """Place, marker and length of the segments before a JPEG file's pixels; `what` and `inside` are for messages."""
    at, end = 2, len(content)
    for _ in range(_MAX_SEGMENTS):
        if at + 4 > end:
            raise _broken(name, f"JPEG of {end} bytes that ends within its {inside}", "truncated")
        if content[at] != 0xFF:
            raise _broken(name, f"{what}: no marker at byte {at}")
        if content[at + 1] == 0xFF:
            at += 1
            continue
        length = content[at + 2] << 8 | content[at + 3]
        yield at, content[at + 1], length
        at += 2 + length


def _jpeg_header(content: bytes, name: str) -> tuple[Header, int]:
    for at, marker, length in _segments(content, name, "broken JPEG header", "header"):
        if marker in _FRAMES:
            return _jpeg_frame(content, name, at, marker, length), at
        if marker in _STANDALONE or marker == _SOS or length < 2:
            raise _broken(name, f"broken JPEG header: marker {marker:02x} and length {length} at byte {at}")
    raise _broken(name, f"broken JPEG header: over {_MAX_SEGMENTS:,} segments")


def _jpeg_frame(content: bytes, name: str, at: int, marker: int, length: int) -> Header:
    if at + 2 + length > len(content):
        raise _broken(name, f"JPEG of {len(content)} bytes that ends within its header", "truncated")
    if length < 8:
        raise _broken(name, f"broken JPEG header: frame of length {length}")
    _, bits, height, width, components = _FRAME.unpack_from(content, at + 2)
    mode = _JPEG_MODES.get(components)
    if mode is None or length != 8 + 3 * components:
        raise _broken(name, f"broken JPEG header: {components} components in a frame of length {length}")
    if width == 0 or height == 0:
        raise _broken(name, f"broken JPEG header: {width}x{height} pixels")
    if marker not in (0xC0, 0xC1, 0xC2):
        raise BadImageError(
            f"{name} is a JPEG of frame type {marker - 0xC0} (lossless, hierarchical or arithmetic); "
            "expected a baseline or progressive one: convert it",
            "unsupported",
        )
    return Header("JPEG", width, height, mode if bits == 8 else f"{mode};{bits}", False)


def _png_header(content: bytes, name: str) -> tuple[Header, int]:
    end = len(content)
    if end < 33:
        raise _broken(name, f"PNG of {end} bytes that ends within its header", "truncated")
    length, tag, width, height, bits, colour, compression, row_filter, interlace = _IHDR.unpack_from(content, 8)
    if tag != b"IHDR" or length != 13 or zlib.crc32(content[12:29]).to_bytes(4) != content[29:33]:
        raise _broken(name, "broken PNG header")
    mode = _PNG_MODES.get(colour, {}).get(bits)
    if mode is None or compression or row_filter or interlace > 1 or not (0 < width < 2**31 and 0 < height < 2**31):
        raise _broken(name, f"broken PNG header: {width}x{height}, {bits} bits, colour type {colour}")
    at, animated = 33, False
    for _ in range(_MAX_SEGMENTS):
        if at + 12 > end:
            break
        length, tag = _CHUNK.unpack_from(content, at)
        if tag == b"IDAT":
            return Header("PNG", width, height, mode, animated), at
        if tag == b"IEND" or not tag.isalpha():
            raise _broken(name, f"broken PNG header: chunk {tag!r} at byte {at}, before any pixels")
        animated = animated or tag == b"acTL"
        at += 12 + length
    else:
        raise _broken(name, f"broken PNG header: over {_MAX_SEGMENTS:,} chunks")
    raise _broken(name, f"PNG of {end} bytes that ends within its header", "truncated")


def _check(content: bytes, name: str, suffix: str | None, max_pixels: int) -> tuple[Header, int]:
    header, at = _header(content, name)
    kind, width, height, mode, animated = header
    if suffix is not None and suffix.lower() not in FORMAT_SUFFIXES[kind]:
        right = FORMAT_SUFFIXES[kind][0]
        raise BadImageError(f"{name} is {kind}; expected what its name says: rename it to {right}", "wrong-extension")
    if mode not in ("RGB", "L"):
        if ";" in mode:
            bits = mode.rpartition(";")[2]
            raise BadImageError(
                f"{name} has {bits} bits a channel ({mode}); expected RGB or grey of 8 bits: convert it", "sixteen-bit"
            )
        what = _ADVICE.get(mode, f"a {kind} image of another kind")
        raise BadImageError(
            f"{name} is {what} (mode {mode}); expected RGB or L (8-bit grey): convert it, such as by {TO_RGB}",
            "colour-mode",
        )
    if animated:
        what = "is an animated PNG" if kind == "PNG" else f"is a {kind} of several images"
        raise BadImageError(f"{name} {what}; expected a single image: convert or remove it", "animated")
    if width < MIN_SIDE or height < MIN_SIDE:
        raise BadImageError(
            f"{name} has {width}x{height} pixels; expected at least {MIN_SIDE}x{MIN_SIDE}: replace or remove it",
            "too-small",
        )
    if width * height > max_pixels:
        raise BadImageError(
            f"{name} has {width}x{height} pixels; expected at most {max_pixels:,} in all: make it smaller or remove it",
            "too-large",
        )
    tail = max(at, len(content) - _TAIL)
    if kind in ("JPEG", "PNG") and content.rfind(b"\xff\xd9" if kind == "JPEG" else _PNG_END, tail) < 0:
        raise BadImageError(
            f"{name} is truncated: {len(content)} bytes of {kind} without its end marker; replace or remove it",
            "truncated",
        )
    return header, at


def _bare_jpeg(content: bytes, name: str, frame: int) -> bytes:
    """The file without metadata, about which Pillow would warn, and with its structure seen to be whole."""
    kept = [content[:2]]
    for at, marker, length in _segments(content, name, "broken JPEG", "tables"):
        if marker == _SOS:
            _walk_scans(content, name, at)
            return b"".join([*kept, content[at:]])
        if length < 2 or (marker not in _BETWEEN_SCANS and at != frame):
            raise _broken(name, f"broken JPEG: unexpected marker {marker:02x} at byte {at}, before its pixels")
        # JFIF and Adobe's segment decide what the colours mean.
        if marker in (0xE0, _ADOBE) or not (marker == _COM or 0xE0 <= marker <= 0xEF):
            kept.append(content[at : at + 2 + length])
    raise _broken(name, f"broken JPEG: over {_MAX_SEGMENTS:,} segments before its pixels")


def _walk_scans(content: bytes, name: str, at: int) -> None:
    scans = 0
    for _ in range(_MAX_SEGMENTS):
        marker = content[at + 1]
        if marker == _EOI:
            return
        if marker not in _BETWEEN_SCANS:
            raise _broken(name, f"broken JPEG: unexpected marker {marker:02x} at byte {at}, between its pixels")
        scans += marker == _SOS
        if scans > _MAX_SCANS:
            raise _broken(name, f"JPEG with over {_MAX_SCANS} scans, which would decode for hours")
        at += 2 + (int.from_bytes(content[at + 2 : at + 4]) or 2)
        # Nothing but fill bytes lies between segments, unless a scan's data do.
        found = _MARKER.search(content, at)
        if found is None:
            raise _broken(name, f"JPEG of {len(content)} bytes that ends within its pixels", "truncated")
        if marker != _SOS and content[at : found.start()].strip(b"\xff"):
            raise _broken(name, f"broken JPEG: no marker at byte {at}")
        at = found.start()
    raise _broken(name, f"broken JPEG: over {_MAX_SEGMENTS:,} segments")


def _bare_png(content: bytes, name: str) -> bytes:
    """The file without the chunks that hold no pixels, and with all checksums seen to be right.

    Pillow leaves the checksums of pixels unread.
    """
    at, end = len(_PNG_SIGNATURE), len(content)
    kept, view = [content[:at]], memoryview(content)
    # encoders write pixels in chunks of kilobytes; millions of empty ones are an attack
    most = _MAX_SEGMENTS + end // 1024
    for _ in range(most):
        if at + 12 > end:
            break
        length, tag = _CHUNK.unpack_from(content, at)
        after = at + 12 + length
        if after > end:
            break
        if zlib.crc32(view[at + 4 : after - 4]) != int.from_bytes(view[after - 4 : after]):
            raise _broken(name, f"PNG with a wrong checksum in chunk {tag!r} at byte {at}")
        if tag == b"IHDR" and at > len(_PNG_SIGNATURE):
            raise _broken(name, f"broken PNG: a second header at byte {at}")
        if tag in (b"IHDR", b"IDAT", b"IEND"):
            kept.append(content[at:after])
        if tag == b"IEND":
            return b"".join(kept)
        at = after
    else:
        raise _broken(name, f"broken PNG: over {most:,} chunks")
    raise _broken(name, f"PNG of {end} bytes that ends within its pixels", "truncated")


def _png_rows_missing(bare: bytes, mode: str) -> bool:
    """Whether the pixels' data, chunks after the 33 bytes of the header, are less than the header asks for."""
    _, _, width, height, bits, _, _, _, interlace = _IHDR.unpack_from(bare, 8)
    # Adam7: where each pass begins, and its steps
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    expected = 0
    for left, top, across, down in passes if interlace else ((0, 0, 1, 1),):
        columns, rows = -((left - width) // across), -((top - height) // down)
        expected += rows * (1 + (columns * bits * len(mode) + 7) // 8) if columns > 0 and rows > 0 else 0
    inflate, at = zlib.decompressobj(), 33
    while expected > 0 and not inflate.eof and at < len(bare):
        length, tag = _CHUNK.unpack_from(bare, at)
        if tag == b"IDAT":
            # no more than is missing: a megabyte of data may unpack to a gigabyte
            expected -= len(inflate.decompress(bare[at + 8 : at + 8 + length], expected))
        at += 12 + length
    return expected > 0
