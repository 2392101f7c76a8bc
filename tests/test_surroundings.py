"""Every public op where something around it is unusual: nothing to count, other defaults of torch, inference mode,
a second derivative."""

from __future__ import annotations

import decimal
import fractions
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

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
from distil_kernels.engine import driver
from distil_kernels.engine.plan import PLANS, Plan
from distil_kernels.testing import Inputs, make_inputs, oracle
from distil_kernels.token_statistics import TokenLogprobs, TokenStats

N, V, D = 12, 3000, 16  # V: more than one block of every product
BORDERS = torch.tensor([0, 5, 6, 12])


def named(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    return inputs.tokens[:, None], torch.full((len(inputs.tokens), 1), -0.5, device="cpu")


def both(found: TokenStats | TokenLogprobs) -> torch.Tensor:
    """A loss of the two differentiable fields."""
    return ((found.ce if isinstance(found, TokenStats) else found.entropy) - 0.3 * found.logprob).sum()


OPS = {
    "forward_ce": lambda x, **options: fused_forward_ce(*x.heads, **options),
    "forward_ce of rows": lambda x, **options: fused_forward_ce(*x.heads, reduction="none", **options).sum(),
    "forward_kl": lambda x, **options: fused_forward_kl(*x.heads, **options),
    "reverse_kl": lambda x, **options: fused_reverse_kl(*x.heads, **options),
    "jsd": lambda x, **options: fused_jsd(*x.heads, **options),
    "stats": lambda x, **options: both(token_stats(*x.heads, tokens=x.tokens, **options)),
    "logprobs": lambda x, **options: both(token_logprobs(*x.heads[:2], tokens=x.tokens, **options)),
    "policy": lambda x, **options: (
        fused_policy_loss(*x.heads[:2], tokens=x.tokens, advantages=torch.ones(N, device="cpu"), **options).loss
    ),
    "distil": lambda x, **options: fused_distil_loss(*x.heads, tokens=x.tokens, cu_seqlens=BORDERS, **options).loss,
    "topk_ce": lambda x, **options: fused_topk_ce(*x.heads[:2], *named(x), **options),
    "topk_distil": lambda x, **options: (
        fused_topk_distil_loss(*x.heads[:2], *named(x), tokens=x.tokens, cu_seqlens=BORDERS, **options).loss
    ),
}
assert len(OPS) == len([name for name in distil_kernels.__all__ if name.startswith(("fused", "token"))]) + 1


REDUCED = [op for op in OPS if op not in ("forward_ce of rows", "stats", "logprobs")]


def results(op: str, inputs: Inputs, **options: object) -> list[torch.Tensor]:
    """Value and gradients."""
    value = OPS[op](inputs, **options)
    return [value.detach(), *torch.autograd.grad(value, list(inputs.leaves.values()))]


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_nothing_counted(op, dtype, frozen, generator):
    inputs = make_inputs(N, V, D, dtype=dtype, generator=generator)
    inputs.student_weight.requires_grad_(not frozen)
    for each in results(op, inputs, token_mask=torch.zeros(N, dtype=torch.bool)):
        assert torch.equal(each, torch.zeros_like(each))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("plan", PLANS)
def test_nothing_counted_by_plan(plan, dtype, generator):
    inputs = make_inputs(N, V, D, dtype=dtype, generator=generator, token_mask=torch.zeros(N, dtype=torch.bool))
    inputs.student_weight.requires_grad_(plan not in ("frozen_head", "stats_only"))
    inputs.student_hidden.requires_grad_(plan != "stats_only")
    reduction = "none" if plan == "kept_gradient" else "mean"
    value = fused_forward_ce(*inputs.heads, **inputs.options, reduction=reduction, plan=Plan(plan, 4, 0)).sum()
    assert value == 0
    for each in torch.autograd.grad(value, list(inputs.leaves.values())) if inputs.leaves else ():
        assert torch.equal(each, torch.zeros_like(each))


# In a process of its own: what was written past its end may be anybody's.
UNDER_DEFAULTS = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import test_surroundings as here

torch.manual_seed(int(sys.argv[2]))
generator = torch.Generator().manual_seed(int(sys.argv[2]))
for dtype in (torch.float32, torch.bfloat16):
    inputs = here.make_inputs(here.N, here.V, here.D, dtype=dtype, generator=generator)
    cases = [(op, {}) for op in here.OPS]
    cases += [("forward_ce", {"plan": "recompute"}), ("forward_ce", {"gradient_threshold": 0.01})]
    expected = [here.results(op, inputs, **options) for op, options in cases]
    for default in ("float64", "bfloat16", "float16", "meta"):
        print(default, file=sys.stderr)
        if default == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(getattr(torch, default))
        for (op, options), wanted in zip(cases, expected):
            for ours, each in zip(here.results(op, inputs, **options), wanted):
                assert ours.dtype == each.dtype and torch.equal(ours, each), (op, options)
        torch.set_default_dtype(torch.float32)
        torch.set_default_device("cpu")
"""


@pytest.mark.slow
def test_defaults_of_torch_change_nothing(request, generator):
    command = [sys.executable, "-c", UNDER_DEFAULTS, str(request.path.parent), str(generator.initial_seed())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("op", OPS)
def test_a_second_derivative_is_an_error(op, generator):
    inputs = make_inputs(N, 40, D, generator=generator)
    value = OPS[op](inputs)
    gradient = torch.autograd.grad(value, [inputs.student_hidden], create_graph=True)[0]
    assert torch.equal(gradient, torch.autograd.grad(value, [inputs.student_hidden], retain_graph=True)[0])
    with pytest.raises((RuntimeError, NotImplementedError), match=r"derivative|autograd|differentiat"):
        (value + gradient.pow(2).sum()).backward()


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("op", OPS)
def test_no_derivative_is_silently_zero(op, frozen, generator):
    """Hessian-vector products, derivatives by the upstream gradient, and tangents are errors."""
    inputs = make_inputs(N, 40, D, generator=generator)
    inputs.student_weight.requires_grad_(not frozen)

    def loss(hidden: torch.Tensor) -> torch.Tensor:
        return OPS[op](replace(inputs, student_hidden=hidden))

    hidden = inputs.student_hidden.detach()
    with pytest.raises(RuntimeError, match="no derivative of their own"):
        torch.autograd.functional.hvp(loss, hidden, torch.ones_like(hidden))
    upstream = torch.ones((), requires_grad=True)
    gradient = torch.autograd.grad(OPS[op](inputs), inputs.student_hidden, upstream, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no derivative of their own"):
        torch.autograd.grad(gradient.sum(), upstream, allow_unused=True)
    with pytest.raises(ValueError, match="student_hidden has a tangent"):
        torch.func.jvp(loss, (hidden,), (torch.ones_like(hidden),))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(ValueError, match="student_hidden has a tangent"):
        loss(torch.autograd.forward_ad.make_dual(hidden, torch.ones_like(hidden)))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("op", OPS)
def test_vmap_is_a_loop(op, generator):
    inputs = make_inputs(N, 40, D, generator=generator)
    both_hidden = torch.randn(2, N, D, generator=generator).requires_grad_()

    def loss(hidden: torch.Tensor) -> torch.Tensor:
        return OPS[op](replace(inputs, student_hidden=hidden))

    ours, expected = torch.func.vmap(loss)(both_hidden), torch.stack([loss(hidden) for hidden in both_hidden])
    assert torch.equal(ours, expected)
    leaves = [both_hidden, inputs.student_weight]
    for mine, each in zip(*(torch.autograd.grad(value.sum(), leaves) for value in (ours, expected)), strict=True):
        torch.testing.assert_close(mine, each)


@pytest.mark.parametrize(("op", "plan"), [
    ("forward_ce", "auto"), ("forward_ce", "frozen_head"), ("forward_ce of rows", "kept_gradient"),
    ("forward_ce of rows", "frozen_head"), ("stats", "kept_gradient"),
])  # fmt: skip
def test_a_teacher_that_ran_under_inference_mode(op, plan, generator):
    inputs = make_inputs(N, 40, D, generator=generator)
    inputs.student_weight.requires_grad_(plan != "frozen_head")
    expected = results(op, inputs, plan=plan)
    with torch.inference_mode():
        taught = [each.clone() for each in inputs.heads[2:]]
    for ours, each in zip(
        results(op, replace(inputs, teacher_hidden=taught[0], teacher_weight=taught[1]), plan=plan),
        expected,
        strict=True,
    ):
        assert torch.equal(ours, each)


@pytest.mark.parametrize("op", ["forward_ce", "topk_ce", "policy", "distil", "topk_distil"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_normalizer_of_any_one_element(op, dtype, generator):
    inputs = make_inputs(N, 40, D, dtype=dtype, generator=generator)
    expected = results(op, inputs, normalizer=3.0)
    of_tensors = torch.tensor([3.0], requires_grad=True), torch.tensor(3.0).double(), torch.tensor([[3]])
    of_numpy = np.float32(3), np.int64(3), np.array(3), np.array(3.0, dtype=np.float16)
    for normalizer in (*of_tensors, *of_numpy, fractions.Fraction(3), decimal.Decimal(3)):
        for ours, each in zip(results(op, inputs, normalizer=normalizer), expected, strict=True):
            assert ours.shape == each.shape and ours.dtype == each.dtype
            torch.testing.assert_close(ours, each)


def test_float16_has_room_for_sums_over_tokens(generator):
    """Of 2048 rows a fifth predict one token: before it is divided by N, its row of dW passes 65504."""
    inputs = make_inputs(2048, 500, D, dtype=torch.float16, generator=generator)
    inputs.tokens[torch.rand(2048, generator=generator) < 0.2] = 7
    hidden = (inputs.student_hidden.detach() + 4).requires_grad_()

    def grad(hidden: torch.Tensor, weight: torch.Tensor, plan: str | Plan) -> torch.Tensor:
        found = fused_distil_loss(hidden, weight, *inputs.heads[2:], tokens=inputs.tokens, plan=plan,
                                  cu_seqlens=torch.arange(0, 2049, 512), normalizer=2048.0)  # fmt: skip
        return torch.autograd.grad(found.loss, weight)[0]

    ours = grad(hidden, inputs.student_weight, Plan("gradient_in_forward", 256, 2048))
    assert ours.isfinite().all()
    torch.testing.assert_close(ours, grad(hidden, inputs.student_weight, "auto"), rtol=1e-2, atol=0.1)


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", REDUCED)
def test_nothing_over_nothing_is_nothing(op, dtype, frozen, generator):
    """A micro-batch without a token, and a normalizer that nobody has counted anything for."""
    inputs = make_inputs(N, 40, D, dtype=dtype, generator=generator)
    inputs.student_weight.requires_grad_(not frozen)
    for normalizer in (0, 0.0, np.float64(0), torch.tensor(0), torch.tensor(0.0)):
        for each in results(op, inputs, normalizer=normalizer, token_mask=torch.zeros(N, dtype=torch.int64)):
            assert torch.equal(each, torch.zeros_like(each))
    with pytest.raises(ValueError, match=f"normalizer is 0 with {N} tokens, expected a number above 0"):
        results(op, inputs, normalizer=0)
    counted = torch.arange(N) == 3
    assert results(op, inputs, normalizer=torch.tensor(0), token_mask=counted)[0].abs() == torch.inf


@pytest.mark.parametrize("op", OPS)
def test_masks_of_ones_and_zeros(op, generator):
    inputs = make_inputs(N, 40, D, generator=generator)
    mask = torch.rand(N, generator=generator) < 0.6
    expected = results(op, inputs, token_mask=mask)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        for ours, each in zip(results(op, inputs, token_mask=mask.to(dtype)), expected, strict=True):
            assert torch.equal(ours, each)
    with pytest.raises(TypeError, match=r"token_mask has dtype torch.float32, expected bool or an integer"):
        OPS[op](inputs, token_mask=mask.float())


@pytest.mark.parametrize("size", [1e-8, 1e6])
@pytest.mark.parametrize("op", ["forward_ce", "jsd", "topk_ce", "policy", "distil"])
def test_float16_does_not_depend_on_the_size_of_weights(op, size, generator):
    """A mean divides by what its weights add up to: gradients are those of weights of ordinary size."""
    inputs = make_inputs(N, 40, D, dtype=torch.float16, generator=generator)
    weight = torch.rand(N, generator=generator) + 0.5
    normalizer = {"normalizer": 12.0} if op == "distil" else {}
    scaled = {name: value * size for name, value in normalizer.items()}
    expected = results(op, inputs, token_weight=weight, **normalizer)
    for ours, each in zip(results(op, inputs, token_weight=weight * size, **scaled), expected, strict=True):
        torch.testing.assert_close(ours, each, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("softcap", [None, 1e-12, 1.0, 1e12])
@pytest.mark.parametrize("temperature", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_largest_and_smallest_scales_of_logits(scale, temperature, softcap, backend, generator):
    """By the definition in float64, but for the rounding of S - T, which an extreme scale multiplies."""
    inputs = make_inputs(
        N, 40, D, generator=generator, temperature=temperature, logit_softcap=softcap, student_logit_scale=scale
    )

    def found(value: torch.Tensor, copy: Inputs) -> list[torch.Tensor]:
        return [value.detach(), *torch.autograd.grad(value, list(copy.leaves.values()))]

    wide = inputs.to(torch.float64)
    ours = found(fused_forward_ce(*inputs.heads, **inputs.options, reduction="sum", backend=backend), inputs)
    for mine, exact in zip(ours, found(oracle(wide).ce.sum(), wide), strict=True):
        assert (mine - exact).norm() <= 1e-5 * exact.norm() + 1e-5 * scale / temperature


@pytest.mark.parametrize("op", OPS)
def test_negated_views(op, generator):
    """Tensors whose sign is a bit that torch resolves when it reads them."""
    inputs = make_inputs(N, 40, D, generator=generator)

    def negated(tensor: torch.Tensor) -> torch.Tensor:
        view = torch.complex(torch.zeros_like(tensor), -tensor.detach()).conj().imag
        assert view.is_neg() and torch.equal(view, tensor)
        return view.detach().requires_grad_(tensor.requires_grad)

    names = ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")
    views = replace(inputs, **{name: negated(getattr(inputs, name)) for name in names})
    for ours, each in zip(results(op, views), results(op, inputs), strict=True):
        assert torch.equal(ours, each)


def padded(inputs: Inputs, student_rows: int, teacher_rows: int) -> Inputs:
    """Heads with rows of NaN behind the vocabulary."""

    def longer(tensor: torch.Tensor, num_rows: int) -> torch.Tensor:
        made = tensor.new_full((num_rows, *tensor.shape[1:]), torch.nan)
        made[: len(tensor)] = tensor.detach()
        return made.requires_grad_(tensor.requires_grad)

    biases = {"student_bias": student_rows, "teacher_bias": teacher_rows}
    return replace(
        inputs,
        student_weight=longer(inputs.student_weight, student_rows),
        teacher_weight=None if inputs.teacher_weight is None else longer(inputs.teacher_weight, teacher_rows),
        options={name: longer(inputs.options[name], size) for name, size in biases.items() if name in inputs.options},
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("student_rows", "teacher_rows"), [(43, 47), (40, 64), (64, 40)])
@pytest.mark.parametrize("op", OPS)
def test_padding_rows_do_not_exist(op, student_rows, teacher_rows, dtype, generator):
    """With `vocab_size` heads of any length are those without padding; the padding's gradient is 0."""
    inputs = make_inputs(N, 40, D, dtype=dtype, bias=True, generator=generator)
    with_teacher = op not in ("logprobs", "policy", "topk_ce", "topk_distil")

    def found(each: Inputs, **options: int) -> list[torch.Tensor]:
        biases = {name: value for name, value in each.options.items() if with_teacher or name == "student_bias"}
        return results(op, each, **biases, **options)

    expected, ours = found(inputs), found(padded(inputs, student_rows, teacher_rows), vocab_size=40)
    value, hidden, *head = ours
    assert torch.equal(value, expected[0]) and torch.equal(hidden, expected[1])
    for gradient, exact in zip(head, expected[2:], strict=True):
        assert len(gradient) == student_rows
        assert torch.equal(gradient[:40], exact) and not gradient[40:].any()


@pytest.mark.parametrize("rows", [40, 45])
def test_padding_of_a_shared_head(rows, generator):
    inputs = make_inputs(N, 40, D, shared_head=True, generator=generator)
    expected = results("jsd", inputs)
    ours = results("jsd", padded(inputs, rows, rows), vocab_size=40)
    assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])
    assert torch.equal(ours[2][:40], expected[2]) and not ours[2][40:].any()


