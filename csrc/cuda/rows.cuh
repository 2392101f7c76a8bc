// Reading logits and writing gradients, 16 bytes at a time where every row allows it. Not yet run on a GPU.
//
// kWidth is 4 where all rows and the bias begin at multiples of 16 bytes (`starts_at_vectors`), else 1. The last
// entries of a row, which do not fill a vector, are read and written one by one.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "reduce.cuh"

namespace distil_kernels {

constexpr int kVector = 4;

inline bool starts_at_vectors(const void* begin, std::int64_t row_stride, std::int64_t element_size) {
  const std::int64_t bytes = kVector * element_size;
  return reinterpret_cast<std::uintptr_t>(begin) % bytes == 0 && row_stride * element_size % bytes == 0;
}

inline bool starts_at_vectors(const LogitRows& rows) {
  return starts_at_vectors(rows.raw, rows.row_stride, sizeof(float)) &&
         starts_at_vectors(rows.bias, 0, sizeof(float));
}

inline bool starts_at_vectors(const GradRows& grad) {
  return starts_at_vectors(grad.data, grad.row_stride, grad.type == FloatType::kFloat32 ? 4 : 2);
}

// Reads a vector of which `count` entries exist: fewer than kWidth only at the end of a row. Columns and counts are
// int: comparisons in 64 bits were 6 to 8 of 46 instructions per pair of logits.
template <int kWidth>
__device__ inline void load_floats(const float* from, int count, float fill, float (&to)[kWidth]) {
  if (kWidth == kVector && count >= kWidth) {
    const float4 all = *reinterpret_cast<const float4*>(from);
    to[0] = all.x, to[1 % kWidth] = all.y, to[2 % kWidth] = all.z, to[3 % kWidth] = all.w;
    return;
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i) to[i] = i < count ? from[i] : fill;
}

// In the kSoftcap version, one of the two models may have no softcap.
template <bool kSoftcap>
__device__ inline Logit logit_of(const LogitRows& rows, float raw_plus_bias) {
  if (kSoftcap && rows.softcap != 0.0f) {
    return transform_logit<true>(raw_plus_bias, rows.softcap, rows.inverse_temperature);
  }
  return transform_logit<false>(raw_plus_bias, rows.softcap, rows.inverse_temperature);
}

// Turns raw outputs into logits, in place; entries from `count` on become minus infinity.
template <int kWidth, bool kSoftcap>
__device__ inline void transform(const LogitRows& rows, int column, int count, float (&logits)[kWidth]) {
  if (rows.bias != nullptr) {
    float bias[kWidth];
    load_floats<kWidth>(rows.bias + column, count, 0.0f, bias);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) logits[i] += bias[i];
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i) logits[i] = i < count ? logit_of<kSoftcap>(rows, logits[i]).value : -INFINITY;
}

template <int kWidth>
__device__ inline void load_raw(const LogitRows& rows, std::int64_t row, int column, int count,
                                float (&raw)[kWidth]) {
  load_floats<kWidth>(rows.raw + row * rows.row_stride + column, count, 0.0f, raw);
}

template <int kWidth, bool kSoftcap>
__device__ inline void load_logits(const LogitRows& rows, std::int64_t row, int column, int count,
                                   float (&logits)[kWidth]) {
  load_raw<kWidth>(rows, row, column, count, logits);
  transform<kWidth, kSoftcap>(rows, column, count, logits);
}

// Returns d logit / d raw from the logit itself.
template <bool kSoftcap>
__device__ inline float derivative_at(const LogitRows& rows, float logit) {
  if (!kSoftcap || rows.softcap == 0.0f) return rows.inverse_temperature;
  const float y = logit / (rows.softcap * rows.inverse_temperature);
  return (1.0f - y * y) * rows.inverse_temperature;
}

// Returns the logit of a row's token; NaN where the token is outside the vocabulary.
__device__ inline float token_logit(const LogitRows& rows, std::int64_t row, std::int64_t token,
                                    std::int64_t vocab_size) {
  if (token < 0 || token >= vocab_size) return NAN;
  float logit[1];
  load_logits<1, true>(rows, row, static_cast<int>(token), 1, logit);
  return logit[0];
}

// Raises a thread's peak to the highest of some entries of a row; true where one of them was higher.
template <int kWidth>
__device__ inline bool raise(Peak& peak, const float (&logits)[kWidth], int column) {
  const float before = peak.value;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    if (logits[i] > peak.value) peak = {logits[i], column + i};
  }
  return peak.value > before;
}

// Adds some entries of both rows, none above the thread's maxima, to its sums. It sums the entries themselves
// first: a quarter as many additions are then rounded at the magnitude of the thread's sum.
template <int kWidth>
__device__ inline void accumulate(RowState<float>& state, const float (&s)[kWidth], const float (&t)[kWidth]) {
  const auto term = [&](int i) {
    return row_term(at_least_floor(s[i] - state.student.value), at_least_floor(t[i] - state.teacher.value));
  };
  RowSums<float> sums = term(0);
#pragma unroll
  for (int i = 1; i < kWidth; ++i) add_sums(sums, term(i));
  add_sums(state.sums, sums);
}

