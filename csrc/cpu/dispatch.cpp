// Chooses the compiled copy of the row kernels: the widest that this processor runs, or the one asked for.
#include "gemm.h"
#include "row_kernels.h"
#include "sparse_kernels.h"

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

void cpu_row_stats(const LogitRows& student, const LogitRows& teacher, const std::int64_t* tokens, const Cost& cost,
                   std::int64_t num_rows, std::int64_t vocab_size, float* statistics, int num_threads,
                   InstructionSet instruction_set) {
  const auto run = [&](auto row_stats) {
    row_stats(student, teacher, tokens, cost, num_rows, vocab_size, statistics, num_threads);
  };
  switch (resolve(instruction_set)) {
#if defined(DISTIL_X86_64)
    case InstructionSet::kAvx512:
      return run(avx512::row_stats);
    case InstructionSet::kAvx2:
      return run(avx2::row_stats);
#endif
    default:
      return run(portable::row_stats);
  }
}

void cpu_row_grad(const LogitRows& student, const LogitRows& teacher, const std::int64_t* tokens,
                  const float* statistics, const Cost& cost, const float* cost_weight, const float* logprob_weight,
                  std::int64_t num_rows, std::int64_t vocab_size, const GradRows& grad, float* rounding,
                  int num_threads, InstructionSet instruction_set) {
  const auto run = [&](auto row_grad) {
    row_grad(student, teacher, tokens, statistics, cost, cost_weight, logprob_weight, num_rows, vocab_size, grad,
             rounding, num_threads);
  };
  switch (resolve(instruction_set)) {
#if defined(DISTIL_X86_64)
    case InstructionSet::kAvx512:
      return run(avx512::row_grad);
    case InstructionSet::kAvx2:
      return run(avx2::row_grad);
#endif
    default:
      return run(portable::row_grad);
  }
}

void cpu_row_stats_grad(const LogitRows& student, const LogitRows& teacher, const std::int64_t* tokens,
                        const Cost& cost, const float* cost_weight, std::int64_t num_rows, std::int64_t vocab_size,
                        float* statistics, const GradRows& grad, float* rounding, int num_threads,
                        InstructionSet instruction_set) {
  const auto run = [&](auto row_stats_grad) {
    row_stats_grad(student, teacher, tokens, cost, cost_weight, num_rows, vocab_size, statistics, grad, rounding,
                   num_threads);
  };
  switch (resolve(instruction_set)) {
#if defined(DISTIL_X86_64)
    case InstructionSet::kAvx512:
      return run(avx512::row_stats_grad);
    case InstructionSet::kAvx2:
      return run(avx2::row_stats_grad);
#endif
    default:
      return run(portable::row_stats_grad);
  }
}

bool cpu_supports_gemm(GemmUnit unit) {
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

void cpu_gemm(const Matrix& a, const Matrix& b, std::int64_t num_rows, std::int64_t num_columns, std::int64_t depth,
              const Product& c, bool accumulate, int num_threads, GemmUnit unit) {
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

void cpu_rounding_residual(const float* a, std::int64_t row_stride, std::int64_t num_rows, std::int64_t num_columns,
                           float* residual, int num_threads) {
#if defined(DISTIL_GEMM)
  avx512::rounding_residual(a, row_stride, num_rows, num_columns, residual, num_threads);
#endif
}

void cpu_sparse_count(const float* dense, std::int64_t row_stride, std::int64_t num_rows, std::int64_t num_columns,
                      float threshold, float* cutoff, std::int64_t* counts, float* dropped, int num_threads,
                      InstructionSet instruction_set) {
  const auto run = [&](auto sparse_count) {
    sparse_count(dense, row_stride, num_rows, num_columns, threshold, cutoff, counts, dropped, num_threads);
  };
  switch (resolve(instruction_set)) {
#if defined(DISTIL_X86_64)
    case InstructionSet::kAvx512:
      return run(avx512::sparse_count);
    case InstructionSet::kAvx2:
      return run(avx2::sparse_count);
#endif
    default:
      return run(portable::sparse_count);
  }
}

void cpu_sparse_select(const float* dense, std::int64_t row_stride, std::int64_t num_columns, const float* cutoff,
                       const SparseRows& out, int num_threads, InstructionSet instruction_set) {
  const auto run = [&](auto sparse_select) {
    sparse_select(dense, row_stride, num_columns, cutoff, out, num_threads);
  };
  switch (resolve(instruction_set)) {
#if defined(DISTIL_X86_64)
    case InstructionSet::kAvx512:
      return run(avx512::sparse_select);
    case InstructionSet::kAvx2:
      return run(avx2::sparse_select);
#endif
    default:
      return run(portable::sparse_select);
  }
}

void cpu_sparse_transpose(const SparseRows& rows, const SparseRows& out, std::int64_t* position, int num_threads,
                          InstructionSet instruction_set) {
  const auto run = [&](auto sparse_transpose) { sparse_transpose(rows, out, position, num_threads); };
  switch (resolve(instruction_set)) {
#if defined(DISTIL_X86_64)
    case InstructionSet::kAvx512:
      return run(avx512::sparse_transpose);
    case InstructionSet::kAvx2:
      return run(avx2::sparse_transpose);
#endif
    default:
      return run(portable::sparse_transpose);
  }
}

void cpu_sparse_product(const SparseRows& rows, const DenseRows& dense, float* out, std::int64_t* position,
                        int num_threads, InstructionSet instruction_set) {
  const auto run = [&](auto sparse_product) { sparse_product(rows, dense, out, position, num_threads); };
  switch (resolve(instruction_set)) {
#if defined(DISTIL_X86_64)
    case InstructionSet::kAvx512:
      return run(avx512::sparse_product);
    case InstructionSet::kAvx2:
      return run(avx2::sparse_product);
#endif
    default:
      return run(portable::sparse_product);
  }
}

}  // namespace distil_kernels
