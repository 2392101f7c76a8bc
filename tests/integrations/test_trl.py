"""TRL's own trainers, whole runs of a few steps, with and without the switch: equal numbers, and no logits formed."""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

import torch
import trl_runs
from peft import LoraConfig
from transformers import LlamaForCausalLM
from trl.experimental.gkd import GKDTrainer
from trl.experimental.sdpo import sdpo_trainer
from trl.generation import vllm_client
from trl.trainer import distillation_trainer

from distil_kernels.integrations.trl import DistILConfig, DistILTrainer, apply_distil_kernels_to_trl, methods, switch
from distil_kernels.integrations.trl import unformed_logits as unformed

pytestmark = pytest.mark.slow

SDPO = {"distillation_mode": "full_logits"}
TOP_5 = {"distillation_mode": "topk_logits", "distillation_topk": 5}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "distillation, forward KL": (trl_runs.distillation, {"beta": 0.0}),
    "distillation, JSD": (trl_runs.distillation, {"beta": 0.3, "temperature": 0.7}),
    "distillation, reverse KL": (trl_runs.distillation, {"beta": 1.0, "gradient_accumulation_steps": 2}),
    "distillation from a server, top 5": (trl_runs.served_distillation, {"beta": 0.0, "loss_top_k": 5}),
    "distillation from a server, JSD": (trl_runs.served_distillation, {"beta": 0.5, "loss_top_k": 1}),
    "SDPO from a server, top 5": (trl_runs.served_sdpo, TOP_5 | {"distillation_alpha": 0.5}),
    "SDPO from a server": (trl_runs.served_sdpo, {"distillation_mode": "sampled_token"}),
    "SDPO, forward KL": (trl_runs.sdpo, SDPO | {"distillation_alpha": 0.0, "gradient_accumulation_steps": 2}),
    "SDPO, JSD beside rewards": (trl_runs.sdpo, SDPO | {"distillation_alpha": 0.5, "distillation_weight": 0.5}),
    "SDPO, rewards alone": (
        trl_runs.sdpo,
        SDPO | {"distillation_weight": 0.0, "importance_sampling_level": "sequence"},
    ),
    "SDPO, older rollouts": (
        trl_runs.sdpo,
        SDPO | {"num_iterations": 2, "distillation_is_clip": 1.01, "temperature": 0.8, "learning_rate": 0.2},
    ),
    "SDPO, sampled tokens": (trl_runs.sdpo, {"distillation_mode": "sampled_token", "gradient_checkpointing": True}),
    "SDPO, top 5 and tail": (trl_runs.sdpo, TOP_5 | {"distillation_alpha": 0.5, "distillation_add_tail": True}),
    "SDPO, top 5 alone": (trl_runs.sdpo, TOP_5 | {"distillation_alpha": 0.0}),
    "SDPO, cut rollouts": (trl_runs.sdpo, SDPO | {"mask_truncated_completions": True, "distillation_alpha": 0.5}),
    "SDPO, LoRA": (
        trl_runs.sdpo,
        SDPO | {"peft_config": LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)},
    ),
    "SDPO, LoRA and a trained head, whose teacher has neither": (
        trl_runs.sdpo,
        SDPO
        | {
            "peft_config": LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
            "teacher_model_kind": "base",
            "distillation_alpha": 0.5,
        },
    ),
    "SDFT": (trl_runs.sdft, SDPO | {"distillation_alpha": 0.5}),
    "SDFT, top K": (trl_runs.sdft, {}),
    "GKD": (trl_runs.gkd, {"beta": 0.5, "gradient_accumulation_steps": 2}),
    "GKD, a model for images": (trl_runs.image_text_model, {"beta": 0.5, "lmbda": 0.0}),
    "GKD, padded heads": (trl_runs.padded_heads, {"beta": 0.5, "lmbda": 0.0}),
    "GOLD": (trl_runs.gold, {"beta": 0.3, "temperature": 0.9}),
}


