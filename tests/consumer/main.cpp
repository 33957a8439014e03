// One training step of an FP8 layer, and a few of a norm and an MLP, whose numbers Python's modules give, too.
#include <iomanip>
#include <iostream>

#include <torch/torch.h>
#include <torch_fp8/torch_fp8.h>

// Losses of a block's second half in a dtype, as exact numbers.
void train(torch::Dtype dtype) {
  namespace nn = torch_fp8::nn;
  torch::manual_seed(0);
  nn::RMSNorm norm(32);
  nn::LayerNorm last(32);
  nn::MLP mlp(nn::MLPOptions(32, 48).activation("xielu"));
  torch::nn::Sequential model(norm, last, mlp);
  model->to(dtype);
  torch::optim::SGD optimizer(model->parameters(), 0.1);
  std::cout << dtype << std::hexfloat;
  for (int i = 0; i < 4; ++i) {
    const at::Tensor x = torch::randn({12, 32}).to(dtype).requires_grad_(), residual = torch::randn({12, 32}).to(dtype);
    const auto [y, sum] = norm->with_sum(x, residual, mlp->readers());
    const at::Tensor loss = last->forward(mlp->forward(y, sum)).to(torch::kFloat).pow(3).mean();
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
    nn::update_scales(*model);
    std::cout << " " << loss.item<double>() << " " << x.grad().to(torch::kDouble).abs().sum().item<double>();
  }
  std::cout << std::defaultfloat << "\n";
}

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
  train(torch::kFloat);
  train(torch::kBFloat16);
}
