"""bench/ is a folder of scripts, not a package: its modules import each other by name."""

import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench"
sys.path.insert(0, str(BENCH))
