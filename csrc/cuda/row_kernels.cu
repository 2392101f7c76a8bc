// Row statistics and row gradient on a GPU, a block per row: the baseline, from sm_80 on. Not yet run on a GPU.
//
//     row_stats   reads 8 bytes per entry of the vocabulary, once
//     row_grad    reads them again and writes 2 or 4
//
// The mathematics is row_math.h's, as on the CPU. No shared memory beyond one reduction's scratch.
// Left out: several blocks per row. A chunk has hundreds of rows, several for every multiprocessor.
#include <cuda_runtime.h>

#include "rows.cuh"

namespace distil_kernels {
namespace {

// Vectors of both rows that a thread loads before it uses the first. It raises its maxima once for all of them: in
// nearly every step some thread of a warp raises its maxima, and the other threads of the warp then wait for it.
constexpr int kGroup = 2;

template <int kWidth, bool kSoftcap>
__global__ void __launch_bounds__(kThreads, 2) row_stats(RowTask task) {
  __shared__ BlockScratch scratch;
  const LogitRows &student = task.student, &teacher = task.teacher;
  const std::int64_t row = blockIdx.x;
  const int vocab_size = static_cast<int>(task.vocab_size);
  RowState<float> state;
  for_groups<kWidth, kGroup>(vocab_size, [&](int first, auto whole) {
    constexpr int kStep = kThreads * kWidth;
    float s[kGroup][kWidth], t[kGroup][kWidth];
    Peak student_peak = state.student, teacher_peak = state.teacher;
    bool raised = false;
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      const int column = first + g * kStep, count = decltype(whole)::value ? kWidth : vocab_size - column;
      load_raw<kWidth>(student, row, column, count, s[g]);
      load_raw<kWidth>(teacher, row, column, count, t[g]);
    }
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      const int column = first + g * kStep, count = decltype(whole)::value ? kWidth : vocab_size - column;
      transform<kWidth, kSoftcap>(student, column, count, s[g]);
      transform<kWidth, kSoftcap>(teacher, column, count, t[g]);
      raised |= raise<kWidth>(student_peak, s[g], column);
      raised |= raise<kWidth>(teacher_peak, t[g], column);
    }
    if (raised) move_to(state, student_peak, teacher_peak);
#pragma unroll
    for (int g = 0; g < kGroup; ++g) accumulate<kWidth>(state, s[g], t[g]);
  });
  const RowState<double> total = block_state(state, scratch);
  if (threadIdx.x == 0) {
    const std::int64_t token = task.tokens != nullptr ? task.tokens[row] : -1;
    store_statistics(task, row, total, token_logit(student, row, token, vocab_size),
                     token_logit(teacher, row, token, vocab_size));
  }
}

// Writes kJsd and kStudentMixtureKl, from the maxima and normalisers that row_stats wrote.
template <int kWidth, bool kSoftcap>
__global__ void __launch_bounds__(kThreads) row_mixture(RowTask task) {
  __shared__ double scratch[2][kWarps];
  const LogitRows &student = task.student, &teacher = task.teacher;
  const std::int64_t row = blockIdx.x;
  const int vocab_size = static_cast<int>(task.vocab_size);
  const float jsd_weight = task.cost.jsd_weight;
  const auto statistic = [&](Statistic which) -> float& { return task.statistics[which * task.num_rows + row]; };
  const float student_max = statistic(kMaxLogit), teacher_max = statistic(kTeacherMaxLogit);
  const float log_normalizer = statistic(kLogNormalizer), teacher_log_normalizer = statistic(kTeacherLogNormalizer);
  MixtureTerm sums{0.0f, 0.0f};
  for_groups<kWidth, 1>(vocab_size, [&](int column, auto whole) {
    const int count = decltype(whole)::value ? kWidth : vocab_size - column;
    float s[kWidth], t[kWidth];
    load_logits<kWidth, kSoftcap>(student, row, column, count, s);
    load_logits<kWidth, kSoftcap>(teacher, row, column, count, t);
    MixtureTerm of_vector{0.0f, 0.0f};  // sums a vector's terms before the thread's, as `accumulate` does
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const MixtureTerm term =
          mixture_term(exp_shifted(at_least_floor(s[i] - student_max) - log_normalizer),
                       exp_shifted(at_least_floor(t[i] - teacher_max) - teacher_log_normalizer), jsd_weight);
      of_vector.student += term.student;
      of_vector.teacher += term.teacher;
    }
    sums.student += of_vector.student;
    sums.teacher += of_vector.teacher;
  });
  const double student_sum = block_sum(sums.student, scratch[0]), teacher_sum = block_sum(sums.teacher, scratch[1]);
  if (threadIdx.x == 0) {
    statistic(kStudentMixtureKl) = static_cast<float>(student_sum);
    statistic(kJsd) = static_cast<float>(jsd_weight * teacher_sum + (1.0 - jsd_weight) * student_sum);
  }
}

// What a gradient kernel can do: a cost that is not S - T is chosen when the kernel runs.
enum GradKind : int { kForward = 0, kAnyCost = 1, kAnyCostAndTerms = 2 };

