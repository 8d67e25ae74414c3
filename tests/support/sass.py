"""What compiled kernels hold: SASS, registers and spills of a cubin, object or shared library, read by cuobjdump."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

_WIDE_LOAD = re.compile(r"\bLDG\.E[.\w]*\.(?:128|256)\b")
_WIDE_STORE = re.compile(r"\bSTG\.E[.\w]*\.(?:128|256)\b")
_LOCAL_ACCESS = re.compile(r"\b(?:STL|LDL)\b")
_USAGE = re.compile(r"(\w+)(?:\[\d+\])?:(\d+)")


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel for one architecture."""

    arch: str
    """Such as sm_90a."""
    name: str
    """Demangled where c++filt is at hand."""
    sass: str
    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    constant_bytes: int
    """Constant bank 0: the parameters and, before them, what the launch itself stores there."""

    @property
    def wide_loads(self) -> int:
        """Global loads of 16 bytes or more."""
        return len(_WIDE_LOAD.findall(self.sass))

    @property
    def wide_stores(self) -> int:
        """Global stores of 16 bytes or more."""
        return len(_WIDE_STORE.findall(self.sass))

    @property
    def local_accesses(self) -> int:
        """Loads and stores of local memory: spilled registers, or arrays indexed at run time."""
        return len(_LOCAL_ACCESS.findall(self.sass))

    @property
    def spills(self) -> bool:
        """Whether anything lives in local memory."""
        return self.local_accesses > 0 or self.stack_bytes > 0 or self.local_bytes > 0

    def __str__(self) -> str:
        return (
            f"{self.arch} {self.name}: {self.registers} registers, {self.stack_bytes} B stack, "
            f"{self.local_bytes} B local, {self.local_accesses} LDL/STL, "
            f"{self.wide_loads} LDG.128, {self.wide_stores} STG.128"
        )


@cache
def find_tool(name: str) -> str | None:
    """Path of an NVIDIA binary tool from PATH, nvcc's folder, a CUDA toolkit or the triton wheel; None if absent."""
    folders = os.environ.get("PATH", "").split(os.pathsep)
    if nvcc := shutil.which("nvcc"):
        folders.append(str(Path(nvcc).resolve().parent))
    folders.append(str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"))
    triton = find_spec("triton")
    for root in (triton.submodule_search_locations or []) if triton else []:
        folders.append(str(Path(root) / "backends" / "nvidia" / "bin"))
    return shutil.which(name, path=os.pathsep.join(folders))


def missing_tools() -> str:
    """Why nothing can be disassembled here, as a reason to skip a test; empty if all is at hand."""
    missing = [name for name in ("cuobjdump", "nvdisasm") if find_tool(name) is None]
    if not missing:
        return ""
    return f"{' and '.join(missing)} not found on PATH, in nvcc's folder or in the triton wheel: pip install triton"


def _cuobjdump(path: Path, option: str) -> str:
    tool, disassembler = find_tool("cuobjdump"), find_tool("nvdisasm")
    if tool is None or disassembler is None:
        raise FileNotFoundError(missing_tools())
    # cuobjdump calls nvdisasm by name
    environment = {**os.environ, "PATH": os.pathsep.join([str(Path(disassembler).parent), os.environ.get("PATH", "")])}
    done = subprocess.run([tool, option, str(path)], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{tool} {option} {path} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def _demangle(names: list[str]) -> list[str]:
    tool = shutil.which("c++filt")
    if tool is None or not names:
        return names
    done = subprocess.run([tool, *names], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def _split(text: str, header: str) -> dict[tuple[str, str], str]:
    """The text under every function's header line, by architecture and mangled name."""
    sections: dict[tuple[str, str], list[str]] = {}
    arch, lines = "", []
    # CUDA 12.8's says sm_90 for sm_90a where it can: in the lines that bare cubins alone need
    heading = r"\s*arch = (sm_\w+)" if "arch = sm_" in text else r"\s*(?:\.target\s+|code for )(sm_\w+)"
    for line in text.splitlines():
        if found := re.match(heading, line):
            arch = found[1]
        elif found := re.match(header, line):
            lines = sections.setdefault((arch, found[1]), [])
        else:
            lines.append(line)
    return {key: "\n".join(lines) for key, lines in sections.items()}


def kernels(path: Path) -> list[Kernel]:
    """All kernels in a cubin, object file or shared library, one entry an architecture.

    Args:
        path: the file.

    Returns:
        Kernels in the file's order.

    Raises:
        FileNotFoundError: no cuobjdump or nvdisasm.
        RuntimeError: cuobjdump failed.
    """
    sass = _split(_cuobjdump(path, "-sass"), r"\s*Function\s*: (\S+)")
    usage_text = _cuobjdump(path, "--dump-resource-usage")
    usage = _split(usage_text, r"\s*Function (\S+):")
    names = _demangle([name for _, name in sass])
    found: list[Kernel] = []
    for ((arch, mangled), text), name in zip(sass.items(), names, strict=True):
        # a bare cubin's resource report does not always name its architecture
        report = usage.get((arch, mangled)) or usage.get(("", mangled), "")
        numbers = {key: int(value) for key, value in _USAGE.findall(report)}
        if "REG" not in numbers:
            raise RuntimeError(f"cuobjdump reports no registers for {mangled} in {path}: {usage_text[:400]}")
        found.append(
            Kernel(
                arch=arch,
                name=name,
                sass=text,
                registers=numbers["REG"],
                stack_bytes=numbers["STACK"],
                local_bytes=numbers["LOCAL"],
                shared_bytes=numbers["SHARED"],
                constant_bytes=numbers["CONSTANT"],
            )
        )
    return found
