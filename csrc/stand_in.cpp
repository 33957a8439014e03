#include "stand_in.h"

#include <ATen/ATen.h>

namespace torch_fp8 {
namespace {

// It lives and dies with the tensor that it belongs to.
struct Meta : c10::BackendMeta {
  explicit Meta(HandedOver of_tensor) : handed(std::move(of_tensor)) {}
  HandedOver handed;
};

}  // namespace

at::Tensor stand_in(const at::Tensor& like, HandedOver handed) {
  at::Tensor t = at::empty({0}, like.options());
  c10::TensorImpl* const impl = t.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(like.sizes());
  impl->release_storage_and_set_meta_custom_data_ptr_error_msg_(
      "torch_fp8: inside of an MLP in one piece the product and its gradients exist in FP8 alone, so this tensor has "
      "no "
      "values to read; run the layers one by one (torch_fp8.unfuse)");
  impl->set_backend_meta(c10::make_intrusive<Meta>(std::move(handed)));
  return t;
}

const HandedOver* handed_over(const at::Tensor& t) {
  const auto* const meta = dynamic_cast<const Meta*>(t.unsafeGetTensorImpl()->get_backend_meta());
  return meta ? &meta->handed : nullptr;
}

}  // namespace torch_fp8
