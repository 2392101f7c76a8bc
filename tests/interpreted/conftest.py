"""These tests need Triton's interpreter, which Triton turns on when it is imported: tests/test_triton.py runs this
folder in a process of its own. By hand: TRITON_INTERPRET=1 pytest tests/interpreted"""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
