// Products with the large entries of a matrix, on the CPU: one source, compiled once per instruction set.
//
// Lists are compressed rows: the entries of row r are offsets[r] to offsets[r + 1], indices ascending. The same
// product serves dh (rows of the gradient times W) and, after a transposition, dW (its columns times h):
//
//     out[r] += sum over entries of value * dense[index]
//
// It walks panels of columns that fit the registers, and blocks of dense rows whose panel stays in the second-level
// cache while every list passes over it. Each thread writes its output rows alone; the rows are divided so that
// every thread has about as many entries. The file uses no templates of the standard library: the linker must not
// merge copies built for different instruction sets.
#include <cmath>
#include <cstring>

#include "kernels.h"
#include "lanes.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace distil_kernels::DISTIL_ISA {
namespace {

constexpr int kPanel = 12;  // vectors; with the broadcast value they fit 16 registers

constexpr std::int64_t kBlockBytes = 512 * 1024;  // half of a usual second-level cache
constexpr float kSmallest = 1.401298464e-45f;     // above 0: a zero is never large

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef std::uint32_t Bits __attribute__((vector_size(4 * kLanes)));
typedef std::uint16_t Halves __attribute__((vector_size(2 * kLanes)));

inline void read(const float* from, float& to) { to = *from; }
inline void read(const float* from, Vector& to) { std::memcpy(&to, from, sizeof to); }

// A bfloat16 is the upper half of a float.
inline void read(const std::uint16_t* from, float& to) {
  const std::uint32_t bits = static_cast<std::uint32_t>(*from) << 16;
  std::memcpy(&to, &bits, sizeof to);
}
inline void read(const std::uint16_t* from, Vector& to) {
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  to = reinterpret_cast<Vector>(__builtin_convertvector(halves, Bits) << 16);
}

// Running sums of kVectors times Lanes columns.
template <typename Lanes, int kVectors, typename Element>
struct Sums {
  static constexpr std::int64_t kStep = sizeof(Lanes) / sizeof(float), kWidth = kVectors * kStep;
  Lanes of[kVectors];

  void load(const float* out) {
    for (int i = 0; i < kVectors; ++i) read(out + i * kStep, of[i]);
  }
  void add(float value, const Element* row) {
    for (int i = 0; i < kVectors; ++i) {
      Lanes term;
      read(row + i * kStep, term);
      of[i] += value * term;
    }
  }
  void store(float* out) const { std::memcpy(out, of, sizeof of); }
};

#if defined(__AVX512F__)
// Sums of bfloat16 rows, even and odd columns apart: a shift and a mask widen 32 neighbours in place.
template <int kPairs>
struct PairedSums {
  static constexpr std::int64_t kWidth = kPairs * 32;
  __m512 even[kPairs], odd[kPairs];

