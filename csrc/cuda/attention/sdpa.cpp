// FP8 attention through cuDNN: describe the graph once, keep its plan; then a call hands over pointers and launches.
// Facts behind the rules here: docs/design.md, "cuDNN".
//
// The only file that includes cudnn-frontend. Nothing of cuDNN is linked: it is the copy that PyTorch has loaded.
#include <c10/util/Exception.h>

#include "build_config.h"
#include "cuda/common/launch.h"

#ifdef TORCH_FP8_CUDNN

#include <array>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <set>
#include <string_view>
#include <unordered_map>

#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContextLight.h>
#include <ATen/cudnn/Handle.h>
#include <c10/cuda/CUDAFunctions.h>
#include <dlfcn.h>

namespace {

// The frontend asks for libcudart.so.12 and .13 and takes the first that there is. Only that of this build is right.
[[maybe_unused]] void* open_library(const char* name, int mode) {
  constexpr std::string_view kRuntime = "libcudart.so.";
  const bool is_runtime = std::string_view(name).starts_with(kRuntime);
  if (is_runtime && std::atoi(name + kRuntime.size()) != CUDART_VERSION / 1000) return nullptr;
  return dlopen(name, mode);
}

}  // namespace

// PyTorch has inline functions of another version of the frontend. Under a name of its own ours are not taken for them.
#define cudnn_frontend torch_fp8_cudnn_frontend
#define dlopen open_library
#include <cudnn_frontend.h>
#undef dlopen

namespace cudnn_frontend {
void* cudnn_dlhandle = nullptr;
}

namespace torch_fp8::cuda {
namespace {

namespace fe = cudnn_frontend;
using fe::graph::Graph;
using Tensor = std::shared_ptr<fe::graph::Tensor_attributes>;
using Pointers = std::unordered_map<int64_t, void*>;

constexpr size_t kOldest = 90700, kBroken = 91000;  // 9.7.0, 9.10.0
constexpr size_t kMaxPlans = 128;                   // per thread; up to 2.5 MB of the host each
constexpr int64_t kWholeTokens = 16;

std::string version_in_words(size_t version) {
  return std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) + "." +
         std::to_string(version % 100);
}

std::string load_cudnn() {
  fe::cudnn_dlhandle = dlopen("libcudnn.so.9", RTLD_NOW);
  if (!fe::cudnn_dlhandle) return dlerror();
  const size_t version = fe::detail::get_backend_version();
  return version < kOldest || version == kBroken ? version_in_words(version) + " is loaded" : "";
}

void check_attention() {
  const cudaDeviceProp* device = at::cuda::getCurrentDeviceProperties();
  check_capability(device->major, device->minor, device->name);
  static const std::string fault = load_cudnn();
  TORCH_CHECK(fault.empty(), "torch_fp8: FP8 attention needs cuDNN 9.7 or newer, and not 9.10.0, but ", fault,
              "; install another nvidia-cudnn-cu", CUDART_VERSION / 1000, ", or run the attention in 16 bits");
}

std::string in_words(const AttentionSize& size) {
  return c10::str("batch ", size.batch, ", ", size.heads, " heads on ", size.kv_heads, ", ", size.tokens, " tokens on ",
                  size.kv_tokens, ", ", size.dims, " wide", size.causal ? ", causal" : "");
}

void check(fe::error_t status, const AttentionSize& size) {
  if (status.is_bad()) cudaGetLastError();  // as in launch.h
  TORCH_CHECK(status.is_good(), "torch_fp8: cuDNN ", version_in_words(fe::detail::get_backend_version()),
              " has no FP8 attention for ", in_words(size), " (",
              status.get_message().substr(0, status.get_message().find('\n')), "); run this attention in 16 bits");
}

// What a tensor is called in a graph and in Pointers; kTensor, kScale, kScaleInv and kAmax are followed by a role.
constexpr int64_t kLse = 1, kTensor = 2, kScale = kTensor + kAttentionRoles, kScaleInv = kScale + kAttentionRoles,
                  kAmax = kScaleInv + kAttentionRoles;

fe::DataType_t data_type(Format format) {
  return format == Format::kE4M3 ? fe::DataType_t::FP8_E4M3 : fe::DataType_t::FP8_E5M2;
}

class Plan {
 public:
  explicit Plan(const AttentionArgs& args) : Plan(args.size) {
    fe::graph::SDPA_attributes options;
    options.set_name("attention").set_generate_stats(true).set_attn_scale(size_.scale).set_causal_mask(size_.causal);
    // The one that was measured. Newer versions might choose another.
    options.set_implementation(fe::AttentionImplementation_t::COMPOSITE);
    const Tensor q = input(kQ, args.q), k = input(kK, args.k), v = input(kV, args.v);
    const auto [o, lse, amax_p, amax_o] = graph_.sdpa_fp8(q, k, v, scale_inv(kQ), scale_inv(kK), scale_inv(kV),
                                                          scale_inv(kP), scale(kP), scale(kO), options);
    output(o, kO, args.o, Format::kE4M3);
    describe_lse(lse)->set_output(true);
    output_amax(amax_p, kP);
    output_amax(amax_o, kO);
    build();
  }

