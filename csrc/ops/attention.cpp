// attention_forward, attention_backward: an attention with every rule inside: what is checked, how each role is cast,
// and in what precision the gradient is made. Codes are (B, S, H, D) in memory, whatever the strides of what was cast.
#include <cmath>

#include <ATen/ATen.h>
#include <ATen/record_function.h>
#include <c10/core/DeviceGuard.h>

#include "ops/attention.h"
#include "ops/cast_plan.h"
#include "ops/linear.h"

namespace torch_fp8 {
namespace {

constexpr uint32_t bit(int role) { return 1u << role; }

// What holds for all roles in one call.
struct Roles {
  at::IntArrayRef casts;
  int64_t history;
  bool training, record;

  Cast cast(int role) const { return Cast::unpacked(casts[static_cast<size_t>(role)]); }
  // Gradients belong to another loss than the history does, where the model is evaluated.
  QuantizeOptions how(int role) const {
    return torch_fp8::how(cast(role), (history >> role & 1) && (training || role < kGradO), record);
  }
  uint32_t own(std::initializer_list<int> roles) const {
    uint32_t bits = 0;
    for (const int role : roles) bits |= how(role).own_amax ? bit(role) : 0;
    return bits;
  }
  uint32_t recorded(std::initializer_list<int> roles) const {
    uint32_t bits = 0;
    for (const int role : roles) bits |= how(role).record ? bit(role) : 0;
    return bits;
  }
};

float* floats_of(const at::Tensor& t) { return static_cast<float*>(t.data_ptr()); }

// Roles that a kernel measured: raised in slots, or taken for their scale.
void take_amaxes(const at::Tensor& amaxes, const at::Tensor& slots, const at::Tensor& scales, uint32_t record,
                 uint32_t own, const Roles& roles) {
  if (!record && !own) return;
  RoleAmaxesArgs args{kAttentionRoles, floats_of(amaxes), slots_of(slots), slots_of(scales), record, own, {}};
  for (int role = 0; role < kAttentionRoles; ++role) {
    const Cast cast = roles.cast(role);
    args.casts[role] = {static_cast<float>(cast.target()), margin_of(cast.power_of_two, cast.margin)};
  }
  kernels_of(slots).role_amaxes(args);
}

// t (B, H, S, D) to be cast with slots[slot]; its scale_inv goes to scales[role].
CastPlan plan_heads(const at::Tensor& t, const at::Tensor& slots, int slot, const at::Tensor& scales, int role,
                    const Roles& roles) {
  QuantizeOptions options = roles.how(slot);
  options.rowwise = true;
  const at::Tensor rows = t.transpose(1, 2).reshape({t.size(0) * t.size(2), t.size(1) * t.size(3)});
  const Format format = roles.cast(slot).format;
  CastPlan plan = plan_cast(rows, slots, slot, format, options);
  plan.steps.cast.scale_inv = &slots_of(scales)[role].scale_inv;
  return plan;
}

at::Tensor codes_as_heads(const CastPlan& plan, const at::Tensor& t) {
  return plan.out.q.narrow(0, 0, t.size(0) * t.size(2)).view({t.size(0), t.size(2), t.size(1), t.size(3)});
}

// Of three tensors with one scale, the own amax is that of all.
void run_together(std::array<CastPlan, 3>& plans) {
  const Kernels& kernels = kernels_of(plans[0].x);
  for (CastPlan& plan : plans) kernels.amax(plan.steps.cast.x, make_own(plan));
  const at::Tensor own = at::maximum(at::maximum(plans[0].own, plans[1].own), plans[2].own);
  for (CastPlan& plan : plans) {
    plan.own = own;
    scale_by_own(plan);
    kernels.quantize(plan.steps.cast);
  }
}

// (B, S, H, D), contiguous.
Heads heads_of(const at::Tensor& codes) {
  return {codes.const_data_ptr(), codes.stride(0), codes.stride(1), codes.stride(2)};
}

AttentionSize size_of(const at::Tensor& q_codes, const at::Tensor& k_codes, bool causal, double scale) {
  return {q_codes.size(0), q_codes.size(2), k_codes.size(2), q_codes.size(1),
          k_codes.size(1), q_codes.size(3), causal,          static_cast<float>(scale)};
}

// What codes are, each times the scale_inv of its role, as (B, H / group, S, D): sums over group neighbouring heads.
struct ToDequantize {
  const at::Tensor& codes;
  int role;
  int64_t group = 1;
};
std::vector<at::Tensor> dequantized(std::initializer_list<ToDequantize> all, const at::Tensor& scales,
                                    at::ScalarType dtype) {
  DequantizeHeadsArgs args{0, format_of(all.begin()->codes.scalar_type(), "codes"), type_of(dtype, "the result"), {}};
  std::vector<at::Tensor> results;
  for (const auto& [codes, role, group] : all) {
    const int64_t heads = codes.size(2) / group;
    at::Tensor out = at::empty({codes.size(0), codes.size(1), heads, codes.size(3)}, codes.options().dtype(dtype));
    args.tensors[args.count++] = {static_cast<const uint8_t*>(codes.const_data_ptr()),
                                  &slots_of(scales)[role].scale_inv,
                                  out.data_ptr(),
                                  codes.size(0) * codes.size(1) * heads,
                                  group,
                                  codes.size(3)};
    results.push_back(out.transpose(1, 2));
  }
  kernels_of(scales).dequantize_heads(args);
  return results;
}

void check_heads(const at::Tensor& t, const char* name) {
  TORCH_CHECK(!t.is_nested() && t.layout() == at::kStrided, "torch_fp8: ", name, " must be a dense tensor, got a ",
              t.is_nested() ? "nested" : "sparse", " one; use mode=\"16bit\"");
  TORCH_CHECK(t.dim() == 4, "torch_fp8: ", name, " must be (batch, heads, tokens, head_dim), got shape ", t.sym_sizes(),
              "; unsqueeze(0) what has no batch");
  TORCH_CHECK_TYPE(t.scalar_type() == at::kBFloat16 || t.scalar_type() == at::kHalf, "torch_fp8: ", name,
                   " must be bfloat16 or float16 for FP8 attention, got ", t.scalar_type(),
                   "; cast it, use torch.autocast, or mode=\"16bit\"");
}

// Of a negative one cuDNN's gradients are NaN.
void check_scale(double scale) {
  TORCH_CHECK_VALUE(scale > 0 && std::isfinite(scale),
                    "torch_fp8: FP8 attention takes a scale that is positive and finite, got ", scale,
                    "; use mode=\"16bit\"");
}

void check_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& slots,
                     at::IntArrayRef casts, double scale) {
  check_heads(q, "query"), check_heads(k, "key"), check_heads(v, "value");
  check_scale(scale);
  TORCH_CHECK_TYPE(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
                   "torch_fp8: query, key and value must be of one dtype, got ", q.scalar_type(), ", ", k.scalar_type(),
                   " and ", v.scalar_type());
  check_same_device(q, "query", k, "key"), check_same_device(q, "query", v, "value");
  TORCH_CHECK(k.sizes() == v.sizes(), "torch_fp8: key and value must be of one shape for FP8 attention, got ",
              k.sizes(), " and ", v.sizes(), "; use mode=\"16bit\"");
  TORCH_CHECK(q.size(0) == k.size(0) && q.size(3) == k.size(3),
              "torch_fp8: query and key must have one batch size and one head_dim, got shapes ", q.sizes(), " and ",
              k.sizes());
  TORCH_CHECK(k.size(1) > 0 && q.size(1) > 0 && q.size(1) % k.size(1) == 0, "torch_fp8: key has ", k.size(1),
              " heads, which do not divide query's ", q.size(1));
  const int64_t dims = q.size(3);
  TORCH_CHECK(dims > 0 && dims % kAlignment == 0 && dims <= kAttentionDims,
              "torch_fp8: FP8 attention takes a head_dim that is a multiple of ", kAlignment, " up to ", kAttentionDims,
              ", got ", dims, "; use mode=\"16bit\"");
  TORCH_CHECK(q.size(2) > 0 && k.size(2) > 0, "torch_fp8: FP8 attention takes no empty sequence, got ", q.size(2),
              " queries and ", k.size(2), " keys; leave the call out, or use mode=\"16bit\"");
  TORCH_CHECK(q.size(2) > 1, "torch_fp8: FP8 attention takes two queries and more, got one; use mode=\"16bit\"");
  check_slots(slots, kAttentionRoles);
  check_same_device(q, "query", slots, "slots");
  TORCH_CHECK_VALUE(casts.size() == kAttentionRoles, "torch_fp8: an attention has ", int(kAttentionRoles),
                    " casts, got ", casts.size());
  for (const int role : {kQ, kK, kV, kP, kO}) {
    TORCH_CHECK_VALUE(Cast::unpacked(casts[role]).format == Format::kE4M3,
                      "torch_fp8: forward roles of an attention are E4M3");
  }
  if (q.is_cuda()) kernels(/*on_cuda=*/true).check_attention();
}

void check_backward(const at::Tensor& dy, const at::Tensor& q_codes, const at::Tensor& k_codes,
                    const at::Tensor& v_codes, const at::Tensor& o_codes, const at::Tensor& scales,
                    const at::Tensor& lse, const at::Tensor& slots, at::IntArrayRef casts, double scale, bool fp8) {
  check_heads(dy, "the gradient");
  check_scale(scale);
  check_slots(slots, kAttentionRoles), check_slots(scales, kAttentionRoles);
  TORCH_CHECK_VALUE(casts.size() == kAttentionRoles, "torch_fp8: an attention has ", int(kAttentionRoles),
                    " casts, got ", casts.size());
  const std::pair<const at::Tensor&, const char*> all[]{
      {q_codes, "q_codes"}, {k_codes, "k_codes"}, {v_codes, "v_codes"}, {o_codes, "o_codes"}};
  for (const auto& [codes, name] : all) {
    TORCH_CHECK(codes.dim() == 4 && codes.is_contiguous() && codes.scalar_type() == at::kFloat8_e4m3fn &&
                    is_aligned(codes.const_data_ptr()),
                "torch_fp8: ", name, " must be what attention_forward gave, contiguous float8_e4m3fn ",
                "(batch, tokens, heads, head_dim), got ", codes.scalar_type(), " ", codes.sizes());
    check_same_device(dy, "the gradient", codes, name);
  }
  TORCH_CHECK(q_codes.transpose(1, 2).sizes() == dy.sizes() && o_codes.sizes() == q_codes.sizes() &&
                  k_codes.sizes() == v_codes.sizes() && k_codes.size(0) == q_codes.size(0) &&
                  k_codes.size(3) == q_codes.size(3) && k_codes.size(2) > 0 && q_codes.size(2) % k_codes.size(2) == 0,
              "torch_fp8: the gradient ", dy.sizes(), " and the codes ", q_codes.sizes(), ", ", k_codes.sizes(), ", ",
              v_codes.sizes(), ", ", o_codes.sizes(), " are not of one call of attention_forward");
  TORCH_CHECK(lse.scalar_type() == at::kFloat && lse.is_contiguous() && lse.sizes() == dy.sizes().slice(0, 3),
              "torch_fp8: lse must be contiguous float32 ", dy.sizes().slice(0, 3), ", got ", lse.scalar_type(), " ",
              lse.sizes());
  check_same_device(dy, "the gradient", lse, "lse"), check_same_device(dy, "the gradient", slots, "slots");
  check_same_device(dy, "the gradient", scales, "scales");
  TORCH_CHECK(!fp8 || dy.size(3) == kAttentionBackwardDims,
              "torch_fp8: the backward pass of FP8 attention takes a head_dim of ", kAttentionBackwardDims,
              " alone, got ", dy.size(3), "; use mode=\"fp8_forward\" or \"16bit\"");
}

// The gradient in 16 bits of softmax(scale q k^T) v, as PyTorch's own op makes it of the log-sum-exps, on the CPU as
// its formula is written. All (B, H, S, D), k and v with H / group heads.
AttentionGradients gradients_16bit(const at::Tensor& dy, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                   const at::Tensor& o, const at::Tensor& lse, bool causal, double scale) {
  if (q.is_cuda()) {
    const at::Tensor none, no_dropout = at::empty({}, q.options().dtype(at::kLong));
    return at::_scaled_dot_product_cudnn_attention_backward(dy, q, k, v, o, lse.unsqueeze(-1), no_dropout, no_dropout,
                                                            none, none, none, q.size(2), k.size(2), /*dropout_p=*/0.0,
                                                            causal, scale);
  }
  const int64_t batch = q.size(0), kv_heads = k.size(1), group = q.size(1) / kv_heads, tokens = q.size(2);
  const auto grouped = [&](const at::Tensor& t) {
    return t.to(at::kFloat).reshape({batch, kv_heads, group, tokens, -1});
  };
  const at::Tensor q_g = grouped(q), o_g = grouped(o), dy_g = grouped(dy);
  const at::Tensor k_f = k.to(at::kFloat).unsqueeze(2), v_f = v.to(at::kFloat).unsqueeze(2);
  at::Tensor p =
      (at::matmul(q_g, k_f.transpose(-1, -2)) * scale - lse.reshape({batch, kv_heads, group, tokens, 1})).exp();
  if (causal) p = p.tril();
  const at::Tensor delta = (dy_g * o_g).sum(-1, /*keepdim=*/true);
  const at::Tensor ds = p * (at::matmul(dy_g, v_f.transpose(-1, -2)) - delta) * scale;
  const auto summed = [](const at::Tensor& t) { return t.sum(2); };
  const auto dtype = q.scalar_type();
  return {at::matmul(ds, k_f).reshape(q.sizes()).to(dtype), summed(at::matmul(ds.transpose(-1, -2), q_g)).to(dtype),
          summed(at::matmul(p.transpose(-1, -2), dy_g)).to(dtype)};
}

// Softmax does not see what is common to all keys, which are taken apart from it before the gradient. Rows of dS sum to
// 0, but for the rounding of O, of which cuDNN knows no more than the codes; what they sum to would multiply the common
// part, and that is often large, and dQ wrong. What the keys become is rounded, which moves scores against the
// log-sum-exps; where that would be by too much they stay (keeps_scores).
struct Centred {
  at::Tensor k_codes, common, lse, scales;  // k_codes and their scale where they were asked for
};
Centred centred(const at::Tensor& q_codes, const at::Tensor& k_codes, const at::Tensor& lse, const at::Tensor& scales,
                double scale, bool as_codes) {
  RECORD_FUNCTION("torch_fp8::centre_keys", std::vector<c10::IValue>());
  const int64_t batch = k_codes.size(0), heads = k_codes.size(2), dims = k_codes.size(3);
  Centred result{as_codes ? at::empty_like(k_codes) : at::Tensor(), at::empty({batch, heads, dims}, lse.options()),
                 at::empty_like(lse), as_codes ? scales.clone() : at::Tensor()};
  const at::Tensor sums = at::zeros({batch, heads, 2 * dims + 1}, lse.options().dtype(at::kLong));
  kernels_of(k_codes).centre_keys(
      {size_of(q_codes, k_codes, /*causal=*/false, scale), static_cast<const uint8_t*>(q_codes.const_data_ptr()),
       static_cast<const uint8_t*>(k_codes.const_data_ptr()), static_cast<const float*>(lse.const_data_ptr()),
       slots_of(scales), as_codes ? kRoundingOfCodes : kRoundingOf16Bits,
       as_codes ? static_cast<uint8_t*>(result.k_codes.data_ptr()) : nullptr, floats_of(result.common),
       floats_of(result.lse), as_codes ? slots_of(result.scales) : nullptr, static_cast<int64_t*>(sums.data_ptr())});
  return result;
}

// Each query head gets keys and values of its own.
at::Tensor expanded(const at::Tensor& codes, int64_t group) {
  const at::Tensor words = codes.view(at::kLong).unsqueeze(3);  // eight codes, which are copied faster than one
  return words.expand({-1, -1, -1, group, -1}).flatten(2, 3).view(codes.scalar_type());
}

AttentionGradients gradients_fp8(const at::Tensor& dy, const at::Tensor& q_codes, const at::Tensor& k_given,
                                 const at::Tensor& v_given, const at::Tensor& o_codes, const at::Tensor& forward_scales,
                                 const at::Tensor& lse, const at::Tensor& slots, const Roles& roles, bool causal,
                                 double scale, bool expand) {
  const int64_t group = expand ? q_codes.size(2) / k_given.size(2) : 1;
  const at::Tensor k_codes = group > 1 ? expanded(k_given, group) : k_given;
  const at::Tensor v_codes = group > 1 ? expanded(v_given, group) : v_given;
  // What forward cast keeps the scales of that time; gradients have those of now.
  const at::Tensor scales =
      at::cat({forward_scales.narrow(0, 0, kGradO), slots.narrow(0, kGradO, kAttentionRoles - kGradO)});
  CastPlan plan = plan_heads(dy, slots, kGradO, scales, kGradO, roles);
  {
    RECORD_FUNCTION("torch_fp8::cast_grad_output", std::vector<c10::IValue>());
    run(plan);
  }
  const at::Tensor dy_codes = codes_as_heads(plan, dy);
  const auto options = q_codes.options().dtype(dtype_of(roles.cast(kGradQ).format));
  const at::Tensor dq = at::empty(q_codes.sizes(), options), dk = at::empty(k_codes.sizes(), options),
                   dv = at::empty(k_codes.sizes(), options);
  const at::Tensor amaxes = at::empty({kAttentionRoles}, slots.options());
  const AttentionBackwardArgs args{size_of(q_codes, k_codes, causal, scale),
                                   heads_of(q_codes),
                                   heads_of(k_codes),
                                   heads_of(v_codes),
                                   heads_of(o_codes),
                                   heads_of(dy_codes),
                                   heads_of(dq),
                                   heads_of(dk),
                                   heads_of(dv),
                                   roles.cast(kGradP).format,
                                   roles.cast(kGradQ).format,
                                   slots_of(scales),
                                   static_cast<const float*>(lse.const_data_ptr()),
                                   floats_of(amaxes)};
  const Kernels& kernels = kernels_of(slots);
  // dP's codes decide what dQ and dK are, so that its own amax comes before theirs.
  const auto measure = [&](uint32_t own) {
    if (!own) return;
    kernels.attention_backward(args);
    take_amaxes(amaxes, slots, scales, /*record=*/0, own, roles);
  };
  measure(roles.own({kGradP}));
  measure(roles.own({kGradQ, kGradK, kGradV}));
  kernels.attention_backward(args);
  take_amaxes(amaxes, slots, scales, roles.recorded({kGradP, kGradQ, kGradK, kGradV}), /*own=*/0, roles);
  auto results = dequantized({{dq, kGradQ}, {dk, kGradK, group}, {dv, kGradV, group}}, scales, dy.scalar_type());
  return {results[0], results[1], results[2]};
}

}  // namespace

