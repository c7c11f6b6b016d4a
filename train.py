"""Train a timm model with ConvNeXt's recipe.

    python train.py configs/digits.yaml                                                             # one device
    torchrun --nproc-per-node=8 train.py configs/sgconvnext_tiny.yaml data.root=/path/to/imagenet   # one node
    python train.py configs/digits.yaml check                                                       # only look

Options are section.key=value and override the YAML file; --help lists them all. With ``check`` the run ends before
its first update, having looked at the data, the arithmetic, memory and disk, and leaves nothing behind.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback; there is nothing to save until training begins

import argparse
import contextlib
import dataclasses
import json
import logging
import math
import resource
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from timm.utils import ModelEmaV3
from torch.amp import GradScaler
from torch.distributed import DistError
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import sgconvnext  # noqa: F401  registers the models with timm
from sgconvnext import console
from sgconvnext.errors import DataError, NonFiniteError, TooManyUnreadableError, shortened
from sgconvnext.files import write_whole
from sgconvnext.training import build, checkpoint, data, distributed, engine, optim, preflight, resume, rng, run_folder
from sgconvnext.training.config import Config, describe, load_config, to_dict
from sgconvnext.training.images import Batch
from sgconvnext.training.watch import Watch

_logger = logging.getLogger("train")


RETRY_S = 30.0  # at least so long between two attempts to save


def main() -> None:
    args = parse_args()
    with contextlib.ExitStack() as opened:
        try:
            config = load_config(args.config, args.overrides)
            world = distributed.start(config.run.device)
            logging.basicConfig(level=logging.INFO if world.is_first else logging.WARNING, format="%(message)s")
            if args.check and config.data.download:
                raise ValueError("check writes nothing, so data.download=true must wait for the run")
            if not args.check or Path(config.out).exists():
                world.on_first(lambda: opened.enter_context(run_folder.lock(Path(config.out))))
            run = Run(config, world)
            world.on_each(run.look_ahead)
            if not args.check:
                world.on_first(run.begin)
                opened.callback(run.end)
        except (ValueError, OSError) as error:  # the user's, or the disk's
            console.fail("train.py", error)
        if args.check:
            _logger.info("checked: data, arithmetic, memory and disk are as the run needs them")
        else:
            finish(run)
        distributed.stop()


def finish(run: "Run") -> None:
    """Train, and tell in one line what went wrong on the way; torchrun restarts, whatever the exit code."""
    try:
        run.train()
    except NonFiniteError as error:
        console.fail("train.py", run.reported(error), code=1)
    except (FloatingPointError, TooManyUnreadableError, OSError) as error:
        console.fail("train.py", error, code=1)
    except DataError as error:  # out of a loader worker it comes with the worker's traceback before it
        reason = str(error).splitlines()[-1].removeprefix(f"{DataError.__module__}.{DataError.__name__}: ")
        console.fail("train.py", DataError(reason), code=1, alone=True)
    except torch.OutOfMemoryError:
        told = preflight.too_much(run.training, f"the memory of {run.world.device}")
        console.fail("train.py", RuntimeError(told), code=1, alone=True)
    except RuntimeError as error:  # torch has no types for the next two
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


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=describe(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=console.path, help="YAML file, such as configs/digits.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="knobs that override the file; or the word check"
    )
    args, dashed = parser.parse_known_args()
    args.check = "check" in args.overrides
    args.overrides = [text for text in args.overrides if text != "check"]
    args.overrides += dashed  # refused by the same message as any other misspelt override
    return args


class Run:
    """The order of a run: data, model, optimiser, EMA, resume, preflight; then epoch after epoch."""

    def __init__(self, config: Config, world: distributed.World) -> None:
        self.config, self.world = config, world
        self.folder = run_folder.RunFolder(Path(config.out))
        world.agree(resume.shared_knobs(config), "give every process the same configuration")
        found: Path | None = world.on_first(lambda: resume.find(config, self.folder))
        rng.seed(config.seed, world.rank)
        torch.backends.cudnn.benchmark = config.run.cudnn_benchmark
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.run.tf32

        accumulation = data.accumulation_steps(config.optim.global_batch, config.optim.batch_per_device, world.size)
        if config.data.download and world.size > 1:
            raise ValueError("data.download=true writes files: download in one process first, then run without it")
        train, val, classes = data.create_splits(config, world)
        config.model.num_classes = classes  # resolved, so that a checkpoint says what its model was built with
        config.model.img_size = config.model.img_size or config.data.img_size
        self.class_to_idx, self.images, self.val_images = train.class_to_idx, train.dataset, len(val)
        self.unread = preflight.unread(train=train, val=val)
        self.updates = data.updates_per_epoch(len(train), config.optim.global_batch)

        model = build.create_model(config, classes, start=found is None).to(world.device)
        optimizer = optim.create_optimizer(model, config.optim)
        if config.model.compile:
            model.compile()
        parallel = model
        if world.size > 1:
            parallel = DistributedDataParallel(
                model, device_ids=[world.device] if world.device.type == "cuda" else None
            )
        self.training = engine.Training(
            config=config,
            world=world,
            model=model,
            parallel=parallel,
            optimizer=optimizer,
            scaler=GradScaler(world.device.type, enabled=config.run.precision == "fp16"),
            # after DistributedDataParallel, which has given every process the weights of rank 0
            ema=ModelEmaV3(model, decay=config.ema.decay) if config.ema.decay else None,
            criterion=build.create_criterion(config.augment),
            mixup=data.create_mixup(config.augment, classes),
            accumulation=accumulation,
            learning_rates=optim.learning_rates(config.optim, config.epochs, self.updates),
        )
        self.train_loader = data.TrainLoader(train, config, world)
        self.val_loader: DataLoader[Any] = data.create_eval_loader(val, config, world)
        self.progress, self.best = engine.Progress(0), -math.inf
        self.failures, self.failed = 0, 0.0  # to save, in a row, and when the last was
        self.history: list[dict[str, float]] = []
        self.drawn: dict[str, Any] | None = None  # random numbers at the epoch's start
        self.drawn_now: dict[str, Any] | None = None  # and where a resumed epoch goes on
        self.facts = resume.facts(world.size, world.device.type, train.dataset, val.dataset)
        self.saved = found
        self.watch: Watch | None = None  # of rank 0
        if found is not None:
            self.load(found)

    def look_ahead(self) -> None:
        """Say what the arithmetic comes to, before the first image.

        Raises:
            ValueError: memory or disk will not suffice.
        """
        config, t = self.config, self.training
        size = config.data.img_size if isinstance(config.data.img_size, tuple) else (config.data.img_size,) * 2
        parameters = sum(p.numel() for p in t.model.parameters()) / 1e6
        batch = (config.optim.global_batch, config.optim.batch_per_device, self.world.size, self.world.device.type)
        memory = preflight.rehearse(t, (3, *size))
        disk = preflight.disk(self.folder.path, preflight.checkpoint_bytes(t), config.save.keep)
        names = ": " + shortened(data.class_names(self.class_to_idx)) if self.class_to_idx else ""
        for line in (
            f"{config.model.name}: {parameters:.1f}M parameters, {config.model.num_classes} classes{names}",
            f"{len(self.images)} training and {self.val_images} validation images, "
            + preflight.class_counts(self.images, self.class_to_idx),
            *self.unread,
            "global batch {} = {} per device x {} {} x {} accumulation; ".format(*batch, t.accumulation)
            + f"{self.updates} updates per epoch, {len(t.learning_rates)} in all; {config.run.precision}",
            f"learning rate: peak {config.optim.lr:.4g} after {config.optim.warmup_epochs * self.updates} updates of "
            f"warm-up, {t.learning_rates[-1]:.4g} at the end",
            *preflight.kernels(t.model, size),
            f"memory: {memory}",
            f"disk: {disk}",
        ):
            _logger.info("%s", line)

    def load(self, path: Path) -> None:
        """Take everything up where the checkpoint left it."""
        state, t = checkpoint.load(path), self.training
        resume.refuse_changes(state, self.config, self.facts, path)
        if state.get("class_to_idx") != self.class_to_idx:
            raise ValueError(f"resume={str(path)!r} was written with other classes; start anew with model.checkpoint")
        checkpoint.load_weights(t.model, checkpoint.weights(state, False, path), path)
        if t.ema is not None:
            averaged = bool(state.get("state_dict_ema"))  # not where ema.decay was changed from 0
            checkpoint.load_weights(t.ema.module, checkpoint.weights(state, averaged, path), path)
        optim.load_state(t.optimizer, state["optimizer"])
        if state["amp_scaler"]:
            t.scaler.load_state_dict(state["amp_scaler"])
        self.progress, self.history = engine.Progress(**state["progress"]), state["history"]
        if path.parent.resolve() == self.folder.path.resolve():  # else the best is another folder's
            self.best = state["best"]
        if self.world.size == len(state["ranks"]):
            own = state["ranks"][self.world.rank]
            self.drawn, self.drawn_now = own["epoch"], own["now"]
        _logger.info("going on from %s, after %s", path, self.position())

    def position(self) -> str:
        """In words."""
        return f"{self.progress.epoch} epochs and {self.progress.update} updates"

    def begin(self) -> None:
        """Make the output folder say what this run is and where it stands; nothing in it is lost."""
        self.folder.clear()
        self.folder.adopt()
        for aside in self.folder.set_aside(after=(self.progress.epoch, self.progress.update)):
            _logger.warning("set aside as %s: it is later than %s", aside, self.saved)
        if self.saved in self.folder.files():
            self.folder.point("last.pth", self.saved)
        if (best := self.unnamed_best()) is not None:
            self.folder.point("best.pth", best)
        self.watch = Watch(self.config, self.history)
        text = yaml.safe_dump(to_dict(self.config), sort_keys=False)
        write_whole(self.folder.path / "config.yaml", text.encode())

    def unnamed_best(self) -> Path | None:
        """The best epoch's checkpoint, if best.pth should be it and is not.

        A kill may have come between checkpoint and link, a disk without links have lost it when the folder moved. What
        was set aside or comes from elsewhere stays best.pth, unless the run stands right after its best epoch.
        """
        scores, files = [score(metrics) for metrics in self.history], self.folder.files()
        if self.best not in scores or (file := self.folder.file(scores.index(self.best) + 1, 0)) not in files:
            return None
        named, here = self.folder.behind("best.pth"), self.folder.path / "best.pth"
        return file if file != named and (file == self.saved or named in files or not here.exists()) else None

    def end(self) -> None:
        if self.watch:
            self.watch.close()

    def reported(self, error: NonFiniteError) -> Exception:
        """Write down what a replay of the update needs, the images by path; the error, with the place of the file."""
        path = self.folder.path / "nonfinite.json"
        for rank in error.report["ranks"]:
            rank["images"] = [self.images.name(place) for place in rank["places"]]
        try:
            self.world.on_first(lambda: write_whole(path, json.dumps(error.report, indent=1).encode()))
        except OSError as full:
            return FloatingPointError(f"{error}; its images cannot be listed: {full}")
        return FloatingPointError(f"{error}; its images are listed in {path}")

    def train(self) -> None:
        """Epoch after epoch, each ending with an evaluation and a checkpoint."""
        if self.progress.epoch >= self.config.epochs:
            _logger.info("nothing to do: %s has finished %d epochs", self.folder.path, self.progress.epoch)
            return
        self.began = time.perf_counter(), self.updates_done()
        with self.training.stop:
            while self.progress.epoch < self.config.epochs:
                rates = self.train_epoch()
                metrics = self.evaluate(rates)
                self.finish_epoch(metrics)
        _logger.info(
            "best top-1 %.2f%%; config.yaml, metrics.jsonl and checkpoints are in %s", self.best, self.folder.path
        )

    def updates_done(self) -> int:
        return self.progress.epoch * self.updates + self.progress.update

    def train_epoch(self) -> dict[str, float]:
        """The rest of the epoch's updates; returns images/s, the share of time spent waiting for data, GiB held."""
        t, p, every = self.training, self.progress, self.config.save.every
        batches, began, first = self.batches(), time.perf_counter(), p.update
        t.model.train()
        bar = tqdm(
            total=self.updates,
            desc=f"epoch {p.epoch}",
            initial=first,
            unit="update",
            leave=False,
            disable=not self.watched(),
        )
        while p.update < self.updates:
            for batch in engine.train_update(t, batches, p, float(t.learning_rates[self.updates_done()])):
                self.images.tell(batch)
            engine.check_readable(p.unreadable, len(self.images), "training", self.config)
            bar.update()
            logged = p.update % self.config.run.log_every == 0 or p.update == self.updates
            if logged:
                self.log(bar, p.update - first, time.perf_counter() - began)
            if t.stop.agreed:
                bar.close()
                self.leave()
            again = logged and self.failures and time.perf_counter() - self.failed > RETRY_S
            if p.update < self.updates and ((every and p.update % every == 0) or again):
                self.save()
        bar.close()
        seconds = time.perf_counter() - began
        rate = (p.update - first) * self.config.optim.global_batch / seconds
        return {"images_per_s": rate, "data_wait": p.wait_s / seconds, "memory_gib": memory_gib(self.world.device)}

    def watched(self) -> bool:
        """A person looks on: rank 0 writes to a terminal."""
        return self.world.is_first and sys.stderr.isatty()

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

    def log(self, bar: "tqdm[Any]", updates: int, seconds: float) -> None:
        """Where the run is, how fast, and when it will be done; evaluations so far are part of the pace."""
        p, (began, first), done = self.progress, self.began, self.updates_done()
        pace = (time.perf_counter() - began) / (done - first)
        left = timedelta(seconds=round(pace * (len(self.training.learning_rates) - done)))
        lr, rate = self.training.learning_rates[done - 1], updates * self.config.optim.global_batch / seconds
        if self.watched():
            bar.set_postfix(loss=f"{p.loss:.4f}", lr=f"{lr:.2e}", images_per_s=f"{rate:.0f}", left=left)
            return
        _logger.info(
            "epoch %d update %d/%d loss %.6f lr %.3e norm %.3g %.0f images/s, %.0f%% data wait, %.2f GiB, left %s",
            *(p.epoch, p.update, self.updates, p.loss, lr, p.grad_norm, rate, 100 * p.wait_s / seconds),
            *(memory_gib(self.world.device), left),
        )

    def evaluate(self, rates: dict[str, float]) -> dict[str, float]:
        """The epoch's line of metrics.jsonl, the same on every process but for its rates."""
        t, p = self.training, self.progress
        counted = max(1, self.updates - p.skipped)
        metrics = {"epoch": p.epoch, "train_loss": p.loss_sum / counted}
        models = {"val": t.model} | ({} if t.ema is None else {"ema": t.ema.module})
        for kind, model in models.items():
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

        In this order, so that a run which is killed in between loses neither: metrics.jsonl is written from the
        checkpoint's history when it goes on.
        """
        self.history.append(metrics)
        self.progress = engine.Progress(self.progress.epoch + 1)
        self.drawn = self.drawn_now = None
        best = score(metrics) > self.best
        before, self.best = self.best, max(self.best, score(metrics))
        while not self.save(best) and self.progress.epoch == self.config.epochs:
            time.sleep(RETRY_S)  # no later update will try again
        if self.failures:
            self.best = before  # of what was saved
        if self.watch:
            self.watch.epoch(metrics)
        shown = " ".join(f"{key} {metrics[key]:.4g}" for key in metrics if key != "epoch")
        _logger.info("epoch %d: %s%s", metrics["epoch"], shown, " (best)" if best and not self.failures else "")

    def save(self, best: bool = False, leaving: bool = False) -> bool:
        """Write a checkpoint of this position. A failure is told, and tried again with a later line of the log.

        Raises:
            OSError: it was the last of save.max_failures in a row; not when the run is leaving anyway.
        """
        p = self.progress
        now = None if self.drawn is None else rng.state(self.world.device)  # None: between two epochs
        ranks = self.world.gather({"epoch": self.drawn, "now": now})
        path = self.folder.file(p.epoch, p.update)
        try:
            self.world.on_first(lambda: self.folder.add(path, self.state(ranks), self.config.save.keep, best))
        except OSError as error:
            self.failures, self.failed = self.failures + 1, time.perf_counter()
            if self.failures >= self.config.save.max_failures and not leaving:
                raise OSError(f"{error}; given up after {self.failures} failures in a row, {self.last()}") from error
            if self.world.is_first:
                _logger.warning("%s; %s%s", error, self.last(), "" if leaving else ", and the run goes on")
            return False
        self.failures, self.saved = 0, path
        return True

    def last(self) -> str:
        there = self.saved is not None and self.saved.exists()
        return f"the last good checkpoint is {self.saved}" if there else "there is no checkpoint"

    def state(self, ranks: list[dict[str, Any]]) -> dict[str, Any]:
        """All that a run needs to go on, under timm's names where it has one."""
        t, p = self.training, self.progress
        state = {
            "state_dict": t.model.state_dict(),
            "optimizer": t.optimizer.state_dict(),
            "amp_scaler": t.scaler.state_dict(),
            "epoch": p.epoch - 1,  # the last that is finished
            "arch": self.config.model.name,
            "args": to_dict(self.config),
            "version": checkpoint.VERSION,
            "metric": score(self.history[-1]) if self.history else None,
            "best": self.best,
            "history": self.history,
            "progress": dataclasses.asdict(p),
            "ranks": ranks,
            "facts": self.facts,
            "class_to_idx": self.class_to_idx,
        }
        return state if t.ema is None else state | {"state_dict_ema": t.ema.module.state_dict()}

    def leave(self) -> NoReturn:
        """End on a signal: with a checkpoint of this place, and the exit code that a shell gives the signal."""
        stop = self.training.stop
        told = f"resume=auto goes on from {self.saved}" if self.save(leaving=True) else self.last()
        _logger.info("%s: stopped after %s; %s", stop.name, self.position(), told)
        distributed.stop()
        sys.exit(stop.exit_code)


def score(metrics: dict[str, float]) -> float:
    """Top-1 of the model or of its average, whichever is better."""
    return max(metrics["val_top1"], metrics.get("ema_top1", -math.inf))


def memory_gib(device: torch.device) -> float:
    """The most that this process has held: on its GPU, else resident on the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


if __name__ == "__main__":
    main()
