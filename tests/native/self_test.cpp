// Every CPU kernel on random inputs, against a double-precision definition, without Python: what the sanitizers and
// an emulator of another processor can run (`make sanitize`, tests/native/aarch64.sh).
//
//     self_test [SEED]       prints its seed; exits 1 at the first difference
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#include "distil_kernels.h"

using namespace distil_kernels;

namespace {

std::mt19937_64 engine;

float normal(float scale) { return scale * std::normal_distribution<float>()(engine); }
int below(int bound) { return static_cast<int>(engine() % static_cast<std::uint64_t>(bound)); }

void check(double found, double expected, double scale, const char* what) {
  if (std::abs(found - expected) <= 3e-5 * scale) return;
  std::printf("%s: %.9g, expected %.9g within %.3g\n", what, found, expected, 3e-5 * scale);
  std::exit(1);
}

struct Model {
  std::int64_t num_rows, vocab_size, row_stride;
  std::vector<float> raw, bias;
  float softcap, inverse_temperature;

  Model(std::int64_t rows, std::int64_t columns)
      : num_rows(rows), vocab_size(columns), row_stride(columns + below(5)), raw(rows * row_stride, NAN) {
    for (std::int64_t row = 0; row < rows; ++row)
      for (std::int64_t column = 0; column < columns; ++column) raw[row * row_stride + column] = normal(3);
    if (below(2)) bias.resize(columns);
    for (float& each : bias) each = normal(1);
    softcap = below(2) ? 5.0f : 0.0f;
    inverse_temperature = below(2) ? 1.0f : 0.7f;
  }

  LogitRows rows() const {
    return {raw.data(), row_stride, bias.empty() ? nullptr : bias.data(), softcap, inverse_temperature};
  }

