// Chooses the compiled copy of the kernels: the widest that this processor runs, or the one asked for.
#include "gemm.h"
#include "kernels.h"

namespace distil_kernels {
namespace {

#if defined(DISTIL_X86_64)
constexpr bool kX86 = true;
bool is_intel() { return __builtin_cpu_is("intel"); }
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#else
constexpr bool kX86 = false;
bool is_intel() { return false; }
bool has_avx2() { return false; }
bool has_avx512() { return false; }
#endif

InstructionSet resolve(InstructionSet requested) {
  if (requested != InstructionSet::kBest) return requested;
  if (cpu_supports(InstructionSet::kAvx512)) return InstructionSet::kAvx512;
  if (cpu_supports(InstructionSet::kAvx2)) return InstructionSet::kAvx2;
  return InstructionSet::kPortable;
}

// Calls run(kernels) with the `Kernels` of an instruction set.
template <typename Run>
void dispatch(InstructionSet requested, const Run& run) {
  switch (resolve(requested)) {
#if defined(DISTIL_X86_64)
    case InstructionSet::kAvx512:
      return run(avx512::Kernels{});
    case InstructionSet::kAvx2:
      return run(avx2::Kernels{});
#endif
    default:
      return run(portable::Kernels{});
  }
}

}  // namespace

bool cpu_supports(InstructionSet instruction_set) {
  switch (instruction_set) {
    case InstructionSet::kAvx512:
      return kX86 && has_avx512();
    case InstructionSet::kAvx2:
      return kX86 && has_avx2();
    default:
      return true;
  }
}

void cpu_row_stats(const RowTask& task, int num_threads, InstructionSet instruction_set) {
  dispatch(instruction_set, [&](auto kernels) { kernels.row_stats(task, num_threads); });
}

void cpu_row_grad(const RowTask& task, const GradRows& grad, int num_threads, InstructionSet instruction_set) {
  dispatch(instruction_set, [&](auto kernels) { kernels.row_grad(task, grad, num_threads); });
}

void cpu_row_mixture(const RowTask& task, int num_threads, InstructionSet instruction_set) {
  dispatch(instruction_set, [&](auto kernels) { kernels.row_mixture(task, num_threads); });
}

void cpu_row_stats_grad(const RowTask& task, const GradRows& grad, int num_threads,
                        InstructionSet instruction_set) {
  dispatch(instruction_set, [&](auto kernels) { kernels.row_stats_grad(task, grad, num_threads); });
}

bool cpu_supports_gemm([[maybe_unused]] GemmUnit unit) {
#if defined(DISTIL_GEMM)
  const bool has_vector = has_avx512() && __builtin_cpu_supports("avx512bf16");
#if defined(DISTIL_GEMM_AMX)
  if (unit == GemmUnit::kTiles) return has_vector && amx::supported();
#endif
  return has_vector && unit != GemmUnit::kTiles;
#else
  return false;
#endif
}

bool cpu_is_intel() { return kX86 && is_intel(); }

// Without DISTIL_GEMM nobody calls the two below: cpu_supports_gemm says so.
void cpu_gemm([[maybe_unused]] const Matrix& a, [[maybe_unused]] const Matrix& b,
              [[maybe_unused]] std::int64_t num_rows, [[maybe_unused]] std::int64_t num_columns,
              [[maybe_unused]] std::int64_t depth, [[maybe_unused]] const Product& c,
              [[maybe_unused]] bool accumulate, [[maybe_unused]] int num_threads, [[maybe_unused]] GemmUnit unit) {
#if defined(DISTIL_GEMM_AMX)
  const bool tiles = unit != GemmUnit::kVector && b.is_bf16 && !c.is_bf16;
  if (tiles && cpu_supports_gemm(GemmUnit::kTiles)) {
    return amx::gemm(a, b, num_rows, num_columns, depth, static_cast<float*>(c.data), c.row_stride, accumulate,
                     num_threads);
  }
#endif
#if defined(DISTIL_GEMM)
  avx512::gemm(a, b, num_rows, num_columns, depth, c, accumulate, num_threads);
#endif
}

void cpu_rounding_residual([[maybe_unused]] const float* a, [[maybe_unused]] std::int64_t row_stride,
                           [[maybe_unused]] std::int64_t num_rows, [[maybe_unused]] std::int64_t num_columns,
                           [[maybe_unused]] float* residual, [[maybe_unused]] int num_threads) {
#if defined(DISTIL_GEMM)
  avx512::rounding_residual(a, row_stride, num_rows, num_columns, residual, num_threads);
#endif
}

void cpu_sparse_count(const float* dense, std::int64_t row_stride, std::int64_t num_rows, std::int64_t num_columns,
                      float threshold, float* cutoff, std::int64_t* counts, float* dropped, int num_threads,
                      InstructionSet instruction_set) {
  dispatch(instruction_set, [&](auto kernels) {
    kernels.sparse_count(dense, row_stride, num_rows, num_columns, threshold, cutoff, counts, dropped, num_threads);
  });
}

void cpu_sparse_select(const float* dense, std::int64_t row_stride, std::int64_t num_columns, const float* cutoff,
                       const SparseRows& out, int num_threads, InstructionSet instruction_set) {
  dispatch(instruction_set,
           [&](auto kernels) { kernels.sparse_select(dense, row_stride, num_columns, cutoff, out, num_threads); });
}

void cpu_sparse_transpose(const SparseRows& rows, const SparseRows& out, std::int64_t* position, int num_threads,
                          InstructionSet instruction_set) {
  dispatch(instruction_set, [&](auto kernels) { kernels.sparse_transpose(rows, out, position, num_threads); });
}

void cpu_sparse_product(const SparseRows& rows, const DenseRows& dense, float* out, std::int64_t* position,
                        int num_threads, InstructionSet instruction_set) {
  dispatch(instruction_set, [&](auto kernels) { kernels.sparse_product(rows, dense, out, position, num_threads); });
}

}  // namespace distil_kernels