template <int kWidth, bool kSoftcap, int kKind>
__global__ void __launch_bounds__(kThreads) row_grad(RowTask task, GradRows grad) {
  __shared__ double scratch[kWarps];
  float residual = 0.0f;
  const LogitRows &student = task.student, &teacher = task.teacher;
  const std::int64_t row = blockIdx.x;
  const int vocab_size = static_cast<int>(task.vocab_size);
  const float cost_weight = grad.cost_weight[row];
  const float logprob_weight = grad.logprob_weight ? grad.logprob_weight[row] : 0.0f;
  float terms[kNumTermWeights] = {};
  bool used = cost_weight != 0.0f || logprob_weight != 0.0f;
  if (kKind == kAnyCostAndTerms) {
#pragma unroll
    for (int i = 0; i < kNumTermWeights; ++i) {
      terms[i] = grad.term_weights[i * task.num_rows + row];
      used |= terms[i] != 0.0f;
    }
  }
  const int token = logprob_weight != 0.0f ? static_cast<int>(task.tokens[row]) : -1;
  const int label = terms[kLabelWeight] != 0.0f ? static_cast<int>(grad.labels[row]) : -1;
  const auto statistic = [&](Statistic which) { return task.statistics[which * task.num_rows + row]; };
  const float student_max = statistic(kMaxLogit), teacher_max = statistic(kTeacherMaxLogit);
  const RowGradient gradient{statistic(kLogNormalizer),
                             statistic(kTeacherLogNormalizer),
                             cost_weight,
                             logprob_weight,
                             statistic(mean_statistic(task.cost.statistic)),
                             task.cost.jsd_weight,
                             terms[kStudentWeight],
                             terms[kStudentLogWeight],
                             terms[kUniformWeight]};
  for_groups<kWidth, kGroup>(vocab_size, [&](int first, auto whole) {
    constexpr int kStep = kThreads * kWidth;
    float s[kGroup][kWidth], t[kGroup][kWidth];
    if (used) {
#pragma unroll
      for (int g = 0; g < kGroup; ++g) {
        const int column = first + g * kStep, count = decltype(whole)::value ? kWidth : vocab_size - column;
        load_raw<kWidth>(student, row, column, count, s[g]);
        load_raw<kWidth>(teacher, row, column, count, t[g]);
      }
    }
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      const int column = first + g * kStep, count = decltype(whole)::value ? kWidth : vocab_size - column;
      float out[kWidth] = {};
      if (used) {
        transform<kWidth, kSoftcap>(student, column, count, s[g]);
        transform<kWidth, kSoftcap>(teacher, column, count, t[g]);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          const float shifted_s = at_least_floor(s[g][i] - student_max);
          const float shifted_t = at_least_floor(t[g][i] - teacher_max);
          out[i] = kKind == kForward ? grad_logit<kForwardCe>(shifted_s, shifted_t, gradient)
                                     : grad_logit_of<kKind == kAnyCostAndTerms>(task.cost.statistic, shifted_s,
                                                                                shifted_t, gradient);
          if (column + i == token) out[i] += logprob_weight;
          if (kKind == kAnyCostAndTerms && column + i == label) out[i] += terms[kLabelWeight];
          out[i] *= derivative_at<kSoftcap>(student, s[g][i]);
        }
      }
      residual += store_grad<kWidth>(grad, row, column, count, out);
    }
  });
  if (grad.residual == nullptr) return;
  const double total = block_sum(residual, scratch);
  if (threadIdx.x == 0) grad.residual[row] = static_cast<float>(total);
}

// Calls launch(width, softcap) with both as compile-time constants.
template <typename Launch>
int with_variant(const RowTask& task, bool vectors, const Launch& launch) {
  const bool softcap = task.student.softcap != 0.0f || task.teacher.softcap != 0.0f;
  using One = std::integral_constant<int, 1>;
  using Four = std::integral_constant<int, kVector>;
  if (vectors) return softcap ? launch(Four{}, std::true_type{}) : launch(Four{}, std::false_type{});
  return softcap ? launch(One{}, std::true_type{}) : launch(One{}, std::false_type{});
}

}  // namespace

int cuda_device_error() {
  int count = 0;
  return cudaGetDeviceCount(&count);
}

int cuda_device_limits(int device, DeviceLimits& limits) {
  int error = cudaDeviceGetAttribute(&limits.capability_major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&limits.capability_minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error != cudaSuccess) return error;
  return cudaDeviceGetAttribute(&limits.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

const char* cuda_error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int cuda_row_stats(const RowTask& task, void* stream) {
  if (task.num_rows == 0) return cudaSuccess;
  const bool vectors = starts_at_vectors(task.student) && starts_at_vectors(task.teacher);
  return with_variant(task, vectors, [&](auto width, auto softcap) {
    const int error = launch(row_stats<width, softcap>, task.num_rows, stream, task);
    return error != cudaSuccess || task.cost.statistic != kJsd ? error : cuda_row_mixture(task, stream);
  });
}

int cuda_row_mixture(const RowTask& task, void* stream) {
  if (task.num_rows == 0) return cudaSuccess;
  const bool vectors = starts_at_vectors(task.student) && starts_at_vectors(task.teacher);
  return with_variant(task, vectors, [&](auto width, auto softcap) {
    return launch(row_mixture<width, softcap>, task.num_rows, stream, task);
  });
}

int cuda_row_grad(const RowTask& task, const GradRows& grad, void* stream) {
  if (task.num_rows == 0) return cudaSuccess;
  const bool vectors =
      starts_at_vectors(task.student) && starts_at_vectors(task.teacher) && starts_at_vectors(grad);
  return with_variant(task, vectors, [&](auto width, auto softcap) {
    const bool is_forward = task.cost.statistic == kForwardCe || task.cost.statistic == kForwardKl;
    const auto plain = is_forward ? row_grad<width, softcap, kForward> : row_grad<width, softcap, kAnyCost>;
    const auto kernel = grad.term_weights != nullptr ? row_grad<width, softcap, kAnyCostAndTerms> : plain;
    return launch(kernel, task.num_rows, stream, task, grad);
  });
}

}  // namespace distil_kernels
