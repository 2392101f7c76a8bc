"""What a user gets wrong is refused in one line: random command lines, files of options, records, run directories."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
from tiny import byte_tokenizer

from distil_kernels.train.__main__ import COMMANDS, main
from distil_kernels.train.config import Config, option_types
from distil_kernels.train.feedback.kinds import FEEDBACK, correction_feedback
from distil_kernels.train.feedback.prompts import Prompts
from distil_kernels.train.tasks import DOMAINS, OWN_TASKS, make_task
from distil_kernels.train.tasks.records import DATA

STRANGE = [
    "", " ", "0", "-1", "1", "2", "1e400", "nan", "-inf", "none", "null", "true", "[]", "{}", '{"messages": []}', "é",
    "a b", "..", "/", "/nowhere/at/all", "http://", "http://127.0.0.1:1/v1", "%s", "\udcff", "9" * 5000, "x" * 300,
    "\x00", "[red]", "qa", "qa:", "code:/nowhere", "reasoning_gym:", "reasoning_gym:none", "a:b", "os:path",
    "json:loads",
    "--", "-x", "\u2028",
]  # fmt: skip
VALUES: list[Any] = [
    None, True, 0, -1, 3.5, float("nan"), float("inf"), 10**400, "", " ", "text", "é\u2028", "\ud800", "\\boxed{1",
    "####", [], {}, [1], ["a", "b"], [None], {"a": 1}, {"label": ["A"], "text": []}, {"label": "AB", "text": "xy"},
    "[]",
    "{}", "[1", "null", [{"role": "user", "content": "Why?"}], [{"role": "user"}], [{"input": "1", "output": "1"}],
    [[1, 2]],
    "assert f(1) == 1", "def f(:", "\x00", "eJw=", [[[[]]]], {"inputs": ["1"], "outputs": ["1"]},
    {"inputs": [1], "outputs": None},
]  # fmt: skip
"""What a field of a record may be by mistake."""


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on the error stream, or an empty text where the command did what it was asked for."""
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            status = main(arguments)
        except SystemExit as left:
            status = int(left.code or 0)
    message = capsys.readouterr().err
    assert status in (0, 1, 2), (arguments, status, message)
    if status == 0:
        return ""
    lines = [line for line in message.strip().splitlines() if "is damaged and left out" not in line]
    assert len(lines) == 1 and "Traceback" not in message, (arguments, message)
    return message


def a_value(random: random.Random, name: str) -> str:
    kind = option_types()[name]
    known = {"task": [*OWN_TASKS, *DOMAINS], "feedback": list(FEEDBACK), "model": ["nowhere"]}.get(name, [])
    usual = [*kind.choices, *known, str(random.randint(-2, 40)), f"{random.uniform(-1, 2):.3g}"]
    return random.choice(random.choice([usual, STRANGE]))


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments with which no run can start: its model is an empty directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nowhere").mkdir()
    return ["--model", "nowhere"]


@pytest.mark.parametrize("seed", range(4))
def test_command_lines(nowhere: list[str], capsys: pytest.CaptureFixture[str], seed: int) -> None:
    names = [name for name in option_types() if name not in ("model", "teacher_url", "rollout_url")]
    generator = random.Random(seed)
    for _ in range(40):
        arguments = list(nowhere)
        for _ in range(generator.randint(1, 3)):
            name = generator.choice(names)
            name, value = generator.choice(
                [(name, a_value(generator, name)), (name[:-2] + "xx", "1"), (f"no-{name}", "")]
            )
            arguments += generator.choice([[f"--{name}", value], [f"--{name}={value}"], [f"--{name}"]])
        if generator.random() < 0.5:
            generator.shuffle(arguments)
        command = generator.choice([[], [], [], *([name] for name in COMMANDS), ["evil"]])
        assert refused([*command, *arguments], capsys) or "--help" in arguments, (command, arguments)


def a_yaml(random: random.Random) -> bytes:
    names = random.sample([name for name in option_types() if "url" not in name], 3)
    values = [
        *STRANGE,
        *map(json.dumps, VALUES),
        ": :",
        "- a",
        "!!python/object:os.system",
        "&a [*a]",
        "0o9",
        "2026-01-01",
    ]
    lines = [f"{name}: {random.choice(values)}" for name in names]
    text = random.choice(["\n", "\n  ", ", "]).join(lines).encode("utf-8", "surrogatepass")
    return random.choice([text, text[: random.randint(0, len(text))], b"\xff" + text, text.replace(b"\n", b"\x00")])


@pytest.mark.parametrize("seed", range(2))
def test_files_of_options(nowhere: list[str], capsys: pytest.CaptureFixture[str], seed: int) -> None:
    generator, file = random.Random(seed), Path("options.yaml")
    for _ in range(50):
        file.write_bytes(a_yaml(generator))
        assert refused(["--config", str(file), *nowhere], capsys), file.read_bytes()


def a_record(random: random.Random, domain: str, good: list[dict[str, Any]]) -> dict[str, Any]:
    record = dict(random.choice(good))
    for _ in range(random.randint(1, 2)):
        name = random.choice(list(record) or ["question"])
        change = random.choice(["drop", "value", "value", "value", "nest", "cut"])
        if change == "drop":
            record.pop(name, None)
        elif change == "value":
            record[name] = random.choice(VALUES)
        elif change == "nest":
            record[name] = [record.get(name)]
        else:
            record[name] = str(record.get(name))[: random.randint(0, 30)]
    return record


