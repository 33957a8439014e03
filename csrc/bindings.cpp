// What Python reaches past the dispatcher: the layer's host path, where every microsecond counts, and build facts.
// The ops themselves are torch.ops.torch_fp8.* (register.cpp).
#include <algorithm>
#include <array>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "check.h"
#include "kernels.h"
#include "torch_fp8/linear.h"
#include "torch_fp8/ops.h"

namespace py = pybind11;
using namespace torch_fp8;

namespace {

constexpr std::array<const char*, 3> kScales = {"one", "rows", "blocks"};  // by the number of Scales

Scales scales_of(const std::string& name) {
  const auto found = std::find(kScales.begin(), kScales.end(), name);
  TORCH_CHECK_VALUE(found != kScales.end(), "torch_fp8: scales must be one, rows or blocks, got ", name);
  return static_cast<Scales>(found - kScales.begin());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  py::enum_<Scaling>(m, "Scaling")
      .value("delayed", Scaling::kDelayed)
      .value("current", Scaling::kCurrent)
      .value("constant", Scaling::kConstant);

  py::class_<LinearOptions>(m, "LinearOptions")
      .def(py::init([](Scaling scaling, bool e4m3_gradients, bool power_of_two, int64_t margin, int64_t grad_margin,
                       bool fast_fprop, bool fast_dgrad, bool fast_wgrad) {
             return LinearOptions{scaling,     e4m3_gradients, power_of_two, margin,
                                  grad_margin, fast_fprop,     fast_dgrad,   fast_wgrad};
           }),
           py::kw_only(), py::arg("scaling"), py::arg("e4m3_gradients"), py::arg("power_of_two"), py::arg("margin"),
           py::arg("grad_margin"), py::arg("fast_fprop"), py::arg("fast_dgrad"), py::arg("fast_wgrad"))
      .def("targets", [](const LinearOptions& o) {
        return std::array<double, kRoles>{o.target(kInput), o.target(kWeight), o.target(kGradOutput)};
      });

  py::class_<LayerMemo, std::shared_ptr<LayerMemo>>(m, "LayerMemo")
      .def(py::init<>())
      .def_property_readonly("used_roles", &LayerMemo::used_roles)
      .def("after_update", &LayerMemo::after_update)
      .def_property_readonly("captured", &LayerMemo::captured)
      .def_property_readonly("updates", &LayerMemo::updates)
      .def("set_history", &LayerMemo::set_history)
      .def("forget", &LayerMemo::forget)
      .def("set_gathered", &LayerMemo::set_gathered)
      .def("forget_weight", &LayerMemo::forget_weight);

  m.def("linear", &linear, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("slots"), py::arg("options"),
        py::arg("memo"), py::arg("training"), py::arg("main_grad") = py::none(), py::arg("dummy_grad") = false);
  m.def("frozen_linear", &frozen_linear);
  m.def("new_slots", &new_slots, py::arg("device"), py::arg("bias") = 0, py::arg("grad_bias") = 0);

  py::class_<GemmProblem>(m, "GemmProblem")
      .def(py::init([](int64_t m, int64_t n, int64_t k, at::ScalarType a, at::ScalarType b, at::ScalarType out,
                       bool bias, bool accumulate, bool fast_accum, const std::string& scales) {
             return GemmProblem{m,
                                n,
                                k,
                                format_of(a, "a_dtype"),
                                format_of(b, "b_dtype"),
                                type_of(out, "out_dtype"),
                                bias,
                                accumulate,
                                fast_accum,
                                scales_of(scales)};
           }),
           py::kw_only(), py::arg("m"), py::arg("n"), py::arg("k"), py::arg("a_dtype"), py::arg("b_dtype"),
           py::arg("out_dtype"), py::arg("bias"), py::arg("accumulate"), py::arg("fast_accum"), py::arg("scales"))
      .def_readonly("m", &GemmProblem::m)
      .def_readonly("n", &GemmProblem::n)
      .def_readonly("k", &GemmProblem::k)
      .def_property_readonly("a_dtype", [](const GemmProblem& p) { return dtype_of(p.a_format); })
      .def_property_readonly("b_dtype", [](const GemmProblem& p) { return dtype_of(p.b_format); })
      .def_property_readonly("out_dtype", [](const GemmProblem& p) { return dtype_of(p.out_type); })
      .def_readonly("bias", &GemmProblem::bias)
      .def_readonly("accumulate", &GemmProblem::accumulate)
      .def_readonly("fast_accum", &GemmProblem::fast_accum)
      .def_property_readonly("scales", [](const GemmProblem& p) { return kScales[static_cast<size_t>(p.scales)]; });
  m.def("time_algorithms", [](const GemmProblem& problem, int rounds) {
    std::vector<std::pair<py::bytes, std::vector<double>>> timed;
    for (TimedAlgorithm& t : kernels(/*on_cuda=*/true).time_algorithms(problem, rounds))
      timed.emplace_back(t.algorithm, std::move(t.us));
    return timed;
  });
  m.def("check_algorithm", [](const GemmProblem& problem, const std::string& algorithm) {
    kernels(/*on_cuda=*/true).check_algorithm(problem, algorithm);
  });
  m.def("use_algorithms", [](const std::vector<std::pair<GemmProblem, std::string>>& chosen) {
    kernels(/*on_cuda=*/true).use_algorithms(chosen);
  });
  m.def("forget_algorithms", [] {
    if (*cuda::toolkit_version()) kernels(/*on_cuda=*/true).forget_algorithms();
  });

  m.def("toolkit_version", &cuda::toolkit_version);
  m.def("why_no_cuda", &cuda::why_absent);
  m.def("cublaslt_version", &cuda::cublaslt_version);
  m.def("check_capability", &cuda::check_capability);
}
