#include <torch/torch.h>
#include <torch_fp8/torch_fp8.h>
int main() { return 0; }
