// An E4M3 weight in a type that every GEMM takes, in one pass: a thread turns 16 neighbouring codes into values.
#include "decode.cuh"

namespace torch_fp8::cuda {
namespace {

constexpr int kThreads = 256, kCodes = 16;  // threads of a block, codes of a thread
constexpr int kColumns = kThreads * kCodes;
static_assert(kScaleBlock % kCodes == 0, "a thread's codes lie in one block of scales");

template <class T>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(DequantizeArgs args, bool vectorised, uint32_t across) {
  const int64_t row = blockIdx.x / across;
  const int64_t col = int64_t{blockIdx.x % across} * kColumns + threadIdx.x * kCodes;
  begin_dependent();
  if (col >= args.k) return;
  const float scale = args.w_scale[scale_index(args.scale_kind, args.k, row, col)];
  const uint8_t* const w = args.w + row * args.k + col;
  T* const out = static_cast<T*>(args.out) + row * args.k + col;

  if (vectorised) {
    const uint4 codes = *reinterpret_cast<const uint4*>(w);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Pack<T> values;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t pair = word(codes, 2 * half + j / 2) >> (j % 2 * 16) & 0xFFFF;
        const float2 value = to_float2(halves_of(pair), __half{});
        values.values[2 * j] = static_cast<T>(value.x * scale);
        values.values[2 * j + 1] = static_cast<T>(value.y * scale);
      }
      *reinterpret_cast<Pack<T>*>(out + half * kPackSize) = values;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kCodes; ++i) {
    if (col + i < args.k) out[i] = static_cast<T>(to_float2(halves_of(w[i]), __half{}).x * scale);
  }
}

}  // namespace

void launch_dequantize(const DequantizeArgs& args, cudaStream_t stream) {
  const int64_t across = (args.k + kColumns - 1) / kColumns;
  const bool vectorised = args.k % kCodes == 0 && reinterpret_cast<uintptr_t>(args.w) % 16 == 0 &&
                          reinterpret_cast<uintptr_t>(args.out) % 16 == 0;
  with_type(args.type, [&](auto t) {
    launch(dequantize_kernel<decltype(t)>, blocks_for(args.n * across, 1), kThreads, stream, args, vectorised,
           static_cast<uint32_t>(across));
  });
}

}  // namespace torch_fp8::cuda