  explicit Plan(const AttentionBackwardArgs& args) : Plan(args.size) {
    fe::graph::SDPA_fp8_backward_attributes options;
    options.set_name("attention_backward").set_attn_scale(size_.scale).set_causal_mask(size_.causal);
    const Tensor q = input(kQ, args.q), k = input(kK, args.k), v = input(kV, args.v), o = input(kO, args.o);
    const Tensor dy = input(kGradO, args.dy, args.grad_format), lse = describe_lse(graph_.tensor({}));
    const auto [dq, dk, dv, amax_dq, amax_dk, amax_dv, amax_dp] =
        graph_.sdpa_fp8_backward(q, k, v, o, dy, lse, scale_inv(kQ), scale_inv(kK), scale_inv(kV), scale_inv(kO),
                                 scale_inv(kGradO), scale_inv(kP), scale_inv(kGradP), scale(kP), scale(kGradQ),
                                 scale(kGradK), scale(kGradV), scale(kGradP), options);
    output(dq, kGradQ, args.dq, args.result_format);
    output(dk, kGradK, args.dk, args.result_format);
    output(dv, kGradV, args.dv, args.result_format);
    output_amax(amax_dq, kGradQ);
    output_amax(amax_dk, kGradK);
    output_amax(amax_dv, kGradV);
    output_amax(amax_dp, kGradP);
    build();
  }

  // The workspace comes from PyTorch's allocator in each call: right on every stream and under graph capture.
  void run(Pointers& pointers) const {
    const at::Tensor workspace = at::empty({workspace_bytes_}, at::TensorOptions().dtype(at::kByte).device(at::kCUDA));
    check(graph_.execute(at::native::getCudnnHandle(), pointers, workspace.data_ptr()), size_);
  }

 private:
  explicit Plan(const AttentionSize& size) : size_(size) {
    graph_.set_intermediate_data_type(fe::DataType_t::FLOAT).set_compute_data_type(fe::DataType_t::FLOAT);
  }

  const Tensor& describe(const Tensor& tensor, int64_t name, const std::vector<int64_t>& dims,
                         const std::vector<int64_t>& strides, fe::DataType_t type) {
    tensor->set_uid(name).set_dim(dims).set_stride(strides).set_data_type(type);
    return tensor;
  }
  const Tensor& describe_heads(const Tensor& tensor, AttentionRole role, const Heads& heads, Format format) {
    const bool of_keys = role == kK || role == kV || role == kGradK || role == kGradV;
    return describe(
        tensor, kTensor + role,
        {size_.batch, of_keys ? size_.kv_heads : size_.heads, of_keys ? size_.kv_tokens : size_.tokens, size_.dims},
        {heads.batch_stride, heads.head_stride, heads.token_stride, 1}, data_type(format));
  }
  const Tensor& describe_lse(const Tensor& tensor) {
    return describe(tensor, kLse, {size_.batch, size_.heads, size_.tokens, 1},
                    {size_.heads * size_.tokens, size_.tokens, 1, 1}, fe::DataType_t::FLOAT);
  }
  const Tensor& describe_scalar(const Tensor& tensor, int64_t name) {
    return describe(tensor, name, {1, 1, 1, 1}, {1, 1, 1, 1}, fe::DataType_t::FLOAT);
  }

  Tensor input(AttentionRole role, const Heads& heads, Format format = Format::kE4M3) {
    return describe_heads(graph_.tensor({}), role, heads, format);
  }
  Tensor scale(AttentionRole role) { return describe_scalar(graph_.tensor({}), kScale + role); }
  Tensor scale_inv(AttentionRole role) { return describe_scalar(graph_.tensor({}), kScaleInv + role); }
  void output(const Tensor& tensor, AttentionRole role, const Heads& heads, Format format) {
    describe_heads(tensor, role, heads, format)->set_output(true);
  }
  void output_amax(const Tensor& tensor, AttentionRole role) {
    describe_scalar(tensor, kAmax + role)->set_output(true);
  }

  void build() {
    check(graph_.build(at::native::getCudnnHandle(), {fe::HeurMode_t::A}), size_);
    check(graph_.get_workspace_size(workspace_bytes_), size_);
  }

