// The reference: for each head the scores of a query in float32, with the casts that FP8 attention makes between its
// products.
#include <array>
#include <cmath>
#include <vector>

#include <ATen/Parallel.h>

#include "types.h"

namespace torch_fp8::cpu {
namespace {

using Values = std::vector<float>;

struct Codec {
  uint8_t (*encode)(float, float);
  std::array<float, 256> values;
};

const Codec& codec_of(Format format) {
  const auto made = [](auto f) {
    using F = decltype(f);
    Codec codec{encode<F>, {}};
    for (size_t code = 0; code < codec.values.size(); ++code)
      codec.values[code] = decode<F>(static_cast<uint8_t>(code));
    return codec;
  };
  static const Codec e4m3 = made(E4M3{}), e5m2 = made(E5M2{});
  return format == Format::kE4M3 ? e4m3 : e5m2;
}

// What a number becomes by a cast, without its scale.
struct Cast {
  const Codec& codec;
  float scale;
  float operator()(float x) const { return codec.values[codec.encode(x, scale)]; }
};

float dot(const float* a, const float* b, int64_t n) {
  float sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

// a += factor * b
void add(float* a, float factor, const float* b, int64_t n) {
  for (int64_t i = 0; i < n; ++i) a[i] += factor * b[i];
}

// (tokens, dims) of a head: its codes, without their scale.
Values read(const Heads& x, const Codec& codec, int64_t batch, int64_t head, int64_t tokens, int64_t dims) {
  Values values(static_cast<size_t>(tokens * dims));
  const auto* const first = static_cast<const uint8_t*>(x.data) + batch * x.batch_stride + head * x.head_stride;
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t i = 0; i < dims; ++i)
      values[static_cast<size_t>(t * dims + i)] = codec.values[first[t * x.token_stride + i]];
  return values;
}

// As codes of that slot's scale.
void write(const Values& values, const Heads& x, const Codec& codec, float scale, int64_t batch, int64_t head,
           int64_t tokens, int64_t dims) {
  auto* const first = static_cast<uint8_t*>(const_cast<void*>(x.data)) + batch * x.batch_stride + head * x.head_stride;
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t i = 0; i < dims; ++i)
      first[t * x.token_stride + i] = codec.encode(values[static_cast<size_t>(t * dims + i)], scale);
}

constexpr int64_t kKeysAtATime = 256;  // as cuDNN takes them

int64_t keys_of(const AttentionSize& size, int64_t query) {
  return size.causal ? std::min(query + 1, size.kv_tokens) : size.kv_tokens;
}

// Amaxes of each batch and head, so that threads share nothing; the largest of a role is its amax.
struct Amaxes {
  int64_t count;
  std::array<std::vector<uint32_t>, kAttentionRoles> seen;
  explicit Amaxes(int64_t count) : count(count) {
    for (auto& role : seen) role.assign(static_cast<size_t>(count), 0);
  }
  void note(int role, int64_t at, float x) {
    uint32_t& largest = seen[static_cast<size_t>(role)][static_cast<size_t>(at)];
    largest = std::max(largest, magnitude(x));
  }
  void note(int role, int64_t at, const Values& values) {
    for (const float x : values) note(role, at, x);
  }
  void store(float* amaxes, std::initializer_list<int> roles) const {
    for (const int role : roles) {
      const auto& all = seen[static_cast<size_t>(role)];
      amaxes[role] = float_of(*std::max_element(all.begin(), all.end()));
    }
  }
};

void attention(const AttentionArgs& args) {
  const AttentionSize& size = args.size;
  const int64_t group = size.heads / size.kv_heads, dims = size.dims;
  const Slot* const scales = args.scales;
  const Codec& codec = codec_of(Format::kE4M3);
  const Cast cast_p{codec, scales[kP].scale};
  const float of_scores = scales[kQ].scale_inv * scales[kK].scale_inv * size.scale;
  const float of_sums = scales[kP].scale_inv * scales[kV].scale_inv;
  Amaxes amaxes(size.batch * size.heads);

  at::parallel_for(0, size.batch * size.heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t batch = at / size.heads, head = at % size.heads;
      const Values q = read(args.q, codec, batch, head, size.tokens, dims);
      const Values k = read(args.k, codec, batch, head / group, size.kv_tokens, dims);
      const Values v = read(args.v, codec, batch, head / group, size.kv_tokens, dims);
      Values o(static_cast<size_t>(size.tokens * dims)), scores(static_cast<size_t>(size.kv_tokens));
      for (int64_t i = 0; i < size.tokens; ++i) {
        const int64_t keys = keys_of(size, i);
        float largest = -std::numeric_limits<float>::infinity(), sum = 0;
        float* const o_row = &o[static_cast<size_t>(i * dims)];
        for (int64_t first = 0; first < keys; first += kKeysAtATime) {
          const int64_t last = std::min(keys, first + kKeysAtATime);
          const float before = largest;
          for (int64_t j = first; j < last; ++j) {
            float& score = scores[static_cast<size_t>(j)];
            score = dot(&q[static_cast<size_t>(i * dims)], &k[static_cast<size_t>(j * dims)], dims) * of_scores;
            largest = std::max(largest, score);
          }
          const float smaller = std::exp(before - largest);  // what was summed so far was relative to another maximum
          sum *= smaller;
          for (int64_t d = 0; d < dims; ++d) o_row[d] *= smaller;
          for (int64_t j = first; j < last; ++j) {
            const float p = std::exp(scores[static_cast<size_t>(j)] - largest);
            sum += p;
            add(o_row, cast_p(p), &v[static_cast<size_t>(j * dims)], dims);
          }
        }
        for (int64_t d = 0; d < dims; ++d) o_row[d] = o_row[d] * of_sums / sum;
        args.lse[at * size.tokens + i] = largest + std::log(sum);
      }
      amaxes.note(kO, at, o);
      write(o, args.o, codec, scales[kO].scale, batch, head, size.tokens, dims);
    }
  });
  args.amaxes[kP] = 1;
  amaxes.store(args.amaxes, {kO});
}

