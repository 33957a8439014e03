// Each row by its own amax, in one launch: a block reads a row, finds its largest magnitude, and casts what it holds.
// Or each 128 columns of a row by theirs.
#include "cuda/common/block.cuh"
#include "cuda/common/encode.cuh"

namespace torch_fp8::cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;

// Zero behind the row's end.
template <class T>
__device__ Pack<T> load_pack(const Matrix& x, bool vectorised, int64_t row, int64_t col) {
  const T* const source = static_cast<const T*>(x.data) + row * x.row_stride + col * x.col_stride;
  if (vectorised && col + kPackSize <= x.cols) return *reinterpret_cast<const Pack<T>*>(source);
  Pack<T> pack;
#pragma unroll
  for (int j = 0; j < kPackSize; ++j) pack.values[j] = col + j < x.cols ? source[j * x.col_stride] : T(0.0f);
  return pack;
}

// What is cast: x or, in float32, x * col_scale.
template <class T, bool kScaled>
using Value = std::conditional_t<kScaled, float, T>;

template <class T, bool kScaled>
__device__ Pack<Value<T, kScaled>> load_values(const QuantizeRowsArgs& args, bool vectorised, int64_t row,
                                               int64_t col) {
  const Pack<T> pack = load_pack<T>(args.x, vectorised, row, col);
  if constexpr (!kScaled) {
    return pack;
  } else {
    const float* const source = args.col_scale + col;
    Pack<float> scales;
    if (col + kPackSize <= args.x.cols && reinterpret_cast<uintptr_t>(args.col_scale) % 16 == 0) {
      scales = *reinterpret_cast<const Pack<float>*>(source);
    } else {
#pragma unroll
      for (int j = 0; j < kPackSize; ++j) scales.values[j] = col + j < args.x.cols ? source[j] : 0.0f;
    }
    Pack<float> products;
#pragma unroll
    for (int j = 0; j < kPackSize; ++j) products.values[j] = to_float(pack.values[j]) * scales.values[j];
    return products;
  }
}

// kPacks: how many packs of a row a thread holds; 0: the row is longer, and is read twice. kScaled: by col_scale.
template <class T, int kPacks, bool kScaled>
__global__ void __launch_bounds__(kThreads) quantize_rows_kernel(QuantizeRowsArgs args, bool vectorised) {
  __shared__ uint32_t of_warp[kWarps];
  const int64_t row = blockIdx.x, packs = padded(args.x.cols) / kPackSize;
  uint8_t* const q = args.q + row * packs * kPackSize;
  begin_dependent();

  Pack<Value<T, kScaled>> held[kPacks > 0 ? kPacks : 1];
  uint32_t seen = 0;
  if constexpr (kPacks > 0) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      held[i] = load_values<T, kScaled>(args, vectorised, row, (int64_t{i} * kThreads + threadIdx.x) * kPackSize);
    }
#pragma unroll
    for (int i = 0; i < kPacks; ++i) seen = max_of_pack(held[i], seen);
  } else {
    for (int64_t pack = threadIdx.x; pack < packs; pack += kThreads) {
      seen = max_of_pack(load_values<T, kScaled>(args, vectorised, row, pack * kPackSize), seen);
    }
  }
  stage_max(of_warp, seen);
  __syncthreads();
  seen = max_of_warps(of_warp);
  const Slot slot = own_slot(__uint_as_float(seen), E4M3::kMax, kExact);
  if (threadIdx.x == 0) args.scale_inv[row] = slot.scale_inv;

  if constexpr (kPacks > 0) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int64_t pack = int64_t{i} * kThreads + threadIdx.x;
      if (pack < packs) store_codes<Format::kE4M3>(q + pack * kPackSize, held[i], slot.scale);
    }
  } else {
    for (int64_t pack = threadIdx.x; pack < packs; pack += kThreads) {
      store_codes<Format::kE4M3>(q + pack * kPackSize, load_values<T, kScaled>(args, vectorised, row, pack * kPackSize),
                                 slot.scale);
    }
  }
  if (seen < kInfinity) [[likely]]
    return;
  const T* const x = static_cast<const T*>(args.x.data) + row * args.x.row_stride;
  for (int64_t pack = threadIdx.x; pack < packs; pack += kThreads) {
    const int64_t col = pack * kPackSize, count = min(int64_t{kPackSize}, args.x.cols - col);
    const float* const col_scale = kScaled ? args.col_scale + col : nullptr;
    mark_infinities(q + col, x + col * args.x.col_stride, args.x.col_stride, count, col_scale);
  }
}

