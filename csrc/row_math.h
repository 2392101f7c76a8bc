// The mathematics of one row, written once for every processor.
//
// With s, t the logits of student and teacher relative to their running maxima, one pass keeps six sums
//
//     student      = sum e^s            teacher      = sum e^t
//     student_log  = sum e^s s          teacher_log  = sum e^t t
//     student_gap  = sum e^s (s - t)    teacher_gap  = sum e^t (t - s)
//
// from which every statistic follows (`finish`). The gaps are summed as gaps: KL(T||S) of two nearly equal models
// is a small number, and ce - entropy would leave only its rounding errors.
//
// Functions are static: translation units built for different instruction sets must never share a definition.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "distil_kernels.h"

#if defined(__CUDACC__)
#define DISTIL_INLINE static __host__ __device__ __forceinline__
#else
#define DISTIL_INLINE static inline __attribute__((always_inline))
#endif

namespace distil_kernels {

// Stands for minus infinity among shifted logits: e^x is 0, and 0 * x is 0 instead of NaN.
constexpr float kFloor = -1e30f;

// Smallest finite float: where a running maximum starts.
constexpr float kLowest = -3.402823466e38f;

// The comparison is written so that NaN passes through.
DISTIL_INLINE float at_least_floor(float x) { return x < kFloor ? kFloor : x; }

// e^x for x <= 0 (and a little above), within 1 ulp of a normal result; 0 below -87.3.
// 2^n * p(r) with n = round(x / ln 2), r = x - n ln 2, p of degree 6 fitted on |r| <= ln 2 / 2. The polynomial's
// two halves do not depend on each other: the chain of dependent operations bounds the time of these loops.
DISTIL_INLINE float exp_shifted(float x) {
#if defined(__CUDA_ARCH__)
  return __expf(x);
#else
  constexpr float kSmallest = -87.3f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
  const float clamped = x < kSmallest ? kSmallest : x;
  const float shifted = clamped * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  const float r2 = r * r;
  const float low = 1.66665206e-1f * r + 4.99999934e-1f;
  const float high = 1.38145966e-3f * r2 + (8.36871731e-3f * r + 4.16683881e-2f);
  const float p = ((high * r2 + low) * r2 + r) + 1.0f;
  std::uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127u) << 23;  // kRound's own bits shift out
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  const float result = p * scale;
  return x < kSmallest ? 0.0f : result;
#endif
}

// tanh within 3 ulp: an odd polynomial near 0, where 1 - e^(-2|x|) would cancel, the exponential elsewhere.
DISTIL_INLINE float tanh_accurate(float x) {
  const float magnitude = x < 0.0f ? -x : x;
  const float square = x * x;
  float p = -8.18274232e-3f + 2.14760194e-3f * square;
  p = p * square + 2.17029937e-2f;
  p = p * square - 5.39472089e-2f;
  p = p * square + 1.33332098e-1f;
  p = p * square - 3.33333309e-1f;
  const float near_zero = x + x * square * p;
  const float e = exp_shifted(-2.0f * magnitude);
  const float far = (1.0f - e) / (1.0f + e);
  return magnitude < 0.625f ? near_zero : (x < 0.0f ? -far : far);
}

// log(1 + x) for x > -1, within 2 ulp: 2 atanh(z) with z = f / (2 + f), where 1 + x = 2^n (1 + f) and f is x itself
// near 0, so that small x keep their digits.
DISTIL_INLINE float log1p_accurate(float x) {
#if defined(__CUDA_ARCH__)
  return log1pf(x);
#else
  const float y = 1.0f + x;
  std::int32_t bits;
  std::memcpy(&bits, &y, sizeof bits);
  const std::int32_t exponent = (bits - 0x3f3504f3) >> 23;  // of y over sqrt(1/2)
  bits -= exponent * (1 << 23);
  float mantissa;
  std::memcpy(&mantissa, &bits, sizeof mantissa);
  const float f = exponent == 0 ? x : mantissa - 1.0f;
  const float z = f / (2.0f + f), square = z * z;
  float p = 1.11111111e-1f * square + 1.42857143e-1f;
  p = p * square + 2.0e-1f;
  p = p * square + 3.33333333e-1f;
  const float n = static_cast<float>(exponent);
  return n * 0.693359375f + (2.0f * z * (1.0f + square * p) - n * 2.12194440e-4f);
#endif
}