void attention_backward(const AttentionBackwardArgs& args) {
  const AttentionSize& size = args.size;
  const int64_t group = size.heads / size.kv_heads, dims = size.dims;
  const Slot* const scales = args.scales;
  const Codec &codec = codec_of(Format::kE4M3), &of_grads = codec_of(args.grad_format),
              &of_results = codec_of(args.result_format);
  const Cast cast_p{codec, scales[kP].scale}, cast_grad_p{of_grads, scales[kGradP].scale};
  const float of_scores = scales[kQ].scale_inv * scales[kK].scale_inv * size.scale;
  const float of_grad_p = scales[kGradO].scale_inv * scales[kV].scale_inv;
  const float of_delta = scales[kGradO].scale_inv * scales[kO].scale_inv;
  const float of_dv = scales[kP].scale_inv * scales[kGradO].scale_inv;
  const float of_dq = scales[kGradP].scale_inv * scales[kK].scale_inv;
  const float of_dk = scales[kGradP].scale_inv * scales[kQ].scale_inv;
  Amaxes amaxes(size.batch * size.kv_heads);

  at::parallel_for(0, size.batch * size.kv_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t batch = at / size.kv_heads, kv_head = at % size.kv_heads;
      const Values k = read(args.k, codec, batch, kv_head, size.kv_tokens, dims);
      const Values v = read(args.v, codec, batch, kv_head, size.kv_tokens, dims);
      Values dk(k.size()), dv(v.size());
      for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
        const Values q = read(args.q, codec, batch, head, size.tokens, dims);
        const Values o = read(args.o, codec, batch, head, size.tokens, dims);
        const Values dy = read(args.dy, of_grads, batch, head, size.tokens, dims);
        const float* const lse = args.lse + (batch * size.heads + head) * size.tokens;
        Values dq(q.size());
        for (int64_t i = 0; i < size.tokens; ++i) {
          const float *const q_row = &q[static_cast<size_t>(i * dims)], *const dy_row =
                                                                            &dy[static_cast<size_t>(i * dims)];
          const float delta = dot(dy_row, &o[static_cast<size_t>(i * dims)], dims) * of_delta;
          for (int64_t j = 0; j < keys_of(size, i); ++j) {
            const auto key = static_cast<size_t>(j * dims);
            const float p = std::exp(dot(q_row, &k[key], dims) * of_scores - lse[i]);
            const float grad_s = size.scale * p * (dot(dy_row, &v[key], dims) * of_grad_p - delta);
            amaxes.note(kGradP, at, grad_s);
            const float grad_code = cast_grad_p(grad_s);
            add(&dv[key], cast_p(p), dy_row, dims);
            add(&dq[static_cast<size_t>(i * dims)], grad_code, &k[key], dims);
            add(&dk[key], grad_code, q_row, dims);
          }
        }
        for (float& x : dq) x *= of_dq;
        amaxes.note(kGradQ, at, dq);
        write(dq, args.dq, of_results, scales[kGradQ].scale, batch, head, size.tokens, dims);
      }
      for (float& x : dk) x *= of_dk;
      for (float& x : dv) x *= of_dv;
      amaxes.note(kGradK, at, dk), amaxes.note(kGradV, at, dv);
      write(dk, args.dk, of_results, scales[kGradK].scale, batch, kv_head, size.kv_tokens, dims);
      write(dv, args.dv, of_results, scales[kGradV].scale, batch, kv_head, size.kv_tokens, dims);
    }
  });
  amaxes.store(args.amaxes, {kGradP, kGradQ, kGradK, kGradV});
}

[[maybe_unused]] const bool filled =
    (cpu_kernels().attention = attention, cpu_kernels().attention_backward = attention_backward, true);

}  // namespace
}  // namespace torch_fp8::cpu
