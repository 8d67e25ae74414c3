"""setup.py: what an sdist and a wheel hold, the wheel's tag, and what is left out of a build."""

import json
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from places import ROOT

VERSION = (ROOT / "kernels" / "awp_kernels" / "VERSION").read_text().strip()
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")


def build(folder: Path, *command: str, **environment: str) -> Path:
    """What `python setup.py COMMAND` makes of a source tree."""
    out = folder.parent / command[0]
    arguments = [sys.executable, "setup.py", "-q", *command, "--dist-dir", str(out)]
    done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    (made,) = out.iterdir()
    return made


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The source distribution of a copy, with what was built in it."""
    copy = tmp_path_factory.mktemp("sdist") / "copy"
    ignored = shutil.ignore_patterns(".git", "build", "*.egg-info", "runs", ".venv", ".hypothesis", "results")
    shutil.copytree(ROOT, copy, ignore=ignored)
    return build(copy, "sdist")


def test_an_sdist_holds_all_sources_and_nothing_that_was_built(sdist):
    with tarfile.open(sdist) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    needed = {"CMakeLists.txt", "MANIFEST.in", "setup.py", "engine/train.py", "kernels/awp_kernels/VERSION"}
    for folder, pattern in (("csrc", "*.[ch]*"), ("kernels", "*.py"), ("engine", "*.py"), ("tests", "*.py")):
        found = (ROOT / folder).rglob(pattern)
        needed |= {path.relative_to(ROOT).as_posix() for path in found if "__pycache__" not in path.parts}
    assert needed <= names
    assert not [name for name in names if name.endswith((".so", ".pyc", "build.json"))]


def test_a_wheel_without_a_compiler_holds_both_packages_and_says_what_it_lacks(sdist, tmp_path):
    with tarfile.open(sdist) as tar:
        tar.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    # an earlier build, with a module that has gone
    tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    stale = source / "build" / f"lib.{tag}" / "awp_engine" / "gone.py"
    stale.parent.mkdir(parents=True)
    stale.touch()
    wheel = build(source, "bdist_wheel", PATH=str(tmp_path))
    assert wheel.name == f"awp_engine-{VERSION}-py3-none-linux_{os.uname().machine}.whl"
    with zipfile.ZipFile(wheel) as packed:
        names = set(packed.namelist())
        report = json.loads(packed.read("awp_kernels/build.json"))
        scripts = packed.read(f"awp_engine-{VERSION}.dist-info/entry_points.txt").decode()
        metadata = packed.read(f"awp_engine-{VERSION}.dist-info/METADATA").decode().splitlines()
    modules = {
        path.relative_to(ROOT / top).as_posix()
        for top in ("kernels", "engine")
        for path in (ROOT / top).glob("awp_*/**/*.py")
    }
    assert {name for name in names if name.endswith(".py")} == modules
    assert {"awp_kernels/VERSION", "awp_kernels/py.typed", "awp_engine/py.typed"} <= names
    assert report["cpp"] == report["cuda"] == "cmake was not found at installation: install cmake, then install again"
    assert "awp = awp_engine.cli:main" in scripts
    assert [line for line in metadata if line.startswith("Requires-Dist") and "extra" not in line] == [
        "Requires-Dist: torch>=2.11"
    ]


@pytest.mark.parametrize(
    ("needed", "tag"),
    [
        (["GLIBC_2.2.5", "GLIBC_2.16", "GLIBCXX_3.4.21"], "manylinux_2_28"),
        (["GLIBC_2.34", "GLIBC_2.3.4", "GLIBCXX_3.4.24"], "manylinux_2_34"),
        # what newer compilers ask of libstdc++
        (["GLIBC_2.16", "GLIBCXX_3.4.29"], "manylinux_2_34"),
        (["GLIBC_2.36", "GLIBCXX_3.4.29"], "manylinux_2_36"),
        (["GLIBC_2.16", "CXXABI_1.3.14"], "manylinux_2_39"),
        (["GLIBC_2.16", "GLIBCXX_3.4.99"], None),
    ],
)
def test_the_tag_is_that_of_the_oldest_system_with_all_symbols(needed, tag, tmp_path, monkeypatch):
    tool = tmp_path / "objdump"
    lines = "".join(f"    0x0d696915 0x00 02 {symbol}\n" for symbol in needed)
    tool.write_text(f"#!/bin/sh\ncat <<END\nVersion References:\n  required from libc.so.6:\n{lines}END\n")
    tool.chmod(0o755)
    library = tmp_path / "library.so"
    assert SETUP["oldest_linux"](library) is None
    library.touch()
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert SETUP["oldest_linux"](library) == tag
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert SETUP["oldest_linux"](library) is None


def test_cuda_code_is_built_where_it_can_run_or_was_asked_for(tmp_path, monkeypatch):
    left_out = SETUP["cuda_left_out"]
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert left_out(None) is None
    assert left_out("90a") is None
    assert left_out("") == "left out at installation: AWP_CUDA_ARCHS is empty"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert left_out("90a") is None
    assert left_out(None).endswith("install from source with AWP_CUDA_ARCHS='80;90a;100'")
    nvcc.unlink()
    assert left_out("90a").startswith("nvcc was not found at installation")


def test_the_tests_keep_the_torch_that_is_installed():
    assert f"torch=={torch.__version__.partition('+')[0]}" in SETUP["EXTRAS"]["test"]
