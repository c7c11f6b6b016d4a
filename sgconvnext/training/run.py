"""One run: what it is made of, and the steps of its epochs; train.py gives their order."""

import contextlib
import json
import logging
import math
import resource
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NoReturn

import torch
import yaml
from timm.utils import ModelEmaV3
from torch import nn
from torch.amp import GradScaler
from torch.distributed import DistError
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from .. import console
from ..errors import DataError, NonFiniteError, TooManyUnreadableError
from ..files import write_whole
from . import build, data, distributed, engine, optim, preflight, resume, rng, run_folder
from .config import Config, to_dict
from .data import Split
from .distributed import World
from .engine import Training
from .images import Batch
from .run_folder import RunFolder, Saver
from .watch import Watch, score

_logger = logging.getLogger(__name__)


def create_training(config: Config, world: World, model: nn.Module, train: Split, accumulation: int) -> Training:
    """A model on its device with optimiser, EMA, loss and learning rates; several processes average its gradient."""
    assert config.model.num_classes is not None
    optimizer = optim.create_optimizer(model, config.optim)
    if config.model.compile:
        model.compile()
    parallel = model
    if world.size > 1:
        parallel = DistributedDataParallel(model, device_ids=[world.device] if world.device.type == "cuda" else None)
    updates = optim.updates_per_epoch(len(train), config.optim.global_batch)
    return Training(
        config=config,
        world=world,
        model=model,
        parallel=parallel,
        optimizer=optimizer,
        scaler=GradScaler(world.device.type, enabled=config.run.precision == "fp16"),
        # after DistributedDataParallel, which has given every process the weights of rank 0
        ema=ModelEmaV3(model, decay=config.ema.decay) if config.ema.decay else None,
        criterion=build.create_criterion(config.augment),
        mixup=data.create_mixup(config.augment, config.model.num_classes),
        accumulation=accumulation,
        learning_rates=optim.learning_rates(config.optim, config.epochs, updates),
        images=train.dataset,
    )


