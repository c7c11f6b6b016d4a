"""What a run will do and need, told before its first update; what cannot work is refused here, not after a day."""

import contextlib
import itertools
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

from ..errors import one_line, shortened
from . import distributed, rng
from .data import Split, class_names
from .engine import Training, forward_loss
from .image_folders import counted
from .images import Batch, Images, collate
from .optim import updates_per_epoch
from .run_folder import COPY, SYMBOLIC, RunFolder, kind_of_links
from .sequences.named import Sequences

_logger = logging.getLogger(__name__)

GIB = 2**30
STAND_INS = ("last.pth", "best.pth")


def look_ahead(t: Training, train: Split, val: Split) -> None:
    """Log what the run will be, and what it needs, before its first update.

    Raises:
        ValueError: memory or disk will not suffice.
    """
    config, world = t.config, t.world
    size = to_2tuple(config.data.img_size)
    parameters = sum(p.numel() for p in t.model.parameters()) / 1e6
    batch = (config.optim.global_batch, config.optim.batch_per_device, world.size, world.device.type)
    updates = updates_per_epoch(len(train), config.optim.global_batch)
    memory = rehearse(t, (3, *size))
    room = disk(Path(config.out), checkpoint_bytes(t), config.save.keep)
    names = ": " + shortened(class_names(train.class_to_idx)) if train.class_to_idx else ""
    for line in (
        f"{config.model.name}: {parameters:.1f}M parameters, {config.model.num_classes} classes{names}",
        f"{len(train)} training and {len(val)} validation {train.dataset.noun}s, "
        + class_counts(train.dataset, train.class_to_idx),
        *unread(train=train, val=val),
        "global batch {} = {} per device x {} {} x {} accumulation; ".format(*batch, t.accumulation)
        + f"{updates} updates per epoch, {len(t.learning_rates)} in all; {config.run.precision}",
        f"learning rate: peak {config.optim.lr:.4g} after {config.optim.warmup_epochs * updates} updates of "
        f"warm-up, {t.learning_rates[-1]:.4g} at the end"
        + (f"; optim.lr_scale multiplies it: {config.optim.lr_scale}" if config.optim.lr_scale else ""),
        *kernels(t.model, size),
        f"memory: {memory}",
        f"disk: {room}",
    ):
        _logger.info("%s", line)


def kernels(model: nn.Module, img_size: int | tuple[int, int]) -> list[str]:
    """One line for each stage of a model with global kernels: its tokens at that image size, and its taps.

    A block with a global kernel has the layer as ``sgconv``; a model without such blocks gives no line, and one for
    sequences a line for all of them.
    """
    height, width = to_2tuple(img_size)
    layers: dict[str, Any] = {}  # of the first block of each stage
    for name, module in model.named_modules():
        if hasattr(module, "sgconv") and not hasattr(module.sgconv, "input_size"):
            directions, scales, _, taps = module.sgconv.weight.shape
            tokens = f"{module.sgconv.length} tokens"
            return [f"kernels for {tokens} in {directions} directions, {scales} scales of {taps} taps"]
        if hasattr(module, "sgconv"):
            layers.setdefault(name.partition(".blocks.")[0], module.sgconv)
    lines = []
    for i, layer in enumerate(layers.values()):
        stride = 4 * 2**i  # ConvNeXt's, from pixels to the tokens of a stage
        rows, columns = height // stride, width // stride
        built = "x".join(map(str, layer.input_size))
        directions, scales, _, taps = layer.weight.shape
        lines.append(
            f"stage {i + 1}: {rows * columns} tokens ({rows}x{columns}); kernels for {built} in {directions} "
            f"directions, {scales} scales of {taps} taps"
        )
    return lines


def class_counts(dataset: Any, class_to_idx: dict[str, int] | None = None) -> str:
    """How many images the classes have, by name, for datasets that can tell without opening them."""
    targets = dataset.targets() if isinstance(dataset, Images | Sequences) else None
    if targets is None:
        return f"{dataset.noun}s per class unknown"
    names = class_names(class_to_idx or {})
    counts = Counter({number: 0 for number, name in enumerate(names) if name})
    counts.update(targets)
    fewest, most = (
        f"{counts[number]} ({names[number] if number < len(names) else f'class {number}'})"
        for number in (min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__))
    )
    return f"{fewest} to {most} {dataset.noun}s per class"


def unread(**splits: Split) -> list[str]:
    """One line for every split with files that are not read; the keywords are the names of the splits."""
    return [
        f"not read in data.{name}_split, for they are no images by their names: {counted(split.unread)}"
        for name, split in splits.items()
        if split.unread
    ]


def checkpoint_bytes(t: Training) -> int:
    """Weights, their average, and AdamW's two averages of the gradient."""
    weights = sum(value.numel() * value.element_size() for value in t.model.state_dict().values())
    parameters = sum(p.numel() * p.element_size() for p in t.model.parameters() if p.requires_grad)
    return weights * (2 if t.ema is not None else 1) + 2 * parameters


