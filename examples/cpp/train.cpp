// Training in FP8 from C++: the same small network twice, once of torch::nn::Linear and once of torch_fp8::nn::Linear,
// learning the same function from the same start. On a GPU that torch_fp8 was built for it runs there, in bfloat16.
//
//   cmake -S . -B build -DTORCH_FP8_TESTS=ON && cmake --build build && build/examples/cpp/train_cpp
#include <cstdio>
#include <memory>

#include <torch/torch.h>
#include <torch_fp8/torch_fp8.h>

namespace {

constexpr int64_t kFeatures = 8, kHidden = 128, kBatch = 128;
constexpr int kSteps = 300;
constexpr double kNoise = 0.2;     // of the targets; its square is the loss of a perfect network
constexpr float kAllowed = 1.15f;  // FP8's final loss, in parts of the other's

// The layer's type is all that differs.
template <class Linear>
struct Net : torch::nn::Module {
  at::Tensor forward(const at::Tensor& x) { return out(torch::gelu(hidden(x))); }

  Linear hidden = register_module("hidden", Linear(kFeatures, kHidden));
  Linear out = register_module("out", Linear(kHidden, kFeatures));
};

// What is to be learnt: each output depends on two inputs, and not linearly.
at::Tensor teacher(const at::Tensor& x) { return torch::sin(x) * torch::cos(x.roll(1, /*dims=*/-1)); }

struct Losses {
  float first, last;  // of the first step, and the mean over the last tenth of them
};

template <class Linear>
Losses train(const char* name, torch::Device device, torch::Dtype dtype) {
  torch::manual_seed(0);  // the same weights and the same batches in both runs
  const auto net = std::make_shared<Net<Linear>>();
  net->to(device, dtype);
  torch::optim::Adam optimizer(net->parameters(), /*lr=*/1e-2);

  Losses losses = {};
  std::printf("%s\n", name);
  for (int step = 1; step <= kSteps; ++step) {
    const at::Tensor x = torch::randn({kBatch, kFeatures});
    const at::Tensor y = teacher(x) + kNoise * torch::randn_like(x);

    const at::Tensor loss = torch::mse_loss(net->forward(x.to(device, dtype)), y.to(device, dtype));
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
    torch_fp8::nn::update_scales(*net);  // all FP8 layers; a network without one is left alone

    const auto value = loss.item<float>();
    if (step == 1) losses.first = value;
    if (step > kSteps - kSteps / 10) losses.last += value / (kSteps / 10);
    if (step == 1 || step % (kSteps / 4) == 0) std::printf("  step %3d   loss %.4f\n", step, value);
  }
  return losses;
}

}  // namespace

int main() {
  torch::set_num_threads(1);  // the networks are too small to gain from more
  const bool gpu = torch::cuda::is_available() && *torch_fp8::cuda::toolkit_version();
  const torch::Device device = gpu ? torch::kCUDA : torch::kCPU;
  const torch::Dtype dtype = gpu ? torch::kBFloat16 : torch::kFloat;

  const Losses reference = train<torch::nn::Linear>("torch::nn::Linear", device, dtype);
  const Losses fp8 = train<torch_fp8::nn::Linear>("torch_fp8::nn::Linear", device, dtype);

  const bool learnt = fp8.last < fp8.first / 2 && fp8.last < kAllowed * reference.last;
  std::printf("%s: FP8 ends at %.4f, %s at %.4f; up to %.2f times as much is allowed\n", learnt ? "ok" : "FAILED",
              fp8.last, gpu ? "bfloat16" : "float32", reference.last, kAllowed);
  return learnt ? 0 : 1;
}
