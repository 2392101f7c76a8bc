// The C++ functions of csrc/distil_kernels.h for Python: this file names and casts, it checks and computes nothing.
// Addresses and sizes are integers, so the extension depends on no tensor library. distil_kernels/backends/ calls
// it.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <utility>

#include "distil_kernels.h"

namespace py = pybind11;
namespace dk = distil_kernels;
using Address = std::uintptr_t;  // of device or host memory; 0 for none

namespace {

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

dk::LogitRows logit_rows(Address raw, std::int64_t row_stride, Address bias, float softcap,
                         float inverse_temperature) {
  return {pointer<const float>(raw), row_stride, pointer<const float>(bias), softcap, inverse_temperature};
}

dk::Cost cost(int statistic, float jsd_weight) { return {static_cast<dk::Statistic>(statistic), jsd_weight}; }

dk::Matrix matrix(Address data, std::int64_t row_stride, std::int64_t column_stride, bool is_bf16) {
  return {pointer<const void>(data), row_stride, column_stride, is_bf16};
}

dk::Product product(Address data, std::int64_t row_stride, bool is_bf16, Address residual) {
  return {pointer<void>(data), row_stride, is_bf16, pointer<std::uint16_t>(residual)};
}

dk::SparseRows sparse_rows(Address offsets, Address index, Address value, std::int64_t num_rows) {
  return {pointer<std::int64_t>(offsets), pointer<std::int32_t>(index), pointer<float>(value), num_rows};
}

dk::DenseRows dense_rows(Address data, std::int64_t row_stride, std::int64_t num_rows, std::int64_t num_columns,
                         bool is_bfloat16) {
  return {pointer<const void>(data), row_stride, num_rows, num_columns, is_bfloat16};
}

dk::RowTask row_task(const dk::LogitRows& student, const dk::LogitRows& teacher, Address tokens,
                     const dk::Cost& cost, std::int64_t num_rows, std::int64_t vocab_size, Address statistics) {
  return {student,  teacher,    pointer<const std::int64_t>(tokens), cost,
          num_rows, vocab_size, pointer<float>(statistics)};
}

dk::GradRows grad_rows(Address cost_weight, Address logprob_weight, Address data, std::int64_t row_stride,
                       dk::FloatType type, Address residual, Address term_weights, Address labels) {
  return {pointer<const float>(cost_weight),
          pointer<const float>(logprob_weight),
          pointer<void>(data),
          row_stride,
          type,
          pointer<float>(residual),
          pointer<const float>(term_weights),
          pointer<const std::int64_t>(labels)};
}

dk::CostGrid cost_grid(Address costs, Address slots, Address later, std::int64_t num_positions,
                       std::int64_t num_sequences, std::int64_t num_later) {
  return {pointer<const float>(costs),
          pointer<const std::int64_t>(slots),
          pointer<const double>(later),
          num_positions,
          num_sequences,
          num_later};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Row kernels of distil_kernels (csrc/). Private: use distil_kernels.backends.";

  py::enum_<dk::Statistic>(m, "Statistic")
      .value("forward_ce", dk::kForwardCe)
      .value("forward_kl", dk::kForwardKl)
      .value("reverse_kl", dk::kReverseKl)
      .value("logprob", dk::kLogprob)
      .value("teacher_logprob", dk::kTeacherLogprob)
      .value("entropy", dk::kEntropy)
      .value("teacher_entropy", dk::kTeacherEntropy)
      .value("agree", dk::kAgree)
      .value("max_logit", dk::kMaxLogit)
      .value("log_normalizer", dk::kLogNormalizer)
      .value("teacher_max_logit", dk::kTeacherMaxLogit)
      .value("teacher_log_normalizer", dk::kTeacherLogNormalizer)
      .value("jsd", dk::kJsd)
      .value("student_mixture_kl", dk::kStudentMixtureKl);

  py::class_<dk::Cost>(m, "Cost").def(py::init(&cost), py::arg("statistic"), py::arg("jsd_weight"));

  py::enum_<dk::InstructionSet>(m, "InstructionSet")
      .value("best", dk::InstructionSet::kBest)
      .value("portable", dk::InstructionSet::kPortable)
      .value("avx2", dk::InstructionSet::kAvx2)
      .value("avx512", dk::InstructionSet::kAvx512);

  py::enum_<dk::GemmUnit>(m, "GemmUnit")
      .value("best", dk::GemmUnit::kBest)
      .value("vector", dk::GemmUnit::kVector)
      .value("tiles", dk::GemmUnit::kTiles);

  py::class_<dk::LogitRows>(m, "LogitRows")
      .def(py::init(&logit_rows), py::arg("raw"), py::arg("row_stride"), py::arg("bias"), py::arg("softcap"),
           py::arg("inverse_temperature"));

  m.def("cpu_supports", &dk::cpu_supports, py::arg("instruction_set"));

  py::enum_<dk::FloatType>(m, "FloatType")
      .value("float32", dk::FloatType::kFloat32)
      .value("bfloat16", dk::FloatType::kBFloat16)
      .value("float16", dk::FloatType::kFloat16);

  py::class_<dk::RowTask>(m, "RowTask")
      .def(py::init(&row_task), py::arg("student"), py::arg("teacher"), py::arg("tokens"), py::arg("cost"),
           py::arg("num_rows"), py::arg("vocab_size"), py::arg("statistics"));

  py::class_<dk::GradRows>(m, "GradRows")
      .def(py::init(&grad_rows), py::arg("cost_weight"), py::arg("logprob_weight"), py::arg("data"),
           py::arg("row_stride"), py::arg("type"), py::arg("residual"), py::arg("term_weights") = 0,
           py::arg("labels") = 0);

  m.def("cpu_row_stats", &dk::cpu_row_stats, py::arg("task"), py::arg("num_threads"), py::arg("instruction_set"),
        py::call_guard<py::gil_scoped_release>());
  m.def("cpu_row_mixture", &dk::cpu_row_mixture, py::arg("task"), py::arg("num_threads"),
        py::arg("instruction_set"), py::call_guard<py::gil_scoped_release>());
  m.def("cpu_row_grad", &dk::cpu_row_grad, py::arg("task"), py::arg("grad"), py::arg("num_threads"),
        py::arg("instruction_set"), py::call_guard<py::gil_scoped_release>());
  m.def("cpu_row_stats_grad", &dk::cpu_row_stats_grad, py::arg("task"), py::arg("grad"), py::arg("num_threads"),
        py::arg("instruction_set"), py::call_guard<py::gil_scoped_release>());

  py::class_<dk::Matrix>(m, "Matrix")
      .def(py::init(&matrix), py::arg("data"), py::arg("row_stride"), py::arg("column_stride"), py::arg("is_bf16"));

  py::class_<dk::Product>(m, "Product")
      .def(py::init(&product), py::arg("data"), py::arg("row_stride"), py::arg("is_bf16"), py::arg("residual"));

  m.def("cpu_is_intel", &dk::cpu_is_intel);
  m.def("cpu_supports_gemm", &dk::cpu_supports_gemm, py::arg("unit"));
  m.def("cpu_gemm", &dk::cpu_gemm, py::arg("a"), py::arg("b"), py::arg("num_rows"), py::arg("num_columns"),
        py::arg("depth"), py::arg("c"), py::arg("accumulate"), py::arg("num_threads"), py::arg("unit"),
        py::call_guard<py::gil_scoped_release>());

  m.def(
      "cpu_rounding_residual",
      [](Address a, std::int64_t row_stride, std::int64_t num_rows, std::int64_t num_columns, Address residual,
         int num_threads) {
        dk::cpu_rounding_residual(pointer<const float>(a), row_stride, num_rows, num_columns,
                                  pointer<float>(residual), num_threads);
      },
      py::arg("a"), py::arg("row_stride"), py::arg("num_rows"), py::arg("num_columns"), py::arg("residual"),
      py::arg("num_threads"), py::call_guard<py::gil_scoped_release>());

  py::class_<dk::SparseRows>(m, "SparseRows")
      .def(py::init(&sparse_rows), py::arg("offsets"), py::arg("index"), py::arg("value"), py::arg("num_rows"));

  py::class_<dk::DenseRows>(m, "DenseRows")
      .def(py::init(&dense_rows), py::arg("data"), py::arg("row_stride"), py::arg("num_rows"),
           py::arg("num_columns"), py::arg("is_bfloat16"));

  m.def(
      "cpu_sparse_count",
      [](Address dense, std::int64_t row_stride, std::int64_t num_rows, std::int64_t num_columns, float threshold,
         Address cutoff, Address counts, Address dropped, int num_threads, dk::InstructionSet instruction_set) {
        dk::cpu_sparse_count(pointer<const float>(dense), row_stride, num_rows, num_columns, threshold,
                             pointer<float>(cutoff), pointer<std::int64_t>(counts), pointer<float>(dropped),
                             num_threads, instruction_set);
      },
      py::arg("dense"), py::arg("row_stride"), py::arg("num_rows"), py::arg("num_columns"), py::arg("threshold"),
      py::arg("cutoff"), py::arg("counts"), py::arg("dropped"), py::arg("num_threads"), py::arg("instruction_set"),
      py::call_guard<py::gil_scoped_release>());

  m.def(
      "cpu_sparse_select",
      [](Address dense, std::int64_t row_stride, std::int64_t num_columns, Address cutoff,
         const dk::SparseRows& out, int num_threads, dk::InstructionSet instruction_set) {
        dk::cpu_sparse_select(pointer<const float>(dense), row_stride, num_columns, pointer<const float>(cutoff),
                              out, num_threads, instruction_set);
      },
      py::arg("dense"), py::arg("row_stride"), py::arg("num_columns"), py::arg("cutoff"), py::arg("out"),
      py::arg("num_threads"), py::arg("instruction_set"), py::call_guard<py::gil_scoped_release>());

  m.def(
      "cpu_sparse_transpose",
      [](const dk::SparseRows& rows, const dk::SparseRows& out, Address position, int num_threads,
         dk::InstructionSet instruction_set) {
        dk::cpu_sparse_transpose(rows, out, pointer<std::int64_t>(position), num_threads, instruction_set);
      },
      py::arg("rows"), py::arg("out"), py::arg("position"), py::arg("num_threads"), py::arg("instruction_set"),
      py::call_guard<py::gil_scoped_release>());

  m.def(
      "cpu_sparse_product",
      [](const dk::SparseRows& rows, const dk::DenseRows& dense, Address out, Address position, int num_threads,
         dk::InstructionSet instruction_set) {
        dk::cpu_sparse_product(rows, dense, pointer<float>(out), pointer<std::int64_t>(position), num_threads,
                               instruction_set);
      },
      py::arg("rows"), py::arg("dense"), py::arg("out"), py::arg("position"), py::arg("num_threads"),
      py::arg("instruction_set"), py::call_guard<py::gil_scoped_release>());

#if !defined(DISTIL_CUDA)
#if !defined(DISTIL_CUDA_MISSING)
#define DISTIL_CUDA_MISSING "it was built without nvcc"
#endif
  m.attr("cuda_missing") = DISTIL_CUDA_MISSING;
#else
  m.def("cuda_device_error", &dk::cuda_device_error);
  m.def("cuda_error_text", &dk::cuda_error_text, py::arg("error"));

  py::class_<dk::DeviceLimits>(m, "DeviceLimits")
      .def(py::init<>())
      .def_readonly("capability_major", &dk::DeviceLimits::capability_major)
      .def_readonly("capability_minor", &dk::DeviceLimits::capability_minor)
      .def_readonly("shared_bytes", &dk::DeviceLimits::shared_bytes);

  m.def("cuda_device_limits", &dk::cuda_device_limits, py::arg("device"), py::arg("limits"));

  m.def(
      "cuda_row_stats",
      [](const dk::RowTask& task, Address stream) { return dk::cuda_row_stats(task, pointer<void>(stream)); },
      py::arg("task"), py::arg("stream"));

  m.def(
      "cuda_row_mixture",
      [](const dk::RowTask& task, Address stream) { return dk::cuda_row_mixture(task, pointer<void>(stream)); },
      py::arg("task"), py::arg("stream"));

  m.def(
      "cuda_row_grad",
      [](const dk::RowTask& task, const dk::GradRows& grad, Address stream) {
        return dk::cuda_row_grad(task, grad, pointer<void>(stream));
      },
      py::arg("task"), py::arg("grad"), py::arg("stream"));

  m.def(
      "cuda_row_stats_grad",
      [](const dk::RowTask& task, const dk::GradRows& grad, int cluster_size, Address stream) {
        return dk::cuda_row_stats_grad(task, grad, cluster_size, pointer<void>(stream));
      },
      py::arg("task"), py::arg("grad"), py::arg("cluster_size"), py::arg("stream"));

  m.def(
      "cuda_max_clusters",
      [](std::int64_t vocab_size, bool softcap, int cluster_size) {
        int num_clusters = 0;
        const int error = dk::cuda_max_clusters(vocab_size, softcap, cluster_size, num_clusters);
        return std::pair<int, int>(error, num_clusters);
      },
      py::arg("vocab_size"), py::arg("softcap"), py::arg("cluster_size"));

  py::class_<dk::CostGrid>(m, "CostGrid")
      .def(py::init(&cost_grid), py::arg("costs"), py::arg("slots"), py::arg("later"), py::arg("num_positions"),
           py::arg("num_sequences"), py::arg("num_later"));

  m.def(
      "cuda_cost_to_go",
      [](const dk::CostGrid& grid, double discount, std::int64_t horizon, Address to_go, Address next_later,
         Address stream) {
        return dk::cuda_cost_to_go(grid, discount, horizon, pointer<float>(to_go), pointer<double>(next_later),
                                   pointer<void>(stream));
      },
      py::arg("grid"), py::arg("discount"), py::arg("horizon"), py::arg("to_go"), py::arg("next_later"),
      py::arg("stream"));
#endif
}
