// 17 to 32 rows of x in FP8 on an FP8 weight that is read once: batched decoding, where cuBLASLt leaves the memory idle
// between its launches. As in skinny.cu the weight is requested early where it stands, here while x is being quantised.
//
// A block takes 64 rows of the weight and a part of k; the blocks of a cluster share the parts of k and add up their
// sums. One thread fetches tiles of 128 columns by TMA into a ring, four warps multiply them (wgmma, which wants the
// weight as its first operand): out^T = w . x^T. Within a tile the tensor core sums as it does (about 14 bits), tiles
// are added in float32.
#include <array>

#include <cuda.h>

#include "cuda/common/barrier.cuh"
#include "cuda/common/cluster.cuh"
#include "cuda/common/decode.cuh"

namespace torch_fp8::cuda {
namespace {

constexpr int kRows = 64, kCols = 128, kTokens = 32;  // of a tile: of the weight, of k, of x
constexpr int kWeightBytes = kRows * kCols, kStageBytes = kWeightBytes + kTokens * kCols;
constexpr int kMostStages = 6;  // of the ring
constexpr int kSwizzle = 1024;  // bytes after which the pattern of TMA's 128-byte swizzle begins anew
constexpr int ring_bytes(int stages) { return stages * kStageBytes + kSwizzle; }
constexpr int kConsumers = 4 * 32, kThreads = kConsumers + 32;
constexpr int kPitch = kRows + 4;  // of the sums, in shared memory: no bank is written twice at a time
static_assert(kTokens * kPitch * 4 <= kStageBytes, "the sums take the place of the ring");
constexpr int kMostParts = 8;  // of k: a cluster has no more blocks

__device__ void fetch_tile(uint32_t target, const CUtensorMap& map, int col, int row, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          target),
      "l"(&map), "r"(col), "r"(row), "r"(barrier)
      : "memory");
}

// ---- the tensor core ------------------------------------------------------------------------------------------------

// A tile whose rows are 128 bytes, swizzled: rows of 8 follow each other, 1024 bytes apart.
__device__ uint64_t descriptor(uint32_t address) {
  return uint64_t{1} << 62 | uint64_t{kSwizzle / 16} << 32 | uint64_t{1} << 16 | (address & 0x3FFFF) >> 4;
}

