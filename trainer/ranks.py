"""The processes of a training run: one, or those that `torchrun` started, a GPU for each.

Each rank computes its share of a batch; what the shares give is added up, so the number of processes does not change
what is learnt. Only the first rank writes.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import Tensor, distributed

PATIENCE = timedelta(hours=2)  # the others wait while the first rank judges an epoch


@contextmanager
def joined() -> Iterator[None]:
    """Join the other processes of `torchrun` (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), if it started this one."""
    if "WORLD_SIZE" not in os.environ or distributed.is_initialized():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, timeout=PATIENCE)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def rank() -> int:
    """Number of this process, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world() -> int:
    """Number of processes."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def local(device: torch.device) -> torch.device:
    """This process's own GPU (LOCAL_RANK) where the device is CUDA."""
    if device.type != "cuda" or world() == 1:
        return device
    own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(own)
    return own


def wait() -> None:
    """Until every process is here."""
    if world() > 1:
        distributed.all_reduce(torch.zeros(1))  # a barrier that asks for no GPU


def from_first(value: float) -> float:
    """The first rank's value, in every process."""
    if world() == 1:
        return value
    told = torch.tensor([value], dtype=torch.float64)
    distributed.broadcast(told, src=0)
    return float(told)


def add_up(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over the processes, all in one message."""
    if world() == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    distributed.all_reduce(flat)
    start = 0
    for tensor in tensors:
        tensor.copy_(flat[start : start + tensor.numel()].view_as(tensor))
        start += tensor.numel()