// A logit after bias, softcap and temperature, and the derivative that the gradient needs.
struct Logit {
  float value;       // after bias, softcap and temperature
  float derivative;  // d value / d raw
};

template <bool kSoftcap>
DISTIL_INLINE Logit transform_logit(float raw_plus_bias, float softcap, float inverse_temperature) {
  if (!kSoftcap) return {raw_plus_bias * inverse_temperature, inverse_temperature};
  const float y = tanh_accurate(raw_plus_bias / softcap);
  return {softcap * y * inverse_temperature, (1.0f - y * y) * inverse_temperature};
}

// The six sums relative to a pair of maxima. Real is double where the sums of many blocks are added, float inside a
// block.
template <typename Real>
struct RowSums {
  Real student = 0, teacher = 0;
  Real student_log = 0, teacher_log = 0;
  Real student_gap = 0, teacher_gap = 0;
};

// Returns one vocabulary entry's terms of the six sums; s and t are relative to the maxima.
DISTIL_INLINE RowSums<float> row_term(float s, float t) {
  const float p = exp_shifted(s);
  const float q = exp_shifted(t);
  const float gap = t - s;
  RowSums<float> term;
  term.student = p;
  term.teacher = q;
  term.student_log = p * s;
  term.teacher_log = q * t;
  term.student_gap = -p * gap;
  term.teacher_gap = q * gap;
  return term;
}

// Moves sums to maxima that are higher by -student_shift, -teacher_shift (both shifts <= 0).
template <typename Real>
DISTIL_INLINE void shift_sums(RowSums<Real>& sums, Real student_shift, Real teacher_shift) {
  const Real p = exp(student_shift), q = exp(teacher_shift);
  const Real gap = teacher_shift - student_shift;
  sums.student_log = p * (sums.student_log + student_shift * sums.student);
  sums.teacher_log = q * (sums.teacher_log + teacher_shift * sums.teacher);
  sums.student_gap = p * (sums.student_gap - gap * sums.student);
  sums.teacher_gap = q * (sums.teacher_gap + gap * sums.teacher);
  sums.student *= p;
  sums.teacher *= q;
}

template <typename Real, typename Other>
DISTIL_INLINE void add_sums(RowSums<Real>& sums, const RowSums<Other>& other) {
  sums.student += other.student;
  sums.teacher += other.teacher;
  sums.student_log += other.student_log;
  sums.teacher_log += other.teacher_log;
  sums.student_gap += other.student_gap;
  sums.teacher_gap += other.teacher_gap;
}

// The statistics that depend on neither the token nor the maxima.
template <typename Real>
struct RowResult {
  Real forward_ce, forward_kl, reverse_kl, entropy, teacher_entropy, log_normalizer, teacher_log_normalizer;
};

template <typename Real>
DISTIL_INLINE RowResult<Real> finish(const RowSums<Real>& sums) {
  RowResult<Real> result;
  const Real log_s = log(sums.student), log_t = log(sums.teacher);
  result.log_normalizer = log_s;
  result.teacher_log_normalizer = log_t;
  result.entropy = log_s - sums.student_log / sums.student;
  result.teacher_entropy = log_t - sums.teacher_log / sums.teacher;
  result.forward_kl = sums.teacher_gap / sums.teacher + (log_s - log_t);
  result.reverse_kl = sums.student_gap / sums.student + (log_t - log_s);
  result.forward_ce = result.forward_kl + result.teacher_entropy;
  return result;
}

// A divergence from `finish` errs by about 1e-7, the rounding of its normalisers; one below this is summed again.
constexpr double kNear = 1e-5;

// One entry's terms of KL(S || T) and KL(T || S), with log_ratio = log S/T. Neither term can be negative: the
// summands T - S and S - T, which add up to 0 over the vocabulary, remove the first order, which would cancel.
struct DivergenceTerm {
  float student, teacher;
};

