# `just` lists these; https://just.systems, or copy the commands

_list:
    @just --list --unsorted

# all tests, a process a core
test *options:
    pytest {{ options }}

# the inner loop: without what compiles, trains for long or starts processes
test-fast *options:
    pytest -m "not gpu and not compile and not long and not browser and not slow" {{ options }}

# which lines no test runs; a third slower
coverage *options:
    pytest --cov=awp_kernels --cov=awp_engine --cov-report=term:skip-covered {{ options }}

# what needs a CUDA device
gpu *options:
    pytest -m gpu {{ options }}

# CUDA and Triton code, compiled ahead of time; no GPU is needed
compile *options:
    pytest -m compile {{ options }}

# pages, in Chromium at two widths: apt-get install chromium
browser *options:
    pytest -n 0 -m browser {{ options }}

# documents: their examples run, and what they name exists
docs:
    pytest -n 0 tests/repo/test_docs.py tests/repo/test_named_tests.py tests/repo/test_readme.py tests/repo/test_structure.py

# the documents as a site, in build/site
site:
    mkdocs build

# single operations beside what else can do the same: bench.json and plots/
bench *options:
    pytest bench --benchmark-enable -o addopts= --benchmark-json=bench.json {{ options }}
    python -m bench.report bench.json --out plots

# formats and types
lint:
    ruff check .
    ruff format --check .
    git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs clang-format --dry-run --Werror
    pyright
