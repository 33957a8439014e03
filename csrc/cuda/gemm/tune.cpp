// Timing of cuBLASLt's candidates for one problem, and what was chosen. python/torch_fp8/tuning/search.py decides.
#include <algorithm>
#include <atomic>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>

#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContextLight.h>
#include <ATen/cuda/CUDAEvent.h>
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <ATen/cuda/Sleep.h>
#include <c10/cuda/CUDAStream.h>

#include "check.h"
#include "cuda/gemm/plan.h"

namespace torch_fp8::cuda {
namespace {

constexpr int kCandidates = 32;
constexpr double kTimedMicroseconds = 200;  // of a candidate in a round: far above the resolution of events
constexpr int kMaxRepeats = 16;
constexpr int64_t kSpinCycles = 2'000'000;  // about 1 ms, in which the host queues a round

// Not thread_local: tuning holds for the process.
struct Tuned {
  std::shared_mutex mutex;
  std::unordered_map<Problem, Algorithm, ProblemHash> algorithms;
  std::atomic<uint64_t> generation{0};
};

Tuned& tuned() {
  static Tuned instance;
  return instance;
}

// A plan needs pointers, but does not follow them. Those of a problem alone are aligned as fresh tensors are.
GemmArgs args_of(const GemmProblem& p) {
  GemmArgs args{};
  auto* const somewhere = reinterpret_cast<uint8_t*>(uintptr_t{kFullAlignment});
  args.m = p.m, args.n = p.n, args.k = p.k;
  args.a = args.b = somewhere;
  args.a_format = p.a_format, args.b_format = p.b_format, args.out_type = p.out_type;
  args.a_scale_inv = args.b_scale_inv = reinterpret_cast<const float*>(somewhere);
  args.bias = p.bias ? somewhere : nullptr;
  args.out = somewhere;
  args.addend = p.accumulate ? args.out : nullptr;
  args.fast_accum = p.fast_accum;
  args.scales = p.scales;
  return args;
}

// Operands as training has them: normal numbers that fill their format up to four standard deviations. The power that
// a GEMM draws, and so its clock, depends on the data. From a generator of its own: tuning changes no other number.
struct Operands {
  at::Tensor a, b, a_scale_inv, b_scale_inv, bias, out;
  GemmArgs args;

