"""The processes of a run: one per device, started by torchrun, or a single one."""

import os
import sys
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class World:
    """This process among all."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Rank 0 alone prints and writes."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over all processes, in place and the same on each."""
        if self.size > 1:
            dist.all_reduce(values)
        return values


def start(device: str) -> World:
    """Join the process group that torchrun's environment describes: nccl for CUDA, gloo for the CPU.

    Args:
        device: "auto" (CUDA if there), "cuda" or "cpu".

    Raises:
        ValueError: CUDA asked for and absent, or more processes on this machine than GPUs.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.device=cuda, but no CUDA device is there; use run.device=cpu, or auto")
    on_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if on_cuda:
        if local_size > torch.cuda.device_count():
            raise ValueError(
                f"torchrun started {local_size} processes on a machine with {torch.cuda.device_count()} GPUs; "
                "lower --nproc-per-node"
            )
        torch.cuda.set_device(local_rank)
    where = torch.device("cuda", local_rank) if on_cuda else torch.device("cpu")
    if "RANK" not in os.environ:
        return World(rank=0, size=1, device=where)
    dist.init_process_group("nccl" if on_cuda else "gloo", device_id=where if on_cuda else None)
    return World(rank=dist.get_rank(), size=dist.get_world_size(), device=where)


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def fail(program: str, error: ValueError) -> NoReturn:
    """End this process with exit code 2 and one line, once per machine, whose other processes fail alike."""
    stop()
    if os.environ.get("LOCAL_RANK", "0") == "0":
        sys.stderr.write(f"{program}: error: {error}\n")
    sys.exit(2)
