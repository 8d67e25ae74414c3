"""Folders of small images, and files of every kind that cannot be trained on."""

import io
import os
import signal
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from awp_engine.data.sets.inspect import decode
from awp_engine.data.tools.pack import pack_folder
from awp_engine.observe.bars import NoBar

CLASSES = 10


def random_image(seed: int, side: int = 12, channels: int = 3) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (side, side, channels), dtype=np.uint8)
    return Image.fromarray(values if channels == 3 else values[..., 0])


def encode(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def make_folder(root: Path, images: int = 1000, side: int = 12) -> Path:
    """train/ and test/ with 10 classes, a fifth of the images in test, every fourth a PNG file."""
    for number in range(images):
        kind, suffix = ("PNG", "png") if number % 4 == 0 else ("JPEG", ("jpg", "jpeg", "JPG")[number % 3])
        part = "test" if number // CLASSES % 5 == 0 else "train"
        file = root / part / f"class_{number % CLASSES}" / f"{number:05d}.{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode(random_image(number, side), kind))
    return root


def _chunk(tag: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))


def huge_png(side: int = 20_000) -> bytes:
    """A sound grey image, black all over: 400 million pixels in half a megabyte."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    # Blocks that end in a full flush can be repeated.
    block = packer.compress(bytes(side // 100 * (side + 1))) + packer.flush(zlib.Z_FULL_FLUSH)
    adler = (side * (side + 1) % 65521) << 16 | 1
    data = b"\x78\x01" + block * 100 + b"\x03\0" + struct.pack(">I", adler)
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def plant(root: Path) -> dict[Path, str]:
    """Adds files of the 12 kinds to `make_folder`'s, and says which kind each one is."""
    sound = encode(random_image(1_000_000), "JPEG")
    flipped = bytearray(encode(random_image(1_000_001), "PNG"))
    flipped[len(flipped) // 2] ^= 1
    frames = [random_image(seed) for seed in (2_000_000, 2_000_001)]
    contents = {
        "train/class_0/corrupt.png": (bytes(flipped), "corrupt"),
        "test/class_1/truncated.jpg": (sound[: len(sound) // 2], "truncated"),
        "train/class_2/empty.jpg": (b"", "empty"),
        "train/class_3/cmyk.jpg": (encode(random_image(1_000_002).convert("CMYK"), "JPEG"), "colour-mode"),
        "train/class_4/sixteen.png": (encode(Image.new("I;16", (12, 12), 40_000), "PNG"), "sixteen-bit"),
        "test/class_5/one.png": (encode(random_image(1_000_003, 1), "PNG"), "too-small"),
        "train/class_6/huge.png": (huge_png(), "too-large"),
        "train/class_7/animated.png": (
            encode(frames[0], "PNG", save_all=True, append_images=frames[1:]),
            "animated",
        ),
        "test/class_8/really_a.png": (encode(random_image(1_000_004), "JPEG"), "wrong-extension"),
        "test/unicorn/000.jpg": (encode(random_image(1_000_005), "JPEG"), "no-such-class"),
        os.fsdecode(b"train/class_9/caf\xe9 \\.jpg"): (encode(random_image(1_000_006), "JPEG"), "bad-name"),
    }
    planted = {}
    for name, (content, kind) in contents.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(content)
        planted[root / name] = kind
    pipe, loop = root / "train" / "class_0" / "pipe.jpg", root / "train" / "class_0" / "loop.jpg"
    os.mkfifo(pipe)
    loop.symlink_to(loop.name)
    planted |= {pipe: "unreadable", loop: "unreadable"}
    # root may read all files
    if os.geteuid() != 0:
        locked = root / "train" / "class_0" / "locked.jpg"
        locked.write_bytes(sound)
        locked.chmod(0)
        planted[locked] = "unreadable"
    return planted


def crash_or_decode(content: bytes, name: str) -> object:
    """A decoder with a fault: files that end in one word kill it."""
    if content.endswith(b"SEGFAULT"):
        os.kill(os.getpid(), signal.SIGSEGV)
    return decode(content, name)


def hang_on_seven(number: int) -> int:
    while number == 7:
        signal.pause()
    return number * number


def refuse_three(number: int) -> int:
    if number == 3:
        raise ValueError("three is refused")
    return number


def pack_and_die(root: Path, out: Path) -> None:
    """Packs, and is killed when the first shard is there."""

    class Die(NoBar):
        def set(self, done: int, total: int) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

    pack_folder(root, out, shard_bytes=20 * 1024, workers=2, bar=Die)
