"""Measures how robust a trained model is: `awp evaluate` from a checkout, `python engine/evaluate.py --help`."""

if __name__ == "__main__":
    from awp_engine.cli import run

    run("evaluate", "evaluate.py")
