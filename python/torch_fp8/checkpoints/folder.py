"""What lies in a checkpoint's folder: its config, its tensors, and the files beside them. Reading and writing."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import progress
from ..files import StrPath, as_path, new_folder
from .config import read as read_json
from .config import text as json_text
from .errors import CheckpointError
from .scheme import Scheme
from .scheme import read as read_scheme
from .shard import Entry, Item, read_header
from .shard import write as write_shard

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"

# Weights in any form, and what a config of ours replaces.
_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".index.json")
_REPLACED = {CONFIG, "hf_quant_config.json", "quantize_config.json"}


class Folder:
    """A checkpoint that was opened: ``config``, the object in config.json, and ``entries``, its tensors by name. All
    headers have been checked, no tensor has been read. Raises CheckpointError."""

    def __init__(self, path: StrPath) -> None:
        self.path = as_path(path)
        if not self.path.is_dir():
            raise CheckpointError(self.path, "is no folder")
        self.config = read_json(self.file(CONFIG))
        self.entries: dict[str, Entry] = {}
        if self.has(SINGLE):
            self.entries = read_header(self.file(SINGLE))
        elif self.has(INDEX):
            self._read_shards()
        else:
            raise CheckpointError(self.path, f"has neither {SINGLE} nor {INDEX}; other weights are not read")

    def has(self, name: str) -> bool:
        return os.path.lexists(self.path / name)

    def file(self, name: str) -> Path:
        """The path of a regular file of this folder. Not of one elsewhere, be it by a name or by a link; only the blobs
        that a download cache links its snapshots to belong to the folder too."""
        path = self.path / name
        if not name or name != os.path.basename(name) or name in (".", "..") or "\\" in name or "\0" in name:
            raise CheckpointError(self.path, f"names the file {name[:200]!r}, which is not in it")
        home = self.path.resolve()
        if home.parent.name == "snapshots":
            home = home.parent.parent
        try:
            resolved = path.resolve(strict=True)
            mode = resolved.stat().st_mode
        except (OSError, RuntimeError) as error:
            raise CheckpointError(path, "does not exist, or is a link to nothing") from error
        if not resolved.is_relative_to(home):
            raise CheckpointError(path, "is a link that leaves the folder")
        if not stat.S_ISREG(mode):
            raise CheckpointError(path, "is no regular file")
        return path

    def others(self) -> list[Path]:
        """The files beside config and weights: of the tokenizer, of generation, the licence..."""
        names = sorted(entry.name for entry in os.scandir(self.path) if not entry.is_dir())
        return [self.file(n) for n in names if not n.lower().endswith(_NOT_COPIED) and n not in _REPLACED]

    def scheme(self) -> Scheme | None:
        """How it is quantised; None where it is not."""
        name = "hf_quant_config.json"
        separate = read_json(self.file(name)) if self.has(name) else None
        return read_scheme(self.config, separate, self.path / CONFIG)

    def generation_config(self) -> Any:
        from transformers import GenerationConfig

        path = self.file("generation_config.json")
        try:
            return GenerationConfig.from_dict(read_json(path))
        except CheckpointError:
            raise
        except Exception as error:  # whatever transformers raises for values that nobody has checked
            raise CheckpointError(path, f"holds no generation config: {error}") from error

    def _read_shards(self) -> None:
        index = self.file(INDEX)
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
            raise CheckpointError(index, "must have a weight_map of tensor names to file names")
        for name in sorted(set(names.values())):
            if not name.endswith(".safetensors"):
                raise CheckpointError(index, f"names the file {name[:200]!r}, which is no safetensors file")
            for tensor, entry in read_header(self.file(name)).items():
                if names.get(tensor) != name:
                    raise CheckpointError(entry.path, f"has {tensor[:200]}, which {INDEX} does not place there")
                self.entries[tensor] = entry
        for tensor, name in names.items():
            if tensor not in self.entries:
                raise CheckpointError(index, f"places {tensor[:200]} in {name}, which does not have it")


def write(
    path: StrPath,
    config: dict[str, Any],
    groups: Sequence[Sequence[Item]],
    others: Sequence[Path] = (),
    texts: dict[str, str] | None = None,
    max_shard_size: int = 5 * 10**9,
) -> None:
    """Write a checkpoint under a name that does not exist yet, or not at all.

    groups: of tensors that must stand in one file, the first of a group made first. others: files to copy. texts: files
    to write. Raises FileExistsError.
    """
    if max_shard_size < 1:
        raise ValueError(f"torch_fp8: max_shard_size must be a positive number of bytes, got {max_shard_size}")
    counts = Counter(item.name for group in groups for item in group)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise ValueError(f"torch_fp8: {twice[0]} would be written twice; the checkpoint had a tensor of that name too")
    shards = _shards(groups, max_shard_size)
    total = sum(item.nbytes for shard in shards for item in shard)
    names = [SINGLE]
    if len(shards) > 1:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    with new_folder(path) as folder:
        for other in others:
            shutil.copyfile(other, folder / other.name)
        for name, text in (texts or {}).items():
            (folder / name).write_text(text)
        (folder / CONFIG).write_text(json_text(config))
        with progress.bar(total=total, desc=f"write {Path(path).name}", unit="B", unit_scale=True) as bar:
            for name, shard in zip(names, shards):
                write_shard(folder / name, shard, bar.update)
        if len(shards) > 1:
            where = {item.name: name for name, shard in zip(names, shards) for item in shard}
            index = {"metadata": {"total_size": total}, "weight_map": where}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        Folder(folder)  # what cannot be read again is not left behind


def _shards(groups: Sequence[Sequence[Item]], max_shard_size: int) -> list[list[Item]]:
    shards: list[list[Item]] = [[]]
    size = 0
    for group in groups:
        nbytes = sum(item.nbytes for item in group)
        if shards[-1] and size + nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1] += group
        size += nbytes
    return shards