def test_no_head_is_copied_for_its_padding(generator, monkeypatch):
    read = []
    original = driver.gemm.lm_head
    monkeypatch.setattr(
        driver.gemm, "lm_head", lambda hidden, weight, out: read.append(weight) or original(hidden, weight, out=out)
    )
    inputs = padded(make_inputs(N, 40, D, generator=generator), 43, 47)
    fused_forward_ce(*inputs.heads, vocab_size=40)
    heads = inputs.student_weight, inputs.teacher_weight
    assert [(each.data_ptr(), len(each)) for each in read] == [(head.data_ptr(), 40) for head in heads]


@pytest.mark.parametrize("op", OPS)
def test_hidden_states_that_lost_their_gradient(op, generator):
    """An error that names the way out, for which the head's gradient is the same and hidden states get none."""
    inputs = make_inputs(N, 40, D, generator=generator)
    _, _, expected = results(op, inputs)
    lost = replace(inputs, student_hidden=inputs.student_hidden.detach())
    with pytest.raises(
        ValueError, match=r"student_hidden needs no gradient but student_weight does.*detach_hidden=True"
    ):
        OPS[op](lost)
    torch.testing.assert_close(results(op, lost, detach_hidden=True)[1], expected)
    OPS[op](inputs, detach_hidden=True).backward()
    torch.testing.assert_close(inputs.student_weight.grad, expected)
    assert inputs.student_hidden.grad is None
    with torch.no_grad():
        assert not OPS[op](lost).requires_grad
    nothing = replace(lost, student_weight=lost.student_weight.detach())
    assert not OPS[op](nothing).requires_grad
    bias = torch.zeros(40, requires_grad=True)
    with pytest.raises(ValueError, match="student_hidden needs no gradient but student_bias does"):
        OPS[op](nothing, student_bias=bias)
    OPS[op](nothing, student_bias=bias, detach_hidden=True).backward()
    assert bias.grad.any()
