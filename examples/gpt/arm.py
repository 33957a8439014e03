"""One arm: a model from one seed on the same batches as the other, in BF16 or in FP8, to the end or an interruption."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch_fp8 as fp8
from torch import Tensor, nn
from tqdm import tqdm

from models.fog import LM
from models.fog_fp8 import to_fp8 as fog_to_fp8
from models.gpt import GPT

from . import checkpoint
from .journal import Journal
from .settings import Settings, sizes_of
from .tokens import Corpus, even_starts, random_starts, windows

_WARM_UP = 10  # steps of a process that say nothing of its speed: allocator, cuBLASLt, first-use scaling
_SCALES = 100  # times in a run that the scales are logged, for their curves


@dataclass
class Progress:
    """What an arm has behind it; travels in its checkpoint."""

    step: int = 0
    seconds: float = 0.0  # everything between the first step and now
    steady_tokens: int = 0  # of the steps that count for the throughput: no warm-up, no evaluation, no saving
    steady_seconds: float = 0.0
    peak_memory: int = 0  # bytes of GPU memory


class Arm:
    """A model, its optimizer and its log, new or as the arm's checkpoint left them."""

    def __init__(self, name: str, settings: Settings, corpus: Corpus) -> None:
        self.name = name
        self.settings = settings
        self.corpus = corpus
        self.device = settings.device
        self.path = settings.out / f"{name}.ckpt"
        self.progress = Progress()
        torch.manual_seed(settings.seed)
        with self.device:  # random numbers differ between devices, not between arms
            self.model = new_model(settings, corpus.vocab)
        if name == "fp8" and isinstance(self.model, LM):
            how = {"attention": settings.attention, "shared_scale": settings.shared_scale}
            fog_to_fp8(self.model, settings.recipe, **how)
        elif name == "fp8":
            # A CPU emulates FP8: no layer is large enough to be faster there.
            emulated = self.device.type == "cpu"
            to_fp8(self.model, settings.recipe, None if emulated else settings.micro_batch * settings.context)
        self.optimizer = _optimizer(self.model, settings.lr, fused=self.device.type == "cuda")
        self.generator = torch.Generator().manual_seed(settings.seed)
        self._pending: list[tuple[int, float, Tensor]] = []  # step, learning rate, loss and gradient norm, unfetched
        # Fetching a number waits for the GPU, which then waits for the host.
        self._fetch_every = 10 if self.device.type == "cuda" else 1
        self._scales_every = max(1, settings.steps // _SCALES)
        self._shown = ""  # beside the progress bar
        if state := checkpoint.load(self.path, self._identity()):
            with checkpoint.restoring(self.path):
                self._restore(state)
            tqdm.write(f"{name}: goes on after step {self.progress.step} of {settings.steps}")
        self._restored_at = self.progress.step
        self.journal = Journal(settings.out / f"{name}.jsonl", self.progress.step)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._mark = time.perf_counter()  # when the steps began that are still pending
        self._began = self._mark - self.progress.seconds

    def train(self, interrupted: Callable[[], bool]) -> None:
        """Go on to the end, or until ``interrupted`` after some step; evaluated at the end, saved in both cases."""
        progress, settings = self.progress, self.settings
        done = self._done()
        if done and not self._evaluated():  # resumed with a time limit that has passed already
            self._evaluate()
            self._save()
        stop = done
        with tqdm(total=settings.steps, initial=progress.step, desc=self.name, unit="step", disable=None) as bar:
            while not stop:
                self._step()
                done = self._done()
                stop = done or interrupted()
                if progress.step % self._fetch_every == 0:
                    self._log_pending()
                if self.name == "fp8" and (done or progress.step % self._scales_every == 0):
                    self._log_scales()
                if done or progress.step % settings.eval_every == 0:
                    self._evaluate()
                if stop or progress.step % settings.save_every == 0:
                    self._save()
                bar.set_postfix_str(self._shown, refresh=False)
                bar.update()
        self.journal.close()

    def _done(self) -> bool:
        limit = self.settings.time_limit
        out_of_time = limit is not None and time.perf_counter() - self._began >= limit
        return self.progress.step >= self.settings.steps or out_of_time

    def _evaluated(self) -> bool:
        return any("val_loss" in record and record["step"] == self.progress.step for record in self.journal.records)

    def _step(self) -> None:
        settings, context = self.settings, self.settings.context
        count = settings.batch_tokens // context
        starts = random_starts(self.corpus.train, count, context, self.generator)
        inputs, targets = windows(self.corpus.train, starts, context, self.device)
        lr = _learning_rate(self.progress.step, settings)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        total = torch.zeros((), device=self.device)
        for x, y in zip(inputs.split(settings.micro_batch), targets.split(settings.micro_batch)):
            loss = self._loss(x, y) * (len(x) / count)
            loss.backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.progress.step += 1
        self._pending.append((self.progress.step, lr, torch.stack([total, norm])))

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16):
            return self.model(inputs, targets)

    def _log_pending(self) -> None:
        """Fetch the losses, which waits for the device, and log them; their times are spread evenly."""
        if not self._pending:
            return
        numbers = torch.stack([pair for _, _, pair in self._pending]).tolist()
        elapsed = time.perf_counter() - self._mark
        tokens = len(numbers) * self.settings.batch_tokens
        for i, ((step, lr, _), (loss, norm)) in enumerate(zip(self._pending, numbers)):
            seconds = self._mark - self._began + elapsed * (i + 1) / len(numbers)
            so_far = step * self.settings.batch_tokens
            self.journal.write(step=step, loss=loss, lr=lr, grad_norm=norm, tokens=so_far, seconds=round(seconds, 4))
        if self._pending[0][0] > self._restored_at + _WARM_UP:
            self.progress.steady_tokens += tokens
            self.progress.steady_seconds += elapsed
        self._shown = f"loss {loss:.3f}, lr {lr:.1e}, {tokens / elapsed:,.0f} tokens/s"
        self._pending.clear()
        self._mark += elapsed

    def _log_scales(self) -> None:
        self._log_pending()
        scales = {row.name: row.scales for row in fp8.summary(self.model) if row.fp8}
        self.journal.write(step=self.progress.step, scales=scales)
        self._mark = time.perf_counter()

    @torch.no_grad()
    def _evaluate(self) -> None:
        self._log_pending()
        settings, step = self.settings, self.progress.step
        starts = even_starts(self.corpus.val, settings.eval_batches * settings.micro_batch, settings.context)
        self.model.eval()
        losses = [
            self._loss(*windows(self.corpus.val, part, settings.context, self.device))
            for part in starts.split(settings.micro_batch)
        ]
        self.model.train()
        val_loss = torch.stack(losses).mean().item()
        self.journal.write(step=step, val_loss=val_loss)
        tqdm.write(f"{self.name}: step {step} of {settings.steps}, validation loss {val_loss:.4f}")
        self._mark = time.perf_counter()

    def _identity(self) -> dict[str, str | int | float]:
        return self.settings.identity(self.name, self.corpus.fingerprint)

    def _save(self) -> None:
        self._log_pending()
        progress, cuda = self.progress, self.device.type == "cuda"
        progress.seconds = time.perf_counter() - self._began
        if cuda:
            progress.peak_memory = max(progress.peak_memory, torch.cuda.max_memory_allocated(self.device))
        state = {
            "identity": self._identity(),
            "progress": asdict(progress),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "fp8": fp8.state_dict(self.model),
            "rng": {
                "cpu": torch.get_rng_state(),
                "cuda": [torch.cuda.get_rng_state(self.device)] if cuda else [],
                "data": self.generator.get_state(),
            },
        }
        self.journal.sync()
        checkpoint.save(self.path, state)
        self._mark = time.perf_counter()

    def _restore(self, state: checkpoint.State) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        fp8.load_state_dict(self.model, state["fp8"])
        torch.set_rng_state(state["rng"]["cpu"])
        for rng in state["rng"]["cuda"]:
            torch.cuda.set_rng_state(rng, self.device)
        self.generator.set_state(state["rng"]["data"])
        self.progress = Progress(**state["progress"])


