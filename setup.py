"""Builds the compiled operations with CMake, beside the torch that is installed; all else stands in pyproject.toml.

AWP_CUDA_ARCHS: CUDA architectures; empty leaves CUDA out. Not set, it is "80;90a;100" beside a CUDA build of torch, and
CUDA is left out beside a CPU build, where it could not run.
Where a tool is missing the package installs without that part, and `python -m awp_kernels` says what was missing.
"""

import importlib.metadata
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools

# without build isolation nobody looks at pyproject.toml's [build-system], and older ones cannot read the rest of it
if int(setuptools.__version__.partition(".")[0]) < 77:
    sys.exit(f"setuptools {setuptools.__version__}: expected at least 77; pip install --upgrade setuptools")

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

try:
    TORCH = importlib.metadata.version("torch")
except importlib.metadata.PackageNotFoundError:
    sys.exit("torch is not installed, and the operations are built beside it: install torch first")

ROOT = Path(__file__).parent.resolve()
ARCHS = "80;90a;100"
# glibc of a system with the newest GLIBCXX and CXXABI beside it, by auditwheel; torch's own wheels need the first
SYSTEMS = [
    ((2, 28), (3, 4, 24), (1, 3, 11)),
    ((2, 31), (3, 4, 28), (1, 3, 12)),
    ((2, 34), (3, 4, 29), (1, 3, 13)),
    ((2, 35), (3, 4, 30), (1, 3, 13)),
    ((2, 39), (3, 4, 33), (1, 3, 15)),
]


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


def cuda_left_out(archs: str | None) -> str | None:
    """What keeps the CUDA code from being built, or None; `archs` are those that were asked for."""
    import torch

    if archs == "":
        return "left out at installation: AWP_CUDA_ARCHS is empty"
    if archs is None and torch.version.cuda is None:
        return f"left out beside a CPU build of torch ({TORCH}): install from source with AWP_CUDA_ARCHS='{ARCHS}'"
    if find_nvcc() is None:
        return "nvcc was not found at installation: install the CUDA toolkit, then install again"
    return None


class _CMakeBuild(build_ext):
    """Runs CMake where setuptools would call the compiler."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        library.parent.mkdir(parents=True, exist_ok=True)
        asked = os.environ.get("AWP_CUDA_ARCHS")
        problem = missing_tools()
        cuda_problem = problem or cuda_left_out(asked)
        archs = "" if cuda_problem else asked or ARCHS
        if problem is None:
            self.cmake(library, archs)
        else:
            library.unlink(missing_ok=True)
        for code, why in (("C++", problem), ("CUDA", cuda_problem)):
            if why is not None:
                self.warn(f"without {code} code: {why}")
        sources = runpy.run_path(str(ROOT / "csrc" / "sources.py"))
        sources["write"](library.parent, archs, cpp=problem, cuda=cuda_problem)

    def cmake(self, library: Path, archs: str) -> None:
        """Configure and build into a folder of its own, then put the library in its place."""
        import torch

        build = (ROOT / self.build_temp / "cmake").resolve()
        options = [
            f"-DAWP_TORCH_DIR={Path(torch.__file__).parent}",
            f"-DAWP_CUDA_ARCHS={archs}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={build}",
        ]
        if archs:
            options.append(f"-DCMAKE_CUDA_COMPILER={find_nvcc()}")
        # a cache from another torch or Python would win over the options
        shutil.rmtree(build, ignore_errors=True)
        subprocess.run(["cmake", "-S", str(ROOT), "-B", str(build), *options], check=True)
        jobs = str(os.cpu_count() or 1)
        subprocess.run(["cmake", "--build", str(build), "--parallel", jobs], check=True)
        shutil.copy2(build / "libawp_kernels.so", library)

    def get_outputs(self) -> list[str]:
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


def oldest_linux(library: Path) -> str | None:
    """The tag of the oldest system that has all symbols of the library but torch's: https://peps.python.org/pep-0600.

    None where there is no library, or no tag is known.
    """
    if not library.exists() or shutil.which("objdump") is None:
        return None
    told = subprocess.run(["objdump", "-p", str(library)], check=True, capture_output=True, text=True).stdout
    needed: dict[str, tuple[int, ...]] = {"GLIBC": (0,), "GLIBCXX": (0,), "CXXABI": (0,)}
    for name, version in re.findall(r"\b(GLIBC|GLIBCXX|CXXABI)_([0-9.]+)$", told, re.MULTILINE):
        needed[name] = max(needed[name], tuple(map(int, version.split("."))))
    for glibc, glibcxx, cxxabi in SYSTEMS:
        if needed["GLIBCXX"] <= glibcxx and needed["CXXABI"] <= cxxabi:
            major, minor = max(glibc, needed["GLIBC"])[:2]
            return f"manylinux_{major}_{minor}"
    return None


class _PlatformWheel(bdist_wheel):
    """One wheel a platform: the library is on torch's stable ABI and knows no Python."""

    def run(self) -> None:
        """Build anew: modules of an earlier build that have gone would be packed too."""
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)  # type: ignore[attr-defined]
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        platform = super().get_tag()[2]
        library = self.get_finalized_command("build_ext").get_ext_fullpath("awp_kernels.libawp_kernels")  # type: ignore[attr-defined]
        tag = oldest_linux(Path(library))
        return "py3", "none", platform if tag is None else platform.replace("linux", tag, 1)


TRAIN = "awp-engine[train]"
TESTED = [
    "pytest>=8",
    "pytest-benchmark>=5",
    "pytest-timeout",
    "pytest-xdist>=3",
    "hypothesis>=6",
    "adversarial-robustness-toolbox>=1.20",
    "foolbox>=3.3.4",
    "playwright",
    "torchattacks==3.5.1",
    "triton>=3.6; platform_system == 'Linux'",
    "wandb>=0.31",
    "awp-engine[dali,eval,examples,hub,huggingface,onnx,timm]",
    # each torchvision is built for one torch: without this line pip takes the newest of both
    f"torch=={TORCH.partition('+')[0]}",
]
EXTRAS = {
    # awp_engine/cli/__init__.py names those that are missing
    "train": [
        "numpy",
        "safetensors>=0.5",
        "rich>=13",
        "tensorboard",
        "matplotlib",
        "pillow",
        "scikit-learn",
        "scipy",
        "pyyaml",
    ],
    "dali": [TRAIN, "nvidia-dali-cuda130>=2.4; platform_system == 'Linux'"],
    "eval": [TRAIN, "pyautoattack==0.2.*"],
    "log": [TRAIN, "wandb>=0.31", "mlflow-skinny", "trackio"],
    "hub": [TRAIN, "huggingface_hub"],
    "huggingface": [TRAIN, "datasets>=3"],
    "timm": [TRAIN, "timm>=1.0.20"],
    # wheels of 9, 28 and 1 MB
    "onnx": [TRAIN, "onnx", "onnxruntime", "onnxscript"],
    "examples": ["transformers>=5", "accelerate", "lightning>=2.6"],
    "docs": [TRAIN, "mkdocs-material>=9.6", "mkdocstrings[python]>=1"],
    "notebooks": [TRAIN, "nbclient", "ipykernel"],
    "test": TESTED,
    "dev": ["awp-engine[test]", "pytest-cov>=5", "ruff", "pyright", "clang-format", "pre-commit"],
}

if __name__ == "__main__":
    setup(
        ext_modules=[Extension("awp_kernels.libawp_kernels", sources=[])],
        extras_require=EXTRAS,
        cmdclass={"build_ext": _CMakeBuild, "bdist_wheel": _PlatformWheel},
    )
