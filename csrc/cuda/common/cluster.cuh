// What the blocks of a cluster have of each other.
#pragma once

#include "cuda/common/block.cuh"

namespace torch_fp8::cuda {

__device__ inline int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
__device__ inline void arrive_in_cluster() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ inline void wait_for_cluster() {
  __syncwarp();
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ inline void synchronize_cluster() {
  arrive_in_cluster();
  wait_for_cluster();
}
// What lies at this block's address in another block of the cluster.
__device__ inline float load_from(int rank, uint32_t address) {
  float value;
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %1, %2;\n"
      "ld.shared::cluster.f32 %0, [remote];\n"
      "}\n"
      : "=f"(value)
      : "r"(address), "r"(rank)
      : "memory");
  return value;
}

}  // namespace torch_fp8::cuda
