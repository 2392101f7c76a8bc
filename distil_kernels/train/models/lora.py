"""LoRA adapters by peft: making them, and loading those of a checkpoint or of anybody's directory."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from distil_kernels.train.models.state import load_model_state

ADAPTER = "default"
"""peft's name for the one adapter of a model."""
NOT_INSTALLED = "peft is not installed: pip install peft"


def with_adapters(model: PreTrainedModel, rank: int, alpha: float, targets: str) -> PreTrainedModel:
    """Returns the model with LoRA adapters, which alone need gradients; at the start they change nothing.

    Args:
        targets: "all-linear" (never the head), names between commas, or "" for peft's choice for the architecture.

    Raises:
        ValueError: peft is not installed, or finds no such modules.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError(f"[lora_rank] {NOT_INSTALLED}") from error
    modules = targets if targets == "all-linear" else [name.strip() for name in targets.split(",")]
    options: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "target_modules": modules if targets else None}
    config = LoraConfig(task_type="CAUSAL_LM", **options)
    try:
        adapted: Any = get_peft_model(model, config)
    except ValueError as error:
        raise ValueError(f"[lora_targets] {targets!r}: {error}") from error
    return adapted.eval()


def base_of(source: str) -> str | None:
    """Returns the model that the adapters of a directory, or of a repository on the hub, are for; None where there are
    no adapters.

    Raises:
        ValueError: there is a whole model beside them, or their model is not named.
    """
    path = find_adapter_config_file(source)
    if path is None:
        return None
    if Path(path).with_name("config.json").exists():
        raise ValueError("it has both a config.json and an adapter_config.json, expected a model or adapters of one")
    base = json.loads(Path(path).read_text()).get("base_model_name_or_path")
    if not base:
        raise ValueError("its adapter_config.json names no base_model_name_or_path")
    return str(base)


def with_adapters_of(source: str, model: PreTrainedModel, keeps_adapters: bool) -> PreTrainedModel:
    """Returns the model with adapters by peft: merged into its weights, or apart, to be trained on.

    Raises:
        ValueError: peft cannot merge adapters of their kind, or they are no plain LoRA and should be trained on.
    """
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise ValueError(NOT_INSTALLED) from error
    if keeps_adapters:
        _check_plain(PeftConfig.from_pretrained(source))
    try:
        adapted: Any = PeftModel.from_pretrained(model, source, is_trainable=keeps_adapters)
    except (RuntimeError, KeyError) as error:  # of other shapes, say
        raise ValueError(f"its adapters do not fit {model.name_or_path}: {' '.join(str(error).split())}") from error
    if keeps_adapters:
        return adapted.eval()
    if not hasattr(adapted.base_model, "merge_and_unload"):
        raise ValueError(f"peft merges no adapters of kind {adapted.peft_config[ADAPTER].peft_type.value}")
    merged = adapted.merge_and_unload()
    # Adapters that this model is given later are for it, and not for the model without these.
    merged.name_or_path = merged.config.name_or_path = os.path.abspath(source) if os.path.exists(source) else source
    return merged.eval().requires_grad_(True)


def _check_plain(config: Any) -> None:
    """Raises ValueError where adapters have more than the two matrices that are trained, saved and loaded here."""
    more = [name for name in ("modules_to_save", "use_dora", "trainable_token_indices") if getattr(config, name, None)]
    more += [f"bias {config.bias}"] if getattr(config, "bias", "none") != "none" else []
    if config.peft_type.value != "LORA" or more:
        kind = ", ".join([config.peft_type.value, *more])
        raise ValueError(f"lora_continue trains plain LoRA adapters, got {kind}: merge them instead")


def has_adapters(model: PreTrainedModel) -> bool:
    """Returns whether peft has put adapters on the model."""
    return hasattr(model, "peft_config")


def load_adapters(model: PreTrainedModel, path: Path) -> None:
    """Replaces the model's adapters by those of a checkpoint."""
    from peft import load_peft_weights

    # peft saves names without the adapter's; its own loading knows no shards.
    names = {name.replace(f".{ADAPTER}", ""): name for name in model.state_dict()}
    weights = load_peft_weights(str(path), device="cpu")
    load_model_state(model, {names[name]: weight for name, weight in weights.items()}, strict=False)