  explicit Operands(const GemmProblem& p) : args(args_of(p)) {
    const auto options = at::TensorOptions(at::kFloat).device(at::kCUDA);
    const at::Generator generator = at::cuda::detail::createCUDAGenerator();
    const auto codes = [&](int64_t rows, Format format) {
      const float max = max_of(format);
      return at::randn({rows, p.k}, generator, options).mul_(max / 4).clamp_(-max, max).to(dtype_of(format));
    };
    a = codes(p.m, p.a_format);
    b = codes(p.n, p.b_format);
    const bool rows = p.scales == Scales::kRows, blocks = p.scales == Scales::kBlocks;
    a_scale_inv = at::full({blocks ? p.k / kScaleBlock * p.m : rows ? p.m : 1}, 1e-4, options);
    b_scale_inv = at::full({blocks ? (p.n + kScaleBlock - 1) / kScaleBlock * scale_stride(p.k)
                            : rows ? p.n
                                   : 1},
                           1e-4, options);
    if (p.bias) bias = at::randn({p.n}, generator, options.dtype(dtype_of(p.out_type)));
    out = at::zeros({p.m, p.n}, options.dtype(dtype_of(p.out_type)));
    args.a = static_cast<const uint8_t*>(a.const_data_ptr());
    args.b = static_cast<const uint8_t*>(b.const_data_ptr());
    args.a_scale_inv = a_scale_inv.const_data_ptr<float>(), args.b_scale_inv = b_scale_inv.const_data_ptr<float>();
    if (p.bias) args.bias = bias.const_data_ptr();
    args.out = out.data_ptr();
    args.addend = p.accumulate ? args.out : nullptr;
  }
};

void check_problem(const GemmProblem& p) {
  const cudaDeviceProp* device = at::cuda::getCurrentDeviceProperties();
  check_capability(device->major, device->minor, device->name);
  TORCH_CHECK_VALUE(p.m > 0 && p.n > 0 && p.k > 0 && p.n % kAlignment == 0 && p.k % kAlignment == 0,
                    "torch_fp8: a GEMM to tune needs m > 0 and n and k that are positive multiples of ", kAlignment,
                    ", got ", p.m, ", ", p.n, ", ", p.k);
  TORCH_CHECK_VALUE(p.scales != Scales::kBlocks || (p.m % 4 == 0 && p.k % kScaleBlock == 0),
                    "torch_fp8: a GEMM with scales of blocks needs m that is a multiple of 4 and k of ", kScaleBlock,
                    ", got ", p.m, ", ", p.k);
  TORCH_CHECK_VALUE(!p.bias || p.out_type != Type::kFloat32, "torch_fp8: FP8 GEMMs have no float32 bias");
}

double elapsed_us(const at::cuda::CUDAEvent& start, const at::cuda::CUDAEvent& end) {
  end.synchronize();
  return static_cast<double>(start.elapsed_time(end)) * 1e3;
}

Algorithm algorithm_from(const std::string& bytes) {
  Algorithm algorithm;
  TORCH_CHECK_VALUE(bytes.size() == sizeof algorithm, "torch_fp8: an algorithm has ", sizeof algorithm, " bytes, got ",
                    bytes.size());
  std::memcpy(&algorithm, bytes.data(), sizeof algorithm);
  return algorithm;
}

std::vector<TimedAlgorithm> time_algorithms(const GemmProblem& gemm_problem, int rounds) {
  check_problem(gemm_problem);
  const NoAutocast no_autocast;
  const Operands operands(gemm_problem);
  const GemmArgs& args = operands.args;
  Plan plan(problem_of(args), args);
  const std::vector<Algorithm> candidates = plan.candidates(kCandidates);
  std::vector<TimedAlgorithm> result;
  for (const Algorithm& candidate : candidates) {
    result.push_back({std::string(reinterpret_cast<const char*>(&candidate), sizeof candidate), {}});
  }
  if (candidates.empty()) return result;

  const auto stream = c10::cuda::getCurrentCUDAStream();
  at::cuda::CUDAEvent warm_start(cudaEventDefault), warm_end(cudaEventDefault);
  for (const Algorithm& candidate : candidates) plan.run(args, candidate);
  at::cuda::sleep(kSpinCycles);
  warm_start.record(stream);
  plan.run(args, candidates.front());
  warm_end.record(stream);
  const double once = std::max(1.0, elapsed_us(warm_start, warm_end));
  const int repeats = std::clamp(static_cast<int>(kTimedMicroseconds / once), 1, kMaxRepeats);

  // Every candidate once in every round, and no one always first: a GPU that comes from idle, or that reaches its power
  // limit, changes its clock within a round.
  for (int round = 0; round < rounds; ++round) {
    std::vector<std::pair<at::cuda::CUDAEvent, at::cuda::CUDAEvent>> events;
    for (size_t i = 0; i < candidates.size(); ++i) {
      events.emplace_back(at::cuda::CUDAEvent(cudaEventDefault), at::cuda::CUDAEvent(cudaEventDefault));
    }
    at::cuda::sleep(kSpinCycles);
    for (size_t i = 0; i < candidates.size(); ++i) {
      const size_t which = (i + static_cast<size_t>(round)) % candidates.size();
      events[which].first.record(stream);
      for (int repeat = 0; repeat < repeats; ++repeat) plan.run(args, candidates[which]);
      events[which].second.record(stream);
    }
    for (size_t i = 0; i < candidates.size(); ++i) {
      result[i].us.push_back(elapsed_us(events[i].first, events[i].second) / repeats);
    }
  }
  return result;
}

void check_algorithm(const GemmProblem& gemm_problem, const std::string& bytes) {
  check_problem(gemm_problem);
  const GemmArgs args = args_of(gemm_problem);
  Plan(problem_of(args), args).check_algorithm(algorithm_from(bytes));
}

void use_algorithms(const std::vector<std::pair<GemmProblem, std::string>>& chosen) {
  std::vector<std::pair<Problem, Algorithm>> entries;
  for (const auto& [gemm_problem, bytes] : chosen) {
    check_algorithm(gemm_problem, bytes);
    entries.emplace_back(problem_of(args_of(gemm_problem)), algorithm_from(bytes));
  }
  Tuned& all = tuned();
  const std::unique_lock lock(all.mutex);
  for (const auto& [problem, algorithm] : entries) all.algorithms.insert_or_assign(problem, algorithm);
  ++all.generation;
}

void forget_algorithms() {
  Tuned& all = tuned();
  const std::unique_lock lock(all.mutex);
  all.algorithms.clear();
  ++all.generation;
}

[[maybe_unused]] const bool filled = [] {
  Kernels& table = cuda_kernels();
  table.cublaslt_version = cublasLtGetVersion;
  table.time_algorithms = time_algorithms;
  table.check_algorithm = check_algorithm;
  table.use_algorithms = use_algorithms;
  table.forget_algorithms = forget_algorithms;
  return true;
}();

}  // namespace

uint64_t tuning_generation() { return tuned().generation.load(std::memory_order_acquire); }

bool find_tuned(const Problem& problem, Algorithm& algorithm) {
  Tuned& all = tuned();
  const std::shared_lock lock(all.mutex);
  const auto found = all.algorithms.find(problem);
  if (found == all.algorithms.end()) return false;
  algorithm = found->second;
  return true;
}

}  // namespace torch_fp8::cuda
