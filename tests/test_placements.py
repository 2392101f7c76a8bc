"""DTensors and wrapped models as people have them: four processes compute what one computes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from members import Members
from torch import Tensor

import distil_kernels as dk
from distil_kernels.testing import Inputs, make_inputs

pytestmark = pytest.mark.slow

N, V, D = 24, 307, 16


@pytest.fixture(scope="module")
def members() -> Iterator[Members]:
    group = Members(4)
    yield group
    group.close()


def distributed(tensor: Tensor, mesh: Any, placements: list[Any]) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.detach(), mesh, placements).requires_grad_(tensor.requires_grad)


def on_mesh(rank: int, shape: tuple[int, ...], inputs: Inputs, hidden: str, head: str, teacher: str) -> list[Any]:
    """Loss and whole gradients from tensors with one letter a mesh dimension: S for Shard(0), C for Shard(1), R."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh = init_device_mesh("cpu", shape)
    placements = {"S": Shard(0), "C": Shard(1), "R": Replicate()}

    def placed(tensor: Tensor, letters: str) -> Tensor:
        return distributed(tensor, mesh, [placements[letter] for letter in letters])

    student_hidden = placed(inputs.student_hidden, hidden)
    weight, bias = placed(inputs.student_weight, head), placed(inputs.options["student_bias"], head.replace("C", "R"))
    loss = dk.fused_forward_kl(
        student_hidden, weight, placed(inputs.teacher_hidden, hidden), placed(inputs.teacher_weight, teacher),
        student_bias=bias, teacher_bias=placed(inputs.options["teacher_bias"], teacher.replace("C", "R")),
        token_weight=placed(inputs.options["token_weight"], hidden), reduction="sum",
    )  # fmt: skip
    assert not isinstance(loss, DTensor)
    loss.backward()
    found = []
    for leaf in (student_hidden, weight, bias):
        assert isinstance(leaf.grad, DTensor) and leaf.grad.placements == leaf.placements
        found.append(leaf.grad.full_tensor())
    return [loss.detach(), *found]


CASES = {
    "vocabulary": ((4,), "R", "S", "S"),
    "teacher gathered": ((4,), "R", "S", "R"),
    "columns": ((4,), "R", "C", "C"),
    "everywhere": ((4,), "R", "R", "R"),
    "rows": ((4,), "S", "R", "S"),
    "rows, head in shards": ((4,), "S", "S", "C"),
    "rows and vocabulary": ((2, 2), "SR", "RS", "RS"),
    "rows and vocabulary, all in shards": ((2, 2), "SR", "SS", "RS"),
    "vocabulary twice": ((2, 2), "RR", "SS", "SS"),
}


@pytest.mark.parametrize("case", CASES)
def test_placements(members, case, generator):
    shape, hidden, head, teacher = CASES[case]
    inputs = make_inputs(N, V, D, bias=True, generator=generator, token_weight=torch.rand(N, generator=generator))
    whole = dk.fused_forward_kl(*inputs.heads, **inputs.options, reduction="sum")
    expected = torch.autograd.grad(whole, list(inputs.leaves.values()))
    results = members.results(on_mesh, shape, inputs, hidden, head, teacher)
    number_of_parts = shape[hidden.index("S")] if "S" in hidden else 1
    losses = [loss for loss, *_ in results]
    total = sum(losses) * number_of_parts / len(losses)
    torch.testing.assert_close(total, whole.detach(), rtol=1e-5, atol=0.0)
    for _, *gradients in results:
        for gradient, exact in zip(gradients, expected, strict=True):
            torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=3e-6)


def refused(rank: int, what: str) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    mesh = init_device_mesh("cpu", (4,))
    hidden, weight = torch.randn(8, D), torch.randn(V, D)
    replicated = distributed(hidden, mesh, [Replicate()])
    head = distributed(weight, mesh, [Shard(0)])
    if what == "columns of hidden states":
        other = distributed(hidden, mesh, [Shard(1)])
        return dk.fused_forward_ce(other, head, other, head)
    if what == "partial head":
        return dk.fused_forward_ce(replicated, DTensor.from_local(weight, mesh, [Partial()]), replicated, head)
    if what == "teacher elsewhere":
        return dk.fused_forward_ce(replicated, head, distributed(hidden, mesh, [Shard(0)]), head)
    if what == "head of another group":
        return dk.fused_forward_ce(
            hidden, distributed(weight, mesh, [Replicate()]), hidden, weight, vocab_group=mesh.get_group()
        )
    return dk.token_logprobs(hidden, weight, tokens=distributed(torch.zeros(8, dtype=torch.int64), mesh, [Shard(0)]))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("columns of hidden states", r"student_hidden is a DTensor \[Shard\(dim=1\)\], expected Replicate or Shard"),
        ("partial head", r"student_weight is a DTensor \[Partial\(sum\)\], expected no Partial"),
        ("teacher elsewhere", r"teacher_hidden is a DTensor \[Shard\(dim=0\)\], expected .* as student_hidden"),
        ("head of another group", r"student_weight is a DTensor \[Replicate\(\)\], expected Shard\(0\) on the mesh"),
        ("tokens", r"tokens is a DTensor \[Shard\(dim=0\)\], expected a plain tensor, or .* with student_hidden"),
    ],
)
def test_what_is_refused(members, what, message):
    import re

    for error in members.call(refused, what):
        assert isinstance(error, ValueError) and re.search(message, str(error)), error
