// SwiGLU and its kin made and each row cast by its own amax, in one launch: a block makes a row, finds its largest
// magnitude, and casts what it holds.
#include "cuda/cast/activation.cuh"
#include "cuda/common/encode.cuh"

namespace torch_fp8::cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kHeldPacks = 4;  // that a thread keeps of what it makes

// kHeld: a thread's part of the row fits in its registers; else the row is longer, and is made twice.
template <class T, Activation kActivation, bool kGated, bool kHeld>
__global__ void __launch_bounds__(kThreads, 2) activate_rows_kernel(__grid_constant__ const ActivationRowsArgs args) {
  __shared__ uint32_t of_warp[kWarps];
  const int64_t row = blockIdx.x, packs = padded(args.gate.cols) / kPackSize;
  uint8_t* const q = args.q + row * packs * kPackSize;
  begin_dependent();

  const Product<T, kActivation, kGated> product{{args.gate}, {args.up}, Shape{}};
  const auto made = [&](const Pack<T>& gate, const Pack<T>& up) {
    Pack<float> values;
#pragma unroll
    for (int j = 0; j < kPackSize; ++j) {
      values.values[j] = product.of(to_float(gate.values[j]), kGated ? to_float(up.values[j]) : 1.0f);
    }
    return values;
  };
  const auto load = [&](const Factor<T>& factor, int64_t pack) { return factor.load(row, pack * kPackSize); };
  const auto make = [&](int64_t pack) {
    return made(load(product.gate, pack), kGated ? load(product.up, pack) : Pack<T>{});
  };

  Pack<float> held[kHeld ? kHeldPacks : 1];
  uint32_t seen = 0;
  if constexpr (kHeld) {
    Pack<T> gate[kHeldPacks], up[kHeldPacks];
#pragma unroll
    for (int i = 0; i < kHeldPacks; ++i) {
      gate[i] = load(product.gate, i * kThreads + threadIdx.x);
      if constexpr (kGated) up[i] = load(product.up, i * kThreads + threadIdx.x);
    }
#pragma unroll
    for (int i = 0; i < kHeldPacks; ++i) {
      held[i] = made(gate[i], kGated ? up[i] : Pack<T>{});
      seen = max_of_pack(held[i], seen);
    }
  } else {
    for (int64_t pack = threadIdx.x; pack < packs; pack += kThreads) seen = max_of_pack(make(pack), seen);
  }
  stage_max(of_warp, seen);
  __syncthreads();
  seen = max_of_warps(of_warp);
  const Slot slot = own_slot(__uint_as_float(seen), E4M3::kMax, kExact);
  if (threadIdx.x == 0) args.scale_inv[row] = slot.scale_inv;

  if constexpr (kHeld) {
#pragma unroll
    for (int i = 0; i < kHeldPacks; ++i) {
      const int64_t pack = i * kThreads + threadIdx.x;
      if (pack < packs) store_codes<Format::kE4M3>(q + pack * kPackSize, held[i], slot.scale);
    }
  } else {
    for (int64_t pack = threadIdx.x; pack < packs; pack += kThreads) {
      store_codes<Format::kE4M3>(q + pack * kPackSize, make(pack), slot.scale);
    }
  }
  if (seen < kInfinity) [[likely]]
    return;
  for (int64_t pack = threadIdx.x; pack < packs; pack += kThreads) {
#pragma unroll 1
    for (int64_t col = pack * kPackSize; col < min((pack + 1) * kPackSize, args.gate.cols); ++col) {
      if (is_infinite(product.at(row, col))) q[col] = kNaNCode;
    }
  }
}

void launch_activate_rows(const ActivationRowsArgs& args, cudaStream_t stream) {
  if (args.gate.rows == 0 || args.gate.cols == 0) return;
  const bool fits = padded(args.gate.cols) <= int64_t{kHeldPacks} * kThreads * kPackSize;
  with_type(args.gate.type, [&](auto t) {
    with_activation(args.activation, [&](auto activation) {
      if constexpr (activation() != Activation::kXielu) {
        with_bool(args.up.data, [&](auto gated) {
          with_bool(fits, [&](auto held) {
            launch(activate_rows_kernel<decltype(t), activation(), gated(), held()>, blocks_for(args.gate.rows, 1),
                   kThreads, stream, args);
          });
        });
      }
    });
  });
}

[[maybe_unused]] const bool filled = fill<launch_activate_rows>(cuda_kernels().activate_rows);

}  // namespace
}  // namespace torch_fp8::cuda
