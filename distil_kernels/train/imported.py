"""What a user names by import path, and the words for its errors."""

from __future__ import annotations

import importlib
import inspect
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def imported(option: str, name: str, expected: str) -> Callable[..., Any]:
    """Returns the function or class that `module:name` names.

    Args:
        option: that names it.
        expected: what the option takes, in words.

    Raises:
        ValueError: it cannot be imported, or called.
    """
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute) if attribute else None
    except Exception as error:  # of a module that runs anything
        raise ValueError(f"[{option}] cannot import {name!r}: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise ValueError(f"[{option}] expected {expected}, got {name!r}")
    return function


def source_file(function: Callable[..., Any]) -> Path | None:
    """Returns the file that a function or class stands in; None where there is no file."""
    function = inspect.unwrap(function)
    is_plain = inspect.isroutine(function) or inspect.isclass(function)
    try:
        file = inspect.getsourcefile(function if is_plain else type(function))
    except TypeError:  # built in
        return None
    return Path(file) if file else None


def raised(option: str, name: str, error: Exception) -> RuntimeError:
    """Returns what says that a user's code has failed: no ValueError, which main would report as a wrong option."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return RuntimeError(
        f"[{option}] {name} raised {type(error).__name__}: {error} ({place.filename}, line {place.lineno})"
    )