  void load(const float* out) {
    const __m512i evens = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odds = _mm512_or_si512(evens, _mm512_set1_epi32(1));
    for (int i = 0; i < kPairs; ++i) {
      const __m512 low = _mm512_loadu_ps(out + i * 32), high = _mm512_loadu_ps(out + i * 32 + 16);
      even[i] = _mm512_permutex2var_ps(low, evens, high);
      odd[i] = _mm512_permutex2var_ps(low, odds, high);
    }
  }
  void add(float value, const std::uint16_t* row) {
    const __m512 factor = _mm512_set1_ps(value);
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
    for (int i = 0; i < kPairs; ++i) {
      const __m512i both = _mm512_loadu_si512(row + i * 32);
      even[i] = _mm512_fmadd_ps(factor, _mm512_castsi512_ps(_mm512_slli_epi32(both, 16)), even[i]);
      odd[i] = _mm512_fmadd_ps(factor, _mm512_castsi512_ps(_mm512_and_si512(both, upper)), odd[i]);
    }
  }
  void store(float* out) const {
    const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    for (int i = 0; i < kPairs; ++i) {
      _mm512_storeu_ps(out + i * 32, _mm512_permutex2var_ps(even[i], low, odd[i]));
      _mm512_storeu_ps(out + i * 32 + 16, _mm512_permutex2var_ps(even[i], high, odd[i]));
    }
  }
};
#endif

template <typename Sums, typename Element>
void multiply_panel(const SparseRows& rows, std::int64_t first, std::int64_t last, const Element* dense,
                    std::int64_t dense_rows, std::int64_t stride, float* out, std::int64_t out_stride,
                    std::int64_t* position) {
  constexpr std::int64_t kBlockRows = kBlockBytes / (Sums::kWidth * static_cast<std::int64_t>(sizeof(Element)));
  for (std::int64_t r = first; r < last; ++r) position[r] = rows.offsets[r];
  for (std::int64_t end = kBlockRows; end < dense_rows + kBlockRows; end += kBlockRows) {
    for (std::int64_t r = first; r < last; ++r) {
      const std::int64_t stop = rows.offsets[r + 1];
      std::int64_t entry = position[r];
      if (entry == stop || rows.index[entry] >= end) continue;
      Sums sums;
      sums.load(out + r * out_stride);
      do {
        sums.add(rows.value[entry], dense + rows.index[entry] * stride);
      } while (++entry < stop && rows.index[entry] < end);
      sums.store(out + r * out_stride);
      position[r] = entry;
    }
  }
}

template <typename Element>
void multiply(const SparseRows& rows, std::int64_t first, std::int64_t last, const DenseRows& dense, float* out,
              std::int64_t* position) {
  const auto* data = static_cast<const Element*>(dense.data);
  std::int64_t column = 0;
  const auto panel = [&](auto sums) {
    using Kind = decltype(sums);
    for (; column + Kind::kWidth <= dense.num_columns; column += Kind::kWidth) {
      multiply_panel<Kind>(rows, first, last, data + column, dense.num_rows, dense.row_stride, out + column,
                           dense.num_columns, position);
    }
  };
#if defined(__AVX512F__)
  if constexpr (sizeof(Element) == 2) {
    panel(PairedSums<6>());
    panel(PairedSums<2>());
  }
#endif
  panel(Sums<Vector, kPanel, Element>());
  panel(Sums<Vector, 4, Element>());
  panel(Sums<Vector, 1, Element>());
  panel(Sums<float, 1, Element>());
}

// First row (entry) whose offset (index) is not below `bound`, of those from first to last.
template <typename Integer>
inline std::int64_t lower_bound(const Integer* values, std::int64_t first, std::int64_t last, std::int64_t bound) {
  while (first < last) {
    const std::int64_t middle = first + (last - first) / 2;
    if (values[middle] < bound) {
      first = middle + 1;
    } else {
      last = middle;
    }
  }
  return first;
}

inline float largest(const float* row, std::int64_t size) {
  float largest = 0.0f;
#pragma omp simd reduction(max : largest)
  for (std::int64_t v = 0; v < size; ++v) {
    const float magnitude = std::fabs(row[v]);
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

// Returns the number of large entries, and in `dropped` the share of the row's absolute sum in the small ones.
inline std::int64_t count_row(const float* row, std::int64_t size, float cutoff, float* dropped) {
  std::int64_t total_count = 0;
  double total = 0.0, total_small = 0.0;
  for (std::int64_t begin = 0; begin < size; begin += kSumBlock) {
    const std::int64_t end = begin + kSumBlock < size ? begin + kSumBlock : size;
    int count = 0;
    float sum = 0.0f, small = 0.0f;
#pragma omp simd reduction(+ : count, sum, small)
    for (std::int64_t v = begin; v < end; ++v) {
      const float magnitude = std::fabs(row[v]);
      const bool is_small = magnitude < cutoff;  // false for NaN, which stays visible
      count += is_small ? 0 : 1;
      sum += magnitude;
      small += is_small ? magnitude : 0.0f;
    }
    total_count += count;
    total += sum;
    total_small += small;
  }
  *dropped = total_small > 0.0 ? static_cast<float>(total_small / total) : 0.0f;
  return total_count;
}

inline void select_row(const float* row, std::int64_t size, float cutoff, std::int32_t* index, float* value) {
  std::int64_t v = 0;
#if defined(__AVX512F__)
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  for (; v + 16 <= size; v += 16) {
    const __m512 entries = _mm512_loadu_ps(row + v);
    const __mmask16 keep = _mm512_cmp_ps_mask(_mm512_abs_ps(entries), _mm512_set1_ps(cutoff), _CMP_NLT_UQ);
    if (keep == 0) continue;
    // This compresses in a register: the instruction that compresses to memory takes some 140 cycles on Zen 4.
    const int count = __builtin_popcount(keep);
    const __mmask16 front = static_cast<__mmask16>((1u << count) - 1u);
    const __m512i indices = _mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int>(v)));
    _mm512_mask_storeu_ps(value, front, _mm512_maskz_compress_ps(keep, entries));
    _mm512_mask_storeu_epi32(index, front, _mm512_maskz_compress_epi32(keep, indices));
    value += count;
    index += count;
  }
#endif
  for (; v < size; ++v) {
    if (std::fabs(row[v]) < cutoff) continue;
    *value++ = row[v];
    *index++ = static_cast<std::int32_t>(v);
  }
}

}  // namespace

