// One FP8 GEMM problem as cuBLASLt sees it, and the algorithms that solve it.
#pragma once

#include <cstring>
#include <memory>
#include <string_view>
#include <vector>

#include <ATen/core/Tensor.h>
#include <cublasLt.h>

#include "kernels.h"

namespace torch_fp8::cuda {

// Everything that the choice of an algorithm depends on.
struct Problem {
  int64_t m, n, k;
  uint32_t a_alignment, b_alignment, out_alignment;  // powers of two up to kFullAlignment, in bytes
  uint16_t device;
  Format a_format, b_format;
  Type out_type;
  bool bias, accumulate, fast_accum;
  Scales scales;
  uint8_t zero[3] = {};  // no padding byte is left to chance: a Problem is hashed and compared by its bytes

  bool operator==(const Problem& other) const { return std::memcmp(this, &other, sizeof *this) == 0; }
};
static_assert(sizeof(Problem) == 48 && std::has_unique_object_representations_v<Problem>);

struct ProblemHash {
  size_t operator()(const Problem& p) const {
    return std::hash<std::string_view>()({reinterpret_cast<const char*>(&p), sizeof p});
  }
};

// The most that an algorithm can count on; fresh tensors have it.
constexpr uint32_t kFullAlignment = 256;

Problem problem_of(const GemmArgs& args);

struct Algorithm {
  cublasLtMatmulAlgo_t algo;
  uint64_t workspace_bytes;
};
static_assert(sizeof(Algorithm) == 72 && std::is_trivially_copyable_v<Algorithm>, "tuning files hold its bytes");

void check(cublasStatus_t status, const char* what);

template <class T, cublasStatus_t (*destroy)(T)>
struct Destroy {
  using pointer = T;
  void operator()(T handle) const { destroy(handle); }
};
using MatmulDesc = std::unique_ptr<void, Destroy<cublasLtMatmulDesc_t, cublasLtMatmulDescDestroy>>;
using Layout = std::unique_ptr<void, Destroy<cublasLtMatrixLayout_t, cublasLtMatrixLayoutDestroy>>;

// The descriptors of a problem. A call writes its pointers into them, so a Plan belongs to one thread.
class Plan {
 public:
  // The pointers of args are those of the first call: cuBLASLt wants to see some before it names algorithms.
  Plan(const Problem& problem, const GemmArgs& args);

  // The right ones among cuBLASLt's candidates, the one that it believes to be fastest first. May be empty.
  std::vector<Algorithm> candidates(int at_most) const;
  // Throws where cuBLASLt refuses the algorithm, or where it is known to sum wrongly.
  void check_algorithm(const Algorithm& algorithm) const;
  void run(const GemmArgs& args, const Algorithm& algorithm);

 private:
  void set_pointers(const GemmArgs& args);
  bool gives_wrong_results(const Algorithm& algorithm) const;

  Problem problem_;
  MatmulDesc desc_;
  Layout b_, a_, out_;
};

// What was tuned: the algorithm to take for a problem instead of cuBLASLt's first. The generation grows with every
// change, so that who keeps a choice knows when it is out of date.
uint64_t tuning_generation();
bool find_tuned(const Problem& problem, Algorithm& algorithm);

}  // namespace torch_fp8::cuda
