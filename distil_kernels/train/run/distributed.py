"""The processes of a run: each one takes its share of every step's problems.

    share of the problems  ->  rollouts, loss / rollouts of the whole batch  ->  gradients summed over processes
                           ->  equal steps

DistributedDataParallel does not fit: it sums in hooks that its own forward arms, and here the body runs several times
per step (prompts, then completions) while the head's weight goes into the loss without any forward of the model. So
the gradients are summed after the last backward, in buckets of BUCKET numbers (or one larger parameter), which is the
extra memory. All processes then hold the same bits, and take the same step without sending weights.

With one process every method returns what it was given. Every process holds the whole model, or with --shard a share of
it (`models.sharding`), whose gradients FSDP sums. With --tensor_parallel P the processes are a mesh of shares of the
batch x P members that hold one model together (`models.tensor_parallel`). Those members do the same with the same
numbers: what could differ between them (a judge's verdict, a signal) is decided by the first (`once`).

Left out: summing while the backward still runs, where the model is not sharded; accelerate's own ways of sharding
(FSDP, DeepSpeed) are refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from distil_kernels.train.config import Config
from distil_kernels.train.models.sharding import local_shard

T = TypeVar("T")

BUCKET = 1 << 25
"""Numbers in a bucket of gradients."""
SHARDED = {DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM}


class FailedTogether(RuntimeError):
    """An error of one process, raised in all of them at the same place."""


@dataclass(frozen=True)
class Processes:
    """This process and the others. A method that talks to them must be called by all of them, in the same order."""

    index: int = 0
    """Of this process's share of a batch."""
    count: int = 1
    """Shares of a batch."""
    mesh: DeviceMesh | None = None
    """[count, members] where several members hold a model together; None where each process is alone with it."""

    @staticmethod
    def of(accelerator: Accelerator, config: Config) -> Processes:
        """Returns the processes that accelerate knows.

        Raises:
            ValueError: accelerate shards the model, or does not know all processes that were started; or the batch
                cannot be shared out among them.
        """
        kind, count = accelerator.distributed_type, accelerator.num_processes
        if kind in SHARDED:
            raise ValueError(
                f"[accelerate] expected the whole model in every process, got {kind.value}: --shard shares it out"
            )
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started != count:
            raise ValueError(f"[accelerate] expected the {started} processes that were started, got {count}")
        members, mesh = config.tensor_parallel, None
        if count % members:
            raise ValueError(f"[tensor_parallel] expected a divisor of the {count} processes of the run, got {members}")
        count //= members
        if config.prompts_per_step < count:
            of = "processes" if members == 1 else f"groups of {members} processes"
            raise ValueError(f"[prompts_per_step] expected one for each of {count} {of}, got {config.prompts_per_step}")
        if config.shard and config.prompts_per_step % count:
            raise ValueError(
                f"[prompts_per_step] with shard all processes take as many: expected a multiple of {count}, got "
                f"{config.prompts_per_step}"
            )
        if config.baseline == "position_mean" and count > 1:
            raise ValueError(
                "[baseline] position_mean compares the whole batch, of which a process has its share: expected another "
                f"with {count} processes"
            )
        if members > 1:
            mesh = init_device_mesh(accelerator.device.type, (count, members), mesh_dim_names=("data", "tensor"))
        return Processes(accelerator.process_index // members, count, mesh)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.index == 0 and self.member == 0

    @property
    def are_several(self) -> bool:
        """Whether the run has more than this process."""
        return self.count * self.num_members > 1

    @property
    def num_members(self) -> int:
        """Processes that hold one model together."""
        return 1 if self.mesh is None else self.mesh.size(1)

    @property
    def member(self) -> int:
        """The place of this process among them."""
        return 0 if self.mesh is None else self.mesh.get_local_rank("tensor")

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Returns this process's part of a list that all have. The parts are in order; lengths differ by 1 at most."""
        return items[len(items) * self.index // self.count : len(items) * (self.index + 1) // self.count]

    def seed(self, *seeds: int) -> int:
        """Returns another seed for every share of a batch; for the first one a single seed stays as it is."""
        if self.index == 0 and len(seeds) == 1:
            return seeds[0]
        return int(numpy.random.SeedSequence((*seeds, self.index)).generate_state(1)[0])

    def gather(self, items: Sequence[T]) -> list[T]:
        """Returns the items of all shares of a batch, in their order. They are pickled: no tensors of a device."""
        if self.count == 1:
            return list(items)
        return [item for part in self._of_each(list(items))[:: self.num_members] for item in part]

    def from_main(self, value: T) -> T:
        """Returns the value that the main process has."""
        return broadcast_object_list([value])[0] if self.are_several else value

    def any(self, flag: bool) -> bool:
        """Returns whether the flag is true in at least one process."""
        return any(self._of_each(flag))

    def once(self, function: Callable[[], T]) -> T:
        """Returns what the function returns in the first of the members that hold a model together.

        It is not called in the others, and they do not talk in it. Its error is raised in all of them.
        """
        if self.mesh is None:
            return function()
        answer: list[tuple[T | None, Exception | None]] = [(None, None)]
        if self.member == 0:
            try:
                answer = [(function(), None)]
            except Exception as error:
                answer = [(None, error)]
        dist.broadcast_object_list(answer, group=self.mesh.get_group("tensor"), group_src=0)
        result, failure = answer[0]
        if failure is not None:
            raise failure
        return result  # type: ignore[return-value]

    def _of_each(self, value: T) -> list[T]:
        """Returns the value of each process."""
        return gather_object([value]) if self.are_several else [value]

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """A context that all processes leave by an exception where one of them does; in it they do not talk, but for
        members that hold a model together.

        Raises:
            FailedTogether: in all processes, where there are several; in the one that failed with the cause.
        """
        if not self.are_several:
            yield
            return
        cause = None
        try:
            yield
        except Exception as error:
            cause = error
        reason = None
        if cause is not None:  # a tag in brackets says that it is no fault of the code
            reason = str(cause) if str(cause).startswith("[") else f"{type(cause).__name__}: {cause}"
        for index, failure in enumerate(self._of_each(reason)):
            if failure is not None:
                raise FailedTogether(f"{failure} (in process {index})") from cause

    def sum(self, tensor: Tensor) -> None:
        """Adds the tensors of the other shares of a batch to this one's, in place."""
        if self.count > 1:
            dist.all_reduce(tensor, group=None if self.mesh is None else self.mesh.get_group("data"))

    def sum_of_members(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replaces gradients of which each member has a part by their sums."""
        for parameter in parameters:
            assert self.mesh is not None
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad, group=self.mesh.get_group("tensor"))

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replaces the gradients by their sums over all shares of a batch.

        Where a process has no gradient of a parameter it adds 0. Gradients that FSDP shards are sums already.
        """
        if self.mesh is None:
            parameters = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
        if self.count == 1 or not parameters:
            return
        bucket: list[Tensor] = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            grad = local_shard(parameter.grad)
            if bucket and sum(map(torch.numel, bucket)) + grad.numel() > BUCKET:
                self._sum_bucket(bucket)
                bucket = []
            bucket.append(grad)
        self._sum_bucket(bucket)

    def _sum_bucket(self, bucket: Sequence[Tensor]) -> None:
        flat = torch.cat([grad.flatten() for grad in bucket])
        self.sum(flat)
        for grad, total in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
            grad.copy_(total.view_as(grad))


ALONE = Processes()
