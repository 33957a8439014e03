// One or two small tensors cast in one launch, where the host's time for launches decides. A cluster of blocks takes a
// tensor: its blocks take the amax of their tiles, exchange it through shared memory, and cast the tiles by the scale
// that follows from it.
#include "cuda/cast/tile.cuh"
#include "cuda/common/barrier.cuh"
#include "cuda/common/cluster.cuh"

namespace torch_fp8::cuda {
namespace {

constexpr int kBlocks = 8;  // of a cluster

template <class T>
__device__ uint32_t max_of_tile(const Matrix& x, bool vectorised, const Tile& tile) {
  Pack<T> rows[kPatchRows];
  load_patch(x, vectorised, tile, rows);
  uint32_t seen = 0;
#pragma unroll
  for (const Pack<T>& row : rows) seen = max_of_pack(row, seen);
  return seen;
}

// The largest of what the blocks of the cluster have seen, in each of their threads.
__device__ uint32_t max_of_cluster(uint32_t (&of_warp)[kWarps], uint32_t seen) {
  __shared__ float of_block;
  stage_max(of_warp, seen);
  __syncthreads();
  if (threadIdx.x == 0) of_block = __uint_as_float(max_of_warps(of_warp));
  synchronize_cluster();
  seen = 0;
  for (int rank = 0; rank < kBlocks; ++rank) {
    seen = max(seen, __float_as_uint(load_from(rank, shared_address(&of_block))));
  }
  synchronize_cluster();  // no block ends while another reads its maximum
  return seen;
}

// The state that the tensor is scaled by. seen: its amax; before: the amax of its slot until now.
__device__ Slot slot_of(const SmallCast& small, Format format, uint32_t seen, int before) {
  if (small.scale_by == ScaleBy::kOwnAmax) return own_slot(__uint_as_float(seen), small.target, small.margin);
  const Slot slot = *small.cast.slot;
  if (small.scale_by == ScaleBy::kSlot) return slot;
  const float amax = __int_as_float(max(static_cast<int>(seen), before));
  return is_unfit(slot.scale, amax, format, small.target) ? own_slot(amax, small.target, small.margin) : slot;
}

struct Tiling {
  bool vectorised;
  uint32_t across, tiles;
};
struct Tilings {
  Tiling of[2];
};

template <class T, Format kFormat>
__global__ void __launch_bounds__(kThreads, 2)
    small_cast_kernel(__grid_constant__ const SmallCasts all, __grid_constant__ const Tilings tilings) {
  __shared__ uint32_t of_warp[kWarps];
  const int rank = cluster_rank();
  const SmallCast& small = all.casts[blockIdx.x / kBlocks];
  const QuantizeArgs& cast = small.cast;
  const Tiling& tiling = tilings.of[blockIdx.x / kBlocks];
  begin_dependent();

  uint32_t seen = 0;
  int before = 0;
  if (cast.amax || small.scale_by != ScaleBy::kSlot) {
    if (cast.amax) before = *reinterpret_cast<volatile int*>(cast.amax);
    for (uint32_t index = rank; index < tiling.tiles; index += kBlocks) {
      seen = max(seen, max_of_tile<T>(cast.x, tiling.vectorised, tile_of(cast.x, index, tiling.across)));
    }
    seen = max_of_cluster(of_warp, seen);
  }
  const Slot slot = slot_of(small, kFormat, seen, before);
  for (uint32_t index = rank; index < tiling.tiles; index += kBlocks) {
    const Tile tile = tile_of(cast.x, index, tiling.across);
    if (cast.q_t) {
      cast_tile<T, kFormat, true, false>(cast, tiling.vectorised, tile, slot.scale, of_warp);
    } else {
      cast_tile<T, kFormat, false, false>(cast, tiling.vectorised, tile, slot.scale, of_warp);
    }
    __syncthreads();  // before the next tile is put in the place of this one
  }
  if (rank != 0 || threadIdx.x != 0) return;
  if (cast.amax) raise_amax(cast.amax, seen);
  if (cast.scale_inv) *cast.scale_inv = slot.scale_inv;
}

void launch_cast_small(const SmallCasts& all, cudaStream_t stream) {
  Tilings tilings{};
  for (int i = 0; i < all.count; ++i) {
    const Matrix& x = all.casts[i].cast.x;
    tilings.of[i] = {is_vectorised(x), tiles_across(x), tiles_of(x)};
  }
  const QuantizeArgs& first = all.casts[0].cast;
  const Grid grid{static_cast<uint32_t>(all.count) * kBlocks, kThreads, 0, kBlocks};
  with_type(first.x.type, [&](auto t) {
    using T = decltype(t);
    launch(first.format == Format::kE4M3 ? small_cast_kernel<T, Format::kE4M3> : small_cast_kernel<T, Format::kE5M2>,
           grid, stream, all, tilings);
  });
}

[[maybe_unused]] const bool filled = fill<launch_cast_small>(cuda_kernels().cast_small);

}  // namespace
}  // namespace torch_fp8::cuda