@pytest.fixture
def head_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of positions for which an output head formed logits while a gradient was wanted."""
    rows: list[int] = []
    linear = torch.nn.Linear.forward

    def counted(self: torch.nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
        if self.out_features == 260 and torch.is_grad_enabled():
            rows.append(hidden.shape[:-1].numel())
        return linear(self, hidden)

    monkeypatch.setattr(torch.nn.Linear, "forward", counted)
    return rows


@pytest.mark.parametrize("case", CASES)
def test_the_switch_changes_no_number(
    case: str, tmp_path: Path, head_rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    make, options = CASES[case]
    monkeypatch.setattr(vllm_client, "VLLMClient", trl_runs.Server)
    monkeypatch.setattr(unformed, "CHUNK_BYTES", 5 * 4 * 260)  # five rows of a top-K loss at a time
    expected = trl_runs.run(make, tmp_path / "before", **copy.deepcopy(options))
    formed = len(head_rows)
    with apply_distil_kernels_to_trl(), warnings.catch_warnings():
        warnings.filterwarnings("error", message=r"\[trl\]")  # nothing is left to TRL
        switched = trl_runs.run(make, tmp_path / "after", **copy.deepcopy(options))

    assert len(switched.logs) == len(expected.logs) == trl_runs.STEPS
    for after, before in zip(switched.logs, expected.logs, strict=True):
        assert after == pytest.approx(before, rel=2e-5, abs=2e-6)
    for name, parameter in expected.parameters.items():
        torch.testing.assert_close(switched.parameters[name], parameter, rtol=1e-5, atol=1e-6, msg=name)
    # DistillationTrainer never calls its head; the others' heads are silent now.
    assert formed > 0 or make is trl_runs.distillation
    assert len(head_rows) == formed


@pytest.mark.parametrize("autocast", [False, True])
def test_log_probs_of_all_tokens_sum_to_one(autocast: bool, generator: torch.Generator) -> None:
    hidden, weight = (torch.randn(*shape, generator=generator) for shape in ((2, 3, 32), (17, 32)))
    mask = torch.tensor([[True, True, False], [True, False, True]])
    logits = unformed.UnformedLogits(hidden, weight, torch.randn(17, generator=generator), 0.7, 5.0, None, 0.9, mask)
    index = torch.stack([torch.randperm(17, generator=generator) for _ in range(6)]).unflatten(0, (2, 3))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logprobs = unformed.UnformedLogprobs(logits).gather(-1, index)
    torch.testing.assert_close(logprobs.exp().sum(-1)[mask], torch.ones(4), rtol=0, atol=1e-5)
    assert not logprobs[~mask].any()


def test_evaluations_form_no_logits_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = trl_runs.gkd(tmp_path / "before").evaluate()["eval_loss"]
    with apply_distil_kernels_to_trl():
        trainer = trl_runs.gkd(tmp_path / "after")
        rows: list[int] = []
        linear = trainer.model.lm_head.forward
        monkeypatch.setattr(
            trainer.model.lm_head, "forward", lambda hidden: (rows.append(hidden.shape[:-1].numel()), linear(hidden))[1]
        )
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert max(rows) <= 8  # the few tokens that tell how the head is made


def reads_of(trainer: Any) -> tuple[Any, dict[str, Any]]:
    """The model and the first batch of a trainer, as its compute_loss gets them."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer.model, trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "cost": "ce",
            "discount": 1.0,
            "horizon": 2,
            "baseline": None,
            "distillation_weight": 0.25,
            "teacher_ratio_clip": None,
            "credit_clip": None,
        },
        {"cost": "reverse_kl", "credit_span": "none"},
        {"cost": "jsd", "jsd_weight": 0.3, "credit_span": "sequence", "discount": 1.0, "credit_scale": 0.5},
    ],
    ids=["default", "cross-entropy beside rewards", "reverse KL token by token", "JSD of the sequence"],
)
def test_distil_trainer_has_the_gradient_of_the_mathematics(options: dict[str, Any], tmp_path: Path) -> None:
    trainer = trl_runs.sdpo(tmp_path, DistILTrainer, DistILConfig, teacher_model_kind="base", **options)
    model, inputs = reads_of(trainer)
    double, double_teacher = copy.deepcopy(model).double(), copy.deepcopy(trainer.teacher_model).double()
    loss = trainer.compute_loss(model, inputs)
    loss.backward()

    # The same in float64 from logits, sequence by sequence.
    length = inputs["completion_ids"].shape[1]

    def logprobs(model: Any, kind: str) -> torch.Tensor:
        if kind == "teacher":
            ids, mask = inputs["teacher_input_ids"], inputs["teacher_attention_mask"]
        else:
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
            mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        return model(input_ids=ids, attention_mask=mask).logits[:, -length - 1 : -1].log_softmax(-1)

    student = logprobs(double, "student")
    with torch.no_grad():
        teacher = logprobs(double_teacher, "teacher")
    args, mask = trainer.args, inputs["completion_mask"].double()
    mixture = (args.jsd_weight * teacher.exp() + (1 - args.jsd_weight) * student.exp()).log()

    def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return (p.exp() * (p - q)).sum(-1)

    cost = (
        mask
        * {
            "ce": -(teacher.exp() * student).sum(-1),
            "kl": kl(teacher, student),
            "reverse_kl": kl(student, teacher),
            "jsd": args.jsd_weight * kl(teacher, mixture) + (1 - args.jsd_weight) * kl(student, mixture),
        }[args.cost]
    )
    fixed = cost.detach()
    to_come = torch.zeros_like(fixed)
    for position in range(length):
        if args.credit_span == "sequence":
            to_come[:, position] = fixed.sum(1)
        if args.credit_span == "future":
            for later in range(position + 1, min(length, position + 1 + (args.horizon or length))):
                to_come[:, position] += args.discount ** (later - position) * fixed[:, later]
    pairs = to_come.unflatten(0, (-1, 2))
    credit = (pairs - pairs.flip(1)).flatten(0, 1) if args.baseline else to_come
    ids = inputs["completion_ids"][..., None]
    chosen, wanted = (each.gather(-1, ids).squeeze(-1) for each in (student, teacher))
    credit = args.credit_scale * credit.detach()
    if args.teacher_ratio_clip is not None:
        credit = credit * (wanted - chosen).detach().exp().clamp(max=args.teacher_ratio_clip)
    if args.credit_clip is not None:
        credit = credit.clamp(-args.credit_clip, args.credit_clip)
    surrogate = cost + mask * credit * (chosen - chosen.detach())
    expected = surrogate.sum() / len(mask)
    if args.distillation_weight < 1:
        ratio = (chosen - chosen.detach()).exp()
        rewards = -(ratio * inputs["advantages"][:, None].double() * mask).sum() / mask.sum()
        expected = args.distillation_weight * expected + (1 - args.distillation_weight) * rewards
    expected.backward()

    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, gradient in gradients(double).items():
        difference = (gradients(model)[name] - gradient).norm()
        assert difference <= 1e-4 * gradient.norm() + 1e-7, name


