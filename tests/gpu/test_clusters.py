"""Both ways to a row's statistics and gradient: clusters of every size beside two kernels. Not yet run on a GPU.

tests/backends/test_cuda.py does the same with the emulator, which shows logic; this shows values on the hardware.
"""

from __future__ import annotations

import pytest
import row_checks
import torch

from distil_kernels.backends import FORWARD_CE, LogitPair, LogitTransform, cuda

pytestmark = pytest.mark.slow

HAS_GPU = torch.cuda.is_available()
# 3: most blocks have nothing; 131: the last has a tail; 4099; and the vocabularies of GPT-2 and of Qwen.
VOCAB_SIZES = (3, 131, 4099, 50_257, 151_936) if HAS_GPU else (131,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("cluster_size", [1, 2, 4, 8])
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_clusters_equal_two_kernels(backend, vocab_size, cluster_size, softcap, dtype, generator, monkeypatch):
    if backend != "cuda":
        pytest.skip("triton has no clusters")
    device = torch.device("cuda", 0)
    limits = cuda.device_limits(0)
    if limits.capability < (9, 0) or cuda.cluster_bytes(vocab_size, cluster_size) > limits.block_bytes:
        pytest.skip("this GPU has no such cluster")
    on_cpu = row_checks.make_logits(3, vocab_size, generator, "near", padding=-vocab_size % 16 + 16)
    both = torch.empty(6, on_cpu.student.stride(0)).to(device)[:, :vocab_size]
    both.copy_(torch.cat(on_cpu).to(device))
    logits = LogitPair(both[:3], both[3:])
    plain, capped = LogitTransform(None, None, 1.3), LogitTransform(None, softcap, 0.7)
    tokens, weight = torch.tensor([0, vocab_size - 1, 1]).to(device), torch.tensor([0.3, 1.7, 0.0]).to(device)

    def run(size: int, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        monkeypatch.setattr(cuda, "choose_row_kernel", lambda *_: cuda.RowKernel(size, "asked for by a test"))
        return cuda.row_stats_grad(logits, capped, plain, tokens, FORWARD_CE, weight, out)[0].cpu(), out.cpu()

    padded = torch.empty(2, 3, both.stride(0), dtype=dtype).to(device)[:, :, :vocab_size]
    expected, expected_grad = run(cuda.TWO_KERNELS, padded[0])
    statistics, grad = run(cluster_size, logits.student if dtype == torch.float32 else padded[1])  # float32 in place
    torch.testing.assert_close(statistics, expected, rtol=2e-6, atol=2e-6)
    ulp = torch.finfo(dtype).eps
    atol = 2e-7 + ulp * float(expected_grad.abs().max())
    torch.testing.assert_close(grad, expected_grad, rtol=2 * ulp, atol=atol)