def new_model(settings: Settings, vocab: int) -> nn.Module:
    shape = sizes_of(settings.model)[settings.size].shape
    if settings.model == "gpt":
        return GPT(shape, vocab=vocab, context=settings.context)
    return LM(settings.model, shape, vocab=vocab)


def to_fp8(model: nn.Module, recipe: fp8.Recipe, tokens: int | None) -> None:
    """Convert the layers that FP8 makes faster at so many tokens; where it makes none faster, all of them, so that the
    losses can be compared all the same."""
    try:
        fp8.convert(model, recipe, tokens=tokens)
    except ValueError:
        fp8.convert(model, recipe, tokens=None)
    rows = fp8.summary(model)
    tqdm.write(f"fp8: {sum(row.fp8 for row in rows)} of {len(rows)} linear layers are in FP8")


def _optimizer(model: nn.Module, lr: float, *, fused: bool) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=fused)


def _learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up, then a cosine down to a tenth; with a cooldown a stable phase, then 1 - sqrt of what of the
    cooldown is done (arXiv 2405.18392)."""
    warm_up, cooldown = settings.warm_up, settings.cooldown
    if step < warm_up:
        return settings.lr * (step + 1) / warm_up
    if cooldown is not None:
        into = step - (settings.steps - cooldown)
        return settings.lr * (1 - math.sqrt(max(0, into) / max(1, cooldown)))
    done = (step - warm_up) / max(1, settings.steps - warm_up)
    return settings.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))
