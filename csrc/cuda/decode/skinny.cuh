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

// What an output of that row needs at the end. Constants as the weight is: requested early, for a kernel of few
// microseconds would wait for them most of one, and converted late, for that waits.
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
