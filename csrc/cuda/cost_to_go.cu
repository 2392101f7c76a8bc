// The scan of the credit over a chunk of rows: discounted sums of later costs. Not yet run on a GPU.
//
//     total[p] = sum_{p <= i < p + horizon} discount^(i - p) cost_i          to_go[p] = discount total[p + 1]
//
// A thread has one position of one sequence. It adds the costs from the farthest to that of its position by
// Horner's scheme, total = cost + discount total, in double; the kThreads positions of a block load the costs
// together into shared memory. Nothing is subtracted, and the order of the additions is fixed.
//
// Left out: a scan that passes totals from thread to thread. It would need one addition per cost and not one per
// cost of the window, which does not pay for the few hundred positions of a chunk (expected, not yet timed).
#include <cuda_runtime.h>

#include "reduce.cuh"

namespace distil_kernels {
namespace {

__device__ inline std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

__device__ inline double cost_at(const CostGrid& grid, std::int64_t position, std::int64_t sequence) {
  const std::int64_t behind = position - grid.num_positions;
  if (behind >= 0) return behind < grid.num_later ? grid.later[behind * grid.num_sequences + sequence] : 0.0;
  const std::int64_t slot = grid.slots[position * grid.num_sequences + sequence];
  return slot >= 0 ? grid.costs[slot] : 0.0;
}

__global__ void __launch_bounds__(kThreads)
    cost_to_go(CostGrid grid, double discount, std::int64_t horizon, float* to_go, double* next_later) {
  __shared__ double costs[kThreads];
  const std::int64_t sequence = blockIdx.x % grid.num_sequences;
  const std::int64_t begin = blockIdx.x / grid.num_sequences * kThreads, position = begin + threadIdx.x;
  std::int64_t end = grid.num_positions + grid.num_later;
  if (horizon != 0) end = smaller(end, begin + kThreads - 1 + horizon);
  double total = 0;
  for (std::int64_t first = begin + (end - 1 - begin) / kThreads * kThreads; first >= begin; first -= kThreads) {
    __syncthreads();
    costs[threadIdx.x] = cost_at(grid, first + threadIdx.x, sequence);
    __syncthreads();
    std::int64_t i = smaller(kThreads, end - first);
    if (horizon != 0) i = smaller(i, position + horizon - first);
    const std::int64_t last = first == begin ? threadIdx.x : 0;
    while (--i >= last) total = costs[i] + discount * total;
  }
  const std::int64_t cell = position * grid.num_sequences + sequence;
  if (position > 0 && position <= grid.num_positions) {
    to_go[cell - grid.num_sequences] = static_cast<float>(discount * total);
  }
  if (position < grid.num_later) next_later[cell] = horizon == 0 ? total : costs[threadIdx.x];
}

}  // namespace

int cuda_cost_to_go(const CostGrid& grid, double discount, std::int64_t horizon, float* to_go, double* next_later,
                    void* stream) {
  const std::int64_t num_cells = grid.num_positions < grid.num_later ? grid.num_later : grid.num_positions + 1;
  const std::int64_t num_blocks = (num_cells + kThreads - 1) / kThreads * grid.num_sequences;
  return launch(cost_to_go, num_blocks, stream, grid, discount, horizon, to_go, next_later);
}

}  // namespace distil_kernels
