"""On a GPU; where there is none, on an emulated one (tests/emulated/gpu.py): the kernels of back end `cuda` by their
emulator, or with TRITON_INTERPRET=1 those of `triton` in its interpreter (`make test-all` runs both). There they
show the way to the kernels, not the hardware. `bench/gpu/check.py` runs them on a GPU, and more."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from emulated.gpu import OnGpu, emulated_gpu

from distil_kernels.backends import cuda, triton
from distil_kernels.backends.dispatch import BACKENDS

# Memory is poisoned by torch's deterministic mode, in which torch before 2.10 refuses cuBLAS without this.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

HAS_GPU = torch.cuda.is_available()
INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(autouse=True)
def a_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if HAS_GPU:
        yield
        return
    if INTERPRETS:
        monkeypatch.setattr(triton, "_launch", _interpreted(triton._launch))
    else:
        monkeypatch.setattr(cuda, "_C", request.getfixturevalue("emulated_extension"))
        monkeypatch.setattr(cuda, "_stream", lambda: 0)
        monkeypatch.setattr(triton, "unavailable", lambda *_: "without a GPU it needs TRITON_INTERPRET=1")
    with emulated_gpu():
        yield


@pytest.fixture(params=["cuda", "triton"] if HAS_GPU else ["triton" if INTERPRETS else "cuda"])
def backend(request: pytest.FixtureRequest) -> str:
    why_not = BACKENDS[request.param].unavailable(torch.device("cuda"), torch.bfloat16)
    if why_not is not None:
        pytest.skip(why_not)
    return request.param


def _interpreted(launch: Any) -> Any:
    """The interpreter takes tensors on the CPU, and widened ones: its bfloat16 products are wrong."""

    def run(kernel: Any, num_programs: int, *arguments: Any, **constants: Any) -> None:
        if "WIDEN" in constants:
            constants["WIDEN"] = True
        held = (each.held if isinstance(each, OnGpu) else each for each in arguments)
        launch(kernel, num_programs, *held, **constants)

    return run
