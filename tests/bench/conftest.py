"""bench/ is a folder of scripts, not a package: its modules import each other by name."""

import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS.parent / "bench"), str(TESTS / "train")]
