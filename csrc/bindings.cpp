// What Python reaches past the dispatcher: the layer's host path, where every microsecond counts, and build facts.
// The ops themselves are torch.ops.torch_fp8.* (register.cpp).
#include <algorithm>
#include <array>

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "check.h"
#include "kernels.h"
#include "memo.h"
#include "ops/frozen_route.h"
#include "ops/record.h"
#include "siblings.h"
#include "torch_fp8/linear.h"
#include "torch_fp8/mlp.h"
#include "torch_fp8/norm.h"
#include "torch_fp8/ops.h"

namespace py = pybind11;
using namespace torch_fp8;

namespace {

// Words for enums, by their numbers.
constexpr std::array<const char*, 3> kScales = {"one", "rows", "blocks"};
constexpr std::array<const char*, 3> kWeightScales = {"tensor", "channel", "block"};
constexpr std::array<const char*, 4> kActivations = {"none", "static", "tensor", "token"};
constexpr std::array<const char*, 6> kWays = {"zeros", "few_rows", "dequantized", "streamed", "rescaled", "scaled"};

template <class Enum, size_t kCount>
Enum from_word(const std::array<const char*, kCount>& words, const char* what, const std::string& word) {
  const auto found = std::find(words.begin(), words.end(), word);
  TORCH_CHECK_VALUE(found != words.end(), "torch_fp8: ", what, " must be one of ", c10::Join(", ", words), ", got ",
                    word);
  return static_cast<Enum>(found - words.begin());
}

// What LinearLayer refers to, as Python gives it.
struct OwnedLayer {
  at::Tensor weight;
  c10::optional<at::Tensor> bias;
  at::Tensor slots;
  LinearOptions options;
  std::shared_ptr<LayerMemo> memo;
  bool training;
  c10::optional<at::Tensor> main_grad;
  bool dummy_grad;
  Place place;

