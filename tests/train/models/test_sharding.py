"""Two processes with a share of the model each: gradients, runs and checkpoints of whole models, in half the memory."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import AutoPeftModelForCausalLM
from runs import (
    EXTRA,
    assert_close_records,
    assert_same,
    assert_same_steps,
    refused,
    run_interrupted,
    run_main,
    start,
    trainer,
    two_steps,
)
from tiny import byte_tokenizer, llama_config
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from two_processes import together

from distil_kernels.train import shared_rows
from distil_kernels.train.__main__ import main
from distil_kernels.train.models.exchanged_rows import Sizes
from distil_kernels.train.models.sharding import local_shard, shard
from distil_kernels.train.rollouts.packed_batch import PackedBatch
from distil_kernels.train.rollouts.prompt_group import PromptGroup
from distil_kernels.train.run.checkpoint import load_state, restore_generators
from distil_kernels.train.teachers.base import HiddenTarget, TopKTarget
from distil_kernels.train.teachers.in_process import InProcessTeacher
from distil_kernels.train.trainer import Trainer

pytestmark = pytest.mark.slow

METHODS: dict[str, dict[str, Any]] = {
    "frozen teacher": {"teacher": "frozen"},
    "ema teacher, micro-batches of 1": {"teacher": "ema", "micro_batch_prompts": 1},
    "live teacher, two updates": {"teacher": "live", "updates_per_batch": 2, "micro_batch_prompts": 1},
    "frozen teacher, two updates": {"teacher": "frozen", "updates_per_batch": 2},
    "recomputed layers": {"teacher": "frozen", "gradient_checkpointing": True},
    "recomputed loss": {"teacher": "frozen", "plan": "recompute"},
    "another model as teacher": {"teacher": "local"},
    "no teacher": {"teacher": "live", "objective": "policy_gradient"},
    "adapters, start as teacher": {"teacher": "frozen", "lora_rank": 2},
    "adapters, ema teacher": {"teacher": "ema", "lora_rank": 2},
    "named tokens": {"teacher": "frozen"},
    "a teacher's head that each has": {"teacher": "frozen", "reward_weight": 0.5, "reference_weight": 0.2},
}
RUN = [*EXTRA, "--prompts_per_step", "4", "--micro_batch_prompts", "1", "--held_out_every", "2"]


@pytest.fixture(scope="module")
def untied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a head of its own, and sizes that two processes cannot halve."""
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("untied")
    config = llama_config(tie_word_embeddings=False, vocab_size=261, intermediate_size=47)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def named_tokens(teacher: InProcessTeacher, batch: PackedBatch) -> TopKTarget:
    """What teachers behind an endpoint answer."""
    with torch.no_grad(), teacher.opened():
        states = teacher.lm.states(batch.teacher_prompts, batch.teacher_prompt_index, batch.completions)
        logprobs, ids = teacher.lm.logits(states).log_softmax(-1).topk(5)
    return TopKTarget(ids, logprobs, torch.zeros(len(ids)))


def whole_head(teacher: InProcessTeacher, batch: PackedBatch) -> HiddenTarget:
    """What a teacher of hidden states answers."""
    with torch.no_grad(), teacher.opened():
        states = teacher.lm.states(batch.teacher_prompts, batch.teacher_prompt_index, batch.completions)
        return HiddenTarget(states, teacher.lm.weight.detach().clone(), None)


ANSWERS = {"named tokens": named_tokens, "a teacher's head that each has": whole_head}


def gradients(
    rank: int, models: Sequence[Path], directory: Path, names: Sequence[str], is_sharded: bool, exchanges: bool = False
) -> None:
    asked: list[Sizes] = []

    def is_leaner(sizes: Sizes) -> bool:
        asked.append(sizes)
        return exchanges

    shared_rows.exchange_is_leaner = is_leaner
    target, in_shards = InProcessTeacher.target, InProcessTeacher.in_shards
    for name in names:
        InProcessTeacher.target = ANSWERS.get(name, target)  # type: ignore[method-assign, assignment]
        if name in ANSWERS:
            InProcessTeacher.in_shards = lambda self, target: target  # type: ignore[method-assign]
        settings = {"prompts_per_step": 4, "shard": is_sharded, **METHODS[name]}
        if settings["teacher"] == "local":
            settings["teacher_model"] = str(models[1])
        torch.save(two_steps(models[0], directory / f"{name} {rank}", **settings), directory / f"{name} {rank}.pt")
        InProcessTeacher.target, InProcessTeacher.in_shards = target, in_shards  # type: ignore[method-assign]
    assert bool(asked) == is_sharded


