// Statistics and gradient of a row in one read of its logits, for compute capability 9.0. Not yet run on a GPU.
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
__host__ __device__ inline std::int64_t slice_size(std::int64_t vocab_size, int cluster_size) {
  const std::int64_t share = (vocab_size + cluster_size - 1) / cluster_size;
  return (share + kVector - 1) / kVector * kVector;
}

// Returns where a part of a slice begins. A part is whole rounds of the block, so that a thread copies and sums the
// same entries.
__device__ inline std::int64_t part_begin(std::int64_t slice, int part) {
  constexpr std::int64_t kRound = kThreads * kVector;
  const std::int64_t rounds = (slice + kRound - 1) / kRound;
  const std::int64_t begin = (rounds * part / kParts) * kRound;
  return begin < slice ? begin : slice;
}

__device__ inline void copy_part(const float* from, float* to, std::int64_t begin, std::int64_t end,
                                 std::int64_t size) {
  for (std::int64_t i = begin + threadIdx.x * kVector; i < end; i += kThreads * kVector) {
    const std::int64_t count = size - i < kVector ? size - i : kVector;
    if (count > 0) {
      __pipeline_memcpy_async(to + i, from + i, kVector * sizeof(float), (kVector - count) * sizeof(float));
    }
  }
}

// One block's share of a row, in shared memory.
struct Slice {
  float* student;
  float* teacher;
  std::int64_t first;  // column of its first entry
  std::int64_t size;   // entries inside the vocabulary
};

// Turns raw outputs into logits in shared memory, then sums them about maxima that it raises once for the part.
template <bool kSoftcap>
__device__ inline void sum_part(const RowTask& task, const Slice& slice, std::int64_t begin, std::int64_t end,
                                RowState<float>& state) {
  if (end > slice.size) end = slice.size;
  float s[kVector], t[kVector];
  Peak student_peak = state.student, teacher_peak = state.teacher;
  bool raised = false;
  for (std::int64_t i = begin + threadIdx.x * kVector; i < end; i += kThreads * kVector) {
    const std::int64_t count = slice.size - i;
    load_floats<kVector>(slice.student + i, kVector, 0.0f, s);
    load_floats<kVector>(slice.teacher + i, kVector, 0.0f, t);
    transform<kVector, kSoftcap>(task.student, slice.first + i, count, s);
    transform<kVector, kSoftcap>(task.teacher, slice.first + i, count, t);
    raised |= raise<kVector>(student_peak, s, slice.first + i);
    raised |= raise<kVector>(teacher_peak, t, slice.first + i);
    *reinterpret_cast<float4*>(slice.student + i) = {s[0], s[1], s[2], s[3]};
    *reinterpret_cast<float4*>(slice.teacher + i) = {t[0], t[1], t[2], t[3]};
  }
  if (raised) move_to(state, student_peak, teacher_peak);
  for (std::int64_t i = begin + threadIdx.x * kVector; i < end; i += kThreads * kVector) {
    load_floats<kVector>(slice.student + i, kVector, 0.0f, s);
    load_floats<kVector>(slice.teacher + i, kVector, 0.0f, t);
    accumulate<kVector>(state, s, t);
  }
}

// Writes the gradient of a slice. Returns what the sum of this thread's entries loses to rounding.
template <bool kSoftcap>
__device__ inline float write_grad(const LogitRows& student, const Slice& slice, const RowState<double>& row_state,
                                   std::int64_t row, const GradRows& grad) {
  const float cost_weight = grad.cost_weight[row];
  const RowGradient gradient{static_cast<float>(log(row_state.sums.student)),
                             static_cast<float>(log(row_state.sums.teacher)),
                             cost_weight,
                             0.0f,
                             0.0f,
                             0.0f};
  float residual = 0.0f;
  for (std::int64_t i = threadIdx.x * kVector; i < slice.size; i += kThreads * kVector) {
    float s[kVector], t[kVector], out[kVector] = {};
    load_floats<kVector>(slice.student + i, kVector, 0.0f, s);
    load_floats<kVector>(slice.teacher + i, kVector, 0.0f, t);
    if (cost_weight != 0.0f) {
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        out[k] = grad_logit<kForwardCe>(at_least_floor(s[k] - row_state.student.value),
                                        at_least_floor(t[k] - row_state.teacher.value), gradient);
        out[k] *= derivative_at<kSoftcap>(student, s[k]);
      }
    }
    residual += store_grad<kVector>(grad, row, slice.first + i, slice.size - i, out);
  }
  return residual;
}

template <bool kSoftcap>
__global__ void __launch_bounds__(kThreads, 1)
    row_stats_grad(RowTask task, GradRows grad, std::int64_t slice_entries) {
  extern __shared__ float4 storage[];
  __shared__ BlockScratch scratch;
  __shared__ double residual_by_warp[kWarps];
  __shared__ RowState<double> block_sums, row_sums;
  const LogitRows &student = task.student, &teacher = task.teacher;
  const cg::cluster_group cluster = cg::this_cluster();
  const int rank = static_cast<int>(cluster.block_rank()), num_blocks = static_cast<int>(cluster.num_blocks());
  const std::int64_t row = blockIdx.x / num_blocks, first = rank * slice_entries;
  const std::int64_t remaining = task.vocab_size - first;
  const Slice slice{reinterpret_cast<float*>(storage), reinterpret_cast<float*>(storage) + slice_entries, first,
                    remaining < 0 ? 0 : (remaining < slice_entries ? remaining : slice_entries)};
  const float* student_raw = student.raw + row * student.row_stride + first;
  const float* teacher_raw = teacher.raw + row * teacher.row_stride + first;
#pragma unroll 1
  for (int part = 0; part < kParts; ++part) {
    const std::int64_t begin = part_begin(slice_entries, part);
    const std::int64_t end = part_begin(slice_entries, part + 1);
    copy_part(student_raw, slice.student, begin, end, slice.size);
    copy_part(teacher_raw, slice.teacher, begin, end, slice.size);
    __pipeline_commit();
  }
  // Read the token's logits before any block may overwrite them with the gradient.
  float student_token = 0.0f, teacher_token = 0.0f;
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
    if (threadIdx.x < num_blocks) merged = *cluster.map_shared_rank(&block_sums, threadIdx.x);
    merged = warp_state(merged);
    if (threadIdx.x == 0) {
      row_sums = merged;
      if (rank == 0) store_statistics(task, row, merged, student_token, teacher_token);
    }
  }
  cluster.sync();  // `row_sums` is written, and no block reads another block's memory any more
  const float residual = write_grad<kSoftcap>(student, slice, row_sums, row, grad);
  if (grad.residual == nullptr) return;
  const double total = block_sum(residual, residual_by_warp);
  if (threadIdx.x == 0) grad.residual[blockIdx.x] = static_cast<float>(total);
}

}  // namespace

int cuda_row_stats_grad(const RowTask& task, const GradRows& grad, int cluster_size, void* stream) {
  if (task.num_rows == 0) return cudaSuccess;
  const std::int64_t slice = slice_size(task.vocab_size, cluster_size);
  const bool softcap = task.student.softcap != 0.0f || task.teacher.softcap != 0.0f;
  const auto kernel = softcap ? row_stats_grad<true> : row_stats_grad<false>;
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = cluster_size;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(task.num_rows * cluster_size);
  config.blockDim = kThreads;
  config.dynamicSmemBytes = 2 * slice * sizeof(float);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = 1;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                 static_cast<int>(config.dynamicSmemBytes));
  if (error != cudaSuccess) return error;
  return cudaLaunchKernelEx(&config, kernel, task, grad, slice);
}

}  // namespace distil_kernels
