// Statistics and gradient of a row in one read of its logits, from compute capability 9.0 on. Not yet run on a GPU.
//
// A cluster of 1 to 8 blocks holds one row of both models in its shared memory (8 bytes per entry: a vocabulary of
// 151936 takes 152 KB in each of 8 blocks). Every thread copies the entries that it will sum, asynchronously and in
// four parts, and sums a part while the next ones arrive, so no barrier stands between loading and summing. The
// blocks then read each other's state (six sums, two maxima) through distributed shared memory, and write the
// gradient of the entries in their shared memory.
//
//     traffic per entry: 8 bytes read, 2 or 4 written; row_stats + row_grad read 16
//
// The weight of a row must not depend on its statistics: cross-entropy without credit. Rows, bias and gradient must
// begin at multiples of 16 bytes. Left out: copies by the bulk engine, and a persistent grid that loads the next
// row while this one is written.
#include <cooperative_groups.h>
#include <cuda_pipeline.h>
#include <cuda_runtime.h>

#include "rows.cuh"

namespace distil_kernels {
namespace {

namespace cg = cooperative_groups;

constexpr int kParts = 4;

// Returns how many entries of a row one block has: whole vectors.
inline int slice_size(std::int64_t vocab_size, int cluster_size) {
  const std::int64_t share = (vocab_size + cluster_size - 1) / cluster_size;
  return static_cast<int>((share + kVector - 1) / kVector * kVector);
}

// Returns where a part of a slice begins. A part is whole rounds of the block, so that a thread copies and sums the
// same entries.
__device__ inline int part_begin(int slice, int part) {
  constexpr int kRound = kThreads * kVector;
  const int rounds = (slice + kRound - 1) / kRound;
  const int begin = (rounds * part / kParts) * kRound;
  return begin < slice ? begin : slice;
}

// Copies the whole vectors of a part, and of one that is not whole the entries that exist: a size known when it is
// compiled makes the copy one instruction, and a switch of 17 cases otherwise.
__device__ inline void copy_part(const float* from, float* to, int begin, int end, int size) {
  int i = begin + static_cast<int>(threadIdx.x) * kVector;
#pragma unroll 2
  for (; i < end && i + kVector <= size; i += kThreads * kVector) {
    __pipeline_memcpy_async(to + i, from + i, kVector * sizeof(float));
  }
  if (i < end && i < size) {
    for (int k = 0; k < kVector; ++k) {
      if (i + k < size) {
        __pipeline_memcpy_async(to + i + k, from + i + k, sizeof(float));
      } else {
        to[i + k] = 0.0f;
      }
    }
  }
}

// One block's share of a row, in shared memory.
struct Slice {
  float* student;
  float* teacher;
  int first;  // column of its first entry
  int size;   // entries inside the vocabulary
};

// Turns raw outputs into logits in shared memory, then sums them about maxima that it raises once for the part.
template <bool kSoftcap>
__device__ inline void sum_part(const RowTask& task, const Slice& slice, int begin, int end,
                                RowState<float>& state) {
  if (end > slice.size) end = slice.size;
  const int thread_first = begin + static_cast<int>(threadIdx.x) * kVector;
  float s[kVector], t[kVector];
  Peak student_peak = state.student, teacher_peak = state.teacher;
  bool raised = false;
  const auto raise_vector = [&](int i, int count) {
    load_floats<kVector>(slice.student + i, kVector, 0.0f, s);
    load_floats<kVector>(slice.teacher + i, kVector, 0.0f, t);
    transform<kVector, kSoftcap>(task.student, slice.first + i, count, s);
    transform<kVector, kSoftcap>(task.teacher, slice.first + i, count, t);
    raised |= raise<kVector>(student_peak, s, slice.first + i);
    raised |= raise<kVector>(teacher_peak, t, slice.first + i);
    *reinterpret_cast<float4*>(slice.student + i) = {s[0], s[1], s[2], s[3]};
    *reinterpret_cast<float4*>(slice.teacher + i) = {t[0], t[1], t[2], t[3]};
  };
  int i = thread_first;
#pragma unroll 2
  for (; i + kVector <= end; i += kThreads * kVector) raise_vector(i, kVector);
  if (i < end) raise_vector(i, end - i);
  if (raised) move_to(state, student_peak, teacher_peak);
  for (i = thread_first; i < end; i += kThreads * kVector) {
    load_floats<kVector>(slice.student + i, kVector, 0.0f, s);
    load_floats<kVector>(slice.teacher + i, kVector, 0.0f, t);
    accumulate<kVector>(state, s, t);
  }
}

// A row's maxima and log-normalisers: all that its gradient takes from its statistics.
struct Normalizers {
  float student_max, teacher_max, student_log, teacher_log;
};

// Writes the gradient of a slice. Returns what the sum of this thread's entries loses to rounding.
template <bool kSoftcap>
__device__ inline float write_grad(const LogitRows& student, const Slice& slice, const Normalizers& normalizers,
                                   std::int64_t row, const GradRows& grad) {
  const float cost_weight = grad.cost_weight[row];
  const RowGradient gradient{normalizers.student_log, normalizers.teacher_log, cost_weight, 0.0f, 0.0f, 0.0f};
  float residual = 0.0f;
  for_groups<kVector, 1>(slice.size, [&](int i, auto whole) {
    float s[kVector], t[kVector], out[kVector] = {};
    load_floats<kVector>(slice.student + i, kVector, 0.0f, s);
    load_floats<kVector>(slice.teacher + i, kVector, 0.0f, t);
    if (cost_weight != 0.0f) {
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        out[k] = grad_logit<kForwardCe>(at_least_floor(s[k] - normalizers.student_max),
                                        at_least_floor(t[k] - normalizers.teacher_max), gradient);
        out[k] *= derivative_at<kSoftcap>(student, s[k]);
      }
    }
    residual +=
        store_grad<kVector>(grad, row, slice.first + i, decltype(whole)::value ? kVector : slice.size - i, out);
  });
  return residual;
}

template <bool kSoftcap>
__global__ void __launch_bounds__(kThreads, 1) row_stats_grad(RowTask task, GradRows grad, int slice_entries) {
  extern __shared__ float4 storage[];
  __shared__ BlockScratch scratch;
  __shared__ double residual_by_warp[kWarps];
  __shared__ RowState<double> block_sums, row_sums;
  __shared__ Normalizers normalizers;
  const LogitRows &student = task.student, &teacher = task.teacher;
  const cg::cluster_group cluster = cg::this_cluster();
  const int rank = static_cast<int>(cluster.block_rank()), num_blocks = static_cast<int>(cluster.num_blocks());
  const std::int64_t row = blockIdx.x / num_blocks;
  const int first = rank * slice_entries, remaining = static_cast<int>(task.vocab_size) - first;
  const Slice slice{reinterpret_cast<float*>(storage), reinterpret_cast<float*>(storage) + slice_entries, first,
                    remaining < 0 ? 0 : (remaining < slice_entries ? remaining : slice_entries)};
  const float* student_raw = student.raw + row * student.row_stride + first;
  const float* teacher_raw = teacher.raw + row * teacher.row_stride + first;
#pragma unroll 1
  for (int part = 0; part < kParts; ++part) {
    const int begin = part_begin(slice_entries, part), end = part_begin(slice_entries, part + 1);
    copy_part(student_raw, slice.student, begin, end, slice.size);
    copy_part(teacher_raw, slice.teacher, begin, end, slice.size);
    __pipeline_commit();
  }
  // Read the token's logits before any block may overwrite them with the gradient.
  __shared__ float student_token, teacher_token;  // in shared memory, as `row_sums`: they are needed at the end
  if (task.tokens != nullptr && rank == 0 && threadIdx.x == 0) {
    student_token = token_logit(student, row, task.tokens[row], task.vocab_size);
    teacher_token = token_logit(teacher, row, task.tokens[row], task.vocab_size);
  }
  RowState<float> state;
#pragma unroll 1
  for (int part = 0; part < kParts; ++part) {
    __pipeline_wait_prior(kParts - 1 - part);
    sum_part<kSoftcap>(task, slice, part_begin(slice_entries, part), part_begin(slice_entries, part + 1), state);
  }
  const RowState<double> merged_block = block_state(state, scratch);
  if (threadIdx.x == 0) block_sums = merged_block;
  cluster.sync();
  if (threadIdx.x < kWarp) {
    RowState<double> merged;
    if (static_cast<int>(threadIdx.x) < num_blocks) merged = *cluster.map_shared_rank(&block_sums, threadIdx.x);
    merged = warp_state(merged);
    if (threadIdx.x == 0) {
      row_sums = merged;  // in shared memory: registers would hold them while the gradient is written
      normalizers = {merged.student.value, merged.teacher.value, static_cast<float>(log(merged.sums.student)),
                     static_cast<float>(log(merged.sums.teacher))};
    }
  }
  cluster.sync();  // `normalizers` are written, and no block reads another block's memory any more
  const float residual = write_grad<kSoftcap>(student, slice, normalizers, row, grad);
  // The statistics come last: only one thread has work for them, and the other blocks do not wait for it.
  if (rank == 0 && threadIdx.x == 0) store_statistics(task, row, row_sums, student_token, teacher_token);
  if (grad.residual == nullptr) return;
  const double total = block_sum(residual, residual_by_warp);
  if (threadIdx.x == 0) grad.residual[blockIdx.x] = static_cast<float>(total);
}

// The launch of a cluster kernel: clusters of cluster_size blocks, with a slice of a row in each block.
struct ClusterLaunch {
  ClusterLaunch(std::int64_t num_rows, int slice, int cluster_size, void* stream) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster_size;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.gridDim = static_cast<unsigned>(num_rows * cluster_size);
    config.blockDim = kThreads;
    config.dynamicSmemBytes = 2 * slice * sizeof(float);
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = 1;
  }

