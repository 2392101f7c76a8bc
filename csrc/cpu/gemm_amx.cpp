// C (+)= A B with bfloat16 operands and float32 results, on processors whose tile unit (AMX) multiplies them.
//
// A tile is 16 rows of 64 bytes. tdpbf16ps adds to a 16 x 16 tile of C, in float32, the product of 16 lanes of A by
// 32 depths and 16 lanes of B by the same, so operands are packed in tiles of 16 x 32: those of A lane by lane,
// those of B pair of depths by pair. Four tiles of C, two of A and two of B are all eight registers: each tile that
// is loaded is used twice. Blocks of both operands stay in the second-level cache.
#include <sys/syscall.h>
#include <unistd.h>

#include "gemm.h"
#include "operands.h"

namespace distil_kernels {
namespace {

constexpr int kSide = 2 * kVector;  // side of the square of C that one call of the kernel computes
constexpr std::int64_t kTilePairs = kVector * kVector;  // 1 KiB
// A block of B is as wide as fits in the cache with a block of A. Where the whole depth is one block (logits of D
// up to kDeepest), C is read and written once; else blocks are shallow enough for a whole row of dh or dW.
constexpr std::int64_t kRows = 128, kColumns = 1024, kDepth = 576, kDeepest = 1024;
constexpr std::int64_t kPackedColumns = kColumns * kDepth;  // elements of B

// The shapes of the eight tile registers; 64 bytes that ldtilecfg reads.
struct alignas(64) TileShapes {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Configures the thread's tile registers for its lifetime, and then restores the shapes of other libraries.
class Tiles {
 public:
  Tiles() {
    _tile_storeconfig(&before_);
    _tile_loadconfig(&ours_);
  }
  ~Tiles() {
    if (before_.palette == 0) {
      _tile_release();
    } else {
      _tile_loadconfig(&before_);
    }
  }

 private:
  TileShapes before_;
  const TileShapes ours_;
};

enum class Operand { kLeft, kRight };

// Packs 16 lanes by 32 depths as 16 lines: a line is a lane where depths are neighbours in memory, else a pair of
// depths.
inline void load_tile(const Lanes& in, std::int64_t lane, std::int64_t num_lanes, std::int64_t depth,
                      std::int64_t num_depths, __m512i (&lines)[kVector]) {
  for (int i = 0; i < kVector; ++i) {
    if (in.depth_stride == 1) {
      lines[i] = i < num_lanes ? load_pairs(in, lane + i, depth, num_depths) : _mm512_setzero_si512();
    } else {
      const std::int64_t left = num_depths - 2 * i, at = left > 0 ? depth + 2 * i : depth;
      const __m512i low = load_lanes(in, lane, at, left > 0 ? num_lanes : 0);
      const __m512i high = load_lanes(in, lane, at + (left > 1), left > 1 ? num_lanes : 0);
      lines[i] = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
    }
  }
}

// Packs lanes [lane, lane + num_lanes) and depths [depth, depth + num_depths), filled with zeros to whole tiles:
// for 16 lanes after another the tiles along the depth. It reads memory along its rows.
template <Operand kOperand>
void pack(const Lanes& in, std::int64_t lane, std::int64_t num_lanes, std::int64_t depth, std::int64_t num_depths,
          Pair* out) {
  const bool lane_by_lane = in.depth_stride == 1;
  const std::int64_t panels = round_up(num_lanes, kSide) / kVector;
  const std::int64_t tiles = round_up(num_depths, kTransposed) / kTransposed;
  for (std::int64_t at = 0; at < panels * tiles; ++at) {
    const std::int64_t panel = lane_by_lane ? at / tiles : at % panels,
                       tile = lane_by_lane ? at % tiles : at / panels;
    const std::int64_t l = panel * kVector, k = tile * kTransposed;
    __m512i lines[kVector];
    load_tile(in, lane + l, num_lanes - l, depth + k, num_depths - k, lines);
    if (lane_by_lane != (kOperand == Operand::kLeft)) transpose(lines);
    Pair* const to = out + (panel * tiles + tile) * kTilePairs;
    for (int i = 0; i < kVector; ++i) _mm512_store_si512(to + i * kVector, lines[i]);
  }
}

// Multiplies 32 lanes of A by 32 of B into c[0:rows, 0:columns].
void multiply_square(const Pair* a, const Pair* b, std::int64_t num_tiles, float* c, std::int64_t c_stride,
                     int rows, int columns, Store store) {
  constexpr int kLine = kVector * sizeof(Pair);
  const Pair* const next_a = a + num_tiles * kTilePairs;
  const Pair* const next_b = b + num_tiles * kTilePairs;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (std::int64_t at = 0; at < num_tiles * kTilePairs; at += kTilePairs) {
    _tile_loadd(4, a + at, kLine);
    _tile_loadd(6, b + at, kLine);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, next_b + at, kLine);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, next_a + at, kLine);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  alignas(64) float square[kSide][kSide];
  _tile_stored(0, &square[0][0], sizeof square[0]);
  _tile_stored(1, &square[0][kVector], sizeof square[0]);
  _tile_stored(2, &square[kVector][0], sizeof square[0]);
  _tile_stored(3, &square[kVector][kVector], sizeof square[0]);
  const bool whole_lines =
      columns == kSide && c_stride % kVector == 0 && reinterpret_cast<std::uintptr_t>(c) % sizeof(__m512) == 0;
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < kSide; j += kVector) {
      const __m512 sum = _mm512_load_ps(&square[i][j]);
      float* to = c + i * c_stride + j;
      if (store == Store::kStream && whole_lines) {
        _mm512_stream_ps(to, sum);
      } else {
        const __mmask16 mask = first(columns - j);
        const __m512 before = store == Store::kAdd ? _mm512_maskz_loadu_ps(mask, to) : _mm512_setzero_ps();
        _mm512_mask_storeu_ps(to, mask, _mm512_add_ps(before, sum));
      }
    }
  }
}

