// The one public header: row kernels as plain functions of pointers, sizes and enums.
//
// A row is one token position; its logits are V consecutive floats. Every function takes the raw output of the two
// lm_head products and applies bias, softcap and temperature itself, so that nothing is rounded or stored in
// between:
//
//     logit = softcap * tanh((raw + bias) / softcap) / temperature        (no tanh where softcap is 0)
//
// Callers check; these functions trust. Nothing here knows Torch, Python or pybind11.
#pragma once

#include <cstdint>

namespace distil_kernels {

// Rows of the statistics matrix [kNumStatistics, num_rows]. Log-normalisers are kept relative to the row's maximum:
// their sum can be 1e4 while the gradient needs them to 1e-7.
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
  kTeacherMaxLogit = 10,  // the same two of the teacher
  kTeacherLogNormalizer = 11,
  kJsd = 12,               // b KL(T || M) + (1 - b) KL(S || M), M = b T + (1 - b) S, b = Cost::jsd_weight
  kStudentMixtureKl = 13,  // KL(S || M)
  kNumStatistics = 14,
};

// What a row costs: kForwardCe, kForwardKl (the same gradient), kReverseKl, kJsd or kEntropy.
struct Cost {
  Statistic statistic;
  float jsd_weight;  // of the teacher in the mixture, between 0 and 1; for kJsd
};

// Raw logits of one model for some rows.
struct LogitRows {
  const float* raw;         // row r begins at raw + r * row_stride
  std::int64_t row_stride;  // in elements
  const float* bias;        // [V] or nullptr
  float softcap;            // 0 for none
  float inverse_temperature;
};

enum class InstructionSet : int { kBest = 0, kPortable = 1, kAvx2 = 2, kAvx512 = 3 };

// Whether this build has a kernel for the instruction set and this processor can run it.
bool cpu_supports(InstructionSet instruction_set);

// statistics[k * num_rows + r] for every Statistic k; the last two are 0 unless they are what a row costs. tokens
// is [num_rows], or nullptr: the log-probs are then 0.
void cpu_row_stats(const LogitRows& student, const LogitRows& teacher, const std::int64_t* tokens, const Cost& cost,
                   std::int64_t num_rows, std::int64_t vocab_size, float* statistics, int num_threads,
                   InstructionSet instruction_set);

enum class FloatType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Gradient rows: row r begins row_stride * r elements of `type` behind data.
struct GradRows {
  void* data;
  std::int64_t row_stride;
  FloatType type;
};

// grad[r][v] = d(cost_weight * cost + logprob_weight * log S[token]) / d raw student logit, float32 or bfloat16. A
// row of grad may begin where the student's raw logits do (in place). A row whose two weights are 0 gets zeros
// whatever it holds. logprob_weight is [num_rows] or nullptr. rounding [num_rows] gets what the sum of each row
// lost where grad is bfloat16.
void cpu_row_grad(const LogitRows& student, const LogitRows& teacher, const std::int64_t* tokens,
                  const float* statistics, const Cost& cost, const float* cost_weight, const float* logprob_weight,
                  std::int64_t num_rows, std::int64_t vocab_size, const GradRows& grad, float* rounding,
                  int num_threads, InstructionSet instruction_set);

// Both for weights that are known beforehand: a row's logits are read again while they are in a cache.
void cpu_row_stats_grad(const LogitRows& student, const LogitRows& teacher, const std::int64_t* tokens,
                        const Cost& cost, const float* cost_weight, std::int64_t num_rows, std::int64_t vocab_size,
                        float* statistics, const GradRows& grad, float* rounding, int num_threads,
                        InstructionSet instruction_set);

// An operand of a product: element (i, j) at data + i * row_stride + j * column_stride, one of the strides 1.
struct Matrix {
  const void* data;
  std::int64_t row_stride, column_stride;  // in elements
  bool is_bf16;                            // else float32
};

// A result: row r begins row_stride * r elements behind data.
struct Product {
  void* data;
  std::int64_t row_stride;
  bool is_bf16;         // float32 sums rounded once a call; else float32
  std::uint16_t* rest;  // bfloat16, laid out as a bfloat16 data: what rounding lost; null forgets it
};

