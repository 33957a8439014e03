"""Train a Llama-shaped model with FSDP2 in BF16 and in FP8, from the same seed on the same batches.

    torchrun --nproc-per-node 2 examples/fsdp.py                # 1.5B parameters on GPUs, a tiny model on CPUs
    torchrun --nproc-per-node 2 examples/fsdp.py --size 8B --batch 2 --recompute --write

Sharded parameters are float32, gathered in BF16. The FP8 arm differs by one line, ``fp8.convert``. A token is a byte of
the source of the running Python's standard library; the vocabulary has its usual size all the same, since it costs
time. --write leaves benchmarks/results/fsdp.md, on GPUs.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch_fp8 as fp8
from gpt.text import read_documents
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch_fp8.files import replacing
from torch_fp8.table import markdown

from models.llama import SIZES, Llama

PAGE = Path(__file__).parents[1] / "benchmarks" / "results" / "fsdp.md"
WARM_UP = 3  # steps that the speed does not count


@dataclass
class Result:
    losses: list[float]
    tokens_per_second: float
    peak_gib: float | None  # None on a CPU
    parameters: int


def make_model(arm: str, args: argparse.Namespace, device: torch.device) -> Llama:
    with torch.device("meta"):
        model = Llama(*SIZES[args.size], args.recompute)
    if arm == "fp8":
        fp8.convert(model, tokens=None if args.size == "tiny" else args.batch * args.length)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in (*model.layers, model):
        fully_shard(module, mp_policy=policy)
    model.to_empty(device=device)
    if arm == "fp8" and args.reduce_amaxes:
        fp8.reduce_amaxes(model)

    generator = torch.Generator(device).manual_seed(args.seed * dist.get_world_size() + dist.get_rank())
    with torch.no_grad():
        for parameter in model.parameters():
            shard = parameter.to_local()
            if parameter.dim() > 1:
                shard.normal_(std=0.02, generator=generator)
            else:
                shard.fill_(1)  # of a norm
    return model


def train(arm: str, args: argparse.Namespace, text: Tensor, device: torch.device) -> Result:
    model = make_model(arm, args, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(args.seed * dist.get_world_size() + dist.get_rank())
    losses: list[Tensor] = []
    for step in range(args.steps):
        if step == WARM_UP:
            synchronize(device)
            began = time.perf_counter()
        starts = torch.randint(len(text) - args.length, (args.batch, 1), generator=generator)
        window = text[starts + torch.arange(args.length + 1)].to(device).long()
        logits = model(window[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), window[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    synchronize(device)
    seconds = time.perf_counter() - began

    together = torch.stack(losses)
    dist.all_reduce(together)
    tokens = (args.steps - WARM_UP) * args.batch * args.length * dist.get_world_size()
    return Result(
        losses=(together / dist.get_world_size()).tolist(),
        tokens_per_second=tokens / seconds,
        peak_gib=torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()


def results_table(results: dict[str, Result], steps: int) -> str:
    shown = sorted({0, steps // 4, steps // 2, steps - 1})
    head = ["", *(f"loss, step {step}" for step in shown), "tokens/s", "peak memory of a GPU, GiB"]
    rows = [
        [
            arm.upper(),
            *(f"{r.losses[step]:.4f}" for step in shown),
            f"{r.tokens_per_second:,.0f}",
            "—" if r.peak_gib is None else f"{r.peak_gib:.1f}",
        ]
        for arm, r in results.items()
    ]
    return markdown(head, rows) + "\n"


def header(args: argparse.Namespace, parameters: int) -> str:
    words = " ".join(sys.argv[1:])
    return f"""# FSDP2: {parameters / 1e9:.2f}B parameters, BF16 and FP8

* command: `torchrun --nproc-per-node {dist.get_world_size()} examples/fsdp.py {words}`
* GPU: {dist.get_world_size()} × {torch.cuda.get_device_name()}
* PyTorch {torch.__version__}, CUDA {torch.version.cuda}, torch_fp8 {fp8.build_info()["version"]}
* date: {datetime.date.today()}
* float32 shards, gathered in BF16, gradients reduced in float32; {args.batch} × {args.length} tokens a GPU and step,
  {args.steps} steps from one seed, the first {WARM_UP} not timed; optimizer, clipping and all-gathers are in the time
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, on_gpu = parser.add_argument, torch.cuda.is_available()
    add("--size", choices=SIZES, default="1B" if on_gpu else "tiny", help="default: tiny on a CPU, 1B on a GPU")
    add("--precision", choices=("bf16", "fp8", "both"), default="both")
    add("--steps", type=int, default=50 if on_gpu else 10, help=f"optimizer steps, more than {WARM_UP}")
    add("--batch", type=int, default=4, help="sequences a rank and step (default: 4)")
    add("--length", type=int, default=2048 if on_gpu else 32, help="tokens of a sequence")
    add("--lr", type=float, default=3e-4)
    add("--seed", type=int, default=0)
    add("--recompute", action="store_true", help="activation checkpointing of every layer")
    add("--reduce-amaxes", action="store_true", help="one set of scales for all ranks")
    add("--write", action="store_true", help="write benchmarks/results/fsdp.md; needs GPUs")
    args = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it with torchrun --nproc-per-node N examples/fsdp.py")
    if args.steps <= WARM_UP or args.batch < 1 or args.length < 1:
        parser.error(f"--steps must be more than {WARM_UP}, --batch and --length at least 1")
    if args.reduce_amaxes and args.precision == "bf16":
        parser.error(
            "--reduce-amaxes is of the FP8 arm, which --precision bf16 leaves out; give --precision fp8 or both"
        )
    if args.write and not on_gpu:
        parser.error("--write is for figures of GPUs, and there is none")
    return args


def main() -> None:
    args = parse_arguments()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    documents, _ = read_documents(None)
    text = torch.frombuffer(bytearray("\n".join(documents).encode()), dtype=torch.uint8)

    results: dict[str, Result] = {}
    for arm in ("bf16", "fp8") if args.precision == "both" else (args.precision,):
        results[arm] = train(arm, args, text, device)
        gc.collect()  # the modules' cycles would keep the memory of this arm through the next one
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    if dist.get_rank() == 0:
        shown = results_table(results, args.steps)
        if args.write:
            shown = f"{header(args, next(iter(results.values())).parameters)}\n{shown}"
            with replacing(PAGE) as temporary:
                temporary.write_text(shown)
        print(shown, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
