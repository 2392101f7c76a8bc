// The kernels that are compiled once per instruction set (DISTIL_ISA): row_kernels.cpp and sparse_kernels.cpp
// define them, dispatch.cpp chooses a copy.
#pragma once

#include "../distil_kernels.h"

#define DISTIL_DECLARE_KERNELS(isa)                                                                                \
  namespace distil_kernels::isa {                                                                                  \
  struct Kernels {                                                                                                 \
    static void row_stats(const RowTask& task, int num_threads);                                                   \
    static void row_mixture(const RowTask& task, int num_threads);                                                 \
    static void row_grad(const RowTask& task, const GradRows& grad, int num_threads);                              \
    static void row_stats_grad(const RowTask& task, const GradRows& grad, int num_threads);                        \
    static void sparse_count(const float* dense, std::int64_t row_stride, std::int64_t num_rows,                   \
                             std::int64_t num_columns, float threshold, float* cutoff, std::int64_t* counts,       \
                             float* dropped, int num_threads);                                                     \
    static void sparse_select(const float* dense, std::int64_t row_stride, std::int64_t num_columns,               \
                              const float* cutoff, const SparseRows& out, int num_threads);                        \
    static void sparse_transpose(const SparseRows& rows, const SparseRows& out, std::int64_t* position,            \
                                 int num_threads);                                                                 \
    static void sparse_product(const SparseRows& rows, const DenseRows& dense, float* out, std::int64_t* position, \
                               int num_threads);                                                                   \
  };                                                                                                               \
  }

DISTIL_DECLARE_KERNELS(portable)
DISTIL_DECLARE_KERNELS(avx2)
DISTIL_DECLARE_KERNELS(avx512)
