"""Hidden states and output head of a transformers causal language model, for losses that start from them.

    logits = softcap * tanh(scale * (hidden @ weight^T + bias) / softcap)

`split` finds the parts of any causal LM, and of models that read images beside text, by trying the model's own forward,
not by names in its configuration:

    head      `get_output_embeddings`; in PEFT's modules_to_save, the copy that is trained
    hidden    what the forward gives the head. Where a module takes all of the model's inputs and returns just that
              (`base_model`, `get_decoder()` or a child), it is the body. Elsewhere the body is the model up to its
              head: a transform lies between (BERT), or the model itself puts images between the text (Llama 4)
    scale,    what the forward makes of numbers from 1e-7 to 1e8 that stand in the place of the head's output: the ratio
    softcap   of the small ones, the bound of the large ones. What is not tanh between them is an error
    check     the model's logits of random states, from 0.01 to 100 in size, are those of the formula

This takes two or three forwards of eight tokens. What the formula cannot express is an error that says so, so an
unknown architecture cannot pass silently.

A head may be a DTensor (FSDP2, transformers' tensor parallelism): then all its processes split the model together.

Left out: adapters on the head, prompt tuning (it adds positions), several heads, encoder-decoder models, what a forward
does to logits only at later positions, only in training mode or only with images.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

NUM_TOKENS = 8
HEAD_OUTPUTS = (1e-7, 1.0, 10.0, 50.0, 200.0, 1e3, 1e4, 1e8)
"""Magnitudes of the numbers in place of the head's output, one for each token."""
STATES = (0.01, 0.1, 1.0, 1.0, 10.0, 10.0, 100.0, 100.0)
"""Sizes of the states in place of the body's, one for each token."""
LARGEST = 6e4
"""Logits are compared up to here: float16 has no larger ones."""
NOT_INPUTS = {
    "labels", "logits_to_keep", "num_logits_to_keep", "return_dict", "output_attentions", "output_hidden_states",
    "output_router_logits", "use_cache", "cache", "past_key_values", "cache_position",
}  # fmt: skip
"""Arguments of a model that its body need not take."""


@dataclass(frozen=True)
class CausalLM:
    """Body and head of a model: `hidden` runs the body, the fields are the head (V vocabulary, D hidden size).

    The ops take the last five as `student_weight`, `student_bias`, `vocab_size`, `student_logit_scale` and
    `logit_softcap`.
    """

    model: Any
    """The module that was split: a transformers or PEFT model."""
    body: Any
    """Everything below the head; its `last_hidden_state` is what the head takes."""
    weight: Tensor
    """[V, D], the model's own parameter."""
    bias: Tensor | None
    """[V], the model's own parameter."""
    vocab_size: int
    """Rows of the head that make logits; those after them are padding."""
    logit_scale: float
    logit_softcap: float
    """math.inf: none."""

    @property
    def vocab_group(self) -> Any:
        """The process group over which transformers' tensor parallelism has cut the head; None for any other head.

        The ops take it as `vocab_group`. Without it a head that is a DTensor is gathered for each call.
        """
        mesh = getattr(self.weight, "device_mesh", None)
        is_cut = mesh is not None and mesh.ndim == 1 and getattr(_without_peft(self.model), "tp_size", None) is not None
        return mesh.get_group() if mesh is not None and is_cut else None

    def hidden(self, input_ids: Tensor | None = None, cache: Any = None, **kwargs: Any) -> Tensor:
        """Returns hidden states [B, L, D], ready for `weight`; continues and fills a `cache`.

        `kwargs` go to the body: attention_mask, position_ids, inputs_embeds, and pixel_values and what else the
        model's processor gives.
        """
        return _first(self.body(input_ids=input_ids, **self.cached(cache), **kwargs))

    def cached(self, cache: Any) -> dict[str, Any]:
        """Returns the arguments for the model's cache; before transformers 5.24 its name was past_key_values."""
        known = inspect.signature(self.body.forward).parameters
        use = {"use_cache": cache is not None} if _takes(self.body.forward, "use_cache") else {}
        return use if cache is None else {**use, "cache" if "cache" in known else "past_key_values": cache}

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns logits [..., V] of hidden states [..., D], in plain torch: for checks, not for training."""
        group = self.vocab_group
        if group is None:
            weight = _gathered(self.weight)[: self.vocab_size].to(hidden.dtype)
            bias = None if self.bias is None else _gathered(self.bias)[: self.vocab_size].to(hidden.dtype)
            head_output = nn.functional.linear(hidden, weight, bias)
        else:
            head_output = self._gathered_output(hidden)[..., : self.vocab_size]
        return _transformed(head_output, self.logit_scale, self.logit_softcap)

    def _gathered_output(self, hidden: Tensor) -> Tensor:
        """Returns the head's output [..., rows] by a head in shards, each of which makes its part."""
        from torch.distributed.tensor import DTensor, Replicate  # late: few have a head in shards

        weight: Any = self.weight
        states = DTensor.from_local(hidden, weight.device_mesh, [Replicate()], run_check=False)
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        output: Any = nn.functional.linear(states, weight.to(hidden.dtype), bias)
        return output.full_tensor()