@pytest.mark.parametrize("exchanges", [True, False], ids=["rows exchanged", "heads gathered"])
@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
def test_gradients_are_those_of_one_process(
    tiny_model: Path, untied_model: Path, tmp_path: Path, is_tied: bool, exchanges: bool
) -> None:
    alone, two = tmp_path / "alone", tmp_path / "two"
    alone.mkdir()
    two.mkdir()
    models = [tiny_model, untied_model] if is_tied else [untied_model, tiny_model]
    names = list(METHODS) if is_tied and exchanges else ["another model as teacher", "adapters, ema teacher"]
    gradients(0, models, alone, names, False)
    assert together(gradients, models, two, names, True, exchanges) == [0, 0]
    for name in names:
        expected, *found = (torch.load(path / f"{name} {rank}.pt") for path, rank in ((alone, 0), (two, 0), (two, 1)))
        for steps in found:
            assert_same_steps(steps, expected, name)


def bfloat16_gradient(rank: int, model: Path, directory: Path, is_sharded: bool) -> None:
    AcceleratorState._reset_state()  # a process has one precision
    shared_rows.exchange_is_leaner = lambda sizes: True
    try:
        settings = {"prompts_per_step": 4, "precision": "bfloat16", "teacher": "ema", "shard": is_sharded}
        first, _ = two_steps(model, directory / f"bfloat16 {rank}", **settings)
    finally:
        AcceleratorState._reset_state()
    torch.save(first["gradient"], directory / f"bfloat16 {rank}.pt")


def test_products_in_bfloat16_are_as_exact(tiny_model: Path, tmp_path: Path) -> None:
    alone, two = tmp_path / "alone", tmp_path / "two"
    alone.mkdir()
    two.mkdir()
    exact, _ = two_steps(tiny_model, tmp_path / "exact", prompts_per_step=4, teacher="ema")
    bfloat16_gradient(0, tiny_model, alone, False)
    assert together(bfloat16_gradient, tiny_model, two, True) == [0, 0]
    ours, theirs = ((torch.load(path / "bfloat16 0.pt") - exact["gradient"]).abs().max() for path in (two, alone))
    assert 0 < ours <= 2 * theirs


def run_unevenly(rank: int, arguments: list[str]) -> int:
    """The second process samples everything twice."""
    roll_out = Trainer.roll_out

    def twice(self: Trainer, groups: Sequence[PromptGroup], *rest: Any) -> None:
        with torch.random.fork_rng([]):
            roll_out(self, [PromptGroup(group.problem, group.prompt) for group in groups], *rest)
        roll_out(self, groups, *rest)

    if rank == 1:
        Trainer.roll_out = twice  # type: ignore[method-assign]
    return main(arguments)


