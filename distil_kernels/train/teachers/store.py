"""What a teacher says of given sequences, in files: a store that is written once and read by many runs.

    STORE/index.json                what the store was made of, and its shards with their sizes and checksums
          shard-00000.safetensors   keys [S, 32], offsets [S + 1], and for each of M tokens
                                        ids [M, K], logprobs [M, K], tail [M], unmapped [M]     payload topk
                                        states [M, D]                                           payload hidden
          head.safetensors          weight [V, D] and bias [V] in float32                       payload hidden

A sequence is a teacher prompt with a completion; its key is the SHA-256 of their ids. A shard is written under another
name, forced to the disk and renamed, and then the index names it: a recording that was cut short goes on after its last
shard. `logprobs` and `states` are float16, bfloat16 or float32. Rounding moves the sum of a row's probabilities, which
`tail` (float32) restores when they are read: the part that rounding moves is shared out among the named tokens.

A token takes 4K + 2K + 8 bytes as topk and 2D as hidden states in half precision, where logits would take 2V.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import linear, pad

from distil_kernels.train.run.directory import WriteError, force_to_disk, write_text
from distil_kernels.train.teachers.base import HiddenTarget, Target, TopKTarget

INDEX = "index.json"
HEAD = "head.safetensors"
SHARD_TOKENS = 65536
"""Tokens after which a shard is complete."""
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
PAYLOADS = ("topk", "hidden")

Rows = dict[str, Tensor]
"""What is known of some tokens, by the names of a shard's tensors."""


class _Place(NamedTuple):
    """Where a sequence's tokens are."""

    shard: str
    begin: int
    end: int


def sequence_key(prompt: Sequence[int], completion: Sequence[int]) -> bytes:
    """The same for the same teacher prompt and completion."""
    ids = torch.tensor([len(prompt), *prompt, *completion], dtype=torch.int64)
    return hashlib.sha256(ids.numpy().tobytes()).digest()


class Store:
    """The store in a folder, to be read or gone on with.

    Args:
        option: the option that gave the folder, for messages.

    Raises:
        ValueError: there is no store, or a shard is damaged.
    """

    def __init__(self, folder: Path, option: str) -> None:
        self.folder, self._option = folder, option
        self.index = self._read_index()
        self._places: dict[bytes, _Place] = {}
        self._checked: set[str] = set()
        for shard in self.index["shards"]:
            self._add(shard["file"])

    @property
    def origin(self) -> dict[str, Any]:
        """What the store was made of."""
        return self.index["origin"]

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def rows(self, keys: Sequence[bytes]) -> Rows | None:
        """What is known of the tokens of some sequences, one after another; None if one is not in the store."""
        if not all(key in self._places for key in keys):
            return None
        parts = [self._slice(self._places[key]) for key in keys]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def head(self) -> Rows:
        """Weight and, if the teacher has one, bias."""
        try:
            return load_file(self.folder / HEAD)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"[{self._option}] cannot read {self.folder / HEAD}: {error}") from error

    def _slice(self, place: _Place) -> Rows:
        path = self.folder / place.shard
        try:
            self._check(place.shard)
            with safe_open(path, "pt") as file:
                names = [name for name in file.keys() if name not in ("keys", "offsets")]  # noqa: SIM118
                return {name: file.get_slice(name)[place.begin : place.end] for name in names}
        except (OSError, SafetensorError) as error:
            raise ValueError(f"[{self._option}] cannot read {path}: {error}") from error

    def _add(self, name: str) -> None:
        """Takes note of a shard's sequences."""
        try:
            with safe_open(self.folder / name, "pt") as file:
                keys, offsets = file.get_tensor("keys"), file.get_tensor("offsets").tolist()
        except (OSError, SafetensorError) as error:
            raise ValueError(f"[{self._option}] cannot read {self.folder / name}: {error}") from error
        for row, key in enumerate(keys):
            self._places[bytes(key.tolist())] = _Place(name, offsets[row], offsets[row + 1])

    def _check(self, name: str) -> None:
        """Compares a shard with its checksum, once, before anything of it is used."""
        if name in self._checked:
            return
        (entry,) = (shard for shard in self.index["shards"] if shard["file"] == name)
        if _checksum(self.folder / name) != entry["crc32"]:
            raise ValueError(
                f"[{self._option}] {self.folder / name} is not as it was written, by its checksum: record it again"
            )
        self._checked.add(name)

    def _read_index(self) -> dict[str, Any]:
        path = self.folder / INDEX
        try:
            index = json.loads(path.read_text())
            complete = isinstance(index["shards"], list) and isinstance(index["origin"], dict)
        except OSError as error:
            raise ValueError(
                f"[{self._option}] {self.folder} is no store ({INDEX}: {error.strerror}): expected what record_teacher "
                "wrote"
            ) from error
        except (ValueError, KeyError, TypeError):
            complete = False
        if not complete:
            raise ValueError(f"[{self._option}] {path} is no index of a store: expected what record_teacher wrote")
        return index