def _gathered(tensor: Tensor) -> Tensor:
    """Returns a parameter in one piece, which all processes that hold a part must ask for."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


class Headless:
    """A model whose head is shown no rows: the body of one that has more than a module below its head."""

    def __init__(self, model: Any, head: nn.Linear, forward: Callable[..., Any]) -> None:
        inner = _without_peft(model)
        self.config, self.forward = inner.config, inner.forward
        self._model_forward, self._head = forward, head

    def __call__(self, **kwargs: Any) -> _Output:
        caught: list[Tensor] = []

        def catch(head: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            caught.append(inputs[0])
            return (inputs[0][..., :0, :],)

        handle = self._head.register_forward_pre_hook(catch)
        try:
            self._model_forward(**kwargs)
        finally:
            handle.remove()
        if len(caught) != 1:
            raise ValueError(
                f"[hidden] a model of {type(self.config).__name__} called its head {len(caught)} times, expected once "
                "(hooks are not seen by a model that is compiled)"
            )
        return _Output(caught[0])


class _Output(NamedTuple):
    last_hidden_state: Tensor


def split(model: nn.Module, forward: Callable[..., Any] | None = None) -> CausalLM:
    """Splits a causal LM or an image-text model, bare or PEFT-wrapped, into body and head.

    Args:
        forward: what is called to read tokens; default the model, whose hooks gather sharded weights. Within a forward
            of a sharded model, where weights are whole, they would shard them again: `model.forward` has no hooks.

    Raises:
        ValueError: the model's logits are not a linear head of hidden states with scale and softcap.
    """
    inner = _without_peft(model)
    head = output_head(model)
    try:
        with _evaluating(model), torch.no_grad():
            read = partial(_read, forward or model, inner)
            transform = _probed_transform(read, head)
            body, states, logits = _probed_body(read, inner, head)
            if body is None:
                body = Headless(model, head, forward or model)
            parts = CausalLM(model, body, head.weight, head.bias, *transform)
            _check_logits(parts, states, logits)
    except _Refused as reason:
        raise ValueError(f"[split] {type(inner).__name__} {reason}") from reason.__cause__
    return parts


class _Refused(Exception):
    """A reason why a model cannot be split, as the rest of a sentence that begins with its class."""


def _without_peft(model: Any) -> Any:
    if not hasattr(model, "peft_config"):
        return model
    for name, adapter in model.peft_config.items():
        if getattr(adapter, "is_prompt_learning", False):
            raise ValueError(
                f"[split] adapter {name!r} is {adapter.peft_type}: it adds positions to the sequence, which "
                "is not supported (adapters inside the layers are, such as LoRA)"
            )
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def output_head(model: Any) -> nn.Linear:
    """Returns the linear layer that a model, bare or PEFT-wrapped, calls for its logits.

    Raises:
        ValueError: it is no plain linear layer.
    """
    inner = _without_peft(model)
    name, head = type(inner).__name__, inner.get_output_embeddings()
    if hasattr(head, "modules_to_save"):  # PEFT's wrapper: it calls the copy that is trained, or the original
        copies = [head.modules_to_save[each] for each in head.active_adapters if each in head.modules_to_save]
        head = copies[0] if copies and not head.disable_adapters else head.original_module
    if hasattr(head, "token_adapter"):
        raise ValueError(
            f"[split] the output head of {name} has trained rows (trainable_token_indices with tied embeddings), which "
            "is not supported: train all rows by modules_to_save, or untie the embeddings"
        )
    if hasattr(head, "base_layer"):
        raise ValueError(
            f"[split] the output head of {name} has an adapter ({type(head).__name__}), which is not supported: leave "
            "the head out of target_modules (modules_to_save trains all of it)"
        )
    if getattr(type(head), "forward", None) is not nn.Linear.forward:  # FSDP makes a subclass that has it
        raise ValueError(
            f"[split] the output head of {name} is {head and type(head).__name__}, expected a plain torch.nn.Linear "
            "from get_output_embeddings()"
        )
    return head


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """A context in which no module is in training mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _probed_transform(read: Callable[..., Tensor], head: nn.Linear) -> tuple[int, float, float]:
    """Returns vocabulary size, scale and softcap.

    The model reads tokens, and numbers of ours take the place of the head's output.
    """
    put: list[Tensor] = []

    def replace(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if put or output.shape[:-1] != (1, NUM_TOKENS):
            raise _Refused(
                f"has its head make {tuple(output.shape)} of {NUM_TOKENS} tokens, expected (1, {NUM_TOKENS}, "
                "vocabulary) once"
            )
        put.append(_numbers(output))
        return put[0]

    # Before hooks of others on the head: they belong to the forward.
    logits = read((partial(head.register_forward_hook, prepend=True), replace))
    if not put:
        raise _Refused("does not call its output head (hooks are not seen by a model that is compiled)")
    vocab_size = logits.shape[-1]
    if logits.shape != put[0][..., :vocab_size].shape:
        raise _Refused(f"makes logits {tuple(logits.shape)} of the {tuple(put[0].shape)} that its head gives")
    numbers, logits = put[0][0, :, :vocab_size], logits[0].to(put[0].dtype)
    scale = _rounded((logits[0] / numbers[0]).median())
    if not 0 < scale < math.inf:
        raise _Refused(f"multiplies its head's output by {scale}, expected a positive number")
    bound = _rounded(logits[-1].abs().median())
    softcap = bound if bound < 0.5 * scale * HEAD_OUTPUTS[-1] and bound < LARGEST else math.inf
    expected = _bounded(_transformed(numbers, scale, softcap))
    wrong = ~((_bounded(logits) - expected).abs() <= _tolerance(head.weight, 1e-5) * expected.abs()).all(0)
    if wrong.any():
        raise _Refused(
            f"does something to its head's output that is not scale and softcap, for {int(wrong.sum())} of "
            f"{len(wrong)} tokens (the first is {int(wrong.nonzero()[0])})"
        )
    return vocab_size, scale, softcap


def _numbers(like: Tensor) -> Tensor:
    """Returns numbers of all HEAD_OUTPUTS for each token of the vocabulary, which every precision has."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, like.shape, generator=generator) * 2 - 1
    numbers = signs * (1.0 + torch.rand(like.shape, generator=generator)) * torch.tensor(HEAD_OUTPUTS)[:, None]
    precise = torch.float32 if like.device.type == "mps" else torch.float64
    return numbers.to(torch.bfloat16).to(like.device, precise)


def _probed_body(read: Callable[..., Tensor], inner: Any, head: nn.Linear) -> tuple[Any, Tensor, Tensor]:
    """Returns the module that is the body, if one is, and states [1, L, D] with the logits that are made of them."""
    put: list[Tensor] = []
    got: list[Tensor] = []

    def replace_output(body: nn.Module, inputs: Any, output: Any) -> Any:
        put.append(_states(_first(output)))
        if isinstance(output, tuple):
            return (put[-1], *output[1:])
        output["last_hidden_state"] = put[-1]
        return output

    def replace_input(head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        put.append(_states(inputs[0]))
        return (put[-1], *inputs[1:])

    def catch_input(head: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        got.append(inputs[0])

    for body in _modules_below(inner):
        hooks = (body.register_forward_hook, replace_output), (head.register_forward_pre_hook, catch_input)
        logits = read(*hooks)
        if len(put) == len(got) == 1 and put[0].shape == got[0].shape and bool((put[0] == got[0]).all()):
            return body, put[0], logits
        put.clear()
        got.clear()
    logits = read((head.register_forward_pre_hook, replace_input))
    return None, put[0], logits


def _modules_below(inner: Any) -> Iterator[nn.Module]:
    """Yields the modules of the model that take all of its inputs."""
    inputs = _named_arguments(inner.forward) - NOT_INPUTS
    decoder = inner.get_decoder() if hasattr(inner, "get_decoder") else None
    for body in dict.fromkeys((inner.base_model, decoder, *inner.children())):
        if isinstance(body, nn.Module) and body is not inner and inputs <= _named_arguments(body.forward):
            yield body


def _states(like: Tensor) -> Tensor:
    """Returns random states of all sizes in STATES; `like` has NUM_TOKENS of them."""
    if like.shape[:-1] != (1, NUM_TOKENS):
        raise _Refused(f"makes hidden states {tuple(like.shape)} of {NUM_TOKENS} tokens")
    states = torch.randn(like.shape, generator=torch.Generator().manual_seed(1))
    return (states * torch.tensor(STATES)[:, None]).to(like)


def _read(forward: Callable[..., Any], inner: Any, *hooks: tuple[Callable[[Any], Any], Any]) -> Tensor:
    """Returns the logits [1, L, V] of NUM_TOKENS plain tokens, read with these hooks in place."""
    tokens = torch.tensor([_plain_tokens(inner.config)], device=next(inner.parameters()).device)
    options = {"use_cache": False} if _takes(inner.forward, "use_cache") else {}
    handles = [register(hook) for register, hook in hooks]
    try:
        logits: Tensor = forward(input_ids=tokens, **options).logits
        return logits
    except _Refused:
        raise
    except Exception as error:
        raise _Refused(f"cannot read {NUM_TOKENS} tokens alone: {type(error).__name__}: {error}") from error
    finally:
        for handle in handles:
            handle.remove()


def _plain_tokens(config: Any) -> list[int]:
    """Returns NUM_TOKENS ids that no configuration names: they stand for no image and no padding.

    A vocabulary of a few tokens has fewer, and they are repeated.
    """
    text = config.get_text_config(decoder=True)
    named = {value for each in (config, text) for value in vars(each).values() if type(value) is int}
    plain = [token for token in range(text.vocab_size) if token not in named][:NUM_TOKENS] or [0]
    return (plain * NUM_TOKENS)[:NUM_TOKENS]


def _transformed(head_output: Tensor, scale: float, softcap: float) -> Tensor:
    """Returns the logits that scale and softcap make of the head's output, both [..., V]."""
    logits = head_output if scale == 1.0 else head_output * scale
    return logits if math.isinf(softcap) else softcap * torch.tanh(logits / softcap)


def _check_logits(parts: CausalLM, states: Tensor, logits: Tensor) -> None:
    """Raises unless the parts make these logits [1, L, V] of these states [1, L, D]."""
    expected, ours = _bounded(logits.float()), _bounded(parts.logits(states).float())
    error = float(((ours - expected).abs().amax(-1) / expected.abs().amax(-1)).max())
    if not error <= _tolerance(parts.weight, 5e-3):
        raise _Refused(
            f"has logits that differ by {error:.1%} from those rebuilt from hidden states and head: its forward does "
            "something between them that is not scale, bias or softcap"
        )


def _tolerance(weight: Tensor, of_float32: float) -> float:
    """Returns the relative error that rounding explains (products in float32 may be in TF32)."""
    is_half = weight.element_size() < 4 or torch.is_autocast_enabled(weight.device.type)
    return 0.02 if is_half else of_float32


def _rounded(number: Tensor) -> float:
    """Returns twelve digits: 1.0 where float64 has come to its last but one."""
    return float(f"{float(number):.12g}")


def _bounded(logits: Tensor) -> Tensor:
    return logits.clamp(-LARGEST, LARGEST)


def _first(output: Any) -> Tensor:
    """Returns the hidden states of a body's output."""
    states: Tensor = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
    return states


def _named_arguments(forward: Any) -> set[str]:
    parameters = inspect.signature(forward).parameters.values()
    return {each.name for each in parameters if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)}


def _takes(forward: Any, name: str) -> bool:
    """Returns whether a forward has an argument of this name, or takes any."""
    parameters = inspect.signature(forward).parameters
    return name in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())
