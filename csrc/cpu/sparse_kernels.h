// The sparse kernels' signature, declared once per instruction set that sparse_kernels.cpp is compiled for.
#pragma once

#include "../distil_kernels.h"

#define DISTIL_DECLARE_SPARSE_KERNELS(isa)                                                                        \
  namespace distil_kernels::isa {                                                                                 \
  void sparse_count(const float* dense, std::int64_t row_stride, std::int64_t num_rows, std::int64_t num_columns, \
                    float threshold, float* cutoff, std::int64_t* counts, float* dropped, int num_threads);       \
  void sparse_select(const float* dense, std::int64_t row_stride, std::int64_t num_columns, const float* cutoff,  \
                     const SparseRows& out, int num_threads);                                                     \
  void sparse_transpose(const SparseRows& rows, const SparseRows& out, std::int64_t* position, int num_threads);  \
  void sparse_product(const SparseRows& rows, const DenseRows& dense, float* out, std::int64_t* position,         \
                      int num_threads);                                                                           \
  }

DISTIL_DECLARE_SPARSE_KERNELS(portable)
DISTIL_DECLARE_SPARSE_KERNELS(avx2)
DISTIL_DECLARE_SPARSE_KERNELS(avx512)
