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

#include "bf16_operands.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace distil_kernels {
namespace {

constexpr int kTileRows = 8, kTileColumns = 48;
constexpr std::int64_t kRows = 256, kColumns = 1920, kDepth = 576;
static_assert(kRows % kTileRows == 0 && kColumns % kTileColumns == 0 && kDepth % kTransposed == 0, "whole panels");

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

// One thread's part: rows [row, row_end), columns [column, column_end).
void multiply_part(const Lanes& a, const Lanes& b, std::int64_t row, std::int64_t row_end, std::int64_t column,
                   std::int64_t column_end, std::int64_t depth, float* c, std::int64_t c_stride, bool accumulate) {
  Pair* const packed_a = packing_room<(kRows + kColumns) * kDepth * sizeof(std::uint16_t)>();
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
  const std::int64_t row_tiles = (num_rows + kTileRows - 1) / kTileRows;
  const std::int64_t column_tiles = (num_columns + kTileColumns - 1) / kTileColumns;
  const Parts parts = share_out(row_tiles, column_tiles, num_columns >= num_rows, num_threads);
#pragma omp parallel for schedule(static) num_threads(num_threads)
  for (std::int64_t part = 0; part < parts.rows * parts.columns; ++part) {
    const std::int64_t i = part / parts.columns, j = part % parts.columns;
    multiply_part(left, right, border(row_tiles, parts.rows, i, kTileRows, num_rows),
                  border(row_tiles, parts.rows, i + 1, kTileRows, num_rows),
                  border(column_tiles, parts.columns, j, kTileColumns, num_columns),
                  border(column_tiles, parts.columns, j + 1, kTileColumns, num_columns), depth, c, c_stride,
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
