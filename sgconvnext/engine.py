"""One epoch of training and one exact evaluation."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from tqdm import tqdm

from .config import Config
from .data import num_samples
from .distributed import World
from .optim import set_learning_rate

_logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(kw_only=True, slots=True)
class Training:
    """Everything that an update changes or reads."""

    config: Config
    world: World
    model: nn.Module  # bare: what is saved and evaluated
    parallel: nn.Module  # the same, in DistributedDataParallel where there are several processes
    optimizer: Optimizer
    scaler: GradScaler
    ema: ModelEmaV3 | None
    criterion: nn.Module
    mixup: Mixup | None
    accumulation: int
    learning_rates: NDArray[np.float64]  # of every update of the run


def autocast(config: Config, device: torch.device) -> AbstractContextManager[Any]:
    """Mixed precision as run.precision says; fp32 is no context at all."""
    dtype = DTYPES[config.run.precision]
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def to_device(batch: tuple[Tensor, Tensor], config: Config, device: torch.device) -> tuple[Tensor, Tensor]:
    """Copy a batch, asynchronously where it is pinned."""
    images, targets = batch
    layout = torch.channels_last if config.model.channels_last else torch.contiguous_format
    return (
        images.to(device, non_blocking=True, memory_format=layout),
        targets.to(device, non_blocking=True),
    )


def train_update(t: Training, batches: Iterator[tuple[Tensor, Tensor]], lr: float) -> Tensor:
    """One optimiser step over ``accumulation`` batches; returns this process's mean loss, on the device."""
    set_learning_rate(t.optimizer, lr)
    total = torch.zeros((), device=t.world.device)
    for micro in range(t.accumulation):
        images, targets = to_device(next(batches), t.config, t.world.device)
        if t.mixup is not None:
            images, targets = t.mixup(images, targets)
        last = micro == t.accumulation - 1
        with nullcontext() if last or not isinstance(t.parallel, DistributedDataParallel) else t.parallel.no_sync():
            with autocast(t.config, t.world.device):
                loss = t.criterion(t.parallel(images), targets) / t.accumulation
            t.scaler.scale(loss).backward()
        total += loss.detach()
    if t.config.optim.clip_grad is not None:
        t.scaler.unscale_(t.optimizer)
        nn.utils.clip_grad_norm_(t.model.parameters(), t.config.optim.clip_grad)
    t.scaler.step(t.optimizer)
    t.scaler.update()
    t.optimizer.zero_grad(set_to_none=True)
    if t.ema is not None:
        t.ema.update(t.model)
    return total


def train_epoch(t: Training, batches: Iterator[tuple[Tensor, Tensor]], epoch: int, updates: int) -> dict[str, float]:
    """Train for ``updates`` steps; returns train_loss (mean over all images), lr (of the last) and images_per_s."""
    t.model.train()
    began = time.perf_counter()
    sum_loss = torch.zeros((), device=t.world.device, dtype=torch.float64)
    lr = 0.0
    bar = tqdm(total=updates, desc=f"epoch {epoch}", unit="update", leave=False, disable=not watched(t.world))
    for update in range(updates):
        lr = float(t.learning_rates[epoch * updates + update])
        loss = train_update(t, batches, lr)
        sum_loss += loss
        bar.update()
        if (update + 1) % t.config.run.log_every == 0 or update + 1 == updates:
            mean = t.world.sum(loss.clone()).item() / t.world.size
            if not np.isfinite(mean):
                raise FloatingPointError(f"epoch {epoch}, update {update + 1}: the loss is {mean}; lower optim.lr")
            rate = (update + 1) * t.config.optim.global_batch / (time.perf_counter() - began)
            if watched(t.world):
                bar.set_postfix(loss=f"{mean:.4f}", lr=f"{lr:.2e}", images_per_s=f"{rate:.0f}")
            else:
                _logger.info(
                    "epoch %d update %d/%d loss %.6f lr %.3e %.0f images/s", epoch, update + 1, updates, mean, lr, rate
                )
    bar.close()
    train_loss = t.world.sum(sum_loss).item() / t.world.size / updates
    seconds = time.perf_counter() - began
    return {"train_loss": train_loss, "lr": lr, "images_per_s": updates * t.config.optim.global_batch / seconds}


def watched(world: World) -> bool:
    """A person looks on: rank 0 writes to a terminal."""
    return world.is_first and sys.stderr.isatty()


@torch.inference_mode()
def evaluate(model: nn.Module, loader: DataLoader[Any], config: Config, world: World) -> dict[str, float]:
    """top1 and top5 in percent, mean cross-entropy and count over all processes, each image counted once.

    With fewer than five classes top5 is 100. Every process gets the same result.
    """
    training = model.training
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=world.device)  # top1, top5, loss
    seen = 0
    for batch in loader:
        images, targets = to_device(batch, config, world.device)
        with autocast(config, world.device):
            logits = model(images)
        logits = logits.float()
        hits = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
        loss = F.cross_entropy(logits, targets, reduction="sum")
        sums += torch.stack([hits[:, 0].sum(), hits.any(1).sum(), loss])
        seen += len(targets)
    model.train(training)
    top1, top5, loss_sum, count = world.sum(torch.cat([sums, sums.new_tensor([seen])])).tolist()
    if count != num_samples(loader.dataset):
        raise RuntimeError(f"evaluation saw {count:.0f} of {num_samples(loader.dataset)} validation images")
    return {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "loss": loss_sum / count, "count": int(count)}
