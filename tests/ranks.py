"""Two processes that run functions of the tests side by side, as the ranks of one process group."""

import os
import socket
import traceback

import torch
import torch.multiprocessing as mp

WORLD = 2
LIMIT = 120  # seconds; a collective that not all enter waits for ever


class Ranks:
    def __init__(self, backend):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = mp.get_context("spawn")
        pipes = [context.Pipe() for _ in range(WORLD)]
        self.device = _device(backend, 0)
        self._pipes = [ours for ours, _ in pipes]
        self._processes = [
            context.Process(target=_serve, args=(rank, port, backend, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self._processes:
            process.start()

    def __call__(self, function, *args):
        """What ``function(device, *args)`` returns on each rank."""
        for pipe in self._pipes:
            pipe.send((function, args))
        results, errors = [], []
        for rank, pipe in enumerate(self._pipes):  # all are heard, so that none answers the next call with this result
            if not pipe.poll(LIMIT):
                self.close()
                raise TimeoutError("\n".join([*errors, f"rank {rank} did not finish {function.__name__}"]))
            error, result = pipe.recv()
            results.append(result)
            if error is not None:
                errors.append(f"rank {rank}:\n{error}")
        assert not errors, "\n".join(errors)
        return results

    def close(self):
        for process in self._processes:
            process.kill()


def _device(backend, rank):
    return torch.device("cpu") if backend == "gloo" else torch.device("cuda", rank)


def _serve(rank, port, backend, pipe):
    if backend == "gloo":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # FSDP takes an accelerator that it sees
    torch.set_num_threads(1)
    device = _device(backend, rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.distributed.init_process_group(backend, f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    while True:
        function, args = pipe.recv()
        try:
            torch.manual_seed(0)
            result = None, function(device, *args)
        except BaseException:
            result = traceback.format_exc(), None
        pipe.send(result)
