"""Environments: what answers the turns of a rollout. `environment.Environment` is what a user's class has."""

from __future__ import annotations

from pathlib import Path

from distil_kernels.train.environments.environment import Environment, Turn, with_defaults
from distil_kernels.train.environments.python import Python
from distil_kernels.train.environments.shop import Shop
from distil_kernels.train.imported import imported, source_file

__all__ = ["ENVIRONMENTS", "Environment", "Turn", "environment_class", "environment_source"]

ENVIRONMENTS: dict[str, type[Environment]] = {"python": Python, "shop": Shop}


def environment_class(name: str) -> type[Environment]:
    """Returns an environment by its name: one of ENVIRONMENTS, or a user's class as `module:name`.

    Raises:
        ValueError: it is neither.
    """
    if name in ENVIRONMENTS:
        return ENVIRONMENTS[name]
    expected = f"one of {', '.join(ENVIRONMENTS)}, or module:name of a class with reset and step"
    factory = imported("environment", name, expected)
    if not isinstance(factory, type) or not callable(getattr(factory, "step", None)):
        raise ValueError(f"[environment] expected {expected}, got {name!r}")
    return with_defaults(factory)


def environment_source(name: str) -> Path | None:
    """Returns the file that a user's environment stands in; None for those of ENVIRONMENTS."""
    return None if name in ENVIRONMENTS else source_file(imported("environment", name, "module:name"))
