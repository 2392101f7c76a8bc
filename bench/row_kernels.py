"""Micro-benchmarks of the row kernels, by instruction set and thread count: pytest bench

Outside the test run (`testpaths` is tests/). 64 rows of the SmolLM2 vocabulary are 24 MiB of logits, more than caches
hold: the kernels read them from memory, as they do after a matrix product. `extra_info` has nanoseconds per logit pair.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from distil_kernels.backends import FORWARD_CE, LogitPair, LogitTransform, RowTerms, cpu

ROWS, VOCAB = 64, 49152
THREADS = sorted({1, torch.get_num_threads()})

if cpu.unavailable(torch.device("cpu"), torch.float32) is not None:
    pytest.skip("the extension is not built", allow_module_level=True)


@pytest.fixture(scope="module")
def logits() -> LogitPair:
    generator = torch.Generator().manual_seed(0)
    return LogitPair(*(4.0 * torch.randn(2, ROWS, VOCAB, generator=generator)))


@pytest.fixture(params=THREADS, ids=lambda threads: f"{threads}threads")
def threads(request: pytest.FixtureRequest) -> int:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    request.addfinalizer(lambda: torch.set_num_threads(before))
    return request.param


@pytest.mark.parametrize("softcap", [None, 30.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("instruction_set", cpu.supported_instruction_sets())
@pytest.mark.parametrize("kernel", ["row_stats", "row_grad", "row_grad with terms"])
def test_row_kernel(
    benchmark: BenchmarkFixture, logits: LogitPair, threads: int, kernel: str, instruction_set: str,
    softcap: float | None,
) -> None:  # fmt: skip
    transform = LogitTransform(None, softcap, 1.0)
    tokens, weight = torch.arange(ROWS), torch.ones(ROWS)
    statistics = cpu.row_stats(logits, transform, transform, tokens, FORWARD_CE, instruction_set=instruction_set)
    if kernel == "row_stats":
        benchmark(cpu.row_stats, logits, transform, transform, tokens, FORWARD_CE, instruction_set=instruction_set)
    else:
        out = torch.empty_like(logits.student)
        benchmark(
            cpu.row_grad, logits, transform, transform, tokens, statistics, FORWARD_CE, weight, weight, out,
            None if kernel == "row_grad" else RowTerms(torch.ones(4, ROWS), tokens), instruction_set=instruction_set,
        )  # fmt: skip
    benchmark.extra_info["ns_per_pair"] = benchmark.stats["median"] / (ROWS * VOCAB) * 1e9
