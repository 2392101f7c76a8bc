// C (+)= A B with float32 or bfloat16 operands and float32 sums, on processors that have AVX-512 and its bfloat16
// instructions.
//
// Vendor libraries behind torch round a bfloat16 product's result to bfloat16 on the CPU, which costs the logits
// the digits that their difference needs; and some run float32 products at half of what AVX-512 gives on processors
// of another maker. Sums here are float32 for both; float32 operands of a bfloat16 product are rounded while they
// are packed.
//
// A word is 32 bits of an operand along the depth: one float, or a pair of bfloat16 neighbours (vdpbf16ps
// multiplies pairs). The inner kernel keeps 8 x 48 sums in 24 registers and for each word of the depth spreads 8
// words of one operand over vectors that it multiplies by 48 of the other:
//
//     spread   read where it lies if its depth is consecutive (W in the logits, the gradient in dh), else packed,
//              16 lanes side by side; a block of it stays in the second-level cache
//     panels   packed [words][48 lanes], each read from there once per block of the other
//
// The spread operand may be A or B: C's tiles are transposed as they are stored where it is B. So the head W is
// never packed for the logits, and a chunk of them costs the same however few rows it has.
#include "gemm.h"
#include "operands.h"

namespace distil_kernels {
namespace {

constexpr int kTile = 8, kPanel = 48, kGroup = 2 * kTile;
static_assert(kGroup == kVector && kPanel % kVector == 0, "a group's tile is transposed in squares of a vector");
constexpr std::int64_t kDeep = 512;   // words of a block along the depth; up to twice that is one block
constexpr std::int64_t kChain = 128;  // words summed in a register: rounding grows with the chain
constexpr std::int64_t kSpreadWords = 64 * kDeep;  // of a block: 128 KiB beside a panel of 96 KiB
constexpr std::int64_t kPanelWords = 1 << 20;      // of all panels of a block: 4 MiB of the outer cache
constexpr std::int64_t kLine = 64;                 // bytes
constexpr std::int64_t kLanesOfLine = 32;          // of bfloat16, side by side
constexpr std::int64_t kLarge = 1 << 20;           // elements of a C that no cache keeps

struct Float32 {
  static constexpr int kDepth = 1;
  static __m512i along(const Lanes& in, std::int64_t lane, std::int64_t depth, std::int64_t num_depths) {
    return _mm512_maskz_loadu_epi32(first(num_depths), in.at<float>(lane, depth));
  }
  static __m512i across(const Lanes& in, std::int64_t lane, std::int64_t num_lanes, std::int64_t depth,
                        std::int64_t) {
    return _mm512_maskz_loadu_epi32(first(num_lanes), in.at<float>(lane, depth));
  }
  static __m512 multiply_add(__m512i left, __m512i right, __m512 sum) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(left), _mm512_castsi512_ps(right), sum);
  }
};

struct BFloat16 {
  static constexpr int kDepth = 2;
  // 16 words of one lane.
  static __m512i along(const Lanes& in, std::int64_t lane, std::int64_t depth, std::int64_t num_depths) {
    return load_pairs(in, lane, depth, num_depths);
  }
  // One word of 16 lanes.
  static __m512i across(const Lanes& in, std::int64_t lane, std::int64_t num_lanes, std::int64_t depth,
                        std::int64_t num_depths) {
    if (in.is_bf16 && num_lanes >= kVector && num_depths > 1) {  // nearly always: one test for all of it
      const auto* const from = in.at<std::uint16_t>(lane, depth);
      return join(_mm512_cvtepu16_epi32(load_bf16(from, 0xffff)),
                  _mm512_cvtepu16_epi32(load_bf16(from + in.depth_stride, 0xffff)));
    }
    const bool whole = num_depths > 1;
    const __m512i low = load_lanes(in, lane, depth, num_lanes);
    const __m512i high = load_lanes(in, lane, depth + whole, whole ? num_lanes : 0);
    return join(low, high);
  }
  static __m512i join(__m512i low, __m512i high) { return _mm512_or_si512(low, _mm512_slli_epi32(high, 16)); }
  static __m512 multiply_add(__m512i left, __m512i right, __m512 sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)left, (__m512bh)right);
  }
};

