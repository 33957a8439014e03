// FP8 GEMM through cuBLASLt: describe the problem once, choose an algorithm, keep both; then a call sets pointers and
// launches. Facts behind the rules here: docs/design.md, "cuBLASLt".
#include <memory>
#include <unordered_map>

#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContextLight.h>
#include <c10/cuda/CUDAStream.h>
#include <cublasLt.h>

#include "reference_gemm.h"
#include "torch_fp8/kernels.h"

namespace torch_fp8::cuda {
namespace {

constexpr size_t kWorkspaceBytes = 32 << 20;  // what NVIDIA recommends on Hopper
constexpr int kCandidates = 16;
constexpr size_t kMaxPlans = 4096;  // per thread; about 1 KB each

void check(cublasStatus_t status, const char* what) {
  TORCH_CHECK(status == CUBLAS_STATUS_SUCCESS, "torch_fp8: ", what, " failed with status ", static_cast<int>(status),
              " (CUBLASLT_LOG_LEVEL=5 in the environment prints the reason)");
}

template <class T, cublasStatus_t (*destroy)(T)>
struct Destroy {
  using pointer = T;
  void operator()(T handle) const { destroy(handle); }
};
using MatmulDesc = std::unique_ptr<void, Destroy<cublasLtMatmulDesc_t, cublasLtMatmulDescDestroy>>;
using Layout = std::unique_ptr<void, Destroy<cublasLtMatrixLayout_t, cublasLtMatrixLayoutDestroy>>;
using Preference = std::unique_ptr<void, Destroy<cublasLtMatmulPreference_t, cublasLtMatmulPreferenceDestroy>>;

template <class T>
void set(const MatmulDesc& desc, cublasLtMatmulDescAttributes_t attribute, const T& value) {
  check(cublasLtMatmulDescSetAttribute(desc.get(), attribute, &value, sizeof value), "cublasLtMatmulDescSetAttribute");
}

template <class T>
void set(const Preference& preference, cublasLtMatmulPreferenceAttributes_t attribute, const T& value) {
  check(cublasLtMatmulPreferenceSetAttribute(preference.get(), attribute, &value, sizeof value),
        "cublasLtMatmulPreferenceSetAttribute");
}

cudaDataType_t data_type(Format format) { return format == Format::kE4M3 ? CUDA_R_8F_E4M3 : CUDA_R_8F_E5M2; }

cudaDataType_t data_type(Type type) {
  return type == Type::kFloat32 ? CUDA_R_32F : type == Type::kFloat16 ? CUDA_R_16F : CUDA_R_16BF;
}

Layout new_layout(cudaDataType_t type, int64_t rows, int64_t cols) {
  cublasLtMatrixLayout_t layout;
  check(cublasLtMatrixLayoutCreate(&layout, type, static_cast<uint64_t>(rows), static_cast<uint64_t>(cols), rows),
        "cublasLtMatrixLayoutCreate");
  return Layout(layout);
}

// The largest power of two up to 256 that divides the address: what an algorithm may count on.
uint32_t alignment_of(const void* pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  return static_cast<uint32_t>((address | 256) & ~((address | 256) - 1));
}

// Everything a plan depends on.
struct Problem {
  int64_t m, n, k;
  uint32_t a_alignment, b_alignment, out_alignment;
  uint16_t device;
  Format a_format, b_format;
  Type out_type;
  bool bias, accumulate, fast_accum;
  uint8_t zero[4] = {};  // no padding byte is left to chance: a Problem is hashed and compared by its bytes

