"""What the trainer asks of a teacher, and the two forms of its answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from distil_kernels.train.rollouts.packed_batch import PackedBatch
from distil_kernels.train.rollouts.prompt_group import Rollout
from distil_kernels.train.rollouts.sampling import Ends, Sampling


class HiddenTarget(NamedTuple):
    """The teacher's distribution at N tokens, as hidden states and the head that makes logits of them."""

    states: Tensor
    """[N, teacher's D]."""
    weight: Tensor | None
    """[V, teacher's D]; None if teacher and student share a head."""
    bias: Tensor | None
    """[V]."""
    logit_scale: float = 1.0
    logit_softcap: float = math.inf
    """math.inf: none."""


class TopKTarget(NamedTuple):
    """The teacher's distribution at N tokens, as the log-probs of its K likeliest tokens."""

    ids: Tensor
    """[N, K] int64, likeliest first; -1 where fewer tokens are known."""
    logprobs: Tensor
    """[N, K] float32."""
    unmapped: Tensor
    """[N] float32, the probability of tokens that the teacher named and the student does not have."""

    @property
    def tail(self) -> Tensor:
        """[N], the probability of all tokens that `ids` does not name."""
        return (1.0 - self.logprobs.exp().sum(1)).clamp(min=0.0)


Target = HiddenTarget | TopKTarget


class Teacher(Protocol):
    """A model that has read the feedback: `InProcessTeacher` in this process, `RemoteTeacher` behind an endpoint,
    `StoredTeacher` in files."""

    @property
    def moves(self) -> bool:
        """Tells if the answers change with each update of the student."""

    @property
    def answers(self) -> bool:
        """Tells if it can answer a prompt: generate is for those that can."""

    def opened(self) -> AbstractContextManager[None]:
        """A context in which this process has all weights. With sharded models all processes enter it together."""

    def head_opened(self) -> AbstractContextManager[None]:
        """A context in which the head of a `HiddenTarget` has its values; all processes enter it together."""

    def target(self, batch: PackedBatch) -> Target:
        """The teacher's distribution at each token of a batch; anything where a token does not learn."""

    def generate(
        self, prompts: Sequence[list[int]], prompt_index: Sequence[int], sampling: Sampling, ends: Ends | None = None
    ) -> list[Rollout]:
        """Completions that the teacher samples; arguments as of `sampling.generate`."""

    def follow(self) -> None:
        """Moves a teacher that averages the student, after an optimizer step."""

    def state_dict(self) -> dict[str, Any]:
        """The state that start model and student do not determine."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
