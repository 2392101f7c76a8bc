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

// Terms summed in float before they join a double: 64 of each lane, since the rounding of a lane that begins with
// the row's one large term grows with how many follow.
constexpr std::int64_t kSumBlock = 64 * kLanes;

}  // namespace distil_kernels::DISTIL_ISA
