"""Config from a command line: a parser of its options in their groups, YAML files, presets.

`--config FILE` reads a YAML file of options; the command line overrides it. A run directory's config.json is such a
file too, and is what --resume reads. `--preset NAME` gives the options of a method, which both override.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import inspect
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from distil_kernels.train.config import Config, OptionType, as_text, option_types
from distil_kernels.train.presets import PRESETS, preset_descriptions

NONE = ("none", "null")
"""How None is written, where an option may be that."""


class Description(NamedTuple):
    """What the source of Config says of an option."""

    group: str
    """The comment above the option's group."""
    help: str
    """The docstring under the option."""


def descriptions() -> dict[str, Description]:
    """Returns the descriptions of all options by name, in their order."""
    source = inspect.getsource(Config)
    headings = {number: line[6:] for number, line in enumerate(source.splitlines(), 1) if line.startswith("    # ")}
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    described = {}
    for item, after in pairwise(definition.body):
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and isinstance(after, ast.Expr):
            group = headings[max(number for number in headings if number < item.lineno)]
            described[item.target.id] = Description(group, " ".join(ast.literal_eval(after.value).split()))
    return described


def parse(arguments: list[str]) -> tuple[Config, set[str]]:
    """Returns a checked Config from the command line and the file that --config names, and which options were given.

    Raises:
        SystemExit: --help (0), or an unknown option or bad value (2), with a message.
    """
    parser = option_parser(
        "python -m distil_kernels.train",
        "Trains a causal LM by distilling itself under feedback (DistIL), with the whole vocabulary. "
        "Other commands, each with a --help: eval, inspect, report, check, record_teacher, untie.",
    )
    config, given, _ = read_options(parser, arguments)
    return config, given


def resolved(config: Config) -> str:
    """Returns the options with their values, as a file that --config reads."""
    import yaml  # late: --help needs no package

    return yaml.safe_dump(config.settings(), sort_keys=False).rstrip()


def option_parser(prog: str, description: str, positional: str = "") -> Parser:
    """Returns a parser of every option of Config, in groups, and of --config and --preset.

    Args:
        positional: an argument that the caller adds, for the usage line.
    """
    parser = Parser(
        prog=prog,
        usage=" ".join(filter(None, [prog, positional, "[--config FILE] [--preset NAME] [--OPTION VALUE ...]"])),
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        epilog="Presets, and where each setting is from:\n" + preset_descriptions(),
        formatter_class=lambda prog: _HelpFormatter(prog, max_help_position=32, width=110),
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of options; the command line overrides it.")
    overrides = "Options of a method; a file and the command line override them."
    parser.add_argument("--preset", choices=tuple(PRESETS), help=overrides)
    groups: dict[str, Any] = {}
    defaults, types = Config(), option_types()
    for name, described in descriptions().items():
        if described.group not in groups:
            groups[described.group] = parser.add_argument_group(described.group)
        default = getattr(defaults, name)
        text = described.help if default == "" else f"{described.help} [{as_text(default)}]"
        text = text.replace("%", "%%")
        settings = _argument_settings(types[name])
        groups[described.group].add_argument(f"--{name}", help=text, **settings)
        if "_" in name:  # another spelling
            parser.add_argument(f"--{name.replace('_', '-')}", dest=name, help=argparse.SUPPRESS, **settings)
    return parser


def _argument_settings(kind: OptionType) -> dict[str, Any]:
    """Returns how argparse reads an option of this type and names its value."""
    if kind.base is bool:
        return {"action": argparse.BooleanOptionalAction}
    if kind.choices:
        return {"type": str, "metavar": "{" + ",".join(kind.choices) + "}"}
    if not kind.allows_none:
        return {"type": kind.base, "metavar": kind.base.__name__.upper()}

    def number_or_none(text: str) -> Any:
        return None if text in NONE else kind.base(text)

    number_or_none.__name__ = f"{kind.base.__name__} or none"  # argparse names it where it fails
    return {"type": number_or_none, "metavar": f"{{{kind.base.__name__.upper()},none}}"}


def read_options(parser: Parser, arguments: list[str]) -> tuple[Config, set[str], dict[str, Any]]:
    """Like `parse`, and also returns the values of arguments that are not options of Config."""
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.error(f"unknown option {unknown[0]}{_suggestion(unknown[0].lstrip('-').split('=')[0])}")
    given = vars(parsed)
    path, preset = given.pop("config", None), given.pop("preset", None)
    others = {name: given.pop(name) for name in list(given) if name not in option_types()}
    try:
        values = {**PRESETS.get(preset, {}), **(from_file(Path(path)) if path else {}), **given}
        config = Config(**values)
        config.check()
    except ValueError as error:
        parser.error(str(error))
    return config, set(values), others


def from_file(path: Path) -> dict[str, Any]:
    """Returns the options of a YAML (or JSON) file, each of its type.

    Raises:
        ValueError: the file cannot be read, is no list of `option: value`, or has an unknown option or a wrong type.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ValueError(f"[config] cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"[config] {path} is no YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"[config] {path}: expected lines of `option: value`, got a {type(content).__name__}")
    types, values = option_types(), {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in types:
            raise ValueError(f"[config] {path}: unknown option {key!r}{_suggestion(str(key))}")
        if name in values:
            raise ValueError(f"[config] {path}: {name} is given twice")
        values[name] = _typed(name, value, types[name])
    return values


def run_config(directory: Path) -> Config:
    """Returns the settings of a run, all of which its config.json has.

    Raises:
        ValueError: one is missing, or not what an option may be.
    """
    path = directory / "config.json"
    values = from_file(path)
    missing = [name for name in Config().settings() if name not in values]
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(
            f"[config] {path} lacks {missing[0]}{others}: expected every option of the run; it is damaged, or of "
            "another version"
        )
    config = Config(**values)
    config.check()
    return config


def _typed(name: str, value: Any, kind: OptionType) -> Any:
    """Returns the value of an option from a file, or raises ValueError where it is of another type."""
    if kind.allows_none and (value is None or value in NONE):
        return None
    if kind.base is float and not isinstance(value, bool):  # YAML reads 2e-5 as a word and 1 as an integer
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            pass
    if type(value) is not kind.base:
        expected = kind.base.__name__ + (" or none" if kind.allows_none else "")
        raise ValueError(f"[{name}] expected a value of type {expected}, got {value!r}")
    return value


def _suggestion(name: str) -> str:
    """Returns the end of a message about an unknown option: the option that may be meant."""
    close = difflib.get_close_matches(name.replace("-", "_"), option_types(), n=1, cutoff=0.6)
    return f" (did you mean --{close[0]}?)" if close else " (--help lists them all)"


class _HelpFormatter(argparse.HelpFormatter):
    """Keeps the lines of a text that has some."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line that says what is wrong, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")
