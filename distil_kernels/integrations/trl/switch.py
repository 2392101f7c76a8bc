"""Puts our functions and methods in the places of TRL's, all or none, and takes them out again."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import warnings
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NamedTuple

from distil_kernels.integrations.trl import methods

KNOWN_VERSION = "1.16"
"""The TRL whose functions the table below was written from."""


class Place(NamedTuple):
    """A function or method of TRL that is replaced."""

    module: str
    name: str
    """`function` or `Class.method`."""
    parameters: str
    """The names of its parameters."""
    make: Callable[[Callable[..., Any]], Callable[..., Any]]
    """Makes what takes its place from what stands there."""

    def owner(self) -> Any:
        """Returns the module or class that holds it.

        Raises:
            AttributeError, ImportError: this TRL has none.
        """
        with warnings.catch_warnings():  # what is experimental says so where a user imports it
            warnings.simplefilter("ignore")
            module = importlib.import_module(self.module)
        *classes, _ = self.name.split(".")
        return getattr(module, classes[0]) if classes else module

    @property
    def attribute(self) -> str:
        return self.name.rsplit(".", 1)[-1]


def _functions(name: str) -> list[Place]:
    """The functions that SDPO's or SDFT's losses call, each of the two its own copy."""
    trainer, losses = f"trl.experimental.{name}.{name}_trainer", f"trl.experimental.{name}.loss_utils"
    pair = "student_logits, teacher_logits"
    return [
        Place(module, function, parameters, methods.dispatched)
        for module, function, parameters in (
            (trainer, "selective_log_softmax", "logits, index, temperature, row_mask"),
            (losses, "selective_log_softmax", "logits, index, temperature, row_mask"),
            (trainer, "compute_full_logit_self_distillation_loss", f"{pair}, distillation_alpha"),
            (
                trainer,
                "compute_topk_self_distillation_loss",
                f"{pair}, distillation_topk, distillation_alpha, distillation_add_tail",
            ),
        )
    ]


def _methods(name: str, trainer: str) -> list[Place]:
    """The methods of SDPO or SDFT."""
    module = f"trl.experimental.{name}.{name}_trainer"
    read = "self, model, input_ids, attention_mask, logits_to_keep"
    return [
        Place(module, f"{trainer}._forward_logits", read, methods.forward_logits),
        Place(module, f"{trainer}.compute_loss", COMPUTE_LOSS, methods.self_distillation),
    ]


COMPUTE_LOSS = "self, model, inputs, return_outputs, num_items_in_batch"
SDPO_FUNCTIONS = _functions("sdpo")
PLACES = [
    Place(
        "trl.trainer.distillation_trainer",
        "_chunked_divergence_loss",
        "student_hidden_states, teacher_hidden_states, student_lm_head_weight, teacher_lm_head_weight, "
        "completion_mask, beta, num_items_in_batch, student_lm_head_bias, teacher_lm_head_bias, student_logit_scale, "
        "teacher_logit_scale, student_final_logit_softcapping, teacher_final_logit_softcapping, temperature",
        methods.chunked_divergence_loss,
    ),
    Place(
        "trl.experimental.server_distillation.server_distillation_trainer",
        "ServerDistillationTrainer.compute_loss",
        COMPUTE_LOSS,
        methods.served_distillation,
    ),
    *SDPO_FUNCTIONS,
    *_methods("sdpo", "SDPOTrainer"),
    *_functions("sdft"),
    *_methods("sdft", "SDFTTrainer"),
    Place("trl.experimental.gkd.gkd_trainer", "GKDTrainer.compute_loss", COMPUTE_LOSS, methods.gkd_loss),
    Place("trl.experimental.gold.gold_trainer", "GOLDTrainer.compute_loss", COMPUTE_LOSS, methods.gold_loss),
]


class Replaced:
    """What stands in the places of TRL's; as a context manager it puts TRL's own back at the end."""

    def __init__(self, places: Sequence[Place]) -> None:
        owners = [_known_owner(place) for place in places]  # all, before the first is replaced
        self._originals: dict[str, tuple[Any, str, Any]] = {}
        for place, owner in zip(places, owners, strict=True):
            original = getattr(owner, place.attribute)
            self._originals[f"{place.module}.{place.name}"] = (owner, place.attribute, original)
            setattr(owner, place.attribute, place.make(original))

    @property
    def names(self) -> tuple[str, ...]:
        """The dotted names of the functions and methods."""
        return tuple(self._originals)

    def restore(self) -> None:
        """Puts TRL's own back. A second call does nothing."""
        for owner, attribute, original in reversed(self._originals.values()):
            setattr(owner, attribute, original)
        self._originals = {}

    def __enter__(self) -> Replaced:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()


def apply_distil_kernels_to_trl() -> Replaced:
    """Makes TRL's distillation trainers compute their losses from hidden states, for the remainder of the process.

    DistillationTrainer, ServerDistillationTrainer, SDPOTrainer, SDFTTrainer, GKDTrainer, GOLDTrainer and what derives
    from them keep their options, losses, metrics and gradients (to rounding), and form no logits [B, T, V] any more.
    What has no such form is left to TRL with a warning, once: a model whose logits are not a linear head of hidden
    states, GOLD with two vocabularies, metrics that a user computes from logits.

    Returns:
        What was replaced; its `restore()` puts TRL's own back. A second call while the first stands replaces nothing.

    Raises:
        RuntimeError: this TRL has other functions than the known ones. Nothing is replaced then.
    """
    global _applied
    if _applied is None or not _applied.names:
        _applied = Replaced(PLACES)
    return _applied


_applied: Replaced | None = None


def _known_owner(place: Place) -> Any:
    """Returns the module or class that holds a place, if what stands there takes the known parameters."""
    version = importlib.metadata.version("trl")
    try:
        owner = place.owner()
        parameters = ", ".join(inspect.signature(getattr(owner, place.attribute)).parameters)
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f"[trl] version {version} has no {place.module}.{place.name} ({error}): expected TRL {KNOWN_VERSION}"
        ) from error
    if parameters != place.parameters:
        raise RuntimeError(
            f"[trl] in version {version} {place.module}.{place.name} takes ({parameters}), expected "
            f"({place.parameters}) as in TRL {KNOWN_VERSION}"
        )
    return owner