  bool operator==(const Problem& other) const { return std::memcmp(this, &other, sizeof *this) == 0; }
};
static_assert(sizeof(Problem) == 48 && std::has_unique_object_representations_v<Problem>);

struct Hash {
  size_t operator()(const Problem& p) const {
    return std::hash<std::string_view>()({reinterpret_cast<const char*>(&p), sizeof p});
  }
};

// cuBLASLt thinks in columns. Row-major out (m, n) = a (m, k) . b (n, k)^T is its column-major (n, m) = op(B) op(A)
// with B transposed: the one form (TN) that FP8 has on Hopper. So b is its first operand.
class Plan {
 public:
  Plan(const Problem& problem, const GemmArgs& args)
      : b_(new_layout(data_type(args.b_format), args.k, args.n)),
        a_(new_layout(data_type(args.a_format), args.k, args.m)),
        out_(new_layout(data_type(args.out_type), args.n, args.m)) {
    cublasLtMatmulDesc_t desc;
    check(cublasLtMatmulDescCreate(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F), "cublasLtMatmulDescCreate");
    desc_.reset(desc);
    set(desc_, CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T);
    set(desc_, CUBLASLT_MATMUL_DESC_TRANSB, CUBLAS_OP_N);
    set(desc_, CUBLASLT_MATMUL_DESC_FAST_ACCUM, static_cast<int8_t>(args.fast_accum));
    if (args.bias) {
      set(desc_, CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
      set(desc_, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, data_type(args.out_type));
    }
    set_pointers(args);
    choose_algorithm(problem);
  }

  void run(const GemmArgs& args) {
    if (!has_algorithm_) return reference_gemm(args, {at::kCUDA, c10::cuda::current_device()});
    set_pointers(args);
    const float alpha = 1.0f, beta = args.accumulate ? 1.0f : 0.0f;
    // Fresh from the caching allocator: right on any stream, and in a graph's own pool under capture.
    at::Tensor workspace;
    if (workspace_bytes_ > 0) {
      workspace =
          at::empty({static_cast<int64_t>(workspace_bytes_)}, at::TensorOptions().dtype(at::kByte).device(at::kCUDA));
    }
    check(cublasLtMatmul(at::cuda::getCurrentCUDABlasLtHandle(), desc_.get(), &alpha, args.b, b_.get(), args.a,
                         a_.get(), &beta, args.out, out_.get(), args.out, out_.get(), &algorithm_,
                         workspace.defined() ? workspace.data_ptr() : nullptr, workspace_bytes_,
                         c10::cuda::getCurrentCUDAStream()),
          "cublasLtMatmul");
  }

 private:
  // Never a scale for C: with beta != 0 and a C scale, algorithm 66 of this cuBLASLt can hang.
  void set_pointers(const GemmArgs& args) {
    set(desc_, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, args.b_scale_inv);
    set(desc_, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, args.a_scale_inv);
    if (args.bias) set(desc_, CUBLASLT_MATMUL_DESC_BIAS_POINTER, args.bias);
  }

  // The first candidate that is right. There may be none: for deep, narrow products (64 x 64 x 16400) every candidate
  // splits k unevenly. Such a product is small, and float32 on the dequantised operands serves it.
  void choose_algorithm(const Problem& problem) {
    cublasLtMatmulPreference_t created;
    check(cublasLtMatmulPreferenceCreate(&created), "cublasLtMatmulPreferenceCreate");
    const Preference preference(created);
    set(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, kWorkspaceBytes);
    set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, problem.b_alignment);
    set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, problem.a_alignment);
    set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, problem.out_alignment);
    set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, problem.out_alignment);

    cublasLtMatmulHeuristicResult_t results[kCandidates];
    int count = 0;
    const cublasStatus_t status =
        cublasLtMatmulAlgoGetHeuristic(at::cuda::getCurrentCUDABlasLtHandle(), desc_.get(), b_.get(), a_.get(),
                                       out_.get(), out_.get(), preference.get(), kCandidates, results, &count);
    if (status != CUBLAS_STATUS_NOT_SUPPORTED) check(status, "cublasLtMatmulAlgoGetHeuristic");
    for (int i = 0; i < count; ++i) {
      if (results[i].state == CUBLAS_STATUS_SUCCESS && !gives_wrong_results(results[i].algo, problem.k)) {
        algorithm_ = results[i].algo;
        workspace_bytes_ = results[i].workspaceSize;
        has_algorithm_ = true;
        return;
      }
    }
  }

  // Algorithm 66 (every FP8 kernel of Hopper) sums wrongly where its split of k is uneven: cuBLAS release notes, known
  // issues from 12.6 U2 on.
  static bool gives_wrong_results(const cublasLtMatmulAlgo_t& algorithm, int64_t k) {
    int32_t id = 0, splits = 1;
    size_t written = 0;
    check(cublasLtMatmulAlgoConfigGetAttribute(&algorithm, CUBLASLT_ALGO_CONFIG_ID, &id, sizeof id, &written),
          "cublasLtMatmulAlgoConfigGetAttribute");
    check(cublasLtMatmulAlgoConfigGetAttribute(&algorithm, CUBLASLT_ALGO_CONFIG_SPLITK_NUM, &splits, sizeof splits,
                                               &written),
          "cublasLtMatmulAlgoConfigGetAttribute");
    return id == 66 && splits > 1 && k % splits != 0;
  }

  MatmulDesc desc_;
  Layout b_, a_, out_;
  bool has_algorithm_ = false;
  cublasLtMatmulAlgo_t algorithm_;
  size_t workspace_bytes_ = 0;
};

}  // namespace

void gemm(const GemmArgs& args) {
  Problem problem{};
  problem.m = args.m, problem.n = args.n, problem.k = args.k;
  problem.a_alignment = alignment_of(args.a);
  problem.b_alignment = alignment_of(args.b);
  problem.out_alignment = std::min(alignment_of(args.out), args.bias ? alignment_of(args.bias) : 256u);
  problem.device = static_cast<uint16_t>(c10::cuda::current_device());
  problem.a_format = args.a_format, problem.b_format = args.b_format, problem.out_type = args.out_type;
  problem.bias = args.bias != nullptr, problem.accumulate = args.accumulate, problem.fast_accum = args.fast_accum;

  // A plan's descriptor is written on every call, so each thread (autograd has its own) keeps its plans: no lock.
  thread_local std::unordered_map<Problem, Plan, Hash> plans;
  auto found = plans.find(problem);
  if (found == plans.end()) {
    const cudaDeviceProp* device = at::cuda::getCurrentDeviceProperties();
    check_capability(device->major, device->minor, device->name);
    if (plans.size() >= kMaxPlans) plans.clear();  // a script whose shapes never repeat must not grow for ever
    found = plans.try_emplace(problem, problem, args).first;
  }
  found->second.run(args);
}

}  // namespace torch_fp8::cuda
