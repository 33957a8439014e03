// The CUDA backend against the CPU backend: the same bits wherever nothing is summed in another order.
#include <cstdlib>
#include <exception>
#include <string>
#include <vector>

#include <torch/torch.h>

#include "oracle.h"
#include "torch_fp8/torch_fp8.h"

namespace torch_fp8::tests {
namespace {

constexpr auto kGpu = at::kCUDA;

class Cuda : public testing::Test {
 protected:
  void SetUp() override {
    at::manual_seed(0);
    if (torch::cuda::is_available() && *cuda::toolkit_version()) return;
    const std::string why = *cuda::toolkit_version() ? "there is no GPU" : cuda::why_absent();
    const char* const required = std::getenv("TORCH_FP8_REQUIRE_CUDA");
    if (required && std::string(required) == "1") FAIL() << "TORCH_FP8_REQUIRE_CUDA=1, but " << why;
    GTEST_SKIP() << why;
  }

  // x, quantised on both devices.
  static void expect_same(const at::Tensor& x, float scale, at::ScalarType fp8, QuantizeOptions options = {}) {
    options.columnwise = true;
    options.dbias = at::kFloat;
    const at::Tensor slots = slots_with(scale), gpu_slots = slots.to(kGpu);
    const at::Tensor on_gpu = at::empty_strided(x.sizes(), x.strides(), x.options().device(kGpu)).copy_(x);
    const Quantized cpu = quantize(x, slots, kInput, fp8, options);
    const Quantized gpu = quantize(on_gpu, gpu_slots, kInput, fp8, options);
    SCOPED_TRACE(std::string(c10::toString(x.scalar_type())) + " * " + std::to_string(scale));
    EXPECT_TRUE(same_bits(gpu.q, cpu.q)) << fp8 << " " << x.sizes();
    EXPECT_TRUE(same_bits(gpu.q_t, cpu.q_t)) << fp8 << " " << x.sizes();
    EXPECT_TRUE(same_bits(gpu.scale_inv, cpu.scale_inv));
    EXPECT_TRUE(same_bits(gpu_slots, slots)) << "the amax";
    const at::Tensor values = x.to(at::kDouble);
    if (!(values.abs().sum().item<float>() < kInf)) return;  // the column sums are not finite
    // A product with ones, summed outside the tensor core: the CPU's bound holds.
    EXPECT_TRUE(is_product(gpu.dbias.cpu(), values.t(), at::ones({1, values.size(0)}, at::kDouble)));
  }
};

TEST_F(Cuda, CodesOfEvery16BitValue) {
  const at::Tensor bits = at::arange(1 << 16, at::kInt).to(at::kShort).view({256, 256});
  for (const auto dtype : {at::kBFloat16, at::kHalf}) {
    const at::Tensor x = bits.view(dtype);
    for (const auto fp8 : {kE4M3Type, kE5M2Type}) {
      for (const float scale : {0x1p-126f, 1e-20f, 0x1p-9f, 0.3f, 1.0f, 1.7f, 448.0f, 3.1e4f, 1e30f, 0x1p126f}) {
        expect_same(x, scale, fp8);
        expect_same(x.masked_fill(x.isnan(), 0), scale, fp8);
      }
    }
  }
}

TEST_F(Cuda, CodesOfFloatsOfEveryExponent) {
  const at::Tensor bits = at::randint(INT32_MIN, INT32_MAX, {512, 512}, at::kLong).to(at::kInt);
  for (const auto fp8 : {kE4M3Type, kE5M2Type}) {
    expect_same(bits.view(at::kFloat), 1.0f, fp8);
    expect_same(at::randn({512, 512}) * at::exp2(at::randn({512, 512}) * 8), 1.7f, fp8);
  }
}

TEST_F(Cuda, Recasts) {
  for (const auto dtype : {at::kFloat, at::kHalf, at::kBFloat16}) {
    for (const std::vector<int64_t>& size : {std::vector<int64_t>{16, 17}, {129, 400}, {2100, 2100}}) {
      const at::Tensor x = at::randn(size).to(dtype);
      for (const auto fp8 : {kE4M3Type, kE5M2Type}) {
        for (const float factor : {1.0f, 1.99f, 2.01f, 1 / 32.0f, 1 / 33.0f, 1e6f}) {
          QuantizeOptions options;
          options.recast = true;
          options.record = factor != 1e6f;
          expect_same(x, own_scale(x, fp8) * factor, fp8, options);
        }
      }
    }
  }
}

TEST_F(Cuda, ShapesStridesAndOwnAmax) {
  QuantizeOptions own, power_of_two;
  own.own_amax = power_of_two.own_amax = power_of_two.power_of_two = true;
  power_of_two.margin = 2;
  for (const auto dtype : {at::kFloat, at::kHalf, at::kBFloat16}) {
    for (const std::vector<int64_t>& size :
         {std::vector<int64_t>{1, 1}, {7, 16}, {16, 17}, {100, 257}, {128, 128}, {129, 400}, {1000, 24}}) {
      const at::Tensor x = at::randn(size).to(dtype);
      for (const auto& options : {QuantizeOptions{}, own, power_of_two}) expect_same(x, 20.0f, kE4M3Type, options);
    }
    const at::Tensor x = at::randn({130, 300}).to(dtype);
    for (const at::Tensor& view : {x.t(), x.slice(1, 3, 300, 7), x.narrow(0, 5, 20).narrow(1, 1, 33)}) {
      expect_same(view, 20.0f, kE5M2Type);
    }
  }
}

// From one layer, over as many as fit a kernel's arguments, to those that take a table in memory.
TEST_F(Cuda, UpdatesScalesToTheSameBits) {
  for (const int64_t count : {1, 7, 454, 455, 5000}) {
    const at::Tensor cpu_slots = at::zeros({count, kRoles, 4}), cpu_histories = at::zeros({count, kRoles, 5});
    const at::Tensor gpu_slots = cpu_slots.to(kGpu), gpu_histories = cpu_histories.to(kGpu);
    std::vector<double> targets;
    std::vector<int64_t> power_of_two;
    for (int64_t i = 0; i < count; ++i) {
      targets.insert(targets.end(), {448.0, 224.0, 57344.0});
      power_of_two.push_back(i % 2 ? 1 + i % 32 : 0);
    }
    for (int step = 0; step < 8; ++step) {
      at::Tensor amax = at::exp2(at::randn({count, kRoles}) * 25);
      for (const float special : {0.0f, kInf, kNaN}) amax = at::where(at::rand_like(amax) < 0.1, special, amax);
      cpu_slots.select(2, 2).copy_(amax);
      gpu_slots.select(2, 2).copy_(amax);
      update_scales_(cpu_slots.unbind(), cpu_histories.unbind(), targets, power_of_two);
      update_scales_(gpu_slots.unbind(), gpu_histories.unbind(), targets, power_of_two);
      ASSERT_TRUE(same_bits(gpu_slots, cpu_slots)) << count << " layers, step " << step;
      ASSERT_TRUE(same_bits(gpu_histories, cpu_histories)) << count << " layers, step " << step;
    }
  }
}

TEST_F(Cuda, Gemm) {
  for (const auto& [m, n, k] : {std::array<int64_t, 3>{16, 16, 16}, {1, 48, 32}, {40, 17, 64}, {257, 100, 528}}) {
    const at::Tensor a = at::randn({m, k}).to(kE5M2Type), b = at::randn({(n + 15) / 16 * 16, k}).to(kE4M3Type);
    const at::Tensor scale_inv = at::full({1}, 0.25f, kGpu);
    const at::Tensor a_values = a.to(at::kDouble) * 0.25, b_values = b.narrow(0, 0, n).to(at::kDouble) * 0.25;
    for (const bool fast : {false, true}) {
      for (const auto dtype : {at::kFloat, at::kHalf, at::kBFloat16}) {
        SCOPED_TRACE(std::string(c10::toString(dtype)) + " k = " + std::to_string(k));
        const at::Tensor bias = at::randn({n}).to(dtype), added = bias.to(at::kDouble);
        const auto product = [&](const c10::optional<at::Tensor>& bias) {
          return gemm(a.to(kGpu), b.to(kGpu), scale_inv, scale_inv, bias, {m, n}, dtype, fast);
        };
        EXPECT_TRUE(is_product(product({}), a_values, b_values));
        EXPECT_TRUE(is_product(product(bias.to(kGpu)), a_values, b_values, added));
        if (dtype == at::kHalf) continue;
        const at::Tensor out = bias.to(kGpu).expand({m, n}).contiguous();
        gemm_accumulate_(out, a.to(kGpu), b.to(kGpu), scale_inv, scale_inv, fast);
        // bfloat16: cuBLASLt may round the product before it adds what out holds, so the parts' roundings count.
        EXPECT_TRUE(is_sum_of_rounded_parts(out, a_values, b_values, added));
      }
    }
  }
}

TEST_F(Cuda, ModuleTrainsAsOnTheCpu) {
  nn::Linear cpu(nn::LinearOptions(40, 24).amax_history_len(3));
  nn::Linear gpu(std::dynamic_pointer_cast<nn::LinearImpl>(cpu->clone()));
  gpu->to(kGpu);
  const at::Tensor x = at::randn({8, 40}), dy = at::randn({8, 24});
  // The same tensors in every step, and so their own scales also from the history.
  const at::Tensor xq = quantised(x, own_scale(x, kE4M3Type), kE4M3Type);
  const at::Tensor wq = quantised(cpu->weight, own_scale(cpu->weight, kE4M3Type), kE4M3Type);
  const at::Tensor gq = quantised(dy, own_scale(dy, kE5M2Type), kE5M2Type);
  for (int step = 0; step < 3; ++step) {
    for (nn::Linear layer : {cpu, gpu}) {
      layer->zero_grad();
      const at::Device device = layer->weight.device();
      const at::Tensor input = x.detach().to(device).requires_grad_(), y = layer->forward(input);
      y.backward(dy.to(device));
      EXPECT_TRUE(is_product(y, xq, wq, cpu->bias.detach().to(at::kDouble))) << device;
      EXPECT_TRUE(is_product(input.grad(), gq, wq.t())) << device;
      EXPECT_TRUE(is_product(layer->weight.grad(), gq.t(), xq.t())) << device;
    }
    EXPECT_TRUE(same_bits(gpu->slots, cpu->slots)) << "the amaxes, step " << step;
    nn::update_scales(*cpu);
    nn::update_scales(*gpu);
    EXPECT_TRUE(same_bits(gpu->slots, cpu->slots)) << "the scales, step " << step;
    EXPECT_TRUE(same_bits(gpu->history, cpu->history)) << step;
  }
  gpu->to(at::kCPU, at::kBFloat16);
  EXPECT_TRUE(same_bits(gpu->slots, cpu->slots));
}

TEST_F(Cuda, NormAndMlpTrainAsOnTheCpu) {
  for (const auto& options : {nn::MLPOptions(64, 96).activation("xielu"), nn::MLPOptions(64, 96).recompute(true),
                              nn::MLPOptions(64, 96).gated(false).activation("gelu").bias(true)}) {
    torch::nn::Sequential cpu(nn::RMSNorm(64), nn::MLP(options));
    cpu->to(at::kBFloat16);
    torch::nn::Sequential gpu(std::dynamic_pointer_cast<torch::nn::SequentialImpl>(cpu->clone(kGpu)));
    for (int step = 0; step < 3; ++step) {
      const at::Tensor x = at::randn({48, 64}).to(at::kBFloat16), dy = at::randn({48, 64}).to(at::kBFloat16);
      std::vector<std::vector<at::Tensor>> made;
      for (torch::nn::Sequential model : {cpu, gpu}) {
        const auto& [norm, mlp] = std::pair(model[0]->as<nn::RMSNorm>(), model[1]->as<nn::MLP>());
        const at::Device device = norm->weight.device();
        const at::Tensor input = x.detach().to(device).requires_grad_();
        const auto [y, sum] = norm->with_sum(input, c10::nullopt, mlp->readers());
        const at::Tensor result = mlp->forward(y, sum);
        model->zero_grad();
        result.backward(dy.to(device));
        made.push_back({result.detach(), input.grad()});
        for (const at::Tensor& p : model->parameters()) made.back().push_back(p.grad());
        nn::update_scales(*model);
      }
      for (size_t i = 0; i < made[0].size(); ++i) {
        const at::Tensor right = made[0][i].to(at::kDouble), got = made[1][i].cpu().to(at::kDouble);
        // A code may be its neighbour where sums round otherwise: off by 1/16, and that of a gradient by 1/4.
        EXPECT_LT((got - right).norm().item<double>(), 0.05 * right.norm().item<double>()) << step << " " << i;
      }
    }
  }
}

TEST_F(Cuda, RefusesTensorsOfTwoDevices) {
  const at::Tensor x = at::ones({16, 16});
  EXPECT_TRUE(throws([&] { quantize(x.to(kGpu), slots_with(1.0f), kInput, kE4M3Type, {}); },
                     "slots is on cpu but x is on cuda:0; move both to one device"));
  EXPECT_TRUE(throws([&] { nn::Linear(16, 16)->forward(x.to(kGpu)); },
                     "the input is on cuda:0 but the weight is on cpu; move both to one device"));
}

TEST(CudaBuild, RunsOnHopperOnly) {
  const auto check = [](int major, int minor, const char* name) {
    return [=] { cuda::check_capability(major, minor, name); };
  };
  if (*cuda::toolkit_version() == '\0') {
    EXPECT_TRUE(throws<std::exception>(check(9, 0, "NVIDIA H200"), "was built for the CPU only"));
    EXPECT_STRNE(cuda::why_absent(), "");
    return;
  }
  EXPECT_NO_THROW(check(9, 0, "NVIDIA H200")());
  EXPECT_TRUE(throws(check(8, 0, "NVIDIA A100"), "compute capability 9.0, H100 or H200), but NVIDIA A100 has 8.0"));
  EXPECT_TRUE(throws(check(8, 9, "NVIDIA L4"), "but NVIDIA L4 has 8.9"));
  EXPECT_TRUE(throws(check(10, 0, "NVIDIA B200"), "but NVIDIA B200 has 10.0"));
  EXPECT_STREQ(cuda::why_absent(), "");
  EXPECT_GT(cuda::cublaslt_version(), 0U);
}

}  // namespace
}  // namespace torch_fp8::tests
