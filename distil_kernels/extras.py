"""What a program says, in one line, where a package of an extra is not installed."""

from __future__ import annotations

import importlib.util
import sys

EXTRAS = {
    "train": frozenset(
        {
            "accelerate", "gguf", "jinja2", "math_verify", "numpy", "peft", "yaml", "reasoning_gym", "rich",
            "safetensors", "transformers",
        }
    ),
    "studies": frozenset({"matplotlib"}),
    "trl": frozenset({"trl"}),
}  # fmt: skip
"""Modules of the packages of each extra, without those of the extras that it includes."""


def missing_package(error: ModuleNotFoundError) -> str | None:
    """Returns the line for an import that failed, or None for a module that is in no extra."""
    name = (error.name or "").partition(".")[0]
    extra = next((extra for extra, modules in EXTRAS.items() if name in modules), None)
    return None if extra is None else _line([name], extra)


def require(program: str, extra: str, *names: str) -> None:
    """Ends a program with the line and status 2 where one of these modules, which `extra` has, cannot be imported."""
    if missing := [name for name in names if not _is_installed(name)]:
        print(f"{program}: {_line(missing, extra)}", file=sys.stderr)
        raise SystemExit(2)


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # None in sys.modules: somebody hides it
        return False


def _line(names: list[str], extra: str) -> str:
    *others, last = names
    what = f"the packages {', '.join(others)} and {last} are" if others else f"the package {last} is"
    return f"{what} not installed: pip install 'distil-kernels[{extra}]'"
