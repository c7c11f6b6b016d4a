"""What a run will need and do, looked at before its first update; the impossible is refused here, not after a day."""

import contextlib
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import rng
from .checkpoint import Folder
from .engine import Training, forward_loss
from .images import Batch

GIB = 2**30


def kernels(model: nn.Module, img_size: int | tuple[int, int]) -> list[str]:
    """One line per stage of a model with global kernels: tokens at that image size against taps. Others have none."""
    table = getattr(model, "kernel_table", None)
    return [] if table is None else [f"stage {i + 1}: {row}" for i, row in enumerate(table(img_size))]


def class_counts(dataset: Any) -> str:
    """How many images the classes have, for datasets that can tell without opening them."""
    source: Any = getattr(dataset, "source", None)
    targets = getattr(source, "targets", None)
    if targets is None and hasattr(getattr(source, "reader", None), "samples"):
        targets = [sample[1] for sample in source.reader.samples]
    if targets is None:
        return "images per class unknown"
    counts = Counter(int(target) for target in targets)
    fewest, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    return f"{counts[fewest]} (class {fewest}) to {counts[most]} (class {most}) images per class"


def checkpoint_bytes(t: Training) -> int:
    """Weights, their average, and AdamW's two averages of the gradient."""
    weights = sum(value.numel() * value.element_size() for value in t.model.state_dict().values())
    parameters = sum(p.numel() * p.element_size() for p in t.model.parameters() if p.requires_grad)
    return weights * (2 if t.ema is not None else 1) + 2 * parameters


def disk(out: Path, size: int, keep: int) -> str:
    """Free space against the checkpoints that a run keeps at a time: the newest, the best, and one being written.

    Raises:
        ValueError: it does not suffice for them.
    """
    folder = next(path for path in [out.absolute(), *out.absolute().parents] if path.exists())
    free = shutil.disk_usage(folder).free
    missing = max(1, keep + 2 - len(Folder(out).files()))
    if free < missing * size:
        raise ValueError(
            f"out={str(out)!r} has {free / GIB:.2f} GiB free, but {missing} more checkpoints of {size / GIB:.2f} GiB "
            "need to fit; make room, lower save.keep, or name another disk"
        )
    return f"{size / GIB:.3f} GiB a checkpoint, {keep + 2} at most at a time; {free / GIB:.1f} GiB free in {out}"


def rehearse(t: Training, channels_size: tuple[int, int, int]) -> str:
    """One forward and backward of noise, after which model and random numbers are as before; the memory it takes.

    On CUDA with the whole batch of a device, and measured. On the CPU with two images, to be quick: what backward
    keeps for them is scaled to the batch, and weights, gradients, AdamW's averages and the EMA are added.

    Raises:
        ValueError: out of memory, or more than the machine has.
    """
    device, whole = t.world.device, t.config.optim.batch_per_device
    size = whole if device.type == "cuda" else min(2, whole)
    targets = torch.zeros(size, dtype=torch.int64)
    batch = Batch(torch.randn(size, *channels_size), targets, targets, targets)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    counting = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with _untouched(t):
        try:
            with contextlib.nullcontext() if device.type == "cuda" else counting:
                loss = forward_loss(t, t.model.forward, batch)  # not compiled: the first update will be
            loss.backward()
        except torch.OutOfMemoryError as error:
            raise ValueError(_too_much(t, f"{torch.cuda.get_device_name(device)}'s memory")) from error
        finally:
            t.optimizer.zero_grad(set_to_none=True)
    weights = sum(p.numel() * p.element_size() for p in t.model.parameters())
    if device.type == "cuda":
        total = torch.cuda.mem_get_info(device)[1]
        need = torch.cuda.max_memory_allocated(device) + 2 * weights  # AdamW's averages come with its first step
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        own = {p.untyped_storage().data_ptr() for p in t.model.parameters()}
        activations = sum(count for place, count in kept.items() if place not in own) * whole // size
        need = weights * (4 if t.ema is None else 5) + activations
    if need > total:
        raise ValueError(_too_much(t, f"the {total / GIB:.1f} GiB of a {device.type} process: about {need / GIB:.1f}"))
    return f"about {need / GIB:.2f} GiB of the {total / GIB:.1f} GiB of a {device.type} process, loader workers apart"


def _too_much(t: Training, memory: str) -> str:
    return (
        f"optim.batch_per_device={t.config.optim.batch_per_device} does not fit into {memory}; lower it (accumulation "
        "makes up for it), or set model.grad_checkpointing=true"
    )


@contextlib.contextmanager
def _untouched(t: Training) -> Iterator[None]:
    """Put random numbers and buffers (running means of other models) back as they were."""
    drawn = rng.state(t.world.device)
    buffers = {name: buffer.clone() for name, buffer in t.model.named_buffers()}
    t.model.train()
    try:
        yield
    finally:
        rng.restore(drawn, t.world.device)
        for name, buffer in t.model.named_buffers():
            buffer.copy_(buffers[name])
