// SwiGLU and its kin made and cast in one pass, forward and backward: a block takes a tile (tile.cuh), and what is cast
// never leaves the registers in 16 bits.
#include "cuda/cast/activation.cuh"
#include "cuda/cast/tile.cuh"

namespace torch_fp8::cuda {
namespace {

template <class T, Activation kActivation, bool kGated, bool kTransposed>
__global__ void __launch_bounds__(kThreads, 2)
    activate_kernel(__grid_constant__ const ActivationArgs args, uint32_t tiles_across) {
  __shared__ uint32_t of_warp[kWarps];
  const Tile tile = tile_of(args.cast.x, blockIdx.x, tiles_across);
  const int64_t row = tile.row + tile.patch_row * kPatchRows, col = tile.col + tile.patch_col * kPackSize;
  begin_dependent();
  const Product<T, kActivation, kGated> made{{args.cast.x}, {args.up}, shape_of(args.xielu)};
  const float scale = args.cast.slot->scale;
  Patch<> patch;
#pragma unroll
  for (int i = 0; i < kPatchRows; ++i) {
    const Pack<T> gate = made.gate.load(row + i, col), up = kGated ? made.up.load(row + i, col) : Pack<T>{};
    float product[kPackSize];
#pragma unroll
    for (int j = 0; j < kPackSize; ++j) {
      product[j] = made.of(to_float(gate.values[j]), kGated ? to_float(up.values[j]) : 1.0f);
    }
    encode_row<Format::kE4M3>(patch, i, product, scale);
  }
  store_tile<kTransposed>(patch, made, args.cast, tile, of_warp);
  store_scalars(args.cast, of_warp);
}

// One of the two gradients, read again where a thread has met an Inf.
template <class T, Activation kActivation, bool kGated, bool kOfGate>
struct Gradient {
  Factor<T> dy, gate, up;
  Shape shape;

  __device__ float at(int64_t row, int64_t col) const {
    const Derivative f = differentiate<kActivation, Math>(gate.at(row, col), shape);
    return dy.at(row, col) * (kOfGate ? (kGated ? up.at(row, col) : 1.0f) * f.slope : f.value);
  }
};

// The tile's part of the gradients of xielu's two factors: each warp's first, and behind a __syncthreads() the block's.
__device__ void stage_alphas(float (&of_warp)[kWarps][2], float by_positive, float by_negative) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    by_positive += __shfl_xor_sync(0xFFFFFFFF, by_positive, lanes);
    by_negative += __shfl_xor_sync(0xFFFFFFFF, by_negative, lanes);
  }
  if (threadIdx.x % 32 != 0) return;
  of_warp[threadIdx.x / 32][0] = by_positive;
  of_warp[threadIdx.x / 32][1] = by_negative;
}

__device__ void store_alphas(const ActivationBackwardArgs& args, const float (&of_warp)[kWarps][2]) {
  if (!args.alpha_sums || threadIdx.x >= 2) return;
  float sum = 0;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) sum += of_warp[warp][threadIdx.x];
  args.alpha_sums[2 * int64_t{blockIdx.x} + threadIdx.x] = sum;
}