  // Lets a kernel have its shared memory, which is more than the 48 KB that need no permission.
  template <typename Kernel>
  cudaError_t allow_shared_memory(Kernel kernel) const {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                static_cast<int>(config.dynamicSmemBytes));
  }

  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};
};

}  // namespace

int cuda_row_stats_grad(const RowTask& task, const GradRows& grad, int cluster_size, void* stream) {
  if (task.num_rows == 0) return cudaSuccess;
  const int slice = slice_size(task.vocab_size, cluster_size);
  const bool softcap = task.student.softcap != 0.0f || task.teacher.softcap != 0.0f;
  const auto kernel = softcap ? row_stats_grad<true> : row_stats_grad<false>;
  const ClusterLaunch launch(task.num_rows, slice, cluster_size, stream);
  const cudaError_t error = launch.allow_shared_memory(kernel);
  if (error != cudaSuccess) return error;
  return cudaLaunchKernelEx(&launch.config, kernel, task, grad, slice);
}

int cuda_max_clusters(std::int64_t vocab_size, bool softcap, int cluster_size, int& num_clusters) {
  const auto kernel = softcap ? row_stats_grad<true> : row_stats_grad<false>;
  const ClusterLaunch launch(1, slice_size(vocab_size, cluster_size), cluster_size, nullptr);
  const cudaError_t error = launch.allow_shared_memory(kernel);
  if (error != cudaSuccess) return error;
  return cudaOccupancyMaxActiveClusters(&num_clusters, kernel, &launch.config);
}

}  // namespace distil_kernels