class Run:
    """What a run holds between two updates, and the steps of an epoch.

    Args:
        training: model, optimiser, EMA and all else that an update changes or reads.
        folder: its output folder.
        train, val: its images.
    """

    def __init__(self, training: Training, folder: RunFolder, train: Split, val: Split) -> None:
        self.training, self.folder = training, folder
        self.config, self.world = training.config, training.world
        self.images, self.class_to_idx = training.images, train.class_to_idx
        self.updates = optim.updates_per_epoch(len(train), self.config.optim.global_batch)
        self.train_loader = data.TrainLoader(train, self.config, self.world)
        self.val_loader = data.create_eval_loader(val, self.config, self.world)
        self.facts = resume.facts(self.world.size, self.world.device.type, train.dataset, val.dataset)
        self.progress, self.best = engine.Progress(0), -math.inf
        self.history: list[dict[str, float]] = []  # the metrics of every finished epoch
        self.drawn: dict[str, Any] | None = None  # random numbers at the epoch's start
        self.drawn_now: dict[str, Any] | None = None  # and where a resumed epoch goes on
        self.origin: dict[str, str] = getattr(training.model, "origin", {})  # of the weights that the run started from
        self.tuning: dict[str, Any] | None = None  # the backends that were measured, see `backends.settle`
        self.saver = Saver(folder, self.world, self.config.save)
        self.watch: Watch | None = None  # of rank 0
        self.began: tuple[float, int] | None = None  # when this process began to train, and the updates done by then

    def begin(self) -> None:
        """Make the output folder say what this run is and where it stands; nothing in it is lost."""
        saved, p = self.saver.saved, self.progress
        self.folder.clear()
        self.folder.adopt()
        for aside in self.folder.set_aside(after=(p.epoch, p.update)):
            _logger.warning("set aside as %s: it is later than %s", aside, saved)
        if saved in self.folder.files():
            self.folder.point("last.pth", saved)
        scores = [score(metrics) for metrics in self.history]
        if self.best in scores:
            self.folder.restore_best(self.folder.file(scores.index(self.best) + 1, 0), saved)
        self.watch = Watch(self.config, self.history)
        text = yaml.safe_dump(to_dict(self.config), sort_keys=False)
        write_whole(self.folder.path / "config.yaml", text.encode())

    def end(self) -> None:
        """Close what `begin` opened."""
        if self.watch:
            self.watch.close()

    def updates_done(self) -> int:
        """The updates since the run began."""
        return self.progress.epoch * self.updates + self.progress.update

    def train_epoch(self) -> dict[str, float]:
        """The rest of the epoch's updates; returns images/s, the share of time spent waiting for data, GiB held."""
        t, p, every = self.training, self.progress, self.config.save.every
        self.began = self.began or (time.perf_counter(), self.updates_done())
        batches, began, first = self.batches(), time.perf_counter(), p.update
        t.model.train()
        options: dict[str, Any] = {"unit": "update", "leave": False, "disable": not self.watched()}
        bar = tqdm(desc=f"epoch {p.epoch}", initial=first, total=self.updates, **options)
        while p.update < self.updates:
            engine.train_update(t, batches, p, float(t.learning_rates[self.updates_done()]))
            bar.update()
            logged = p.update % self.config.run.log_every == 0 or p.update == self.updates
            if logged:
                self.log(bar, p.update - first, time.perf_counter() - began)
            if t.stop.agreed:
                bar.close()
                self.leave()
            due = (every and p.update % every == 0) or (logged and self.saver.is_due_again())
            if p.update < self.updates and due:
                self.save()
        bar.close()
        seconds = time.perf_counter() - began
        rate = (p.update - first) * self.config.optim.global_batch / seconds
        return {"images_per_s": rate, "data_wait": p.wait_s / seconds, "memory_gib": memory_gib(self.world.device)}

    def batches(self) -> Iterator[Batch]:
        """What is left of the epoch, with the random numbers that it would have drawn without an interruption."""
        p, device = self.progress, self.world.device
        if self.drawn is None:
            rng.seed(self.config.seed, self.world.rank, p.epoch)
            self.drawn = rng.state(device)
        rng.restore(self.drawn, device)
        batches = self.train_loader.epoch(p.epoch, skip=p.update * self.training.accumulation)
        if self.drawn_now is not None:
            rng.restore(self.drawn_now, device)
        p.wait_s = 0.0
        return batches

    def watched(self) -> bool:
        """Whether rank 0 writes to a terminal, where a person looks on."""
        return self.world.is_first and sys.stderr.isatty()

    def log(self, bar: "tqdm[Any]", updates: int, seconds: float) -> None:
        """Where the run is, how fast, and when it will be done; evaluations so far are part of the pace."""
        assert self.began is not None
        p, (began, first), done = self.progress, self.began, self.updates_done()
        pace = (time.perf_counter() - began) / (done - first)
        left = timedelta(seconds=round(pace * (len(self.training.learning_rates) - done)))
        lr, rate = self.training.learning_rates[done - 1], updates * self.config.optim.global_batch / seconds
        if self.watched():
            bar.set_postfix(loss=f"{p.loss:.4f}", lr=f"{lr:.2e}", images_per_s=f"{rate:.0f}", left=left)
            return
        _logger.info(
            "epoch %d update %d/%d loss %.6f lr %.3e norm %.3g %.0f %ss/s, %.0f%% data wait, %.2f GiB, left %s",
            *(p.epoch, p.update, self.updates, p.loss, lr, p.grad_norm),
            *(rate, self.training.images.noun, 100 * p.wait_s / seconds),
            *(memory_gib(self.world.device), left),
        )

    def evaluate(self, rates: dict[str, float]) -> dict[str, float]:
        """The epoch's line of metrics.jsonl; only its rates differ between the processes."""
        t, p = self.training, self.progress
        counted = max(1, self.updates - p.skipped)
        metrics = {"epoch": p.epoch, "train_loss": p.loss_sum / counted}
        for kind, model in t.evaluated().items():
            result = engine.evaluate(model, self.val_loader, self.config, self.world, t.stop)
            if result is None:
                self.leave()
            if kind == "val" and not math.isfinite(result["loss"]):
                raise FloatingPointError(
                    f"epoch {p.epoch}: the validation loss is {result['loss']}; nothing was saved"
                )
            metrics |= {f"{kind}_{key}": result[key] for key in ("top1", "top5", "loss")}
            unreadable = p.unreadable + int(result["unreadable"])
        lr = float(t.learning_rates[self.updates_done() - 1])
        metrics |= {"lr": lr, "grad_norm": p.norm_sum / counted, "skipped": p.skipped, "unreadable": unreadable}
        return metrics | rates

    def finish_epoch(self, metrics: dict[str, float]) -> None:
        """A checkpoint at the start of the next epoch, named best.pth too if it is; then the line of metrics.

        In this order a run that is killed in between loses neither: when it goes on, metrics.jsonl is written from the
        checkpoint's history.
        """
        self.history.append(metrics)
        self.progress = engine.Progress(self.progress.epoch + 1)
        self.drawn = self.drawn_now = None
        best = score(metrics) > self.best
        before, self.best = self.best, max(self.best, score(metrics))
        while not self.save(best) and self.progress.epoch == self.config.epochs:
            time.sleep(run_folder.RETRY_S)  # no later update will try again
        if self.saver.failures:
            self.best = before  # this epoch was not saved
        if self.watch:
            self.watch.epoch(metrics)
        shown = " ".join(f"{key} {metrics[key]:.4g}" for key in metrics if key != "epoch")
        _logger.info("epoch %d: %s%s", metrics["epoch"], shown, " (best)" if best and not self.saver.failures else "")

    def save(self, best: bool = False, leaving: bool = False) -> bool:
        """Write a checkpoint of this position, see `Saver.save`."""
        now = None if self.drawn is None else rng.state(self.world.device)  # between two epochs there is nothing
        ranks = self.world.gather({"epoch": self.drawn, "now": now})
        path = self.folder.file(self.progress.epoch, self.progress.update)
        return self.saver.save(path, lambda: resume.state(self, ranks), best, leaving)

    def leave(self) -> NoReturn:
        """End on a signal: with a checkpoint of this place, and the exit code that a shell gives the signal."""
        stop = self.training.stop
        saved = self.save(leaving=True)
        told = f"resume=auto goes on from {self.saver.saved}" if saved else self.saver.last()
        _logger.info("%s: stopped after %s; %s", stop.name, self.progress.position(), told)
        distributed.stop()
        sys.exit(stop.exit_code)


