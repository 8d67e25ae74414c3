"""What the library is built of: setup.py notes it in build.json, and bench/gpu.sh takes a library that came along.

`python csrc/sources.py ARCH` exits with 0 if the library beside the Python code was built of these sources, for ARCH;
with `--write` before ARCH it notes that it was.
"""

import hashlib
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "kernels" / "awp_kernels"


def digest() -> str:
    """SHA-256 over CMakeLists.txt and the C++ and CUDA sources, with their names."""
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".h", ".cu", ".cuh")]
    found = hashlib.sha256()
    for path in [ROOT / "CMakeLists.txt", *sorted(sources)]:
        found.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


def mismatch(arch: str) -> str | None:
    """Why the library that is there does not serve, or None.

    Args:
        arch: a CUDA architecture such as "90a"; "" wants no CUDA code.
    """
    try:
        report = json.loads((PACKAGE / "build.json").read_text())
        told, archs = report["sources"], report["archs"].split(";")
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return "there is no build.json that names sources and architectures"
    if not (PACKAGE / "libawp_kernels.so").is_file():
        return "there is no libawp_kernels.so"
    if told != digest():
        return "it was built of other sources"
    return None if not arch or arch in archs else f"it was built for {';'.join(archs) or 'no GPU'}, not for {arch}"


def write(folder: Path, archs: str, *, cpp: str | None = None, cuda: str | None = None) -> None:
    """Note what was built, in build.json.

    Args:
        folder: that of the library.
        archs: CUDA architectures, separated by ";".
        cpp: why the C++ part was left out, if it was.
        cuda: why the CUDA part was left out, if it was.
    """
    report = {"cpp": cpp, "cuda": cuda, "archs": archs, "sources": digest()}
    (folder / "build.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1] == "--write":
        left_out = None if sys.argv[2] else "left out when it was built: no architecture was given"
        sys.exit(write(PACKAGE, sys.argv[2], cuda=left_out))
    why = mismatch(sys.argv[1])
    print("the library that is there serves" if why is None else f"the library has to be built: {why}")
    sys.exit(why is not None)
