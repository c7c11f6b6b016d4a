"""One update with its loss, gradient and average of the weights; and one exact evaluation."""

import logging
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
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

from ..errors import NonFiniteError, TooManyUnreadableError
from . import rng
from .config import Config
from .distributed import World
from .images import UNREADABLE, Batch, Images
from .nonfinite import first_gradient, first_module
from .optim import set_learning_rate
from .sequences.named import Sequences
from .shards import Shards
from .signals import STOPPING, StopRequest

_logger = logging.getLogger(__name__)

BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
    learning_rates: NDArray[np.float64]  # one for every update of the run
    images: Images | Shards | Sequences  # the training split
    stop: StopRequest = field(default_factory=StopRequest)

    def evaluated(self) -> dict[str, nn.Module]:
        """What is evaluated after an epoch, by the first word of its metrics: the model, and the EMA if it is kept."""
        return {"val": self.model} | ({} if self.ema is None else {"ema": self.ema.module})


@dataclass(slots=True)
class Progress:
    """The position within an epoch, and its sums so far over all processes; a checkpoint goes on with them."""

    epoch: int
    update: int = 0  # updates done
    loss_sum: float = 0.0
    norm_sum: float = 0.0
    skipped: int = 0  # updates that the loss scaler left out
    skipped_in_a_row: int = 0
    unreadable: int = 0  # images
    loss: float = math.nan  # of the last update, for the log
    grad_norm: float = math.nan  # likewise
    wait_s: float = 0.0  # that this process has waited for data since it began the epoch

    def position(self) -> str:
        """As in ``3 epochs and 20 updates``."""
        return f"{self.epoch} epochs and {self.update} updates"


def set_arithmetic(tf32: bool, cudnn_benchmark: bool = False) -> None:
    """How this process computes on CUDA, see the knobs of these names."""
    torch.backends.cudnn.benchmark = cudnn_benchmark
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32