// Packs lanes [lane, lane_end) to panels of [num_words][width], `width` a multiple of 16; the last panel is as many
// vectors wide as it has lanes for. Memory is read along its rows.
template <class Word>
void pack(const Lanes& in, std::int64_t lane, std::int64_t lane_end, std::int64_t depth, std::int64_t num_depths,
          std::int64_t num_words, int width, Pair* out) {
  const auto panel_width = [&](std::int64_t panel) {
    return std::min<std::int64_t>(width, round_up(lane_end - panel, kVector));
  };
  if (in.depth_stride != 1) {
    for (std::int64_t word = 0; word < num_words; ++word) {
      const std::int64_t k = word * Word::kDepth;
      for (std::int64_t panel = lane; panel < lane_end; panel += width) {
        const std::int64_t width_here = panel_width(panel);
        Pair* const to = out + (panel - lane) * num_words + word * width_here;
        for (std::int64_t l = 0; l < width_here; l += kVector) {
          const std::int64_t lanes_here = lane_end - panel - l;
          _mm512_storeu_si512(to + l, Word::across(in, panel + l, lanes_here, depth + k, num_depths - k));
        }
      }
    }
    return;
  }
  for (std::int64_t panel = lane; panel < lane_end; panel += width) {
    const std::int64_t width_here = panel_width(panel);
    for (std::int64_t l = 0; l < width_here; l += kVector) {
      Pair* const to = out + (panel - lane) * num_words + l;
      for (std::int64_t word = 0; word < num_words; word += kVector) {
        const std::int64_t k = word * Word::kDepth;
        __m512i rows[kVector];
        for (int i = 0; i < kVector; ++i) {
          const bool exists = panel + l + i < lane_end;
          rows[i] = exists ? Word::along(in, panel + l + i, depth + k, num_depths - k) : _mm512_setzero_si512();
        }
        transpose(rows);
        const int words_here = static_cast<int>(std::min<std::int64_t>(kVector, num_words - word));
        for (int i = 0; i < words_here; ++i) _mm512_storeu_si512(to + (word + i) * width_here, rows[i]);
      }
    }
  }
}

// Words of 16 lanes: lane i's are spread[i][0], spread[i][step], ...
struct Spread {
  const Pair* lane[kGroup];
  std::int64_t step;
  std::int64_t ahead;  // words to the lanes of the tile behind, which are asked for meanwhile; 0 for none
};

// 8 lanes times a panel of 16 kVectors lanes, words [word, end): to the tile from word 0 on, else added to it.
template <class Word, int kVectors>
void multiply_tile(const Pair* const* lanes, std::int64_t step, std::int64_t ahead, const Pair* panel,
                   std::int64_t word, std::int64_t end, float (*tile)[kPanel]) {
  const Pair* lane[kTile];
  __m512 sums[kTile][kVectors];
  const bool adds = word > 0;
  for (int i = 0; i < kTile; ++i) {
    lane[i] = lanes[i];
    for (auto& sum : sums[i]) sum = _mm512_setzero_ps();
  }
  panel += word * kVectors * kVector;
  for (std::int64_t at = word * step; word < end; ++word, at += step, panel += kVectors * kVector) {
    if (ahead != 0 && word % kVector == 0) {
      for (const Pair* each : lane) _mm_prefetch(each + at + ahead, _MM_HINT_T0);
    }
    __m512i right[kVectors];
    for (int j = 0; j < kVectors; ++j) right[j] = _mm512_loadu_si512(panel + j * kVector);
    for (int i = 0; i < kTile; ++i) {
      const __m512i left = _mm512_set1_epi32(static_cast<int>(lane[i][at]));
      for (int j = 0; j < kVectors; ++j) sums[i][j] = Word::multiply_add(left, right[j], sums[i][j]);
    }
  }
  for (int i = 0; i < kTile; ++i) {
    for (int j = 0; j < kVectors; ++j) {
      float* const to = tile[i] + j * kVector;
      _mm512_store_ps(to, adds ? _mm512_add_ps(_mm512_load_ps(to), sums[i][j]) : sums[i][j]);
    }
  }
}

struct Range {
  std::int64_t begin, end;
};

std::int64_t num_tiles(Range lanes, std::int64_t width) { return (lanes.end - lanes.begin + width - 1) / width; }

// Words summed in a register before they are added to the tile, from `word` on: a short rest joins them.
std::int64_t chain_end(std::int64_t word, std::int64_t num_words) {
  return num_words - word < kChain + kChain / 2 ? num_words : word + kChain;
}

