// FP8 GEMM through cuBLASLt: describe the problem once, choose an algorithm, keep both; then a call sets pointers and
// launches. Facts behind the rules here: docs/design.md, "cuBLASLt".
#include <unordered_map>

#include <ATen/cuda/CUDAContextLight.h>
#include <c10/cuda/CUDAFunctions.h>

#include "cuda/gemm/plan.h"
#include "ops/reference_gemm.h"

namespace torch_fp8::cuda {
namespace {

constexpr int kCandidates = 16;
constexpr int64_t kLargeProduct = 1 << 30;  // multiplications: in float32 some 40 us
constexpr size_t kMaxPlans = 4096;          // per thread; about 1 KB each

struct Solution {
  Plan plan;
  Algorithm algorithm;
  // There may be none: for deep, narrow products (64 x 64 x 16400) every candidate splits k unevenly. Such a product is
  // small, and float32 on the dequantised operands serves it.
  bool has_algorithm;

  Solution(const Problem& problem, const GemmArgs& args) : plan(problem, args), has_algorithm(true) {
    if (find_tuned(problem, algorithm)) return;
    const std::vector<Algorithm> candidates = plan.candidates(kCandidates);
    has_algorithm = !candidates.empty();
    if (has_algorithm) algorithm = candidates.front();
  }
};

void gemm(const GemmArgs& args) {
  // Each thread (autograd has its own) keeps its solutions: no lock.
  thread_local std::unordered_map<Problem, Solution, ProblemHash> solutions;
  thread_local uint64_t generation = 0;
  const Problem problem = problem_of(args);
  if (const uint64_t now = tuning_generation(); generation != now) {
    solutions.clear();
    generation = now;
  }
  auto found = solutions.find(problem);
  if (found == solutions.end()) {
    const cudaDeviceProp* device = at::cuda::getCurrentDeviceProperties();
    check_capability(device->major, device->minor, device->name);
    if (solutions.size() >= kMaxPlans) solutions.clear();  // a script whose shapes never repeat must not grow for ever
    found = solutions.try_emplace(problem, problem, args).first;
  }
  Solution& solution = found->second;
  if (!solution.has_algorithm) {
    if (args.m * args.n * args.k >= kLargeProduct) {
      TORCH_WARN_ONCE("torch_fp8: cuBLASLt has no right algorithm for the FP8 GEMM of m, n, k = ", args.m, ", ", args.n,
                      ", ", args.k,
                      ", so it is multiplied in float32, slower and in more memory; keep such a layer in "
                      "16 bits by the filter. This is said once, of the first such GEMM");
    }
    return reference_gemm(args, {at::kCUDA, c10::cuda::current_device()});
  }
  solution.plan.run(args, solution.algorithm);
}

[[maybe_unused]] const bool filled = (cuda_kernels().gemm = gemm, true);

}  // namespace

}  // namespace torch_fp8::cuda
