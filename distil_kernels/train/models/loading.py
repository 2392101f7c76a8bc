"""Models by name or path with their tokenizers, and the weights of checkpoints."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import is_flash_attn_2_available
from transformers.utils.logging import disable_progress_bar

from distil_kernels.train.models import lora, smollm2
from distil_kernels.train.models.state import load_model_state


def load(
    name: str, option: str = "model", keeps_adapters: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Returns a model in float32 and evaluation mode, and its tokenizer.

    Evaluation mode has no dropout: the loss is that of the distribution that rollouts are sampled from.

    Args:
        name: directory, name on the hub, or `smollm2`; of a model, or of adapters of one.
        option: the option that gave the name, for error messages.
        keeps_adapters: adapters stay apart, to be trained on; else they are merged into the model.

    Raises:
        ValueError: the default model's package is missing, or transformers or peft cannot load `name`.
    """
    source = smollm2.converted_directory() if name == smollm2.NAME else name
    disable_progress_bar()
    try:
        base = lora.base_of(str(source))
        if base is not None:
            return _load_adapted(str(source), smollm2.found_again(base), option, keeps_adapters)
        if keeps_adapters:
            raise ValueError("expected a directory of adapters, with an adapter_config.json")
        is_local = Path(source).is_dir()
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=is_local)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, local_files_only=is_local)
    except Exception as error:  # of files that hold anything
        reason = " ".join(str(error).split()).removeprefix(f"[{option}] ")  # of the model that adapters are for
        reason = reason if len(reason) <= 300 else f"{reason[:300]}..."
        raise ValueError(f"[{option}] cannot load {name!r}: {reason}") from error
    return model.eval(), tokenizer


def _load_adapted(
    source: str, base: str, option: str, keeps_adapters: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Returns the model `base` with the adapters of `source`, and the tokenizer of `source` if it has one."""
    model, tokenizer = load(base, option)
    model = lora.with_adapters_of(source, model, keeps_adapters)
    with contextlib.suppress(OSError, ValueError):
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=Path(source).is_dir())
    return model, tokenizer


def restore(model: PreTrainedModel, path: Path) -> None:
    """Loads a checkpoint's weights into the model, or its adapters where the model has them."""
    if lora.has_adapters(model):
        lora.load_adapters(model, path)
    else:
        load_model_state(model, load(str(path))[0].state_dict())


def use_flash_attention(model: PreTrainedModel, device: torch.device, precision: str) -> None:
    """Switches attention to flash-attn where that is installed, on a GPU, for products in bfloat16.

    No GPU has run it yet.
    """
    is_available = getattr(model, "_supports_flash_attn", False) and is_flash_attn_2_available()
    if is_available and device.type == "cuda" and precision == "bf16":
        model.set_attn_implementation("flash_attention_2")


def check_positions(model: PreTrainedModel, max_prompt_tokens: int, max_completion_tokens: int) -> str:
    """Returns a note where prompt and completion may be longer than what a model was made for; empty where they fit.

    Raises:
        ValueError: they may pass the end of a learnt table of positions.
    """
    max_positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0
    if not 0 < max_positions < max_prompt_tokens + max_completion_tokens:
        return ""
    name, input_embeddings = type(model).__name__, model.get_input_embeddings()
    tables = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding) and m is not input_embeddings]
    # OPT's table has two more rows than positions.
    if not any(max_positions <= rows <= max_positions + 2 for rows in tables):
        return (
            f"prompts and completions may take {max_prompt_tokens + max_completion_tokens} tokens together, and {name} "
            f"was made for {max_positions} (max_position_embeddings): what comes after may be worse"
        )
    remaining = max_positions - max_completion_tokens
    if remaining < 2:
        raise ValueError(
            f"[max_new_tokens] {name} has {max_positions} positions: expected completions of at most "
            f"{max_positions - 2} tokens, observations or a critique included, got {max_completion_tokens}"
        )
    raise ValueError(
        f"[max_prompt_tokens] {name} has {max_positions} positions, of which completions may take "
        f"{max_completion_tokens}: expected at most {remaining}, got {max_prompt_tokens}"
    )


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the tokens that end an answer: the tokenizer's and those of the model's generation config."""
    eos_token_id = model.generation_config.eos_token_id
    ids = set(eos_token_id) if isinstance(eos_token_id, (list, tuple)) else {eos_token_id}
    return sorted((ids | {tokenizer.eos_token_id}) - {None})
