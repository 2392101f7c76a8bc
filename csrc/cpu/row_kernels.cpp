// Row statistics and row gradient on the CPU: one source, compiled once per instruction set (DISTIL_ISA).
//
// A row is walked in blocks that stay in the first-level cache. Each block is transformed (bias, softcap,
// temperature), its maxima are found, and its six sums are taken in vector lanes of float; blocks meet in double,
// so the error does not grow with the vocabulary. Rows are shared out among OpenMP threads. Loops are plain C++
// that the compiler vectorises: about a twentieth of an operation that is otherwise matrix products, so
// intrinsics would buy nothing that shows.
#include "row_kernels.h"

#include <cstring>

#include "../row_math.h"
#include "lanes.h"

namespace distil_kernels::DISTIL_ISA {
namespace {

struct Block {
  alignas(64) float student[kSumBlock];
  alignas(64) float teacher[kSumBlock];
  alignas(64) float derivative[kSumBlock];  // of the student's logits by its raw logits
};

template <bool kSoftcap, bool kBias>
inline void transform(const LogitRows& rows, std::int64_t row, std::int64_t begin, std::int64_t size, float* logits,
                      float* derivative) {
  const float* raw = rows.raw + row * rows.row_stride + begin;
  const float* bias = kBias ? rows.bias + begin : nullptr;
  const float softcap = rows.softcap, inverse_temperature = rows.inverse_temperature;
#pragma omp simd
  for (std::int64_t v = 0; v < size; ++v) {
    const Logit logit = transform_logit<kSoftcap>(kBias ? raw[v] + bias[v] : raw[v], softcap, inverse_temperature);
    logits[v] = logit.value;
    if (kSoftcap) derivative[v] = logit.derivative;
  }
}

// A block's logits: in their own place where nothing is to be applied to them, else in `buffer`.
inline const float* load(const LogitRows& rows, std::int64_t row, std::int64_t begin, std::int64_t size,
                         float* buffer, float* derivative) {
  if (rows.softcap == 0.0f && !rows.bias && rows.inverse_temperature == 1.0f) {
    return rows.raw + row * rows.row_stride + begin;
  }
  const auto chosen = rows.softcap != 0.0f ? (rows.bias ? transform<true, true> : transform<true, false>)
                                           : (rows.bias ? transform<false, true> : transform<false, false>);
  chosen(rows, row, begin, size, buffer, derivative);
  return buffer;
}

struct Maximum {
  float value = kLowest;
  std::int64_t index = 0;  // of its first occurrence

