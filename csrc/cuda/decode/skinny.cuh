// What the kernels for few rows share: loads of x, an instruction of the tensor core, and how an output is finished.
#pragma once

#include "cuda/common/decode.cuh"

namespace torch_fp8::cuda {

constexpr uint32_t kAllLanes = 0xFFFFFFFF;

__device__ inline bool is_finite(float value) { return raw_magnitude(value) < 0x7F800000; }

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

// The sum of an output's products, each of them scaled, by a warp; Inf as soon as a lane's part is not finite. Inlined
// it would take registers from what runs always.
template <class T>
__device__ __noinline__ float scaled_sum(const T* x, const uint8_t* w, const float* w_scale, WeightScale kind, int k,
                                         int64_t row) {
  float sum = 0;
  for (int first = 0; first < k; first += 32 * 16) {
    const int col = first + static_cast<int>(threadIdx.x % 32) * 16;
    if (col < k) {
      const uint4 codes = *reinterpret_cast<const uint4*>(w + col);
      uint4 values[2];
      load_x(values, x + col);
      const float scale = w_scale[scale_index(kind, k, row, col)];
#pragma unroll
      for (int i = 0; i < 8; ++i) {  // two columns
        const float2 w01 = to_float2(halves_of(word(codes, i / 2) >> i % 2 * 16 & 0xFFFF), __half{});
        const float2 x01 = to_float2(word(values[i / 4], i % 4), T{});
        sum = fmaf(x01.y, w01.y * scale, fmaf(x01.x, w01.x * scale, sum));
      }
    }
    if (__any_sync(kAllLanes, !is_finite(sum))) return INFINITY;
  }
#pragma unroll
  for (int distance = 16; distance >= 1; distance /= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
  return sum;
}

// For all threads of a warp. Where x has numbers beyond 7e35 a sum can leave float32 although its scale would bring it
// back: such a sum is made again, of scaled products. Where x itself is not finite the sum stays as it is.
template <class T>
__device__ void save_overflown(const SkinnyArgs& args, bool stores, int token, int64_t row, float& sum,
                               Epilogue<T>& epilogue) {
  if constexpr (!std::is_same_v<T, __half>) {  // no sum of those leaves float32
    for (uint32_t lost = __ballot_sync(kAllLanes, stores && !is_finite(sum)); lost != 0; lost &= lost - 1) {
      const int whose = __ffs(static_cast<int>(lost)) - 1;
      const int64_t its_token = __shfl_sync(kAllLanes, token, whose), its_row = __shfl_sync(kAllLanes, row, whose);
      const float again = scaled_sum(static_cast<const T*>(args.x) + its_token * args.k, args.w + its_row * args.k,
                                     args.w_scale, args.scale_kind, static_cast<int>(args.k), its_row);
      const bool is_mine = static_cast<int>(threadIdx.x % 32) == whose;
      if (is_mine && is_finite(again)) sum = again, epilogue.scale = 1.0f;
    }
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