Cast AttentionOptions::cast(AttentionRole role) const {
  if (role == kP && p_scale > 0) return {Format::kE4M3, Scaling::kConstant, recipe.power_of_two, 0};
  Cast cast = recipe.cast(role < kGradO ? kInput : kGradOutput);
  // So are the codes numbers of 16 bits too, and a backward in 16 bits finds the probabilities that forward had.
  if (role == kQ || role == kK || (role == kV && shared_scale)) cast.power_of_two = true;
  return cast;
}

AttentionForward attention_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                   const at::Tensor& slots, at::IntArrayRef casts, int64_t history, bool training,
                                   bool record, bool causal, double scale, bool shared_scale) {
  check_attention(q, k, v, slots, casts, scale);
  const c10::DeviceGuard guard(q.device());
  const NoAutocast no_autocast;
  const Roles roles{casts, history, training, record};
  const at::Tensor scales = slots.clone();
  std::array<CastPlan, 3> plans{plan_heads(q, slots, kQ, scales, kQ, roles),
                                plan_heads(k, slots, shared_scale ? kQ : kK, scales, kK, roles),
                                plan_heads(v, slots, shared_scale ? kQ : kV, scales, kV, roles)};
  {
    RECORD_FUNCTION("torch_fp8::cast_qkv", std::vector<c10::IValue>());
    if (shared_scale && is_own(plans[0])) {
      run_together(plans);
    } else {
      for (CastPlan& plan : plans) run(plan);
    }
  }
  const at::Tensor q_codes = codes_as_heads(plans[0], q), k_codes = codes_as_heads(plans[1], k),
                   v_codes = codes_as_heads(plans[2], v);
  const at::Tensor o_codes = at::empty(q_codes.sizes(), q_codes.options());
  const at::Tensor lse = at::empty({q.size(0), q.size(1), q.size(2)}, slots.options());
  // P's own amax is 1, before anything is computed (amax_of_role).
  const uint32_t own_p = roles.own({kP}), own_o = roles.own({kO});
  const at::Tensor amaxes = at::empty({kAttentionRoles}, slots.options());
  take_amaxes(amaxes, slots, scales, /*record=*/0, own_p, roles);
  const AttentionArgs args{size_of(q_codes, k_codes, causal, scale),
                           heads_of(q_codes),
                           heads_of(k_codes),
                           heads_of(v_codes),
                           heads_of(o_codes),
                           slots_of(scales),
                           floats_of(lse),
                           floats_of(amaxes)};
  const Kernels& kernels = kernels_of(q);
  if (q.size(0) > 0) {
    if (own_o) {
      kernels.attention(args);
      take_amaxes(amaxes, slots, scales, /*record=*/0, own_o, roles);
    }
    kernels.attention(args);
    take_amaxes(amaxes, slots, scales, roles.recorded({kP, kO}), /*own=*/0, roles);
  }
  at::Tensor y = dequantized({{o_codes, kO}}, scales, q.scalar_type())[0];
  return {y, q_codes, k_codes, v_codes, o_codes, scales, lse};
}

