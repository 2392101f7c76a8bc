"""What only a GPU's own runtime does with an op: torch.compile, CUDA graphs, streams. Not yet run on a GPU."""

from __future__ import annotations

import pytest
import torch

from distil_kernels import fused_distil_loss, fused_forward_ce, fused_topk_ce, token_stats
from distil_kernels.testing import make_inputs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: an emulated one compiles nothing")

BORDERS = torch.tensor([0, 6, 16])
OPS = {
    "forward_ce": lambda i, **options: fused_forward_ce(*i.heads, **options),
    "rows": lambda i, **options: fused_forward_ce(*i.heads, reduction="none", **options).square().sum(),
    "token_stats": lambda i, **options: token_stats(*i.heads, tokens=i.tokens, **options).ce.sum(),
    "distil": lambda i, **options: fused_distil_loss(
        *i.heads, tokens=i.tokens, cu_seqlens=BORDERS, discount=0.9, **options
    ).loss,
    "topk": lambda i, **_: fused_topk_ce(
        i.student_hidden, i.student_weight, i.tokens[:, None], torch.full((16, 1), -0.5, device="cuda")
    ),
}  # fmt: skip


def inputs_on_gpu(generator):
    return make_inputs(16, 1031, 64, dtype=torch.bfloat16, generator=generator).to(torch.bfloat16, torch.device("cuda"))


def value_and_gradients(function, inputs, **options):
    value = function(inputs, **options)
    return value.detach(), *torch.autograd.grad(value, list(inputs.leaves.values()))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("name", OPS)
def test_compiles_as_one_graph(backend, name, mode, generator):
    torch.compiler.reset()
    inputs = inputs_on_gpu(generator)
    compiled = torch.compile(OPS[name], fullgraph=True, mode=mode)
    expected = value_and_gradients(OPS[name], inputs, backend=backend)
    for _ in range(3):  # the third call replays what the second captured
        torch.testing.assert_close(value_and_gradients(compiled, inputs, backend=backend), expected)


def test_a_cuda_graph_replays_the_token_wise_loss(backend, generator):
    inputs = inputs_on_gpu(generator)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            value_and_gradients(OPS["forward_ce"], inputs, backend=backend)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = value_and_gradients(OPS["forward_ce"], inputs, backend=backend)
    with torch.no_grad():
        inputs.student_hidden.copy_(torch.randn_like(inputs.student_hidden))
    expected = value_and_gradients(OPS["forward_ce"], inputs, backend=backend)
    graph.replay()
    torch.testing.assert_close(captured, expected)


def test_a_side_stream_is_waited_for(backend, generator):
    inputs, stream = inputs_on_gpu(generator), torch.cuda.Stream()
    expected = value_and_gradients(OPS["forward_ce"], inputs, backend=backend)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = value_and_gradients(OPS["forward_ce"], inputs, backend=backend)
    stream.synchronize()
    torch.testing.assert_close(found, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_a_device_that_is_not_current(backend, generator):
    inputs = make_inputs(16, 1031, 64, dtype=torch.bfloat16, generator=generator)
    first, second = (inputs.to(torch.bfloat16, torch.device("cuda", index)) for index in (0, 1))
    for name in ("forward_ce", "distil"):
        expected = value_and_gradients(OPS[name], first, backend=backend)
        found = value_and_gradients(OPS[name], second, backend=backend)
        torch.testing.assert_close([each.cpu() for each in found], [each.cpu() for each in expected])
