// Cast to FP8 with transpose, amax and column sums in one pass over x: a block takes a tile (tile.cuh). Tiles go to
// blocks in the order of their addresses, which keeps DRAM pages open.
//
// Where only row-major codes are asked for and nothing is padded, the matrix is one dense array and no tiles are
// needed.
#include <algorithm>

#include "cuda/cast/tile.cuh"

namespace torch_fp8::cuda {
namespace {

constexpr int kDenseThreads = 1024, kDensePacks = 2;  // of the kernel for dense arrays: threads, packs of a thread

template <class T, Format kFormat, bool kTransposed, bool kSums>
__global__ void __launch_bounds__(kThreads, 2)
    quantize_kernel(__grid_constant__ const QuantizeArgs args, bool vectorised, uint32_t tiles_across) {
  __shared__ uint32_t of_warp[kWarps];
  const Tile tile = tile_of(args.x, blockIdx.x, tiles_across);
  begin_dependent();
  cast_tile<T, kFormat, kTransposed, kSums>(args, vectorised, tile, args.slot->scale, of_warp);
  store_scalars(args, of_warp);
}

// In the ordinary case a block reads two numbers and ends, so there are few blocks, and where there is work each takes
// many tiles.
template <class T, Format kFormat>
__global__ void __launch_bounds__(kThreads, 2)
    recast_kernel(__grid_constant__ const RecastArgs args, bool vectorised, uint32_t tiles_across, uint32_t tiles) {
  __shared__ uint32_t of_warp[kWarps];
  const QuantizeArgs& cast = args.cast;
  begin_dependent();
  const float amax = *cast.amax;
  if (!is_unfit(cast.slot->scale, amax, kFormat, args.target)) return;
  const Slot own = own_slot(amax, args.target, args.margin);
  for (uint32_t index = blockIdx.x; index < tiles; index += gridDim.x) {
    const Tile tile = tile_of(cast.x, index, tiles_across);
    if (cast.q_t) {
      cast_tile<T, kFormat, true, false>(cast, vectorised, tile, own.scale, of_warp);
    } else {
      cast_tile<T, kFormat, false, false>(cast, vectorised, tile, own.scale, of_warp);
    }
    __syncthreads();  // before the next tile is put in the place of this one
  }
  if (cast.scale_inv && blockIdx.x == 0 && threadIdx.x == 0) *cast.scale_inv = own.scale_inv;
}

// The row-major codes of a dense x that needs no padding.
template <class T, Format kFormat>
__global__ void __launch_bounds__(kDenseThreads)
    quantize_dense_kernel(__grid_constant__ const QuantizeArgs args, int64_t packs) {
  __shared__ uint32_t of_warp[kDenseThreads / 32];
  const int64_t first = int64_t{blockIdx.x} * (kDenseThreads * kDensePacks) + threadIdx.x;
  begin_dependent();
  const float scale = args.slot->scale;
  Pack<T> loaded[kDensePacks];
#pragma unroll
  for (int i = 0; i < kDensePacks; ++i) {
    const int64_t pack = first + i * kDenseThreads;
    if (pack < packs) loaded[i] = static_cast<const Pack<T>*>(args.x.data)[pack];
  }
  uint32_t seen = 0;
#pragma unroll
  for (int i = 0; i < kDensePacks; ++i) {
    const int64_t pack = first + i * kDenseThreads;
    if (pack >= packs) continue;
    seen = max_of_pack(loaded[i], seen);
    store_codes<kFormat>(args.q + pack * kPackSize, loaded[i], scale);
  }
  if (seen >= kInfinity) [[unlikely]] {
    for (int64_t pack = first; pack < min(first + kDensePacks * kDenseThreads, packs); pack += kDenseThreads) {
      const int64_t element = pack * kPackSize;
      mark_infinities(args.q + element, static_cast<const T*>(args.x.data) + element, 1, kPackSize);
    }
  }
  stage_max(of_warp, seen);
  __syncthreads();
  store_scalars(args, of_warp);
}

template <class T, Format kFormat>
void launch_quantize_as(const QuantizeArgs& args, cudaStream_t stream) {
  const Matrix& x = args.x;
  const bool unpadded = x.rows % kAlignment == 0 && x.cols % kAlignment == 0;
  if (args.q && !args.q_t && !args.column_sums && unpadded && is_dense(x)) {
    const int64_t packs = x.rows * x.cols / kPackSize;
    launch(quantize_dense_kernel<T, kFormat>, blocks_for(packs, kDenseThreads * kDensePacks), kDenseThreads, stream,
           args, packs);
    return;
  }
  const bool transposed = args.q_t, sums = args.column_sums;
  const auto kernel = transposed
                          ? sums ? quantize_kernel<T, kFormat, true, true> : quantize_kernel<T, kFormat, true, false>
                      : sums ? quantize_kernel<T, kFormat, false, true>
                             : quantize_kernel<T, kFormat, false, false>;
  launch(kernel, tiles_of(x), kThreads, stream, args, is_vectorised(x), tiles_across(x));
}

void launch_quantize(const QuantizeArgs& args, cudaStream_t stream) {
  if (args.x.rows == 0 || args.x.cols == 0) return;  // nothing to quantise, and no GEMM will read its scale
  with_type(args.x.type, [&](auto t) {
    using T = decltype(t);
    args.format == Format::kE4M3 ? launch_quantize_as<T, Format::kE4M3>(args, stream)
                                 : launch_quantize_as<T, Format::kE5M2>(args, stream);
  });
}

void launch_recast(const RecastArgs& args, cudaStream_t stream) {
  const Matrix& x = args.cast.x;
  const uint32_t tiles = tiles_of(x);
  if (tiles == 0) return;
  with_type(x.type, [&](auto t) {
    using T = decltype(t);
    const auto kernel =
        args.cast.format == Format::kE4M3 ? recast_kernel<T, Format::kE4M3> : recast_kernel<T, Format::kE5M2>;
    launch(kernel, std::min(tiles, 2 * kMultiprocessors), kThreads, stream, args, is_vectorised(x), tiles_across(x),
           tiles);
  });
}

[[maybe_unused]] const bool filled =
    fill<launch_quantize>(cuda_kernels().quantize) && fill<launch_recast>(cuda_kernels().recast);

}  // namespace
}  // namespace torch_fp8::cuda