// Computes one thread's part: rows [row, row_end), columns [column, column_end).
void multiply_part(const Lanes& a, const Lanes& b, std::int64_t row, std::int64_t row_end, std::int64_t column,
                   std::int64_t column_end, std::int64_t depth, float* c, std::int64_t c_stride, bool accumulate) {
  Pair* const packed_a = packing_buffer((kRows * kDeepest + kPackedColumns) / 2);
  Pair* const packed_b = packed_a + kRows * kDeepest / 2;
  const std::int64_t num_blocks = depth <= kDeepest ? 1 : (depth + kDepth - 1) / kDepth;
  const std::int64_t block = round_up((depth + num_blocks - 1) / num_blocks, kTransposed);
  const std::int64_t block_columns =
      std::min(kColumns, kPackedColumns / std::max<std::int64_t>(block, 1) / kSide * kSide);
  const Tiles tiles;
  for (std::int64_t j = column; j < column_end; j += block_columns) {
    const std::int64_t columns = std::min(block_columns, column_end - j);
    for (std::int64_t k = 0; k < depth; k += block) {
      const std::int64_t depth_here = std::min(block, depth - k);
      const std::int64_t num_tiles = (depth_here + kTransposed - 1) / kTransposed;
      const Store store = accumulate || k > 0 ? Store::kAdd : num_blocks == 1 ? Store::kStream : Store::kWrite;
      pack<Operand::kRight>(b, j, columns, k, depth_here, packed_b);
      for (std::int64_t i = row; i < row_end; i += kRows) {
        const std::int64_t rows = std::min(kRows, row_end - i);
        pack<Operand::kLeft>(a, i, rows, k, depth_here, packed_a);
        for (std::int64_t jj = 0; jj < columns; jj += kSide) {
          for (std::int64_t ii = 0; ii < rows; ii += kSide) {
            multiply_square(packed_a + ii / kVector * num_tiles * kTilePairs,
                            packed_b + jj / kVector * num_tiles * kTilePairs, num_tiles,
                            c + (i + ii) * c_stride + j + jj, c_stride,
                            static_cast<int>(std::min<std::int64_t>(kSide, rows - ii)),
                            static_cast<int>(std::min<std::int64_t>(kSide, columns - jj)), store);
          }
        }
      }
    }
  }
  _mm_sfence();  // streamed lines are seen by other threads
}

}  // namespace

namespace amx {

bool supported() {
  // Linux lends the tile registers on request, once for the whole process, and refuses where there are none.
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}

void gemm(const Matrix& a, const Matrix& b, std::int64_t num_rows, std::int64_t num_columns, std::int64_t depth,
          float* c, std::int64_t c_stride, bool accumulate, int num_threads) {
  const Lanes left{a.data, a.row_stride, a.column_stride, a.is_bf16};
  const Lanes right{b.data, b.column_stride, b.row_stride, b.is_bf16};
  const std::int64_t row_tiles = (num_rows + kSide - 1) / kSide, column_tiles = (num_columns + kSide - 1) / kSide;
  const Parts parts = share_out(row_tiles, column_tiles, num_columns >= num_rows, num_threads);
#pragma omp parallel for schedule(static) num_threads(num_threads)
  for (std::int64_t part = 0; part < parts.rows * parts.columns; ++part) {
    const std::int64_t i = part / parts.columns, j = part % parts.columns;
    multiply_part(left, right, border(row_tiles, parts.rows, i, kSide, num_rows),
                  border(row_tiles, parts.rows, i + 1, kSide, num_rows),
                  border(column_tiles, parts.columns, j, kSide, num_columns),
                  border(column_tiles, parts.columns, j + 1, kSide, num_columns), depth, c, c_stride, accumulate);
  }
}

}  // namespace amx
}  // namespace distil_kernels
