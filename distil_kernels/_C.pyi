# Types of the extension, as python/bindings.cpp defines it.
from enum import Enum

class Statistic(Enum):
    forward_ce = 0
    # ... as distil_kernels.backends.Statistic

class InstructionSet(Enum):
    best = 0
    portable = 1
    avx2 = 2
    avx512 = 3

class GemmUnit(Enum):
    best = 0
    vector = 1
    tiles = 2

class Cost:
    def __init__(self, statistic: int, jsd_weight: float) -> None: ...

class LogitRows:
    def __init__(self, raw: int, row_stride: int, bias: int, softcap: float, inverse_temperature: float) -> None: ...

class FloatType(Enum):
    float32 = 0
    bfloat16 = 1
    float16 = 2

class RowTask:
    def __init__(
        self,
        student: LogitRows,
        teacher: LogitRows,
        tokens: int,
        cost: Cost,
        num_rows: int,
        vocab_size: int,
        statistics: int,
    ) -> None: ...

class GradRows:
    def __init__(
        self,
        cost_weight: int,
        logprob_weight: int,
        data: int,
        row_stride: int,
        type: FloatType,
        residual: int,
        term_weights: int = 0,
        labels: int = 0,
    ) -> None: ...

class Matrix:
    def __init__(self, data: int, row_stride: int, column_stride: int, is_bf16: bool) -> None: ...

class Product:
    def __init__(self, data: int, row_stride: int, is_bf16: bool, residual: int) -> None: ...

def cpu_is_intel() -> bool: ...
def cpu_supports_gemm(unit: GemmUnit) -> bool: ...
def cpu_gemm(
    a: Matrix,
    b: Matrix,
    num_rows: int,
    num_columns: int,
    depth: int,
    c: Product,
    accumulate: bool,
    num_threads: int,
    unit: GemmUnit,
) -> None: ...
def cpu_rounding_residual(
    a: int, row_stride: int, num_rows: int, num_columns: int, residual: int, num_threads: int
) -> None: ...
def cpu_supports(instruction_set: InstructionSet) -> bool: ...
def cpu_row_stats(task: RowTask, num_threads: int, instruction_set: InstructionSet) -> None: ...
def cpu_row_mixture(task: RowTask, num_threads: int, instruction_set: InstructionSet) -> None: ...
def cpu_row_grad(task: RowTask, grad: GradRows, num_threads: int, instruction_set: InstructionSet) -> None: ...
def cpu_row_stats_grad(task: RowTask, grad: GradRows, num_threads: int, instruction_set: InstructionSet) -> None: ...

class SparseRows:
    def __init__(self, offsets: int, index: int, value: int, num_rows: int) -> None: ...

class DenseRows:
    def __init__(self, data: int, row_stride: int, num_rows: int, num_columns: int, is_bfloat16: bool) -> None: ...

def cpu_sparse_count(
    dense: int,
    row_stride: int,
    num_rows: int,
    num_columns: int,
    threshold: float,
    cutoff: int,
    counts: int,
    dropped: int,
    num_threads: int,
    instruction_set: InstructionSet,
) -> None: ...
def cpu_sparse_select(
    dense: int,
    row_stride: int,
    num_columns: int,
    cutoff: int,
    out: SparseRows,
    num_threads: int,
    instruction_set: InstructionSet,
) -> None: ...
def cpu_sparse_transpose(
    rows: SparseRows, out: SparseRows, position: int, num_threads: int, instruction_set: InstructionSet
) -> None: ...
def cpu_sparse_product(
    rows: SparseRows, dense: DenseRows, out: int, position: int, num_threads: int, instruction_set: InstructionSet
) -> None: ...

cuda_missing: str  # why the extension has no CUDA kernels; absent if it has them

# Present if the extension was built with nvcc; the four kernels return a cudaError_t.

def cuda_device_error() -> int: ...
def cuda_error_text(error: int) -> str: ...

class DeviceLimits:
    capability_major: int
    capability_minor: int
    shared_bytes: int

def cuda_device_limits(device: int, limits: DeviceLimits) -> int: ...
def cuda_row_stats(task: RowTask, stream: int) -> int: ...
def cuda_row_mixture(task: RowTask, stream: int) -> int: ...
def cuda_row_grad(task: RowTask, grad: GradRows, stream: int) -> int: ...
def cuda_row_stats_grad(task: RowTask, grad: GradRows, cluster_size: int, stream: int) -> int: ...
def cuda_max_clusters(vocab_size: int, softcap: bool, cluster_size: int) -> tuple[int, int]: ...

class CostGrid:
    def __init__(
        self, costs: int, slots: int, later: int, num_positions: int, num_sequences: int, num_later: int
    ) -> None: ...

def cuda_cost_to_go(grid: CostGrid, discount: float, horizon: int, to_go: int, next_later: int, stream: int) -> int: ...