// Asks for the block of an operand that is packed next, some lines at a time, while the one before it is
// multiplied: packing touches few lines of each of many rows, too few for the processor to foresee. Where a lane's
// depth is consecutive it does foresee them.
class Prefetch {
 public:
  Prefetch(const Lanes& in, Range lanes, Range depths, std::int64_t num_steps) {
    if (in.depth_stride == 1 || lanes.end <= lanes.begin || depths.end <= depths.begin) return;
    const std::int64_t size = in.is_bf16 ? sizeof(std::uint16_t) : sizeof(float);
    row_ = static_cast<const char*>(in.data) + (lanes.begin + depths.begin * in.depth_stride) * size;
    stride_ = in.depth_stride * size;
    row_size_ = (lanes.end - lanes.begin) * size;
    left_ = (depths.end - depths.begin) * ((row_size_ + kLine - 1) / kLine);
    per_step_ = left_ / num_steps + 1;
  }
  void step() {
    const std::int64_t stop = std::max<std::int64_t>(left_ - per_step_, 0);
    for (; left_ > stop; --left_) {
      _mm_prefetch(row_ + at_, _MM_HINT_T1);
      at_ += kLine;
      if (at_ >= row_size_) {
        at_ = 0;
        row_ += stride_;
      }
    }
  }

 private:
  const char* row_ = nullptr;
  std::int64_t stride_ = 0, row_size_ = 0, at_ = 0, left_ = 0, per_step_ = 0;
};

template <class Word>
void multiply_group(const Spread& spread, int num_lanes, const Pair* panel, int width, std::int64_t num_words,
                    float (*tiles)[kPanel], Prefetch& next_spread, Prefetch& next_panels) {
  const auto multiply = width == kPanel        ? multiply_tile<Word, 3>
                        : width == 2 * kVector ? multiply_tile<Word, 2>
                                               : multiply_tile<Word, 1>;
  for (int i = 0; i < num_lanes; i += kTile) {
    std::int64_t word = 0;
    do {
      const std::int64_t end = chain_end(word, num_words);
      next_spread.step();
      next_panels.step();
      multiply(spread.lane + i, spread.step, spread.ahead, panel, word, end, tiles + i);
      word = end;
    } while (word < num_words);
  }
}

__m512 widen(__m256i bf16) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16)); }

void store_bf16(std::uint16_t* to, __mmask16 mask, __m256i values) {
  if (mask == 0xffff) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), values);
  } else {
    _mm256_mask_storeu_epi16(to, mask, values);
  }
}

// C, as the kernels write it.
struct Target {
  Product product;
  bool transposed;  // the spread operand is B
  Store store;

  // Returns `count` consecutive elements of a row.
  __m512 held(std::int64_t row, std::int64_t column, std::int64_t count) const {
    const std::int64_t at = row * product.row_stride + column;
    const __mmask16 mask = first(count);
    if (!product.is_bf16) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(product.data) + at);
    const __m512 values = widen(load_bf16(static_cast<const std::uint16_t*>(product.data) + at, mask));
    return product.residual == nullptr ? values
                                       : _mm512_add_ps(widen(load_bf16(product.residual + at, mask)), values);
  }

  void put(__m512 sums, std::int64_t row, std::int64_t column, std::int64_t count) const {
    const std::int64_t at = row * product.row_stride + column;
    const __mmask16 mask = first(count);
    if (product.is_bf16) return put_rounded(sums, at, mask);
    float* const to = static_cast<float*>(product.data) + at;
    if (store == Store::kStream && count >= kVector && reinterpret_cast<std::uintptr_t>(to) % 64 == 0) {
      _mm512_stream_ps(to, sums);
    } else {
      _mm512_mask_storeu_ps(to, mask, sums);
    }
  }

  void put_rounded(__m512 sums, std::int64_t at, __mmask16 mask) const {
    const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(sums);
    store_bf16(static_cast<std::uint16_t*>(product.data) + at, mask, rounded);
    if (product.residual == nullptr) return;
    store_bf16(product.residual + at, mask, (__m256i)_mm512_cvtneps_pbh(_mm512_sub_ps(sums, widen(rounded))));
  }

  // Asks for the places of such a tile: nothing foresees them, since each row of C holds a line or two of it.
  void prefetch_tiles(std::int64_t spread, int num_spread, std::int64_t panel, int num_panel) const {
    if (store == Store::kStream) return;
    const std::int64_t row = transposed ? panel : spread, column = transposed ? spread : panel;
    const int num_rows = transposed ? num_panel : num_spread, num_columns = transposed ? num_spread : num_panel;
    const std::int64_t size = product.is_bf16 ? sizeof(std::uint16_t) : sizeof(float);
    const auto fetch = [&](const void* matrix) {
      for (int i = 0; i < num_rows; ++i) {
        const char* const from =
            static_cast<const char*>(matrix) + ((row + i) * product.row_stride + column) * size;
        for (std::int64_t at = 0; at < num_columns * size; at += kLine) _mm_prefetch(from + at, _MM_HINT_T0);
        _mm_prefetch(from + num_columns * size - 1, _MM_HINT_T0);
      }
    };
    fetch(product.data);
    if (product.residual != nullptr) fetch(product.residual);
  }

  // The group's tile: `num_spread` lanes from `spread` on by `num_panel` from `panel` on.
  void put_tiles(const float (*tiles)[kPanel], std::int64_t spread, int num_spread, std::int64_t panel,
                 int num_panel) const {
    for (int j = 0; j < num_panel; j += kVector) {
      __m512i rows[kVector];
      for (int i = 0; i < kVector; ++i) rows[i] = _mm512_load_si512(tiles[i] + j);
      if (transposed) transpose(rows);
      const int here = std::min(kVector, num_panel - j);
      const std::int64_t row = transposed ? panel + j : spread, column = transposed ? spread : panel + j;
      const int num_rows = transposed ? here : num_spread, num_columns = transposed ? num_spread : here;
      // All is read before anything is written: a read waits for a write some multiple of 4096 bytes before it.
      if (store == Store::kAdd) {
        for (int i = 0; i < num_rows; ++i) {
          const __m512 before = held(row + i, column, num_columns);
          rows[i] = _mm512_castps_si512(_mm512_add_ps(before, _mm512_castsi512_ps(rows[i])));
        }
      }
      for (int i = 0; i < num_rows; ++i) put(_mm512_castsi512_ps(rows[i]), row + i, column, num_columns);
    }
  }
};

