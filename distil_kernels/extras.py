"""What a program says, in one line, where a package of an extra is not installed."""

from __future__ import annotations

import importlib.util

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


def missing_packages(names: tuple[str, ...], extra: str) -> str | None:
    """Returns the line for those modules that cannot be imported, or None; `extra` has all of them."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return _line(missing, extra) if missing else None


def _line(names: list[str], extra: str) -> str:
    what = f"the package {names[0]} is" if len(names) == 1 else f"the packages {' and '.join(names)} are"
    return f"{what} not installed: pip install 'distil-kernels[{extra}]'"
