"""Metrics of a run: lines that survive kills and resumes, curves, TensorBoard, W&B; and no sink that ends the run."""

import json
import logging
import math
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from helpers import refused
from PIL import Image
from training_helpers import micro_config

from sgconvnext.training import watch
from sgconvnext.training.config import Config, to_dict
from sgconvnext.training.watch import Watch


def epochs(count: int, ema: bool = False) -> list[dict[str, float]]:
    """What train.py hands over, of a run that gets better."""
    return [
        {"epoch": epoch, "train_loss": 3 / (epoch + 1), "val_top1": 90 - 60 / (epoch + 1), "val_top5": 99.0}
        | {"val_loss": 2 / (epoch + 1)}
        | ({"ema_top1": 91 - 80 / (epoch + 1), "ema_top5": 99.0, "ema_loss": 2.5 / (epoch + 1)} if ema else {})
        | {"lr": 1e-3, "grad_norm": 1.5, "images_per_s": 100.0, "data_wait": 0.1}
        for epoch in range(count)
    ]


def config_in(out: Path, **changes: Any) -> Config:
    return micro_config(out=str(out), **changes)


def lines(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without matplotlib, whatever is installed."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.mark.usefixtures("plain")
def test_new_run_writes_a_line_per_epoch(tmp_path: Path) -> None:
    watching = Watch(config_in(tmp_path), [])
    assert lines(tmp_path) == []
    for metrics in epochs(3):
        watching.epoch(metrics)
        assert lines(tmp_path) == epochs(3)[: int(metrics["epoch"]) + 1]
    watching.close()
    assert [item.name for item in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.usefixtures("plain")
def test_resumed_run_keeps_the_lines_of_its_checkpoint_only(tmp_path: Path) -> None:
    stale = json.dumps({"epoch": 2, "val_top1": 0.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in epochs(2)) + stale + '\n{"epoch": 3')
    history = epochs(2)
    watching = Watch(config_in(tmp_path), history)
    assert lines(tmp_path) == epochs(2)
    watching.epoch(epochs(3)[2])
    assert lines(tmp_path) == epochs(3)
    assert len(history) == 2  # the caller's own


@pytest.mark.usefixtures("plain")
def test_full_disk_costs_a_warning_and_no_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    watching = Watch(config_in(tmp_path), [])
    watching.epoch(epochs(1)[0])

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for metrics in epochs(3)[1:]:
            watching.epoch(metrics)
    assert lines(tmp_path) == epochs(1)
    assert not list(tmp_path.glob("*.partial"))
    [warning] = caplog.records
    assert warning.levelno == logging.WARNING
    assert "metrics.jsonl failed ([Errno 28] No space left on device: " in warning.message
    watching.epoch(epochs(4)[3])
    assert lines(tmp_path) == epochs(4)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every (step, value) that TensorBoard shows, by tag."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.usefixtures("plain")
def test_tensorboard_shows_every_epoch_once_after_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    config = config_in(tmp_path, **{"watch.tensorboard": True})
    first = Watch(config, [])
    for metrics in epochs(3, ema=True):
        first.epoch(metrics | {"val_loss": 7.0})
    assert [step for step, _ in scalars(tmp_path / "tensorboard")["val_loss"]] == [0, 1, 2]  # without close, as killed
    second = Watch(config, epochs(1, ema=True))
    for metrics in epochs(4, ema=True)[1:]:
        second.epoch(metrics)
    second.close()
    shown = scalars(tmp_path / "tensorboard")
    assert shown.keys() == epochs(1, ema=True)[0].keys() - {"epoch"}
    assert shown["val_loss"] == [(0, 7.0), (1, 1.0), (2, pytest.approx(2 / 3)), (3, 0.5)]
    first.close()


@pytest.mark.usefixtures("plain")
def test_failing_tensorboard_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    writer = SimpleNamespace(add_scalar=fail, flush=fail, close=fail)
    fake = SimpleNamespace(SummaryWriter=lambda folder, purge_step: writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    watching = Watch(config_in(tmp_path, **{"watch.tensorboard": True}), [])
    for metrics in epochs(2):
        watching.epoch(metrics)
    watching.close()
    assert [record.message.split(";")[0] for record in caplog.records] == ["tensorboard failed (out of order)"]
    assert lines(tmp_path) == epochs(2)


def fail(*args: Any, **kwargs: Any) -> Any:
    raise OSError("out of\norder")


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize(
    ("module", "knob", "value"),
    [("torch.utils.tensorboard", "watch.tensorboard", True), ("wandb", "watch.wandb", "kernels")],
)
def test_missing_package_is_refused(
    module: str, knob: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with refused(f"{knob}=", f"needs the package {knob.split('.')[1]}", "pip install 'sgconvnext[watch]'"):
        Watch(config_in(tmp_path, **{knob: value}), [])


class FakeWandB(ModuleType):
    """The package wandb, as far as we use it; it records the calls."""

    class UsageError(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("wandb")
        self.inits: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = 0

    def init(self, **arguments: Any) -> Any:
        self.inits.append(arguments)
        return SimpleNamespace(id=arguments["id"] or "u7a6vo1k", log=self.log, finish=self.finish)

    def log(self, scalars: dict[str, float], step: int) -> None:
        self.logged.append((step, scalars))

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch, plain: None) -> FakeWandB:
    fake = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_resumed_run_is_the_same_run_in_wandb(tmp_path: Path, wandb: FakeWandB) -> None:
    out = tmp_path / "tiny"
    out.mkdir()
    config = config_in(out, **{"watch.wandb": "kernels"})
    for start, end in ((0, 2), (1, 3)):
        watching = Watch(config, epochs(start))
        for metrics in epochs(end)[start:]:
            watching.epoch(metrics)
        watching.close()
    common = {"project": "kernels", "dir": str(out), "name": "tiny", "config": to_dict(config), "resume": "allow"}
    assert wandb.inits == [common | {"id": None}, common | {"id": "u7a6vo1k"}]
    assert [step for step, _ in wandb.logged] == [0, 1, 1, 2]
    assert wandb.logged[-1][1] == {key: value for key, value in epochs(3)[2].items() if key != "epoch"}
    assert wandb.finished == 2


def test_wandb_without_an_account_is_refused(
    tmp_path: Path, wandb: FakeWandB, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**arguments: Any) -> None:
        raise wandb.UsageError("No API key\nconfigured.")

    monkeypatch.setattr(wandb, "init", init)
    with refused("watch.wandb='kernels'", "No API key configured.", "wandb login"):
        Watch(config_in(tmp_path, **{"watch.wandb": "kernels"}), [])


@pytest.mark.parametrize("call", ["init", "log"])
def test_lost_network_costs_a_warning(
    call: str, tmp_path: Path, wandb: FakeWandB, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(wandb, call, fail)
    watching = Watch(config_in(tmp_path, **{"watch.wandb": "kernels"}), [])
    for metrics in epochs(2):
        watching.epoch(metrics)
    watching.close()
    assert [record.message.split(";")[0] for record in caplog.records] == ["wandb failed (out of order)"]
    assert lines(tmp_path) == epochs(2)


def test_curves_are_drawn_anew_after_every_epoch(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    watching = Watch(config_in(tmp_path), epochs(1, ema=True))
    pictures = []
    for metrics in epochs(3, ema=True)[1:]:
        watching.epoch(metrics)
        pictures.append((tmp_path / "curves.png").read_bytes())
    assert pictures[0] != pictures[1]
    assert sorted(item.name for item in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("count", [1, 12, 300])
def test_curves_are_a_small_picture(count: int, ema: bool, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    watch.draw(epochs(count, ema), tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert (picture.format, picture.size) == ("PNG", (1100, 360))
    assert 5_000 < (tmp_path / "curves.png").stat().st_size < 100_000


def test_curves_leave_out_what_is_no_number(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("matplotlib")
    history = epochs(2) + epochs(3, ema=True)[2:]  # the EMA began later
    history[1] = history[1] | {"val_loss": math.nan, "train_loss": math.inf}
    watch.draw(history, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_heading_tells_the_best_epoch(tmp_path: Path) -> None:
    assert watch._best(epochs(3)) == "best top-1 70.00 % (model, epoch 2)"
    assert watch._best([*epochs(9, ema=True), epochs(1)[0] | {"epoch": 9}]) == "best top-1 83.33 % (model, epoch 8)"
    assert watch._best([epochs(1)[0] | {"ema_top1": 31.0}]) == "best top-1 31.00 % (EMA, epoch 0)"


def test_failing_drawing_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(watch, "draw", fail)
    watching = Watch(config_in(tmp_path), [])
    for metrics in epochs(2):
        watching.epoch(metrics)
    assert [record.message.split(";")[0] for record in caplog.records] == ["curves.png failed (out of order)"]
    assert lines(tmp_path) == epochs(2)
