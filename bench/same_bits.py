"""What changes a result in its last bits, and by how much: the table of docs/mathematics.md.

    python bench/same_bits.py

Relative norms of differences of value, dh and dW; "equal" is equal to the last bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distil_kernels import fused_forward_ce
from distil_kernels.backends import FORWARD_CE, LogitPair, LogitTransform, Statistic, cpu
from distil_kernels.engine import gemm
from distil_kernels.plan import Plan
from distil_kernels.testing import Inputs, make_inputs

N, V, D = 256, 8192, 128


def results(inputs: Inputs, plan: str | Plan = "auto") -> list[Tensor]:
    """Returns value, dh and dW."""
    loss = fused_forward_ce(*inputs.heads, plan=plan)
    return [loss.detach(), *torch.autograd.grad(loss, list(inputs.leaves.values()))]


def difference(ours: list[Tensor], others: list[Tensor]) -> str:
    """Returns "equal", or the relative norm of each difference."""
    if all(torch.equal(mine, other) for mine, other in zip(ours, others, strict=True)):
        return "equal"
    pairs = [(mine.double(), other.double()) for mine, other in zip(ours, others, strict=True)]
    return ", ".join(f"{float((mine - other).norm() / other.norm()):.1e}" for mine, other in pairs)


def main() -> None:
    """Prints the table."""
    print(f"torch {torch.__version__}, own products {gemm.UNITS}, row kernels {cpu.supported_instruction_sets()}")
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make_inputs(N, V, D, dtype=dtype, generator=generator)
        torch.set_num_threads(1)
        plan = Plan("gradient_in_forward", 64, 0)
        first = results(inputs, plan)
        print(f"\n{dtype}: error against float64 {difference(first, results(inputs.to(torch.float64)))}")
        print(f"  another call          {difference(results(inputs, plan), first)}")
        for num_threads in (2, 3, 4, 7):
            torch.set_num_threads(num_threads)
            print(f"  {num_threads} threads             {difference(results(inputs, plan), first)}")
        torch.set_num_threads(1)
        print(f"  plan recompute        {difference(results(inputs, Plan('recompute', 64, 0)), first)}")
        for rows in (1, 16, 48, 256):
            print(f"  chunks of {rows:3} rows    {difference(results(inputs, plan._replace(chunk_rows=rows)), first)}")

    print("\nrow kernels beside the portable ones: cross-entropy of rows, gradient")
    logits = LogitPair(*(3 * torch.randn(64, V, generator=generator) for _ in range(2)))
    plain, ones = LogitTransform(None, None, 1.0), torch.ones(64)

    def rows_of(instruction_set: str) -> list[Tensor]:
        statistics, _ = cpu.row_stats_grad(
            logits, plain, plain, None, FORWARD_CE, ones, out := torch.empty_like(logits.student),
            instruction_set=instruction_set,
        )  # fmt: skip
        return [statistics[Statistic.FORWARD_CE], out]

    for instruction_set in cpu.supported_instruction_sets()[1:]:
        print(f"  {instruction_set:<21} {difference(rows_of(instruction_set), rows_of('portable'))}")


if __name__ == "__main__":
    main()
