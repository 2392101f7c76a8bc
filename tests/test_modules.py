"""The losses as modules: each is its function, checks its options at construction, and lives as a module does."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch

import distil_kernels
from distil_kernels import modules
from distil_kernels.losses import LossOptions
from distil_kernels.plan import Plan
from distil_kernels.testing import make_inputs

MODULES = [
    module for module in vars(modules).values()
    if isinstance(module, type) and issubclass(module, modules._Loss) and module is not modules._Loss
]  # fmt: skip
BORDERS = torch.tensor([0, 4, 12])


def batch_of(module: type, inputs) -> tuple[tuple, dict]:
    """What a module is called with: 12 rows, two sequences."""
    hidden, weight, *_ = inputs.heads
    named = inputs.tokens[:, None], torch.full((12, 1), -0.5)
    sequences = {"tokens": inputs.tokens, "cu_seqlens": BORDERS}
    if module is modules.ClippedPolicyLoss:
        return (hidden, weight), {
            "tokens": inputs.tokens, "advantages": torch.linspace(-1, 1, 12), "old_logprobs": torch.full((12,), -3.4),
        }  # fmt: skip
    tensors = (hidden, weight, *named) if module.__name__.startswith("TopK") else inputs.heads
    return tensors, sequences if issubclass(module, modules.SequenceDistilLoss) else {}


def scalar(result) -> torch.Tensor:
    return getattr(result, "loss", result)


def function_of(module: type):
    return module._function


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_a_module_is_its_function(module, generator):
    inputs = make_inputs(12, 30, 8, generator=generator)
    tensors, batch = batch_of(module, inputs)
    batch |= {"token_mask": torch.arange(12) % 3 != 0, "normalizer": 7}
    options = {"temperature": 0.7, "student_logit_scale": 1.5}
    loss = scalar(module(**options)(*tensors, **batch))
    expected = scalar(function_of(module)(*tensors, **batch, **options))
    assert torch.equal(loss, expected) and loss != scalar(module()(*tensors, **batch))
    for mine, other in zip(*(torch.autograd.grad(each, tensors[:2]) for each in (loss, expected)), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_it_is_copied_pickled_printed_and_moved(module, generator):
    loss = module(temperature=0.7)
    assert repr(loss) == f"{module.__name__}(temperature=0.7)"
    tensors, batch = batch_of(module, make_inputs(12, 30, 8, generator=generator))
    expected = scalar(loss(*tensors, **batch))
    for copied in (pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss), loss.to(torch.bfloat16).eval()):
        assert copied.options == {"temperature": 0.7} and not copied.state_dict()
        assert torch.equal(scalar(copied(*tensors, **batch)), expected)


@pytest.mark.parametrize("module", [modules.ForwardCELoss, modules.SequenceDistilLoss], ids=lambda m: m.__name__)
def test_it_compiles_as_one_graph(module, generator):
    torch.compiler.reset()
    tensors, batch = batch_of(module, make_inputs(12, 30, 8, generator=generator))
    loss = module(temperature=0.7)
    compiled = torch.compile(lambda *tensors: scalar(loss(*tensors, **batch)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), scalar(loss(*tensors, **batch)))


@pytest.mark.parametrize(("module", "options", "message"), [
    (modules.ForwardCELoss, {"temperature": 0}, r"\[fused_forward_ce\] temperature is 0"),
    (modules.ForwardKLLoss, {"reduction": "avg"}, r"\[fused_forward_kl\] reduction is 'avg'"),
    (modules.ReverseKLLoss, {"backend": "gpu"}, r"\[ReverseKLLoss\] backend is 'gpu', expected one of"),
    (modules.ReverseKLLoss, {"plan": "fast"}, "fast"),
    (modules.ForwardCELoss, {"plan": "kept_gradient"}, "a scalar loss keeps nothing"),
    (modules.ForwardCELoss, {"reduction": "none", "gradient_threshold": 0.1}, "gradient_threshold is 0.1"),
    (modules.ForwardCELoss, {"backend": "reference", "gradient_threshold": 0.1}, "expected 'cpu'"),
    (modules.ForwardCELoss, {"vocab_size": 0}, "vocab_size is 0"),
    (modules.JSDLoss, {"jsd_weight": 1}, r"\[fused_jsd\] jsd_weight is 1"),
    (modules.ForwardCELoss, {"jsd_weight": 0.5}, r"\[ForwardCELoss\] 'jsd_weight' is no option, expected some of"),
    (modules.ForwardCELoss, {"token_mask": None}, r"\[ForwardCELoss\] token_mask came at construction"),
    (modules.TopKCELoss, {"reduction": "none"}, r"\[fused_topk_ce\] reduction is 'none'"),
    (modules.SequenceDistilLoss, {"baseline": "leave_one_out"}, "group_size is None"),
    (modules.SequenceDistilLoss, {"group_size": 0}, "group_size is 0"),
    (modules.SequenceDistilLoss, {"importance_clip": 0.0}, "importance_clip is 0.0"),
    (modules.TopKSequenceDistilLoss, {"cost": "jsd"}, r"\[fused_topk_distil_loss\] cost is 'jsd'"),
    (modules.ClippedPolicyLoss, {"clip_low": 2.0}, r"\[fused_policy_loss\] clip_low is 2.0"),
])  # fmt: skip
def test_a_wrong_option_is_an_error_at_construction(module, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        module(**options)


def test_options_that_are_right_where_they_will_be_used():
    """A back end that cannot run here, sizes for other batches, a group, a clip of a ratio."""
    modules.ForwardCELoss(backend="cuda", plan=Plan("gradient_in_forward", 64, 128))
    modules.ForwardCELoss(reduction="none", plan="kept_gradient", backend="triton")
    modules.ForwardCELoss(plan="frozen_head", vocab_size=151_936, detach_hidden=True)
    modules.SequenceDistilLoss(baseline="leave_one_out", group_size=8, importance_clip=2.0, credit_span="sequence")
    with torch.device("meta"):
        modules.SequenceDistilLoss(discount=0.9)


def test_weights_of_terms_are_fixed_and_their_tensors_come_with_the_batch(generator):
    inputs = make_inputs(12, 30, 8, generator=generator)
    options = {
        "policy_weight": 0.5,
        "clip_high": 0.3,
        "label_smoothing": 0.1,
        "distil_weight": 0.2,
        "z_loss_weight": 1e-3,
    }
    tensors, batch = batch_of(modules.SequenceDistilLoss, inputs)
    batch |= {"advantages": torch.tensor([1.0, -1.0]), "labels": inputs.tokens}
    ours = modules.SequenceDistilLoss(**options)(*tensors, **batch)
    assert torch.equal(ours.loss, distil_kernels.fused_distil_loss(*tensors, **batch, **options).loss)


def test_values_of_a_baseline_belong_to_the_call(generator):
    inputs = make_inputs(12, 30, 8, generator=generator)
    tensors, batch = batch_of(modules.SequenceDistilLoss, inputs)
    values = torch.randn(12, generator=generator)
    ours = modules.SequenceDistilLoss(discount=0.9)(*tensors, **batch, baseline=values)
    expected = distil_kernels.fused_distil_loss(*tensors, **batch, discount=0.9, baseline=values)
    assert torch.equal(ours.credit, expected.credit)


def test_every_function_with_a_gradient_of_its_own_has_a_module():
    functions = {function_of(module).__name__ for module in MODULES}
    assert functions == {name for name in distil_kernels.__all__ if name.startswith("fused_")}
    assert {module.__name__ for module in MODULES} <= set(distil_kernels.__all__)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_tensors_are_of_the_batch_and_nothing_else_is(module):
    parameters = inspect.signature(function_of(module)).parameters.values()
    annotations = {each.name: each.annotation for each in parameters if each.kind == each.KEYWORD_ONLY}
    if (
        function_of(module).__name__ != "fused_forward_ce"
        and "options" in inspect.signature(function_of(module)).parameters
    ):
        annotations |= LossOptions.__annotations__
    with_tensors = {name for name, kind in annotations.items() if "Tensor" in str(kind)} - {"baseline", "distil_weight"}
    assert with_tensors == set(annotations) & modules.OF_A_BATCH
    assert module.option_names() == set(annotations) - with_tensors
