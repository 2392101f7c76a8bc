"""Records that are read back: every whole one, whatever has become of the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from distil_kernels.train.run.json_lines import append_lines, drop_after, read_lines

STEPS = [{"kind": "step", "step": number, "text": "a\u2028b"} for number in range(1, 5)]


@pytest.mark.parametrize(
    "harm", [b'{"kind": "st', b"\xff\xfe", b"17", b"", b'{"step": 3}', b'{"kind": "a", "step": "3"}']
)
def test_a_damaged_line_costs_that_line(tmp_path: Path, harm: bytes) -> None:
    file, said = tmp_path / "metrics.jsonl", []
    append_lines(file, STEPS)
    lines = file.read_bytes().splitlines()
    file.write_bytes(b"\n".join([*lines[:2], harm, lines[3], b'{"cut']))  # what a kill cut short is no damage
    assert read_lines(file, said.append) == [*STEPS[:2], STEPS[3]]
    assert [text.split(" is damaged and left out")[0] for text in said] == [f"{file}, line 3"]
    assert drop_after(tmp_path, 3, said.append) == STEPS[:2]
    assert read_lines(file, pytest.fail) == STEPS[:2]
    assert read_lines(tmp_path / "none.jsonl") == []