def disk(out: Path, size: int, keep: int) -> str:
    """Free space beside what the checkpoints of a run need, and what the disk has in place of links.

    A run keeps the newest checkpoints, the best, and one being written. Where last.pth and best.pth are copies, these
    and one more being written come on top.

    Raises:
        ValueError: the space does not suffice, or files cannot be replaced on the disk.
    """
    folder = next(path for path in [out.absolute(), *out.absolute().parents] if path.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"out={str(out)!r} cannot be written: {folder} is no writable folder; name another")
    free = shutil.disk_usage(folder).free
    try:
        kind = kind_of_links(folder)
    except OSError as error:
        raise ValueError(f"out={str(out)!r} cannot hold checkpoints ({one_line(error)}); name another disk") from error
    written, copies = (2, 3) if kind == COPY else (1, 0)
    most, there = keep + 2 + copies, len(RunFolder(out).files())
    there += sum((out / name).is_file() and not (out / name).is_symlink() for name in STAND_INS) if copies else 0
    missing = max(written, most - there)
    if free < missing * size:
        raise ValueError(
            f"out={str(out)!r} has {_shown(free)} free, but {missing} more checkpoints of {_shown(size)} need to fit; "
            "make room, lower save.keep, or name another disk"
        )
    told = "" if kind == SYMBOLIC else f"; it has no symbolic links, so {' and '.join(STAND_INS)} are {kind}"
    return f"{_shown(size)} a checkpoint, {most} at most at a time; {_shown(free)} free in {out}{told}"


def _shown(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"


def rehearse(t: Training, shape: tuple[int, int, int]) -> str:
    """Run forward and backward on noise, which changes no weight or random number; returns the memory they take.

    On CUDA the whole batch of a device runs once, and its memory is measured. On the CPU, to be quick, two and four
    images run: what backward keeps for them is extrapolated to the batch; weights, gradients and averages are added.

    Args:
        t: the run's model, loss and optimiser.
        shape: (channels, height, width) of an image.

    Raises:
        ValueError: out of memory, more than the machine has, or the model refuses the images.
    """
    device, whole = t.world.device, t.config.optim.batch_per_device
    parameters = sum(p.numel() * p.element_size() for p in t.model.parameters())
    if device.type == "cuda":
        _forward_backward(t, whole, shape)
        total = torch.cuda.mem_get_info(device)[1]
        need = torch.cuda.max_memory_allocated(device) + 2 * parameters  # AdamW's averages come with its first step
    else:
        total = (
            os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // distributed.local("LOCAL_WORLD_SIZE", alone=1)
        )
        sizes = [2, 4] if whole > 4 else [whole, whole]  # mixup needs pairs
        first, second = (_forward_backward(t, size, shape) for size in sizes)
        kept = first + (second - first) * (whole - sizes[0]) // 2
        need = parameters * (4 if t.ema is None else 5) + kept
    if need > total:
        raise ValueError(too_much(t, f"the {total / GIB:.1f} GiB of a {device.type} process: about {need / GIB:.1f}"))
    return f"about {need / GIB:.2f} GiB of the {total / GIB:.1f} GiB of a {device.type} process, loader workers apart"


def _forward_backward(t: Training, size: int, shape: tuple[int, int, int]) -> int:
    """Run ``size`` images of noise; returns the bytes that were kept for backward besides the parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in t.model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with _untouched(t):
        zeros = torch.zeros(size, dtype=torch.int64)
        batch = Batch(torch.randn(size, *shape), zeros, zeros, zeros, [""] * size)
        if isinstance(t.images, Sequences):  # tokens cannot be noise
            readable = (
                sample for sample in map(t.images.__getitem__, range(len(t.images))) if sample.image is not None
            )
            found = list(itertools.islice(readable, size)) or [t.images[0]]
            batch = collate([found[i % len(found)] for i in range(size)])
        try:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = forward_loss(t, t.model.forward, batch)  # not compiled, to be quick
            loss.backward()
        except torch.OutOfMemoryError as error:
            name = torch.cuda.get_device_name(t.world.device)
            raise ValueError(too_much(t, f"{name}'s memory")) from error
        except (RuntimeError, AssertionError, ValueError, IndexError) as error:
            where = f"at data.img_size={t.config.data.img_size}"
            if isinstance(t.images, Sequences):
                where = f"on data.dataset={t.config.data.dataset}"
            reason = one_line(error)
            if isinstance(error, IndexError):
                reason += "; are there more kinds of tokens than model.kwargs.vocabulary?"
            raise ValueError(
                f"model.name={t.config.model.name!r} cannot train {where} with "
                f"optim.batch_per_device={t.config.optim.batch_per_device}: {reason}"
            ) from error
    return sum(kept.values())


def too_much(t: Training, memory: str) -> str:
    """The message that the batch does not fit, with the cure."""
    return (
        f"optim.batch_per_device={t.config.optim.batch_per_device} does not fit into {memory}; lower it (accumulation "
        "makes up for it), or set model.grad_checkpointing=true"
    )


@contextlib.contextmanager
def _untouched(t: Training) -> Iterator[None]:
    """Put random numbers, mode, gradients and buffers (running means of other models) back as they were."""
    drawn, training = rng.state(t.world.device), t.model.training
    buffers = {name: buffer.clone() for name, buffer in t.model.named_buffers()}
    t.model.train()
    try:
        yield
    finally:
        rng.restore(drawn, t.world.device)
        t.model.train(training)
        t.optimizer.zero_grad(set_to_none=True)
        for name, buffer in t.model.named_buffers():
            buffer.copy_(buffers[name])