  // The logits of a row, and their derivatives by the raw ones.
  void logits(std::int64_t row, std::vector<double>& values, std::vector<double>& slopes) const {
    values.assign(vocab_size, 0), slopes.assign(vocab_size, inverse_temperature);
    for (std::int64_t v = 0; v < vocab_size; ++v) {
      double x = static_cast<double>(raw[row * row_stride + v]) + (bias.empty() ? 0.0 : bias[v]);
      if (softcap > 0) {
        const double t = std::tanh(x / softcap);
        x = softcap * t, slopes[v] *= 1 - t * t;
      }
      values[v] = x * inverse_temperature;
    }
  }
};

std::vector<double> log_softmax(const std::vector<double>& logits) {
  double largest = -std::numeric_limits<double>::infinity(), sum = 0;
  for (double each : logits) largest = std::max(largest, each);
  for (double each : logits) sum += std::exp(each - largest);
  std::vector<double> result;
  for (double each : logits) result.push_back(each - largest - std::log(sum));
  return result;
}

// Value and gradient by the student's logits of a row's cost.
double cost_by_definition(const Cost& cost, const std::vector<double>& student, const std::vector<double>& teacher,
                          std::vector<double>& gradient) {
  const double b = cost.jsd_weight;
  double value = 0;
  std::vector<double> terms(student.size());  // of which the gradient is S (term - mean of the terms)
  for (std::size_t v = 0; v < student.size(); ++v) {
    const double s = std::exp(student[v]), t = std::exp(teacher[v]), mixture = std::log(b * t + (1 - b) * s);
    switch (cost.statistic) {
      case kForwardCe: value -= t * student[v]; break;
      case kForwardKl: value += t * (teacher[v] - student[v]); break;
      case kReverseKl: value += s * (student[v] - teacher[v]), terms[v] = student[v] - teacher[v]; break;
      case kEntropy: value -= s * student[v], terms[v] = -student[v]; break;
      default:
        value += b * t * (teacher[v] - mixture) + (1 - b) * s * (student[v] - mixture);
        terms[v] = (1 - b) * (student[v] - mixture);
    }
  }
  double mean = 0;
  for (std::size_t v = 0; v < student.size(); ++v) mean += std::exp(student[v]) * terms[v];
  const bool is_forward = cost.statistic == kForwardCe || cost.statistic == kForwardKl;
  gradient.resize(student.size());
  for (std::size_t v = 0; v < student.size(); ++v)
    gradient[v] = std::exp(student[v]) * (is_forward ? 1 : terms[v] - mean) - (is_forward ? std::exp(teacher[v]) : 0);
  return value;
}

void check_rows(InstructionSet instruction_set) {
  const int sizes[] = {1, 7, 128, 131, 1031};
  const Statistic costs[] = {kForwardCe, kForwardKl, kReverseKl, kJsd, kEntropy};
  const std::int64_t num_rows = 1 + below(9), vocab_size = sizes[below(5)];
  const int num_threads = 1 + below(4);
  const Model student(num_rows, vocab_size), teacher(num_rows, vocab_size);
  const Cost cost{costs[below(5)], 0.3f};
  std::vector<std::int64_t> tokens(num_rows);
  for (auto& token : tokens) token = below(static_cast<int>(vocab_size));
  std::vector<float> statistics(kNumStatistics * num_rows, NAN), cost_weight(num_rows), logprob_weight(num_rows);
  for (auto& weight : cost_weight) weight = below(4) ? normal(1) : 0.0f;
  for (auto& weight : logprob_weight) weight = below(4) ? normal(1) : 0.0f;
  const RowTask task{student.rows(), teacher.rows(), tokens.data(), cost, num_rows, vocab_size, statistics.data()};
  std::vector<float> gradient(num_rows * vocab_size, NAN), in_one_read(num_rows * vocab_size, NAN);
  GradRows grad{cost_weight.data(), nullptr, in_one_read.data(), vocab_size, FloatType::kFloat32, nullptr, nullptr,
                nullptr};
  cpu_row_stats_grad(task, grad, num_threads, instruction_set);
  cpu_row_stats(task, num_threads, instruction_set);
  grad.logprob_weight = logprob_weight.data(), grad.data = gradient.data();
  cpu_row_grad(task, grad, num_threads, instruction_set);
  std::vector<float> with_terms(num_rows * vocab_size, NAN), terms(kNumTermWeights * num_rows);
  for (auto& weight : terms) weight = below(4) ? normal(1) : 0.0f;
  std::vector<std::int64_t> labels(num_rows);
  for (std::int64_t row = 0; row < num_rows; ++row) {
    labels[row] = below(static_cast<int>(vocab_size) + 1) - 1;
    if (labels[row] < 0) terms[kLabelWeight * num_rows + row] = 0.0f;
  }
  grad.data = with_terms.data(), grad.term_weights = terms.data(), grad.labels = labels.data();
  cpu_row_grad(task, grad, num_threads, instruction_set);

  std::vector<double> logits, slopes, teacher_logits, unused, of_cost;
  for (std::int64_t row = 0; row < num_rows; ++row) {
    student.logits(row, logits, slopes), teacher.logits(row, teacher_logits, unused);
    const std::vector<double> s = log_softmax(logits), t = log_softmax(teacher_logits);
    const double value = cost_by_definition(cost, s, t, of_cost);
    check(statistics[cost.statistic * num_rows + row], value, 1 + std::abs(value), "cost");
    check(statistics[kLogprob * num_rows + row], s[tokens[row]], 1 + std::abs(s[tokens[row]]), "log-prob");
    for (std::int64_t v = 0; v < vocab_size; ++v) {
      const double by_cost = cost_weight[row] * of_cost[v] * slopes[v];
      const double by_token = logprob_weight[row] * ((v == tokens[row]) - std::exp(s[v])) * slopes[v];
      const double scale = 1 + std::abs(by_cost) + std::abs(by_token);
      check(in_one_read[row * vocab_size + v], by_cost, scale, "gradient in one read");
      check(gradient[row * vocab_size + v], by_cost + by_token, scale, "gradient");
      const auto term = [&](int which) { return static_cast<double>(terms[which * num_rows + row]); };
      const double of_student = std::exp(s[v]) * (term(kStudentWeight) + term(kStudentLogWeight) * s[v]);
      const double of_terms = of_student + term(kUniformWeight) + (v == labels[row]) * term(kLabelWeight);
      check(with_terms[row * vocab_size + v], by_cost + by_token + of_terms * slopes[v], scale + std::abs(of_terms),
            "gradient with terms");
    }
  }
}

void check_sparse(InstructionSet instruction_set) {
  const std::int64_t num_rows = 1 + below(9), num_columns = 1 + below(300), width = 1 + below(40);
  const int num_threads = 1 + below(4);
  std::vector<float> dense(num_rows * num_columns), cutoff(num_rows), dropped(num_rows);
  for (float& each : dense) each = below(3) ? 0.0f : normal(1);
  std::vector<std::int64_t> counts(num_rows), offsets(num_rows + 1), offsets_t(num_columns + 1);
  cpu_sparse_count(dense.data(), num_columns, num_rows, num_columns, 0.1f, cutoff.data(), counts.data(),
                   dropped.data(), num_threads, instruction_set);
  for (std::int64_t row = 0; row < num_rows; ++row) offsets[row + 1] = offsets[row] + counts[row];
  std::vector<std::int32_t> index(offsets[num_rows]), index_t(offsets[num_rows]);
  std::vector<float> value(offsets[num_rows]), value_t(offsets[num_rows]);
  const SparseRows rows{offsets.data(), index.data(), value.data(), num_rows};
  const SparseRows columns{offsets_t.data(), index_t.data(), value_t.data(), num_columns};
  cpu_sparse_select(dense.data(), num_columns, num_columns, cutoff.data(), rows, num_threads, instruction_set);
  std::vector<std::int64_t> position(std::max(num_rows, num_columns));
  cpu_sparse_transpose(rows, columns, position.data(), num_threads, instruction_set);

  std::vector<float> weight(num_rows * width), product(num_columns * width, 0.0f);
  for (float& each : weight) each = normal(1);
  const DenseRows right{weight.data(), width, num_rows, width, false};
  cpu_sparse_product(columns, right, product.data(), position.data(), num_threads, instruction_set);
  for (std::int64_t column = 0; column < num_columns; ++column)
    for (std::int64_t k = 0; k < width; ++k) {
      double sum = 0, scale = 1;
      for (std::int64_t row = 0; row < num_rows; ++row) {
        const float entry = dense[row * num_columns + column];
        if (entry == 0 || std::abs(entry) < cutoff[row]) continue;
        sum += static_cast<double>(entry) * weight[row * width + k];
        scale += std::abs(static_cast<double>(entry) * weight[row * width + k]);
      }
      check(product[column * width + k], sum, scale, "sparse product");
    }
}

void check_gemm() {
  const std::int64_t rows = 1 + below(70), columns = 1 + below(70), depth = 1 + below(300);
  std::vector<float> a(rows * depth), b(depth * columns), c(rows * columns, NAN);
  for (float& each : a) each = normal(1);
  for (float& each : b) each = normal(1);
  cpu_gemm({a.data(), depth, 1, false}, {b.data(), columns, 1, false}, rows, columns, depth,
           {c.data(), columns, false, nullptr}, false, 1 + below(4), GemmUnit::kVector);
  for (std::int64_t i = 0; i < rows; ++i)
    for (std::int64_t j = 0; j < columns; ++j) {
      double sum = 0, scale = 1;
      for (std::int64_t k = 0; k < depth; ++k) {
        const double term = static_cast<double>(a[i * depth + k]) * b[k * columns + j];
        sum += term, scale += std::abs(term);
      }
      check(c[i * columns + j], sum, scale, "product");
    }
}

}  // namespace

int main(int argc, char** argv) {
  const std::uint64_t seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : std::random_device()();
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  engine.seed(seed);
  const InstructionSet sets[] = {InstructionSet::kPortable, InstructionSet::kAvx2, InstructionSet::kAvx512};
  const char* names[] = {"portable", "avx2", "avx512"};
  for (int each = 0; each < 3; ++each) {
    if (!cpu_supports(sets[each])) continue;
    for (int repeat = 0; repeat < 100; ++repeat) check_rows(sets[each]);
    for (int repeat = 0; repeat < 50; ++repeat) check_sparse(sets[each]);
    std::printf("%s: rows and sparse products agree\n", names[each]);
  }
  if (cpu_supports_gemm(GemmUnit::kVector)) {
    for (int repeat = 0; repeat < 30; ++repeat) check_gemm();
    std::printf("products agree\n");
  }
  return 0;
}
