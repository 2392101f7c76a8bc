"""Config from a command line: a parser of its fields, YAML files, presets.

`--config FILE` reads a YAML file of options; the command line overrides it. A run directory's config.json is such a
file too, and is what --resume reads. `--preset NAME` gives the options of a method, which both override.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import inspect
from dataclasses import MISSING, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import yaml

from distil_kernels.train.config import PRESETS, Config


def descriptions() -> dict[str, str]:
    """The docstring under each field."""
    (definition,) = ast.parse(inspect.getsource(Config)).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for item, after in pairwise(definition.body):
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and isinstance(after, ast.Expr):
            found[item.target.id] = ast.literal_eval(after.value)
    return found


def parse(arguments: list[str]) -> tuple[Config, set[str]]:
    """Command line, and the file that --config names, to a checked Config and the names of the options given.

    Raises:
        SystemExit: --help (0), or an unknown option or bad value (2), with a message.
    """
    parser = option_parser(
        "python -m distil_kernels.train",
        "Trains a causal LM by distilling itself under feedback (DistIL), with the whole vocabulary. "
        "Other commands, each with a --help: eval, inspect, report.",
    )
    config, given, _ = read_options(parser, arguments)
    return config, given


def resolved(config: Config) -> str:
    """Options with their values, as a file that --config reads."""
    return yaml.safe_dump(config.settings(), sort_keys=False).rstrip()


def option_parser(prog: str, description: str) -> Parser:
    """A parser of every field of Config and of --config."""
    parser = Parser(
        prog=prog,
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=110),
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of options; the command line overrides it.")
    overrides = "Options of a method; a file and the command line override them."
    parser.add_argument("--preset", choices=tuple(PRESETS), help=overrides)
    types, text = get_type_hints(Config), descriptions()
    for option in fields(Config):
        allowed = option.metadata.get("allowed", ())
        default = "" if option.default is MISSING else f" [{option.default}]"
        about = (text[option.name] + default).replace("%", "%%")
        if types[option.name] is bool:
            how: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        else:
            choices = "{" + ",".join(allowed) + "}" if types[option.name] is str and allowed else None
            how = {"type": types[option.name], "metavar": choices or types[option.name].__name__.upper()}
        parser.add_argument(f"--{option.name}", help=about, **how)
        if "_" in option.name:  # another spelling
            parser.add_argument(f"--{option.name.replace('_', '-')}", dest=option.name, help=argparse.SUPPRESS, **how)
    return parser


def read_options(parser: Parser, arguments: list[str]) -> tuple[Config, set[str], dict[str, Any]]:
    """As `parse`; the last of the three is what the parser knows beside the options."""
    found, rest = parser.parse_known_args(arguments)
    if rest:
        parser.error(f"unknown option {rest[0]}{_suggestion(rest[0].lstrip('-').split('=')[0])}")
    given = vars(found)
    path, preset = given.pop("config", None), given.pop("preset", None)
    others = {name: given.pop(name) for name in list(given) if name not in Config.__dataclass_fields__}
    try:
        values = {**PRESETS.get(preset, {}), **(from_file(Path(path)) if path else {}), **given}
        config = Config(**values)
        config.check()
    except ValueError as error:
        parser.error(str(error))
    return config, set(values), others


def from_file(path: Path) -> dict[str, Any]:
    """Options of a YAML (or JSON) file, each of its field's type.

    Raises:
        ValueError: the file cannot be read, is no list of `option: value`, or has an unknown option or a wrong type.
    """
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
    types, values = get_type_hints(Config), {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in types:
            raise ValueError(f"[config] {path}: unknown option {key!r}{_suggestion(str(key))}")
        if name in values:
            raise ValueError(f"[config] {path}: {name} is given twice")
        values[name] = _typed(name, value, types[name])
    return values


def _typed(name: str, value: Any, expected: type) -> Any:
    if expected is float and not isinstance(value, bool):  # YAML reads 2e-5 as a word and 1 as an integer
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    if type(value) is not expected:
        raise ValueError(f"[{name}] expected a value of type {expected.__name__}, got {value!r}")
    return value


def _suggestion(name: str) -> str:
    known = [option.name for option in fields(Config)]
    close = difflib.get_close_matches(name.replace("-", "_"), known, n=1, cutoff=0.6)
    return f" (did you mean --{close[0]}?)" if close else " (--help lists them all)"


class Parser(argparse.ArgumentParser):
    """One line of what is wrong instead of the usage of forty options."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")
