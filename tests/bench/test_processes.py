"""One head on two processes, measured: the gradients are one process's, and the bytes those that the docs count."""

from __future__ import annotations

import processes
import pytest
from cases import Case

pytestmark = pytest.mark.slow


def test_two_processes(capsys):
    num_rows, vocab_size, hidden_size = 64, 640, 32
    case = Case("ce", num_rows, vocab_size, hidden_size, "fp32", "cpu", 1)
    table = processes.measure(case, [2], rounds=1)
    one, shards, gathered = table["processes"]
    assert one["sent_bytes"] == 0 and shards["error"] < 1e-6 and gathered["error"] < 1e-6
    # The arguments' digests, nine statistics a row, and dh once; both heads, and the gradient of one.
    assert shards["sent_bytes"] == 256 + 36 * num_rows + 4 * num_rows * hidden_size
    assert gathered["sent_bytes"] == 3 * 4 * vocab_size * hidden_size / 2
    processes.print_table(table)
    assert "| 2 | shards |" in capsys.readouterr().out
