// C (+)= A B with bfloat16 operands and float32 results, on processors that have AVX512-BF16.
//
// Vendor libraries behind torch round such a product's result to bfloat16 on the CPU, which costs the logits the
// digits that their difference needs. Here sums stay float32; float32 operands are rounded to bfloat16 while they
// are packed.
//
// The usual three levels: a panel of B (kDepth x kColumns) stays in the outer cache, a block of A (kRows x kDepth)
// in the second level, and the inner kernel keeps an 8 x 48 tile of C in 24 registers. vdpbf16ps multiplies pairs
// of neighbours along the depth, so packed panels hold [depth / 2][lanes][2], padded with zeros to whole panels.
#include "gemm_bf16.h"

#include <immintrin.h>

#include <algorithm>
#include <cstdlib>
#include <memory>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace distil_kernels {
namespace {

constexpr int kTileRows = 8, kTileColumns = 48, kVector = 16;
constexpr int kTransposed = 2 * kVector;  // depth that one transposition takes
constexpr std::int64_t kRows = 256, kColumns = 1920, kDepth = 576;
static_assert(kRows % kTileRows == 0 && kColumns % kTileColumns == 0 && kDepth % kTransposed == 0, "whole panels");

using Pair = std::uint32_t;  // two bfloat16 neighbours along the depth

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
};

__mmask16 first(std::int64_t count) {
  return count >= kVector ? __mmask16(0xffff) : count <= 0 ? __mmask16(0) : __mmask16((1u << count) - 1);
}

// 16 consecutive elements as 32-bit integers, bfloat16 in the low half; `count` of them exist.
__m512i load_lanes(const Lanes& in, std::int64_t lane, std::int64_t depth, std::int64_t count) {
  if (in.is_bf16) {
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(count), in.at<std::uint16_t>(lane, depth)));
  }
  const __m512 values = _mm512_maskz_loadu_ps(first(count), in.at<float>(lane, depth));
  return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(values));
}

