// One training step of an FP8 layer.
#include <iostream>

#include <torch/torch.h>
#include <torch_fp8/torch_fp8.h>

int main() {
  torch_fp8::nn::Linear layer(32, 16);
  torch::optim::SGD optimizer(layer->parameters(), 0.1);
  const at::Tensor y = layer(torch::ones({4, 32}));
  y.sum().backward();
  optimizer.step();
  torch_fp8::nn::update_scales(*layer);
  std::cout << layer << "\n"
            << "y: " << y.sizes() << "\n"
            << "weight.grad: " << layer->weight.grad().sizes() << " of " << layer->weight.grad().mean().item<float>()
            << "\n"
            << "input scale: " << layer->slots[0][1].item<float>() << "\n";
}