// sums (64 rows of w, 32 of x) = or += 32 columns of both.
__device__ void multiply(float (&d)[16], uint64_t w, uint64_t x, int accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %18, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k32.f32.e4m3.e4m3 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, %16, %17, p, 1, 1;\n"
      "}\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
      : "l"(w), "l"(x), "r"(accumulate));
}
__device__ void begin_multiplying() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Nothing may read the sums earlier: the compiler does not know that they are still being written.
__device__ void end_multiplying(float (&sums)[16]) {
  asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (float& sum : sums) asm volatile("" : "+f"(sum)::"memory");
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    skinny_fp8_kernel(SkinnyFp8Args args, int parts, int stages, const __grid_constant__ CUtensorMap w_map,
                      const __grid_constant__ CUtensorMap x_map) {
  extern __shared__ uint8_t dynamic[];
  __shared__ alignas(8) uint64_t full[kMostStages], empty[kMostStages];
  const uint32_t ring = (shared_address(dynamic) + kSwizzle - 1) / kSwizzle * kSwizzle;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int part = cluster_rank(), first_row = static_cast<int>(blockIdx.x) / parts * kRows;
  const int tiles = static_cast<int>((args.k + kCols - 1) / kCols);
  const int begin = part * tiles / parts, count = (part + 1) * tiles / parts - begin;
  const auto full_of = [&](int i) { return shared_address(full + i % stages); };
  const auto empty_of = [&](int i) { return shared_address(empty + i % stages); };
  const auto stage_of = [&](int i) { return ring + i % stages * kStageBytes; };
  const auto fetch_w = [&](int i) {
    expect_bytes(full_of(i), kStageBytes);
    fetch_tile(stage_of(i), w_map, (begin + i) * kCols, first_row, full_of(i));
  };
  const auto fetch_x = [&](int i) {
    fetch_tile(stage_of(i) + kWeightBytes, x_map, (begin + i) * kCols, 0, full_of(i));
  };
  const int at_once = min(count, stages);
  const bool is_producer = thread == kConsumers;

  begin_reading_early(args.weight_stands);
  if (is_producer) {
    for (int s = 0; s < stages; ++s) {
      init_barrier(full_of(s), 1);
      init_barrier(empty_of(s), kConsumers / 32);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    for (int i = 0; i < at_once; ++i) fetch_w(i);
    asm volatile("prefetch.tensormap [%0];" ::"l"(&x_map) : "memory");
  }
  // Requested with the weight, for the end would wait for them.
  const int row = first_row + thread % kRows;
  float w_scale = 0, bias = 0;
  if (thread < kConsumers && row < args.n) {
    w_scale = args.w_scale[args.one_w_scale ? 0 : row];
    if (args.bias) bias = to_float(static_cast<const T*>(args.bias)[row]);
  }
  __syncthreads();
  wait_for_predecessor();

  if (is_producer) {
    for (int i = 0; i < at_once; ++i) fetch_x(i);
    for (int i = at_once; i < count; ++i) {
      wait(empty_of(i), (i / stages - 1) % 2);
      fetch_w(i);
      fetch_x(i);
    }
  } else if (thread < kConsumers) {
    float sums[16] = {};
    for (int i = 0; i < count; ++i) {
      float products[16] = {};
      wait(full_of(i), i / stages % 2);
      begin_multiplying();
#pragma unroll
      for (int col = 0; col < kCols; col += 32) {
        multiply(products, descriptor(stage_of(i) + col), descriptor(stage_of(i) + kWeightBytes + col), col > 0);
      }
      end_multiplying(products);
      if (lane == 0) arrive(empty_of(i));
#pragma unroll
      for (int j = 0; j < 16; ++j) sums[j] += products[j];
    }
    // Into the ring, which nobody reads any more. A thread holds of each eight tokens two, in two rows.
    asm volatile("bar.sync 1, %0;" ::"n"(kConsumers) : "memory");
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const int token = j / 4 * 8 + lane % 4 * 2 + j % 2, at = token * kPitch + warp * 16 + lane / 4 + j % 4 / 2 * 8;
      asm volatile("st.shared.f32 [%0], %1;" ::"r"(ring + at * 4), "f"(sums[j]) : "memory");
    }
  }
  synchronize_cluster();

  if (thread < kConsumers && row < args.n) {  // each block finishes its share of the tokens
    const int share = kTokens / parts, last = min((part + 1) * share, static_cast<int>(args.m));
    for (int token = part * share + thread / kRows; token < last; token += kConsumers / kRows) {
      const float x_scale = args.x_scale[args.one_x_scale ? 0 : token];
      float sum = 0;
      for (int other = 0; other < parts; ++other) {
        sum += load_from(other, ring + (token * kPitch + thread % kRows) * 4);
      }
      static_cast<T*>(args.out)[token * args.n + row] = static_cast<T>(rescaled(sum, x_scale, w_scale) + bias);
    }
  }
  synchronize_cluster();  // no block's sums go while another reads them
}
static_assert(kTokens % kMostParts == 0, "equal shares");

// ---- launching ------------------------------------------------------------------------------------------------------

CUtensorMap map_of(const uint8_t* codes, int64_t rows, int64_t cols, int tile_rows) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result),
          "cudaGetDriverEntryPointByVersion");
    if (result != cudaDriverEntryPointSuccess) throw std::runtime_error("torch_fp8: this driver has no tensor maps");
    return reinterpret_cast<Encode>(function);
  }();
  CUtensorMap map;
  const std::array<cuuint64_t, 2> size = {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows)};
  const std::array<cuuint64_t, 1> pitch = {static_cast<cuuint64_t>(cols)};
  const std::array<cuuint32_t, 2> box = {kCols, static_cast<cuuint32_t>(tile_rows)}, step = {1, 1};
  const CUresult status =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<uint8_t*>(codes), size.data(), pitch.data(), box.data(),
             step.data(), CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error("torch_fp8: cuTensorMapEncodeTiled failed with status " + std::to_string(status));
  }
  return map;
}

template <class T>
void launch_typed(const SkinnyFp8Args& args, cudaStream_t stream) {
  const uint32_t across = blocks_for(args.n, kRows);
  const auto tiles = static_cast<int>((args.k + kCols - 1) / kCols);
  int parts = 1;  // enough for all multiprocessors, with something for each to do
  while (parts < kMostParts && across * parts < 3 * kMultiprocessors / 2 && parts * 4 <= tiles) parts *= 2;

  // A short ring leaves room for more blocks, and for the next kernel's. It may be longer where two blocks a
  // multiprocessor are all there are.
  const uint32_t grid = across * static_cast<uint32_t>(parts);
  const int stages = grid <= 2 * kMultiprocessors ? kMostStages : 4;

  const auto kernel = skinny_fp8_kernel<T>;
  allow_shared(kernel, ring_bytes(kMostStages));
  launch(kernel, Grid{grid, kThreads, ring_bytes(stages), parts}, stream, args, parts, stages,
         map_of(args.w, args.n, args.k, kRows), map_of(args.x, args.m, args.k, kTokens));
}

void launch_skinny_fp8(const SkinnyFp8Args& args, cudaStream_t stream) {
  args.type == Type::kFloat16 ? launch_typed<__half>(args, stream) : launch_typed<__nv_bfloat16>(args, stream);
}

[[maybe_unused]] const bool filled = fill<launch_skinny_fp8>(cuda_kernels().skinny_fp8);

}  // namespace
}  // namespace torch_fp8::cuda
