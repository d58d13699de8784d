"""Several processes that train one model: started by `torchrun`, they act as one.

Every process (a *rank*) holds the whole batch of rollouts and does a share of the work on it: it
samples, verifies and scores some, and the results are gathered, so that all that follows sees what
a single process would see. Nothing here can change a number: which rows a rank takes does not enter
any formula. With one process every function here returns what it was given.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pickle
import re
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from opd_run.console import RunError
from opd_run.console import rank as rank

Value = TypeVar("Value")
at_end: list[Callable[[], None]] = []
"""What else has joined the processes, and leaves before they part."""


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def check(args: argparse.Namespace) -> list[str]:
    """What is wrong with the flags of several processes."""
    errors = []
    if "RANK" in os.environ:
        found = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        errors += [
            f"{name}={text:.20}: torchrun sets a number; unset RANK to train in one process"
            for name, text in found.items()
            if not text.isdecimal() or len(text) > 9
        ]
        if not errors and int(found["RANK"]) >= int(found["WORLD_SIZE"]):
            errors.append("RANK={RANK} is not below WORLD_SIZE={WORLD_SIZE}".format(**found))
    if args.shard_frozen and args.shard != "fsdp":
        errors.append("--shard-frozen: needs --shard fsdp")
    if args.shard_frozen and args.teacher_device != "same":
        errors.append("--shard-frozen: sharded models are on --device; leave --teacher-device out")
    if args.shard_frozen and args.teacher_offload:
        errors.append("--teacher-offload: models of --shard-frozen stay on their devices")
    if "RANK" in os.environ and ":" in args.device + args.teacher_device:
        errors.append("--device, --teacher-device: torchrun gives each process a device; no number")
    return errors


def start(args: argparse.Namespace) -> None:
    """Join the processes that `torchrun` started (its environment says where); else do nothing.

    Gloo moves what is on the CPU, NCCL the rest. A process that waits longer than
    `--rank-timeout-s` for the others gives up.

    Raises:
        RunError: `--shard fsdp`, and `torchrun` did not start this process; or its environment does
            not say where the others are.
    """
    if "RANK" not in os.environ:
        if args.shard == "fsdp":
            raise RunError("--shard fsdp: start with torchrun --nproc-per-node N methods/...", 2)
        return
    cuda = args.device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(args.device)
    limit = timedelta(seconds=args.rank_timeout_s)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=limit)
    except ValueError as error:
        raise RunError(f"MASTER_ADDR, MASTER_PORT: torchrun sets them: {error}", 2) from error


def end() -> None:
    """Leave in good order."""
    while at_end:
        at_end.pop()()
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def lost(error: BaseException) -> bool:
    """Whether `error` is what a process sees when another one has died or hangs."""
    text = r"gloo|nccl|TCPStore|[Cc]onnection (closed|reset|refused)|Broken pipe|store.*timeout"
    return world() > 1 and bool(re.search(text, f"{type(error).__name__}: {error}"))


# ---------------------------------------------------------------------------- shares and sums
def share(num: int) -> slice:
    """The rows, of `num`, that this process works on: together the ranks have all, in order."""
    return slice(num * rank() // world(), num * (rank() + 1) // world())


def gather(value: Value) -> list[Value]:
    """The `value` of every rank, in order of rank. Tensors in it have to be on the CPU."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def total(value: float) -> float:
    """The sum of `value` over all ranks: the same bits on each."""
    return value if world() == 1 else sum(gather(value))


def cat(values: Tensor) -> Tensor:
    """The rows of all ranks."""
    if world() == 1:
        return values
    return torch.cat(gather(values.cpu())).to(values.device)


def first(function: Callable[..., Value], *args: Any) -> Value:
    """`function(*args)`, called by rank 0 alone; its result, or its error, on every rank (then the
    error is `everywhere`)."""
    if world() == 1:
        return function(*args)
    found: list[Any] = [None, None]
    if rank() == 0:
        try:
            found[0] = function(*args)
        except Exception as error:
            found[1] = _portable(error)
    dist.broadcast_object_list(found, src=0)
    if found[1] is not None:
        found[1].said, found[1].everywhere = rank() != 0, True  # rank 0's line is enough
        raise found[1]
    result: Value = found[0]
    return result


def together(error: Exception | None) -> None:
    """Raise on every rank what any of them ran into; to be called by all of them."""
    found = [each for each in gather(error and _portable(error)) if each is not None]
    if error is not None:
        raise error
    if found:
        found[0].said = True  # type: ignore[attr-defined]  # by the rank that had it
        raise found[0]


def _portable(error: Exception) -> Exception:
    """An exception that pickle can carry to other ranks."""
    try:
        copy = pickle.loads(pickle.dumps(error))
        return error if type(copy) is type(error) else RuntimeError(str(error))
    except Exception:  # what pickle meets in another library's exception is not known
        return RuntimeError(f"{type(error).__name__}: {error}")


def sum_gradients(model: torch.nn.Module) -> None:
    """Add up the gradients of all ranks. Sharded weights have theirs summed in the backward."""
    if world() == 1:
        return
    waiting = []
    for weight in model.parameters():
        if weight.requires_grad and not isinstance(weight, DTensor):
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            waiting.append(dist.all_reduce(weight.grad, async_op=True))
    for each in waiting:
        each.wait()


# ------------------------------------------------------------------------------------ sharding
def whole(value: Tensor) -> Tensor:
    """A sharded tensor put together (every rank has to ask); any other as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def part(value: Tensor) -> Tensor:
    """What this process has of a sharded tensor; any other as it is."""
    return value.to_local() if isinstance(value, DTensor) else value


def sharded(model: torch.nn.Module) -> bool:
    """Whether each rank keeps only a part of the weights."""
    return any(isinstance(weight, DTensor) for weight in model.parameters())


def shard(model: Any, args: argparse.Namespace) -> None:
    """FSDP2: every rank keeps a part of each block's weights, and has it whole while it computes.

    Gradients are summed, not averaged: the loss is already divided by the tokens of all ranks. In
    bfloat16, weights travel as such and gradients are reduced in float32; inputs are left alone.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(torch.device(args.device).type, (world(),))
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if model.compute_dtype != torch.float32:
        policy = MixedPrecisionPolicy(model.compute_dtype, torch.float32, cast_forward_inputs=False)
    names = set(getattr(model.lm, "_no_split_modules", None) or ())
    blocks = [each for each in model.lm.modules() if type(each).__name__ in names]
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other


@contextlib.contextmanager
def unsharded(model: Any) -> Iterator[None]:
    """All weights whole and on the device for the block, so that ranks need not keep step in it.

    Not those of a model that an engine computes for.
    """
    from torch.distributed.fsdp import FSDPModule

    modules = () if model.engine else model.modules()
    parts = [each for each in modules if isinstance(each, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        with model.present():
            yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()
