"""accelerate: convert, and the scaling state registered beside the rest. Trains a small Llama on the bytes of a text
file, saves halfway and resumes: python examples/accelerate_train.py [FOLDER [TEXT]]"""

import argparse
from pathlib import Path

import torch
import torch_fp8 as fp8
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", nargs="?", default="runs/accelerate", help="for checkpoints (default: %(default)s)")
parser.add_argument("text", nargs="?", default=__file__, help="a file to learn (default: this one)")
args = parser.parse_args()
folder, tokens = args.folder, torch.tensor(list(Path(args.text).read_bytes())).unfold(0, 64, 16)


def start():
    torch.manual_seed(0)
    accelerator = Accelerator(mixed_precision="bf16")
    config = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    model = fp8.convert(LlamaForCausalLM(config), tokens=None)  # tokens=None: these layers are tiny
    accelerator.register_for_checkpointing(fp8.ScalingState(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return accelerator, *accelerator.prepare(model, optimizer)


if __name__ == "__main__":
    accelerator, model, optimizer = start()
    for step in range(20):
        if step == 10:
            accelerator.save_state(folder)
            accelerator, model, optimizer = start()
            accelerator.load_state(folder)
        rows = tokens[8 * step % len(tokens) :][:8].to(accelerator.device)
        loss = model(input_ids=rows, labels=rows).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step} loss {loss.item():.3f}")
