"""Builds the compiled operations with CMake; everything else about the package stands in pyproject.toml.

AWP_CUDA_ARCHS: CUDA architectures, "80;90a;100" if not set, empty to leave CUDA out.
Where a tool is missing the package installs without that part, and `python -m awp_kernels` says what was missing.
"""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# without build isolation nobody looks at pyproject.toml's [build-system], and older ones cannot read the rest of it
if int(setuptools.__version__.partition(".")[0]) < 77:
    sys.exit(f"setuptools {setuptools.__version__}: expected at least 77; pip install --upgrade setuptools")

ROOT = Path(__file__).parent.resolve()


def find_nvcc() -> str | None:
    """The CUDA compiler on PATH, or in CUDA's usual place."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


def missing_tools() -> str | None:
    """What keeps the C++ code from being built, or None."""
    if sys.platform != "linux":
        return f"built on Linux only, this is {sys.platform}"
    if shutil.which("cmake") is None:
        return "cmake was not found at installation: install cmake, then install again"
    if shutil.which(os.environ.get("CXX", "c++")) is None and shutil.which("g++") is None:
        return "no C++ compiler was found at installation: install g++, then install again"
    return None


class CMakeBuild(build_ext):
    """Runs CMake where setuptools would call the compiler."""

    def get_ext_filename(self, fullname: str) -> str:  # noqa: D102
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:  # noqa: D102
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        library.parent.mkdir(parents=True, exist_ok=True)
        problem = missing_tools()
        archs = os.environ.get("AWP_CUDA_ARCHS", "80;90a;100")
        nvcc = find_nvcc()
        cuda_problem = problem or (
            "left out at installation: AWP_CUDA_ARCHS is empty"
            if not archs
            else None
            if nvcc
            else "nvcc was not found at installation: install the CUDA toolkit, then install again"
        )
        if problem is None:
            self.cmake(library, archs if cuda_problem is None else "", nvcc)
        else:
            library.unlink(missing_ok=True)
            self.warn(problem)
        sources = runpy.run_path(str(ROOT / "csrc" / "sources.py"))
        sources["write"](library.parent, "" if cuda_problem else archs, cpp=problem, cuda=cuda_problem)

    def cmake(self, library: Path, archs: str, nvcc: str | None) -> None:
        """Configure and build into a folder of its own, then put the library in its place."""
        import torch

        build = (ROOT / self.build_temp / "cmake").resolve()
        options = [
            f"-DAWP_TORCH_DIR={Path(torch.__file__).parent}",
            f"-DAWP_CUDA_ARCHS={archs}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={build}",
        ]
        if archs and nvcc:
            options.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
        # a cache from another torch or Python would win over the options
        shutil.rmtree(build, ignore_errors=True)
        subprocess.run(["cmake", "-S", str(ROOT), "-B", str(build), *options], check=True)
        jobs = str(os.cpu_count() or 1)
        subprocess.run(["cmake", "--build", str(build), "--parallel", jobs], check=True)
        shutil.copy2(build / "libawp_kernels.so", library)

    def get_outputs(self) -> list[str]:  # noqa: D102
        return [path for path in super().get_outputs() if Path(path).exists()]

    def copy_extensions_to_source(self) -> None:
        """Put what was built beside the sources, for an editable installation."""
        source = ROOT / self.get_finalized_command("build_py").get_package_dir("awp_kernels")  # type: ignore[attr-defined]
        for name in ("libawp_kernels.so", "build.json"):
            # a new file: a process that has the old one mapped keeps it
            (source / name).unlink(missing_ok=True)
            built = Path(self.build_lib) / "awp_kernels" / name
            if built.exists():
                shutil.copy2(built, source / name)


setup(ext_modules=[Extension("awp_kernels.libawp_kernels", sources=[])], cmdclass={"build_ext": CMakeBuild})
