"""The code of docs/distributed.md, as it stands there: four processes learn what one learns."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from members import Members
from torch import Tensor, nn

import distil_kernels as dk
from distil_kernels.testing import make_inputs

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[1] / "docs" / "distributed.md"
N, V, D, LENGTH = 24, 307, 16, 6


@pytest.fixture(scope="module")
def members() -> Iterator[Members]:
    group = Members(4)
    yield group
    group.close()


def page() -> SimpleNamespace:
    """What the code of the page defines."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    from torch.distributed.tensor import Replicate, Shard
    from torch.nn.parallel import DistributedDataParallel

    import distil_kernels

    def split(model: nn.Module) -> Any:  # late: it needs transformers
        from distil_kernels.hf import split

        return split(model)

    names: dict[str, Any] = {
        "split": split, "distil_kernels": distil_kernels, "nn": nn, "fully_shard": fully_shard, "Replicate": Replicate,
        "Shard": Shard,
        "DistributedDataParallel": DistributedDataParallel,
        "register_fsdp_forward_method": register_fsdp_forward_method,
    }  # fmt: skip
    for source in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(source, names)
    return SimpleNamespace(**names)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.linear(hidden).tanh()


class Body(nn.Module):
    def __init__(self, checkpoints: bool) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(V, D)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self._checkpoints = checkpoints

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        hidden = self.embed_tokens(input_ids)
        for layer in self.layers:
            if self._checkpoints:
                hidden = torch.utils.checkpoint.checkpoint(layer, hidden, use_reentrant=False)
            else:
                hidden = layer(hidden)
        return SimpleNamespace(last_hidden_state=hidden)


class Student(nn.Module):
    """A language model in the form of transformers'."""

    def __init__(self, tied: bool = False, checkpoints: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model, self.lm_head = Body(checkpoints), nn.Linear(D, V, bias=False)
        if tied:
            self.lm_head.weight = self.model.embed_tokens.weight


def batch(part: slice = slice(None)) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts [8, LENGTH] with the teacher's hidden states, of some sequences, and its head."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(V, (8, LENGTH), generator=generator)
    hidden = torch.randn(8, LENGTH, D, generator=generator)
    return ids[part], hidden[part], torch.randn(V, D, generator=generator)


def gradients_of_one(dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
    student = Student(**options).to(dtype)
    ids, hidden, weight = batch()
    page().Distillation(student)(ids, hidden.to(dtype), weight.to(dtype)).backward()
    return {name: parameter.grad for name, parameter in student.named_parameters()}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def wrapped(rank: int, case: str, options: dict[str, Any], folder: str) -> dict[str, Tensor]:
    """Gradients after one batch of which each process has a quarter."""
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

    code, student = page(), Student(**options)
    ids, hidden, weight = batch(slice(2 * rank, 2 * rank + 2))
    if case == "outside":
        code.sharded(student)
        _sum_for_gloo(student, FSDPModule)
        code.step_outside(student, ids, hidden, weight)
    elif case == "ddp":
        module = code.with_ddp(student)
        for place, last in ((slice(0, 1), False), (slice(1, 2), True)):  # two micro-batches
            with contextlib.nullcontext() if last else module.no_sync():
                (module(ids[place], hidden[place], weight) / 2).backward()
    else:
        policy = {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)} if case == "bfloat16" else {}
        module = code.with_fsdp(student, **policy)
        _sum_for_gloo(module, FSDPModule)
        if case == "bfloat16":
            hidden, weight = hidden.bfloat16(), weight.bfloat16()
        for place, last in ((slice(0, 1), False), (slice(1, 2), True)):
            module.set_requires_gradient_sync(last)
            (module(ids[place], hidden[place], weight) / 2).backward()
        _saved_and_loaded(student, folder)
    return {name: whole(parameter.grad) for name, parameter in student.named_parameters()}


def _sum_for_gloo(module: nn.Module, kind: type) -> None:
    """gloo has no average."""
    for part in module.modules():
        if isinstance(part, kind):
            part.set_force_sum_reduction_for_comms(True)


def _saved_and_loaded(student: nn.Module, folder: str) -> None:
    """A distributed checkpoint brings back what was saved."""
    import torch.distributed.checkpoint as checkpoint

    before = {name: whole(value).clone() for name, value in student.state_dict().items()}
    checkpoint.save(student.state_dict(), checkpoint_id=folder)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    state = student.state_dict()
    checkpoint.load(state, checkpoint_id=folder)
    student.load_state_dict(state)
    for name, value in student.state_dict().items():
        assert torch.equal(whole(value), before[name]), name


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"checkpoints": True}], ids=str)
@pytest.mark.parametrize("case", ["ddp", "inside", "outside", "bfloat16"])
def test_wrapped_modules(members, case, options, tmp_path):
    dtype = torch.bfloat16 if case == "bfloat16" else torch.float32
    expected = gradients_of_one(dtype, **options)
    tolerance = {"rtol": 0.1, "atol": 1e-3} if case == "bfloat16" else {"rtol": 1e-4, "atol": 1e-6}
    for gradients in members.results(wrapped, case, options, str(tmp_path)):
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name].to(gradient.dtype), **tolerance)


