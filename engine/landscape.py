"""Draws the robust loss around weights: `awp landscape` from a checkout, `python engine/landscape.py --help`."""

if __name__ == "__main__":
    from awp_engine.cli import run

    run("landscape", "landscape.py")
