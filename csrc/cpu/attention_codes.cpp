#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/types.h"

namespace torch_fp8::cpu {
namespace {

void role_amaxes(const RoleAmaxesArgs& args) {
  for (int role = 0; role < args.roles; ++role) {
    const float amax = amax_of_role(args, role);
    // As signed integers, so that NaN is the largest and -0.0 the smallest.
    float& seen = args.slots[role].amax;
    const auto order = [](float x) { return static_cast<int32_t>(bits_of(x)); };
    if (args.record >> role & 1 && order(amax) > order(seen)) seen = amax;
    const auto& cast = args.casts[role];
    if (args.own >> role & 1) args.scales[role] = own_slot(amax, cast.target, cast.margin);
  }
}

void dequantize_heads(const DequantizeHeadsArgs& args) {
  const auto value_of = args.format == Format::kE4M3 ? decode<E4M3> : decode<E5M2>;
  for (const HeadsOfCodes* heads = args.tensors; heads != args.tensors + args.count; ++heads) {
    for (int64_t at = 0; at < heads->outer * heads->inner; ++at) {
      const uint8_t* code = heads->codes + at / heads->inner * heads->group * heads->inner + at % heads->inner;
      float sum = value_of(*code);
      for (int64_t i = 1; i < heads->group; ++i) sum += value_of(code[i * heads->inner]);
      set_element(heads->out, args.type, at, sum * *heads->scale_inv);
    }
  }
}

// What the keys of a batch and head have in common, each channel's a number that is a code; step is from token to
// token. Nothing, where keys would not keep their scores without it.
std::vector<float> common_of(const CentreArgs& args, const uint8_t* keys, int64_t step, float longest) {
  const AttentionSize& size = args.size;
  std::vector<float> common(static_cast<size_t>(size.dims));
  float spread = 0;
  for (int64_t i = 0; i < size.dims; ++i) {
    int64_t sum = 0, squares = 0;
    for (int64_t t = 0; t < size.kv_tokens; ++t) {
      const float key = decode<E4M3>(keys[t * step + i]);
      const auto units = std::isnan(key) ? 0 : static_cast<int64_t>(key * kCodeUnits);
      sum += units, squares += units * units;
    }
    const float mean = common_part(sum, squares, size.kv_tokens);
    common[static_cast<size_t>(i)] = decode<E4M3>(encode<E4M3>(mean));
    spread += mean == 0 ? 0 : spread_of(sum, squares, size.kv_tokens);
  }
  if (!keeps_scores(args, spread / static_cast<float>(size.dims), longest)) std::fill(common.begin(), common.end(), 0);
  return common;
}

float squared_length(const uint8_t* codes, int64_t dims) {
  float sum = 0;
  for (int64_t i = 0; i < dims; ++i) sum += decode<E4M3>(codes[i]) * decode<E4M3>(codes[i]);
  return sum;
}

void centre_keys(const CentreArgs& args) {
  const AttentionSize& size = args.size;
  const int64_t q_step = size.heads * size.dims, k_step = size.kv_heads * size.dims, group = size.heads / size.kv_heads;
  const float q_scale_inv = args.scales[kQ].scale_inv, k_scale_inv = args.scales[kK].scale_inv;
  const auto query_of = [&](int64_t batch, int64_t head, int64_t t) {
    return args.q + (batch * size.tokens + t) * q_step + head * size.dims;
  };
  for (int64_t batch = 0; batch < size.batch; ++batch) {
    for (int64_t kv_head = 0; kv_head < size.kv_heads; ++kv_head) {
      float longest = 0;
      for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
        for (int64_t t = 0; t < size.tokens; ++t) {
          const float length = squared_length(query_of(batch, head, t), size.dims);
          if (length > longest || std::isnan(length)) longest = length;  // NaN stays
        }
      }
      const int64_t first = batch * size.kv_tokens * k_step + kv_head * size.dims;
      const std::vector<float> common = common_of(args, args.k + first, k_step, longest);
      for (int64_t i = 0; i < size.dims; ++i) {
        const float part = common[static_cast<size_t>(i)];
        args.common[(batch * size.kv_heads + kv_head) * size.dims + i] = part * k_scale_inv;
        for (int64_t t = 0; args.apart && t < size.kv_tokens; ++t) {
          const int64_t at = first + t * k_step + i;
          args.apart[at] = encode<E4M3>(decode<E4M3>(args.k[at]) - part, 0.5f);
        }
      }
      for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
        for (int64_t t = 0; t < size.tokens; ++t) {
          const uint8_t* const query = query_of(batch, head, t);
          float score = 0;
          for (int64_t i = 0; i < size.dims; ++i) score += decode<E4M3>(query[i]) * common[static_cast<size_t>(i)];
          const int64_t row = (batch * size.heads + head) * size.tokens + t;
          args.shifted[row] = args.lse[row] - rescaled(score, q_scale_inv, k_scale_inv) * size.scale;
        }
      }
    }
  }
  if (args.apart) args.apart_scales[kK].scale_inv = 2 * args.scales[kK].scale_inv;
}

[[maybe_unused]] const bool filled =
    (cpu_kernels().role_amaxes = role_amaxes, cpu_kernels().dequantize_heads = dequantize_heads,
     cpu_kernels().centre_keys = centre_keys, true);

}  // namespace
}  // namespace torch_fp8::cpu
