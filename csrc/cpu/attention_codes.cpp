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
    if (args.own >> role & 1) args.scales[role] = own_slot(amax, cast.target, cast.power_of_two);
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

[[maybe_unused]] const bool filled =
    (cpu_kernels().role_amaxes = role_amaxes, cpu_kernels().dequantize_heads = dequantize_heads, true);

}  // namespace
}  // namespace torch_fp8::cpu
