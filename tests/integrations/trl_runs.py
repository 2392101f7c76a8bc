"""Runs of TRL's trainers on tiny models, each a few steps, for comparison with and without the switch."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import architectures
import torch
from datasets import Dataset
from tiny import byte_tokenizer, llama_config
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.gold import GOLDConfig, GOLDTrainer
from trl.experimental.sdft import SDFTConfig, SDFTTrainer
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer
from trl.experimental.server_distillation import ServerDistillationConfig, ServerDistillationTrainer

STEPS = 3
PROMPTS = ["2+3=", "the sky is", "q", "10-4="]
COMMON = {
    "per_device_train_batch_size": 4, "max_steps": STEPS, "learning_rate": 0.05, "optim": "sgd",
    "lr_scheduler_type": "constant",
    "logging_steps": 1, "report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True,
    "dataloader_pin_memory": False, "gradient_checkpointing": False, "bf16": False,
}  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    """The byte tokenizer as GKD and GOLD want it."""
    bytes_and_end = byte_tokenizer()
    bytes_and_end.pad_token = bytes_and_end.eos_token
    return bytes_and_end


class Run(NamedTuple):
    """What a run of a trainer logged and learnt."""

    logs: list[dict[str, float]]
    parameters: dict[str, torch.Tensor]


def model(seed: int, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(llama_config(tie_word_embeddings=False, **changes))


def saved_model(folder: Path, seed: int = 0) -> str:
    """SDPO and SDFT read their teacher from the place that their model came from."""
    if not (folder / "config.json").exists():
        model(seed).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
    return str(folder)


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(text))) / 8 for text in completions]


def distillation(folder: Path, **options: Any) -> DistillationTrainer:
    options = {"max_completion_length": 6, **options}
    arguments = DistillationConfig(str(folder), **COMMON | options)
    data = Dataset.from_dict({"prompt": PROMPTS * 3})
    teacher = model(1, hidden_size=48)  # another width, the same vocabulary
    return DistillationTrainer(model(0), teacher, arguments, data, processing_class=tokenizer())


class Server:
    """A teacher as a client of TRL's gets it: log-probs of whole sequences in one request."""

    def __init__(self, **_: Any) -> None:
        self.teacher = model(1)

    @torch.no_grad()
    def get_sequence_logprobs(
        self, sequences: list[list[int]], prompt_lengths: list[int], top_logprobs: int, temperature: float
    ) -> dict[str, list[Any]]:
        answers: dict[str, list[Any]] = {"actual_logprobs": [], "logprobs": [], "logprob_token_ids": []}
        for ids, start in zip(sequences, prompt_lengths, strict=True):
            logits = self.teacher(torch.tensor([ids])).logits[0, start - 1 : -1]
            logprobs = (logits / temperature).log_softmax(-1)
            top = logprobs.topk(top_logprobs)
            answers["actual_logprobs"].append(logprobs.gather(-1, torch.tensor(ids[start:])[:, None]).tolist())
            answers["logprobs"].append(top.values.tolist())
            answers["logprob_token_ids"].append(top.indices.tolist())
        return answers


def served_distillation(folder: Path, **options: Any) -> ServerDistillationTrainer:
    options = {"max_completion_length": 6, "teacher_model_server_url": "http://nowhere", **options}
    arguments = ServerDistillationConfig(str(folder), **COMMON | options)
    return ServerDistillationTrainer(
        model(0), arguments, Dataset.from_dict({"prompt": PROMPTS * 3}), processing_class=tokenizer()
    )


def served_sdpo(folder: Path, **options: Any) -> SDPOTrainer:
    """SDPO as it is with `use_teacher_server`, which wants vLLM."""
    trainer = sdpo(folder, **options)
    trainer.use_teacher_server, trainer.teacher_client = True, Server()
    trainer.vllm_generation = SimpleNamespace(sync_weights=lambda: None)
    trainer._last_loaded_step = 0
    return trainer


def sdpo(folder: Path, trainer: type = SDPOTrainer, config: type = SDPOConfig, **options: Any) -> SDPOTrainer:
    extra = {key: options.pop(key) for key in ("peft_config",) if key in options}
    options = {
        "max_completion_length": 6, "num_generations": 2, "teacher_update_rate": 0.5, "success_reward_threshold": 0.1,
        "include_environment_feedback": True, "diagnostics_warning_interval": 0, **options,
    }  # fmt: skip
    arguments = config(str(folder), **COMMON | options)
    columns = {"prompt": PROMPTS * 3, "privileged_context": [f"say {text[::-1]}" for text in PROMPTS * 3]}
    return trainer(
        saved_model(folder.parent / "model"), reward, arguments, Dataset.from_dict(columns),
        processing_class=tokenizer(), **extra,
    )  # fmt: skip


def sdft(folder: Path, **options: Any) -> SDFTTrainer:
    options = {"max_completion_length": 6, "num_generations": 2, "num_loss_tokens_to_skip": 1, **options}
    arguments = SDFTConfig(str(folder), **COMMON | options)
    columns = {"prompt": PROMPTS * 3, "privileged_context": [f"say {text[::-1]}" for text in PROMPTS * 3]}
    return SDFTTrainer(
        saved_model(folder.parent / "model"), args=arguments, train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer(),
    )  # fmt: skip


def image_text_model(folder: Path, **options: Any) -> GKDTrainer:
    """GKD of the text of a model that could also read images, whose head has a softcap."""
    name = "Gemma3ForConditionalGeneration"
    student = architectures.tiny_model(name, architectures.architectures()[name], text_config={"pad_token_id": 0})
    return gkd(folder, student=student, **options)


def padded_heads(folder: Path, **options: Any) -> GKDTrainer:
    """GKD of models whose heads have ten rows that make no logits."""
    trainer = gkd(folder, **options)
    for each in (trainer.model, trainer.teacher_model):
        each.lm_head.register_forward_hook(lambda head, inputs, logits: logits[..., :250])
    return trainer


def _conversations() -> Dataset:
    turns = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1] + "!" * i}]
        for i, text in enumerate(PROMPTS)
    ]
    return Dataset.from_dict({"messages": turns * 3})


def gkd(folder: Path, trainer: type = GKDTrainer, student: Any = None, **options: Any) -> GKDTrainer:
    arguments = GKDConfig(str(folder), **COMMON | {"max_new_tokens": 6, "max_length": 64, **options})
    return trainer(
        model=student or model(0), teacher_model=model(1, hidden_size=48), args=arguments,
        train_dataset=_conversations(), eval_dataset=_conversations(), processing_class=tokenizer(),
    )  # fmt: skip


def gold(folder: Path, **options: Any) -> GOLDTrainer:
    arguments = GOLDConfig(str(folder), **COMMON | {"max_completion_length": 6, "max_length": 64, **options})
    return GOLDTrainer(
        model=model(0), teacher_model=model(1, hidden_size=48), args=arguments, train_dataset=_conversations(),
        processing_class=tokenizer(),
    )  # fmt: skip


def run(
    make: Callable[..., Any], folder: Path, prepare: Callable[[Any], Any] = lambda model: model, **options: Any
) -> Run:
    """Makes a trainer, prepares its model, trains it, and returns what it logged after each step, without times."""
    torch.manual_seed(3)
    trainer = make(folder, **options)
    prepare(trainer.model)
    trainer.train()
    logs = [
        {key: value for key, value in record.items() if not any(word in key for word in ("time", "epoch", "runtime"))}
        for record in trainer.state.log_history
        if "grad_norm" in record
    ]
    parameters = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    return Run(logs, parameters)
