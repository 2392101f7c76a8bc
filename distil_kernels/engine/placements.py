"""Heads and hidden states that live on many devices, as the tensors of one process.

`on_many_devices` wraps every public op. Where neither a `vocab_group` nor a DTensor is given it calls the op as it is.
Else it

    - turns DTensors into the tensors of this process. A head that is `Shard(0)` on a mesh dimension on which the hidden
      states are `Replicate` is a shard of the vocabulary (`vocab_shards`). On other dimensions a head is gathered for
      the call, and its gradient returns in the placement it came in: summed over the rows of all processes where the
      hidden states are a DTensor, averaged, as FSDP2 averages gradients, where they are a plain tensor, which holds the
      rows of this process.
    - gathers hidden states of which each process has its own rows (`sequence_parallel`), so that dh comes back by a
      reduce-scatter.
    - has an error of one process raise an error in every process of the group.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch
from torch import Tensor

from distil_kernels.engine import vocab_shards
from distil_kernels.engine.vocab_shards import exchanged, fails_together, process_group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Placement

Function = TypeVar("Function", bound=Callable[..., Any])

_HEADS = ("student_weight", "student_bias", "teacher_weight", "teacher_bias")
_HIDDEN = ("student_hidden", "teacher_hidden")


def on_many_devices(function: Function) -> Function:
    """Lets an op take DTensors, and its options `vocab_group` and `sequence_parallel`."""
    parameters = inspect.signature(function).parameters.values()
    positional = [parameter.name for parameter in parameters if parameter.kind == parameter.POSITIONAL_OR_KEYWORD]

    @functools.wraps(function)
    def op(*tensors: Any, **options: Any) -> Any:
        if options.get("vocab_group") is None and not any(map(_is_dtensor, (*tensors, *options.values()))):
            return function(*tensors, **options)
        arguments = dict(zip(positional, tensors, strict=False)) | options
        if len(tensors) > len(positional) or len(arguments) < len(tensors) + len(options):
            return function(*tensors, **options)  # which raises the error that Python has for it
        arguments = _Placements(function.__name__, arguments).of_this_process()
        group = arguments.get("vocab_group")
        if group is None:
            return function(**arguments)
        if not isinstance(group, torch.distributed.ProcessGroup):
            raise TypeError(
                f"[{function.__name__}] vocab_group is {type(group).__name__}, expected a process group of "
                "torch.distributed"
            )

        def call() -> Any:
            if arguments.get("sequence_parallel"):
                arguments.update(_with_all_rows(arguments, group))
            return function(**arguments)

        hidden = arguments.get("student_hidden")
        if torch.compiler.is_compiling():
            return call()
        return fails_together(call, group, hidden.device if isinstance(hidden, Tensor) else torch.device("cpu"))

    return op  # type: ignore[return-value]


def _is_dtensor(value: Any) -> bool:
    return isinstance(value, Tensor) and hasattr(value, "device_mesh")


class _Placements:
    """The arguments of a call, some of which are DTensors."""

    def __init__(self, function: str, arguments: dict[str, Any]) -> None:
        self._function, self._arguments = function, arguments
        hidden = arguments.get("student_hidden")
        self._hidden = hidden if _is_dtensor(hidden) else None

    def of_this_process(self) -> dict[str, Any]:
        """Returns the arguments with tensors of this process, and `vocab_group` where a mesh dimension has shards."""
        head: Any = self._arguments.get("student_weight")
        dimension = self._vocab_dimension(head) if _is_dtensor(head) else None
        local: dict[str, Any] = {}
        for name, value in self._arguments.items():
            if not _is_dtensor(value):
                local[name] = value
            elif name in _HEADS:
                local[name] = self._head(name, value, None if dimension is None else head.device_mesh, dimension)
            else:
                local[name] = self._rows(name, value)
        if dimension is not None:
            local["vocab_group"] = head.device_mesh.get_group(dimension)
        return local

    def _vocab_dimension(self, head: Any) -> int | None:
        """Returns the mesh dimension over which the student's head is cut into shards of the vocabulary."""
        group = self._arguments.get("vocab_group")
        for dimension, placement in reversed(list(enumerate(head.placements))):
            if group is not None:
                if head.device_mesh.get_group(dimension).group_name != group.group_name:
                    continue
                if not placement.is_shard(0):
                    self._refuse("student_weight", head, "Shard(0) on the mesh dimension of vocab_group")
                return dimension
            if self._hidden is None or self._hidden.device_mesh != head.device_mesh:
                continue
            if placement.is_shard(0) and self._hidden.placements[dimension].is_replicate():
                return dimension
        if group is not None:
            self._refuse("student_weight", head, "a mesh with the processes of vocab_group as one of its dimensions")
        return None

    def _head(self, name: str, head: Any, mesh: DeviceMesh | None, dimension: int | None) -> Tensor:
        """Returns a head's rows for this process: its shard on one mesh dimension, whole on the others."""
        from torch.distributed.tensor import Partial, Replicate, Shard

        placements: list[Placement] = []
        gradients: list[Placement] = []
        for place, placement in enumerate(head.placements):
            is_shard = place == dimension and head.device_mesh == mesh and placement.is_shard(0)
            if placement.is_partial():
                self._refuse(name, head, "no Partial")
            placements.append(Shard(0) if is_shard else Replicate())
            if is_shard:
                gradients.append(Shard(0))
            elif self._hidden is None or not self._hidden.placements[place].is_replicate():
                gradients.append(Partial())
            else:
                gradients.append(Replicate())
        local = head.redistribute(placements=placements).to_local(grad_placements=gradients)
        if self._hidden is None and local.requires_grad:
            sizes = [size for size, each in zip(head.device_mesh.shape, gradients, strict=True) if each.is_partial()]
            return _Averaged.apply(local, 1.0 / torch.Size(sizes).numel())
        return local

    def _rows(self, name: str, value: Any) -> Tensor:
        """Returns the rows of this process."""
        if self._hidden is None:
            self._refuse(name, value, "a plain tensor, or a DTensor with student_hidden")
        for place, placement in enumerate(value.placements):
            same = self._hidden.device_mesh == value.device_mesh and placement == self._hidden.placements[place]
            if not same or not (placement.is_replicate() or placement.is_shard(0)):
                self._refuse(name, value, "Replicate or Shard(0) on every dimension, as student_hidden")
        return value.to_local()

    def _refuse(self, name: str, value: Any, expected: str) -> NoReturn:
        raise ValueError(f"[{self._function}] {name} is a DTensor {list(value.placements)}, expected {expected}")