  AttentionSize size_;
  Graph graph_;
  int64_t workspace_bytes_ = 0;
};

struct Operand {
  AttentionRole role;
  const Heads& heads;
};

// All that a plan depends on.
using Key = std::array<int64_t, 36>;
struct KeyHash {
  size_t operator()(const Key& key) const {
    return std::hash<std::string_view>()({reinterpret_cast<const char*>(key.data()), sizeof key});
  }
};

Key key_of(const AttentionSize& size, Format grad, Format result, std::initializer_list<Operand> operands) {
  Key key{c10::cuda::current_device(),
          size.batch,
          size.heads,
          size.kv_heads,
          size.tokens,
          size.kv_tokens,
          size.dims,
          size.causal,
          bits_of(size.scale),
          int64_t(grad),
          int64_t(result)};
  size_t at = key.size() - 8 * 3;
  for (const auto& [role, heads] : operands) {
    for (const int64_t stride : {heads.batch_stride, heads.token_stride, heads.head_stride}) key[at++] = stride;
  }
  return key;
}

// Each thread keeps its plans: no lock, as in gemm.cpp. A captured graph launches a plan's kernels for as long as it
// lives, so a plan that was captured stays.
using SharedPlan = std::shared_ptr<const Plan>;

void keep(const SharedPlan& plan) {
  static std::mutex mutex;
  static auto& captured = *new std::set<SharedPlan>;
  const std::lock_guard lock(mutex);
  captured.insert(plan);
}

template <class Args>
const Plan& plan_of(const Key& key, const Args& args) {
  thread_local std::unordered_map<Key, SharedPlan, KeyHash> plans;
  auto found = plans.find(key);
  if (found == plans.end()) {
    check_attention();
    if (plans.size() >= kMaxPlans) plans.clear();
    found = plans.emplace(key, std::make_shared<const Plan>(args)).first;
  }
  if (is_capturing()) keep(found->second);
  return *found->second;
}

// cuDNN takes what it reads, too, as void*.
void* writable(const void* pointer) { return const_cast<void*>(pointer); }

template <class Args>
void run(const Args& args, Format grad, Format result, std::initializer_list<Operand> operands) {
  Pointers pointers{{kLse, writable(args.lse)}};
  for (int role = 0; role < kAttentionRoles; ++role) {
    pointers[kScale + role] = writable(&args.scales[role].scale);
    pointers[kScaleInv + role] = writable(&args.scales[role].scale_inv);
    pointers[kAmax + role] = args.amaxes + role;
  }
  for (const auto& [role, heads] : operands) pointers[kTensor + role] = writable(heads.data);
  plan_of(key_of(args.size, grad, result, operands), args).run(pointers);
}

void attention(const AttentionArgs& args) {
  run(args, {}, {}, {{kQ, args.q}, {kK, args.k}, {kV, args.v}, {kO, args.o}});
}

void run_backward(const AttentionBackwardArgs& args) {
  run(args, args.grad_format, args.result_format,
      {{kQ, args.q},
       {kK, args.k},
       {kV, args.v},
       {kO, args.o},
       {kGradO, args.dy},
       {kGradQ, args.dq},
       {kGradK, args.dk},
       {kGradV, args.dv}});
}

// (batch, tokens, heads, dims) by eight codes, which are copied faster so.
constexpr int64_t kWord = 8;
at::Tensor queries_of(const AttentionSize& size, const Heads& heads) {
  return at::from_blob(writable(heads.data), {size.batch, size.tokens, size.heads, size.dims / kWord},
                       {heads.batch_stride / kWord, heads.token_stride / kWord, heads.head_stride / kWord, 1},
                       at::TensorOptions().dtype(at::kLong).device(at::kCUDA));
}
Heads heads_of(const at::Tensor& x) {
  return {x.data_ptr(), x.stride(0) * kWord, x.stride(1) * kWord, x.stride(2) * kWord};
}

// cuDNN (9.19) leaves half of the columns of dQ out in the last rows where tokens are no multiple of kWholeTokens.
// Queries of zeros with gradients of zeros make them one, and add nothing to dK, dV and the amaxes.
void attention_backward(const AttentionBackwardArgs& args) {
  const int64_t tokens = args.size.tokens, missing = -tokens & (kWholeTokens - 1);
  if (missing == 0) return run_backward(args);
  const auto padded_queries = [&](const Heads& heads) {
    return at::constant_pad_nd(queries_of(args.size, heads), {0, 0, 0, 0, 0, missing});
  };
  const at::Tensor q = padded_queries(args.q), o = padded_queries(args.o), dy = padded_queries(args.dy);
  const at::Tensor lse = at::constant_pad_nd(
      at::from_blob(writable(args.lse), {args.size.batch, args.size.heads, tokens}, q.options().dtype(at::kFloat)),
      {0, missing});
  const at::Tensor dq = at::empty_like(q);
  AttentionBackwardArgs whole = args;
  whole.size.tokens += missing;
  whole.q = heads_of(q), whole.o = heads_of(o), whole.dy = heads_of(dy), whole.dq = heads_of(dq);
  whole.lse = lse.const_data_ptr<float>();
  run_backward(whole);
  queries_of(args.size, args.dq).copy_(dq.narrow(1, 0, tokens));
}

#else

namespace torch_fp8::cuda {
namespace {

void check_attention() {
  TORCH_CHECK(false, "torch_fp8: FP8 attention needs cuDNN and cudnn-frontend where torch_fp8 is built, but ",
              TORCH_FP8_NO_ATTENTION_REASON, "; then reinstall torch_fp8, or run the attention in 16 bits");
}
void attention(const AttentionArgs&) { check_attention(); }
void attention_backward(const AttentionBackwardArgs&) { check_attention(); }

#endif

[[maybe_unused]] const bool filled =
    (cuda_kernels().check_attention = check_attention, cuda_kernels().attention = attention,
     cuda_kernels().attention_backward = attention_backward, true);

}  // namespace
}  // namespace torch_fp8::cuda
