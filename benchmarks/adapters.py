"""LoRA over an FP8 base against LoRA over a BF16 base: forward + backward. Writes results/adapters.md.

Llama-3-8B's shapes, 8192 tokens, rank 16 on q, k, v, o, gate, up and down, adapters in BF16. Only adapters are trained:
of the base a step computes outputs and the gradient of its inputs. The FP8 arm is a copy that fp8.freeze changed; its
adapters are the same. In the decoder layer norms, rotary positions, attention and SwiGLU run in BF16 in both arms.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
import torch_fp8 as fp8
from lib.common import gpu_ms, loop_ms, options, randn, scaled, start
from lib.report import header, pair, table, write
from lib.steps import linear, llama
from torch import Tensor, nn

from models.llama import FFN, DecoderLayer

TOKENS, RANK, ALPHA = 8192, 16, 32
GRANULARITIES = ("channel", "tensor", "block")
LINEARS = [("q, o", 4096, 4096), ("k, v", 4096, 1024), ("gate, up", 4096, 14336), ("down", 14336, 4096)]  # in, out
MIB = 2**20

try:
    import peft
except ImportError:
    peft = None


class LoRA(nn.Module):
    """What peft's LoRA computes, for machines without peft."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base
        like = {"device": options.device, "dtype": torch.bfloat16}
        self.a = nn.Parameter(torch.randn(RANK, base.in_features, **like) / math.sqrt(base.in_features))
        self.b = nn.Parameter(torch.randn(base.out_features, RANK, **like) * 0.01)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + nn.functional.linear(nn.functional.linear(x, self.a), self.b) * (ALPHA / RANK)


def adapted(module: nn.Module) -> nn.Module:
    """With an adapter on each linear layer, and nothing else trained."""
    module.requires_grad_(False)
    if peft is not None:
        module.register_parameter("anchor", nn.Parameter(randn(1), requires_grad=False))  # peft asks for a parameter
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", init_lora_weights="gaussian")
        return peft.inject_adapter_in_model(config, module).to(torch.bfloat16).to(options.device)
    for name, layer in list(module.named_modules()):
        if isinstance(layer, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, LoRA(layer))
    return module


class One(nn.Module):
    """A linear layer that an adapter can take the place of."""

    def __init__(self, k: int, n: int) -> None:
        super().__init__()
        self.proj = linear(nn.Linear, k, n)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def arms_of(module: nn.Module, granularities: tuple[str, ...]) -> dict[str, nn.Module]:
    """BF16, and a frozen copy for each granularity of the weight's scales."""
    arms = {"BF16": copy.deepcopy(module)}
    for weight in granularities:
        arms[f"FP8, {weight}"] = fp8.freeze(copy.deepcopy(module), weight=weight, filter=lambda layer, name: True)
    return {name: adapted(arm) for name, arm in arms.items()}


def step_of(module: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], None]:
    """Forward and backward; every gradient is a new tensor."""
    leaves = [x, *(p for p in module.parameters() if p.requires_grad)]

    def step() -> None:
        module(x).backward(dy)
        for leaf in leaves:
            leaf.grad = None

    return step


def base_mib(module: nn.Module) -> float:
    """Of the base's linear layers: weights and scales."""
    bases = [m for name, m in module.named_modules() if name.endswith("base_layer")]
    return sum(t.nbytes for base in bases for t in base.state_dict().values()) / MIB


def peak_mib(step: Callable[[], None]) -> float:
    """At most in a step, beyond what stands before it."""
    if options.dry:
        step()
        return 0.0
    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def measure(name: str, module: nn.Module, size: tuple[int, ...], out: int) -> list[list[str]]:
    """A row for each arm but BF16, which is in all of them."""
    x, dy = randn(*size, requires_grad=True), randn(*size[:-1], out)
    arms = arms_of(module, GRANULARITIES)
    steps = {arm: step_of(m, x, dy) for arm, m in arms.items()}
    gpu, loop = gpu_ms(steps, rounds=20), loop_ms(steps, seconds=0.5)
    peaks, bases = {arm: peak_mib(step) for arm, step in steps.items()}, {arm: base_mib(m) for arm, m in arms.items()}
    return [
        [
            name, arm.removeprefix("FP8, "), pair(gpu["BF16"], loop["BF16"]), pair(gpu[arm], loop[arm]),
            f"**{pair(gpu['BF16'] / gpu[arm], loop['BF16'] / loop[arm])}**",
            f"{bases['BF16']:.1f} → {bases[arm]:.1f} (**{bases[arm] / bases['BF16']:.2f}**)",
            f"{peaks['BF16']:.0f} → {peaks[arm]:.0f}",
        ]
        for arm in list(arms)[1:]
    ]  # fmt: skip


def main() -> None:
    start(__doc__)
    (tokens,) = scaled(TOKENS)
    shape, *_ = llama()
    rows = []
    for name, *sizes in LINEARS:
        k, n = scaled(*sizes)
        rows += measure(f"{name}: {k} → {n}", One(k, n), (tokens, k), n)
    with torch.device(options.device):
        modules = {"SwiGLU FFN": (FFN(shape), 1), "decoder layer": (DecoderLayer(shape), 4)}
    for name, (module, sequences) in modules.items():
        size = (sequences, tokens // sequences, shape.hidden)
        rows += measure(f"{name}, {sequences} x {size[1]} tokens", module.bfloat16(), size, shape.hidden)
        modules[name] = (nn.Identity(), 0)  # what was measured is let go
    lora = f"peft {peft.__version__}" if peft is not None else "a module of this script, since peft is not installed"
    head = ["layers", "FP8 scales by", "BF16 ms, GPU / loop", "FP8 ms, GPU / loop", "FP8 over BF16, GPU / loop",
            "base weights, MiB", "peak of a step beyond what stands, MiB"]  # fmt: skip
    write(
        "adapters",
        header("LoRA over an FP8 base, against LoRA over a BF16 base"),
        __doc__.split("\n\n")[1],
        f"LoRA: {lora}.\n",
        table(head, rows),
    )


if __name__ == "__main__":
    main()
