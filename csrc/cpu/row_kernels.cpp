// Row statistics and row gradient on the CPU: one source, compiled once per instruction set (DISTIL_ISA).
//
// A kernel walks a row in blocks that stay in the first-level cache. It transforms a block (bias, softcap,
// temperature), finds its maxima, and takes its six sums in vector lanes of float; it adds blocks in double, so the
// error does not grow with the vocabulary. OpenMP threads share the rows. The loops are plain C++ that the compiler
// vectorises: they are about a twentieth of an operation that is otherwise matrix products, so intrinsics would
// gain nothing that one can measure.
#include <cstring>

#include "../row_math.h"
#include "kernels.h"
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

// Returns a block's logits: the raw ones where there is nothing to apply to them, else those that it writes to
// `buffer`.
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

  // Takes a block in; true where it has a larger value than every block before it.
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

// Writes kJsd and kStudentMixtureKl of a row whose maxima and log-normalisers are known.
void mixture_of_row(const RowTask& task, std::int64_t row) {
  const auto statistic = [&](Statistic which) -> float& { return task.statistics[which * task.num_rows + row]; };
  const float student_max = statistic(kMaxLogit), teacher_max = statistic(kTeacherMaxLogit);
  const float log_normalizer = statistic(kLogNormalizer), teacher_log_normalizer = statistic(kTeacherLogNormalizer);
  const LogitRows &student = task.student, &teacher = task.teacher;
  const std::int64_t vocab_size = task.vocab_size;
  const float jsd_weight = task.cost.jsd_weight;
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
  statistic(kJsd) = static_cast<float>(jsd_weight * sums.teacher + (1.0 - jsd_weight) * sums.student);
  statistic(kStudentMixtureKl) = static_cast<float>(sums.student);
}

struct DivergenceSums {
  double student = 0, teacher = 0;
};

// The sums of `divergence_term` over a row whose maxima and normalisers are known.
inline DivergenceSums divergences_of_row(const RowTask& task, std::int64_t row, float student_max,
                                         double log_normalizer, float teacher_max, double teacher_log_normalizer) {
  const float student_log = static_cast<float>(log_normalizer),
              teacher_log = static_cast<float>(teacher_log_normalizer);
  const float difference = static_cast<float>(log_normalizer - teacher_log_normalizer);
  Block block;
  DivergenceSums sums;
  for (std::int64_t begin = 0; begin < task.vocab_size; begin += kSumBlock) {
    const std::int64_t size = task.vocab_size - begin < kSumBlock ? task.vocab_size - begin : kSumBlock;
    const float* student_logits = load(task.student, row, begin, size, block.student, block.derivative);
    const float* teacher_logits = load(task.teacher, row, begin, size, block.teacher, block.derivative);
    float student_sum = 0, teacher_sum = 0;
#pragma omp simd reduction(+ : student_sum, teacher_sum)
    for (std::int64_t v = 0; v < size; ++v) {
      const float s = at_least_floor(student_logits[v] - student_max);
      const float t = at_least_floor(teacher_logits[v] - teacher_max);
      const DivergenceTerm term =
          divergence_term(exp_shifted(s - student_log), exp_shifted(t - teacher_log), (s - t) - difference);
      student_sum += term.student;
      teacher_sum += term.teacher;
    }
    sums.student += student_sum;
    sums.teacher += teacher_sum;
  }
  return sums;
}

