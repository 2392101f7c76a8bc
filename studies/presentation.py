"""How the studies show results: colours and panels of their figures, a console, and the versions above their tables.

Colours are Okabe and Ito's, for any colour vision; lines differ in dash too.
"""

from __future__ import annotations

import argparse
import platform
from typing import TYPE_CHECKING, Any

import torch

import distil_kernels
from distil_kernels.extras import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.console import Console

BLUE, ORANGE, GREEN, PURPLE, GREY, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#555555", "#56B4E9"
RC_PARAMS: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "savefig.dpi": 110,
}


def require_packages(parser: argparse.ArgumentParser, *names: str) -> None:
    """Ends the program with the command that installs matplotlib, rich and `names`, where one of them is missing."""
    require(parser.prog, "studies", "matplotlib", "rich", *names)


def versions() -> str:
    """The line that names the versions on which printed numbers depend."""
    return f"distil_kernels {distil_kernels.__version__}, torch {torch.__version__}, Python {platform.python_version()}"


def console(piped_width: int) -> Console:
    """A console as wide as the terminal; a pipe has no width, and rich would fold the columns at 80."""
    from rich.console import Console

    return Console() if Console().is_terminal else Console(width=piped_width)


def panels(count: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """A figure of `count` axes in a row; `size` is the figure's width and height in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])