// Blocks along the depth of so many words. A bfloat16 C is rounded once, from sums of the whole depth.
std::int64_t depth_blocks(std::int64_t words, const Product& c) {
  return words <= 2 * kDeep || c.is_bf16 ? 1 : (words + kDeep - 1) / kDeep;
}

// Computes one thread's part.
template <class Word>
void multiply_part(const Lanes& spread, Range spread_lanes, const Lanes& panels, Range panel_lanes,
                   std::int64_t depth, Target target) {
  const std::int64_t words = (depth + Word::kDepth - 1) / Word::kDepth;
  const std::int64_t num_blocks = depth_blocks(words, target.product);
  const std::int64_t block = round_up(std::max<std::int64_t>((words + num_blocks - 1) / num_blocks, 1), kVector);
  const std::int64_t most_panel_lanes = std::max<std::int64_t>(kPanelWords / block / kPanel, 1) * kPanel;
  const std::int64_t most_spread_lanes =
      std::max<std::int64_t>(kSpreadWords / block / kLanesOfLine, 1) * kLanesOfLine;
  const bool in_place =
      spread.depth_stride == 1 && spread.is_bf16 == (Word::kDepth == 2) && depth % Word::kDepth == 0;
  Pair* const packed_spread = packing_buffer((most_spread_lanes + most_panel_lanes) * block);
  Pair* const packed_panels = packed_spread + most_spread_lanes * block;
  alignas(64) float tiles[kGroup][kPanel] = {};
  for (std::int64_t b = 0; b < num_blocks; ++b) {
    const std::int64_t k = b * block * Word::kDepth;
    const std::int64_t depths = std::min(depth - k, block * Word::kDepth);
    const std::int64_t num_words = (depths + Word::kDepth - 1) / Word::kDepth;
    const std::int64_t num_chains = std::max<std::int64_t>(num_words / kChain, 1);
    if (b > 0) target.store = Store::kAdd;
    for (std::int64_t p = panel_lanes.begin; p < panel_lanes.end; p += most_panel_lanes) {
      const std::int64_t p_end = std::min(p + most_panel_lanes, panel_lanes.end);
      const auto width = [&](std::int64_t lane) {
        return static_cast<int>(std::min<std::int64_t>(kPanel, round_up(p_end - lane, kVector)));
      };
      const auto packed_panel = [&](std::int64_t lane) { return packed_panels + (lane - p) * num_words; };
      pack<Word>(panels, p, p_end, k, depths, num_words, kPanel, packed_panels);
      const std::int64_t steps_of_lanes = num_tiles({p, p_end}, kPanel) * num_chains;
      Prefetch next_panels(panels, {p, p_end}, {k + depths, std::min(depth, k + depths + block * Word::kDepth)},
                           steps_of_lanes * num_tiles(spread_lanes, kTile));
      for (std::int64_t s = spread_lanes.begin; s < spread_lanes.end; s += most_spread_lanes) {
        const std::int64_t s_end = std::min(s + most_spread_lanes, spread_lanes.end);
        if (!in_place) pack<Word>(spread, s, s_end, k, depths, num_words, kGroup, packed_spread);
        const Range next{s_end, std::min(s_end + most_spread_lanes, spread_lanes.end)};
        Prefetch next_spread(spread, next, {k, k + depths}, steps_of_lanes * num_tiles({s, s_end}, kTile));
        for (std::int64_t l = p; l < p_end; l += kPanel) {
          for (std::int64_t g = s; g < s_end; g += kGroup) {
            const int lanes_here = static_cast<int>(std::min<std::int64_t>(kGroup, s_end - g));
            Spread group;
            group.step = in_place ? 1 : kGroup;
            group.ahead = in_place && l == p ? spread.words(kTile, 0) - spread.words(0, 0) : 0;
            for (int i = 0; i < kGroup; ++i) {
              group.lane[i] = in_place ? spread.words(g + std::min(i, lanes_here - 1), k)
                                       : packed_spread + (g - s) * num_words + i;
            }
            const int panel_here = static_cast<int>(std::min<std::int64_t>(kPanel, p_end - l));
            target.prefetch_tiles(g, lanes_here, l, panel_here);
            multiply_group<Word>(group, lanes_here, packed_panel(l), width(l), num_words, tiles, next_spread,
                                 next_panels);
            target.put_tiles(tiles, g, lanes_here, l, panel_here);
          }
        }
      }
    }
  }
  _mm_sfence();  // streamed lines are seen by other threads
}

}  // namespace

