"""The processes of a run: one per device, started by torchrun, or a single one."""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..console import NEEDED
from .signals import follow_parent


@dataclass(frozen=True, slots=True)
class World:
    """This process among all."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which alone prints and writes."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over all processes, in place and the same on each; a CPU tensor never waits for a GPU."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def spread(self, values: Tensor) -> None:
        """Overwrite the values with those of rank 0."""
        if self.size > 1:
            dist.broadcast(values, src=0)

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, by rank, on each of them."""
        values = [value]
        if self.size > 1:
            values = [None] * self.size
            dist.all_gather_object(values, value)
        return values

    def on_each(self, action: Callable[[], Any]) -> Any:
        """Every process acts by itself; if any raises a ValueError, all raise the ValueError of the lowest rank.

        The message names that rank, unless all processes raise the same message.
        """
        result, problem = None, None
        try:
            result = action()
        except ValueError as error:
            problem = str(error)
        problems = self.gather(problem)
        for rank, text in enumerate(problems):
            if text is not None:
                raise ValueError(text if len(set(problems)) == 1 else f"rank {rank} of {self.size}: {text}")
        return result

    def agree(self, values: dict[str, Any], cure: str) -> None:
        """Refuse values that differ between the processes.

        Args:
            values: of this process, by name; the names are the same on each.
            cure: what the user can do.

        Raises:
            ValueError: on every process, with the first that differs, both values and their ranks.
        """
        first, *others = self.gather(values)
        for rank, other in enumerate(others, start=1):
            for name, value in first.items():
                if other[name] != value:
                    raise ValueError(f"{name}: {value} on rank 0, but {other[name]} on rank {rank}; {cure}")

    def on_first(self, action: Callable[[], Any]) -> Any:
        """Rank 0 acts; every process gets its result, or raises its ValueError or OSError."""
        outcome: list[Any] = [None, None]
        if self.is_first:
            try:
                outcome[0] = action()
            except (ValueError, OSError) as error:
                outcome[1] = error
        if self.size > 1:
            dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]


def launched() -> bool:
    """Whether a launcher such as torchrun started this process as one of several, or says that it did.

    RANK decides, because torch needs it. A LOCAL_RANK or LOCAL_WORLD_SIZE alone is left over from something else.
    """
    return "RANK" in os.environ


def local(name: str, alone: int) -> int:
    """LOCAL_RANK or LOCAL_WORLD_SIZE; ``alone`` where no launcher started this process."""
    return int(os.environ.get(name, alone)) if launched() else alone


def _check_environment() -> None:
    """Refuse half an environment, which would end in a message of torch's, or in all processes on one GPU.

    Raises:
        ValueError: naming the variables.
    """
    cure = "start with torchrun, or unset RANK for a single process"
    if missing := [name for name in NEEDED if name not in os.environ]:
        raise ValueError(f"the environment has RANK={os.environ['RANK']!r} but no {', '.join(missing)}; {cure}")
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE", "MASTER_PORT"):
        if not os.environ.get(name, "1").isdecimal():
            raise ValueError(f"{name}={os.environ[name]!r} in the environment must be a whole number; {cure}")
    if int(os.environ["RANK"]) >= int(os.environ["WORLD_SIZE"]):
        ranks = f"RANK={os.environ['RANK']}, WORLD_SIZE={os.environ['WORLD_SIZE']}"
        raise ValueError(f"{ranks} in the environment: ranks count from 0; {cure}")


def start(device: str) -> World:
    """Join the process group that torchrun's environment describes: nccl for CUDA tensors, gloo for the CPU's.

    Args:
        device: "auto" (CUDA if there), "cuda" or "cpu".

    Raises:
        ValueError: CUDA asked for and absent, more processes on this machine than GPUs, or half an environment.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.device=cuda, but no CUDA device is there; use run.device=cpu, or auto")
    on_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if launched():
        _check_environment()
    local_rank, local_size = local("LOCAL_RANK", alone=0), local("LOCAL_WORLD_SIZE", alone=1)
    if on_cuda:
        if max(local_size, local_rank + 1) > torch.cuda.device_count():
            raise ValueError(
                f"torchrun started {max(local_size, local_rank + 1)} processes on a machine with "
                f"{torch.cuda.device_count()} GPUs; lower --nproc-per-node"
            )
        torch.cuda.set_device(local_rank)
    where = torch.device("cuda", local_rank) if on_cuda else torch.device("cpu")
    if not launched():
        return World(rank=0, size=1, device=where)
    follow_parent(signal.SIGTERM)  # no process of a run trains on alone when torchrun is killed
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", device_id=where if on_cuda else None)
    return World(rank=dist.get_rank(), size=dist.get_world_size(), device=where)


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
