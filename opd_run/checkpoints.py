"""Writing and reading a checkpoint: no file of it can run code."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from opd_run import ranks
from opd_run.adapters import export
from opd_run.console import RunError


def save(
    folder: Path,
    student: Any,
    optimizer: torch.optim.Optimizer,
    tokenizer: Any,
    state: dict[str, int],
) -> None:
    """`model/` for `from_pretrained`, `trainer/` to resume; data and samples need no state.

    Raises:
        RunError: a weight is not finite. Nothing is written, so that older checkpoints stay.
    """
    bad = [name for names in ranks.gather(_not_finite(student)) for name in names]
    if bad:
        dtype = f" in {student.export_dtype} (--export-dtype)" if student.export_dtype else ""
        raise RunError(
            f"{len(bad)} of the student's weights are not finite{dtype}, such as {bad[0]}"
        )
    export(student, tokenizer, folder / "model")
    weights, moments = get_state_dict(student, optimizer)
    state_dict_saver.save(
        {"student": weights, "optimizer": moments} | _average(student) | state,
        checkpoint_id=folder / "trainer",
    )


def _average(student: Any) -> dict[str, Any]:
    """The weights of `--teacher ema:DECAY`; nothing without it."""
    return {"average": get_model_state_dict(student.average[0])} if student.average else {}


def _not_finite(student: Any) -> list[str]:
    """Names of the weights, or of the parts that this process has, with NaN or infinity, be it
    only in the type of the export."""
    parts = {name: ranks.part(each.detach()) for name, each in student.named_parameters()}
    dtype = student.export_dtype
    cast = (part if dtype is None else part.to(dtype) for part in parts.values())
    good = torch.stack([part.isfinite().all().cpu() for part in cast])
    return [name for name, each in zip(parts, good.tolist()) if not each]


_ALLOWED = {
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},  # its name in Python 3.13
    "torch": {"Size", "float32", "float64", "float16", "bfloat16", "int64", "int32", "bool"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}
"""What `trainer/.metadata` is made of: data, and nothing that could run code."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    """Reads the metadata without running what it says, and files of its own folder only."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _Unpickler(file).load()
        if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
            raise pickle.UnpicklingError(".metadata is not that of a checkpoint")
        for info in metadata.storage_data.values():
            if Path(info.relative_path).name != info.relative_path:
                raise pickle.UnpicklingError(f"{info.relative_path} is not in the checkpoint")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Planner(DefaultLoadPlanner):
    """Reads numbers and texts as it reads tensors: without running code."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        plain = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)


def load(
    folder: Path, student: Any, optimizer: torch.optim.Optimizer, state: dict[str, int]
) -> dict[str, int]:
    """Put weights and moments back; return the counters that were saved with them.

    What the flags decide (learning rate, betas, weight decay) is as the flags of this run have it.
    No file of the folder can run code.
    """
    flags = [
        {key: group[key] for key in group if key != "params"} for group in optimizer.param_groups
    ]
    weights, moments = get_state_dict(student, optimizer)
    saved: dict[str, Any] = {"student": weights, "optimizer": moments} | _average(student) | state
    state_dict_loader.load(saved, storage_reader=_Reader(folder / "trainer"), planner=_Planner())
    set_state_dict(
        student, optimizer, model_state_dict=saved["student"], optim_state_dict=saved["optimizer"]
    )
    for each in student.average:
        set_model_state_dict(each, saved["average"])
    for group, given in zip(optimizer.param_groups, flags):
        group.update(given)
    return {key: saved[key] for key in state}