class StoreWriter:
    """A store that grows shard by shard.

    Args:
        origin: what it is made of.
        head: of payload hidden.

    Raises:
        ValueError: the folder has a store that was made of something else.
        WriteError: the disk did not take it; shards before are whole.
    """

    def __init__(self, folder: Path, origin: dict[str, Any], head: Rows | None = None) -> None:
        self._folder = folder
        self._added: dict[bytes, Rows] = {}
        self._num_tokens = 0  # of what is added and not written
        if (folder / INDEX).exists():
            self._store = Store(folder, "STORE")
            different = [name for name in origin if origin[name] != self._store.origin.get(name)]
            if different:
                name = different[0]
                raise ValueError(
                    f"[STORE] {folder} was made with {name} {_short(self._store.origin.get(name))}, got "
                    f"{_short(origin[name])}: expected the same, or another folder"
                )
        else:
            folder.mkdir(parents=True, exist_ok=True)
            if head is not None:
                _save(folder / HEAD, head)
            write_text(folder / INDEX, json.dumps({"origin": origin, "shards": []}, indent=1) + "\n")
            self._store = Store(folder, "STORE")

    def __contains__(self, key: bytes) -> bool:
        return key in self._store or key in self._added

    @property
    def num_sequences(self) -> int:
        """The number of sequences so far."""
        return len(self._store) + len(self._added)

    def add(self, key: bytes, rows: Rows) -> None:
        """Adds a sequence; a shard is written when it has enough of them."""
        self._added[key] = rows
        self._num_tokens += _length(rows)
        if self._num_tokens >= SHARD_TOKENS:
            self.flush()

    def flush(self) -> None:
        """Writes what was added since the last shard as one."""
        if not self._added:
            return
        parts = list(self._added.values())
        lengths = list(map(_length, parts))
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        tensors["keys"] = torch.tensor([list(key) for key in self._added], dtype=torch.uint8)
        tensors["offsets"] = torch.tensor([0, *lengths]).cumsum(0)
        index = self._store.index
        name = f"shard-{len(index['shards']):05d}.safetensors"
        _save(self._folder / name, tensors)
        entry = {"file": name, "sequences": len(lengths), "tokens": sum(lengths)}
        shards = [*index["shards"], {**entry, "crc32": _checksum(self._folder / name)}]
        write_text(self._folder / INDEX, json.dumps({**index, "shards": shards}, indent=1) + "\n")
        index["shards"] = shards
        self._store._add(name)
        self._added, self._num_tokens = {}, 0


def rows_of(target: Target, dtype: torch.dtype, top: int) -> Rows:
    """What a shard has of a target, with `top` columns where it is a `TopKTarget`."""
    if isinstance(target, HiddenTarget):
        return {"states": target.states.to(dtype).cpu()}
    missing = (0, top - target.ids.shape[1])
    ids, logprobs = pad(target.ids, missing, value=-1), pad(target.logprobs, missing, value=-math.inf)
    return {
        "ids": ids.to(torch.int32).cpu(), "logprobs": logprobs.to(dtype).cpu(),
        "tail": target.tail.float().cpu(), "unmapped": target.unmapped.float().cpu(),
    }  # fmt: skip


def topk_of(rows: Rows) -> TopKTarget:
    """The target that rows of payload topk are, with probabilities that leave `tail` as it was."""
    logprobs, tail = rows["logprobs"].float(), rows["tail"]
    correction = (1.0 - tail).clamp(min=1e-30).log() - logprobs.logsumexp(1)
    correction = torch.where(correction.isfinite(), correction, 0.0)  # a row of which nothing is known
    return TopKTarget(rows["ids"].long(), logprobs + correction[:, None], rows["unmapped"])


def top_logprobs(target: HiddenTarget, student_weight: Tensor, top: int, block_rows: int = 256) -> TopKTarget:
    """The `top` likeliest tokens of a target with a head; logits exist for `block_rows` tokens at a time."""
    weight = (student_weight if target.weight is None else target.weight).float()
    found = []
    for states in target.states.float().split(block_rows):
        logits = linear(states, weight, None if target.bias is None else target.bias.float())
        logits = logits * target.logit_scale
        if not math.isinf(target.logit_softcap):
            logits = target.logit_softcap * torch.tanh(logits / target.logit_softcap)
        found.append(logits.log_softmax(1).topk(min(top, logits.shape[1])))
    ids, values = torch.cat([part.indices for part in found]), torch.cat([part.values for part in found])
    return TopKTarget(ids, values, values.new_zeros(len(values)))


def _save(path: Path, tensors: Rows) -> None:
    """Writes a file of tensors in one step."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
        force_to_disk(temporary)
        os.replace(temporary, path)
        force_to_disk(path.parent)
    except (OSError, SafetensorError) as error:
        raise WriteError(f"cannot write {path}: {' '.join(str(error).split())}") from error


def _length(rows: Rows) -> int:
    return len(next(iter(rows.values())))


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
