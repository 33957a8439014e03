// What the kernels that read a matrix share: loads of 16 bytes, maxima of a block, and how they are launched.
#pragma once

#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/common/launch.h"

namespace torch_fp8::cuda {

constexpr int kPackSize = 8;

// Neighbouring elements, loaded and stored 16 bytes at a time.
template <class T>
struct alignas(16) Pack {
  T values[kPackSize];
};

template <class T>
__device__ float to_float(T x) {
  return static_cast<float>(x);
}

// Neighbouring values, stored as whole words: plain stores of a struct the compiler may take apart, and in
// dequantize.cu that cost seven eighths of the speed.
template <class Values>
__device__ void store_whole(void* out, const Values& values) {
  using Word = std::conditional_t<sizeof(Values) % sizeof(uint4) == 0, uint4, uint2>;
  Word words[sizeof values / sizeof(Word)];
  memcpy(words, &values, sizeof values);
#pragma unroll
  for (size_t i = 0; i < sizeof values / sizeof(Word); ++i) __stcg(static_cast<Word*>(out) + i, words[i]);
}

// Programmatic dependent launch: a kernel may begin when all blocks of the kernel in front have triggered or ended.
// Only the wait orders memory: it returns when the kernel in front has completed and its writes can be seen. Neither a
// trigger nor the end of a block says that of any store.
//
// The kernel in front may have triggered before its own wait, and the one before that as well. So beside a kernel that
// has not waited there may run any number of kernels in front of it, back to the last one that waited before it
// triggered, or that was launched without this. What a kernel touches before its wait must be older than all of these.
// After its wait everything in front of it is done: the kernel in front completed after its own wait, and so on back.
// Therefore every kernel launched so waits in every block, whatever it reads.

// For kernels that touch no memory before their wait. They may trigger first of all, though they have stored nothing
// then: a kernel behind them that reads before its wait reads nothing that they write.
__device__ inline void begin_dependent() {
  cudaTriggerProgrammaticLaunchCompletion();
  cudaGridDependencySynchronize();
}

__device__ inline void let_successor_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ inline void wait_for_predecessor() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// For kernels that read something before their wait where it stands: where the host knows it to be older than all
// kernels that may still run. Where it does not stand they wait first, and only then trigger, so that everything in
// front is done when a kernel behind them begins. Loads that must not cross a wait are volatile: plain ones the
// compiler may move.
__device__ inline void begin_reading_early(bool stands) {
  if (!stands) wait_for_predecessor();
  let_successor_start();
}

// magnitude() without its second step, which the maximum takes once: NaN of any payload is above Inf.
__device__ inline uint32_t raw_magnitude(float x) { return __float_as_uint(x) & 0x7FFFFFFF; }
constexpr uint32_t kInfinity = 0x7F800000;  // the magnitude of Inf

template <class T>
__device__ uint32_t max_of_pack(const Pack<T>& pack, uint32_t seen = 0) {
#pragma unroll
  for (int j = 0; j < kPackSize; ++j) seen = max(seen, raw_magnitude(to_float(pack.values[j])));
  return seen;
}

template <int kWarps>
__device__ void stage_max(uint32_t (&of_warp)[kWarps], uint32_t seen) {
  seen = magnitude(__uint_as_float(__reduce_max_sync(0xFFFFFFFF, seen)));
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = seen;
}

// After a __syncthreads().
template <int kWarps>
__device__ uint32_t max_of_warps(const uint32_t (&of_warp)[kWarps]) {
  uint32_t seen = of_warp[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) seen = max(seen, of_warp[warp]);
  return seen;
}

// Most blocks see no new maximum and are spared the atomic. As signed integers, since an amax that was loaded may be
// -0.0, which is then below everything.
__device__ inline void raise_amax(float* amax, uint32_t seen) {
  auto* const bits = reinterpret_cast<int*>(amax);
  const int magnitude = static_cast<int>(seen);
  if (magnitude > *static_cast<volatile int*>(bits)) atomicMax(bits, magnitude);
}

// Rows can be loaded in packs.
inline bool is_vectorised(const Matrix& x) {
  const int64_t size = x.type == Type::kFloat32 ? 4 : 2;
  return x.col_stride == 1 && x.row_stride * size % 16 == 0 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
}

// The whole matrix is one array of packs.
inline bool is_dense(const Matrix& x) {
  return is_vectorised(x) && (x.row_stride == x.cols || x.rows == 1) && x.rows * x.cols % kPackSize == 0;
}

constexpr uint32_t kMultiprocessors = 132;  // of an H100 SXM and an H200

inline uint32_t blocks_for(int64_t items, int64_t per_block) {
  const int64_t blocks = (items + per_block - 1) / per_block;
  if (blocks > INT32_MAX) {
    throw std::runtime_error("torch_fp8: a matrix that needs " + std::to_string(blocks) +
                             " blocks is larger than one launch can take; split it");
  }
  return static_cast<uint32_t>(blocks);
}

template <class Function>
void with_type(Type type, Function&& function) {
  switch (type) {
    case Type::kFloat32: return function(float{});
    case Type::kFloat16: return function(__half{});
    case Type::kBFloat16: return function(__nv_bfloat16{});
  }
}

struct Grid {
  uint32_t blocks;
  dim3 threads;
  int shared_bytes = 0;  // beyond 48 KB only after allow_shared
  int cluster = 1;       // blocks of a cluster
};

// For all launches of the kernel in this process, so the most that any of them asks for.
template <class Kernel>
void allow_shared(Kernel kernel, int bytes) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "cudaFuncSetAttribute");
}

// More than 8 blocks in a cluster, up to Hopper's 16.
template <class Kernel>
void allow_large_cluster(Kernel kernel) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "cudaFuncSetAttribute");
}

// A launch of a kernel that calls begin_dependent or begin_reading_early first of all.
struct LaunchConfig {
  cudaLaunchAttribute attributes[2]{};
  cudaLaunchConfig_t config{};

  LaunchConfig(const Grid& grid, cudaStream_t stream) {
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
    config.gridDim = grid.blocks;
    config.blockDim = grid.threads;
    config.dynamicSmemBytes = static_cast<size_t>(grid.shared_bytes);
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = grid.cluster > 1 ? 2 : 1;
  }
  LaunchConfig(const LaunchConfig&) = delete;
};
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Grid& grid, cudaStream_t stream, const Arguments&... arguments) {
  const LaunchConfig launch(grid, stream);
  check(cudaLaunchKernelEx(&launch.config, kernel, static_cast<Parameters>(arguments)...), "a kernel launch");
}

// How many of the grid's clusters the device holds at a time.
template <class Kernel>
int most_clusters(Kernel kernel, const Grid& grid) {
  const LaunchConfig launch(grid, nullptr);
  int count = 0;
  check(cudaOccupancyMaxActiveClusters(&count, kernel, &launch.config), "cudaOccupancyMaxActiveClusters");
  return count;
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), uint32_t blocks, dim3 threads, cudaStream_t stream,
            const Arguments&... arguments) {
  launch(kernel, Grid{blocks, threads}, stream, arguments...);
}

}  // namespace torch_fp8::cuda