def autocast(config: Config, device: torch.device) -> AbstractContextManager[Any]:
    """Mixed precision as run.precision says; fp32 is no context at all."""
    dtype = PRECISIONS[config.run.precision]
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def to_device(batch: Batch, config: Config, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images, or sequences, and targets on the device, copied asynchronously where they are pinned."""
    layout = torch.channels_last if config.model.channels_last else torch.contiguous_format
    return (
        batch.images.to(device, non_blocking=True, memory_format=layout),
        batch.targets.to(device, non_blocking=True),
    )


def forward_loss(t: Training, model: Any, batch: Batch) -> Tensor:
    """The loss of one batch, mixed where the configuration says so."""
    images, targets = to_device(batch, t.config, t.world.device)
    if t.mixup is not None:
        if images is batch.images:
            images = images.clone()  # timm mixes in place, and a replay needs the batch as it came
        images, targets = t.mixup(images, targets)
    with autocast(t.config, t.world.device):
        loss: Tensor = t.criterion(*by_target(model(images), targets))
    return loss


def by_target(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, K) and targets as they are; those of a language model, (B, L, K) and (B, L), token by token."""
    return (logits.flatten(0, 1), targets.flatten()) if logits.ndim == 3 else (logits, targets)


def train_update(t: Training, batches: Iterator[Batch], progress: Progress, lr: float) -> None:
    """One step of the optimiser over ``accumulation`` batches, then of the EMA.

    All processes agree on loss, gradient and a request to stop before the step. Where loss or gradient is not finite,
    fp16 leaves the step out and scales the loss down, up to run.max_skips times in a row.

    Raises:
        NonFiniteError: on every process, before optimiser, EMA and weights are touched.
        TooManyUnreadableError: on every process, after the step.
    """
    set_learning_rate(t.optimizer, lr)
    drawn = rng.state(t.world.device)
    used: list[Batch] = []
    total = torch.zeros((), device=t.world.device)
    for micro in range(t.accumulation):
        began = time.perf_counter()
        used.append(next(batches))
        progress.wait_s += time.perf_counter() - began
        last = micro == t.accumulation - 1
        with nullcontext() if last or not isinstance(t.parallel, DistributedDataParallel) else t.parallel.no_sync():
            loss = forward_loss(t, t.parallel, used[-1]) / t.accumulation
            t.scaler.scale(loss).backward()
        total += loss.detach()
    t.scaler.unscale_(t.optimizer)
    gradients = [parameter.grad for parameter in t.model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    own_loss, progress.grad_norm = torch.stack([total, norm]).tolist()  # the update's one wait for the device
    finite = _agree(t, progress, own_loss, used)
    if not finite and (not t.scaler.is_enabled() or progress.skipped_in_a_row > t.config.run.max_skips):
        raise _explain(t, progress, used, drawn, own_loss, lr)
    if finite and t.config.optim.clip_grad is not None:
        nn.utils.clip_grads_with_norm_(t.model.parameters(), t.config.optim.clip_grad, norm)
    if finite:
        t.scaler.step(t.optimizer)
    t.scaler.update()
    t.optimizer.zero_grad(set_to_none=True)
    for module in t.model.modules():  # else every process would evaluate and save running means of its own
        if isinstance(module, BATCH_NORM):
            for buffer in module.buffers():
                t.world.spread(buffer)
    if t.ema is not None:
        t.ema.update(t.model)
    progress.update += 1
    for batch in used:
        t.images.tell(batch)
    check_readable(progress.unreadable, len(t.images), f"training {t.images.noun}s", t.config)


def _agree(t: Training, progress: Progress, own_loss: float, used: list[Batch]) -> bool:
    """Sum over the processes what each saw; returns whether loss and gradient were finite on all."""
    finite = math.isfinite(own_loss) and math.isfinite(progress.grad_norm)
    unreadable = sum(int((batch.faults == UNREADABLE).sum()) for batch in used)
    bad, loss, lost = share_stop(t.world, t.stop, [not finite, own_loss, unreadable])
    progress.loss = loss / t.world.size
    progress.unreadable += int(lost)
    if bad:
        progress.skipped += 1
        progress.skipped_in_a_row += 1
    else:
        progress.loss_sum += progress.loss
        progress.norm_sum += progress.grad_norm
        progress.skipped_in_a_row = 0
    return not bad


def share_stop(world: World, stop: StopRequest, values: list[float]) -> list[float]:
    """The values summed over the processes; the same message tells each process of a signal that any has received."""
    received = [float(stop.received == number) for number in STOPPING]
    summed = world.sum(torch.tensor([*values, *received], dtype=torch.float64)).tolist()
    stop.agreed = next((number for number, count in zip(STOPPING, summed[len(values) :], strict=True) if count), 0)
    return summed[: len(values)]


def _explain(
    t: Training, progress: Progress, used: list[Batch], drawn: dict[str, Any], own_loss: float, lr: float
) -> NonFiniteError:
    """Run the update's forwards again, from the same random numbers, to name the culprit on each process."""
    culprit: str | None = None
    if not math.isfinite(own_loss):
        rng.restore(drawn, t.world.device)
        for batch in used:
            # the forward that is not compiled, so that every module's hook runs
            culprit = culprit or first_module(t.model, partial(forward_loss, t, t.model.forward, batch))
    own = {
        "rank": t.world.rank,
        "loss": own_loss,
        "culprit": culprit or first_gradient(t.model) or "the gradient's norm",
        "places": torch.cat([batch.places for batch in used]).tolist(),
    }
    ranks = t.world.gather(own)  # where a rank's loss is finite, its gradient came from the others
    ranks = [rank for rank in ranks if not math.isfinite(rank["loss"])] or ranks
    first = ranks[0]
    where = f"epoch {progress.epoch}, update {progress.update + 1}, rank {first['rank']}"
    what = f"loss {first['loss']:.4g}, gradient norm {progress.grad_norm:.4g}, first not finite: {first['culprit']}"
    skips = f"after {progress.skipped_in_a_row} skipped updates " if t.scaler.is_enabled() else ""
    cure = "resume with a lower optim.lr and allow_change=optim.lr, or likewise optim.clip_grad or run.precision"
    report = {"epoch": progress.epoch, "update": progress.update + 1, "lr": lr, "ranks": ranks}
    return NonFiniteError(f"{where}: {what} {skips}({cure})", report)


@torch.inference_mode()
def evaluate(
    model: nn.Module, loader: DataLoader[Any], config: Config, world: World, stop: StopRequest | None = None
) -> dict[str, float] | None:
    """top1 and top5 in percent, mean cross-entropy and count over all processes, each image counted once.

    Of a language model the percent and the mean are over the tokens.

    With fewer than five classes top5 is 100. Images that cannot be read are left out, and counted as ``unreadable``.
    Every process gets the same result; None if one of them was asked to stop.

    Raises:
        TooManyUnreadableError: more than data.max_unreadable of the images cannot be read.
    """
    training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=world.device)  # top1, top5, loss, targets
    seen = unreadable = 0
    for batch in _until_stopped(loader, world, stop or StopRequest()):
        loader.dataset.tell(batch)  # type: ignore[attr-defined]
        seen += len(batch.targets)
        unreadable += int((batch.faults == UNREADABLE).sum())
        if not len(batch.targets):
            continue
        images, targets = to_device(batch, config, world.device)
        with autocast(config, world.device):
            logits = model(images)
        logits, targets = by_target(logits.float(), targets)
        hits = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
        loss = F.cross_entropy(logits, targets, reduction="sum")
        sums[:3] += torch.stack([hits[:, 0].sum(), hits.any(1).sum(), loss])
        sums[3] += len(targets)
    model.train(training)
    if stop is not None and stop.agreed:
        return None
    summed = world.sum(torch.cat([sums, sums.new_tensor([seen, unreadable])])).tolist()
    top1, top5, loss_sum, scored, count, lost = summed
    total = len(loader.dataset)  # type: ignore[arg-type]
    if count + lost != total:
        raise RuntimeError(f"evaluation saw {count + lost:.0f} of {total} validation images")
    check_readable(int(lost), total, f"validation {loader.dataset.noun}s", config)  # type: ignore[attr-defined]
    means = {"top1": 100 * top1 / scored, "top5": 100 * top5 / scored, "loss": loss_sum / scored}
    return means | {"count": int(count), "unreadable": int(lost)}


def _until_stopped(batches: Iterable[Batch], world: World, stop: StopRequest) -> Iterator[Batch]:
    """The batches, for as long as any process has one; all end together when one is asked to stop."""
    iterator = iter(batches)
    while True:
        batch = next(iterator, None)
        [waiting] = share_stop(world, stop, [batch is not None])
        if not waiting or stop.agreed:
            return
        if batch is not None:
            yield batch


def check_readable(unreadable: int, samples: int, what: str, config: Config) -> None:
    """Refuse to go on where too large a share of a split cannot be read."""
    if unreadable > config.data.max_unreadable * samples:
        raise TooManyUnreadableError(
            f"{unreadable} of {samples} {what} cannot be read, more than data.max_unreadable="
            f"{config.data.max_unreadable}; repair them (the log names each), or raise it"
        )
