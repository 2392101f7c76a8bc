"""Files of a run directory are replaced in one step, or the message names them."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from distil_kernels.train.run.directory import WriteError, write_text


def test_a_file_that_cannot_be_written_is_named_and_stays_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "plot.svg"
    write_text(file, "before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(WriteError, match=f"cannot write {file}: File too large"):
            write_text(file, "x" * 11)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_text() == "before"
    with pytest.raises(WriteError, match=r"cannot write .*missing/plot.svg: No such file"):
        write_text(tmp_path / "missing" / "plot.svg", "x")
