#include "cuda/gemm/plan.h"

#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContextLight.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>

namespace torch_fp8::cuda {
namespace {

constexpr uint64_t kWorkspaceBytes = 32 << 20;  // what NVIDIA recommends on Hopper

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

int32_t get(const Algorithm& algorithm, cublasLtMatmulAlgoConfigAttributes_t attribute) {
  int32_t value = 0;
  size_t written = 0;
  check(cublasLtMatmulAlgoConfigGetAttribute(&algorithm.algo, attribute, &value, sizeof value, &written),
        "cublasLtMatmulAlgoConfigGetAttribute");
  return value;
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

MatmulDesc new_desc() {
  cublasLtMatmulDesc_t desc;
  check(cublasLtMatmulDescCreate(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F), "cublasLtMatmulDescCreate");
  return MatmulDesc(desc);
}

uint32_t alignment_of(const void* pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer) | kFullAlignment;
  return static_cast<uint32_t>(address & ~(address - 1));
}

}  // namespace

void check(cublasStatus_t status, const char* what) {
  if (status != CUBLAS_STATUS_SUCCESS) cudaGetLastError();  // as in launch.h
  TORCH_CHECK(status == CUBLAS_STATUS_SUCCESS, "torch_fp8: ", what, " failed with status ", static_cast<int>(status),
              " (CUBLASLT_LOG_LEVEL=5 in the environment prints the reason)");
}

Problem problem_of(const GemmArgs& args) {
  Problem problem{};
  problem.m = args.m, problem.n = args.n, problem.k = args.k;
  problem.a_alignment = alignment_of(args.a);
  problem.b_alignment = alignment_of(args.b);
  const auto alignment_if = [](const void* pointer) { return pointer ? alignment_of(pointer) : kFullAlignment; };
  problem.out_alignment = std::min({alignment_of(args.out), alignment_if(args.bias), alignment_if(args.addend)});
  problem.device = static_cast<uint16_t>(c10::cuda::current_device());
  problem.a_format = args.a_format, problem.b_format = args.b_format, problem.out_type = args.out_type;
  problem.bias = args.bias != nullptr, problem.accumulate = args.addend != nullptr,
  problem.fast_accum = args.fast_accum;
  problem.scales = args.scales;
  return problem;
}

// cuBLASLt thinks in columns. Row-major out (m, n) = a (m, k) . b (n, k)^T is its column-major (n, m) = op(B) op(A)
// with B transposed: the one form (TN) that FP8 has on Hopper. So b is its first operand.
Plan::Plan(const Problem& problem, const GemmArgs& args)
    : problem_(problem),
      desc_(new_desc()),
      b_(new_layout(data_type(args.b_format), args.k, args.n)),
      a_(new_layout(data_type(args.a_format), args.k, args.m)),
      out_(new_layout(data_type(args.out_type), args.n, args.m)) {
  set(desc_, CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T);
  set(desc_, CUBLASLT_MATMUL_DESC_TRANSB, CUBLAS_OP_N);
  set(desc_, CUBLASLT_MATMUL_DESC_FAST_ACCUM, static_cast<int8_t>(args.fast_accum));
  if (args.scales != Scales::kOne) {
    const bool rows = args.scales == Scales::kRows;
    set(desc_, CUBLASLT_MATMUL_DESC_A_SCALE_MODE,
        rows ? CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F : CUBLASLT_MATMUL_MATRIX_SCALE_BLK128x128_32F);
    set(desc_, CUBLASLT_MATMUL_DESC_B_SCALE_MODE,
        rows ? CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F : CUBLASLT_MATMUL_MATRIX_SCALE_VEC128_32F);
  }
  if (args.bias) {
    set(desc_, CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
    set(desc_, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, data_type(args.out_type));
  }
  set_pointers(args);
}

// Never a scale for C: with beta != 0 and a C scale, algorithm 66 of this cuBLASLt can hang.
void Plan::set_pointers(const GemmArgs& args) {
  set(desc_, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, args.b_scale_inv);
  set(desc_, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, args.a_scale_inv);
  if (args.bias) set(desc_, CUBLASLT_MATMUL_DESC_BIAS_POINTER, args.bias);
}

std::vector<Algorithm> Plan::candidates(int at_most) const {
  cublasLtMatmulPreference_t created;
  check(cublasLtMatmulPreferenceCreate(&created), "cublasLtMatmulPreferenceCreate");
  const Preference preference(created);
  set(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, kWorkspaceBytes);
  // Partial sums of a split k are added in float32, never in 16 bits.
  set(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
      static_cast<uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE |
                            (problem_.out_type == Type::kFloat32 ? CUBLASLT_REDUCTION_SCHEME_INPLACE : 0)));
  set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, problem_.b_alignment);
  set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, problem_.a_alignment);
  set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, problem_.out_alignment);
  set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, problem_.out_alignment);

  std::vector<cublasLtMatmulHeuristicResult_t> results(static_cast<size_t>(at_most));
  int count = 0;
  const cublasStatus_t status =
      cublasLtMatmulAlgoGetHeuristic(at::cuda::getCurrentCUDABlasLtHandle(), desc_.get(), b_.get(), a_.get(),
                                     out_.get(), out_.get(), preference.get(), at_most, results.data(), &count);
  if (status != CUBLAS_STATUS_NOT_SUPPORTED) check(status, "cublasLtMatmulAlgoGetHeuristic");
  std::vector<Algorithm> right;
  for (int i = 0; i < count; ++i) {
    const auto& result = results[static_cast<size_t>(i)];
    const Algorithm algorithm{result.algo, result.workspaceSize};
    if (result.state == CUBLAS_STATUS_SUCCESS && !gives_wrong_results(algorithm)) right.push_back(algorithm);
  }
  return right;
}