def in_shards(rank: int, inputs: Any, own_rows: bool) -> list[Tensor]:
    code, group, size = page(), torch.distributed.group.WORLD, -(-V // 4)
    rows = slice(rank * N // 4, (rank + 1) * N // 4) if own_rows else slice(None)
    shard = slice(rank * size, (rank + 1) * size)
    hidden = inputs.student_hidden.detach()[rows].clone().requires_grad_()
    weight = inputs.student_weight.detach()[shard].clone().requires_grad_()
    teacher = inputs.teacher_hidden[rows], inputs.teacher_weight[shard]
    if own_rows:
        loss = code.step_from_own_rows(hidden, weight, *teacher, V, group)
    else:
        loss = code.step(hidden, weight, *teacher, inputs.tokens, torch.tensor([0, 10, N]), V, group).loss
    return [loss.detach(), hidden.grad, weight.grad]


def test_shards_of_the_vocabulary(members, generator):
    inputs = make_inputs(N, V, D, generator=generator)
    leaves = list(inputs.leaves.values())
    whole_loss = dk.fused_distil_loss(*inputs.heads, tokens=inputs.tokens, cu_seqlens=torch.tensor([0, 10, N])).loss
    expected = torch.autograd.grad(whole_loss, leaves)
    results = members.results(in_shards, inputs, False)
    for loss, hidden, _ in results:
        torch.testing.assert_close(loss, whole_loss.detach(), rtol=1e-5, atol=0.0)
        torch.testing.assert_close(hidden, expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat([each[2] for each in results]), expected[1], rtol=1e-4, atol=1e-5)

    whole_loss = dk.fused_forward_kl(*inputs.heads)
    expected = torch.autograd.grad(whole_loss, leaves)
    results = members.results(in_shards, inputs, True)
    for place in (0, 1):
        found = torch.cat([each[1 + place] for each in results])
        torch.testing.assert_close(found, expected[place], rtol=1e-4, atol=1e-6)


def on_a_mesh(rank: int, inputs: Any) -> list[Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, 2))
    rows, vocabulary = [Shard(0), Replicate()], [Replicate(), Shard(0)]
    hidden = distribute_tensor(inputs.student_hidden.detach(), mesh, rows).requires_grad_()
    weight = distribute_tensor(inputs.student_weight.detach(), mesh, vocabulary).requires_grad_()
    teacher = (
        distribute_tensor(inputs.teacher_hidden, mesh, rows),
        distribute_tensor(inputs.teacher_weight, mesh, vocabulary),
    )
    page().step_on_a_mesh(hidden, weight, *teacher)
    return [hidden.grad.full_tensor(), weight.grad.full_tensor()]


def test_dtensors(members, generator):
    inputs = make_inputs(N, V, D, generator=generator)
    loss = dk.fused_forward_kl(*inputs.heads, reduction="sum")
    expected = torch.autograd.grad(loss, list(inputs.leaves.values()))
    for found in members.results(on_a_mesh, inputs):
        for gradient, exact in zip(found, expected, strict=True):
            torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-5)


def with_tp(rank: int, folder: str) -> tuple[Tensor, dict[str, Tensor]]:
    import os

    from transformers import AutoModelForCausalLM

    from distil_kernels.hf import split

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "4"}
    student = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    loss = page().step_with_tp(student, *_of_transformers(student.config.vocab_size, student.config.hidden_size))
    assert split(student).vocab_group.size() == 4
    return loss.detach(), {name: whole(each.grad) for name, each in student.named_parameters()}


def _of_transformers(vocab_size: int, hidden_size: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(vocab_size, (2, 5), generator=generator)
    return (
        ids,
        torch.randn(2, 5, hidden_size, generator=generator),
        torch.randn(vocab_size, hidden_size, generator=generator),
    )


def test_tensor_parallel_of_transformers(members, tmp_path):
    from tiny import llama_config
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    student = LlamaForCausalLM(llama_config(tie_word_embeddings=False, num_attention_heads=4, num_key_value_heads=4))
    student.save_pretrained(tmp_path)
    ids, hidden, weight = _of_transformers(student.config.vocab_size, student.config.hidden_size)
    states = student.model(input_ids=ids).last_hidden_state
    loss = dk.fused_forward_kl(states, student.lm_head.weight, hidden, weight)
    loss.backward()
    for found, gradients in members.results(with_tp, str(tmp_path)):
        torch.testing.assert_close(found, loss.detach(), rtol=1e-5, atol=0.0)
        for name, parameter in student.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-6, msg=name)
