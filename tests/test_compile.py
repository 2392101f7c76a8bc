"""torch.compile of a model with the loss, autocast, and torch's own checks of a custom op."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from distil_kernels import (
    fused_distil_loss,
    fused_forward_ce,
    fused_policy_loss,
    fused_topk_ce,
    fused_topk_distil_loss,
    token_stats,
)
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
    "topk distil": lambda h, w, i: fused_topk_distil_loss(
        h, w, i.tokens[:, None], torch.full((12, 1), -0.5), tokens=i.tokens, cu_seqlens=torch.tensor([0, 4, 12]),
        discount=0.9, cost="kl", baseline="leave_one_out", group_size=2,
    ).loss,
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


ROWS = {
    "mean": lambda h, w, t, y, b: fused_forward_ce(h, w, t),
    "rows": lambda h, w, t, y, b: fused_forward_ce(h, w, t, reduction="none").square().sum(),
    "stats": lambda h, w, t, y, b: token_stats(h, w, t, tokens=y).logprob.sum(),
    "policy": lambda h, w, t, y, b: fused_policy_loss(h, w, tokens=y, advantages=t[:, 0]).loss,
    "distil": lambda h, w, t, y, b: fused_distil_loss(h, w, t, tokens=y, cu_seqlens=b, discount=0.9).loss,
    "topk": lambda h, w, t, y, b: fused_topk_ce(h, w, y[:, None], t[:, :1].clamp(max=0.0) - 0.1),
    "topk distil": lambda h, w, t, y, b: (
        fused_topk_distil_loss(h, w, y[:, None], t[:, :1].clamp(max=0.0) - 0.1, tokens=y, cu_seqlens=b).loss
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_one_graph_serves_every_number_of_rows(name, generator):
    """The rows of chunks and staging buffer follow the number of rows without another graph."""
    torch.compiler.reset()
    weight = torch.randn(300, 8, generator=generator).requires_grad_()
    num_graphs = 0

    def counted(graph, example_inputs):
        nonlocal num_graphs
        num_graphs += 1
        return aot_eager(graph, example_inputs)

    compiled = torch.compile(ROWS[name], fullgraph=True, backend=counted)
    for num_rows in (12, 40, 70, 200, 300, 700, 1030):
        hidden = torch.randn(num_rows, 8, generator=generator).requires_grad_()
        teacher = torch.randn(num_rows, 8, generator=generator)
        tokens = torch.randint(300, (num_rows,), generator=generator)
        arguments = hidden, weight, teacher, tokens, torch.tensor([0, num_rows // 3, num_rows])
        ours, eager = compiled(*arguments), ROWS[name](*arguments)
        torch.testing.assert_close(ours, eager)
        torch.testing.assert_close(*(torch.autograd.grad(each, [hidden, weight]) for each in (ours, eager)))
    assert num_graphs <= 3  # the first rows, any rows, and where per-row outputs change their plan


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
    text, numbers = spec.encode_apart()
    torch.library.opcheck(
        torch.ops.distil_kernels.scalar_loss,
        (i.student_hidden, i.student_weight, None, i.teacher_hidden, i.teacher_weight, None, i.tokens, None, None,
         torch.tensor(3.0), torch.tensor([0, 2, 6]), None, torch.zeros(6), numbers),
        {"spec": text, "chunk_rows": 4, "staging_rows": 0},
    )  # fmt: skip


@pytest.mark.parametrize("plan", ["kept_gradient", "recompute"])
def test_opcheck_row_statistics(plan, generator):
    i = make_inputs(6, 20, 8, generator=generator)
    text, numbers = Spec("cpu", "", plan, "", Needs(hidden=True, weight=True, bias=False)).encode_apart()
    torch.library.opcheck(
        torch.ops.distil_kernels.row_statistics,
        (i.student_hidden, i.student_weight, None, i.teacher_hidden, i.teacher_weight, None, i.tokens, None,
         numbers),
        {"spec": text, "chunk_rows": 4, "staging_rows": 0},
    )  # fmt: skip


@pytest.mark.parametrize("op", ["scalar_loss", "topk_loss", "policy_loss", "row_statistics", "rows_backward"])
def test_no_op_is_captured_in_a_cuda_graph(op):
    """A mask on a GPU is read by the host inside the op, which ends a capture with an error."""
    if not hasattr(torch.Tag, "cudagraph_unsafe"):
        pytest.skip("this torch captures whatever it is given")
    assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.distil_kernels, op).default.tags
