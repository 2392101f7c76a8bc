"""Registers, spills and shared memory of every GPU kernel, compiled ahead of time; no GPU needed.

    python bench/gpu/resources.py [triton] [amd] [cuda]      prints a table, exits 1 where a kernel spills

Triton's kernels for sm_80 and sm_90a, and for AMD's gfx942 and gfx950; the files of csrc/cuda for sm_80, sm_90a,
sm_100a and sm_120a, and the instructions that they execute per pair of logits on sm_90a (`sass`). Registers are per
thread; 65536 of them serve the threads of a multiprocessor.

The assembler that comes with triton 3.6 (3.9's does not) keeps 8
bytes of stack on sm_80 for row_grad of the reverse KL and for head_partials. In row_grad that is a spill: one register,
stored and loaded once, because it stops at 80; head_partials has all 255 and was not looked into.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import sass
import torch

from distil_kernels.extras import require

ROOT = Path(__file__).parents[2]


class Resources(NamedTuple):
    kernel: str
    target: str
    registers: int
    spills: int
    """Bytes of local memory per thread: what the registers did not hold."""
    shared: int
    """Bytes known at compile time; row_stats_grad asks for more at launch."""


NVIDIA = (("cuda", 80), ("cuda", 90))
AMD = (("hip", "gfx942"), ("hip", "gfx950"))


def triton_resources(targets: tuple[tuple[str, int | str], ...]) -> Iterator[Resources]:
    from distil_kernels.backends import Statistic, triton_cost_to_go
    from distil_kernels.backends import triton as backend
    from distil_kernels.backends import triton_kernels as kernels

    flags = {f"HAS_{model}_{what}": True for model in ("STUDENT", "TEACHER") for what in ("BIAS", "SOFTCAP")}
    # What a launch makes of arguments that are None or 1.
    plain = {**dict.fromkeys(flags, False), "student_bias_ptr": None, "teacher_bias_ptr": None, "tokens_ptr": None,
             "token_logits_ptr": None, "num_splits": 1}  # fmt: skip
    for target in targets:
        tile = backend.choose_tile(_gpu(backend, target), torch.bfloat16)
        shape = {"ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth}
        yield _triton(kernels.row_partials, {**flags, "HAS_TOKENS": True, "BLOCK": 4096}, target, 8, 3)
        yield _triton(kernels.row_partials, {**plain, "HAS_TOKENS": False, "BLOCK": 4096}, target, 8, 3)
        yield _triton(kernels.merge_partials, {"HAS_TOKENS": True, "SPLITS": 64}, target, 1, 3)
        yield _triton(kernels.mixture_partials, {**flags, "BLOCK": 4096}, target, 8, 3)
        for cost in (Statistic.FORWARD_CE, Statistic.REVERSE_KL, Statistic.JSD, Statistic.ENTROPY):
            constants = {**flags, "HAS_LOGPROB": True, "ROUNDS": True, "COST": int(cost), "BLOCK": 4096,
                         "HAS_TERMS": False, "HAS_LABELS": False, "terms_ptr": None, "labels_ptr": None}  # fmt: skip
            yield _triton(kernels.row_grad, constants, target, 8, 3)
        constants = {**flags, "HAS_LOGPROB": True, "ROUNDS": True, "COST": int(Statistic.JSD), "BLOCK": 4096}
        yield _triton(kernels.row_grad, {**constants, "HAS_TERMS": True, "HAS_LABELS": True}, target, 8, 3)
        yield _triton(kernels.head_partials, {**flags, **shape, "HAS_TOKENS": True, "WIDEN": False}, target,
                      tile.num_warps, tile.num_stages)  # fmt: skip
        for constants in ({"HAS_HORIZON": True}, {"HAS_HORIZON": False, "num_later": 1}):
            yield _triton(triton_cost_to_go.cost_to_go, {**constants, "BLOCK": 256}, target, 1, 3)


def _gpu(backend, target: tuple[str, int | str]):
    vendor, name = target
    if vendor == "hip":
        return backend.Gpu("hip", (9, 4), 0)
    return backend.Gpu("cuda", divmod(int(name), 10), 0)


def _triton(
    kernel, constants: dict[str, object], target: tuple[str, int | str], num_warps: int, num_stages: int
) -> Resources:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    # What a launch would find out: addresses, strides and hidden sizes are multiples of 16.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name.endswith(("_ptr", "_stride", "hidden_size")) and name not in constants
    }
    signature = {name: _triton_type(name, constants) for name in kernel.arg_names}
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned),
        target=GPUTarget(*target, 64 if target[0] == "hip" else 32),
        options={"num_warps": num_warps, "num_stages": num_stages},
    )
    if target[0] == "hip":
        code = compiled.asm["amdgcn"]
        found = {name: int(value) for name, value in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", code)}
        registers, spilled = found["vgpr_count"], found["vgpr_spill_count"]
        return Resources(kernel.__name__, str(target[1]), registers, 4 * spilled, compiled.metadata.shared)
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [cuobjdump, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    name = "sm_90a" if target[1] == 90 else f"sm_{target[1]}"
    return Resources(kernel.__name__, name, found["REG"], found["STACK"] + found["LOCAL"], compiled.metadata.shared)


def _triton_type(name: str, constants: dict[str, object]) -> str:
    if name in constants:
        return "constexpr"
    if name in ("tokens_ptr", "labels_ptr", "slots_ptr"):
        return "*i64"
    if name.endswith("later_ptr"):
        return "*fp64"
    if name == "out_ptr" or name.endswith(("t_hidden_ptr", "r_hidden_ptr", "t_weight_ptr", "r_weight_ptr")):
        return "*bf16"
    if name.endswith("_ptr"):
        return "*fp32"
    if name.endswith(("softcap", "temperature", "jsd_weight", "discount", "discount_rest")):
        return "fp32"
    return "i64" if name.endswith("_stride") else "i32"


def cuda_resources(nvcc: str, folder: Path) -> Iterator[Resources]:
    """Leaves what it compiles in the folder."""
    for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
        # There are no clusters before 90.
        for target in ("90a", "100a", "120a") if source.name == "row_cluster.cu" else ("80", "90a", "100a", "120a"):
            cubin = folder / f"{source.stem}.{target}.cubin"
            yield from _ptxas(compile_cubin(nvcc, source, target, cubin), f"sm_{target}")


def compile_cubin(nvcc: str, source: Path, target: str, cubin: Path) -> str:
    """Compiles a file of csrc/cuda as CMakeLists.txt does; returns what the assembler says."""
    architecture = f"arch=compute_{target},code=sm_{target}"
    command = [nvcc, "-std=c++17", "-O3", "-ftz=true", "-gencode", architecture, "-Xptxas", "-v", "-I", ROOT / "csrc",
               "-cubin", "-o", cubin, source]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise RuntimeError(f"{source.name} does not compile for sm_{target}:\n{run.stdout}{run.stderr}")
    return run.stdout + run.stderr


def cuda_instructions(folder: Path) -> Iterator[sass.Count]:
    """Of every loop of the row kernels on sm_90a, from the folder. nvcc has no disassembler of its own; triton has."""
    cuobjdump = shutil.which("cuobjdump")
    if cuobjdump is None:
        import triton

        cuobjdump = str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
    for name in ("row_kernels", "row_cluster"):
        yield from sass.counts(folder / f"{name}.90a.cubin", cuobjdump)


def _ptxas(output: str, target: str) -> Iterator[Resources]:
    pattern = r"properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores.*?Used (\d+) registers([^\n]*)"
    for name, stack, spills, registers, rest in re.findall(pattern, output, flags=re.DOTALL):
        kernel = re.search(r"\d+(row_[a-z_]+|cost_to_go)(?:I(\w*?)EEv|E)", name)
        shared = re.search(r"(\d+) bytes smem", rest)
        variant = ", ".join(re.findall(r"L[ib](\d+)", kernel[2] or "")) if kernel else ""
        label = (f"{kernel[1]}<{variant}>" if variant else kernel[1]) if kernel else name
        yield Resources(label, target, int(registers), max(int(stack), int(spills)), int(shared[1]) if shared else 0)


def main(names: list[str]) -> int:
    table: list[Resources] = []
    instructions: list[sass.Count] = []
    if set(names) != {"cuda"}:
        require("bench/gpu/resources.py", "dev", "triton")
    if not names or "triton" in names:
        table += triton_resources(NVIDIA)
    if not names or "amd" in names:
        table += triton_resources(AMD)
    if not names or "cuda" in names:
        nvcc = shutil.which("nvcc")
        if nvcc is None:
            print("no nvcc: csrc/cuda is left out")
        else:
            with tempfile.TemporaryDirectory() as folder:
                table += cuda_resources(nvcc, Path(folder))
                instructions += cuda_instructions(Path(folder))
    print(f"{'kernel':<24}{'target':<9}{'registers':>10}{'spills':>8}{'shared':>8}")
    for row in table:
        print(f"{row.kernel:<24}{row.target:<9}{row.registers:>10}{row.spills:>8}{row.shared:>8}")
    if instructions:
        print(
            f"\ninstructions per pair of logits, sm_90a\n{'kernel':<24}{'loop':<22}{'all':>6}", *sass.CLASSES, "integer"
        )
    for count in instructions:
        classes = "  ".join(f"{name} {value:.1f}" for name, value in sorted(count.per_pair.items()))
        print(f"{count.kernel:<24}{count.loop:<22}{count.total:>6.1f}  {classes}")
    return int(any(row.spills for row in table))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
