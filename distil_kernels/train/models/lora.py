"""LoRA adapters by peft: making them, and loading those of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from distil_kernels.train.models.state import load_model_state

ADAPTER = "default"
"""peft's name for the one adapter of a model."""


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
        raise ValueError("[lora_rank] peft is not installed: pip install peft") from error
    modules = targets if targets == "all-linear" else [name.strip() for name in targets.split(",")]
    options: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "target_modules": modules if targets else None}
    config = LoraConfig(task_type="CAUSAL_LM", **options)
    try:
        adapted: Any = get_peft_model(model, config)
    except ValueError as error:
        raise ValueError(f"[lora_targets] {targets!r}: {error}") from error
    return adapted.eval()


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
