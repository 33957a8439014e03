"""Several runs at once: each in a process of its own, ``jobs`` of them beside one another on each GPU.

Small trainings leave a GPU idle while the host prepares their next kernels; several fill one another's gaps. The text
was tokenised once and is a file. A process that loses its parent stops after its step, as it does when its time is up.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch_fp8.files import remove_leftovers
from torch_fp8.progress import bar

from examples.gpt.errors import UserError, in_words
from examples.gpt.lock import is_locked, locked

from .corpus import read_corpus, text_of
from .lines import Line, read_lines
from .progress import far, length, say_missing, words
from .runs import Run, Spec, claim, missing, open_run, plain

_BAD_INPUT, _INTERRUPTED = 2, 130

Perform = Callable[..., bool]  # (run, corpus, device, stop) and, where the study has one, the path of a checkpoint


def work(
    script: str,
    out: Path,
    specs: Mapping[str, Spec],
    tokens: Path,
    *,
    jobs: int,
    minutes: float | None,
    kept: Path | None,
    kind: type[Line],
    checkpoint: Path | None = None,
) -> int:
    """Claim the runs of ``specs`` and do what is missing of them, in their order, as ``script run FOLDER``; the exit
    code. Says what is left.
    kept: a runs.jsonl, whose lines are of ``kind``; what is done there is left out.
    checkpoint: a file or folder that the runs begin from."""
    if jobs < 1:
        raise UserError(f"--jobs must be at least 1, got {jobs}")
    if minutes is not None and not 0 < minutes < math.inf:
        raise UserError(f"--minutes must be positive and finite, got {minutes}")
    until = time.time() + 60 * minutes if minutes else None
    arguments = ["--tokens", str(tokens), "--share", str(1 / jobs), "--parent", str(os.getpid())]
    arguments += ["--until", str(until)] if until else []
    arguments += ["--checkpoint", str(checkpoint)] if checkpoint else []
    if not specs:
        raise UserError("the study is empty: give at least one model, arm, seed and constant")
    if kept is not None:
        done_before = [line.spec for line in read_lines(kept, kind) if line.result is not None]
        asked = len(specs)
        specs = {name: spec for name, spec in specs.items() if not any(_is_of(plain(spec), one) for one in done_before)}
        print(f"{asked - len(specs)} of {asked} runs are done in {kept}", flush=True)
        if not specs:
            return 0
    with locked(out):
        runs = claim(out, specs)
        left, failed, interrupted = missing(runs), [], False
        if ending := [run.name for run in left if is_locked(run.folder)]:
            print(f"waiting for processes of an interrupted call to end their step: {', '.join(ending)}", flush=True)
        on_gpu = any(run.spec["device"] == "cuda" for run in left)
        places = list(range(torch.cuda.device_count() if on_gpu else 1)) * min(jobs, len(left))
        running: dict[subprocess.Popen[bytes], tuple[Run, int]] = {}
        with bar(total=sum(length(run.spec) for run in runs), unit="step", desc=out.name) as shown:
            shown.update(done := sum(map(far, runs)))
            while left or running:
                try:
                    while left and places and not interrupted and (until is None or time.time() < until):
                        run, place = left.pop(0), places.pop(0)
                        running[_start(script, run, arguments, place)] = run, place
                    if not running:
                        break
                    time.sleep(0.2)
                    for process in [process for process in running if process.poll() is not None]:
                        run, place = running.pop(process)
                        places.append(place)
                        if process.returncode not in (0, -signal.SIGINT):  # Ctrl-C while it began is no failure
                            failed.append((run, process.returncode))
                    now = sum(map(far, runs))
                    shown.update(now - done)
                    done = now
                except KeyboardInterrupt:  # the processes had it too, and end after their step
                    interrupted = True
    print(say_missing(runs), flush=True)
    for run, code in failed:
        print(f"{run.name} {how_it_ended(code)}: {_last_words(run, code)}", file=sys.stderr)
    return _INTERRUPTED if interrupted else 1 if failed else 0


def _is_of(spec: Spec, done: Spec) -> bool:
    """Whether a run that is done is the one that is asked for: what it recorded on its way changes nothing of it, but
    where records are asked for it has to have these."""
    asked = spec.get("record", 0)
    return {**spec, "record": 0} == {**done, "record": 0} and asked in (0, done.get("record", 0))


def _start(script: str, run: Run, arguments: Sequence[str], place: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, script, "run", str(run.folder), *arguments]
    # A process that is given one GPU of several sees it as the only one.
    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": _visible(place)} if run.spec["device"] == "cuda" else {})}
    run.output.write_bytes(b"")  # what an earlier process said last is not said by this one
    with open(run.output, "ab") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)


def _visible(place: int) -> str:
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",")[place] if given else str(place)


def how_it_ended(code: int) -> str:
    """In words, by a process's exit code, which is negative of one that a signal ended."""
    if code >= 0:
        return f"failed with {code}"
    name = f" ({signal.Signals(-code).name})" if -code in set(signal.Signals) else ""
    memory = ", for which the machine's memory running out is the common cause" if -code == signal.SIGKILL else ""
    return f"was killed by signal {-code}{name}{memory}"


