// What attention needs beside its kernels, on both devices against plain PyTorch.
#include <cmath>
#include <vector>

#include <torch/torch.h>

#include "kernels.h"
#include "oracle.h"

namespace torch_fp8::tests {
namespace {

constexpr auto kGpu = at::kCUDA;

bool has_cuda() { return torch::cuda::is_available() && *cuda::toolkit_version(); }
at::ScalarType type_of(Format format) { return format == Format::kE4M3 ? kE4M3Type : kE5M2Type; }

// ------------------------------------------

DequantizeHeadsArgs dequantize_args(const std::vector<at::Tensor>& codes, const at::Tensor& scale_inv,
                                    const std::vector<at::Tensor>& outs, Format format) {
  const auto type = outs[0].scalar_type();
  DequantizeHeadsArgs args{static_cast<int>(codes.size()),
                           format,
                           type == at::kFloat  ? Type::kFloat32
                           : type == at::kHalf ? Type::kFloat16
                                               : Type::kBFloat16,
                           {}};
  for (size_t i = 0; i < codes.size(); ++i) {
    args.tensors[i] = {static_cast<const uint8_t*>(codes[i].const_data_ptr()),
                       scale_inv.const_data_ptr<float>() + i,
                       outs[i].data_ptr(),
                       codes[i].size(0),
                       codes[i].size(1),
                       codes[i].size(2)};
  }
  return args;
}

void dequantize_everywhere(bool on_gpu) {
  const std::vector<at::Tensor> codes = {
      at::arange(256, at::kInt).to(at::kByte).view({1, 1, 256}), at::randint(256, {3, 1, 16}, at::kInt).to(at::kByte),
      at::randint(256, {1000, 4, 48}, at::kInt).to(at::kByte), at::randint(256, {129, 2, 128}, at::kInt).to(at::kByte)};
  const at::Tensor scale_inv = at::tensor({1.0f, 0.3f, 1.7f, 1e30f});
  for (const Format format : {Format::kE4M3, Format::kE5M2}) {
    for (const auto type : {at::kFloat, at::kHalf, at::kBFloat16}) {
      for (size_t count = 1; count <= codes.size(); ++count) {
        const std::vector<at::Tensor> some(codes.begin(), codes.begin() + static_cast<int64_t>(count));
        std::vector<at::Tensor> outs, gpu_codes, gpu_outs;
        for (const at::Tensor& x : some) {
          outs.push_back(at::empty({x.size(0), x.size(2)}, type));
          gpu_codes.push_back(on_gpu ? x.to(kGpu) : x);
          gpu_outs.push_back(on_gpu ? at::empty_like(outs.back(), kGpu) : outs.back());
        }
        kernels(false).dequantize_heads(dequantize_args(some, scale_inv, outs, format));
        const at::Tensor gpu_scale_inv = on_gpu ? scale_inv.to(kGpu) : scale_inv;
        if (on_gpu) kernels(true).dequantize_heads(dequantize_args(gpu_codes, gpu_scale_inv, gpu_outs, format));
        for (size_t i = 0; i < count; ++i) {
          const at::Tensor values = some[i].view(type_of(format)).to(at::kFloat);
          at::Tensor sum = values.select(1, 0);
          for (int64_t g = 1; g < values.size(1); ++g) sum = sum + values.select(1, g);
          const at::Tensor expected = (sum * scale_inv[static_cast<int64_t>(i)]).to(type);
          const auto without_nan = [](const at::Tensor& x) { return x.cpu().masked_fill(x.cpu().isnan(), 7); };
          EXPECT_TRUE(same_bits(without_nan(gpu_outs[i]), without_nan(expected))) << type << " " << i;
          EXPECT_TRUE(at::equal(gpu_outs[i].cpu().isnan(), expected.isnan()));
        }
      }
    }
  }
}

TEST(AttentionCodes, Dequantized) { dequantize_everywhere(false); }
TEST(AttentionCodes, DequantizedOnCuda) {
  if (!has_cuda()) GTEST_SKIP();
  dequantize_everywhere(true);
}

void record_everywhere(bool on_gpu) {
  const float nan = kNaN, inf = kInf;
  at::Tensor amaxes = at::tensor({2.0f, -0.0f, inf, nan, 0.5f, 0.0f, -nan, 3.0f, 1e-30f, 4.0f});
  at::Tensor slots = at::zeros({10, 4}), scales = at::full({10, 4}, 9.0f);
  for (int role = 0; role < 10; ++role)
    slots[role][2] = role == 0 ? 1.0f : role == 4 ? 0.75f : role == 7 ? -0.0f : 0.0f;
  const at::Tensor before = slots.clone();
  RoleAmaxesArgs args{9, nullptr, nullptr, nullptr, 0b1011111111, 0b0110001101, {}};
  for (auto& cast : args.casts) cast = {448.0f, kExact};
  args.casts[2].margin = args.casts[7].margin = 0;
  if (on_gpu) amaxes = amaxes.to(kGpu), slots = slots.to(kGpu), scales = scales.to(kGpu);
  args.amaxes = amaxes.const_data_ptr<float>();
  args.slots = static_cast<Slot*>(slots.data_ptr()), args.scales = static_cast<Slot*>(scales.data_ptr());
  kernels(on_gpu).role_amaxes(args);  // of P, 3, whatever was measured
  slots = slots.cpu(), scales = scales.cpu();

  const std::vector<float> seen = {2.0f, 0.0f, inf,  1.0f, 0.75f,
                                   0.0f, nan,  3.0f, 0.0f, 0.0f};  // 8: not recorded; 9: no role
  for (int role = 0; role < 10; ++role) {
    const float amax = amax_in(slots, role);
    EXPECT_TRUE(std::isnan(seen[role]) ? std::isnan(amax) : amax == seen[role]) << role << ": " << amax;
  }
  EXPECT_TRUE(same_bits(slots.select(1, 0), before.select(1, 0)));
  const std::vector<float> scale = {224.0f, 9.0f, 1.0f, 448.0f, 9.0f, 9.0f, 9.0f, 128.0f, 448.0f / 1e-30f, 9.0f};
  for (int role = 0; role < 10; ++role) {
    EXPECT_EQ(scales[role][1].item<float>(), scale[role]) << role;
    EXPECT_EQ(scales[role][0].item<float>(), scale[role] == 9.0f ? 9.0f : 1.0f / scale[role]) << role;
  }
}

TEST(AttentionCodes, Amaxes) { record_everywhere(false); }
TEST(AttentionCodes, AmaxesOnCuda) {
  if (!has_cuda()) GTEST_SKIP();
  record_everywhere(true);
}

// Keys (batch, tokens, heads, dims) of which some channels lie around a number of their own, one around 0, and one has
// a NaN.
at::Tensor keys_with_common(const std::vector<int64_t>& sizes) {
  at::Tensor keys = at::randn(sizes) * 20;
  keys += at::randn({sizes[0], 1, sizes[2], sizes[3]}) * 80;
  keys.select(3, 1) = at::randn({sizes[0], sizes[1], sizes[2]});
  keys[0][sizes[1] - 1][0][2] = kNaN;
  return keys.clamp(-448, 448).to(kE4M3Type);
}

void centre_everywhere(bool on_gpu) {
  at::manual_seed(0);
  struct Size {
    int64_t batch, heads, kv_heads, tokens, kv_tokens, dims;
  };
  for (const Size& s : std::vector<Size>{{2, 4, 2, 37, 300, 128},
                                         {1, 1, 1, 2, 1, 16},
                                         {1, 6, 2, 300, 37, 48},
                                         {3, 2, 1, 1000, 1000, 256},
                                         {1, 3, 3, 257, 256, 80}}) {
    for (const bool as_codes : {true, false}) {
      SCOPED_TRACE(std::to_string(s.tokens) + " on " + std::to_string(s.kv_tokens) + ", " + std::to_string(s.dims));
      const auto device = on_gpu ? kGpu : at::kCPU;
      const at::Tensor k = keys_with_common({s.batch, s.kv_tokens, s.kv_heads, s.dims});
      at::Tensor queries = at::randn({s.batch, s.tokens, s.heads, s.dims}) * 50;
      // The last head of the last batch has one long query, whose scores would be moved by too much as codes, and by
      // nothing in 16 bits; in the first head of another there is a NaN.
      queries[s.batch - 1][s.tokens - 1][s.heads - 1].fill_(440);
      if (s.batch > 1) queries[0][0][0][0] = kNaN;
      const at::Tensor q = queries.clamp(-448, 448).to(kE4M3Type);
      const at::Tensor lse = at::randn({s.batch, s.heads, s.tokens}) * 5;
      at::Tensor scales = at::zeros({kAttentionRoles, 4});
      const float q_scale_inv = 0.4f / std::sqrt(static_cast<float>(s.dims)), k_scale_inv = 0.03f, scale = 0.1f;
      scales[kQ][0] = q_scale_inv, scales[kK][0] = k_scale_inv;
      const at::Tensor q_there = q.to(device), k_there = k.to(device), lse_there = lse.to(device),
                       scales_there = scales.to(device);
      const at::Tensor apart = at::zeros_like(k_there), shifted = at::empty_like(lse_there),
                       common_there = at::empty({s.batch, s.kv_heads, s.dims}, lse_there.options()),
                       after = scales_there.clone(),
                       sums = at::zeros({s.batch, s.kv_heads, 2 * s.dims + 1}, lse_there.options().dtype(at::kLong));
      const CentreArgs args{{s.batch, s.heads, s.kv_heads, s.tokens, s.kv_tokens, s.dims, false, scale},
                            static_cast<const uint8_t*>(q_there.const_data_ptr()),
                            static_cast<const uint8_t*>(k_there.const_data_ptr()),
                            lse_there.const_data_ptr<float>(),
                            static_cast<const Slot*>(scales_there.const_data_ptr()),
                            as_codes ? kRoundingOfCodes : kRoundingOf16Bits,
                            as_codes ? static_cast<uint8_t*>(apart.data_ptr()) : nullptr,
                            common_there.data_ptr<float>(),
                            shifted.data_ptr<float>(),
                            as_codes ? static_cast<Slot*>(after.data_ptr()) : nullptr,
                            sums.data_ptr<int64_t>()};
      kernels(on_gpu).centre_keys(args);

      const at::Tensor keys = k.to(at::kDouble).nan_to_num(0), mean = keys.mean(1, /*keepdim=*/true);
      const at::Tensor is_common = mean.square() * 16 > keys.square().mean(1, /*keepdim=*/true);
      const at::Tensor spread = at::where(is_common, keys.var(1, false, true), 0.0).mean(-1, true);
      const at::Tensor of_heads = q.to(at::kDouble).square().sum(-1).amax(1).view({s.batch, 1, s.kv_heads, -1});
      const at::Tensor moved =
          args.rounding * scale * q_scale_inv * k_scale_inv *
          (spread * at::where(of_heads.isnan().any(-1, true), kNaN, of_heads.amax(-1, true))).sqrt();
      const at::Tensor leaves = (moved < kMostMoved).logical_and(is_common);
      if (s.kv_tokens > 1) {
        EXPECT_TRUE(is_common.any().item<bool>() && !is_common.all().item<bool>());
        const at::Tensor whole = (moved < kMostMoved).flatten();
        EXPECT_EQ(whole[-1].item<bool>(), !as_codes);
        EXPECT_TRUE(whole.numel() == 1 || whole.any().item<bool>());
        EXPECT_TRUE(s.batch == 1 || !whole[0].item<bool>());
      }
      const at::Tensor common = at::where(leaves, mean, 0.0).to(at::kFloat).to(kE4M3Type).to(at::kFloat);
      EXPECT_TRUE(at::equal(common_there.cpu(), (common * k_scale_inv).squeeze(1)));
      const at::Tensor expected = ((k.to(at::kFloat) - common) * 0.5).clamp(-448, 448).to(kE4M3Type);
      const at::Tensor made = as_codes ? expected : at::zeros_like(expected);
      EXPECT_TRUE(at::equal(apart.cpu().to(at::kFloat).nan_to_num(777), made.to(at::kFloat).nan_to_num(777)));
      EXPECT_TRUE(expected.to(at::kFloat).isnan().any().item<bool>());
      const at::Tensor of_query = common.to(at::kDouble).repeat_interleave(s.heads / s.kv_heads, 2);
      const at::Tensor scores =
          (q.to(at::kDouble) * of_query).sum(-1).transpose(1, 2) * (scale * q_scale_inv * k_scale_inv);
      EXPECT_TRUE(at::allclose(shifted.cpu().to(at::kDouble), lse.to(at::kDouble) - scores, 1e-5, 1e-4, true));
      if (as_codes) scales[kK][0] = 2 * k_scale_inv;
      EXPECT_TRUE(same_bits(after.cpu(), scales));
    }
  }
}

TEST(AttentionCodes, KeysApartFromWhatIsCommon) { centre_everywhere(false); }
TEST(AttentionCodes, KeysApartFromWhatIsCommonOnCuda) {
  if (!has_cuda()) GTEST_SKIP();
  centre_everywhere(true);
}

}  // namespace
}  // namespace torch_fp8::tests
