"""What the tests of the training half share: a run of seconds, image folders, the commands, a run's fingerprint."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from timm.utils import ModelEmaV3
from torch.amp import GradScaler
from torch.utils.data import DataLoader, Dataset

import train
from sgconvnext.training import build, checkpoint, data, engine, optim
from sgconvnext.training.config import Config, flatten, from_dict, to_dict
from sgconvnext.training.distributed import World
from sgconvnext.training.images import Batch, Sample, TellsFaults, collate_readable
from sgconvnext.training.typed import merge

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"

CLASSES = {"walrus": 1, "ant": 2, "zebra": 0}
# at its initial layer scale of 1e-6 no run would notice what the blocks compute
MICRO = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32], "ls_init_value": 0.5}

# 5 updates of 16 noise images an epoch, no augmentation; neither 2 nor 3 processes divide the 7 validation images
TREE: dict[str, Any] = {
    "epochs": 2,
    "model": {"name": "sgconvnext_atto", "num_classes": 10, "kwargs": MICRO},
    "data": {"dataset": "synthetic", "img_size": 32, "train_samples": 80, "val_samples": 7, "workers": 0},
    "augment": {"scale": [1.0, 1.0], "ratio": [1.0, 1.0], "hflip": 0.0},
    "optim": {"global_batch": 16, "batch_per_device": 16},
    "run": {"device": "cpu", "log_every": 1},
}


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    """``{"optim.lr": 1}`` to ``{"optim": {"lr": 1}}``."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        leaf = value
        for key in reversed(path.split(".")):
            leaf = {key: leaf}
        tree = merge(tree, leaf)
    return tree


def micro_config(**changes: Any) -> Config:
    """TREE with changes, as in ``micro_config(**{"optim.lr": 1e-2})``; model.kwargs is replaced as a whole."""
    return from_dict(unflatten(flatten(TREE) | changes), "test")


def alone(rank: int = 0, size: int = 1) -> World:
    """A place among the processes, without a process group."""
    return World(rank=rank, size=size, device=torch.device("cpu"))


def micro_model(config: Config) -> torch.nn.Module:
    """The model of the configuration; timm's function alone is faster than ours, which first looks at its class."""
    model = config.model
    return timm.create_model(model.name, num_classes=model.num_classes, img_size=config.data.img_size, **model.kwargs)


def training(config: Config, model: torch.nn.Module | None = None, **parts: Any) -> engine.Training:
    """As `run.create_training` for one CPU process; ``parts`` replace its own."""
    model = micro_model(config) if model is None else deepcopy(model)
    batch = config.optim
    made = {
        "optimizer": optim.create_optimizer(model, config.optim),
        "scaler": GradScaler("cpu", enabled=config.run.precision == "fp16"),
        "ema": ModelEmaV3(model, decay=config.ema.decay) if config.ema.decay else None,
        "criterion": build.create_criterion(config.augment),
        "mixup": data.create_mixup(config.augment, config.model.num_classes or 10),
        "accumulation": optim.accumulation_steps(batch.global_batch, batch.batch_per_device, 1),
        "learning_rates": optim.learning_rates(config.optim, config.epochs, 5),
        "images": Kept(*noise(16)),
    }
    return engine.Training(config=config, world=alone(), model=model, parallel=model, **(made | parts))


