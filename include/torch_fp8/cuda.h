// What there is of CUDA in this library, and the stream that its kernels run on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace torch_fp8::cuda {

// "" without CUDA, else the CUDA version that the kernels were compiled with; and why there is none, or "".
const char* toolkit_version();
const char* why_absent();
// The cuBLASLt that is loaded, e.g. 130100; 0 without CUDA.
size_t cublaslt_version();
// Throws unless a device of this capability can run this build.
void check_capability(int major, int minor, const std::string& name);

// A stream, and the CUDA graph that it records.
struct StreamState {
  const void* stream = nullptr;
  uint64_t capture = 0;  // one number for each capture there ever is; 0: no graph is being recorded
  bool operator==(const StreamState&) const = default;
};

}  // namespace torch_fp8::cuda