def memory_gib(device: torch.device) -> float:
    """The most that this process has held: on its GPU, else resident on the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


@contextlib.contextmanager
def failing_in_one_line(run: Run) -> Iterator[None]:
    """Say in one line what went wrong during training, and exit with 1; torchrun restarts, whatever the exit code."""
    try:
        yield
    except NonFiniteError as error:
        console.fail("train.py", _reported(error, run), code=1)
    except (FloatingPointError, TooManyUnreadableError, OSError) as error:
        console.fail("train.py", error, code=1)
    except DataError as error:  # from a loader worker, its message begins with the worker's traceback
        reason = str(error).splitlines()[-1].removeprefix(f"{DataError.__module__}.{DataError.__name__}: ")
        console.fail("train.py", DataError(reason), code=1, alone=True)
    except torch.OutOfMemoryError:
        told = preflight.too_much(run.training, f"the memory of {run.world.device}")
        console.fail("train.py", RuntimeError(told), code=1, alone=True)
    except RuntimeError as error:  # torch has no types of their own for failures of loader workers
        message, last = (str(error).splitlines() or [""])[0], (str(error).splitlines() or [""])[-1]
        if "DataLoader worker (pid" in message:
            cure = "out of memory, or of shared memory in /dev/shm? lower data.workers; resume=auto goes on"
            console.fail("train.py", RuntimeError(f"{message} ({cure})"), code=1, alone=True)
        if "in DataLoader worker process" in message:
            cure = "see data.workers, and /dev/shm if it is about shared memory"
            console.fail("train.py", RuntimeError(f"a loader worker failed: {last} ({cure})"), code=1, alone=True)
        if isinstance(error, DistError) or "gloo" in message:
            console.fail("train.py", RuntimeError("another process of this run has ended; see its message"), code=1)
        raise


def _reported(error: NonFiniteError, run: Run) -> Exception:
    """Write what a replay of the update needs, the images by path; returns the error with the path of that file."""
    path = run.folder.path / "nonfinite.json"
    for rank in error.report["ranks"]:
        rank["images"] = [run.images.name(place) for place in rank["places"]]
    try:
        run.world.on_first(lambda: write_whole(path, json.dumps(error.report, indent=1).encode()))
    except OSError as full:
        return FloatingPointError(f"{error}; its images cannot be listed: {full}")
    return FloatingPointError(f"{error}; its images are listed in {path}")
