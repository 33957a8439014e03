// What Python reaches past the dispatcher: the layer's host path, where every microsecond counts, and build facts.
// The ops themselves are torch.ops.torch_fp8.* (register.cpp).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "torch_fp8/kernels.h"
#include "torch_fp8/linear.h"

namespace py = pybind11;
using namespace torch_fp8;

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
      .def_property_readonly("used", &LayerMemo::used)
      .def("after_update", &LayerMemo::after_update);

  m.def("linear", &linear);
  m.def("new_slots", &new_slots, py::arg("device"), py::arg("bias") = 0, py::arg("grad_bias") = 0);

  m.def("toolkit_version", &cuda::toolkit_version);
  m.def("why_no_cuda", &cuda::why_absent);
  m.def("cublaslt_version", &cuda::cublaslt_version);
  m.def("check_capability", &cuda::check_capability);
}
