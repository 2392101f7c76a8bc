"""The model that calls a tool, for the tests of this folder."""

from __future__ import annotations

from tool_model import caller, lm  # noqa: F401
