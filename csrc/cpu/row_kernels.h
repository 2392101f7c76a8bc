// The row kernels' signature, declared once per instruction set that row_kernels.cpp is compiled for.
#pragma once

#include "../distil_kernels.h"

#define DISTIL_DECLARE_ROW_KERNELS(isa)                                                                            \
  namespace distil_kernels::isa {                                                                                  \
  void row_stats(const LogitRows& student, const LogitRows& teacher, const std::int64_t* tokens, const Cost& cost, \
                 std::int64_t num_rows, std::int64_t vocab_size, float* statistics, int num_threads);              \
  void row_grad(const LogitRows& student, const LogitRows& teacher, const std::int64_t* tokens,                    \
                const float* statistics, const Cost& cost, const float* cost_weight, const float* logprob_weight,  \
                std::int64_t num_rows, std::int64_t vocab_size, const GradRows& grad, float* rounding,             \
                int num_threads);                                                                                  \
  void row_stats_grad(const LogitRows& student, const LogitRows& teacher, const std::int64_t* tokens,              \
                      const Cost& cost, const float* cost_weight, std::int64_t num_rows, std::int64_t vocab_size,  \
                      float* statistics, const GradRows& grad, float* rounding, int num_threads);                  \
  }

DISTIL_DECLARE_ROW_KERNELS(portable)
DISTIL_DECLARE_ROW_KERNELS(avx2)
DISTIL_DECLARE_ROW_KERNELS(avx512)