AttentionGradients attention_backward(const at::Tensor& dy, const at::Tensor& q_codes, const at::Tensor& k_codes,
                                      const at::Tensor& v_codes, const at::Tensor& o_codes, const at::Tensor& scales,
                                      const at::Tensor& lse, const at::Tensor& slots, at::IntArrayRef casts,
                                      int64_t history, bool training, bool record, bool causal, double scale, bool fp8,
                                      bool expand) {
  check_backward(dy, q_codes, k_codes, v_codes, o_codes, scales, lse, slots, casts, scale, fp8);
  const c10::DeviceGuard device(dy.device());
  const NoAutocast no_autocast;
  if (dy.size(0) == 0) {
    const auto empty = [&](const at::Tensor& codes) { return at::empty(codes.sizes(), dy.options()).transpose(1, 2); };
    return {empty(q_codes), empty(k_codes), empty(v_codes)};
  }
  const Centred c = centred(q_codes, k_codes, lse, scales, scale, /*as_codes=*/fp8);
  if (fp8) {
    return gradients_fp8(dy, q_codes, c.k_codes, v_codes, o_codes, c.scales, c.lse, slots,
                         {casts, history, training, record}, causal, scale, expand);
  }
  const auto t = dequantized({{q_codes, kQ}, {k_codes, kK}, {v_codes, kV}, {o_codes, kO}}, scales, dy.scalar_type());
  t[1].sub_(c.common.unsqueeze(2));  // in 16 bits, which nearly all of these differences are
  RECORD_FUNCTION("torch_fp8::attention_backward_16bit", std::vector<c10::IValue>());
  // All in memory as the fakes say, which the results are already where PyTorch's op made them. That op is given a
  // gradient that lies as the result does, since of one that lies otherwise it makes other numbers.
  const auto laid = [](const at::Tensor& t) { return t.transpose(1, 2).contiguous().transpose(1, 2); };
  const auto [dq, dk, dv] = gradients_16bit(laid(dy), t[0], t[1], t[2], t[3], c.lse, causal, scale);
  return {laid(dq), laid(dk), laid(dv)};
}

