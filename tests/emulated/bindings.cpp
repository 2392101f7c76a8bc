// The extension with csrc/cuda run by the emulator: everything in one translation unit, blocks of 64 threads.
#define DISTIL_CUDA
#define PYBIND11_COMPILER_TYPE "_emulated"  // its types live beside those of the real extension
#define DISTIL_THREADS 64
#define DISTIL_ISA portable
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#define __CUDA_ARCH__ 900  // from here on the code of a GPU: its exponential

namespace distil_kernels {
namespace {
alignas(16) thread_local float4 storage[16384];  // dynamic shared memory
}
}  // namespace distil_kernels

#include "../../csrc/cpu/dispatch.cpp"
#include "../../csrc/cpu/row_kernels.cpp"
#include "../../csrc/cpu/sparse_kernels.cpp"
#include "../../csrc/cuda/cost_to_go.cu"
#include "../../csrc/cuda/row_cluster.cu"
#include "../../csrc/cuda/row_kernels.cu"
#include "../../python/bindings.cpp"
