"""Trains a robust classifier: `awp train` from a checkout, `python engine/train.py --help`."""

if __name__ == "__main__":
    from awp_engine.cli import run

    run("train", "train.py")