class _Averaged(torch.autograd.Function):
    """Returns a tensor whose gradient is scaled."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient * ctx.scale, None


def _with_all_rows(arguments: dict[str, Any], group: ProcessGroup) -> dict[str, Tensor]:
    """Returns the hidden states of all processes, for those given that hold rows."""
    hidden = {name: arguments[name] for name in _HIDDEN if isinstance(arguments.get(name), Tensor)}
    return {
        name: gather_rows(tensor, group.group_name, group.size(), name)
        for name, tensor in hidden.items()
        if tensor.dim() > 1
    }


@torch.library.custom_op("distil_kernels::gather_rows", mutates_args=())
def gather_rows(rows: Tensor, group_name: str, num_processes: int, name: str) -> Tensor:
    """Concatenates the rows [R, ...] of all processes; the gradient of a process's own rows is a slice."""
    group = process_group(group_name)
    exchanged(group, {f"the shape or dtype of {name}": rows}, ())
    return all_gathered(rows, group)


def all_gathered(rows: Tensor, group: ProcessGroup) -> Tensor:
    """Returns the rows of all processes, as many of each, one after the other."""
    whole = rows.new_empty(group.size() * rows.shape[0], *rows.shape[1:])
    vocab_shards.all_gather(whole, rows.contiguous(), group)
    return whole


@gather_rows.register_fake
def _(rows: Tensor, group_name: str, num_processes: int, name: str) -> Tensor:
    return rows.new_empty(num_processes * rows.shape[0], *rows.shape[1:])


def _gather_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    rows, ctx.group_name, *_ = inputs
    ctx.num_rows = rows.shape[0]


def _gather_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    begin = process_group(ctx.group_name).rank() * ctx.num_rows
    return gradient[begin : begin + ctx.num_rows], None, None, None


gather_rows.register_autograd(_gather_backward, setup_context=_gather_context)
