// Helpers of the products in this folder: they read operands in either layout, divide the work among threads and
// store results. For processors with AVX-512 and its bfloat16 instructions.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>

#include "../distil_kernels.h"

namespace distil_kernels {
namespace {

constexpr int kVector = 16;
constexpr int kTransposed = 2 * kVector;  // depth that one transposition takes

using Pair = std::uint32_t;  // two bfloat16 neighbours along the depth, or a float

std::int64_t round_up(std::int64_t x, std::int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// An operand seen as lanes (rows of A, columns of B) by depth.
struct Lanes {
  const void* data;
  std::int64_t lane_stride, depth_stride;
  bool is_bf16;

  template <typename T>
  const T* at(std::int64_t lane, std::int64_t depth) const {
    return static_cast<const T*>(data) + lane * lane_stride + depth * depth_stride;
  }
  // Returns the words along the depth, which is consecutive.
  const Pair* words(std::int64_t lane, std::int64_t depth) const {
    return is_bf16 ? reinterpret_cast<const Pair*>(at<std::uint16_t>(lane, depth)) : at<Pair>(lane, depth);
  }
};

__mmask16 first(std::int64_t count) {
  return count >= kVector ? __mmask16(0xffff) : count <= 0 ? __mmask16(0) : __mmask16((1u << count) - 1);
}

// Loads 16 elements of bfloat16. A masked access of 16-bit elements takes many cycles.
__m256i load_bf16(const std::uint16_t* from, __mmask16 mask) {
  return mask == 0xffff ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))
                        : _mm256_maskz_loadu_epi16(mask, from);
}

// Loads 16 consecutive elements as 32-bit integers, bfloat16 in the low half; `count` of them exist.
__m512i load_lanes(const Lanes& in, std::int64_t lane, std::int64_t depth, std::int64_t count) {
  if (in.is_bf16) return _mm512_cvtepu16_epi32(load_bf16(in.at<std::uint16_t>(lane, depth), first(count)));
  const __m512 values = _mm512_maskz_loadu_ps(first(count), in.at<float>(lane, depth));
  return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(values));
}

// Loads 32 consecutive elements as 16 pairs; `count` of them exist.
__m512i load_pairs(const Lanes& in, std::int64_t lane, std::int64_t depth, std::int64_t count) {
  if (in.is_bf16) {
    const auto* const from = in.at<std::uint16_t>(lane, depth);
    if (count >= 2 * kVector) return _mm512_loadu_si512(from);
    return _mm512_maskz_loadu_epi16((__mmask32(1) << count) - 1, from);
  }
  const float* from = in.at<float>(lane, depth);
  const __m512 low = _mm512_maskz_loadu_ps(first(count), from);
  const __m512 high = _mm512_maskz_loadu_ps(first(count - kVector), from + kVector);
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

void transpose(__m512i (&rows)[kVector]) {
  __m512i t[kVector];
  for (int i = 0; i < kVector; i += 2) {
    t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < kVector; i += 4) {
    rows[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    rows[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

// Returns where part `at` of the columns or rows begins if `tiles` are divided evenly.
inline std::int64_t border(std::int64_t tiles, std::int64_t parts, std::int64_t at, int tile, std::int64_t size) {
  return std::min(tiles * at / parts * tile, size);
}

// The numbers of parts that C's rows and columns are divided into: the longer side first, the other side among the
// threads that remain. The depth is never divided, so the order of every sum is the same for any number of threads.
struct Parts {
  std::int64_t rows = 1, columns = 1;
};

inline Parts share_out(std::int64_t row_tiles, std::int64_t column_tiles, bool wide, int num_threads) {
  Parts parts;
  if (wide) {
    parts.columns = std::clamp<std::int64_t>(column_tiles, 1, num_threads);
    parts.rows = std::clamp<std::int64_t>(row_tiles, 1, num_threads / parts.columns);
  } else {
    parts.rows = std::clamp<std::int64_t>(row_tiles, 1, num_threads);
    parts.columns = std::clamp<std::int64_t>(column_tiles, 1, num_threads / parts.rows);
  }
  return parts;
}

// A tile is added to C, written, or written past the caches. The last is for a complete C that is larger than the
// caches: fetching 50 MB of lines only to overwrite them costs a tenth of the product.
enum class Store { kAdd, kWrite, kStream };

struct Free {
  void operator()(Pair* block) const { std::free(block); }
};

// Returns memory for packed operands, which each thread reuses for its next product. `size` is a multiple of 16.
inline Pair* packing_buffer(std::int64_t size) {
  thread_local std::unique_ptr<Pair, Free> buffer;
  thread_local std::int64_t buffer_size = 0;
  if (size > buffer_size) {
    buffer.reset();
    buffer.reset(static_cast<Pair*>(std::aligned_alloc(64, size * sizeof(Pair))));
    buffer_size = size;
  }
  return buffer.get();
}

}  // namespace
}  // namespace distil_kernels
