"""TRL's distillation trainers without logits of all tokens, and DistIL's sequence-level gradient among them.

    from distil_kernels.integrations.trl import apply_distil_kernels_to_trl
    apply_distil_kernels_to_trl()       # then TRL's DistillationTrainer, SDPO, SDFT, GKD and GOLD as ever

    from distil_kernels.integrations.trl import DistILConfig, DistILTrainer      # SDPO with DistIL's loss

unformed_logits.py   logits that stand as hidden states and head, and the losses that TRL computes from logits
methods.py           methods of TRL's trainers that read a model's body and leave its head to the loss
switch.py            puts them in the places of TRL's, and back
distil_trainer.py    DistILTrainer

Needs `pip install 'distil-kernels[trl]'`.
"""

from importlib.util import find_spec
from typing import Any

if find_spec("trl") is None:
    raise ImportError("[trl] the package trl is not installed: pip install 'distil-kernels[trl]'", name="trl")

from distil_kernels.integrations.trl.switch import Replaced, apply_distil_kernels_to_trl

__all__ = ["DistILConfig", "DistILTrainer", "Replaced", "apply_distil_kernels_to_trl"]


def __getattr__(name: str) -> Any:
    """Imports the trainer when it is asked for: it imports TRL's SDPO."""
    if name in ("DistILConfig", "DistILTrainer"):
        from distil_kernels.integrations.trl import distil_trainer

        return getattr(distil_trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