template <class T, Format kFormat, Activation kActivation, bool kGated, bool kSums>
__global__ void __launch_bounds__(kThreads, 2)
    activate_backward_kernel(__grid_constant__ const ActivationBackwardArgs args, uint32_t tiles_across,
                             int64_t stride) {
  __shared__ uint32_t of_warp[kWarps];
  const Tile tile = tile_of(args.gate.x, blockIdx.x, tiles_across);
  const int64_t row = tile.row + tile.patch_row * kPatchRows, col = tile.col + tile.patch_col * kPackSize;
  begin_dependent();
  const Shape shape = shape_of(args.xielu);
  const Gradient<T, kActivation, kGated, true> of_gate{{args.dy}, {args.gate.x}, {args.up.x}, shape};
  const Gradient<T, kActivation, kGated, false> of_up{{args.dy}, {args.gate.x}, {args.up.x}, shape};
  const float gate_scale = args.gate.slot->scale, up_scale = kGated ? args.up.slot->scale : 1.0f;
  Patch<kSums> gate_patch, up_patch;
  float by_positive = 0, by_negative = 0;
#pragma unroll
  for (int i = 0; i < kPatchRows; ++i) {
    const Pack<T> dy = of_gate.dy.load(row + i, col), gate = of_gate.gate.load(row + i, col);
    const Pack<T> up = kGated ? of_gate.up.load(row + i, col) : Pack<T>{};
    float d_gate[kPackSize], d_up[kPackSize];
#pragma unroll
    for (int j = 0; j < kPackSize; ++j) {
      const float x = to_float(gate.values[j]), factor = kGated ? to_float(up.values[j]) : 1.0f;
      const Derivative f = differentiate<kActivation, Math>(x, shape);
      const float gradient = to_float(dy.values[j]);
      d_gate[j] = gradient * (factor * f.slope);
      d_up[j] = gradient * f.value;
      if constexpr (kActivation == Activation::kXielu) {
        const float by_alpha = gradient * factor * f.by_alpha;
        x > 0 ? by_positive += by_alpha : by_negative += by_alpha;
      }
    }
    encode_row<kFormat>(gate_patch, i, d_gate, gate_scale);
    if constexpr (kGated) encode_row<kFormat>(up_patch, i, d_up, up_scale);
  }
  __shared__ float of_alphas[kWarps][2];
  if constexpr (kActivation == Activation::kXielu) stage_alphas(of_alphas, by_positive, by_negative);
  store_tile<true>(gate_patch, of_gate, args.gate, tile, of_warp, stride);
  if constexpr (kActivation == Activation::kXielu) store_alphas(args, of_alphas);
  store_scalars(args.gate, of_warp);
  if constexpr (kGated) {
    __syncthreads();  // before the second takes the place of the first
    store_tile<true>(up_patch, of_up, args.up, tile, of_warp, stride);
    store_scalars(args.up, of_warp);
  }
}

void launch_activate(const ActivationArgs& args, cudaStream_t stream) {
  const Matrix& x = args.cast.x;
  if (x.rows == 0 || x.cols == 0) return;
  const bool gated = args.up.data;
  with_type(x.type, [&](auto t) {
    with_activation(args.activation, [&](auto activation) {
      with_bool(gated, [&](auto g) {
        with_bool(args.cast.q_t, [&](auto transposed) {
          launch(activate_kernel<decltype(t), activation(), g(), transposed()>, tiles_of(x), kThreads, stream, args,
                 tiles_across(x));
        });
      });
    });
  });
}

// The cast of both halves as two casts, each into its part of one array.
ActivationBackwardArgs as_two_casts(const ActivationBackwardArgs& both) {
  ActivationBackwardArgs args = both;
  QuantizeArgs& second = both.halves == Halves::kGateFirst ? args.up : args.gate;
  args.up = both.gate;
  args.up.x = both.up.x;
  const int64_t cols = both.gate.x.cols;
  if (second.q) second.q += cols;
  if (second.q_t) second.q_t += cols * padded(both.gate.x.rows);
  if (second.column_sums) second.column_sums += cols;
  return args;
}

void launch_activate_backward(const ActivationBackwardArgs& given, cudaStream_t stream) {
  const bool by_halves = given.halves != Halves::kNone;
  const ActivationBackwardArgs args = by_halves ? as_two_casts(given) : given;
  const Matrix& x = args.gate.x;
  const int64_t stride = by_halves ? 2 * x.cols : padded(x.cols);
  if (x.rows == 0 || x.cols == 0) return;
  const bool gated = args.up.x.data;
  with_type(x.type, [&](auto t) {
    with_activation(args.activation, [&](auto activation) {
      with_bool(gated, [&](auto g) {
        with_bool(args.gate.column_sums, [&](auto sums) {
          const auto kernel = args.gate.format == Format::kE4M3
                                  ? activate_backward_kernel<decltype(t), Format::kE4M3, activation(), g(), sums()>
                                  : activate_backward_kernel<decltype(t), Format::kE5M2, activation(), g(), sums()>;
          launch(kernel, tiles_of(x), kThreads, stream, args, tiles_across(x), stride);
        });
      });
    });
  });
}

[[maybe_unused]] const bool filled =
    fill<launch_activate>(cuda_kernels().activate) && fill<launch_activate_backward>(cuda_kernels().activate_backward);

}  // namespace
}  // namespace torch_fp8::cuda