at::Tensor attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& slots,
                     const at::Tensor&, at::IntArrayRef casts, int64_t history, bool training, bool record, bool causal,
                     double scale, bool shared_scale, bool, bool) {
  return std::get<0>(attention_forward(q, k, v, slots, casts, history, training, record, causal, scale, shared_scale));
}

// ---- the same for tracing
// --------------------------------------------------------------------------------------------

namespace {

// (B, H, S, D), in memory (B, S, H, D).
at::Tensor empty_heads(const at::Tensor& like) {
  return at::empty_symint({like.sym_size(0), like.sym_size(2), like.sym_size(1), like.sym_size(3)}, like.options())
      .transpose(1, 2);
}
at::Tensor empty_codes(const at::Tensor& like, Format format) {
  return at::empty_symint({like.sym_size(0), like.sym_size(2), like.sym_size(1), like.sym_size(3)},
                          like.options().dtype(dtype_of(format)));
}

}  // namespace

AttentionForward attention_forward_meta(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                        const at::Tensor& slots, at::IntArrayRef, int64_t, bool, bool, bool, double,
                                        bool) {
  return {empty_heads(q),
          empty_codes(q, Format::kE4M3),
          empty_codes(k, Format::kE4M3),
          empty_codes(v, Format::kE4M3),
          empty_codes(q, Format::kE4M3),
          at::empty_symint(slots.sym_sizes(), slots.options()),
          at::empty_symint({q.sym_size(0), q.sym_size(1), q.sym_size(2)}, slots.options())};
}

AttentionGradients attention_backward_meta(const at::Tensor& dy, const at::Tensor& q_codes, const at::Tensor& k_codes,
                                           const at::Tensor& v_codes, const at::Tensor&, const at::Tensor&,
                                           const at::Tensor&, const at::Tensor&, at::IntArrayRef, int64_t, bool, bool,
                                           bool, double, bool, bool) {
  const auto gradient = [&](const at::Tensor& codes) {
    return at::empty_symint(codes.sym_sizes(), dy.options()).transpose(1, 2);
  };
  return {gradient(q_codes), gradient(k_codes), gradient(v_codes)};
}

at::Tensor attention_meta(const at::Tensor& q, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                          const at::Tensor&, at::IntArrayRef, int64_t, bool, bool, bool, double, bool, bool, bool) {
  return empty_heads(q);
}

}  // namespace torch_fp8