constexpr int kGroupThreads = 256;
constexpr int kGroupLanes = kScaleBlock / kPackSize;  // of a warp, that hold a group

template <class T>
__global__ void __launch_bounds__(kGroupThreads)
    quantize_groups_kernel(QuantizeGroupsArgs args, bool vectorised, uint32_t across) {
  const int64_t row = blockIdx.x / across;
  const int64_t col = (int64_t{blockIdx.x % across} * kGroupThreads + threadIdx.x) * kPackSize;
  const bool inside = row < args.x.rows && col < args.x.cols;
  begin_dependent();

  const Pack<T> pack = inside ? load_pack<T>(args.x, vectorised, row, col) : Pack<T>{};
  uint32_t seen = max_of_pack(pack);
#pragma unroll
  for (int distance = kGroupLanes / 2; distance > 0; distance /= 2) {
    seen = max(seen, __shfl_xor_sync(0xFFFFFFFF, seen, distance));
  }
  if (col >= args.x.cols) return;
  const Slot slot = own_slot(__uint_as_float(seen), E4M3::kMax, kExact);
  if (threadIdx.x % kGroupLanes == 0) args.scale_inv[col / kScaleBlock * args.rows + row] = slot.scale_inv;
  uint8_t* const q = args.q + row * args.x.cols + col;
  store_codes<Format::kE4M3>(q, pack, slot.scale);
  if (seen >= kInfinity) [[unlikely]] {
    const T* const x = static_cast<const T*>(args.x.data) + row * args.x.row_stride + col * args.x.col_stride;
    mark_infinities(q, x, args.x.col_stride, kPackSize);
  }
}

void launch_quantize_rows(const QuantizeRowsArgs& args, cudaStream_t stream) {
  with_type(args.x.type, [&](auto t) {
    using T = decltype(t);
    const int64_t packs = padded(args.x.cols) / kPackSize;
    const auto run = [&](auto scaled) {
      constexpr bool kScaled = decltype(scaled)::value;
      const auto kernel = packs <= kThreads       ? quantize_rows_kernel<T, 1, kScaled>
                          : packs <= 2 * kThreads ? quantize_rows_kernel<T, 2, kScaled>
                          : packs <= 4 * kThreads ? quantize_rows_kernel<T, 4, kScaled>
                                                  : quantize_rows_kernel<T, 0, kScaled>;
      launch(kernel, blocks_for(args.x.rows, 1), kThreads, stream, args, is_vectorised(args.x));
    };
    args.col_scale ? run(std::true_type{}) : run(std::false_type{});
  });
}

void launch_quantize_groups(const QuantizeGroupsArgs& args, cudaStream_t stream) {
  const uint32_t across = blocks_for(args.x.cols, kGroupThreads * kPackSize);
  with_type(args.x.type, [&](auto t) {
    launch(quantize_groups_kernel<decltype(t)>, blocks_for(args.rows * across, 1), kGroupThreads, stream, args,
           is_vectorised(args.x), across);
  });
}

[[maybe_unused]] const bool quantize_rows_filled = fill<launch_quantize_rows>(cuda_kernels().quantize_rows);
[[maybe_unused]] const bool quantize_groups_filled = fill<launch_quantize_groups>(cuda_kernels().quantize_groups);

}  // namespace
}  // namespace torch_fp8::cuda
