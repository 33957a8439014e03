// rotary, rotary_backward: a norm of each head and rotary positions, of q and k in one pass.
#include "ops/rotary.h"

#include <ATen/ATen.h>
#include <ATen/record_function.h>
#include <c10/core/DeviceGuard.h>

#include "check.h"

namespace torch_fp8 {
namespace {

using OptionalTensor = c10::optional<at::Tensor>;

// What is the same for both tensors and in both directions.
struct Rotation {
  const OptionalTensor &cos, &sin;
  int64_t rotary_dims;
  bool interleaved, heads_first;
  RotaryNorm norm;
  double eps, gain_offset;
};

RotaryNorm norm_of(int64_t norm) {
  TORCH_CHECK_VALUE(norm >= 0 && norm <= 2, "torch_fp8: norm must be 0 (none), 1 (RMS) or 2 (tanh), got ", norm);
  return static_cast<RotaryNorm>(norm);
}

// Where the dimensions of a tensor are.
struct Places {
  int64_t tokens, heads;
  explicit Places(bool heads_first) : tokens(heads_first ? 2 : 1), heads(heads_first ? 1 : 2) {}
};

const char* shape_of(bool heads_first) {
  return heads_first ? "(batch, heads, tokens, dims)" : "(batch, tokens, heads, dims)";
}

void check_heads(const at::Tensor& t, const char* name, bool heads_first) {
  type_of(t.scalar_type(), name);
  check_strided(t, name);
  TORCH_CHECK(t.dim() == 4, "torch_fp8: ", name, " must be ", shape_of(heads_first), ", got shape ", t.sym_sizes(),
              "; use unflatten(-1, (-1, head_dim))");
  TORCH_CHECK(t.sym_size(3) % 2 == 0 && t.sym_size(3) > 0 && t.sym_size(3) <= kRotaryDims,
              "torch_fp8: a head must have an even number of dims, at most ", kRotaryDims, ", got ", name, " of shape ",
              t.sym_sizes(), "; pad the heads with zeros");
}

void check_beside(const at::Tensor& t, const char* name, const at::Tensor& like, const char* like_name,
                  bool heads_first) {
  check_heads(t, name, heads_first);
  check_same_device(like, like_name, t, name);
  TORCH_CHECK_TYPE(t.scalar_type() == like.scalar_type(), "torch_fp8: ", name, " must have the dtype of ", like_name,
                   ", ", like.scalar_type(), ", got ", t.scalar_type(), "; cast one of them");
  const int64_t tokens = Places(heads_first).tokens;
  TORCH_CHECK(t.sym_size(0) == like.sym_size(0) && t.sym_size(tokens) == like.sym_size(tokens) &&
                  t.sym_size(3) == like.sym_size(3),
              "torch_fp8: ", name, " must differ from ", like_name, " ", like.sym_sizes(),
              " in the number of heads alone, where both are ", shape_of(heads_first), ", got ", t.sym_sizes(),
              "; pass heads_first as they lie");
}

void check_tables(const Rotation& r, const at::Tensor& q) {
  TORCH_CHECK(r.cos.has_value() == r.sin.has_value(), "torch_fp8: cos and sin come together; pass both or none");
  if (!r.cos) {
    TORCH_CHECK_VALUE(r.rotary_dims == 0, "torch_fp8: without cos and sin rotary_dims must be 0, got ", r.rotary_dims);
    return;
  }
  TORCH_CHECK_VALUE(r.rotary_dims > 0 && r.rotary_dims % 2 == 0 && q.sym_size(3) >= r.rotary_dims,
                    "torch_fp8: rotary_dims must be even, positive, and no more than the ", q.sym_size(3),
                    " dims of a head, got ", r.rotary_dims, "; it is the width of cos and sin, or twice that");
  const c10::SymInt batch = q.sym_size(0), tokens = q.sym_size(Places(r.heads_first).tokens);
  for (const auto& [table, name] : {std::pair(&*r.cos, "cos"), std::pair(&*r.sin, "sin")}) {
    type_of(table->scalar_type(), name);
    check_strided(*table, name);
    check_same_device(q, "q", *table, name);
    TORCH_CHECK((table->dim() == 2 || table->dim() == 3) && table->sym_size(-2) == tokens &&
                    (table->dim() == 2 || table->sym_size(0) == 1 || table->sym_size(0) == batch) &&
                    (table->sym_size(-1) == r.rotary_dims || table->sym_size(-1) == r.rotary_dims / 2),
                "torch_fp8: ", name, " must be ([", batch, " or 1,] ", tokens, " tokens, ", r.rotary_dims, " or ",
                r.rotary_dims / 2, "), got ", table->sym_sizes(),
                "; make the tables for the positions of q, one row a token, and say rotary_dims where they have one "
                "column a pair");
  }
  TORCH_CHECK(r.cos->sym_sizes() == r.sin->sym_sizes() && r.cos->scalar_type() == r.sin->scalar_type(),
              "torch_fp8: cos and sin must be alike, got ", r.cos->scalar_type(), " ", r.cos->sym_sizes(), " and ",
              r.sin->scalar_type(), " ", r.sin->sym_sizes());
}

void check_gain(const OptionalTensor& gain, const char* name, const at::Tensor& x, RotaryNorm norm) {
  TORCH_CHECK(norm != RotaryNorm::kTanh || gain, "torch_fp8: norm tanh needs ", name, ", the factor in tanh(factor x)");
  if (!gain) return;
  TORCH_CHECK(norm != RotaryNorm::kNone, "torch_fp8: ", name, " without a norm has no meaning; pass norm 1 or 2");
  type_of(gain->scalar_type(), name);
  check_strided(*gain, name);
  check_same_device(x, "q", *gain, name);
  if (norm == RotaryNorm::kTanh) {
    TORCH_CHECK(gain->sym_numel() == 1, "torch_fp8: ", name, " must have 1 element where the norm is tanh, got shape ",
                gain->sym_sizes());
  } else {
    TORCH_CHECK(gain->dim() == 1 && gain->sym_size(0) == x.sym_size(3), "torch_fp8: ", name, " must have shape [",
                x.sym_size(3), "], the dims of a head, got ", gain->sym_sizes(),
                "; a norm of whole projections (OLMo 2) is not one of each head");
  }
}

// Fresh, of a tensor's shape, token by token in memory: so the projections in front want their gradients, and every
// attention takes it.
at::Tensor token_by_token(const at::Tensor& t, bool heads_first) {
  if (!heads_first) return at::empty_symint(t.sym_sizes(), t.options());
  const c10::SymInt heads = t.sym_size(1), tokens = t.sym_size(2), dims = t.sym_size(3);
  return at::empty_strided_symint(t.sym_sizes(), {tokens * heads * dims, dims, heads * dims, 1}, t.options());
}

at::Tensor with_neighbours(const at::Tensor& t) { return t.stride(3) == 1 ? t : t.contiguous(); }

Heads heads_of(const at::Tensor& t, const Places& places) {
  return {t.const_data_ptr(), t.stride(0), t.stride(places.tokens), t.stride(places.heads)};
}

RotaryArgs args_of(const at::Tensor& x, const Rotation& r) {
  RotaryArgs args{};
  args.type = type_of(x.scalar_type(), "q");
  args.batch = x.size(0), args.tokens = x.size(Places(r.heads_first).tokens), args.dims = x.size(3);
  args.rotary_dims = r.rotary_dims;
  args.interleaved = r.interleaved, args.norm = r.norm;
  args.eps = static_cast<float>(r.eps), args.gain_offset = static_cast<float>(r.gain_offset);
  return args;
}

// The tables live as long as what is returned. A table that is as wide as rotary_dims has a column for each element.
std::pair<at::Tensor, at::Tensor> set_tables(RotaryArgs& args, const Rotation& r) {
  if (!r.cos) return {};
  const bool alike = r.cos->strides() == r.sin->strides();
  at::Tensor cos = alike ? *r.cos : r.cos->contiguous(), sin = alike ? *r.sin : r.sin->contiguous();
  args.cos = cos.const_data_ptr(), args.sin = sin.const_data_ptr();
  args.table_type = type_of(cos.scalar_type(), "cos");
  args.table_batch_stride = cos.dim() == 2 || cos.size(0) == 1 ? 0 : cos.stride(0);
  args.table_token_stride = cos.stride(-2);
  args.table_pair_stride = cos.stride(-1) * (r.interleaved && cos.size(-1) == r.rotary_dims ? 2 : 1);
  return {std::move(cos), std::move(sin)};
}

void set_gain(RotarySide& side, const at::Tensor& gain) {
  if (!gain.defined()) return;
  side.gain = gain.const_data_ptr();
  side.gain_type = type_of(gain.scalar_type(), "gain");
}

at::Tensor dense(const OptionalTensor& t) { return t ? t->contiguous() : at::Tensor(); }

void check_backward(const OptionalTensor& dq, const OptionalTensor& dk, const OptionalTensor& q,
                    const OptionalTensor& k, const Rotation& r, const OptionalTensor& q_gain,
                    const OptionalTensor& k_gain) {
  TORCH_CHECK(dq || dk, "torch_fp8: rotary_backward needs dq, dk or both");
  const at::Tensor& first = dq ? *dq : *dk;
  check_heads(first, dq ? "dq" : "dk", r.heads_first);
  if (dq && dk) check_beside(*dk, "dk", *dq, "dq", r.heads_first);
  check_tables(r, first);
  const auto check_side = [&](const OptionalTensor& dy, const OptionalTensor& x, const OptionalTensor& gain,
                              const char* name, const char* x_name, const char* gain_name) {
    if (!dy) return;
    check_gain(gain, gain_name, *dy, r.norm);
    if (r.norm == RotaryNorm::kNone) return;
    TORCH_CHECK(x, "torch_fp8: the backward of a norm needs ", x_name);
    check_beside(*x, x_name, *dy, name, r.heads_first);
    TORCH_CHECK(x->sym_sizes() == dy->sym_sizes(), "torch_fp8: ", name, " must have the shape of ", x_name, ", ",
                x->sym_sizes(), ", got ", dy->sym_sizes());
  };
  check_side(dq, q, q_gain, "dq", "q", "q_gain");
  check_side(dk, k, k_gain, "dk", "k", "k_gain");
}

void check_forward(const at::Tensor& q, const at::Tensor& k, const Rotation& r, const OptionalTensor& q_gain,
                   const OptionalTensor& k_gain) {
  check_heads(q, "q", r.heads_first);
  check_beside(k, "k", q, "q", r.heads_first);
  check_tables(r, q);
  check_gain(q_gain, "q_gain", q, r.norm);
  check_gain(k_gain, "k_gain", k, r.norm);
}

}  // namespace

RotaryResult rotary(const at::Tensor& q, const at::Tensor& k, const OptionalTensor& cos, const OptionalTensor& sin,
                    int64_t rotary_dims, bool interleaved, bool heads_first, int64_t norm, const OptionalTensor& q_gain,
                    const OptionalTensor& k_gain, double eps, double gain_offset) {
  const Rotation r{cos, sin, rotary_dims, interleaved, heads_first, norm_of(norm), eps, gain_offset};
  check_forward(q, k, r, q_gain, k_gain);
  RECORD_FUNCTION("torch_fp8::rotary", std::vector<c10::IValue>());
  const c10::DeviceGuard on_device(q.device());
  const NoAutocast no_autocast;
  RotaryArgs args = args_of(q, r);
  const auto tables = set_tables(args, r);
  const Places places(heads_first);
  const at::Tensor x_q = with_neighbours(q), x_k = with_neighbours(k), g_q = dense(q_gain), g_k = dense(k_gain);
  at::Tensor out_q = token_by_token(q, heads_first), out_k = token_by_token(k, heads_first);
  const auto set = [&](RotarySide& side, const at::Tensor& x, const at::Tensor& gain, const at::Tensor& out) {
    side.heads = x.size(places.heads), side.x = heads_of(x, places), side.out = out.data_ptr();
    set_gain(side, gain);
  };
  set(args.q, x_q, g_q, out_q), set(args.k, x_k, g_k, out_k);
  kernels_of(q).rotary(args);
  return {std::move(out_q), std::move(out_k)};
}

RotaryGradients rotary_backward(const OptionalTensor& dq, const OptionalTensor& dk, const OptionalTensor& q,
                                const OptionalTensor& k, const OptionalTensor& cos, const OptionalTensor& sin,
                                int64_t rotary_dims, bool interleaved, bool heads_first, int64_t norm,
                                const OptionalTensor& q_gain, const OptionalTensor& k_gain, double eps,
                                double gain_offset, bool gain_grads) {
  const Rotation r{cos, sin, rotary_dims, interleaved, heads_first, norm_of(norm), eps, gain_offset};
  check_backward(dq, dk, q, k, r, q_gain, k_gain);
  RECORD_FUNCTION("torch_fp8::rotary_backward", std::vector<c10::IValue>());
  const at::Tensor& first = dq ? *dq : *dk;
  const c10::DeviceGuard on_device(first.device());
  const NoAutocast no_autocast;
  RotaryArgs args = args_of(first, r);
  const auto tables = set_tables(args, r);
  const Places places(heads_first);
  struct Made {
    at::Tensor dy, x, gain, out, dgain;
  };
  const auto prepared = [&](RotarySide& side, const OptionalTensor& dy, const OptionalTensor& x,
                            const OptionalTensor& gain) {
    Made made{{}, {}, {}, nothing(first), nothing(first)};
    if (!dy) return made;
    made.dy = with_neighbours(*dy), made.out = token_by_token(*dy, heads_first), made.gain = dense(gain);
    side.heads = dy->size(places.heads), side.dy = heads_of(made.dy, places), side.out = made.out.data_ptr();
    set_gain(side, made.gain);
    if (r.norm != RotaryNorm::kNone) made.x = with_neighbours(*x), side.x = heads_of(made.x, places);
    if (gain_grads && gain) made.dgain = at::empty_like(made.gain), side.dgain = made.dgain.data_ptr();
    return made;
  };
  Made of_q = prepared(args.q, dq, q, q_gain), of_k = prepared(args.k, dk, k, k_gain);
  at::Tensor parts;
  if (args.q.dgain || args.k.dgain) {
    parts = at::empty({kRotaryParts, norm == 2 ? 1 : args.dims}, first.options().dtype(at::kFloat));
    args.parts = static_cast<float*>(parts.data_ptr());
  }
  kernels_of(first).rotary_backward(args);
  return {std::move(of_q.out), std::move(of_k.out), std::move(of_q.dgain), std::move(of_k.dgain)};
}

RotaryResult rotary_meta(const at::Tensor& q, const at::Tensor& k, const OptionalTensor& cos, const OptionalTensor& sin,
                         int64_t rotary_dims, bool interleaved, bool heads_first, int64_t norm,
                         const OptionalTensor& q_gain, const OptionalTensor& k_gain, double eps, double gain_offset) {
  check_forward(q, k, {cos, sin, rotary_dims, interleaved, heads_first, norm_of(norm), eps, gain_offset}, q_gain,
                k_gain);
  return {token_by_token(q, heads_first), token_by_token(k, heads_first)};
}

RotaryGradients rotary_backward_meta(const OptionalTensor& dq, const OptionalTensor& dk, const OptionalTensor& q,
                                     const OptionalTensor& k, const OptionalTensor& cos, const OptionalTensor& sin,
                                     int64_t rotary_dims, bool interleaved, bool heads_first, int64_t norm,
                                     const OptionalTensor& q_gain, const OptionalTensor& k_gain, double eps,
                                     double gain_offset, bool gain_grads) {
  check_backward(dq, dk, q, k, {cos, sin, rotary_dims, interleaved, heads_first, norm_of(norm), eps, gain_offset},
                 q_gain, k_gain);
  const at::Tensor& first = dq ? *dq : *dk;
  const auto of = [&](const OptionalTensor& dy) { return dy ? token_by_token(*dy, heads_first) : nothing(first); };
  const auto of_gain = [&](const OptionalTensor& dy, const OptionalTensor& gain) {
    return dy && gain && gain_grads ? at::empty_symint(gain->sym_sizes(), gain->options()) : nothing(first);
  };
  return {of(dq), of(dk), of_gain(dq, q_gain), of_gain(dk, k_gain)};
}

}  // namespace torch_fp8
