"""What was seen where a loss in FP8 left that of BF16: written from the data by rules, so that it holds for any."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from torch_fp8.table import markdown

from .divergence import FIRST, WINDOW, Loss
from .fog_figures import ARMS, architecture_name, millions
from .fog_results import LAST, Line, Outcome

JUMP = 10.0  # times the median of its last WINDOW steps: a gradient norm that is larger has jumped
BEFORE, AFTER, EVERY, ROWS = 10, 15, 5, 12  # steps of a table around those that left; about so many rows

# What the paper's arm has, and the arms that do without it.
SUSPECTS = {
    "a cold start": ("warm", "default"),
    "one scale for q, k and v": ("separate", "default"),
    "amaxes of 1024 steps": ("history16",),
    "gradients within attention in E5M2": ("e4m3",),
    "attention's backward in FP8": ("forward", "fp8"),
    "attention in FP8": ("fp8",),
}


def seen(found: Sequence[Outcome]) -> list[str]:
    """Markdown, a part for each pair in which some run in FP8 left BF16."""
    pairs = dict.fromkeys(one.line.pair for one in found if one.left and one.line.arm != "bf16-again")
    parts = []
    for pair in pairs:
        of = sorted((one for one in found if one.line.pair == pair), key=lambda one: list(ARMS).index(one.line.arm))
        line, reference = of[0].line, of[0].reference
        size, _, tokens = line.setting
        name = architecture_name(line.architecture).replace("\n", " ")
        title = f"### What was seen: {name}, {size}, learning rate {line.spec['lr']:g}, seed {line.spec['seed']}"
        start = (
            f"The learning rate is {line.spec['rate']:g} times the usual one, the warm-up {line.spec['warm_up']} steps "
            f"long, a step has {millions(tokens)} tokens. BF16 itself, {_so_far(reference)}, ends at {_end(reference)}"
            f"{_usual(reference, found)} (mean of its last {LAST} steps)."
        )
        parts += [title, start, "\n".join(f"* {_of_arm(one)}" for one in of), " ".join(_suspects(of)), _table(of)]
    return parts


def _so_far(line: Line) -> str:
    return f"{line.step} steps" if line.result else f"{line.step} of {line.spec['steps']} steps so far"


def _end(line: Line) -> str:
    last = line.losses[-LAST:]
    return "no finite loss" if None in last else f"{statistics.fmean(loss for loss in last if loss is not None):.3f}"


def _usual(reference: Line, found: Sequence[Outcome]) -> str:
    """Where it ends at the usual rate, if this is another one."""
    wanted = {**reference.spec, "rate": 1, "lr": None}
    for one in found:
        other = one.reference
        if {**other.spec, "lr": None} == wanted and reference.spec["rate"] != 1:
            return f"; at the usual rate, {_so_far(other)}, at {_end(other)}"
    return ""


def jump(grad_norms: Sequence[Loss]) -> int | None:
    """The step, from 1, at which a gradient norm is not finite, or JUMP times as large as its median before; not among
    the FIRST."""
    for i in range(FIRST, len(grad_norms)):
        norm, before = grad_norms[i], [n for n in grad_norms[max(0, i - WINDOW) : i] if n is not None]
        if norm is None or (before and norm > JUMP * statistics.median(before)):
            return i + 1
    return None


def _of_arm(one: Outcome) -> str:
    name, line, tokens = ARMS[one.line.arm], one.line, one.line.setting[2]
    if not one.left:
        return f"**{name}** does not leave BF16 by step {one.seen}{'' if line.result else ', where it is so far'}."
    said = f"**{name}** leaves BF16 at step {one.left}, after {millions(one.left * tokens)} tokens"
    jumped = jump(line.grad_norms)
    if jumped and jumped <= one.left:
        said += f"; its gradient norm, before clipping, has jumped at step {jumped}"
    sampled = [i for i, step in enumerate(line.samples) if step < one.left]
    if sampled and (step := line.samples[sampled[-1]]) in one.reference.samples:
        mine, theirs = (_largest(of, step) for of in (line, one.reference))
        said += f"; its kurtosis of q, k and v is {mine} at step {step}, BF16's {theirs}"
    if line.lost:
        said += f"; its loss is not finite from step {line.losses.index(None) + 1} on"
    else:
        theirs_then = one.reference.losses[one.seen - 1]
        said += f"; at step {one.seen} its loss is {_number(line.losses[one.seen - 1])}, BF16's {_number(theirs_then)}"
        said += "" if line.result else ", as far as it is"
    return said + "."


def _number(loss: Loss) -> str:
    return "lost" if loss is None else f"{loss:.2f}"


def _largest(line: Line, step: int) -> str:
    values = [v for v in line.kurtosis.get("qkv", [])[line.samples.index(step)] if v is not None]
    return f"{max(values):.3g}" if values else "not finite"


def _suspects(of: Sequence[Outcome]) -> list[str]:
    """What it needs and what not, as far as arms tell; of one pair."""
    first = max(one.left for one in of if one.left and one.line.arm != "bf16-again")
    by_arm = {one.line.arm: one for one in of}
    again = by_arm.get("bf16-again")
    said = [
        "BF16 was not run again so far: the order of sums alone may do this."
        if again is None or not (again.left or again.holds_to(first))
        else "The order of sums alone does this too: BF16 leaves itself."
        if again.left
        else "BF16 does not leave itself: the order of sums alone does not do this."
    ]
    left = {arm for arm, one in by_arm.items() if one.left}
    held = [arm for arm, one in by_arm.items() if arm not in ("bf16", "bf16-again") and one.holds_to(first)]
    innocent = [what for what, arms in SUSPECTS.items() if left & set(arms)]
    open_ = [what for what, arms in SUSPECTS.items() if what not in innocent and not set(held) & set(arms)]
    if innocent:
        said.append(f"Not needed for it: {', '.join(innocent)}; a run without leaves too.")
    if held:
        said.append(f"It does not happen with: {', '.join(ARMS[arm] for arm in held)}.")
    if open_:
        said.append(f"No run has tried yet to do without: {', '.join(open_)}.")
    return said


def _table(of: Sequence[Outcome]) -> str:
    """Losses, and gradient norms in brackets, around the steps at which runs left."""
    left = [one.left for one in of if one.left]
    low, high = max(1, min(left) - BEFORE), max(left) + AFTER
    every = EVERY * max(1, round((high - low) / EVERY / ROWS))
    steps = [step for step in range(every, high + every, every) if low <= step <= high]
    columns = {ARMS["bf16"]: of[0].reference, **{ARMS[one.line.arm]: one.line for one in of}}
    rows = [[step, *(_cell(line, step) for line in columns.values())] for step in steps]
    return f"Loss, and in brackets gradient norm:\n\n{markdown(['step', *columns], rows)}"


def _cell(line: Line, step: int) -> str:
    if step > len(line.losses):
        return "lost" if line.lost else ""
    if line.losses[step - 1] is None:
        return "lost"
    norm = line.grad_norms[step - 1]
    return f"{line.losses[step - 1]:.2f} ({'not finite' if norm is None else f'{norm:.2g}'})"
