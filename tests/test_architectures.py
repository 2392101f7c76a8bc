"""`split` of every architecture of transformers: right logits, or a reason why not, as `architectures.txt` says; and of
models that read images."""

from __future__ import annotations

import warnings
from pathlib import Path

import architectures
import pytest
import torch
import transformers
from torch import nn
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from distil_kernels import fused_forward_ce
from distil_kernels.hf import split

RECORD = (Path(__file__).parent / "architectures.txt").read_text().splitlines()
VERSION = RECORD[0].split()[-1]
OUTCOMES = dict(line.split(": ", 1) for line in RECORD[1:])
IS_RECORDED = transformers.__version__ == VERSION
INSTALLED = architectures.architectures()


@pytest.mark.slow
@pytest.mark.parametrize("model_class", sorted(INSTALLED.keys() | OUTCOMES.keys()))
def test_logits_are_the_models_own_or_the_model_is_refused(model_class: str) -> None:
    """In another version of transformers than the recorded one, only wrong logits are a failure: the rest is said. So
    it is of models that were not built: a dependency may have come."""
    recorded = OUTCOMES.get(model_class, "not recorded")
    if model_class in INSTALLED:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of transformers, on configurations as small as these
            outcome = architectures.outcome(model_class, INSTALLED[model_class])
    else:
        outcome = "not in this version"
    assert not outcome.startswith("wrong")
    if outcome != recorded and (not IS_RECORDED or recorded.startswith("not built")):
        pytest.skip(f"transformers {transformers.__version__}: {outcome}; in {VERSION}: {recorded}")
    assert outcome == recorded


IMAGE = 200
PATCH = torch.linspace(-1.0, 1.0, 3 * 28 * 28)
IMAGES = {
    "Gemma3ForConditionalGeneration": (
        [7, 8, IMAGE, 9],
        {"pixel_values": PATCH.view(1, 3, 28, 28), "token_type_ids": torch.tensor([[0, 0, 1, 0]])},
        {"mm_tokens_per_image": 1},
    ),
    "Gemma4ForConditionalGeneration": (
        [7, 8, IMAGE, 9],
        {
            "pixel_values": PATCH.repeat(3)[: 9 * 588].view(1, 9, 588),
            "image_position_ids": torch.cartesian_prod(torch.arange(3), torch.arange(3))[None],
            "mm_token_type_ids": torch.tensor([[0, 0, 1, 0]]),
        },
        {},
    ),
    "Qwen2_5_VLForConditionalGeneration": (
        [7, 8, IMAGE, 9],
        {"pixel_values": PATCH.repeat(2).view(4, 1176), "image_grid_thw": torch.tensor([[1, 2, 2]])},
        {},
    ),
    "Llama4ForConditionalGeneration": ([7, 8, IMAGE, 9], {"pixel_values": PATCH.view(1, 3, 28, 28)}, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("model_class", IMAGES)
def test_images_are_read(model_class: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, images, changes = IMAGES[model_class]
    if model_class.startswith("Llama4"):  # transformers 5.24's own forward asks its text model's output for this
        monkeypatch.setattr(MoeCausalLMOutputWithPast, "image_outputs", None, raising=False)
    model = architectures.tiny_model(model_class, INSTALLED[model_class], image_token_id=IMAGE, **changes)
    for weight in model.parameters():
        if not weight.any():  # Gemma 3's projection begins with zeros
            nn.init.normal_(weight)
    parts, inputs = split(model), {"input_ids": torch.tensor([tokens]), **images}
    architectures.sharpen(parts)
    assert architectures.difference(parts, **inputs) < 1e-4
    hidden = parts.hidden(**inputs)
    assert not torch.allclose(hidden, parts.hidden(**{**inputs, "pixel_values": images["pixel_values"].flip(-1)}))
    fused_forward_ce(hidden, parts.weight, hidden.detach() + 1.0, parts.weight.detach()).backward()
    assert any(
        weight.grad is not None and weight.grad.any() for name, weight in model.named_parameters() if "vis" in name
    )
