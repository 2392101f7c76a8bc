"""The command line: one source of options, checked before any work."""

from __future__ import annotations

from dataclasses import fields
from itertools import groupby
from pathlib import Path

import pytest

from distil_kernels.train.command_line import descriptions, parse, resolved
from distil_kernels.train.config import Config, OptionType, option_types
from distil_kernels.train.presets import PRESETS


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        parse(list(arguments))
    assert exit_.value.code == 2
    return capsys.readouterr().err


def test_every_option_is_described_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(descriptions()) == [option.name for option in fields(Config)]
    with pytest.raises(SystemExit) as exit_:
        parse(["--help"])
    assert exit_.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for option in fields(Config):
        assert f"--{option.name}" in shown
    assert f"Peak learning rate of AdamW. [{Config().learning_rate}]" in shown
    assert "--plan {auto,gradient_in_forward,recompute,frozen_head}" in shown
    assert "--horizon {INT,none} Costs more than this many tokens later do not count. (Biased.) [none]" in shown
    assert "--no-off_policy" in shown and "-off-policy" not in shown and "--learning-rate" not in shown  # one spelling


def test_options_stand_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    """Each heading stands once, and its options below it in the order of Config."""
    with pytest.raises(SystemExit):
        parse(["--help"])
    lines = capsys.readouterr().out.splitlines()
    found: dict[str, list[str]] = {}
    for line in lines[lines.index("options:") + 1 :]:
        if line.endswith(":") and not line.startswith(" "):
            assert line[:-1] not in found
            found[line[:-1]] = group = []
        elif line.startswith("  --") and found:
            group.append(line.split()[0].strip(" -,"))
    groups = groupby(descriptions().items(), key=lambda item: item[1].group)
    assert found.pop("Presets, and where each setting is from") == []
    assert found == {heading: [name for name, _ in options] for heading, options in groups}
    assert len(found) > 5


