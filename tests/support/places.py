"""Where things are, for the tests."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"
ENGINE = ROOT / "engine"
EXAMPLES = ROOT / "examples"
TRAIN = ENGINE / "train.py"
SUPPORT = ROOT / "tests" / "support"
SOAK = ROOT / "tests" / "soak"
