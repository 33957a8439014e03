// What attention needs beside its kernels: amaxes into slots, and codes as numbers at the speed of their bytes.
#include "cuda/common/encode.cuh"

namespace torch_fp8::cuda {
namespace {

// A thread a role.
__global__ void __launch_bounds__(32) role_amaxes_kernel(__grid_constant__ const RoleAmaxesArgs args) {
  begin_dependent();
  const int role = threadIdx.x;
  if (role >= args.roles) return;
  const float amax = amax_of_role(args, role);
  if (args.record >> role & 1) raise_amax(&args.slots[role].amax, __float_as_uint(amax));
  const auto& cast = args.casts[role];
  if (args.own >> role & 1) args.scales[role] = own_slot(amax, cast.target, cast.margin);
}

void launch_role_amaxes(const RoleAmaxesArgs& args, cudaStream_t stream) {
  launch(role_amaxes_kernel, 1, 32, stream, args);
}

constexpr int kThreads = 256, kCodes = 16;  // threads of a block, codes of a thread
constexpr int64_t kCodesOfBlock = kThreads * kCodes;

struct HeadsTable {
  HeadsOfCodes tensors[4];
  uint32_t first_block[4];  // of each tensor; behind all blocks where there is none
};

// A thread takes its codes in packs, each of which fills 16 bytes of the result: neighbouring threads then write
// neighbouring bytes.
template <class T, Format kFormat>
__global__ void __launch_bounds__(kThreads) dequantize_heads_kernel(__grid_constant__ const HeadsTable table) {
  constexpr int kSize = sizeof(uint4) / sizeof(T), kPacks = kCodes / kSize;
  using Codes = std::conditional_t<kSize == 8, uint2, uint32_t>;
  begin_dependent();
  int index = 0;
  while (index < 3 && blockIdx.x >= table.first_block[index + 1]) ++index;
  const HeadsOfCodes& heads = table.tensors[index];
  const int64_t width = heads.inner / kSize, count = heads.outer * width;  // in packs
  const float scale_inv = *heads.scale_inv;
  const auto* const codes = reinterpret_cast<const Codes*>(heads.codes);
  const int64_t first = (blockIdx.x - table.first_block[index]) * int64_t{kThreads * kPacks} + threadIdx.x;

  const Codes* from[kPacks];
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int64_t pack = first + i * kThreads;
    // 2^32 packs of a group do not fit a GPU.
    const int64_t before = heads.group == 1 ? 0 : static_cast<uint32_t>(pack) / static_cast<uint32_t>(width);
    from[i] = codes + pack + before * (heads.group - 1) * width;
  }
  float sums[kPacks][kSize];
  for (int64_t member = 0; member < heads.group; ++member) {
    union {
      Codes whole;
      __nv_fp8x2_storage_t pairs[kSize / 2];
    } loaded[kPacks];
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      loaded[i].whole = first + i * kThreads < count ? from[i][member * width] : Codes{};
    }
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
#pragma unroll
      for (int j = 0; j < kSize / 2; ++j) {
        const __half2 halves = __nv_cvt_fp8x2_to_halfraw2(loaded[i].pairs[j], kInterpretation<kFormat>);
        const float2 values = __half22float2(halves);
        sums[i][2 * j] = member == 0 ? values.x : sums[i][2 * j] + values.x;
        sums[i][2 * j + 1] = member == 0 ? values.y : sums[i][2 * j + 1] + values.y;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int64_t pack = first + i * kThreads;
    if (pack >= count) return;
    struct alignas(16) {
      T values[kSize];
    } values;
#pragma unroll
    for (int j = 0; j < kSize; ++j) values.values[j] = static_cast<T>(sums[i][j] * scale_inv);
    store_whole(static_cast<T*>(heads.out) + pack * kSize, values);
  }
}

void launch_dequantize_heads(const DequantizeHeadsArgs& args, cudaStream_t stream) {
  HeadsTable table{};
  uint32_t blocks = 0;
  for (int i = 0; i < 4; ++i) {
    table.first_block[i] = blocks;
    if (i >= args.count) continue;
    table.tensors[i] = args.tensors[i];
    blocks += blocks_for(args.tensors[i].outer * args.tensors[i].inner, kCodesOfBlock);
  }
  if (blocks == 0) return;
  with_type(args.type, [&](auto t) {
    using T = decltype(t);
    const auto kernel = args.format == Format::kE4M3 ? dequantize_heads_kernel<T, Format::kE4M3>
                                                     : dequantize_heads_kernel<T, Format::kE5M2>;
    launch(kernel, blocks, kThreads, stream, table);
  });
}

[[maybe_unused]] const bool filled = fill<launch_role_amaxes>(cuda_kernels().role_amaxes) &&
                                     fill<launch_dequantize_heads>(cuda_kernels().dequantize_heads);

}  // namespace
}  // namespace torch_fp8::cuda
