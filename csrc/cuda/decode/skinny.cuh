// What the kernels for few rows share: loads of x, an instruction of the tensor core, and how an output is finished.
#pragma once

#include "cuda/common/decode.cuh"

namespace torch_fp8::cuda {

// 32 bytes by one instruction of the source, so that they are under way together.
__device__ inline void load_x(uint4 (&v)[2], const void* pointer) {
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%8];\n\tld.global.v4.u32 {%4, %5, %6, %7}, [%8 + 16];"
               : "=&r"(v[0].x), "=&r"(v[0].y), "=&r"(v[0].z), "=&r"(v[0].w), "=&r"(v[1].x), "=&r"(v[1].y),
                 "=&r"(v[1].z), "=&r"(v[1].w)
               : "l"(pointer)
               : "memory");
}

// What an output of that row needs at the end. It is requested with the weight, for a kernel of few microseconds would
// wait for it most of one, and converted late, for that waits.
template <class T>
struct Epilogue {
  float scale = 1.0f;
  T bias{};
};
template <class T>
__device__ Epilogue<T> load_epilogue(const SkinnyArgs& args, int64_t row) {
  Epilogue<T> epilogue;
  if (row >= args.n) return epilogue;
  if (args.scale_kind != WeightScale::kBlock) epilogue.scale = args.w_scale[scale_index(args.scale_kind, 0, row, 0)];
  if (args.bias) epilogue.bias = static_cast<const T*>(args.bias)[row];
  return epilogue;
}

template <class T>
__device__ void store_output(const SkinnyArgs& args, int64_t token, int64_t row, float sum,
                             const Epilogue<T>& epilogue) {
  static_cast<T*>(args.out)[token * args.n + row] = static_cast<T>(fmaf(sum, epilogue.scale, to_float(epilogue.bias)));
}

void launch_skinny_ring(const SkinnyArgs& args, cudaStream_t stream);  // where is_for_ring

// For all threads of a warp. Where x has numbers beyond 7e35 a sum can leave float32 although its scale would bring it
// back: the warp makes such a sum again, of scaled products. Where x itself is not finite the sum stays as it is.
template <class T>
__device__ void save_overflown(const SkinnyArgs& args, bool stores, int token, int64_t row, float& sum,
                               Epilogue<T>& epilogue) {
  if constexpr (std::is_same_v<T, __half>) return;  // no sum of these leaves float32
  constexpr uint32_t kWarp = 0xFFFFFFFF;
  const auto is_finite = [](float value) { return raw_magnitude(value) < 0x7F800000; };
  const int lane = static_cast<int>(threadIdx.x + threadIdx.y * blockDim.x) % 32, k = static_cast<int>(args.k);
  for (uint32_t lost = __ballot_sync(kWarp, stores && !is_finite(sum)); lost != 0; lost &= lost - 1) {
    const int whose = __ffs(static_cast<int>(lost)) - 1;
    const int64_t its_token = __shfl_sync(kWarp, token, whose), its_row = __shfl_sync(kWarp, row, whose);
    float again = 0;
    bool finite = true;
    for (int first = 0; finite && first < k; first += 32 * 16) {
      const int col = first + lane * 16;
      if (col < k) {
        const uint4 codes = *reinterpret_cast<const uint4*>(args.w + its_row * k + col);
        uint4 x[2];
        load_x(x, static_cast<const T*>(args.x) + its_token * k + col);
        const float scale = args.w_scale[scale_index(args.scale_kind, k, its_row, col)];
#pragma unroll
        for (int i = 0; i < 8; ++i) {  // two columns
          const float2 w01 = to_float2(halves_of(word(codes, i / 2) >> i % 2 * 16 & 0xFFFF), __half{});
          const float2 x01 = to_float2(word(x[i / 4], i % 4), T{});
          again = fmaf(x01.y, w01.y * scale, fmaf(x01.x, w01.x * scale, again));
        }
      }
      finite = __all_sync(kWarp, is_finite(again));
    }
    if (!finite) continue;
#pragma unroll
    for (int distance = 16; distance >= 1; distance /= 2) again += __shfl_xor_sync(kWarp, again, distance);
    if (lane == whose) sum = again, epilogue.scale = 1.0f;
  }
}

constexpr int kMmaRows = 16;  // of the weight: an instruction's
constexpr int kChunk = 64;    // columns that a warp takes at a time: 16 a lane and row

__device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __nv_bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace torch_fp8::cuda
