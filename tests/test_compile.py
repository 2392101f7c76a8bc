"""torch.compile of a model with the loss, autocast, and torch's own checks of a custom op."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

import distil_kernels
from distil_kernels import (
    fused_distil_loss,
    fused_forward_ce,
    fused_forward_kl,
    fused_jsd,
    fused_policy_loss,
    fused_reverse_kl,
    fused_topk_ce,
    fused_topk_distil_loss,
    token_logprobs,
    token_stats,
)
from distil_kernels.engine.credit import Credit
from distil_kernels.engine.gradients import Needs
from distil_kernels.engine.policy import Policy
from distil_kernels.engine.spec import Spec
from distil_kernels.engine.terms import Terms
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
    "terms": lambda h, w, i: fused_distil_loss(
        h, w, *i.heads[2:], tokens=i.tokens, cu_seqlens=torch.tensor([0, 4, 12]), labels=i.tokens, label_smoothing=0.1,
        distil_weight=torch.tensor([0.0, 1.0]), advantages=torch.tensor([1.0, -0.5]), z_loss_weight=1e-2,
        entropy_weight=0.1, reference_logprobs=torch.full((12,), -3.0), policy_weight=0.3,
    ).loss,
    "padded": lambda h, w, i: fused_distil_loss(
        h, w, *i.heads[2:], tokens=None, cu_seqlens=None, cost="kl", credit_span="none", vocab_size=25,
        token_mask=(i.tokens % 3 > 0).long(), normalizer=(i.tokens % 3 > 0).sum(), student_logit_scale=0.5,
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


class Settings(NamedTuple):
    """Numbers that a schedule changes from call to call."""

    temperature: float
    softcap: float
    discount: float
    normalizer: float
    horizon: int
    scale: float

    @property
    def student(self) -> dict[str, float]:
        return {"temperature": self.temperature, "logit_softcap": self.softcap, "student_logit_scale": self.scale}

    @property
    def both(self) -> dict[str, float]:
        return self.student | {
            "teacher_temperature": self.temperature + 0.5,
            "teacher_logit_softcap": 2.0 * self.softcap,
            "teacher_logit_scale": self.scale + 0.3,
        }


SCHEDULES = {
    "fused_forward_ce": lambda x, n: fused_forward_ce(*x.heads, **n.both, normalizer=n.normalizer),
    "fused_forward_ce of rows": lambda x, n: fused_forward_ce(*x.heads, **n.both, reduction="none"),
    "fused_forward_kl": lambda x, n: fused_forward_kl(*x.heads, **n.both, normalizer=n.normalizer),
    "fused_reverse_kl": lambda x, n: fused_reverse_kl(*x.heads, **n.both, reduction="sum"),
    "fused_jsd": lambda x, n: fused_jsd(*x.heads, **n.both, jsd_weight=n.discount / 2, normalizer=n.normalizer),
    "token_stats": lambda x, n: token_stats(*x.heads, tokens=x.tokens, **n.both).logprob,
    "token_logprobs": lambda x, n: token_logprobs(*x.heads[:2], tokens=x.tokens, **n.student).entropy,
    "fused_policy_loss": lambda x, n: fused_policy_loss(
        *x.heads[:2], tokens=x.tokens, advantages=x.teacher_hidden[:, 0], clip_low=n.discount, clip_high=n.discount,
        entropy_weight=n.discount, normalizer=n.normalizer, **n.student,
    ).loss,
    "fused_distil_loss": lambda x, n: fused_distil_loss(
        *x.heads, tokens=x.tokens, cu_seqlens=x.options["cu_seqlens"], discount=n.discount, horizon=n.horizon,
        teacher_ratio_clip=n.scale, credit_clip=n.normalizer, group_size=n.horizon - 1,
        credit_scale=n.discount, normalizer=n.normalizer, **n.both, advantages=x.teacher_hidden[:, 0], labels=x.tokens,
        distil_weight=n.scale, policy_weight=n.scale, clip_high=n.discount, label_weight=n.scale,
        label_smoothing=n.discount, z_loss_weight=n.discount, entropy_weight=n.discount,
        reference_logprobs=x.teacher_hidden[:, 1], reference_weight=n.scale,
    ).loss,
    "fused_topk_ce": lambda x, n: fused_topk_ce(
        *x.heads[:2], x.tokens[:, None], x.teacher_hidden[:, :1].abs().neg(), normalizer=n.normalizer, **n.student
    ),
    "fused_topk_distil_loss": lambda x, n: fused_topk_distil_loss(
        *x.heads[:2], x.tokens[:, None], x.teacher_hidden[:, :1].abs().neg(), tokens=x.tokens, discount=n.discount,
        cu_seqlens=x.options["cu_seqlens"], **n.student, labels=x.tokens, label_weight=n.scale,
        distil_weight=n.scale, z_loss_weight=n.discount,
    ).loss,
}  # fmt: skip
assert {name.removesuffix(" of rows") for name in SCHEDULES} == {
    name for name in distil_kernels.__all__ if name.startswith(("fused", "token"))
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dynamic"), [*((name, True) for name in SCHEDULES), ("fused_distil_loss", None)])
def test_one_graph_serves_every_call(name, dynamic, generator):
    """Rows, sequences and numbers change; forward and backward are those of eager mode to the last bit."""
    torch.compiler.reset()
    num_graphs = 0

    def counted(graph, example_inputs):
        nonlocal num_graphs
        num_graphs += 1
        return aot_eager(graph, example_inputs)

    compiled = torch.compile(SCHEDULES[name], fullgraph=True, dynamic=dynamic, backend=counted)
    for step, num_rows in enumerate((12, 41, 702, 1030)):
        inputs = make_inputs(num_rows, 300, 8, generator=generator)
        borders = torch.linspace(0, num_rows, 2 + step % 4).long()
        inputs = replace(inputs, options={"cu_seqlens": borders})
        settings = Settings(
            0.5 + step / 7, 3.0 + step / 3, 0.99 - step / 20, 2.0 + num_rows / 3, 2 + step % 4, 0.6 + step / 9
        )
        ours, eager = compiled(inputs, settings), SCHEDULES[name](inputs, settings)
        assert torch.equal(ours, eager)
        leaves = list(inputs.leaves.values())
        upstream = torch.ones_like(eager)
        for mine, theirs in zip(
            torch.autograd.grad(ours, leaves, upstream), torch.autograd.grad(eager, leaves, upstream), strict=True
        ):
            assert torch.equal(mine, theirs)
    assert num_graphs <= 4  # the first call, any call, and where per-row outputs change their plan


def test_a_head_alone_compiles(generator):
    inputs = make_inputs(12, 30, 8, generator=generator)

    def loss(hidden, weight):
        return fused_jsd(hidden, weight, *inputs.heads[2:], teacher_logit_softcap=3.0, detach_hidden=True)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for hidden in (inputs.student_hidden, inputs.student_hidden.detach()):
        ours, eager = (
            torch.autograd.grad(f(hidden, inputs.student_weight), inputs.student_weight) for f in (compiled, loss)
        )
        assert torch.equal(ours[0], eager[0])


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
    credit = Credit(discount=0.9, horizon=2, by_remaining=True, teacher_ratio_clip=1.0, clip=5.0, importance_clip=2.0)
    terms = Terms(Policy(0.2, None, 0.1), 1.0, 1.0, 0.5, 0.1, 1e-3)
    spec = Spec("cpu", "", plan, "", Needs(hidden=True, weight=True, bias=False), credit=credit, terms=terms)
    text, numbers = spec.encode_apart()
    torch.library.opcheck(
        torch.ops.distil_kernels.scalar_loss,
        (i.student_hidden, i.student_weight, None, i.teacher_hidden, i.teacher_weight, None, i.tokens % 17, None, None,
         torch.tensor(3.0), torch.tensor([0, 2, 6]), None, torch.zeros(6), torch.ones(1), torch.ones(2), None,
         i.tokens % 17, torch.zeros(6), numbers, None),
        {"spec": text, "vocab_size": 17, "chunk_rows": 4, "staging_rows": 0},
    )  # fmt: skip


@pytest.mark.parametrize("plan", ["kept_gradient", "recompute"])
def test_opcheck_row_statistics(plan, generator):
    i = make_inputs(6, 20, 8, generator=generator)
    text, numbers = Spec("cpu", "", plan, "", Needs(hidden=True, weight=True, bias=False)).encode_apart()
    torch.library.opcheck(
        torch.ops.distil_kernels.row_statistics,
        (i.student_hidden, i.student_weight, None, i.teacher_hidden, i.teacher_weight, None, i.tokens % 17, None,
         numbers, None),
        {"spec": text, "vocab_size": 17, "chunk_rows": 4, "staging_rows": 0},
    )  # fmt: skip


@pytest.mark.parametrize("op", ["scalar_loss", "topk_loss", "policy_loss", "row_statistics", "rows_backward"])
def test_no_op_is_captured_in_a_cuda_graph(op):
    """A mask on a GPU is read by the host inside the op, which ends a capture with an error."""
    if not hasattr(torch.Tag, "cudagraph_unsafe"):
        pytest.skip("this torch captures whatever it is given")
    assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.distil_kernels, op).default.tags
