"""`python -m distil_kernels.train COMMAND ...`: train (the default), eval, inspect, report, check, record_teacher or
untie; see --help."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO, cast

if __name__ == "__main__":  # until main can say so, Ctrl-C ends the process without a word
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from distil_kernels.extras import missing_package
from distil_kernels.train import commands
from distil_kernels.train.command_line import parse, resolved, run_config
from distil_kernels.train.config import Config, option_types
from distil_kernels.train.run import directory as run_directory
from distil_kernels.train.run.lock import RunLock, holder
from distil_kernels.train.run.output import LastingOutput


def main(arguments: list[str]) -> int:
    """Runs a command and returns the exit status.

    0 is success, 1 a file that could not be written, a diverged run, a judge or a server that failed, 2 wrong options
    or a package that is not installed, 130 a stop by Ctrl-C.
    """
    command, options = "train", arguments
    if arguments and not arguments[0].startswith("-"):
        command, *options = arguments
    if command not in COMMANDS:
        close = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        expected = ", ".join(COMMANDS)
        print(
            f"python -m distil_kernels.train: expected a command ({expected}), got {command!r}{hint}", file=sys.stderr
        )
        return 2
    status = 2
    try:
        work = COMMANDS[command](options)
        status = 1
        return work() or 0
    except ModuleNotFoundError as error:
        if (line := missing_package(error)) is None:
            raise
        print(f"python -m distil_kernels.train: {line}", file=sys.stderr)
        return 2
    except (ValueError, RuntimeError) as error:
        names_option = re.match(r"\[(\w+)\] ", str(error))
        if not names_option or (status == 1 and names_option[1] not in option_types()):  # a fault of the code
            raise
        _say(error)
        return status
    except (OSError, FloatingPointError) as error:
        _say(error)
        return 1
    except KeyboardInterrupt:
        print("stopped at once; a run directory is as of its last checkpoint", file=sys.stderr)
        return 130


def _say(error: Exception) -> None:
    """Prints an error as one line."""
    print("python -m distil_kernels.train:", " ".join(str(error).split()), file=sys.stderr)


def _train(arguments: list[str]) -> commands.Work:
    config, given = parse(arguments)
    with ExitStack() as stack:  # a start that is refused leaves the run to others
        resumes, accepts_changes = bool(config.resume), config.accept_changes
        if resumes:
            config, directory = _resumed(config, given)
        else:
            config = config.with_absolute_paths()
            directory = _new_directory(config) if _is_main() else Path(config.runs_dir)  # until the main process says
        lock = None
        if _is_main() and directory.exists():
            lock = stack.enter_context(RunLock(directory, "resume" if resumes else "overwrite"))
        # Late, so that wrong options are reported before seconds of imports.
        from rich.console import Console

        from distil_kernels.train.build import build
        from distil_kernels.train.trainer import Trainer

        output = cast(TextIO, LastingOutput(sys.stdout))
        console = Console(file=output, width=None if sys.stdout.isatty() else 160, quiet=not _is_main())
        console.print(resolved(config), highlight=False, markup=False)
        trainer = Trainer(config, build(config, directory), console)
        if resumes:
            trainer.resume(accepts_changes)
            if "steps" in given and _is_main():
                run_directory.write_text(directory / "config.json", config.to_json())
        elif _is_main():
            stack.enter_context(run_directory.make(directory, config.to_json(), lock))
        held = stack.pop_all()

    def run() -> int:
        with held:
            return 0 if trainer.run() else 130

    return run


def _is_main() -> bool:
    """Returns whether this process makes the directory and prints, as torchrun and accelerate launch tell it."""
    return os.environ.get("RANK", "0") == "0"


def _new_directory(config: Config) -> Path:
    """Returns the directory that a new run will have; nothing is made yet."""
    name = config.name or f"{config.task.replace(':', '-')}-{time.strftime('%Y%m%d-%H%M%S')}"
    directory = Path(config.runs_dir) / name
    if directory.exists() and (writer := holder(directory)):
        raise ValueError(f"[name] {directory} is in use by {writer}: stop that process first, or choose another --name")
    if directory.exists() and not config.overwrite:
        raise ValueError(f"[name] {directory} exists: choose another --name, --resume {directory}, or --overwrite")
    if directory.exists() and not run_directory.is_run(directory):
        raise ValueError(f"[overwrite] {directory} is no run directory: remove it, or choose another --name")
    return directory


def _resumed(config: Config, given: set[str]) -> tuple[Config, Path]:
    """Returns the settings of the run to resume, with the steps that are given, and its directory."""
    directory = Path(config.resume)
    if not (directory / "config.json").exists():
        raise ValueError(f"[resume] {directory} is no run directory (it has no config.json)")
    extra = sorted(given - {"resume", "steps", "accept_changes"})
    if extra:
        raise ValueError(
            "[resume] a resumed run keeps its settings: expected --steps and --accept_changes at most, got "
            f"--{extra[0]}"
        )
    config_before = run_config(directory)
    if "steps" in given:
        config_before = dataclasses.replace(config_before, steps=config.steps)
    return config_before, directory


COMMANDS = {
    "train": _train,
    "eval": commands.evaluate,
    "inspect": commands.inspect,
    "report": commands.report,
    "check": commands.check,
    "record_teacher": commands.record_teacher,
    "untie": commands.untie,
}


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
