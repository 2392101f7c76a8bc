"""The verdicts that the tables call public are those of the public graders, run where their packages are:

    pip install evalplus lm-eval

math-verify belongs to the trainer and is always here. SciKnowEval's and APPS's graders are in no package.
"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import answer_tables as answers
import code_tables as code
import pytest

from distil_kernels.train.tasks.expressions import is_equal

pytestmark = pytest.mark.slow


def different(rows: list[tuple], public: Callable[..., Any]) -> list[tuple]:
    """Rows whose public verdict is not the one that stands in the table, with the one that was found."""
    found = [(row, public(*row[:2])) for row in rows]
    return [(row, verdict) for row, verdict in found if verdict != row[2]]


@pytest.mark.parametrize("rows", [code.HUMANEVAL_PLUS_ANSWERS, code.MBPP_PLUS_ANSWERS], ids=["HumanEval", "MBPP"])
def test_evalplus(rows: list[tuple]) -> None:
    evaluation = pytest.importorskip("evalplus.eval")
    trusted_exec = importlib.import_module("evalplus.gen.util").trusted_exec
    deserialized = importlib.import_module("evalplus.data.mbpp").mbpp_deserialize_inputs
    special = importlib.import_module("evalplus.eval._special_oracle").MBPP_OUTPUT_NOT_NONE_TASKS

    def verdict(name: str, answer: str) -> int:
        record: Any = code.evalplus_record(name)
        inputs, entry_point = record["base_input"] + record["plus_input"], record["entry_point"]
        is_mbpp = name in code.MBPP_PLUS
        inputs = deserialized(name, inputs) if is_mbpp else inputs
        reference = record["prompt"] + record["canonical_solution"]
        expected, times = trusted_exec(
            reference, copy.deepcopy(inputs), entry_point, record_time=True, output_not_none=entry_point in special
        )
        whole = answer if is_mbpp or answer.startswith("def") else record["prompt"] + answer
        status, _ = evaluation.untrusted_check(
            "mbpp" if is_mbpp else "humaneval", whole, inputs, entry_point, expected, record["atol"], times,
            fast_check=True,
        )  # fmt: skip
        return int(status == "pass")

    # evalplus 0.3.1 calls every answer to find_zero wrong; its repository has that mended.
    is_old = importlib.metadata.version("evalplus") <= "0.3.1" and "site-packages" in (evaluation.__file__ or "")
    assert not different([row for row in rows if not (is_old and row[0] == "find_zero")], verdict)


def lm_eval_filter(task: str, name: str) -> Callable[..., list[list[str]]]:
    """A filter of a task of lm-eval's, as the task's file configures it."""
    extraction = pytest.importorskip("lm_eval.filters.extraction")
    import lm_eval
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: None)
    file = Path(lm_eval.__file__).parent / "tasks" / task
    filters = yaml.load(file.read_text(), Loader)["filter_list"]
    (options,) = (part["filter"][0] for part in filters if part["name"] == name)
    kinds = {"regex": extraction.RegexFilter, "multi_choice_regex": extraction.MultiChoiceRegexFilter}
    return kinds[options.pop("function")](**options).apply


def test_lm_eval_on_gsm8k() -> None:
    filters = [lm_eval_filter("gsm8k/gsm8k.yaml", name) for name in ("strict-match", "flexible-extract")]

    def digits(text: str) -> str:
        return text.replace(",", "").replace("$", "").removesuffix(".")

    def verdict(right: str, answer: str) -> int:
        return int(digits(right) in [digits(apply([[answer]], [{}])[0][0]) for apply in filters])

    assert not different(answers.GSM8K, verdict)


@pytest.mark.parametrize(
    ("rows", "task", "name", "choices"),
    [
        (answers.MMLU_PRO, "mmlu_pro/_default_template_yaml", "custom-extract", answers.TEN),
        (answers.GPQA, "gpqa/cot_zeroshot/_gpqa_cot_zeroshot_yaml", "flexible-extract", answers.FOUR),
    ],
    ids=["MMLU-Pro", "GPQA"],
)
def test_lm_eval_on_choices(rows: list[tuple], task: str, name: str, choices: dict[str, str]) -> None:
    apply = lm_eval_filter(task, name)
    document = {"choices": list(choices.values())}
    found = [labels[0].strip("()").upper() for labels in apply([[row[0]] for row in rows], [document] * len(rows))]
    labels = [label if label in choices else "" for label in found]
    assert not [(row, label) for row, label in zip(rows, labels, strict=True) if label != row[1]]


def by_math_verify(right: str, answer: str) -> int:
    return int(is_equal(f"${right}$", answer))


def test_math_verify_on_hmmt() -> None:
    assert not different(answers.HMMT, by_math_verify)


def test_math_verify_and_lm_eval_on_aime() -> None:
    grader = pytest.importorskip("lm_eval.tasks.aime.utils")

    def verdict(right: str, answer: str) -> int:
        return max(by_math_verify(right, answer), grader.process_results({"answer": right}, [answer])["exact_match"])

    assert not different(answers.AIME, verdict)


def test_hendrycks_on_mathematics() -> None:
    """What MATH's own comparison of texts finds equal is right; what it does not may be right all the same."""
    is_equiv = pytest.importorskip("lm_eval.tasks.hendrycks_math.utils").is_equiv
    rows = [row[:3] for row in answers.MATHEMATICS if row[3] is not None]
    million = ("10\\text{ million}", "10", 0)  # it takes all after \text{ for a unit
    assert [row for row in rows if is_equiv(*row[:2]) and not row[2]] == [million]