def test_help_names_the_source_of_every_setting_of_a_preset(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    _, _, presets = capsys.readouterr().out.partition("Presets, and where each setting is from:\n")
    blocks: dict[str, list[str]] = {}
    for line in presets.splitlines():
        if not line.startswith("   "):
            block = blocks.setdefault(line.strip(), [])
        else:
            block.append(line)
    assert blocks.keys() == PRESETS.keys()
    for name, lines in blocks.items():
        assert {line.split()[0]: line.split()[1] for line in lines} == {k: str(v) for k, v in PRESETS[name].items()}
        assert all(len(line.split()) > 2 for line in lines)


def test_choices_are_literals_that_the_parser_reads() -> None:
    assert option_types()["cost"] == OptionType(str, ("ce", "kl"), False)
    assert option_types()["off_policy"] == OptionType(bool, (), False)
    assert option_types()["credit_clip"] == OptionType(float, (), True)


@pytest.mark.parametrize("none", ["none", "null"])
def test_none_is_no_limit(tmp_path: Path, none: str) -> None:
    """On the command line, in YAML and in JSON; and a number is one again."""
    file = tmp_path / "run.yaml"
    file.write_text("horizon: 3\ncredit_clip: 0.5\nimportance_clip: 1.5\ntop_k: 7\noff_policy: true\n")
    assert parse(["--config", str(file)])[0].horizon == 3
    names = ("horizon", "credit_clip", "importance_clip", "top_k", "micro_batch_prompts")
    arguments = [part for name in names for part in (f"--{name}", none)]
    config, _ = parse(["--config", str(file), *arguments])
    assert [getattr(config, name) for name in names] == [None] * 5
    for text in (
        config.to_json(),
        resolved(config),
        f"importance_clip: {none}\ncredit_clip: {none}\noff_policy: true\n",
    ):
        file.write_text(text)
        assert parse(["--config", str(file)])[0] == config


def test_both_spellings_and_types() -> None:
    config, given = parse(
        ["--max-new-tokens", "5", "--learning_rate=1e-3", "--off_policy", "--no-overwrite", "--top_k", "3"]
    )
    assert (config.max_new_tokens, config.learning_rate, config.off_policy, config.overwrite, config.top_k) == (
        5,
        1e-3,
        True,
        False,
        3,
    )
    assert given == {"max_new_tokens", "learning_rate", "off_policy", "overwrite", "top_k"}
    assert parse([]) == (Config(), set())


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("--learning_rte", "--learning_rate"),
        ("--zzz", ""),
        ("--warmup", "--warmup_steps"),
        ("--max-tokens", "--max_new_tokens"),
    ],
)
def test_unknown_options_are_errors_with_a_suggestion(
    capsys: pytest.CaptureFixture[str], wrong: str, meant: str
) -> None:
    message = refused(capsys, wrong, "3")
    assert f"unknown option {wrong}" in message
    assert (f"did you mean {meant}" if meant else "--help") in message


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--steps", "-1"], ["[steps]", "at least 0", "-1"]),
        (["--learning-rate", "nan"], ["[learning_rate]", "nan"]),
        (["--temperature", "0"], ["[temperature]", "above 0", "0"]),
        (["--discount", "1.5"], ["[discount]", "0.0 to 1.0", "1.5"]),
        (["--teacher", "best"], ["[teacher]", "frozen, ema, live", "'best'"]),
        (["--top_p", "0.9"], ["[top_p, top_k]", "0.9", "--off_policy insists"]),
        (["--top_k", "50"], ["[top_p, top_k]", "50"]),
        (["--rollouts_per_prompt", "1"], ["[rollouts_per_prompt]", "at least 2", "1"]),
        (["--alignment_every", "1", "--objective", "policy_gradient"], ["[objective]", "alignment_every", "jsd"]),
        (["--baseline", "position_mean", "--micro_batch_prompts", "2"], ["[micro_batch_prompts]", "whole batch"]),
        (["--gradient_checkpointing", "--reading", "shared"], ["[reading]", "auto or packed or padded", "shared"]),
        (["--credit_span", "sequence"], ["[discount]", "credit_span sequence takes 1.0", "0.9"]),
        (["--credit_span", "sequence", "--discount", "1", "--horizon", "3"], ["[horizon]", "takes none, got 3"]),
        (
            ["--credit_span", "sequence", "--discount", "1", "--normalize_by_remaining"],
            ["[normalize_by_remaining]", "takes False, got True"],
        ),
        (["--accept_changes"], ["[accept_changes]", "--resume RUN"]),
        (["--lora_continue", "--lora_targets", "all-linear"], ["[lora_targets]", "lora_continue", "all-linear"]),
        (["--judge_seconds", "0"], ["[judge_seconds]", "above 0, or none", "got 0"]),
        (["--plan", "foo"], ["[plan]", "auto, gradient_in_forward, recompute, frozen_head", "'foo'"]),
        (["--plan", "stats_only"], ["[plan]", "'stats_only'"]),
        (["--plan", "frozen_head"], ["[plan]", "frozen_head", "lora_rank of at least 1, got 0"]),
        (["--name", "a/b"], ["[name]", "'a/b'"]),
        (["--name", "."], ["[name]", "'.'"]),
        (["--name", ".."], ["[name]", "'..'"]),
        (["--steps", "many"], ["--steps", "many"]),
        (["--steps", "none"], ["--steps", "none"]),
        (["--horizon", "far"], ["--horizon", "int or none", "far"]),
        (["--horizon", "0"], ["[horizon]", "at least 1, or none for no limit", "got 0"]),
        (["--top_k", "0"], ["[top_k]", "at least 1, or none for no limit", "got 0"]),
        (["--credit_clip", "0"], ["[credit_clip]", "above 0, or none for no limit", "got 0"]),
        (["--importance_clip", "0"], ["[importance_clip]", "above 0, or none for no limit", "got 0"]),
        (["--micro_batch_prompts", "0"], ["[micro_batch_prompts]", "at least 1, or none", "got 0"]),
    ],
)
def test_values_are_checked_with_name_value_and_expectation(
    capsys: pytest.CaptureFixture[str], arguments: list[str], parts: list[str]
) -> None:
    message = refused(capsys, *arguments)
    for part in parts:
        assert part in message


