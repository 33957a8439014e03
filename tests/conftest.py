"""Every test body runs on every device. On a machine that promises a GPU (TORCH_FP8_REQUIRE_CUDA=1) a missing one is a
failure, not a skip."""

import gc
import glob
import os
import re
import sys
import warnings

import pytest
import torch
import torch_fp8 as fp8
from fake_cublaslt import CublasLt
from torch_fp8.checkpoints.errors import need_transformers


def _gpus_of_this_worker() -> str | None:
    """Each process of pytest-xdist has another GPU for its first one. It sees the others too, which tests of several
    ranks need; None where there is nothing to share out."""
    worker = re.fullmatch(r"gw(\d+)", os.environ.get("PYTEST_XDIST_WORKER", ""))
    here = [str(index) for index, _ in enumerate(glob.glob("/dev/nvidia[0-9]*"))]
    seen = os.environ["CUDA_VISIBLE_DEVICES"].split(",") if "CUDA_VISIBLE_DEVICES" in os.environ else here
    if worker is None or len(seen) < 2:
        return None
    first = int(worker[1]) % len(seen)
    return ",".join([*seen[first:], *seen[:first]])


if order := _gpus_of_this_worker():  # before CUDA is begun, and for the processes that tests start
    os.environ["CUDA_VISIBLE_DEVICES"] = order

_OF_TRANSFORMERS = ["architectures", "checkpoints", "experts", "expert_files", "hostile_files", "transformers"]


def pytest_ignore_collect(collection_path):
    """What reads and writes models needs a transformers that can; an older one is said once, and they are left out."""
    if collection_path.stem.removeprefix("test_") in _OF_TRANSFORMERS:
        try:
            need_transformers()
        except ImportError as error:
            warnings.warn(f"{collection_path.name} is left out: {error}", stacklevel=1)
            return True
    return None


def pytest_collection_modifyitems(items):
    """The longest test begins first: at the end one process would wait for the other one that has it."""
    items.sort(key=lambda item: item.name != "test_pip_install_of_the_sdist")


def pytest_collection_finish():
    gc.freeze()  # what was imported stays; each compilation collects garbage, and would look through all of it


def _need_cuda() -> None:
    if torch.cuda.is_available() and fp8.build_info()["cuda"]:
        return
    why = "no GPU, or a CPU-only build of torch_fp8"
    if os.environ.get("TORCH_FP8_REQUIRE_CUDA") == "1":
        pytest.fail(f"TORCH_FP8_REQUIRE_CUDA=1, but {why}")
    pytest.skip(why)


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda":
        _need_cuda()
    return torch.device(request.param)


@pytest.fixture
def cuda():
    _need_cuda()
    return torch.device("cuda")


@pytest.fixture
def cublaslt(monkeypatch):
    """A GPU for tuning that is none: the same on every machine."""
    return CublasLt(monkeypatch)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """A study's text."""
    from studying import write_tokens  # which imports the studies, as few tests need them

    return write_tokens(tmp_path_factory.mktemp("text"))


@pytest.fixture
def corpus(tokens):
    from studies.lib.corpus import read_corpus

    return read_corpus(tokens)


@pytest.fixture(autouse=True)
def _compiles_afresh(monkeypatch):
    """All tests of a process share Dynamo's count of compilations of a function, and its limit."""
    monkeypatch.setattr("torch_fp8.layers.traced._traced_training", False)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
        # Each compilation times its guards for a log, and flushes the processor's caches before.
        monkeypatch.setattr("torch._dynamo.guards.profile_guard_manager", lambda *args: 0.0, raising=False)
        if torch._dynamo.eval_frame._stance.stance != "default":
            gc.collect()  # a model that an earlier test left in a sampled step, in a cycle, keeps compiled code eager


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)
