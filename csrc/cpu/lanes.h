// The vector width of the instruction set that a file is compiled for (DISTIL_ISA).
#pragma once

#include <cstdint>

namespace distil_kernels::DISTIL_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;  // floats
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;  // SSE, NEON
#endif

// Number of terms summed in float before they are added to a double: 64 in each lane. The rounding error of a lane
// that begins with the row's one large term grows with the number of terms after it.
constexpr std::int64_t kSumBlock = 64 * kLanes;

}  // namespace distil_kernels::DISTIL_ISA