DISTIL_INLINE DivergenceTerm divergence_term(float p, float q, float log_ratio) {
  const float square = log_ratio * log_ratio;
  const float even = square * ((1.38888889e-3f * square + 4.16666667e-2f) * square + 0.5f);
  const float odd = log_ratio * square * ((1.98412698e-4f * square + 8.33333333e-3f) * square + 1.66666667e-1f);
  const bool near = square < 0.25f;  // there even + odd = e^x - 1 - x within 1e-6 of itself
  return {near ? p * (even - odd) : (q - p) + p * log_ratio, near ? q * (even + odd) : (p - q) - q * log_ratio};
}

// A smaller probability counts as 0 where it is divided by.
constexpr float kTiny = 1e-37f;

// Returns m / p - 1 with m the mixture, of which log1p is log(M / S); 0 where p is 0.
DISTIL_INLINE float mixture_excess(float p, float q, float weight) {
  return p < kTiny ? 0.0f : weight * (q - p) / p;
}

// One entry's terms of KL(S || M) and KL(T || M). Neither term can be negative: the summands b (q - p) and
// (1 - b) (p - q), which add up to 0 over the vocabulary, remove the first order, which would cancel.
struct MixtureTerm {
  float student, teacher;
};

DISTIL_INLINE MixtureTerm mixture_term(float p, float q, float jsd_weight) {
  const float student_weight = 1.0f - jsd_weight;
  return {jsd_weight * (q - p) - p * log1p_accurate(mixture_excess(p, q, jsd_weight)),
          student_weight * (p - q) - q * log1p_accurate(mixture_excess(q, p, student_weight))};
}

// The numbers that the gradient of a row takes besides its logits.
struct RowGradient {
  float log_normalizer, teacher_log_normalizer;
  float cost_weight, logprob_weight;
  float mean;  // the mean that the cost subtracts: KL(S || T), KL(S || M) or H(S)
  float jsd_weight;
  float student_weight = 0.0f, student_log_weight = 0.0f, uniform_weight = 0.0f;  // as in TermWeight
};

// Returns the statistic that RowGradient::mean is.
DISTIL_INLINE Statistic mean_statistic(Statistic cost) {
  return cost == kJsd ? kStudentMixtureKl : (cost == kEntropy ? kEntropy : kReverseKl);
}

// Returns d(cost_weight * cost + logprob_weight * log S[token]) / d s for an entry other than the token; the entry
// of the token gets logprob_weight on top. s and t are relative to the maxima.
//
//     cross-entropy, forward KL   S - T
//     reverse KL                  S (log S/T - KL(S || T))
//     JSD                         (1 - b) S (log S/M - KL(S || M))
//     entropy                     -S (log S + H(S))
//
// With kTerms, the terms of TermWeight but for the label's are added; a cost of weight 0 may then be anything.
template <Statistic kCost, bool kTerms = false>
DISTIL_INLINE float grad_logit(float s, float t, const RowGradient& row) {
  const float p = exp_shifted(s - row.log_normalizer);
  const float q = kCost == kEntropy ? 0.0f : exp_shifted(t - row.teacher_log_normalizer);
  float cost;
  if (kCost == kReverseKl) {
    const float ratio = (at_least_floor(s) - at_least_floor(t)) - (row.log_normalizer - row.teacher_log_normalizer);
    cost = p * (ratio - row.mean);
  } else if (kCost == kJsd) {
    const float ratio = -log1p_accurate(mixture_excess(p, q, row.jsd_weight));
    cost = (1.0f - row.jsd_weight) * p * (ratio - row.mean);
  } else if (kCost == kEntropy) {
    cost = -p * ((at_least_floor(s) - row.log_normalizer) + row.mean);
  } else {
    cost = p - q;
  }
  if (!kTerms) return row.cost_weight * cost - row.logprob_weight * p;
  const float factor =
      row.student_log_weight * (at_least_floor(s) - row.log_normalizer) + (row.student_weight - row.logprob_weight);
  return (row.cost_weight == 0.0f ? 0.0f : row.cost_weight * cost) + (p * factor + row.uniform_weight);
}

}  // namespace distil_kernels
