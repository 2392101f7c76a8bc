"""Presets: the options of methods as this trainer understands their papers, each with where it is from.

What a preset does not name keeps the defaults, which are ours: the discounts, baselines, rates and clips of the papers
are not known to us.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from distil_kernels.train.config import as_text


class Setting(NamedTuple):
    """An option's value in a preset."""

    value: Any
    source: str
    """Where it is from."""


_DISTIL, _ADVISD = "DistIL, arXiv 2606.05152", "AdviSD, arXiv 2609.38142"
_SDPO = "SDPO's configuration"
_REVERSE_KL = "SDPO as DistIL's paper has it; SDPO's configuration has jsd, jsd_weight 0.5"
_SETTINGS: dict[str, dict[str, Setting]] = {
    "distil": {
        "objective": Setting("forward_ce", _DISTIL),
        "cost": Setting("ce", _DISTIL),
        "credit_span": Setting("future", _DISTIL),
        "teacher": Setting("frozen", "ours"),
    },
    "sdpo": {
        "objective": Setting("reverse_kl", _REVERSE_KL),
        "credit_span": Setting("none", _SDPO),
        "teacher": Setting("ema", _SDPO),
        "ema_rate": Setting(0.05, _SDPO),
        "importance_clip": Setting(2.0, _SDPO),
    },
    "opsd": {
        "objective": Setting("jsd", "OPSD, as DistIL's paper names it"),
        "jsd_weight": Setting(0.5, "OPSD's configuration"),
        "credit_span": Setting("none", "OPSD"),
        "teacher": Setting("frozen", "ours"),
    },
    "grpo": {
        "objective": Setting("policy_gradient", "GRPO, arXiv 2402.03300"),
        "teacher": Setting("live", "ours: a teacher that is not asked"),
    },
    "srpo": {
        "objective": Setting("reverse_kl", _REVERSE_KL),
        "credit_span": Setting("none", _SDPO),
        "teacher": Setting("ema", _SDPO),
        "ema_rate": Setting(0.05, _SDPO),
        "importance_clip": Setting(2.0, _SDPO),
        "distil_on": Setting("failed", "SRPO, arXiv 2604.02288: wrong rollouts to distillation"),
        "reward_on": Setting("succeeded", "SRPO: right ones to GRPO"),
        "reward_weight": Setting(1.0, "ours"),
    },
    "advisd": {
        "objective": Setting("forward_ce", "ours: the divergence is not known to us"),
        "credit_span": Setting("none", "ours"),
        "teacher": Setting("live", "ours"),
        "feedback": Setting("siblings", _ADVISD),
        "reward_weight": Setting(1.0, _ADVISD + ": GRPO with distillation beside it"),
        "distil_weight": Setting(0.3, _ADVISD),
        "distil_weight_end": Setting(0.05, _ADVISD),
        "distil_on": Setting("failed", "ours: how it selects is not known to us"),
        "reference_weight": Setting(0.001, _ADVISD),
    },
    "kd": {
        "rollouts": Setting("none", "distillation on a data set"),
        "rollouts_per_prompt": Setting(1, "distillation on a data set"),
        "feedback": Setting("none", "distillation on a data set"),
        "credit_span": Setting("none", "distillation on a data set"),
    },
}

PRESETS: dict[str, dict[str, Any]] = {
    preset: {name: setting.value for name, setting in settings.items()} for preset, settings in _SETTINGS.items()
}
"""The options of each preset."""


def preset_descriptions() -> str:
    """Returns the options of every preset with their sources, a line each."""
    lines = []
    for preset, settings in _SETTINGS.items():
        lines.append(f"  {preset}")
        lines += [f"    {f'{name} {as_text(each.value)}':<30}{each.source}" for name, each in settings.items()]
    return "\n".join(lines)
