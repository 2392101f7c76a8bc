// The product of two matrices, compiled for each unit that has one; dispatch.cpp asks first.
#pragma once

#include "../distil_kernels.h"

namespace distil_kernels {
namespace avx512 {
void gemm(const Matrix& a, const Matrix& b, std::int64_t num_rows, std::int64_t num_columns, std::int64_t depth,
          const Product& c, bool accumulate, int num_threads);
void rounding_residual(const float* a, std::int64_t row_stride, std::int64_t num_rows, std::int64_t num_columns,
                       float* residual, int num_threads);
}  // namespace avx512

namespace amx {
bool supported();
void gemm(const Matrix& a, const Matrix& b, std::int64_t num_rows, std::int64_t num_columns, std::int64_t depth,
          float* c, std::int64_t c_stride, bool accumulate, int num_threads);
}  // namespace amx
}  // namespace distil_kernels
