"""These tests need Triton's interpreter, which Triton turns on when it is imported.

They are a session of their own, a part of `make test-all`: TRITON_INTERPRET=1 pytest tests/interpreted tests/gpu
"""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
