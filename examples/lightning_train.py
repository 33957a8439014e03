"""Lightning: convert, and one callback. Trains a small Llama on the bytes of a text file, stops halfway and resumes:
python examples/lightning_train.py [FOLDER [TEXT]]"""

import argparse
import os
from pathlib import Path

if "LOCAL_RANK" not in os.environ:  # one GPU, of however many; torchrun starts a process for each
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]

import lightning
import torch
import torch_fp8 as fp8
from torch_fp8.integrations import lightning_callback
from transformers import LlamaConfig, LlamaForCausalLM

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", nargs="?", default="runs/lightning", help="for checkpoints (default: %(default)s)")
parser.add_argument("text", nargs="?", default=__file__, help="a file to learn (default: this one)")
args = parser.parse_args()
folder, tokens = args.folder, torch.tensor(list(Path(args.text).read_bytes())).unfold(0, 64, 16)


class Llama(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        lightning.seed_everything(0, verbose=False)
        config = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                             num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
        self.model = fp8.convert(LlamaForCausalLM(config), tokens=None)  # tokens=None: these layers are tiny

    def training_step(self, rows):
        loss = self.model(input_ids=rows, labels=rows).loss
        print(f"step {self.global_step} loss {loss.item():.3f}")
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


if __name__ == "__main__":
    for steps, resume in (10, None), (20, f"{folder}/last.ckpt"):
        trainer = lightning.Trainer(max_steps=steps, callbacks=[lightning_callback()], default_root_dir=folder,
                                    logger=False, enable_checkpointing=False, enable_progress_bar=False)  # fmt: skip
        trainer.fit(Llama(), torch.utils.data.DataLoader(tokens, batch_size=8), ckpt_path=resume)
        trainer.save_checkpoint(f"{folder}/last.ckpt")
