"""The templates of this folder (jinja2, every value escaped)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from distil_kernels.train.report.formatting import harmless, tick_text, verdict, visible, with_error


def render(template: str, **values: Any) -> str:
    """Returns the text of a template of this folder with these values."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"tick_text": tick_text, "visible": visible, "harmless": harmless, "verdict": verdict}
    environment.globals["with_error"] = with_error
    return environment.get_template(template).render(values)