// 32 consecutive elements as 16 pairs; `count` of them exist.
__m512i load_pairs(const Lanes& in, std::int64_t lane, std::int64_t depth, std::int64_t count) {
  if (in.is_bf16) {
    const __mmask32 mask = count >= 32 ? ~__mmask32(0) : (__mmask32(1) << count) - 1;
    return _mm512_maskz_loadu_epi16(mask, in.at<std::uint16_t>(lane, depth));
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

// Lanes [lane, lane + num_lanes) and depths [depth, depth + num_depths) to panels of kWidth lanes.
template <int kWidth>
void pack(const Lanes& in, std::int64_t lane, std::int64_t num_lanes, std::int64_t depth, std::int64_t num_depths,
          Pair* out) {
  const std::int64_t num_pairs = (num_depths + 1) / 2;
  const int step = std::min(kWidth, kVector);
  const __mmask16 mask = first(step);
  const auto room = [&](std::int64_t l, std::int64_t pair) {
    return out + (l / kWidth) * kWidth * num_pairs + pair * kWidth + l % kWidth;
  };
  const std::int64_t padded_lanes = round_up(num_lanes, kWidth);
  if (in.depth_stride == 1) {
    for (std::int64_t l = 0; l < padded_lanes; l += step) {
      const int rows_here = static_cast<int>(std::clamp<std::int64_t>(num_lanes - l, 0, step));
      for (std::int64_t k = 0; k < num_depths; k += kTransposed) {
        __m512i rows[kVector];
        for (int i = 0; i < kVector; ++i) {
          rows[i] =
              i < rows_here ? load_pairs(in, lane + l + i, depth + k, num_depths - k) : _mm512_setzero_si512();
        }
        transpose(rows);
        const int pairs_here = static_cast<int>(std::min<std::int64_t>(kVector, num_pairs - k / 2));
        for (int i = 0; i < pairs_here; ++i) _mm512_mask_storeu_epi32(room(l, k / 2 + i), mask, rows[i]);
      }
    }
  } else {  // lanes are consecutive
    for (std::int64_t pair = 0; pair < num_pairs; ++pair) {
      const std::int64_t k = depth + 2 * pair;
      const bool whole = 2 * pair + 1 < num_depths;
      for (std::int64_t l = 0; l < padded_lanes; l += step) {
        const std::int64_t here = std::min<std::int64_t>(step, num_lanes - l);
        const __m512i low = load_lanes(in, lane + l, k, here);
        const __m512i high = load_lanes(in, lane + l, k + whole, whole ? here : 0);
        _mm512_mask_storeu_epi32(room(l, pair), mask, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
      }
    }
  }
}

// What becomes of a tile: added to C, written, or written past the caches. The last is for a C that is larger than
// they are and complete: fetching 50 MB of lines only to overwrite them costs a tenth of the product.
enum class Store { kAdd, kWrite, kStream };

// One panel of A times one panel of B to c[0:rows, 0:columns].
void multiply_tile(const Pair* a, const Pair* b, std::int64_t num_pairs, float* c, std::int64_t c_stride, int rows,
                   int columns, Store store) {
  constexpr int kVectors = kTileColumns / kVector;
  __m512 sums[kTileRows][kVectors];
  for (auto& row : sums) {
    for (auto& sum : row) sum = _mm512_setzero_ps();
  }
  for (std::int64_t pair = 0; pair < num_pairs; ++pair, a += kTileRows, b += kTileColumns) {
    __m512bh right[kVectors];
    for (int j = 0; j < kVectors; ++j) right[j] = (__m512bh)_mm512_loadu_si512(b + j * kVector);
    for (int i = 0; i < kTileRows; ++i) {
      const __m512bh left = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[i]));
      for (int j = 0; j < kVectors; ++j) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], left, right[j]);
    }
  }
  const bool whole_lines = rows == kTileRows && columns == kTileColumns && c_stride % kVector == 0 &&
                           reinterpret_cast<std::uintptr_t>(c) % sizeof(__m512) == 0;
  if (store == Store::kStream && whole_lines) {
    for (int i = 0; i < kTileRows; ++i) {
      for (int j = 0; j < kVectors; ++j) _mm512_stream_ps(c + i * c_stride + j * kVector, sums[i][j]);
    }
    return;
  }
  for (int i = 0; i < kTileRows; ++i) {
    if (i >= rows) break;
    for (int j = 0; j < kVectors; ++j) {
      const __mmask16 mask = first(columns - j * kVector);
      float* to = c + i * c_stride + j * kVector;
      const __m512 before = store == Store::kAdd ? _mm512_maskz_loadu_ps(mask, to) : _mm512_setzero_ps();
      _mm512_mask_storeu_ps(to, mask, _mm512_add_ps(before, sums[i][j]));
    }
  }
}

struct Free {
  void operator()(Pair* block) const { std::free(block); }
};

// Room for packed panels, kept by each thread for its next product.
Pair* packing_room() {
  constexpr std::size_t kBytes = (kRows + kColumns) * kDepth * sizeof(std::uint16_t);
  thread_local const std::unique_ptr<Pair, Free> room(static_cast<Pair*>(std::aligned_alloc(64, kBytes)));
  return room.get();
}