def _last_words(run: Run, code: int) -> str:
    """Of one that said nothing, unless a signal ended it, with the room on its disk: a full one leaves no words."""
    lines = run.output.read_text(errors="replace").strip().splitlines()
    room = f", with {shutil.disk_usage(run.folder).free:,} bytes left on the disk" if code >= 0 else ""
    return f"{lines[-1] if lines else f'it said nothing{room}'} ({run.output})"


def serve(arguments: Sequence[str], perform: Perform) -> int:
    """One run, as a process of ``work``; ``perform`` does it, and says whether it is done."""
    parser = argparse.ArgumentParser(prog="run")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--until", type=float)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--share", type=float, default=1.0, help="of the GPU's memory")
    parser.add_argument("--parent", type=int, default=os.getppid(), help="may be gone by now")
    args = parser.parse_args(arguments)
    asked: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))

    def stop() -> bool:
        return bool(asked) or os.getppid() != args.parent or (args.until is not None and time.time() >= args.until)

    run = open_run(args.folder)
    device = torch.device(run.spec["device"])
    while is_locked(run.folder):  # by a process that lost its parent, and ends after its step
        if stop():
            return _said(run, done=False)
        time.sleep(0.1)
    with locked(run.folder):
        for path in (run.checkpoint, run.log):
            remove_leftovers(path)  # of processes that were killed; one may be as large as a checkpoint
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(0.97 * args.share)
        else:
            torch.set_num_threads(1)  # sums do not depend on how many run beside one another
        corpus = read_corpus(args.tokens)
        for name, value in text_of(corpus).items():
            if run.spec.get(name) != value:
                raise UserError(f"{run.folder} is of another text, or of one split elsewhere: its {name} is "
                                f"{run.spec.get(name)}, that of {args.tokens} is {value}")  # fmt: skip
        torch.manual_seed(run.spec["seed"])
        done = run.result() is not None or perform(run, corpus, device, stop, *filter(None, [args.checkpoint]))
    return _said(run, done)


def _said(run: Run, done: bool) -> int:
    stopped = f"stopped after {words(run)}; the same command goes on from there"
    print(f"{run.name}: {'done' if done else stopped}")
    return 0


def exit_code(main: Callable[[], int]) -> int:
    """What ``main`` of a study returns; what the user can mend is said in a line, without a traceback."""
    try:
        return main()
    except UserError as error:
        complaint = str(error)
    except OSError as error:
        complaint = in_words(error, "its output")  # which is no file of ours, and may be a pipe
    except torch.OutOfMemoryError:
        complaint = "the GPU's memory does not suffice; give a smaller --micro-batch, or fewer --jobs"
    print(f"{Path(sys.argv[0]).name}: {complaint}", file=sys.stderr)
    return _BAD_INPUT