  // True where the block holds a larger value than everything before it.
  inline bool raise(const float* logits, std::int64_t begin, std::int64_t size) {
    float block = kLowest;
#pragma omp simd reduction(max : block)
    for (std::int64_t v = 0; v < size; ++v) block = logits[v] > block ? logits[v] : block;
    if (!(block > value)) return false;
    value = block;
    std::int64_t v = 0;
    while (v + 1 < size && logits[v] != block) ++v;
    index = begin + v;
    return true;
  }
};

inline RowSums<float> sum_block(const float* student_logits, const float* teacher_logits, std::int64_t size,
                                float student_max, float teacher_max) {
  float student = 0, teacher = 0, student_log = 0, teacher_log = 0, student_gap = 0, teacher_gap = 0;
#pragma omp simd reduction(+ : student, teacher, student_log, teacher_log, student_gap, teacher_gap)
  for (std::int64_t v = 0; v < size; ++v) {
    const RowSums<float> term =
        row_term(at_least_floor(student_logits[v] - student_max), at_least_floor(teacher_logits[v] - teacher_max));
    student += term.student;
    teacher += term.teacher;
    student_log += term.student_log;
    teacher_log += term.teacher_log;
    student_gap += term.student_gap;
    teacher_gap += term.teacher_gap;
  }
  RowSums<float> sums;
  sums.student = student;
  sums.teacher = teacher;
  sums.student_log = student_log;
  sums.teacher_log = teacher_log;
  sums.student_gap = student_gap;
  sums.teacher_gap = teacher_gap;
  return sums;
}

struct MixtureSums {
  double student = 0, teacher = 0;
};

inline float token_logprob(const LogitRows& rows, std::int64_t row, std::int64_t token, float maximum,
                           double log_normalizer) {
  float buffer, derivative;
  const double logit = *load(rows, row, token, 1, &buffer, &derivative);
  return static_cast<float>((logit - maximum) - log_normalizer);
}

// The sums of `mixture_term` over a row whose normalisers are known.
inline MixtureSums mixture_of_row(const LogitRows& student, const LogitRows& teacher, std::int64_t row,
                                  std::int64_t vocab_size, float student_max, float log_normalizer,
                                  float teacher_max, float teacher_log_normalizer, float jsd_weight) {
  Block block;
  MixtureSums sums;
  for (std::int64_t begin = 0; begin < vocab_size; begin += kSumBlock) {
    const std::int64_t size = vocab_size - begin < kSumBlock ? vocab_size - begin : kSumBlock;
    const float* student_logits = load(student, row, begin, size, block.student, block.derivative);
    const float* teacher_logits = load(teacher, row, begin, size, block.teacher, block.derivative);
    float student_sum = 0, teacher_sum = 0;
#pragma omp simd reduction(+ : student_sum, teacher_sum)
    for (std::int64_t v = 0; v < size; ++v) {
      const float p = exp_shifted(student_logits[v] - student_max - log_normalizer);
      const float q = exp_shifted(teacher_logits[v] - teacher_max - teacher_log_normalizer);
      const MixtureTerm term = mixture_term(p, q, jsd_weight);
      student_sum += term.student;
      teacher_sum += term.teacher;
    }
    sums.student += student_sum;
    sums.teacher += teacher_sum;
  }
  return sums;
}

void stats_of_row(const LogitRows& student, const LogitRows& teacher, const std::int64_t* tokens, const Cost& cost,
                  std::int64_t row, std::int64_t num_rows, std::int64_t vocab_size, float* statistics) {
  Block block;
  Maximum student_max, teacher_max;
  RowSums<double> sums;
  for (std::int64_t begin = 0; begin < vocab_size; begin += kSumBlock) {
    const std::int64_t size = vocab_size - begin < kSumBlock ? vocab_size - begin : kSumBlock;
    const float* student_logits = load(student, row, begin, size, block.student, block.derivative);
    const float* teacher_logits = load(teacher, row, begin, size, block.teacher, block.derivative);
    const float student_before = student_max.value, teacher_before = teacher_max.value;
    const bool student_raised = student_max.raise(student_logits, begin, size);
    const bool teacher_raised = teacher_max.raise(teacher_logits, begin, size);
    if (begin > 0 && (student_raised || teacher_raised)) {
      const double student_shift = static_cast<double>(student_before) - student_max.value;
      const double teacher_shift = static_cast<double>(teacher_before) - teacher_max.value;
      shift_sums(sums, student_shift < kFloor ? kFloor : student_shift,
                 teacher_shift < kFloor ? kFloor : teacher_shift);
    }
    add_sums(sums, sum_block(student_logits, teacher_logits, size, student_max.value, teacher_max.value));
  }
  const RowResult<double> result = finish(sums);
  const auto store = [&](Statistic statistic, double value) {
    statistics[statistic * num_rows + row] = static_cast<float>(value);
  };
  store(kForwardCe, result.forward_ce);
  store(kForwardKl, result.forward_kl);
  store(kReverseKl, result.reverse_kl);
  store(kEntropy, result.entropy);
  store(kTeacherEntropy, result.teacher_entropy);
  store(kAgree, student_max.index == teacher_max.index ? 1.0 : 0.0);
  store(kMaxLogit, student_max.value);
  store(kLogNormalizer, result.log_normalizer);
  store(kTeacherMaxLogit, teacher_max.value);
  store(kTeacherLogNormalizer, result.teacher_log_normalizer);
  MixtureSums mixture;
  if (cost.statistic == kJsd) {
    mixture = mixture_of_row(student, teacher, row, vocab_size, student_max.value, result.log_normalizer,
                             teacher_max.value, result.teacher_log_normalizer, cost.jsd_weight);
  }
  store(kJsd, cost.jsd_weight * mixture.teacher + (1.0 - cost.jsd_weight) * mixture.student);
  store(kStudentMixtureKl, mixture.student);
  store(kLogprob,
        tokens ? token_logprob(student, row, tokens[row], student_max.value, result.log_normalizer) : 0.0);
  store(kTeacherLogprob,
        tokens ? token_logprob(teacher, row, tokens[row], teacher_max.value, result.teacher_log_normalizer) : 0.0);
}

template <Statistic kCost>
inline void grad_block(const float* student_logits, const float* teacher_logits, std::int64_t size,
                       float student_max, float teacher_max, const RowGradient& row, float* out) {
#pragma omp simd
  for (std::int64_t v = 0; v < size; ++v) {
    out[v] = grad_logit<kCost>(student_logits[v] - student_max, teacher_logits[v] - teacher_max, row);
  }
}

inline auto grad_block_of(Statistic cost) {
  switch (cost) {
    case kReverseKl:
      return grad_block<kReverseKl>;
    case kJsd:
      return grad_block<kJsd>;
    case kEntropy:
      return grad_block<kEntropy>;
    default:
      return grad_block<kForwardCe>;
  }
}

// Rounds to the nearest bfloat16, ties to even; returns what the sum loses. NaN stays NaN. Inlined by GCC 12 the
// whole gradient takes 1.6 times as long.
[[gnu::noinline]] float round_block(const float* exact, std::int64_t size, std::uint16_t* out) {
  float lost = 0;
#pragma omp simd reduction(+ : lost)
  for (std::int64_t v = 0; v < size; ++v) {
    std::uint32_t bits;
    std::memcpy(&bits, &exact[v], sizeof bits);
    const std::uint32_t nearest = bits + 0x7fff + ((bits >> 16) & 1), quiet_nan = bits | 0x400000;
    const std::uint32_t kept = (exact[v] == exact[v] ? nearest : quiet_nan) & 0xffff0000;
    float rounded;
    std::memcpy(&rounded, &kept, sizeof rounded);
    lost += exact[v] - rounded;
    out[v] = static_cast<std::uint16_t>(kept >> 16);
  }
  return lost;
}

// Returns what the row's sum lost to rounding.
float grad_of_row(const LogitRows& student, const LogitRows& teacher, const std::int64_t* tokens,
                  const float* statistics, const Cost& cost, float cost_weight, float logprob_weight,
                  std::int64_t row, std::int64_t num_rows, std::int64_t vocab_size, const GradRows& grad) {
  const bool is_bf16 = grad.type == FloatType::kBFloat16;
  char* const row_of_grad = static_cast<char*>(grad.data) + row * grad.row_stride * (is_bf16 ? 2 : 4);
  float* const exact = reinterpret_cast<float*>(row_of_grad);
  auto* const rounded = reinterpret_cast<std::uint16_t*>(row_of_grad);
  if (cost_weight == 0.0f && logprob_weight == 0.0f) {
    std::memset(row_of_grad, 0, vocab_size * (is_bf16 ? 2 : 4));
    return 0.0f;
  }
  Block block;
  alignas(64) float buffer[kSumBlock];
  double lost = 0;
  const auto statistic = [&](Statistic which) { return statistics[which * num_rows + row]; };
  const float student_max = statistic(kMaxLogit), teacher_max = statistic(kTeacherMaxLogit);
  const std::int64_t token = logprob_weight != 0.0f ? tokens[row] : -1;
  const bool softcap = student.softcap != 0.0f;
  if (!softcap) {  // then d logit / d raw is one number
    cost_weight *= student.inverse_temperature;
    logprob_weight *= student.inverse_temperature;
  }
  const RowGradient gradient{statistic(kLogNormalizer),
                             statistic(kTeacherLogNormalizer),
                             cost_weight,
                             logprob_weight,
                             statistic(mean_statistic(cost.statistic)),
                             cost.jsd_weight};
  const auto grad_block = grad_block_of(cost.statistic);
  for (std::int64_t begin = 0; begin < vocab_size; begin += kSumBlock) {
    const std::int64_t size = vocab_size - begin < kSumBlock ? vocab_size - begin : kSumBlock;
    const float* teacher_logits = load(teacher, row, begin, size, block.teacher, block.derivative);
    const float* student_logits = load(student, row, begin, size, block.student, block.derivative);
    float* out = is_bf16 ? buffer : exact + begin;
    grad_block(student_logits, teacher_logits, size, student_max, teacher_max, gradient, out);
    if (token >= begin && token < begin + size) out[token - begin] += logprob_weight;
    if (softcap) {
#pragma omp simd
      for (std::int64_t v = 0; v < size; ++v) out[v] *= block.derivative[v];
    }
    // In place this writes where logits have been read: half as far into the row.
    if (is_bf16) lost += round_block(buffer, size, rounded + begin);
  }
  return static_cast<float>(lost);
}

}  // namespace

void row_stats(const LogitRows& student, const LogitRows& teacher, const std::int64_t* tokens, const Cost& cost,
               std::int64_t num_rows, std::int64_t vocab_size, float* statistics, int num_threads) {
#pragma omp parallel for num_threads(num_threads) schedule(static)
  for (std::int64_t row = 0; row < num_rows; ++row) {
    stats_of_row(student, teacher, tokens, cost, row, num_rows, vocab_size, statistics);
  }
}

void row_grad(const LogitRows& student, const LogitRows& teacher, const std::int64_t* tokens,
              const float* statistics, const Cost& cost, const float* cost_weight, const float* logprob_weight,
              std::int64_t num_rows, std::int64_t vocab_size, const GradRows& grad, float* rounding,
              int num_threads) {
#pragma omp parallel for num_threads(num_threads) schedule(static)
  for (std::int64_t row = 0; row < num_rows; ++row) {
    const float lost = grad_of_row(student, teacher, tokens, statistics, cost, cost_weight[row],
                                   logprob_weight ? logprob_weight[row] : 0.0f, row, num_rows, vocab_size, grad);
    if (rounding) rounding[row] = lost;
  }
}

void row_stats_grad(const LogitRows& student, const LogitRows& teacher, const std::int64_t* tokens,
                    const Cost& cost, const float* cost_weight, std::int64_t num_rows, std::int64_t vocab_size,
                    float* statistics, const GradRows& grad, float* rounding, int num_threads) {
#pragma omp parallel for num_threads(num_threads) schedule(static)
  for (std::int64_t row = 0; row < num_rows; ++row) {
    stats_of_row(student, teacher, tokens, cost, row, num_rows, vocab_size, statistics);
    const float lost = grad_of_row(student, teacher, tokens, statistics, cost, cost_weight[row], 0.0f, row,
                                   num_rows, vocab_size, grad);
    if (rounding) rounding[row] = lost;
  }
}

}  // namespace distil_kernels::DISTIL_ISA