// One thread's part: rows [row, row_end), columns [column, column_end).
void multiply_part(const Lanes& a, const Lanes& b, std::int64_t row, std::int64_t row_end, std::int64_t column,
                   std::int64_t column_end, std::int64_t depth, float* c, std::int64_t c_stride, bool accumulate) {
  Pair* const packed_a = packing_room();
  Pair* const packed_b = packed_a + kRows * kDepth / 2;
  const std::int64_t num_blocks = (depth + kDepth - 1) / kDepth;
  const std::int64_t block =
      round_up((depth + num_blocks - 1) / std::max<std::int64_t>(num_blocks, 1), kTransposed);
  for (std::int64_t k = 0; k < depth; k += block) {
    const std::int64_t depth_here = std::min(block, depth - k), num_pairs = (depth_here + 1) / 2;
    const Store store = accumulate || k > 0 ? Store::kAdd : num_blocks == 1 ? Store::kStream : Store::kWrite;
    for (std::int64_t j = column; j < column_end; j += kColumns) {
      const std::int64_t columns = std::min(kColumns, column_end - j);
      pack<kTileColumns>(b, j, columns, k, depth_here, packed_b);
      for (std::int64_t i = row; i < row_end; i += kRows) {
        const std::int64_t rows = std::min(kRows, row_end - i);
        pack<kTileRows>(a, i, rows, k, depth_here, packed_a);
        for (std::int64_t jj = 0; jj < columns; jj += kTileColumns) {
          for (std::int64_t ii = 0; ii < rows; ii += kTileRows) {
            multiply_tile(packed_a + ii * num_pairs, packed_b + jj * num_pairs, num_pairs,
                          c + (i + ii) * c_stride + j + jj, c_stride,
                          static_cast<int>(std::min<std::int64_t>(kTileRows, rows - ii)),
                          static_cast<int>(std::min<std::int64_t>(kTileColumns, columns - jj)), store);
          }
        }
      }
    }
  }
  _mm_sfence();  // streamed tiles are seen by other threads
}

}  // namespace

namespace avx512_bf16 {

void gemm(const Matrix& a, const Matrix& b, std::int64_t num_rows, std::int64_t num_columns, std::int64_t depth,
          float* c, std::int64_t c_stride, bool accumulate, int num_threads) {
  const Lanes left{a.data, a.row_stride, a.column_stride, a.is_bf16};
  const Lanes right{b.data, b.column_stride, b.row_stride, b.is_bf16};
  // Threads divide the longer side of C, then what is left of them the other; the depth never, so that the order of
  // every sum is the same for any number of threads.
  const std::int64_t row_tiles = (num_rows + kTileRows - 1) / kTileRows;
  const std::int64_t column_tiles = (num_columns + kTileColumns - 1) / kTileColumns;
  std::int64_t row_parts = 1, column_parts = 1;
  if (num_columns >= num_rows) {
    column_parts = std::clamp<std::int64_t>(column_tiles, 1, num_threads);
    row_parts = std::clamp<std::int64_t>(row_tiles, 1, num_threads / column_parts);
  } else {
    row_parts = std::clamp<std::int64_t>(row_tiles, 1, num_threads);
    column_parts = std::clamp<std::int64_t>(column_tiles, 1, num_threads / row_parts);
  }
#pragma omp parallel for schedule(static) num_threads(num_threads)
  for (std::int64_t part = 0; part < row_parts * column_parts; ++part) {
    const std::int64_t i = part / column_parts, j = part % column_parts;
    const auto border = [](std::int64_t tiles, std::int64_t parts, std::int64_t at, int tile, std::int64_t size) {
      return std::min(tiles * at / parts * tile, size);
    };
    multiply_part(left, right, border(row_tiles, row_parts, i, kTileRows, num_rows),
                  border(row_tiles, row_parts, i + 1, kTileRows, num_rows),
                  border(column_tiles, column_parts, j, kTileColumns, num_columns),
                  border(column_tiles, column_parts, j + 1, kTileColumns, num_columns), depth, c, c_stride,
                  accumulate);
  }
}

void rounding_residual(const float* a, std::int64_t row_stride, std::int64_t num_rows, std::int64_t num_columns,
                       float* residual, int num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads)
  for (std::int64_t row = 0; row < num_rows; ++row) {
    __m512 sum = _mm512_setzero_ps();
    for (std::int64_t column = 0; column < num_columns; column += kVector) {
      const __m512 exact = _mm512_maskz_loadu_ps(first(num_columns - column), a + row * row_stride + column);
      const __m512i rounded = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(exact));
      sum = _mm512_add_ps(sum, _mm512_sub_ps(exact, _mm512_castsi512_ps(_mm512_slli_epi32(rounded, 16))));
    }
    residual[row] = _mm512_reduce_add_ps(sum);
  }
}

}  // namespace avx512_bf16
}  // namespace distil_kernels