void stats_of_row(const RowTask& task, std::int64_t row) {
  const LogitRows &student = task.student, &teacher = task.teacher;
  const std::int64_t vocab_size = task.vocab_size;
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
  RowResult<double> result = finish(sums);
  const bool has_teacher = task.cost.statistic != kEntropy;
  if (has_teacher && (result.forward_kl < kNear || result.reverse_kl < kNear)) {
    const DivergenceSums near = divergences_of_row(task, row, student_max.value, result.log_normalizer,
                                                   teacher_max.value, result.teacher_log_normalizer);
    if (result.forward_kl < kNear) result.forward_kl = near.teacher;
    if (result.reverse_kl < kNear) result.reverse_kl = near.student;
  }
  const auto store = [&](Statistic statistic, double value) {
    task.statistics[statistic * task.num_rows + row] = static_cast<float>(value);
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
  store(kJsd, 0.0);
  store(kStudentMixtureKl, 0.0);
  if (task.cost.statistic == kJsd) mixture_of_row(task, row);
  const std::int64_t* tokens = task.tokens;
  store(kLogprob,
        tokens ? token_logprob(student, row, tokens[row], student_max.value, result.log_normalizer) : 0.0);
  store(kTeacherLogprob,
        tokens ? token_logprob(teacher, row, tokens[row], teacher_max.value, result.teacher_log_normalizer) : 0.0);
}

template <Statistic kCost, bool kTerms>
inline void grad_block(const float* student_logits, const float* teacher_logits, std::int64_t size,
                       float student_max, float teacher_max, const RowGradient& row, float* out) {
#pragma omp simd
  for (std::int64_t v = 0; v < size; ++v) {
    out[v] = grad_logit<kCost, kTerms>(student_logits[v] - student_max, teacher_logits[v] - teacher_max, row);
  }
}

template <bool kTerms>
inline auto grad_block_of(Statistic cost) {
  switch (cost) {
    case kReverseKl:
      return grad_block<kReverseKl, kTerms>;
    case kJsd:
      return grad_block<kJsd, kTerms>;
    case kEntropy:
      return grad_block<kEntropy, kTerms>;
    default:
      return grad_block<kForwardCe, kTerms>;
  }
}

// Rounds to the nearest bfloat16, ties to even; returns what the sum loses. NaN stays NaN. If GCC 12 inlines this
// function, the whole gradient takes 1.6 times as long.
[[gnu::noinline]] float round_block(const float* exact, std::int64_t size, std::uint16_t* out) {
  float residual = 0;
#pragma omp simd reduction(+ : residual)
  for (std::int64_t v = 0; v < size; ++v) {
    std::uint32_t bits;
    std::memcpy(&bits, &exact[v], sizeof bits);
    const std::uint32_t nearest = bits + 0x7fff + ((bits >> 16) & 1), quiet_nan = bits | 0x400000;
    const std::uint32_t rounded_bits = (exact[v] == exact[v] ? nearest : quiet_nan) & 0xffff0000;
    float rounded;
    std::memcpy(&rounded, &rounded_bits, sizeof rounded);
    residual += exact[v] - rounded;
    out[v] = static_cast<std::uint16_t>(rounded_bits >> 16);
  }
  return residual;
}

// Writes a row's gradient, and what its sum lost to rounding.
void grad_of_row(const RowTask& task, const GradRows& grad, std::int64_t row) {
  const LogitRows &student = task.student, &teacher = task.teacher;
  const std::int64_t vocab_size = task.vocab_size;
  float cost_weight = grad.cost_weight[row], logprob_weight = grad.logprob_weight ? grad.logprob_weight[row] : 0.0f;
  float terms[kNumTermWeights] = {};
  bool used = cost_weight != 0.0f || logprob_weight != 0.0f;
  for (int i = 0; grad.term_weights && i < kNumTermWeights; ++i) {
    terms[i] = grad.term_weights[i * task.num_rows + row];
    used |= terms[i] != 0.0f;
  }
  const bool is_bf16 = grad.type == FloatType::kBFloat16;
  char* const row_of_grad = static_cast<char*>(grad.data) + row * grad.row_stride * (is_bf16 ? 2 : 4);
  float* const exact = reinterpret_cast<float*>(row_of_grad);
  auto* const rounded = reinterpret_cast<std::uint16_t*>(row_of_grad);
  if (!used) {
    std::memset(row_of_grad, 0, vocab_size * (is_bf16 ? 2 : 4));
    if (grad.residual) grad.residual[row] = 0.0f;
    return;
  }
  Block block;
  alignas(64) float buffer[kSumBlock];
  double residual = 0;
  const auto statistic = [&](Statistic which) { return task.statistics[which * task.num_rows + row]; };
  const float student_max = statistic(kMaxLogit), teacher_max = statistic(kTeacherMaxLogit);
  const std::int64_t token = logprob_weight != 0.0f ? task.tokens[row] : -1;
  const std::int64_t label = terms[kLabelWeight] != 0.0f ? grad.labels[row] : -1;
  const bool softcap = student.softcap != 0.0f;
  if (!softcap) {  // d logit / d raw is the same number for the whole row
    cost_weight *= student.inverse_temperature;
    logprob_weight *= student.inverse_temperature;
    for (float& weight : terms) weight *= student.inverse_temperature;
  }
  const RowGradient gradient{statistic(kLogNormalizer),
                             statistic(kTeacherLogNormalizer),
                             cost_weight,
                             logprob_weight,
                             statistic(mean_statistic(task.cost.statistic)),
                             task.cost.jsd_weight,
                             terms[kStudentWeight],
                             terms[kStudentLogWeight],
                             terms[kUniformWeight]};
  const auto grad_block =
      grad.term_weights ? grad_block_of<true>(task.cost.statistic) : grad_block_of<false>(task.cost.statistic);
  for (std::int64_t begin = 0; begin < vocab_size; begin += kSumBlock) {
    const std::int64_t size = vocab_size - begin < kSumBlock ? vocab_size - begin : kSumBlock;
    const float* teacher_logits = load(teacher, row, begin, size, block.teacher, block.derivative);
    const float* student_logits = load(student, row, begin, size, block.student, block.derivative);
    float* out = is_bf16 ? buffer : exact + begin;
    grad_block(student_logits, teacher_logits, size, student_max, teacher_max, gradient, out);
    if (token >= begin && token < begin + size) out[token - begin] += logprob_weight;
    if (label >= begin && label < begin + size) out[label - begin] += terms[kLabelWeight];
    if (softcap) {
#pragma omp simd
      for (std::int64_t v = 0; v < size; ++v) out[v] *= block.derivative[v];
    }
    // In place, this overwrites only logits that were read before: it is half as far into the row.
    if (is_bf16) residual += round_block(buffer, size, rounded + begin);
  }
  if (grad.residual) grad.residual[row] = static_cast<float>(residual);
}

}  // namespace

void Kernels::row_stats(const RowTask& task, int num_threads) {
#pragma omp parallel for num_threads(num_threads) schedule(static)
  for (std::int64_t row = 0; row < task.num_rows; ++row) stats_of_row(task, row);
}

void Kernels::row_mixture(const RowTask& task, int num_threads) {
#pragma omp parallel for num_threads(num_threads) schedule(static)
  for (std::int64_t row = 0; row < task.num_rows; ++row) mixture_of_row(task, row);
}

void Kernels::row_grad(const RowTask& task, const GradRows& grad, int num_threads) {
#pragma omp parallel for num_threads(num_threads) schedule(static)
  for (std::int64_t row = 0; row < task.num_rows; ++row) grad_of_row(task, grad, row);
}

void Kernels::row_stats_grad(const RowTask& task, const GradRows& grad, int num_threads) {
#pragma omp parallel for num_threads(num_threads) schedule(static)
  for (std::int64_t row = 0; row < task.num_rows; ++row) {
    stats_of_row(task, row);
    grad_of_row(task, grad, row);
  }
}

}  // namespace distil_kernels::DISTIL_ISA
