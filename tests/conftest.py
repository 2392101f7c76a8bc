"""Fresh random inputs for every case, with the seed printed; uninitialised memory is filled with NaN."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import math
import os
import random
import secrets
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

# Workers of pytest-xdist share the cores, and so do the processes that their tests start. Before torch reads it.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

import pytest
import torch
from filelock import FileLock

EMULATED = Path(__file__).parent / "emulated"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=None, help="base seed of all random inputs (default: fresh)")
    parser.addoption(
        "--share", type=float, default=1.0, help="share of each test's cases, drawn by the seed (default: all of them)"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.option.seed is None:  # workers of pytest-xdist take the environment of the session, and not its options
        config.option.seed = int(os.environ.setdefault("DISTIL_KERNELS_TEST_SEED", str(secrets.randbelow(2**31))))


def pytest_report_header(config: pytest.Config) -> str:
    return f"random inputs: --seed {config.option.seed} --share {config.option.share}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Draws each test's cases. Files with slow tests come first: no worker is left alone with one at the end."""
    if config.option.share < 1.0:
        _keep_a_share(config, items)
    slow_files = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow_files)


LEAST_CASES = 4
"""A test that is not slow keeps as many cases, however small the share."""
SLOW_TESTS = 0.5
"""Share of the slow tests that a share of the cases is drawn of."""


def _keep_a_share(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves in `items` some cases of each test, of the slow tests of a random part of them, drawn by the seed."""
    by_test: dict[tuple[Path, str], list[pytest.Item]] = {}
    for item in items:
        by_test.setdefault((item.path, item.nodeid.partition("[")[0]), []).append(item)
    drawn, kept = random.Random(config.option.seed), set()
    for cases in by_test.values():
        is_slow = cases[0].get_closest_marker("slow") is not None
        if is_slow and drawn.random() >= SLOW_TESTS:
            continue
        least = 1 if is_slow else LEAST_CASES
        number = min(len(cases), max(least, math.ceil(config.option.share * len(cases))))
        kept |= set(drawn.sample(cases, number))
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """A generator of its own for each case, from the base seed and the case's name."""
    digest = sum(ord(c) * 31**i for i, c in enumerate(request.node.nodeid)) % 2**31
    seed = (request.config.option.seed + digest) % 2**31
    print(f"seed of this case: {seed}")
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN (or the largest integer), so a result that was never written cannot look right."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny model and its tokenizer."""
    from tiny import save_tiny_model  # late: the kernel library's tests need no transformers

    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def emulated_extension(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """csrc/cuda run by an emulator on the CPU."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the emulator with")
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of all workers: the first one that comes compiles for them
    library = folder / "emulated" / "_C.so"
    with FileLock(folder / "emulated.lock"):
        if not library.exists():
            _compile_emulator(library)
    loader = importlib.machinery.ExtensionFileLoader("_C", str(library))
    extension = importlib.util.module_from_spec(importlib.util.spec_from_loader("_C", loader))
    loader.exec_module(extension)
    return extension


def _compile_emulator(library: Path) -> None:
    import pybind11

    library.parent.mkdir(exist_ok=True)
    includes = [EMULATED, EMULATED.parent.parent / "csrc", pybind11.get_include(), sysconfig.get_paths()["include"]]
    command = ["g++", "-std=c++20", "-O0", "-shared", "-fPIC", "-fvisibility=hidden", "-o", library,
               *(f"-I{include}" for include in includes), EMULATED / "bindings.cpp", "-lpthread"]  # fmt: skip
    subprocess.run(command, check=True)