// What multiplies: vector registers (AVX-512 with its bfloat16 instructions), or tile registers (AMX; bfloat16
// operands only, and the faster for them).
enum class GemmUnit { kBest, kVector, kTiles };

// Whether this build and this processor have it; kBest is any.
bool cpu_supports_gemm(GemmUnit unit);

// Whether the processor is of Intel's make.
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

// Row r begins row_stride * r elements behind data: float, or bfloat16.
struct DenseRows {
  const void* data;
  std::int64_t row_stride;
  std::int64_t num_rows;
  std::int64_t num_columns;
  bool is_bfloat16;
};

// For each row of dense: cutoff = threshold * its largest magnitude, the number of entries that are not below it
// (zeros are), and the share of its absolute sum that the others hold.
void cpu_sparse_count(const float* dense, std::int64_t row_stride, std::int64_t num_rows, std::int64_t num_columns,
                      float threshold, float* cutoff, std::int64_t* counts, float* dropped, int num_threads,
                      InstructionSet instruction_set);

// Those entries, to the places that out.offsets (the counts' running sum) gives them.
void cpu_sparse_select(const float* dense, std::int64_t row_stride, std::int64_t num_columns, const float* cutoff,
                       const SparseRows& out, int num_threads, InstructionSet instruction_set);

// out, offsets included, lists the columns of rows. position: room for out.num_rows numbers.
void cpu_sparse_transpose(const SparseRows& rows, const SparseRows& out, std::int64_t* position, int num_threads,
                          InstructionSet instruction_set);

// out [rows.num_rows, dense.num_columns] += rows * dense. position: room for rows.num_rows numbers.
void cpu_sparse_product(const SparseRows& rows, const DenseRows& dense, float* out, std::int64_t* position,
                        int num_threads, InstructionSet instruction_set);

// On a GPU. Pointers are of device memory, stream is a cudaStream_t. Work is only enqueued; each function returns a
// cudaError_t (0 for success) of the launch. A token outside the vocabulary gets the log-prob NaN.
// 0 where the driver is there and has a device; what cuda_error_text turns into words.
int cuda_device_error();
const char* cuda_error_text(int error);

int cuda_row_stats(const LogitRows& student, const LogitRows& teacher, const std::int64_t* tokens, const Cost& cost,
                   std::int64_t num_rows, std::int64_t vocab_size, float* statistics, void* stream);

// As cpu_row_grad, also in float16. grad may be the student's own raw logits where its type is float32; rounding is
// nullptr there, or ignored.
int cuda_row_grad(const LogitRows& student, const LogitRows& teacher, const std::int64_t* tokens,
                  const float* statistics, const Cost& cost, const float* cost_weight, const float* logprob_weight,
                  std::int64_t num_rows, std::int64_t vocab_size, const GradRows& grad, float* rounding,
                  void* stream);

// Both in one read of the logits, for kForwardCe without log-prob weights; a row lies in the shared memory of
// cluster_size blocks (1, 2, 4 or 8; compute capability 9.0). All rows begin at multiples of 16 bytes. rounding is
// [num_rows, cluster_size], a sum for each block.
int cuda_row_stats_grad(const LogitRows& student, const LogitRows& teacher, const std::int64_t* tokens,
                        const float* ce_weight, std::int64_t num_rows, std::int64_t vocab_size, int cluster_size,
                        float* statistics, const GradRows& grad, float* rounding, void* stream);

// The costs of a chunk's rows on [num_positions, num_sequences], and what lies behind them.
struct CostGrid {
  const float* costs;
  const std::int64_t* slots;  // index in costs, -1 for none
  const double* later;        // [num_later, num_sequences], next_later of the positions behind
  std::int64_t num_positions, num_sequences, num_later;
};

// to_go[p] = sum_{0 < k <= horizon} discount^k cost[p + k]; horizon 0 for all. num_later is the horizon, or 1.
int cuda_cost_to_go(const CostGrid& grid, double discount, std::int64_t horizon, float* to_go, double* next_later,
                    void* stream);

}  // namespace distil_kernels