void Kernels::sparse_count(const float* dense, std::int64_t row_stride, std::int64_t num_rows,
                           std::int64_t num_columns, float threshold, float* cutoff, std::int64_t* counts,
                           float* dropped, int num_threads) {
#pragma omp parallel for num_threads(num_threads) schedule(static)
  for (std::int64_t r = 0; r < num_rows; ++r) {
    const float* row = dense + r * row_stride;
    const float bound = threshold * largest(row, num_columns);
    cutoff[r] = bound > kSmallest ? bound : kSmallest;
    counts[r] = count_row(row, num_columns, cutoff[r], dropped + r);
  }
}

void Kernels::sparse_select(const float* dense, std::int64_t row_stride, std::int64_t num_columns,
                            const float* cutoff, const SparseRows& out, int num_threads) {
#pragma omp parallel for num_threads(num_threads) schedule(static)
  for (std::int64_t r = 0; r < out.num_rows; ++r) {
    select_row(dense + r * row_stride, num_columns, cutoff[r], out.index + out.offsets[r],
               out.value + out.offsets[r]);
  }
}

void Kernels::sparse_transpose(const SparseRows& rows, const SparseRows& out, std::int64_t* position,
                               int num_threads) {
  // Each part has a range of columns, and searches every row for them.
  const auto for_entries_of = [&](int part, auto visit) {
    const std::int64_t first = out.num_rows * part / num_threads, last = out.num_rows * (part + 1) / num_threads;
    for (std::int64_t r = 0; r < rows.num_rows; ++r) {
      const std::int64_t stop = rows.offsets[r + 1];
      std::int64_t entry = lower_bound(rows.index, rows.offsets[r], stop, first);
      for (; entry < stop && rows.index[entry] < last; ++entry) visit(r, entry);
    }
  };
  for (std::int64_t c = 0; c < out.num_rows; ++c) position[c] = 0;
#pragma omp parallel for num_threads(num_threads) schedule(static, 1)
  for (int part = 0; part < num_threads; ++part) {
    for_entries_of(part, [&](std::int64_t, std::int64_t entry) { ++position[rows.index[entry]]; });
  }
  std::int64_t begin = 0;
  for (std::int64_t c = 0; c < out.num_rows; ++c) {
    const std::int64_t count = position[c];
    out.offsets[c] = position[c] = begin;
    begin += count;
  }
  out.offsets[out.num_rows] = begin;
#pragma omp parallel for num_threads(num_threads) schedule(static, 1)
  for (int part = 0; part < num_threads; ++part) {
    for_entries_of(part, [&](std::int64_t r, std::int64_t entry) {
      const std::int64_t to = position[rows.index[entry]]++;
      out.index[to] = static_cast<std::int32_t>(r);
      out.value[to] = rows.value[entry];
    });
  }
}

void Kernels::sparse_product(const SparseRows& rows, const DenseRows& dense, float* out, std::int64_t* position,
                             int num_threads) {
  const std::int64_t num_entries = rows.offsets[rows.num_rows];
  const auto border = [&](int part) {
    return part == num_threads ? rows.num_rows
                               : lower_bound(rows.offsets, 0, rows.num_rows, num_entries * part / num_threads);
  };
#pragma omp parallel for num_threads(num_threads) schedule(static, 1)
  for (int part = 0; part < num_threads; ++part) {
    const auto run = dense.is_bfloat16 ? multiply<std::uint16_t> : multiply<float>;
    run(rows, border(part), border(part + 1), dense, out, position);
  }
}

}  // namespace distil_kernels::DISTIL_ISA