namespace avx512 {

void gemm(const Matrix& a, const Matrix& b, std::int64_t num_rows, std::int64_t num_columns, std::int64_t depth,
          const Product& c, bool accumulate, int num_threads) {
  const Lanes left{a.data, a.row_stride, a.column_stride, a.is_bf16};
  const Lanes right{b.data, b.column_stride, b.row_stride, b.is_bf16};
  const auto in_place = [&](const Lanes& lanes) { return lanes.depth_stride == 1 && lanes.is_bf16 == b.is_bf16; };
  const bool transposed = in_place(right) && (!in_place(left) || num_columns > num_rows);
  const Lanes &spread = transposed ? right : left, &panels = transposed ? left : right;
  const std::int64_t num_spread = transposed ? num_columns : num_rows;
  const std::int64_t num_panel = transposed ? num_rows : num_columns;
  const bool streams = !accumulate && num_rows * num_columns >= kLarge && depth_blocks(depth, c) == 1;
  const Target target{c, transposed, accumulate ? Store::kAdd : streams ? Store::kStream : Store::kWrite};
  // Panels are packed by every thread that has a part of the spread operand's lanes: those of the longer side.
  const std::int64_t spread_tiles = (num_spread + kGroup - 1) / kGroup,
                     panel_tiles = (num_panel + kPanel - 1) / kPanel;
  const Parts parts = share_out(spread_tiles, panel_tiles, num_spread <= 4 * num_panel, num_threads);
#pragma omp parallel for schedule(static) num_threads(num_threads)
  for (std::int64_t part = 0; part < parts.rows * parts.columns; ++part) {
    const std::int64_t i = part / parts.columns, j = part % parts.columns;
    const Range spread_lanes{border(spread_tiles, parts.rows, i, kGroup, num_spread),
                             border(spread_tiles, parts.rows, i + 1, kGroup, num_spread)};
    const Range panel_lanes{border(panel_tiles, parts.columns, j, kPanel, num_panel),
                            border(panel_tiles, parts.columns, j + 1, kPanel, num_panel)};
    const auto multiply = b.is_bf16 ? multiply_part<BFloat16> : multiply_part<Float32>;
    multiply(spread, spread_lanes, panels, panel_lanes, depth, target);
  }
}

void rounding_residual(const float* a, std::int64_t row_stride, std::int64_t num_rows, std::int64_t num_columns,
                       float* residual, int num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads)
  for (std::int64_t row = 0; row < num_rows; ++row) {
    __m512 sum = _mm512_setzero_ps();
    for (std::int64_t column = 0; column < num_columns; column += kVector) {
      const __m512 exact = _mm512_maskz_loadu_ps(first(num_columns - column), a + row * row_stride + column);
      sum = _mm512_add_ps(sum, _mm512_sub_ps(exact, widen((__m256i)_mm512_cvtneps_pbh(exact))));
    }
    residual[row] = _mm512_reduce_add_ps(sum);
  }
}

}  // namespace avx512
}  // namespace distil_kernels
