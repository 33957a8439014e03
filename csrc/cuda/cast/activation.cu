// SwiGLU and its kin made and cast in one pass, forward and backward: a block takes a tile (tile.cuh), and what is cast
// never leaves the registers in 16 bits.
#include "activation.h"
#include "cuda/cast/tile.cuh"

namespace torch_fp8::cuda {
namespace {

struct Math {
  static __device__ float exp(float x) { return __expf(x); }
  static __device__ float reciprocal(float x) { return __frcp_rn(x); }
  static __device__ float erfc(float x) { return erfcf(x); }
};

// f(gate), or f(gate) * up.
template <class T, Activation kActivation, bool kGated>
struct Product {
  MatrixSource<T> gate, up;

  __device__ void load(const Tile& tile) {
    gate.load(tile);
    if constexpr (kGated) up.load(tile);
  }
  __device__ static float of(float gate, float up) { return activate<kActivation, Math>(gate) * up; }
  __device__ float value(int i, int j) const { return of(gate.value(i, j), kGated ? up.value(i, j) : 1.0f); }
  __device__ float at(int64_t row, int64_t col) const { return of(gate.at(row, col), kGated ? up.at(row, col) : 1.0f); }
};

template <class T, Activation kActivation, bool kGated, bool kTransposed>
__global__ void __launch_bounds__(kThreads, 2)
    activate_kernel(__grid_constant__ const ActivationArgs args, bool vectorised, uint32_t tiles_across) {
  __shared__ uint32_t of_warp[kWarps];
  const Tile tile = tile_of(args.cast.x, blockIdx.x, tiles_across);
  begin_dependent();
  Product<T, kActivation, kGated> product{{args.cast.x, vectorised}, {args.up, vectorised}};
  product.load(tile);
  cast_loaded<Format::kE4M3, kTransposed, false>(product, args.cast, tile, args.cast.slot->scale, of_warp);
  store_scalars(args.cast, of_warp);
}

// One of the two gradients, read again where a thread has met an Inf.
template <class T, Activation kActivation, bool kGated, bool kOfGate>
struct Gradient {
  const MatrixSource<T>&dy, &gate, &up;

  __device__ float at(int64_t row, int64_t col) const {
    const Derivative f = differentiate<kActivation, Math>(gate.at(row, col));
    return dy.at(row, col) * (kOfGate ? (kGated ? up.at(row, col) : 1.0f) * f.slope : f.value);
  }
};

template <class T, Format kFormat, Activation kActivation, bool kGated>
__global__ void __launch_bounds__(kThreads, 2)
    activate_backward_kernel(__grid_constant__ const ActivationBackwardArgs args, bool vectorised,
                             uint32_t tiles_across) {
  __shared__ uint32_t of_warp[kWarps];
  const Tile tile = tile_of(args.gate.x, blockIdx.x, tiles_across);
  begin_dependent();
  MatrixSource<T> dy{args.dy, vectorised}, gate{args.gate.x, vectorised}, up{args.up.x, vectorised};
  dy.load(tile);
  gate.load(tile);
  if constexpr (kGated) up.load(tile);

  const float gate_scale = args.gate.slot->scale, up_scale = kGated ? args.up.slot->scale : 1.0f;
  Patch of_gate, of_up;
#pragma unroll
  for (int i = 0; i < kPatchRows; ++i) {
    float d_gate[kPackSize], d_up[kPackSize];
#pragma unroll
    for (int j = 0; j < kPackSize; ++j) {
      const Derivative f = differentiate<kActivation, Math>(gate.value(i, j));
      const float gradient = dy.value(i, j);
      d_gate[j] = gradient * ((kGated ? up.value(i, j) : 1.0f) * f.slope);
      d_up[j] = gradient * f.value;
    }
    encode_row<kFormat>(of_gate, i, d_gate, gate_scale);
    if constexpr (kGated) encode_row<kFormat>(of_up, i, d_up, up_scale);
  }
  float no_sums[kPackSize];
  store_tile<true, false>(of_gate, no_sums, Gradient<T, kActivation, kGated, true>{dy, gate, up}, args.gate, tile,
                          of_warp);
  store_scalars(args.gate, of_warp);
  if constexpr (kGated) {
    __syncthreads();  // before the maxima of the second take the place of those of the first
    store_tile<true, false>(of_up, no_sums, Gradient<T, kActivation, kGated, false>{dy, gate, up}, args.up, tile,
                            of_warp);
    store_scalars(args.up, of_warp);
  }
}

template <class Function>
void with_bool(bool value, Function&& function) {
  value ? function(std::true_type{}) : function(std::false_type{});
}

void launch_activate(const ActivationArgs& args, cudaStream_t stream) {
  const Matrix& x = args.cast.x;
  if (x.rows == 0 || x.cols == 0) return;
  const bool gated = args.up.data, vectorised = is_vectorised(x) && (!gated || is_vectorised(args.up));
  with_type(x.type, [&](auto t) {
    with_activation(args.activation, [&](auto activation) {
      with_bool(gated, [&](auto g) {
        with_bool(args.cast.q_t, [&](auto transposed) {
          launch(activate_kernel<decltype(t), activation(), g(), transposed()>, tiles_of(x), kThreads, stream, args,
                 vectorised, tiles_across(x));
        });
      });
    });
  });
}

void launch_activate_backward(const ActivationBackwardArgs& args, cudaStream_t stream) {
  const Matrix& x = args.gate.x;
  if (x.rows == 0 || x.cols == 0) return;
  const bool gated = args.up.x.data;
  const bool vectorised = is_vectorised(x) && is_vectorised(args.dy) && (!gated || is_vectorised(args.up.x));
  with_type(x.type, [&](auto t) {
    with_activation(args.activation, [&](auto activation) {
      with_bool(gated, [&](auto g) {
        const auto kernel = args.gate.format == Format::kE4M3
                                ? activate_backward_kernel<decltype(t), Format::kE4M3, activation(), g()>
                                : activate_backward_kernel<decltype(t), Format::kE5M2, activation(), g()>;
        launch(kernel, tiles_of(x), kThreads, stream, args, vectorised, tiles_across(x));
      });
    });
  });
}

[[maybe_unused]] const bool filled =
    fill<launch_activate>(cuda_kernels().activate) && fill<launch_activate_backward>(cuda_kernels().activate_backward);

}  // namespace
}  // namespace torch_fp8::cuda
