"""The Triton kernel of the credit's scan; its launch is in `triton.py`. Not yet run on a GPU.

    total[p] = sum_{p <= i < p + horizon} discount^(i - p) cost_i          to_go[p] = discount total[p + 1]

A program takes one position of one sequence and adds its costs up block by block, the farthest block first, in float64:

    total = discount^BLOCK total + sum over the block of discount^lane cost

Programs share nothing, so the order of additions is fixed and a window needs no subtraction. Positions 0 to P - 1 are
the chunk's; behind them lies `later`: without a horizon one entry, total[P], else the next `horizon` costs. The same of
positions 0 to horizon - 1 is left for the chunk before.

Left out: a scan that passes totals from program to program. It would need one addition per cost in place of the
window's length, which a chunk's few hundred positions do not repay (expected, not yet timed).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def cost_to_go(
    costs_ptr, slots_ptr, later_ptr, to_go_ptr, next_later_ptr, discount, discount_rest, horizon,
    num_positions, num_sequences, num_later, HAS_HORIZON: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0) % num_sequences
    begin = tl.program_id(0) // num_sequences
    end = num_positions + num_later
    if HAS_HORIZON:
        end = tl.minimum(end, begin + horizon)

    # A scalar argument is float32: the discount comes in two of them. Its power 0 is 1 also where it is 0.
    zero = tl.full([], 0.0, tl.float64)
    discount = zero + discount + discount_rest
    log_discount = tl.log2(discount)
    lanes = tl.arange(0, BLOCK)
    powers = tl.where(lanes == 0, 1.0, tl.exp2(lanes.to(tl.float64) * log_discount))
    block_power = tl.exp2(BLOCK * log_discount)

    total, first_cost = zero, zero
    for block in range(tl.cdiv(end - begin, BLOCK) - 1, -1, -1):
        position = begin + block * BLOCK + lanes
        inside = position < end
        in_chunk = inside & (position < num_positions)
        position = position.to(tl.int64)
        slots = tl.load(slots_ptr + position * num_sequences + sequence, mask=in_chunk, other=-1)
        costs = tl.load(costs_ptr + slots, mask=slots >= 0, other=0.0).to(tl.float64)
        behind = (position - num_positions) * num_sequences + sequence
        costs += tl.load(later_ptr + behind, mask=inside & (position >= num_positions), other=0.0)
        total = block_power * total + tl.sum(powers * costs)
        first_cost = tl.sum(tl.where(lanes == 0, costs, 0.0))

    cell = begin.to(tl.int64) * num_sequences + sequence
    to_go = (discount * total).to(tl.float32)
    tl.store(to_go_ptr + cell - num_sequences, to_go, mask=(begin > 0) & (begin <= num_positions))
    if not HAS_HORIZON:
        first_cost = total
    tl.store(next_later_ptr + cell, first_cost, mask=begin < num_later)