// Algorithm 66 (every FP8 kernel of Hopper) sums wrongly where its split of k is uneven: cuBLAS release notes, known
// issues from 12.6 U2 on.
bool Plan::gives_wrong_results(const Algorithm& algorithm) const {
  const int32_t splits = get(algorithm, CUBLASLT_ALGO_CONFIG_SPLITK_NUM);
  return get(algorithm, CUBLASLT_ALGO_CONFIG_ID) == 66 && splits > 1 && problem_.k % splits != 0;
}

void Plan::check_algorithm(const Algorithm& algorithm) const {
  cublasLtMatmulHeuristicResult_t result{};
  const cublasStatus_t status = cublasLtMatmulAlgoCheck(at::cuda::getCurrentCUDABlasLtHandle(), desc_.get(), b_.get(),
                                                        a_.get(), out_.get(), out_.get(), &algorithm.algo, &result);
  TORCH_CHECK(status == CUBLAS_STATUS_SUCCESS && result.workspaceSize <= algorithm.workspace_bytes &&
                  algorithm.workspace_bytes <= kWorkspaceBytes && !gives_wrong_results(algorithm),
              "torch_fp8: cuBLASLt ", cublasLtGetVersion(),
              " refuses the algorithm for the GEMM of m, n, k = ", problem_.m, ", ", problem_.n, ", ", problem_.k,
              " (status ", static_cast<int>(status), "); tune again");
}

void Plan::run(const GemmArgs& args, const Algorithm& algorithm) {
  set_pointers(args);
  const float alpha = 1.0f, beta = args.addend ? 1.0f : 0.0f;
  // Fresh from the caching allocator: right on any stream, and in a graph's own pool under capture.
  at::Tensor workspace;
  if (algorithm.workspace_bytes > 0) {
    workspace = at::empty({static_cast<int64_t>(algorithm.workspace_bytes)},
                          at::TensorOptions().dtype(at::kByte).device(at::kCUDA));
  }
  check(cublasLtMatmul(at::cuda::getCurrentCUDABlasLtHandle(), desc_.get(), &alpha, args.b, b_.get(), args.a, a_.get(),
                       &beta, args.addend ? args.addend : args.out, out_.get(), args.out, out_.get(), &algorithm.algo,
                       workspace.defined() ? workspace.data_ptr() : nullptr, algorithm.workspace_bytes,
                       c10::cuda::getCurrentCUDAStream()),
        "cublasLtMatmul");
}

}  // namespace torch_fp8::cuda