// grad_logit of a cost that is known when the kernel runs. All threads have the same cost, so no branch diverges.
template <bool kTerms>
__device__ inline float grad_logit_of(Statistic cost, float s, float t, const RowGradient& row) {
  switch (cost) {
    case kReverseKl:
      return grad_logit<kReverseKl, kTerms>(s, t, row);
    case kJsd:
      return grad_logit<kJsd, kTerms>(s, t, row);
    case kEntropy:
      return grad_logit<kEntropy, kTerms>(s, t, row);
    default:
      return grad_logit<kForwardCe, kTerms>(s, t, row);
  }
}

// Calls visit(column, count) for the vectors of kWidth columns that a thread has in a row of `size` columns, kGroup
// vectors in one call: visit(first, whole) with `whole` true at compile time for all calls but the last.
template <int kWidth, int kGroup, typename Visit>
__device__ inline void for_groups(int size, const Visit& visit) {
  constexpr int kStep = kThreads * kWidth;
  int first = static_cast<int>(threadIdx.x) * kWidth;
#pragma unroll(kGroup == 1 && kWidth == kVector ? 2 : 1)
  for (; first + (kGroup - 1) * kStep + kWidth <= size; first += kGroup * kStep) visit(first, std::true_type{});
  if (first < size) visit(first, std::false_type{});
}

// Rounds two values to bfloat16 or float16 and packs them, the first in the lower half; returns what is lost.
__device__ inline float round_pair(FloatType type, float first, float second, unsigned& packed) {
  if (type == FloatType::kBFloat16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    std::memcpy(&packed, &pair, sizeof packed);
    return (first - __low2float(pair)) + (second - __high2float(pair));
  }
  const __half2 pair = __floats2half2_rn(first, second);
  std::memcpy(&packed, &pair, sizeof packed);
  return (first - __low2float(pair)) + (second - __high2float(pair));
}

// Writes some entries of a gradient row. Returns what their sum loses to rounding.
template <int kWidth>
__device__ inline float store_grad(const GradRows& grad, std::int64_t row, int column, int count,
                                   const float (&values)[kWidth]) {
  const std::int64_t offset = row * grad.row_stride + column;
  if (grad.type == FloatType::kFloat32) {
    float* out = static_cast<float*>(grad.data) + offset;
    if (kWidth == kVector && count >= kWidth) {
      *reinterpret_cast<float4*>(out) = {values[0], values[1 % kWidth], values[2 % kWidth], values[3 % kWidth]};
    } else {
      for (int i = 0; i < kWidth && i < count; ++i) out[i] = values[i];
    }
    return 0.0f;
  }
  unsigned short* out = static_cast<unsigned short*>(grad.data) + offset;
  uint2 packed;
  if (kWidth == kVector && count >= kWidth) {
    const float residual = round_pair(grad.type, values[0], values[1 % kWidth], packed.x) +
                           round_pair(grad.type, values[2 % kWidth], values[3 % kWidth], packed.y);
    *reinterpret_cast<uint2*>(out) = packed;
    return residual;
  }
  float residual = 0.0f;
  for (int i = 0; i < kWidth && i < count; ++i) {
    residual += round_pair(grad.type, values[i], 0.0f, packed.x);
    out[i] = static_cast<unsigned short>(packed.x);
  }
  return residual;
}

// Writes a row's statistics from its merged state and the logits of its token.
__device__ inline void store_statistics(const RowTask& task, std::int64_t row, const RowState<double>& state,
                                        float student_token, float teacher_token) {
  const RowResult<double> result = finish(state.sums);
  const bool has_tokens = task.tokens != nullptr;
  const auto store = [&](Statistic statistic, double value) {
    task.statistics[statistic * task.num_rows + row] = static_cast<float>(value);
  };
  store(kForwardCe, result.forward_ce);
  store(kForwardKl, result.forward_kl);
  store(kReverseKl, result.reverse_kl);
  store(kEntropy, result.entropy);
  store(kTeacherEntropy, result.teacher_entropy);
  store(kAgree, state.student.index == state.teacher.index ? 1.0 : 0.0);
  store(kMaxLogit, state.student.value);
  store(kLogNormalizer, result.log_normalizer);
  store(kTeacherMaxLogit, state.teacher.value);
  store(kTeacherLogNormalizer, result.teacher_log_normalizer);
  store(kJsd, 0.0);  // `row_mixture` writes it
  store(kStudentMixtureKl, 0.0);
  const double logprob = static_cast<double>(student_token) - state.student.value - result.log_normalizer;
  const double teacher_logprob =
      static_cast<double>(teacher_token) - state.teacher.value - result.teacher_log_normalizer;
  store(kLogprob, has_tokens ? logprob : 0.0);
  store(kTeacherLogprob, has_tokens ? teacher_logprob : 0.0);
}

}  // namespace distil_kernels
