// Runs the kernels of csrc/cuda on the CPU, so that their logic is tested where there is no GPU.
//
// A block is one operating-system thread; its CUDA threads are fibers of it that take turns, so `__shared__` is
// thread_local. Barriers and shuffles let the other fibers run until all have arrived. The blocks of a cluster run
// at the same time; another block's shared memory is found by its distance from an anchor. It cannot show races,
// memory ordering, or what only the hardware does.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ thread_local
#define __launch_bounds__(...)

using cudaError_t = int;
using cudaStream_t = void*;
constexpr int cudaSuccess = 0;
struct Dim {
  unsigned x = 0, y = 0, z = 0;
};
struct float4 {
  float x, y, z, w;
};
struct uint2 {
  unsigned x, y;
};

namespace emulated {

constexpr int kWarpSize = 32;
constexpr std::size_t kStackBytes = 64 * 1024;

// Fibers that must all arrive before any goes on; values exchanged on the way.
struct Gathering {
  int arrived = 0, generation = 0;
  double values[kWarpSize];
};

struct Cluster {
  explicit Cluster(int size) : barrier(size), anchors(size) {}
  std::barrier<> barrier;
  std::vector<char*> anchors;
};

// A fiber is entered by its context, once, and from then on by a jump: a switch of contexts is a call of the system.
struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  ucontext_t start;
  jmp_buf place;
  bool started = false, done = false;
};

struct Block {
  std::vector<Fiber> fibers;
  jmp_buf scheduler;
  Gathering all;
  std::vector<Gathering> warps;
  int current = 0, rank = 0;
  Cluster* cluster = nullptr;
  std::function<void()> kernel;
};

inline thread_local Block* block = nullptr;
inline thread_local char anchor = 0;

inline void yield() {
  if (_setjmp(block->fibers[block->current].place) == 0) _longjmp(block->scheduler, 1);
}

inline void wait(Gathering& gathering, int count) {
  const int generation = gathering.generation;
  if (++gathering.arrived == count) {
    gathering.arrived = 0;
    ++gathering.generation;
  } else {
    while (gathering.generation == generation) yield();
  }
}

inline void fiber() {
  block->kernel();
  block->fibers[block->current].done = true;
  yield();
}

// Lets a fiber run until it yields.
inline void resume(Fiber& fiber) {
  if (_setjmp(block->scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

inline void run_block(int num_threads) {
  block->fibers = std::vector<Fiber>(num_threads);
  block->warps.resize(num_threads / kWarpSize);
  for (Fiber& each : block->fibers) {
    getcontext(&each.start);
    each.start.uc_stack.ss_sp = each.stack.get();
    each.start.uc_stack.ss_size = kStackBytes;
    makecontext(&each.start, fiber, 0);
  }
  for (bool running = true; running;) {
    running = false;
    for (block->current = 0; block->current < num_threads; ++block->current) {
      if (block->fibers[block->current].done) continue;
      running = true;
      resume(block->fibers[block->current]);
    }
  }
}

}  // namespace emulated

inline thread_local Dim blockIdx;
struct ThreadIndex {
  struct {
    operator unsigned() const { return emulated::block->current; }
  } x;
};
inline ThreadIndex threadIdx;

// The hardware's exponential: 2 to the power of a rounded product, here off by up to 2 ulp in either direction.
inline float __expf(float x) {
  const float power = x * 1.44269504f;
  if (power == 0.0f) return 1.0f;  // this one is exact
  const float exact = static_cast<float>(std::exp2(static_cast<double>(power)));
  if (!std::isnormal(exact)) return exact < 1.0f ? 0.0f : exact;  // infinity, NaN, or flushed to 0
  std::uint32_t bits;
  std::memcpy(&bits, &power, sizeof bits);
  const int ulps = static_cast<int>((bits * 2654435761u) >> 29) % 5 - 2;  // -2 to 2, the same for the same x
  float result = exact;
  for (int i = 0; i < (ulps < 0 ? -ulps : ulps); ++i) result = std::nextafter(result, ulps < 0 ? 0.0f : INFINITY);
  return std::isnormal(result) ? result : exact;
}

inline void __syncthreads() { emulated::wait(emulated::block->all, emulated::block->fibers.size()); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int offset) {
  const int lane = emulated::block->current % emulated::kWarpSize;
  emulated::Gathering& warp = emulated::block->warps[emulated::block->current / emulated::kWarpSize];
  std::memcpy(&warp.values[lane], &value, sizeof value);
  emulated::wait(warp, emulated::kWarpSize);
  T other;
  std::memcpy(&other, &warp.values[lane ^ offset], sizeof other);
  emulated::wait(warp, emulated::kWarpSize);
  return other;
}

constexpr int cudaLaunchAttributeClusterDimension = 4, cudaFuncAttributeMaxDynamicSharedMemorySize = 8;
struct cudaLaunchAttribute {
  int id;
  struct {
    Dim clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  unsigned gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
inline int cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
// Of an H100.
constexpr int cudaDevAttrComputeCapabilityMajor = 75, cudaDevAttrComputeCapabilityMinor = 76;
constexpr int cudaDevAttrMaxSharedMemoryPerBlockOptin = 97;
inline int cudaDeviceGetAttribute(int* value, int attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor   ? 9
           : attribute == cudaDevAttrComputeCapabilityMinor ? 0
                                                            : 227 * 1024;
  return cudaSuccess;
}
template <typename Kernel>
int cudaOccupancyMaxActiveClusters(int* count, Kernel, const struct cudaLaunchConfig_t*) {
  return *count = 1, cudaSuccess;
}
inline const char* cudaGetErrorString(int) { return "emulated"; }
template <typename Kernel>
int cudaFuncSetAttribute(Kernel, int, int) {
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
int cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  const int size = config->numAttrs > 0 ? config->attrs->val.clusterDim.x : 1;
  for (unsigned first = 0; first < config->gridDim; first += size) {
    emulated::Cluster cluster(size);
    std::vector<std::thread> blocks;
    for (int rank = 0; rank < size; ++rank) {
      blocks.emplace_back([&, rank] {
        emulated::Block state;
        state.rank = rank;
        state.cluster = &cluster;
        state.kernel = [&] { kernel(arguments...); };
        emulated::block = &state;
        blockIdx.x = first + rank;
        cluster.anchors[rank] = &emulated::anchor;
        cluster.barrier.arrive_and_wait();
        emulated::run_block(config->blockDim);
      });
    }
    for (std::thread& each : blocks) each.join();
  }
  return cudaSuccess;
}