def test_what_belongs_to_one_start_is_not_kept(tmp_path: Path) -> None:
    config = Config(name="mine", resume="runs/old", overwrite=True, steps=3)
    file = tmp_path / "config.json"
    for text in (config.to_json(), resolved(config)):
        file.write_text(text)
        assert parse(["--config", str(file)])[0] == Config(name="mine", steps=3)
    file.write_text('{"steps": 3, "resume": "", "overwrite": true}')  # as it was written before
    assert parse(["--config", str(file)])[0] == Config(steps=3, overwrite=True)


def test_a_user_can_insist_on_other_rollouts() -> None:
    assert parse(["--top_p", "0.9", "--off_policy"])[0].top_p == 0.9
    assert parse(["--top_p", "0.9", "--credit_span", "none"])[0].top_p == 0.9  # no score term, nothing to be wrong


def test_a_file_gives_options_and_the_command_line_goes_before_it(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("learning_rate: 1e-4  # a word to YAML\nmax-new-tokens: 7\noff_policy: true\ndiscount: 1\n")
    config, given = parse(["--config", str(file), "--max_new_tokens", "9"])
    assert config == Config(learning_rate=1e-4, max_new_tokens=9, off_policy=True, discount=1.0)
    assert type(config.discount) is float
    assert given == {"learning_rate", "max_new_tokens", "off_policy", "discount"}
    file.write_text(resolved(config))
    assert parse(["--config", str(file)])[0] == config
    file.write_text(config.to_json())
    assert parse(["--config", str(file)])[0] == config
    file.write_text("")
    assert parse(["--config", str(file)])[0] == Config()


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("learning_rte: 1", ["'learning_rte'", "did you mean --learning_rate"]),
        ("steps: many", ["[steps]", "type int", "'many'"]),
        ("steps: 2.5", ["[steps]", "type int", "2.5"]),
        ("steps: null", ["[steps]", "type int", "None"]),
        ("horizon: far", ["[horizon]", "type int or none", "'far'"]),
        ("steps: true", ["[steps]", "type int", "True"]),
        ("learning_rate: fast", ["[learning_rate]", "type float", "'fast'"]),
        ("off_policy: 1", ["[off_policy]", "type bool", "1"]),
        ("name: 3", ["[name]", "type str", "3"]),
        ("steps: -1", ["[steps]", "at least 0", "-1"]),
        ("top_k: 1\ntop-k: 2", ["top_k", "twice"]),
        ("- steps", ["option: value", "list"]),
        ("a: [", ["no YAML"]),
    ],
)
def test_files_are_checked_as_the_command_line_is(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, parts: list[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    message = refused(capsys, "--config", str(file))
    for part in parts:
        assert part in message
    assert "cannot read" in refused(capsys, "--config", str(tmp_path / "none.yaml"))


def documented() -> list[str]:
    """Commands of README and docs/training.md without a subcommand, one line each."""
    root = Path(__file__).parents[2]
    text = "".join((root / name).read_text() for name in ("README.md", "docs/training.md")).replace("\\\n", " ")
    lines = [
        line.split(" #")[0] for line in text.splitlines() if line.startswith("    python -m distil_kernels.train ")
    ]
    return [line for line in lines if " --" in line and "--help" not in line]


def test_documented_commands_are_understood(tmp_path: Path) -> None:
    (tmp_path / "FILE.yaml").write_text("steps: 3\n")
    commands = documented()
    assert len(commands) > 15
    for command in commands:
        arguments = command.replace("FILE.yaml", str(tmp_path / "FILE.yaml")).split()[3:]
        if arguments[0] == "record_teacher":  # which takes a run's options after the store
            arguments = arguments[2:]
        _, given = parse(arguments)
        assert given, command
