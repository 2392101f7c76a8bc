// Sums and maxima of a row across the threads of a block. Not yet run on a GPU.
//
//     thread   has RowSums<float> about the maxima of its entries
//     block    finds its maxima first; every thread then moves its sums to them once; the rest is plain additions:
//              shuffles in float within a warp, double across warps
//
// so the tree of additions has no exponential, and a row takes only a few operations in double.
#pragma once

#include "../row_math.h"

namespace distil_kernels {

constexpr int kWarp = 32;
#if !defined(DISTIL_THREADS)
#define DISTIL_THREADS 512
#endif
constexpr int kThreads = DISTIL_THREADS;  // of every block in csrc/cuda
constexpr int kWarps = kThreads / kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kNoIndex = 0x7fffffff;

// A largest value and the index of its first occurrence.
struct Peak {
  float value = kLowest;
  int index = kNoIndex;
};

__device__ inline Peak higher(const Peak& a, const Peak& b) {
  return b.value > a.value || (b.value == a.value && b.index < a.index) ? b : a;
}

__device__ inline Peak warp_peak(Peak peak) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    peak = higher(peak,
                  {__shfl_xor_sync(kAllLanes, peak.value, offset), __shfl_xor_sync(kAllLanes, peak.index, offset)});
  }
  return peak;
}

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), std::int64_t num_blocks, void* stream, const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(num_blocks);
  config.blockDim = kThreads;
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <typename Real>
__device__ inline Real warp_sum(Real value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

template <typename Real>
__device__ inline RowSums<Real> warp_sums(const RowSums<Real>& sums) {
  RowSums<Real> total;
  total.student = warp_sum(sums.student);
  total.teacher = warp_sum(sums.teacher);
  total.student_log = warp_sum(sums.student_log);
  total.teacher_log = warp_sum(sums.teacher_log);
  total.student_gap = warp_sum(sums.student_gap);
  total.teacher_gap = warp_sum(sums.teacher_gap);
  return total;
}

// Returns the sum over a block's threads, in thread 0. Every sum of a kernel has scratch of its own.
__device__ inline double block_sum(float value, double (&scratch)[kWarps]) {
  const float warp_total = warp_sum(value);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = warp_total;
  __syncthreads();
  double total = 0;
  if (threadIdx.x < kWarp) total = warp_sum(threadIdx.x < kWarps ? scratch[threadIdx.x] : 0.0);
  return total;
}

// The sums and maxima of a row, or of a part of it.
template <typename Real>
struct RowState {
  RowSums<Real> sums;
  Peak student, teacher;
};

template <typename Real>
__device__ inline void move_to(RowState<Real>& state, const Peak& student, const Peak& teacher) {
  const Real student_shift = static_cast<Real>(state.student.value) - student.value;
  const Real teacher_shift = static_cast<Real>(state.teacher.value) - teacher.value;
  shift_sums(state.sums, student_shift < kFloor ? static_cast<Real>(kFloor) : student_shift,
             teacher_shift < kFloor ? static_cast<Real>(kFloor) : teacher_shift);
  state.student = student;
  state.teacher = teacher;
}

// Merges the states of a warp's lanes. Every lane gets the result.
template <typename Real>
__device__ inline RowState<Real> warp_state(RowState<Real> state) {
  move_to(state, warp_peak(state.student), warp_peak(state.teacher));
  state.sums = warp_sums(state.sums);
  return state;
}

struct BlockScratch {
  Peak student[kWarps], teacher[kWarps];
  RowSums<float> sums[kWarps];
};

// Merges the states of a block's threads. Every lane of warp 0 gets the result.
__device__ inline RowState<double> block_state(RowState<float> state, BlockScratch& scratch) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  Peak student = warp_peak(state.student), teacher = warp_peak(state.teacher);
  if (lane == 0) {
    scratch.student[warp] = student;
    scratch.teacher[warp] = teacher;
  }
  __syncthreads();
  student = warp_peak(lane < kWarps ? scratch.student[lane] : Peak{});
  teacher = warp_peak(lane < kWarps ? scratch.teacher[lane] : Peak{});
  move_to(state, student, teacher);
  const RowSums<float> warp_total = warp_sums(state.sums);
  if (lane == 0) scratch.sums[warp] = warp_total;
  __syncthreads();
  RowState<double> result{{}, student, teacher};
  if (warp == 0) {
    if (lane < kWarps) add_sums(result.sums, scratch.sums[lane]);
    result.sums = warp_sums(result.sums);
  }
  return result;
}

}  // namespace distil_kernels
