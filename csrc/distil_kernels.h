// The one public header: row kernels as plain functions of a task, sizes and enums.
//
// A row is one token position; its logits are V consecutive floats. The kernels take the raw output of the two
// lm_head products and apply bias, softcap and temperature themselves, so that nothing is rounded or stored in
// between:
//
//     logit = softcap * tanh((raw + bias) / softcap) / temperature        (no tanh where softcap is 0)
//
// The caller checks every argument, these functions check none. Nothing here knows Torch, Python or pybind11.
#pragma once

#include <cstdint>

namespace distil_kernels {

// Rows of the statistics matrix [kNumStatistics, num_rows]. A log-normaliser is stored relative to its row's
// maximum: their sum can be 1e4, and the gradient needs the log-normaliser to 1e-7.
enum Statistic : int {
  kForwardCe = 0,         // H(T, S)
  kForwardKl = 1,         // KL(T || S)
  kReverseKl = 2,         // KL(S || T)
  kLogprob = 3,           // log S[token]
  kTeacherLogprob = 4,    // log T[token]
  kEntropy = 5,           // H(S)
  kTeacherEntropy = 6,    // H(T)
  kAgree = 7,             // 1 where both have their largest logit at the same index, else 0
  kMaxLogit = 8,          // max_v s_v
  kLogNormalizer = 9,     // log sum_v exp(s_v - max)
  kTeacherMaxLogit = 10,  // max_v t_v
  kTeacherLogNormalizer = 11,
  kJsd = 12,               // b KL(T || M) + (1 - b) KL(S || M), M = b T + (1 - b) S, b = Cost::jsd_weight
  kStudentMixtureKl = 13,  // KL(S || M)
  kNumStatistics = 14,
};

// The cost of a row: kForwardCe, kForwardKl (which has the same gradient), kReverseKl, kJsd or kEntropy.
struct Cost {
  Statistic statistic;
  float jsd_weight;  // the teacher's share of the mixture, between 0 and 1; only kJsd reads it
};

// The raw logits of one model for some rows.
struct LogitRows {
  const float* raw;         // row r begins at raw + r * row_stride
  std::int64_t row_stride;  // in elements
  const float* bias;        // [V] or nullptr
  float softcap;            // 0 for none
  float inverse_temperature;
};

// One call of a row kernel: the logits of both models, the cost, and the statistics.
struct RowTask {
  LogitRows student, teacher;
  const std::int64_t* tokens;  // [num_rows], or nullptr: the log-probs are then 0
  Cost cost;
  std::int64_t num_rows, vocab_size;
  float* statistics;  // [kNumStatistics, num_rows]: row_stats writes it, row_grad reads it
};

enum class FloatType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// What a row's gradient by its logits takes beside cost and token: w0 S + w1 S log S + w2 + w3 onehot(label), w
// being the row's numbers in GradRows::term_weights.
enum TermWeight : int {
  kStudentWeight = 0,
  kStudentLogWeight = 1,
  kUniformWeight = 2,
  kLabelWeight = 3,
  kNumTermWeights = 4,
};

// The gradient rows of a task. Row r is
//
//     d(cost_weight[r] * cost + logprob_weight[r] * log S[token]) / d raw student logit
//
// and, with term_weights, what TermWeight says times d logit / d raw. A row whose weights are all 0 gets zeros,
// whatever its logits are.
struct GradRows {
  const float* cost_weight;     // [num_rows]
  const float* logprob_weight;  // [num_rows], or nullptr: all 0
  void* data;                   // row r begins at element r * row_stride; it may begin where the raw logits do
  std::int64_t row_stride;
  FloatType type;
  float* residual;  // [num_rows]: what the sum of each row lost to rounding; nullptr where it is not asked for
  const float* term_weights;   // [kNumTermWeights, num_rows], or nullptr: all 0
  const std::int64_t* labels;  // [num_rows], read in rows with a kLabelWeight; nullptr if there are none
};

enum class InstructionSet : int { kBest = 0, kPortable = 1, kAvx2 = 2, kAvx512 = 3 };

// True if this build has kernels for the instruction set and this processor can run them.
bool cpu_supports(InstructionSet instruction_set);

// Writes every Statistic k of row r to statistics[k * num_rows + r]. kJsd and kStudentMixtureKl are 0 unless the
// cost is kJsd.
void cpu_row_stats(const RowTask& task, int num_threads, InstructionSet instruction_set);

// Writes kJsd and kStudentMixtureKl, sums over the vocabulary of the task, from maxima and log-normalisers that may
// be those of a larger one: of a vocabulary of which the task has a shard.
void cpu_row_mixture(const RowTask& task, int num_threads, InstructionSet instruction_set);

// Writes the gradient in float32 or bfloat16, from the statistics.
void cpu_row_grad(const RowTask& task, const GradRows& grad, int num_threads, InstructionSet instruction_set);

// Does both, for weights that do not depend on the statistics: the second read of a row finds it in a cache.
// logprob_weight and term_weights are nullptr.
void cpu_row_stats_grad(const RowTask& task, const GradRows& grad, int num_threads, InstructionSet instruction_set);

// An operand of a product: element (i, j) at data + i * row_stride + j * column_stride, one of the strides 1.
struct Matrix {
  const void* data;
  std::int64_t row_stride, column_stride;  // in elements
  bool is_bf16;                            // else float32
};

// The result of a product: row r begins at element r * row_stride.
struct Product {
  void* data;
  std::int64_t row_stride;
  bool is_bf16;             // the float32 sums are rounded once a call; else float32
  std::uint16_t* residual;  // bfloat16, laid out as a bfloat16 data: what rounding lost; nullptr drops it
};

// The unit that multiplies: vector registers (AVX-512 with its bfloat16 instructions), or tile registers (AMX; it
// takes bfloat16 operands only, and is the faster unit for them).
enum class GemmUnit { kBest, kVector, kTiles };

// True if this build and this processor have the unit; kBest stands for either.
bool cpu_supports_gemm(GemmUnit unit);

// True on a processor made by Intel.
bool cpu_is_intel();

// c [num_rows, num_columns] = (or += where accumulate) a [num_rows, depth] times b [depth, num_columns], summed in
// float32; the same result for any number of threads. The product is one of bfloat16 numbers where b is bfloat16 (a
// float32 a is rounded), else both are float32. A bfloat16 c takes no tiles.
void cpu_gemm(const Matrix& a, const Matrix& b, std::int64_t num_rows, std::int64_t num_columns, std::int64_t depth,
              const Product& c, bool accumulate, int num_threads, GemmUnit unit);

// residual[r] = what the sum of row r of `a` loses when its elements are rounded to bfloat16.
void cpu_rounding_residual(const float* a, std::int64_t row_stride, std::int64_t num_rows, std::int64_t num_columns,
                           float* residual, int num_threads);

// Compressed rows: the entries of row r are offsets[r] to offsets[r + 1], indices ascending.
struct SparseRows {
  std::int64_t* offsets;  // [num_rows + 1]
  std::int32_t* index;
  float* value;
  std::int64_t num_rows;
};

// A dense matrix: row r begins at element r * row_stride.
struct DenseRows {
  const void* data;
  std::int64_t row_stride;
  std::int64_t num_rows;
  std::int64_t num_columns;
  bool is_bfloat16;  // else float32
};

// Counts the large entries of each row: those with a magnitude of at least cutoff = threshold * the row's largest
// magnitude. A zero is never large. dropped[r] is the share of the row's absolute sum that lies in small entries.
void cpu_sparse_count(const float* dense, std::int64_t row_stride, std::int64_t num_rows, std::int64_t num_columns,
                      float threshold, float* cutoff, std::int64_t* counts, float* dropped, int num_threads,
                      InstructionSet instruction_set);

// Copies the large entries to the places that out.offsets, the running sum of the counts, gives them.
void cpu_sparse_select(const float* dense, std::int64_t row_stride, std::int64_t num_columns, const float* cutoff,
                       const SparseRows& out, int num_threads, InstructionSet instruction_set);

// Writes the transpose of `rows` to `out`, offsets included. `position` is scratch of out.num_rows numbers.
void cpu_sparse_transpose(const SparseRows& rows, const SparseRows& out, std::int64_t* position, int num_threads,
                          InstructionSet instruction_set);

// out [rows.num_rows, dense.num_columns] += rows * dense. `position` is scratch of rows.num_rows numbers.
void cpu_sparse_product(const SparseRows& rows, const DenseRows& dense, float* out, std::int64_t* position,
                        int num_threads, InstructionSet instruction_set);

// The same kernels on a GPU. Pointers are of device memory, stream is a cudaStream_t. A function only enqueues work
// and returns the cudaError_t of the launch (0 for success). A token outside the vocabulary gets the log-prob NaN.

// 0 where a driver and a device are present, else a cudaError_t, of which cuda_error_text is the description.
int cuda_device_error();
const char* cuda_error_text(int error);

struct DeviceLimits {
  int capability_major, capability_minor;
  int shared_bytes;  // shared memory that a kernel may ask for per block
};

// Asks the CUDA runtime: torch before 2.7, and torch for ROCm, do not know the shared memory.
int cuda_device_limits(int device, DeviceLimits& limits);

int cuda_row_stats(const RowTask& task, void* stream);
int cuda_row_mixture(const RowTask& task, void* stream);

// The gradient may also be float16. Only a float32 gradient may begin where the raw logits do, and it has no
// residual.
int cuda_row_grad(const RowTask& task, const GradRows& grad, void* stream);

// Statistics and gradient in one read of the logits, for kForwardCe and kForwardKl without logprob_weight and
// term_weights, on compute capability 9.0 and later. A row lies in the shared memory of cluster_size blocks (1, 2,
// 4 or 8). All rows begin at multiples of 16 bytes. The residual is [num_rows, cluster_size], a sum for each block.
int cuda_row_stats_grad(const RowTask& task, const GradRows& grad, int cluster_size, void* stream);

// Sets num_clusters to the number of such clusters that the current device runs at once: 0 where none fits, as on a
// slice of a GPU with too few multiprocessors.
int cuda_max_clusters(std::int64_t vocab_size, bool softcap, int cluster_size, int& num_clusters);

// The costs of a chunk's rows on a grid [num_positions, num_sequences], and the totals of the positions after it.
struct CostGrid {
  const float* costs;
  const std::int64_t* slots;  // [num_positions, num_sequences]: an index in costs, -1 for none
  const double* later;        // [num_later, num_sequences]: next_later of the positions after these
  std::int64_t num_positions, num_sequences, num_later;
};

// to_go[p] = sum_{0 < k <= horizon} discount^k cost[p + k]; horizon 0 for all. num_later is the horizon, or 1.
int cuda_cost_to_go(const CostGrid& grid, double discount, std::int64_t horizon, float* to_go, double* next_later,
                    void* stream);

}  // namespace distil_kernels