def test_distil_trainer_needs_no_switch_and_records_what_it_learns(tmp_path: Path, head_rows: list[int]) -> None:
    run = trl_runs.run(trl_runs.sdpo, tmp_path, trainer=DistILTrainer, config=DistILConfig, num_iterations=2)
    assert not head_rows
    assert {"distil/kl", "distil/abs_credit", "distil/entropy", "self_distillation/reward_mean"} <= run.logs[0].keys()


def test_the_example_of_the_readme_runs(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (example,) = (block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "DistILTrainer(" in block)
    changes = {
        "HuggingFaceTB/SmolLM2-135M-Instruct": str(tiny_model),
        "max_steps=50": "max_steps=2, use_cpu=True, bf16=False, report_to='none', logging_steps=1",
    }
    for known, shorter in changes.items():
        assert known in example
        example = example.replace(known, shorter)
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    assert capsys.readouterr().out.count("distil/kl") == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"credit_span": "sequence"}, "discount is 0.9"),
        ({"cost": "hinge"}, "cost is 'hinge'"),
        ({"distillation_alpha": 0.5}, "distillation_alpha is 0.5"),
        ({"use_teacher_server": True}, "use_teacher_server is True"),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_generations": 4}, "a multiple of"),
    ],
)
def test_distil_config_refuses(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        trl_runs.sdpo(tmp_path, DistILTrainer, DistILConfig, **options)


def test_a_second_switch_replaces_nothing_and_the_way_back_is_whole() -> None:
    before = [getattr(place.owner(), place.attribute) for place in switch.PLACES]
    first = apply_distil_kernels_to_trl()
    assert "trl.trainer.distillation_trainer._chunked_divergence_loss" in first.names
    assert len(first.names) == len(switch.PLACES)
    assert apply_distil_kernels_to_trl() is first
    first.restore()
    assert [getattr(place.owner(), place.attribute) for place in switch.PLACES] == before
    with apply_distil_kernels_to_trl() as second:
        assert second.names == tuple(f"{place.module}.{place.name}" for place in switch.PLACES)


@pytest.mark.parametrize("changed", ["renamed", "gone"])
def test_a_trl_that_is_not_known_is_refused_whole(changed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(self: Any, model: Any, batch: Any) -> None: ...

    if changed == "renamed":
        monkeypatch.setattr(GKDTrainer, "compute_loss", other)
    else:
        monkeypatch.delattr(sdpo_trainer, "compute_topk_self_distillation_loss")
    untouched = distillation_trainer._chunked_divergence_loss
    with pytest.raises(RuntimeError, match=r"1\.\d+.*(GKDTrainer.compute_loss takes|has no trl.*compute_topk)"):
        apply_distil_kernels_to_trl()
    assert distillation_trainer._chunked_divergence_loss is untouched


def squared(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A forward whose logits are no linear head of hidden states."""
    outputs = LINEAR(self, *args, **kwargs)
    outputs.logits = outputs.logits + 0.1 * outputs.logits.square()
    return outputs


LINEAR = LlamaForCausalLM.forward


class OtherDivergence(GKDTrainer):
    @staticmethod
    def generalized_jsd_loss(student_logits: Any, teacher_logits: Any, labels: Any = None, **_: Any) -> Any:
        return 2 * GKDTrainer.generalized_jsd_loss(student_logits, teacher_logits, labels)


@pytest.mark.parametrize("reason", ["a model that cannot be split", "a divergence of its own"])
def test_what_has_no_such_form_is_left_to_trl_and_said_once(
    reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head_rows: list[int]
) -> None:
    if reason == "a divergence of its own":
        make, options = trl_runs.gkd, {"trainer": OtherDivergence}
    else:
        make, options = trl_runs.sdpo, SDPO
        monkeypatch.setattr(LlamaForCausalLM, "forward", squared)
    monkeypatch.setattr(methods, "_said", set())
    expected = trl_runs.run(make, tmp_path / "before", **options)
    with apply_distil_kernels_to_trl(), pytest.warns(UserWarning, match=rf"\[trl\] \w+ has {reason}") as said:
        switched = trl_runs.run(make, tmp_path / "after", **options)
    assert len([warning for warning in said if "[trl]" in str(warning.message)]) == 1
    assert head_rows
    for after, before in zip(switched.logs, expected.logs, strict=True):
        assert after == pytest.approx(before, rel=1e-6)
