"""Train a timm model with ConvNeXt's recipe.

    python train.py configs/digits.yaml                                                             # one device
    torchrun --nproc-per-node=8 train.py configs/sgconvnext_tiny.yaml data.root=/path/to/imagenet   # one node

Options are section.key=value and override the YAML file; --help lists them all.
"""

import argparse
import contextlib
import fcntl
import json
import logging
import math
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from timm.utils import ModelEmaV3
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import sgconvnext  # noqa: F401  registers the models with timm
from sgconvnext import build, checkpoint, data, distributed, engine, optim
from sgconvnext.config import Config, describe, load_config, to_dict

_logger = logging.getLogger("train")


def main() -> None:
    args = parse_args()
    with contextlib.ExitStack() as claimed:
        try:
            config = load_config(args.config, args.overrides)
            world = distributed.start(config.run.device)
            logging.basicConfig(level=logging.INFO if world.is_first else logging.WARNING, format="%(message)s")
            if world.is_first:
                claimed.enter_context(claim(Path(config.out)))
            run = Run(config, world)
        except ValueError as error:  # the user's; later ones are ours and keep their traceback
            distributed.fail("train.py", error)
        run.train()
        distributed.stop()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=describe(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="YAML file, such as configs/digits.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="knobs that override the file")
    args, dashed = parser.parse_known_args()
    args.overrides += dashed  # refused by the same message as any other misspelt override
    return args


class Run:
    """The order of a run: data, model, optimiser, EMA, resume; then epoch after epoch."""

    def __init__(self, config: Config, world: distributed.World) -> None:
        self.config, self.world = config, world
        self.out = Path(config.out)
        resume = find_resume(config)
        seed(config.seed, world.rank)
        torch.backends.cudnn.benchmark = config.run.cudnn_benchmark
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.run.tf32

        accumulation = data.accumulation_steps(config.optim.global_batch, config.optim.batch_per_device, world.size)
        if config.data.download and world.size > 1:
            raise ValueError("data.download=true writes files: download in one process first, then run without it")
        train, val = data.create_split(config, train=True), data.create_split(config, train=False)
        classes = data.num_classes(train, val, config.model.num_classes)
        config.model.num_classes = classes  # resolved, so that a checkpoint says what its model was built with
        config.model.img_size = config.model.img_size or config.data.img_size
        self.class_to_idx = train.class_to_idx
        self.updates = data.updates_per_epoch(len(train), config.optim.global_batch)

        model = build.create_model(config, classes, start=resume is None).to(world.device)
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
        self.start, self.best = 0, -math.inf
        if resume is not None:
            self.load(resume)
        if world.sum(torch.tensor(self.start, device=world.device)).item() != self.start * world.size:
            raise ValueError(
                f"processes would start at different epochs, this one at {self.start}: share out={config.out!r}"
            )
        self.announce(len(train), len(val))

    def announce(self, train_images: int, val_images: int) -> None:
        """What the arithmetic came to, before the first image."""
        optim_, t = self.config.optim, self.training
        parameters = sum(p.numel() for p in t.model.parameters())
        _logger.info(
            "%s: %.1fM parameters, %d classes; %d training and %d validation images",
            *(self.config.model.name, parameters / 1e6, self.config.model.num_classes, train_images, val_images),
        )
        _logger.info(
            "global batch %d = %d per device x %d %s x %d accumulation; %d updates per epoch, %d in all; %s",
            *(optim_.global_batch, optim_.batch_per_device, self.world.size, self.world.device.type, t.accumulation),
            *(self.updates, len(t.learning_rates), self.config.run.precision),
        )

    def load(self, path: Path) -> None:
        """Go on from the epoch after the one in the checkpoint."""
        state, t = checkpoint.load(path), self.training
        refuse_changes(state, to_dict(self.config), path)
        if state.get("class_to_idx") != self.class_to_idx:
            raise ValueError(f"resume={str(path)!r} was written with other classes; start anew with model.checkpoint")
        checkpoint.load_weights(t.model, checkpoint.weights(state, False, path), path)
        if t.ema is not None:
            checkpoint.load_weights(t.ema.module, checkpoint.weights(state, True, path), path)
        t.optimizer.load_state_dict(state["optimizer"])
        t.scaler.load_state_dict(state["amp_scaler"])
        self.start, self.best = state["epoch"] + 1, state["best"]
        _logger.info("resumed from %s after epoch %d", path, state["epoch"])

    def train(self) -> None:
        if self.start >= self.config.epochs:
            _logger.info("nothing to do: %s has finished %d epochs", self.out, self.start)
            return
        if self.world.is_first:
            (self.out / "config.yaml").write_text(yaml.safe_dump(to_dict(self.config), sort_keys=False))
            keep_metrics(self.out / "metrics.jsonl", self.start)
        for epoch in range(self.start, self.config.epochs):
            seed(self.config.seed, self.world.rank, epoch)  # so that a resumed epoch draws what it would have drawn
            trained = engine.train_epoch(self.training, self.train_loader.epoch(epoch), epoch, self.updates)
            metrics = self.evaluate(epoch, trained)
            if self.world.is_first:
                self.save(epoch, metrics)
        _logger.info("best top-1 %.2f%%; config.yaml, metrics.jsonl and checkpoints are in %s", self.best, self.out)

    def evaluate(self, epoch: int, trained: dict[str, float]) -> dict[str, float]:
        """The epoch's line of metrics.jsonl, the same on every process."""
        t = self.training
        val = engine.evaluate(t.model, self.val_loader, self.config, self.world)
        if not math.isfinite(val["loss"]):
            raise FloatingPointError(f"epoch {epoch}: the validation loss is {val['loss']}; nothing was saved")
        metrics = {"epoch": epoch, "train_loss": trained["train_loss"]}
        metrics |= {f"val_{key}": val[key] for key in ("top1", "top5", "loss")}
        if t.ema is not None:
            ema = engine.evaluate(t.ema.module, self.val_loader, self.config, self.world)
            metrics |= {f"ema_{key}": ema[key] for key in ("top1", "top5", "loss")}
        return metrics | {"lr": trained["lr"], "images_per_s": trained["images_per_s"]}

    def save(self, epoch: int, metrics: dict[str, float]) -> None:
        """Write best.pth where the model or its EMA has a new best top-1, the line of metrics, and last.pth.

        In this order, so that a run which is killed in between repeats the epoch and loses neither.
        """
        t = self.training
        score = max(metrics["val_top1"], metrics.get("ema_top1", -math.inf))
        is_best, self.best = score > self.best, max(score, self.best)
        state = {
            "state_dict": t.model.state_dict(),
            "optimizer": t.optimizer.state_dict(),
            "amp_scaler": t.scaler.state_dict(),
            "epoch": epoch,
            "arch": self.config.model.name,
            "args": to_dict(self.config),
            "version": checkpoint.VERSION,
            "metric": score,
            "best": self.best,
            "metrics": metrics,
            "class_to_idx": self.class_to_idx,
        }
        if t.ema is not None:
            state["state_dict_ema"] = t.ema.module.state_dict()
        if is_best:
            checkpoint.save(self.out / "best.pth", state)
        with (self.out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(metrics) + "\n")
        checkpoint.save(self.out / "last.pth", state)
        shown = " ".join(f"{key} {metrics[key]:.4g}" for key in metrics if key != "epoch")
        _logger.info("epoch %d: %s%s", epoch, shown, " (best)" if is_best else "")


def find_resume(config: Config) -> Path | None:
    """The checkpoint to go on from; a folder that holds a run is only ever continued, never overwritten."""
    out, given = Path(config.out), Path(config.resume)
    last = out / "last.pth"
    held = [name for name in ("last.pth", "best.pth", "metrics.jsonl", "config.yaml") if (out / name).exists()]
    if config.resume == "auto":
        if "best.pth" in held and "last.pth" not in held:
            raise ValueError(f"out={config.out!r} has best.pth but no last.pth; use resume={out / 'best.pth'}")
        return last if last.exists() else None
    if held and (not config.resume or out.resolve() not in given.resolve().parents):
        raise ValueError(f"out={config.out!r} already holds a run; resume=auto continues it, another out starts anew")
    return given if config.resume else None


@contextlib.contextmanager
def claim(out: Path) -> Iterator[None]:
    """Make the output folder and lock it while the run lasts: two runs in one folder would mix their files."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out={str(out)!r} cannot be made a folder ({error.strerror}); name another") from error
    if not os.access(out, os.W_OK):
        raise ValueError(f"out={str(out)!r} is not writable; name another")
    folder = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(folder)
        raise ValueError(f"out={str(out)!r} is in use by another run; wait for it, or name another") from error
    try:
        yield
    finally:
        os.close(folder)


def refuse_changes(state: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    """A run goes on as it began: its optimiser state belongs to its model, batch, learning rate and precision."""
    if missing := {"args", "optimizer", "amp_scaler", "epoch", "best"} - set(state):
        raise ValueError(
            f"resume={str(path)!r} lacks {', '.join(sorted(missing))}; start from it with model.checkpoint"
        )
    then = state["args"]
    for section, keys in {"model": None, "optim": None, "ema": None, "run": ["precision"]}.items():
        for key in keys or now[section]:
            if then[section].get(key) != now[section][key]:
                raise ValueError(
                    f"resume={str(path)!r} was written with {section}.{key}={then[section].get(key)}, now it is "
                    f"{now[section][key]}; go on with the former, or start anew with model.checkpoint"
                )


def seed(number: int, rank: int, epoch: int | None = None) -> None:
    """Seed Python, numpy and torch: by seed + rank for the weights, as ConvNeXt; each epoch has its own stream."""
    drawn = number + rank
    if epoch is not None:
        drawn = int(np.random.SeedSequence([number, rank, epoch]).generate_state(1)[0])
    random.seed(drawn)
    np.random.seed(drawn)
    torch.manual_seed(drawn)


def keep_metrics(path: Path, epochs: int) -> None:
    """Drop the lines of epochs that will be run again, and one that a kill cut short."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            if json.loads(line)["epoch"] < epochs:
                kept.append(line + "\n")
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(kept))
    partial.replace(path)


if __name__ == "__main__":
    main()