  LinearLayer layer() const { return {weight, bias, slots, options, *memo, training, main_grad, dummy_grad, place}; }
};

// The GEMMs that a Python function asks for, in order.
std::vector<GemmProblem> recorded_gemms(const py::function& call) {
  const GemmRecord record;
  call();
  return record.problems();
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  // Who waits for a lock of ours lets other threads of Python run: one of them may hold it.
  const py::call_guard<py::gil_scoped_release> no_gil;
  py::enum_<Scaling>(m, "Scaling")
      .value("delayed", Scaling::kDelayed)
      .value("current", Scaling::kCurrent)
      .value("constant", Scaling::kConstant);

  py::class_<Cast>(m, "Cast")
      .def(py::init([](at::ScalarType dtype, Scaling scaling, bool power_of_two, int64_t margin) {
             return Cast{format_of(dtype, "dtype"), scaling, power_of_two, margin};
           }),
           py::kw_only(), py::arg("dtype"), py::arg("scaling"), py::arg("power_of_two"), py::arg("margin"))
      .def_property_readonly("dtype", &Cast::dtype)
      .def_readonly("scaling", &Cast::scaling)
      .def_readonly("power_of_two", &Cast::power_of_two)
      .def_property_readonly("rounding", &Cast::rounding)
      .def_readonly("margin", &Cast::margin)
      .def_property_readonly("target", &Cast::target)
      .def_property_readonly("packed", &Cast::packed);

  py::class_<LinearOptions>(m, "LinearOptions")
      .def(py::init([](Scaling scaling, bool e4m3_gradients, bool power_of_two, int64_t margin, int64_t grad_margin,
                       std::array<bool, 3> fast_accum, std::array<bool, 3> fp8) {
             return LinearOptions{scaling,       e4m3_gradients, power_of_two, margin, grad_margin, fast_accum[0],
                                  fast_accum[1], fast_accum[2],  fp8[0],       fp8[1], fp8[2]};
           }),
           py::kw_only(), py::arg("scaling"), py::arg("e4m3_gradients"), py::arg("power_of_two"), py::arg("margin"),
           py::arg("grad_margin"), py::arg("fast_accum"), py::arg("fp8"))
      .def("cast", &LinearOptions::cast)
      .def_property_readonly("fast_accum", &LinearOptions::fast_accum)
      .def_property_readonly("fp8_gemms", &LinearOptions::fp8_gemms);

  py::class_<LayerMemo, std::shared_ptr<LayerMemo>>(m, "LayerMemo")
      .def(py::init(py::overload_cast<>(&new_memo)))
      .def(py::init([](const std::vector<std::pair<std::string, float>>& roles) {
             std::vector<MemoRole> known;
             known.reserve(roles.size());
             for (const auto& [name, constant] : roles) known.push_back({name, constant});
             return new_memo(std::move(known));
           }),
           py::arg("roles"))
      .def("history", &LayerMemo::history, no_gil)
      .def("note_forward", [](LayerMemo& memo, const at::Tensor& t) { memo.note_forward(stream_of(t)); })
      .def("note_used_roles", &LayerMemo::note_used_roles)
      .def_property_readonly("used_roles", &LayerMemo::used_roles)
      .def(
          "end_step",
          [](LayerMemo& memo, const c10::optional<at::Tensor>& weight) { memo.end_step(weight ? &*weight : nullptr); },
          py::arg("weight") = py::none())
      .def("see_weight", &LayerMemo::see_weight, no_gil)
      .def_property_readonly("thread", &LayerMemo::thread)
      .def_property_readonly("captured", &LayerMemo::captured)
      .def_property_readonly("updates", &LayerMemo::updates)
      .def("set_history", &LayerMemo::set_history, no_gil)
      .def("forget", &LayerMemo::forget, no_gil)
      .def("set_gathered", &LayerMemo::set_gathered)
      .def("set_recompute", &LayerMemo::set_recompute)
      .def("forget_weight", &LayerMemo::forget_weight, no_gil);

  py::class_<Siblings, std::shared_ptr<Siblings>>(m, "Siblings")
      .def(py::init<int>())
      .def("follows", &Siblings::follows, no_gil)
      .def("set_follows", &Siblings::set_follows, no_gil)
      .def(
          "end_step",
          [](Siblings& siblings) {
            const Siblings::Step step = siblings.end_step();
            return std::tuple(step.took, step.may_have_taken, step.unread);
          },
          no_gil);
  py::class_<Place>(m, "Place").def(py::init<>()).def(py::init([](std::shared_ptr<Siblings> siblings, int member) {
    return Place{std::move(siblings), member};
  }));
  // The stream that kernels on a tensor's device run on, and the CUDA graph that it records, or 0.
  m.def("stream_of", [](const at::Tensor& t) {
    const cuda::StreamState now = stream_of(t);
    return std::pair(reinterpret_cast<uintptr_t>(now.stream), now.capture);
  });
  m.def("this_thread", [] { return at::RecordFunction::currentThreadId(); });

  // As PyTorch's own ops do, it lets other threads of Python run meanwhile.
  m.def("linear", &linear, py::call_guard<py::gil_scoped_release>(), py::arg("x"), py::arg("weight"), py::arg("bias"),
        py::arg("slots"), py::arg("options"), py::arg("memo"), py::arg("training"), py::arg("main_grad") = py::none(),
        py::arg("dummy_grad") = false, py::arg("place") = Place{});
  py::class_<OwnedLayer>(m, "LinearLayer")
      .def(py::init([](const at::Tensor& weight, const c10::optional<at::Tensor>& bias, const at::Tensor& slots,
                       const LinearOptions& options, const std::shared_ptr<LayerMemo>& memo, bool training,
                       const c10::optional<at::Tensor>& main_grad, bool dummy_grad, const Place& place) {
        return OwnedLayer{weight, bias, slots, options, memo, training, main_grad, dummy_grad, place};
      }));
  m.def(
      "mlp",
      [](const at::Tensor& x, const c10::optional<at::Tensor>& residual, const OwnedLayer& gate, const OwnedLayer* up,
         const OwnedLayer& down, const std::string& activation, bool recompute, const c10::optional<at::Tensor>& alphas,
         double beta, int64_t halves) {
        const int64_t code = activation_of_name(activation);
        if (!up) return mlp(x, residual, gate.layer(), nullptr, down.layer(), code, recompute, alphas, beta, halves);
        const LinearLayer up_layer = up->layer();
        return mlp(x, residual, gate.layer(), &up_layer, down.layer(), code, recompute, alphas, beta, halves);
      },
      py::call_guard<py::gil_scoped_release>(), py::arg("x"), py::arg("residual"), py::arg("gate"), py::arg("up"),
      py::arg("down"), py::arg("activation"), py::arg("recompute") = false, py::arg("alphas") = py::none(),
      py::arg("beta") = 0.5, py::arg("halves") = 0);
  m.def(
      "norm",
      [](const at::Tensor& x, const c10::optional<at::Tensor>& residual, const c10::optional<at::Tensor>& gain,
         const c10::optional<at::Tensor>& bias, double eps, bool layer_norm, double gain_offset,
         const OwnedLayer* reader, bool recompute) {
        const NormOptions options{eps, layer_norm, gain_offset, recompute};
        if (!reader) return norm(x, residual, gain, bias, options, nullptr);
        const LinearLayer layer = reader->layer();
        return norm(x, residual, gain, bias, options, &layer);
      },
      py::call_guard<py::gil_scoped_release>(), py::arg("x"), py::arg("residual"), py::arg("gain"), py::arg("bias"),
      py::arg("eps"), py::arg("layer_norm"), py::arg("gain_offset"), py::arg("reader"), py::arg("recompute") = false);
  // Through the dispatcher, so that tracers, modes and subclasses see the op, but not through Python's wrapper of it.
  m.def("frozen_linear", [](const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_scale,
                            const c10::optional<at::Tensor>& bias, const c10::optional<at::Tensor>& input_slot,
                            int64_t activations, c10::optional<at::ScalarType> dtype) {
    static const auto op =
        c10::Dispatcher::singleton().findSchemaOrThrow("torch_fp8::frozen_linear", "").typed<decltype(frozen_linear)>();
    const py::gil_scoped_release no_gil;
    return op.call(x, weight, weight_scale, bias, input_slot, activations, dtype, c10::nullopt, c10::nullopt);
  });
  m.def("is_input_quantized",
        [](int64_t m, int64_t n, int64_t k, const std::string& weight, const std::string& activations) {
          return is_input_quantized(m, n, k, from_word<WeightScale>(kWeightScales, "weight", weight),
                                    from_word<Activations>(kActivations, "activations", activations));
        });
  m.def(
      "frozen_way",
      [](int64_t rows, int64_t n, int64_t k, const std::string& weight, const std::string& activations,
         at::ScalarType x, at::ScalarType y, bool is_aligned, bool on_cuda, bool gradient) {
        const FrozenProduct product{rows,
                                    n,
                                    k,
                                    from_word<WeightScale>(kWeightScales, "weight", weight),
                                    from_word<Activations>(kActivations, "activations", activations),
                                    type_of(x, "x"),
                                    type_of(y, "y"),
                                    is_aligned,
                                    on_cuda};
        return kWays[static_cast<size_t>(gradient ? way_of_gradient(product) : way_of(product))];
      },
      py::arg("m"), py::arg("n"), py::arg("k"), py::kw_only(), py::arg("weight"), py::arg("activations"),
      py::arg("x_dtype"), py::arg("dtype"), py::arg("is_aligned") = true, py::arg("on_cuda") = true,
      py::arg("gradient") = false);
  m.def("new_slots", &new_slots, py::arg("device"), py::arg("bias") = 0, py::arg("grad_bias") = 0,
        py::arg("weight_bias") = py::none());

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
                                from_word<Scales>(kScales, "scales", scales)};
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
  m.def("recorded_gemms", &recorded_gemms);
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
  m.def("check_attention", [](bool on_cuda) {
    if (on_cuda) kernels(on_cuda).check_attention();
  });
}
