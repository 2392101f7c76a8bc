"""The processes of a run: each one takes its share of every step's problems.

    share of the problems  ->  rollouts, loss / rollouts of the whole batch  ->  gradients summed over processes
                           ->  equal steps

DistributedDataParallel does not fit: it sums in hooks that its own forward arms, and here the body runs several times
per step (prompts, then completions) while the head's weight goes into the loss without any forward of the model. So
the gradients are summed after the last backward, in buckets of BUCKET numbers (or one larger parameter), which is the
extra memory. All processes then hold the same bits, and take the same step without sending weights.

With one process every method returns what it was given. Every process holds the whole model, or with --shard a share of
it (`models.sharding`), whose gradients FSDP sums.

Left out: summing while the backward still runs, where the model is not sharded; accelerate's own ways of sharding
(FSDP, DeepSpeed) are refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distil_kernels.train.config import Config

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
    count: int = 1

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
        if config.prompts_per_step < count:
            raise ValueError(
                f"[prompts_per_step] expected one for each of {count} processes, got {config.prompts_per_step}"
            )
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
        return Processes(accelerator.process_index, count)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.index == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Returns this process's part of a list that all have. The parts are in order; lengths differ by 1 at most."""
        return items[len(items) * self.index // self.count : len(items) * (self.index + 1) // self.count]

    def seed(self, *seeds: int) -> int:
        """Returns another seed in every process; in the main one a single seed stays as it is."""
        if self.is_main and len(seeds) == 1:
            return seeds[0]
        return int(numpy.random.SeedSequence((*seeds, self.index)).generate_state(1)[0])

    def gather(self, items: Sequence[T]) -> list[T]:
        """Returns the items of all processes, in their order. They are pickled: no tensors of a device."""
        return gather_object(list(items)) if self.count > 1 else list(items)

    def from_main(self, value: T) -> T:
        """Returns the value that the main process has."""
        return broadcast_object_list([value])[0] if self.count > 1 else value

    def any(self, flag: bool) -> bool:
        """Returns whether the flag is true in at least one process."""
        return any(self.gather([flag]))

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """A context that all processes leave by an exception where one of them does; in it they do not talk.

        Raises:
            FailedTogether: in all processes, where there are several; in the one that failed with the cause.
        """
        if self.count == 1:
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
        for index, failure in enumerate(self.gather([reason])):
            if failure is not None:
                raise FailedTogether(f"{failure} (in process {index})") from cause

    def sum(self, tensor: Tensor) -> None:
        """Adds the tensors of the other processes to this one's, in place."""
        if self.count > 1:
            dist.all_reduce(tensor)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replaces the gradients by their sums over all processes.

        Where a process has no gradient of a parameter it adds 0. Gradients of sharded parameters are sums already.
        """
        parameters = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
        if self.count == 1 or not parameters:
            return
        bucket: list[Tensor] = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if bucket and sum(map(torch.numel, bucket)) + parameter.numel() > BUCKET:
                self._sum_bucket(bucket)
                bucket = []
            bucket.append(parameter.grad)
        self._sum_bucket(bucket)

    def _sum_bucket(self, bucket: Sequence[Tensor]) -> None:
        flat = torch.cat([grad.flatten() for grad in bucket])
        dist.all_reduce(flat)
        for grad, total in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
            grad.copy_(total.view_as(grad))


ALONE = Processes()
