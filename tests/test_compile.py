"""torch.compile of a model with the loss, autocast, and torch's own checks of a custom op."""

from __future__ import annotations

import pytest
import torch

from distil_kernels import fused_distil_loss, fused_forward_ce, fused_topk_ce, token_stats
from distil_kernels.engine.credit import Credit
from distil_kernels.engine.gradients import Needs
from distil_kernels.engine.spec import Spec
from distil_kernels.testing import make_inputs


class Model(torch.nn.Module):
    """Embedding, a layer and a tied-shape head."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.body = torch.nn.Linear(8, 8)
        self.head = torch.nn.Linear(8, 30, bias=False)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.body(x))


LOSSES = {
    "mean": lambda h, w, i: fused_forward_ce(h, w, *i.heads[2:]),
    "none": lambda h, w, i: fused_forward_ce(h, w, *i.heads[2:], reduction="none").square().sum(),
    "stats": lambda h, w, i: (lambda s: (s.ce * s.logprob.exp()).sum())(
        token_stats(h, w, *i.heads[2:], tokens=i.tokens)
    ),
    "distil": lambda h, w, i: fused_distil_loss(
        h, w, *i.heads[2:], tokens=i.tokens, cu_seqlens=torch.tensor([0, 4, 12]),
        discount=0.9, baseline="leave_one_out", group_size=2,
    ).loss,
    "topk": lambda h, w, i: fused_topk_ce(h, w, i.tokens[:, None], torch.full((12, 1), -0.5)),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_compiles_as_one_graph(name, dtype, generator):
    torch.compiler.reset()  # else the tenth case is one recompilation too many
    inputs = make_inputs(12, 30, 8, dtype=dtype, generator=generator)
    model, x = Model(generator).to(dtype), torch.randn(12, 8, generator=generator).to(dtype)

    def step(x):
        return LOSSES[name](model(x), model.head.weight, inputs)

    eager = step(x)
    expected = torch.autograd.grad(eager, list(model.parameters()))
    # The eager graph is compiled without code generation: no compiler is needed and fullgraph still holds.
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(torch.autograd.grad(compiled, list(model.parameters())), expected)


def test_inductor(generator):
    inputs = make_inputs(12, 30, 8, generator=generator)
    model, x = Model(generator), torch.randn(12, 8, generator=generator)

    def step(x):
        return LOSSES["distil"](model(x), model.head.weight, inputs)

    torch.testing.assert_close(torch.compile(step, fullgraph=True)(x), step(x))


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_is_the_half_precision_product(name, generator):
    """Under autocast the products take bfloat16 operands, as a linear layer's would; gradients come in float32."""
    inputs = make_inputs(12, 30, 8, generator=generator)
    hidden, weight = inputs.heads[:2]
    with torch.autocast("cpu", torch.bfloat16):
        value = LOSSES[name](hidden, weight, inputs)
    gradients = torch.autograd.grad(value, [hidden, weight])
    half = inputs.to(torch.bfloat16)
    expected = LOSSES[name](*half.heads[:2], half)
    expected_gradients = torch.autograd.grad(expected, list(half.leaves.values()))
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)
    for ours, reference in zip(gradients, expected_gradients, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, reference.float())


@pytest.mark.parametrize("plan", ["gradient_in_forward", "recompute"])
def test_opcheck_scalar_loss(plan, generator):
    i = make_inputs(6, 20, 8, generator=generator)
    credit = Credit(discount=0.9, horizon=2, by_remaining=True, clip=5.0, importance_clip=2.0)
    spec = Spec("cpu", "", plan, "", Needs(hidden=True, weight=True, bias=False), credit=credit)
    torch.library.opcheck(
        torch.ops.distil_kernels.scalar_loss,
        (i.student_hidden, i.student_weight, None, i.teacher_hidden, i.teacher_weight, None, i.tokens, None, None,
         torch.tensor(3.0), torch.tensor([0, 2, 6]), None, torch.zeros(6)),
        {"spec": spec.encode(), "chunk_rows": 4, "staging_rows": 0},
    )  # fmt: skip


@pytest.mark.parametrize("plan", ["kept_gradient", "recompute"])
def test_opcheck_row_statistics(plan, generator):
    i = make_inputs(6, 20, 8, generator=generator)
    spec = Spec("cpu", "", plan, "", Needs(hidden=True, weight=True, bias=False))
    torch.library.opcheck(
        torch.ops.distil_kernels.row_statistics,
        (i.student_hidden, i.student_weight, None, i.teacher_hidden, i.teacher_weight, None, i.tokens, None,
        ),
        {"spec": spec.encode(), "chunk_rows": 4, "staging_rows": 0},
    )  # fmt: skip