@pytest.mark.parametrize("domain", DOMAINS)
def test_records(domain: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """A record is refused in words, or makes a problem that can be asked, judged and corrected."""
    good = {"qa": [{"question": "2+2?", "answer": "4"}], **FORMATS}.get(domain, [])
    if domain != "qa":
        good = good + [json.loads(line) for line in (DATA / f"{domain}.jsonl").read_text().splitlines()[:3]]
    generator, file = random.Random(domain), tmp_path / "mine.jsonl"
    prompts = Prompts(byte_tokenizer(), [], "chat", max_tokens=100_000, end_ids=[0])
    num_used = 0
    for _ in range(60):
        record = a_record(generator, domain, good)
        file.write_text(json.dumps(record))
        try:
            task = make_task(f"{domain}:{file}", seed=0)
        except ValueError as error:
            message = str(error)
            assert message.startswith("[task] ") and "line 1: " in message and "\n" not in message, record
            continue
        num_used += 1
        problem = task.problem(0)
        assert prompts.student(problem), record
        if problem.answer:
            feedback = correction_feedback(task, problem, "no answer") if domain != "code" else None
            assert feedback is None or prompts.teacher(problem, feedback), record
    assert 0 < num_used < 60


FORMATS: dict[str, list[dict[str, Any]]] = {
    "science": [
        {"question": "?", "options": ["x", "y"], "answer": "A"},
        {"Question": "?", "Correct Answer": "x", "Incorrect Answer 1": "y", "Incorrect Answer 2": "z"},
    ],
    "math": [{"problem": "?", "solution": "\\boxed{3}"}],
    "code": [
        {"text": "Double.", "code": "def f(x):\n    return 2 * x", "test_list": ["assert f(1) == 2"]},
        {"prompt": "def f(x):\n", "entry_point": "f", "canonical_solution": "    return x", "base_input": [[1]],
         "plus_input": [[2]], "atol": 0, "assertion": "assert f(1) == 1"},
        {"question_content": "?", "starter_code": "", "public_test_cases": '[{"input": "1", "output": "1"}]',
         "private_test_cases": "[]", "metadata": "{}"},
        {"question": "?", "input_output": '{"inputs": ["1"], "outputs": ["1"]}', "solutions": "[]",
         "time_limit": "2 s"},
    ],
}  # fmt: skip
"""Records of public formats beside those that are shipped."""


def a_run(directory: Path) -> Path:
    """A run directory with a record of each kind."""
    directory.mkdir()
    (directory / "config.json").write_text(Config(model="nowhere").to_json())
    shared = {"greedy": 0.5, "greedy_se": 0.1, "sampled": 0.5, "sampled_se": None, "teacher": 1.0, "teacher_se": 0.0}
    evaluation = {"kind": "evaluation", "step": 0, **shared, "length": 3.0, "num_problems": 2, "seconds": 1.0,
                  "pass_at": {"1": [0.5, 0.1], "2": [1.0, None]}}  # fmt: skip
    step = {"kind": "step", "step": 1, "loss": 1.0, "accuracy": 0.5, "ce": 1.0, "kl": 0.1, "entropy": 1.0,
            "length": 3.0, "grad_norm": 1.0, "seconds": 1.0, "tokens_per_second": 9.0}  # fmt: skip
    rollout = {"kind": "held_out", "step": 0, "question": "?", "answer": "1", "expected": "1", "score": 1.0,
               "feedback": "", "has_feedback": True, "tokens": [1, 2], "tool_positions": [], "problem": 0,
               "prompt": "?", "teacher_prompt": "?", "texts": ["1", "2"], "ce": [0.5, 0.5], "kl": [0.1, 0.1],
               "credit": [0.0, -0.1],
               "top": [[["1", 0.5, 0.5]], []]}  # fmt: skip
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in (evaluation, step)))
    trained = {name: rollout[name] for name in list(rollout)[:10]} | {"kind": "training", "step": 1}
    (directory / "rollouts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in (rollout, trained)))
    return directory


def damaged(generator: random.Random, text: str) -> str:
    """A file of a run with a field that is missing or of another kind, a line that is none, or cut short."""
    lines = text.splitlines()
    place = generator.randrange(len(lines))
    change = generator.choice(["field", "field", "line", "cut", "empty"])
    if change == "field" and lines[place].startswith('{"'):
        record = json.loads(lines[place])
        name = generator.choice(list(record))
        record[name] = generator.choice(VALUES)
        if generator.random() < 0.3:
            del record[name]
        lines[place] = json.dumps(record)
    elif change == "line":
        lines[place] = generator.choice(["7", "[]", "null", "{}", "{", '"x"'])
    text = "\n".join(lines) + "\n"
    return {"cut": text[: generator.randrange(len(text))], "empty": ""}.get(change, text)


def test_run_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A damaged run directory is shown as far as it goes, or refused; one that is whole is shown."""
    monkeypatch.chdir(tmp_path)
    run = a_run(tmp_path / "run")
    commands = [["inspect", "run"], ["report", "run"], ["eval", "run"]]
    assert [refused(command, capsys) for command in commands[:2]] == ["", ""]
    generator = random.Random(0)
    files = {name: (run / name).read_text() for name in ("config.json", "metrics.jsonl", "rollouts.jsonl")}
    for _ in range(80):
        name = generator.choice(list(files))
        (run / name).write_text(damaged(generator, files[name]))
        refused(generator.choice(commands[: 3 if name == "config.json" else 2]), capsys)
        (run / name).write_text(files[name])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "qa"], "[task] qa has no records of its own: expected qa:FILE.jsonl, got 'qa'"),
        (["--feedback", "broken:judge"], "[feedback] cannot import 'broken:judge': SyntaxError"),
        (["--model", "nowhere"], "[model] cannot load '"),
    ],
)
def test_what_is_said(
    nowhere: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    Path("broken.py").write_text("def judge(\n")
    monkeypatch.syspath_prepend(".")
    assert message in refused([*nowhere, *arguments], capsys)
