// Training in FP8 from C++: the same small network twice, once of torch::nn::Linear and once of torch_fp8::nn::Linear,
// learning the same function from the same start. On a GPU that torch_fp8 was built for it runs there, in bfloat16.
//
//   cmake -S . -B build -DTORCH_FP8_TESTS=ON && cmake --build build && build/examples/cpp/train_cpp
#include <cstdio>
#include <memory>

#include <torch/torch.h>
#include <torch_fp8/kernels.h>
#include <torch_fp8/torch_fp8.h>

namespace {

constexpr int64_t kInputs = 16, kHidden = 256, kOutputs = 16;
constexpr int64_t kSteps = 400, kBatch = 256;
// FP8 has 3 mantissa bits: the network ends a little further from a function that it could learn exactly.
constexpr float kAllowed = 1.5f;

// The layer's type is all that differs.
template <class Linear>
struct Net : torch::nn::Module {
  at::Tensor forward(const at::Tensor& x) { return out(torch::gelu(hidden(x))); }

  Linear hidden = register_module("hidden", Linear(kInputs, kHidden));
  Linear out = register_module("out", Linear(kHidden, kOutputs));
};

// What is to be learnt: smooth, not linear, the same in every run.
at::Tensor teacher(const at::Tensor& x) {
  return torch::sin(2 * x) * torch::roll(x, 1, /*dims=*/-1);
}

// The mean loss of the last tenth of the steps.
template <class Linear>
float train(const char* name, torch::Device device, torch::Dtype dtype) {
  torch::manual_seed(0);  // the same weights and the same batches
  const auto net = std::make_shared<Net<Linear>>();
  net->to(device, dtype);
  torch::optim::Adam optimizer(net->parameters(), /*lr=*/3e-3);

  float last = 0;
  std::printf("%s\n", name);
  for (int64_t step = 1; step <= kSteps; ++step) {
    const at::Tensor x = torch::randn({kBatch, kInputs}).to(device, dtype);
    const at::Tensor loss = torch::mse_loss(net->forward(x), teacher(x));
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
    torch_fp8::nn::update_scales(*net);  // once per step: every FP8 layer gets its next scales

    const float value = loss.item<float>();
    if (step == 1 || step % (kSteps / 4) == 0) std::printf("  step %3d  loss %.4f\n", static_cast<int>(step), value);
    if (step > kSteps - kSteps / 10) last += value / (kSteps / 10);
  }
  return last;
}

}  // namespace

int main() {
  const bool gpu = torch::cuda::is_available() && *torch_fp8::cuda::toolkit_version();
  const torch::Device device = gpu ? torch::kCUDA : torch::kCPU;
  const torch::Dtype dtype = gpu ? torch::kBFloat16 : torch::kFloat;

  const float reference = train<torch::nn::Linear>("torch::nn::Linear", device, dtype);
  const float fp8 = train<torch_fp8::nn::Linear>("torch_fp8::nn::Linear", device, dtype);

  const bool learnt = fp8 <= kAllowed * reference;
  std::printf("%s: final loss %.4f in FP8, %.4f in %s; at most %.1f times as much is allowed\n",
              learnt ? "ok" : "FAILED", fp8, reference, gpu ? "bfloat16" : "float32", kAllowed);
  return learnt ? 0 : 1;
}
