"""Hugging Face Trainer: convert, and one callback. Trains a small Llama on the bytes of a text file, stops halfway and
resumes: python examples/trainer.py [FOLDER [TEXT]]"""

import argparse
import os
from pathlib import Path

if "LOCAL_RANK" not in os.environ:  # one GPU, of however many; torchrun starts a process for each
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]

import torch
import torch_fp8 as fp8
from torch_fp8.integrations import trainer_callback
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", nargs="?", default="runs/trainer", help="for checkpoints (default: %(default)s)")
parser.add_argument("text", nargs="?", default=__file__, help="a file to learn (default: this one)")
args = parser.parse_args()
folder, tokens = args.folder, torch.tensor(list(Path(args.text).read_bytes())).unfold(0, 64, 16)
data = [{"input_ids": row, "labels": row} for row in tokens]


def trainer(steps: int) -> Trainer:
    set_seed(0)
    config = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    model = fp8.convert(LlamaForCausalLM(config), tokens=None)  # tokens=None: these layers are tiny
    arguments = TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=8, learning_rate=1e-2, lr_scheduler_type="constant",
        logging_steps=1, save_steps=10, report_to=[], disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=data, callbacks=[trainer_callback()])


if __name__ == "__main__":
    trainer(steps=10).train()
    resumed = trainer(steps=20)
    resumed.train(resume_from_checkpoint=True)
    losses = [row["loss"] for row in resumed.state.log_history if "loss" in row]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