@pytest.fixture(scope="module")
def sharded(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps."""
    runs = tmp_path_factory.mktemp("sharded")
    assert together(run_unevenly, [*start(tiny_model, runs, "run", 4), *RUN, "--shard"]) == [0, 0]
    return runs / "run"


def test_a_run_and_its_checkpoint_are_those_of_whole_models(sharded: Path, tiny_model: Path, tmp_path: Path) -> None:
    assert together(run_main, [*start(tiny_model, tmp_path, "run", 4), *RUN]) == [0, 0]
    whole = tmp_path / "run"
    assert_close_records(sharded, whole)
    ours, theirs = sharded / "checkpoint", whole / "checkpoint"
    assert sorted(path.name for path in ours.iterdir()) == sorted(path.name for path in theirs.iterdir())
    assert (ours / "config.json").read_text() == (theirs / "config.json").read_text()
    weights = [AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (ours, theirs)]
    before = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
    assert all(not torch.equal(value, before[name]) for name, value in weights[0].items())
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)
    states = [load_state(path) for path in (ours, theirs)]
    names = [state["optimizer"]["param_groups"][0].pop("params") for state in states]
    assert names[0] == names[1] and set(names[0]) == set(states[0]["optimizer"]["state"])
    for name in ("optimizer", "teacher", "baseline"):
        torch.testing.assert_close(states[0][name], states[1][name], rtol=1e-3, atol=1e-5)


def test_an_interrupted_run_resumes_to_the_last_bit(sharded: Path, tiny_model: Path, tmp_path: Path) -> None:
    arguments = [*start(tiny_model, tmp_path, "run", 4), *RUN, "--shard"]
    assert together(run_interrupted, arguments, 1) == [130, 130]
    assert (tmp_path / "run" / "checkpoint").resolve().name == "checkpoint-000002"
    assert together(run_main, ["--resume", str(tmp_path / "run")]) == [0, 0]
    assert_same(tmp_path / "run", sharded)


def test_one_process_evaluates_it(sharded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(sharded)]) == 0
    assert '"step": 4' in capsys.readouterr().out


def resumed_adapters(rank: int, model: Path, directory: Path) -> None:
    """One more step after a checkpoint, by who wrote it and by who takes it up."""
    settings = {"shard": True, "lora_rank": 2, "teacher": "ema", "ema_rate": 0.5, "learning_rate": 1e-2}
    first, second = (trainer(model, directory / f"{name} {rank}", **settings) for name in ("first", "second"))
    first.train_step()
    first.save()
    step = first.train_step()
    generators = second.load(directory / "first 0" / "checkpoint")["generators"]
    restore_generators(generators[rank])
    again = second.train_step()
    assert all(
        torch.equal(local_shard(a), local_shard(b))
        for a, b in zip(first.models.trained, second.models.trained, strict=True)
    )
    states = [run.teacher.state_dict() for run in (first, second)]
    assert bool(states[0]) == (rank == 0)
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    teachers = [dict(run.teacher.lm.model.named_parameters()) for run in (first, second)]
    assert any("lora_" in name for name in teachers[0])
    assert all(torch.equal(local_shard(value), local_shard(teachers[1][name])) for name, value in teachers[0].items())
    assert (step["loss"], step["grad_norm"]) == (again["loss"], again["grad_norm"])


def test_adapters_resume_to_the_last_bit(tiny_model: Path, tmp_path: Path) -> None:
    assert together(resumed_adapters, tiny_model, tmp_path) == [0, 0]
    saved = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "first 0" / "checkpoint").state_dict()
    assert any(value.abs().max() > 0 for name, value in saved.items() if "lora_B" in name)


def memory(rank: int, model: Path, directory: Path, exchanges: bool) -> None:
    """What a process holds: between steps of what kind how much, and in the backward pass which weights."""
    shared_rows.exchange_is_leaner = lambda sizes: exchanges
    run = trainer(model, directory / f"{rank}", shard=True, teacher="ema", baseline="none")
    named = dict(run.student.model.named_parameters())
    backward, in_backward = run.accelerator.backward, []

    def note(loss: torch.Tensor) -> None:
        now = dict(run.student.model.named_parameters())
        in_backward.append({name for name, weight in now.items() if not isinstance(weight, DTensor)})
        backward(loss)

    run.accelerator.backward = note  # type: ignore[method-assign]
    gradient_sizes: list[int] = []
    run.optimizer.optimizer.register_step_pre_hook(
        lambda *_: gradient_sizes.append(sum(local_shard(weight.grad).numel() for weight in run.models.trained))
    )
    run.train_step()
    moments = [value for state in run.optimizer.optimizer.state.values() for value in state.values() if value.ndim]
    held = {
        "weights": sum(local_shard(weight).numel() for weight in named.values()),
        "moments": sum(local_shard(value).numel() for value in moments),
        "teacher": sum(local_shard(weight).numel() for weight in run.teacher.lm.model.parameters()),
        "gradients": gradient_sizes[0],
        "whole": sum(weight.numel() for weight in named.values()),
    }
    gc.collect()
    alive = {
        item.untyped_storage().data_ptr(): item.untyped_storage().nbytes()
        for item in gc.get_objects()
        if type(item) in (torch.Tensor, torch.nn.Parameter) and item.dtype == torch.float32
    }
    torch.save((held, in_backward, sum(alive.values())), directory / f"{rank}.pt")


@pytest.mark.parametrize("exchanges", [True, False], ids=["rows exchanged", "heads gathered"])
def test_each_holds_half(tiny_model: Path, tmp_path: Path, exchanges: bool) -> None:
    assert together(memory, tiny_model, tmp_path, exchanges) == [0, 0]
    for rank in range(2):
        held, in_backward, alive = torch.load(tmp_path / f"{rank}.pt")
        half = held["whole"] / 2
        assert [held[name] for name in ("weights", "moments", "teacher", "gradients")] == [half, 2 * half, half, half]
        # All but what is no layer's: the last norm, and embeddings (the head, here) unless they stay in shards.
        assert in_backward == [{"model.norm.weight"} | (set() if exchanges else {"model.embed_tokens.weight"})]
        # No gathered weights are left, of student or teacher.
        assert 16 * half <= alive < 1.1 * 16 * half


def test_unequal_shares_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    main_status, other = together(refused, [*start(tiny_model, tmp_path, "run", 1), "--shard"], tmp_path)
    assert main_status == 2 and other != 0
    said = (tmp_path / "0.txt").read_text()
    assert "[prompts_per_step] with shard all processes take as many: expected a multiple of 2, got 3" in said


@pytest.mark.parametrize("reading", ["shared", "packed"])
def test_several_forwards_are_refused(reading: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--shard", "--reading", reading, "--model", "nowhere"])
    assert f"expected auto or padded, got {reading}" in capsys.readouterr().err


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[shard\] Linear has no layers of transformers'"):
        shard([torch.nn.Linear(2, 2)], Accelerator(cpu=True))
