"""Backward of an op that formed its gradients in the forward pass.

The gradients are scaled by the gradient of the loss. They have no derivative of their own: differentiating twice is an
error, as is forward-mode differentiation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from distil_kernels.engine import allocation


def scaled_gradients(ctx: Any, grad_loss: Tensor | None, *_: Tensor) -> tuple:
    """Returns the gradients of the op's inputs, from the saved ones and the gradient of the loss."""
    if grad_loss is None:
        return (None,) * ctx.num_inputs
    grad_hidden, grad_weight, grad_bias, anchor = ctx.saved_tensors
    formed = grad_hidden, grad_weight, grad_bias
    with torch.no_grad():
        if _is_traced() or _keeps_graph():
            gradients = scale_gradients(*formed, grad_loss, ctx.weight_dtype)
        else:
            gradients = _scale_in_place(*formed, grad_loss, ctx.weight_dtype)
    return input_gradients(differentiable_once(gradients, anchor, grad_loss), ctx.needs, ctx.num_inputs)


def input_gradients(gradients: tuple[Tensor, ...], needs: Sequence[bool], num_inputs: int) -> tuple:
    """Returns one entry per input of the op: the gradients of hidden states, weight and bias, then None."""
    needed = [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]
    return (*needed, *[None] * (num_inputs - len(needed)))


def anchor_of(*leaves: Tensor | None) -> Tensor:
    """Returns an empty tensor that autograd derives from the leaves, without their memory: what depends on it depends
    on them. (Slices and reshapes would take 150 microseconds, these views 20.)"""
    return torch.cat([leaf.as_strided((0,), (1,)) for leaf in leaves if leaf is not None])


def differentiable_once(gradients: tuple[Tensor, ...], anchor: Tensor | None, upstream: Tensor) -> tuple[Tensor, ...]:
    """Returns the gradients of an op's inputs so that their derivative, by anything, is an error.

    With create_graph=True they would else be constants, whose derivative is silently 0.
    """
    if anchor is None or not torch.is_grad_enabled():
        return gradients
    return _DifferentiableOnce.apply(anchor, upstream, *gradients)


class _DifferentiableOnce(torch.autograd.Function):
    """Returns all but the first two tensors as they are; the derivative of all is an error."""

    generate_vmap_rule = True

    @staticmethod
    def forward(anchor: Tensor, upstream: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError("[distil_kernels] the gradients of a fused loss have no derivative of their own")


def _is_traced() -> bool:
    """Returns whether torch.compile or a dispatch mode records the op: its outputs must then be new tensors."""
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode()


def _keeps_graph() -> bool:
    """Returns whether this backward may run again with the same saved tensors; True if torch cannot tell."""
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if keeps is None else keeps()


def _scale_in_place(
    grad_hidden: Tensor, grad_weight: Tensor, grad_bias: Tensor, scale: Tensor, weight_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Does the same as `scale_gradients` without a second dW: the saved tensors themselves become the gradients."""
    is_identity = scale.device.type == "cpu" and scale.item() == 1.0  # reading the scale would synchronise a GPU
    if grad_weight.dtype != weight_dtype:
        narrow = allocation.empty(*grad_weight.shape, like=grad_weight, dtype=weight_dtype)
        grad_weight = narrow.copy_(grad_weight) if is_identity else torch.mul(grad_weight, scale, out=narrow)
    elif not is_identity:
        grad_weight.mul_(scale)
    if not is_identity:
        grad_hidden.mul_(scale)
        grad_bias.mul_(scale)
    return grad_hidden, grad_weight, grad_bias


@torch.library.custom_op("distil_kernels::scale_gradients", mutates_args=())
def scale_gradients(
    grad_hidden: Tensor, grad_weight: Tensor, grad_bias: Tensor, scale: Tensor, weight_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns each gradient times a scalar [], in the dtype of its input, as new tensors: backward can run again."""
    return (
        torch.mul(grad_hidden, scale, out=torch.empty_like(grad_hidden)),
        torch.mul(grad_weight, scale, out=allocation.empty(*grad_weight.shape, like=grad_weight, dtype=weight_dtype)),
        grad_bias * scale,
    )


@scale_gradients.register_fake
def _(
    grad_hidden: Tensor, grad_weight: Tensor, grad_bias: Tensor, scale: Tensor, weight_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(grad_hidden),
        torch.empty_like(grad_weight, dtype=weight_dtype),
        torch.empty_like(grad_bias),
    )
