// An E4M3 weight in a type that every GEMM takes, in one pass, at the speed of its writes.
#include "cuda/common/decode.cuh"

namespace torch_fp8::cuda {
namespace {

constexpr int kThreads = 256, kPacks = 2;  // threads of a block, packs of a thread
constexpr int kColumns = kThreads * kPacks * kPackSize;
static_assert(kScaleBlock % kPackSize == 0, "a pack lies in one block of scales");

template <class T, bool kVectorised>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(DequantizeArgs args, uint32_t across) {
  const int64_t row = blockIdx.x / across;
  const int64_t first = int64_t{blockIdx.x % across} * kColumns + threadIdx.x * kPackSize;
  const uint8_t* const w = args.w + row * args.k;
  T* const out = static_cast<T*>(args.out) + row * args.k;
  begin_dependent();

  const auto scale_of = [&](int64_t col) { return args.w_scale[scale_index(args.scale_kind, args.k, row, col)]; };
  const auto value_of = [](uint32_t codes) { return to_float2(halves_of(codes), __half{}); };
  if constexpr (kVectorised) {
    uint2 codes[kPacks];
    float scales[kPacks];
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int64_t col = first + i * kThreads * kPackSize;
      codes[i] = col < args.k ? *reinterpret_cast<const uint2*>(w + col) : uint2{};
      scales[i] = col < args.k ? scale_of(col) : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int64_t col = first + i * kThreads * kPackSize;
      if (col >= args.k) return;
      Pack<T> values;
#pragma unroll
      for (int j = 0; j < kPackSize / 2; ++j) {
        const float2 value = value_of((j < 2 ? codes[i].x : codes[i].y) >> (j % 2 * 16) & 0xFFFF);
        values.values[2 * j] = static_cast<T>(value.x * scales[i]);
        values.values[2 * j + 1] = static_cast<T>(value.y * scales[i]);
      }
      store_whole(out + col, values);
    }
  } else {
    for (int i = 0; i < kPacks * kPackSize; ++i) {
      const int64_t col = first - threadIdx.x * (kPackSize - 1) + i * kThreads;  // neighbouring threads, neighbours
      if (col < args.k) out[col] = static_cast<T>(value_of(w[col]).x * scale_of(col));
    }
  }
}

void launch_dequantize(const DequantizeArgs& args, cudaStream_t stream) {
  const int64_t across = (args.k + kColumns - 1) / kColumns;
  const bool vectorised = args.k % kPackSize == 0 && reinterpret_cast<uintptr_t>(args.w) % 8 == 0 &&
                          reinterpret_cast<uintptr_t>(args.out) % 16 == 0;
  with_type(args.type, [&](auto t) {
    using T = decltype(t);
    const auto kernel = vectorised ? dequantize_kernel<T, true> : dequantize_kernel<T, false>;
    launch(kernel, blocks_for(args.n * across, 1), kThreads, stream, args, static_cast<uint32_t>(across));
  });
}

[[maybe_unused]] const bool filled = fill<launch_dequantize>(cuda_kernels().dequantize);

}  // namespace
}  // namespace torch_fp8::cuda