def noise(count: int, classes: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (count, 3, 32, 32) and their classes, the same at every call."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 32, 32, generator=generator), torch.randint(classes, (count,), generator=generator)


def batches_of(size: int, images: torch.Tensor, targets: torch.Tensor) -> Iterator[Batch]:
    """Batches as the training loader gives them, of images that are all well."""
    places = torch.arange(len(targets))
    parts = [part.split(size) for part in (images, targets, places, torch.zeros_like(places))]
    return iter([Batch(*batch, [""] * len(batch[1])) for batch in zip(*parts, strict=True)])


class Kept(TellsFaults, Dataset[Sample]):
    """Images and targets in memory, as samples; a target of -1 stands for an image that cannot be read."""

    def __init__(self, images: torch.Tensor, targets: torch.Tensor) -> None:
        super().__init__()
        self.images, self.targets = images, targets.tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Sample:
        unreadable = self.targets[index] < 0
        return Sample(None if unreadable else self.images[index], self.targets[index], index, int(unreadable))

    def name(self, place: int) -> str:
        return f"image {place}"


def evaluation_loader(images: torch.Tensor, targets: torch.Tensor, **options: Any) -> DataLoader[Any]:
    return DataLoader(Kept(images, targets), collate_fn=collate_readable, **options)


def update(t: engine.Training, batches: Iterator[Batch], lr: float) -> float:
    """One update; the loss."""
    progress = engine.Progress(0)
    engine.train_update(t, batches, progress, lr)
    return progress.loss


def write_images(root: Path, splits: dict[str, dict[str, int]], size: int = 32) -> Path:
    """root/split/class/number.png, as many as the table says, every image of another grey."""
    shade = 0
    for split, classes in splits.items():
        for name, count in classes.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(np.full((size, size, 3), shade % 256, "uint8")).save(folder / f"{number}.png")
                shade += 7
    return root


def command_line(*arguments: object, processes: int = 0, restarts: int = 0) -> list[str]:
    """A script of ours by itself, or under torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    launcher = [*torchrun, f"--max-restarts={restarts}"] if processes else []
    return [sys.executable, *launcher, *map(str, arguments)]


def environment(**variables: str) -> dict[str, str]:
    """One thread a process, and the loopback interface only."""
    loopback = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0"}
    return os.environ | loopback | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} | variables


def command(*arguments: object, processes: int = 0, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    """Run train.py or validate.py to its end."""
    return subprocess.run(
        command_line(*arguments, processes=processes, restarts=restarts),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def disk_without(monkeypatch: pytest.MonkeyPatch, *calls: str, number: int = errno.EPERM) -> None:
    """Paths on which ``symlink_to`` or ``hardlink_to`` fails, as on exFAT."""

    def fails(path: Path, target: Any, *_: Any) -> None:
        raise OSError(number, os.strerror(number), str(path))

    for call in calls:
        monkeypatch.setattr(Path, call, fails)


# what last.pth and best.pth are on a disk, to the calls that it does not have
DISKS = {"symbolic links": (), "hard links": ("symlink_to",), "copies": ("symlink_to", "hardlink_to")}

TIMING = ["images_per_s", "data_wait", "memory_gib"]  # all else of a run is the same when it is repeated


def fingerprint(path: Path) -> str:
    """SHA-256 of the weights, their average, the optimiser, the loss scale and the metrics in a checkpoint."""
    state, sha256 = checkpoint.load(path), hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            sha256.update(value.contiguous().numpy().tobytes())
        elif isinstance(value, dict | list | tuple):
            for item in value.items() if isinstance(value, dict) else value:
                add(item)
        else:
            sha256.update(repr(value).encode())

    for key in ("state_dict", "state_dict_ema", "optimizer", "amp_scaler", "best"):
        add(state.get(key))
    add([{key: value for key, value in line.items() if key not in TIMING} for line in state["history"]])
    return sha256.hexdigest()


def write_config(path: Path, **changes: Any) -> Path:
    """TREE with changes as a file."""
    path.write_text(yaml.safe_dump(unflatten(flatten(TREE) | changes)))
    return path


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


AUGMENTED = {
    "augment.scale": [0.5, 1.0],
    "augment.hflip": 0.5,
    "augment.auto_augment": "rand-m9-mstd0.5-inc1",
    "augment.reprob": 0.5,
    "augment.mixup": 0.8,
    "augment.cutmix": 1.0,
    "model.drop_path": 0.3,
}


def micro_run(run_here: Callable[..., None], folder: Path, *overrides: str, **changes: Any) -> Path:
    """Train into folder/out; returns it."""
    folder.mkdir(exist_ok=True)
    run_here(train, write_config(folder / "a.yaml", **changes), f"out={folder / 'out'}", *overrides)
    return folder / "out"


def trained(folder: Path, **changes: Any) -> tuple[str, torch.nn.Module, torch.nn.Module]:
    """A checkpoint as train.py writes it, and the model and EMA whose weights are in it; no two of them alike."""
    config = micro_config(**{"model.num_classes": 3} | changes)
    config.model.img_size = config.data.img_size
    model, ema = (randomized(config) for _ in range(2))
    state = {
        "state_dict": model.state_dict(),
        "state_dict_ema": ema.state_dict(),
        "epoch": 4,
        "args": to_dict(config),
        "class_to_idx": CLASSES,
    }
    checkpoint.save(folder / "best.pth", state)
    return str(folder / "best.pth"), model, ema


def change(path: str, **changes: Any) -> None:
    """Rewrite a checkpoint; a key changed to None is taken out."""
    state = checkpoint.load(path) | changes
    checkpoint.save(Path(path), {key: value for key, value in state.items() if value is not None})


def randomized(config: Config) -> torch.nn.Module:
    """Layer scale at 1e-6 would hide from the logits what the blocks compute."""
    model = build.create_model(config, 3, start=False).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def only_line(script: str, stderr: str) -> str:
    assert stderr.startswith(f"{script}.py: error: ")
    assert stderr.endswith("\n")
    assert stderr.count("\n") == 1, stderr
    return stderr


def stop_in(update: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM comes during the update of that number, counted over the run."""
    original = engine.train_update

    def counted(t: engine.Training, batches: Any, progress: engine.Progress, lr: float) -> Any:
        if progress.epoch * 5 + progress.update + 1 == update:
            t.stop.received = signal.SIGTERM
        return original(t, batches, progress, lr)

    monkeypatch.setattr(engine, "train_update", counted)
