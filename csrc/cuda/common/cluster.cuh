// What the blocks of a cluster have of each other.
#pragma once

#include "cuda/common/block.cuh"

namespace torch_fp8::cuda {

__device__ inline int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
__device__ inline void synchronize_cluster() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
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
// Two words to this block's address in another block of the cluster, counted by that block's barrier.
__device__ inline void send_to(int rank, uint32_t address, float a, float b, uint32_t barrier) {
  asm volatile(
      "{\n"
      ".reg .b32 remote, remote_barrier;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mapa.shared::cluster.u32 remote_barrier, %4, %1;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [remote], {%2, %3}, [remote_barrier];\n"
      "}\n" ::"r"(address),
      "r"(rank), "f"(a), "f"(b), "r"(barrier)
      : "memory");
}

}  // namespace torch_fp8::cuda
