#include "ops/record.h"

namespace torch_fp8 {
namespace {

thread_local GemmRecord* innermost = nullptr;

}  // namespace

GemmRecord::GemmRecord() : outer_(innermost) { innermost = this; }
GemmRecord::~GemmRecord() { innermost = outer_; }

bool GemmRecord::is_open() { return innermost != nullptr; }

void GemmRecord::run(const Kernels& kernels, const GemmArgs& args) {
  if (innermost) {
    innermost->problems_.push_back({args.m, args.n, args.k, args.a_format, args.b_format, args.out_type,
                                    args.bias != nullptr, args.addend != nullptr, args.fast_accum, args.scales});
  }
  kernels.gemm(args);
}

}  // namespace torch_fp8
