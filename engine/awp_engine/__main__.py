"""`python -m awp_engine COMMAND ...` is `awp COMMAND ...`."""

from awp_engine.cli import main

if __name__ == "__main__":
    main("python -m awp_engine")
