"""A run that was stopped anywhere and resumed ends bit for bit as the run that never stopped, and how it would not."""

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.amp import GradScaler
from training_helpers import (
    AUGMENTED,
    DISKS,
    TIMING,
    command,
    disk_without,
    fingerprint,
    metrics,
    micro_run,
    stop_in,
    write_config,
    write_images,
)

import validate
from sgconvnext.training import checkpoint, data, engine, optim, rng
from sgconvnext.training.run import Run
from sgconvnext.training.run_folder import RunFolder

# everything that draws random numbers or keeps a state, in 2 epochs of 5 updates of 2 forwards
WHOLE = AUGMENTED | {"ema.decay": 0.9, "optim.batch_per_device": 8, "optim.warmup_epochs": 1, "optim.clip_grad": 1.0}
RunHere = Callable[..., None]


def same_run(got: Path, want: Path) -> bool:
    lines = [[{**line, **dict.fromkeys(TIMING)} for line in metrics(out)] for out in (got, want)]
    return fingerprint(got / "last.pth") == fingerprint(want / "last.pth") and lines[0] == lines[1]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The run that is never stopped, with any knobs, made once."""
    made: dict[str, Path] = {}

    def run(run_here: RunHere, **knobs: Any) -> Path:
        key = repr(sorted(knobs.items()))
        if key not in made:
            made[key] = micro_run(run_here, tmp_path_factory.mktemp("straight"), **knobs)
        return made[key]

    return run


def stopped(run_here: RunHere, folder: Path, update: int, **knobs: Any) -> Path:
    with pytest.MonkeyPatch.context() as patched:
        stop_in(update, patched)
        with pytest.raises(SystemExit, match=r"^143$"):
            micro_run(run_here, folder, "resume=auto", **knobs)
    return folder / "out"


@pytest.mark.parametrize("update", [1, 3, 5, 6, 9, 10])  # 5 and 10 are followed by an evaluation, which is given up
def test_stop_at_any_update_changes_nothing(
    update: int, straight: Callable[..., Path], run_here: RunHere, tmp_path: Path
) -> None:
    out = stopped(run_here, tmp_path, update, **WHOLE)
    assert len(metrics(out)) == (update - 1) // 5
    micro_run(run_here, tmp_path, "resume=auto", **WHOLE)
    assert same_run(out, straight(run_here, **WHOLE))


def test_many_stops_change_nothing_nor_do_loader_workers(
    straight: Callable[..., Path], run_here: RunHere, tmp_path: Path
) -> None:
    for update, workers in [(2, 2), (4, 0), (8, 1)]:
        out = stopped(run_here, tmp_path, update, **WHOLE, **{"data.workers": workers})
    micro_run(run_here, tmp_path, "resume=auto", **WHOLE, **{"data.workers": 2})
    assert same_run(out, straight(run_here, **WHOLE))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_stop_changes_nothing_in_mixed_precision(
    precision: str, straight: Callable[..., Path], run_here: RunHere, tmp_path: Path
) -> None:
    knobs = WHOLE | {"run.precision": precision}
    out = stopped(run_here, tmp_path, 3, **knobs)
    micro_run(run_here, tmp_path, "resume=auto", **knobs)
    assert same_run(out, straight(run_here, **knobs))


def test_stop_at_an_epochs_end_changes_nothing(
    straight: Callable[..., Path], run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        original = Run.finish_epoch

        def killed(run: Run, metrics: dict[str, float]) -> None:
            original(run, metrics)
            raise KeyboardInterrupt

        patched.setattr(Run, "finish_epoch", killed)
        with pytest.raises(KeyboardInterrupt):
            micro_run(run_here, tmp_path, **WHOLE)
    assert len(metrics(tmp_path / "out")) == 1
    out = micro_run(run_here, tmp_path, "resume=auto", **WHOLE)
    assert same_run(out, straight(run_here, **WHOLE))


@pytest.mark.parametrize(
    "lost",
    ["sgconvnext.training.run_folder.RunFolder.point", "sgconvnext.training.watch.Watch.epoch"],
    ids=["links", "metrics"],
)
def test_kill_between_the_files_of_an_epoch_changes_nothing(
    lost: str, straight: Callable[..., Path], run_here: RunHere, tmp_path: Path
) -> None:
    """The checkpoint was written, but then neither the link best.pth nor the line of metrics."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(lost, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            micro_run(run_here, tmp_path, **WHOLE)
    out = micro_run(run_here, tmp_path, "resume=auto", **WHOLE)
    assert same_run(out, straight(run_here, **WHOLE))
    assert fingerprint(out / "best.pth") == fingerprint(straight(run_here, **WHOLE) / "best.pth")


# ---- disks without symbolic links


@pytest.mark.parametrize("disk", ["hard links", "copies"])
def test_run_on_a_disk_without_symbolic_links_ends_as_any_other(
    disk: str,
    straight: Callable[..., Path],
    run_here: RunHere,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    disk_without(monkeypatch, *DISKS[disk])
    knobs = WHOLE | {"save.every": 2, "save.keep": 1}
    with caplog.at_level(logging.INFO):
        out = stopped(run_here, tmp_path, 8, **knobs)
        micro_run(run_here, tmp_path, "resume=auto", **knobs)
    assert f"; it has no symbolic links, so last.pth and best.pth are {disk}" in caplog.text
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    other = straight(run_here, **WHOLE)
    assert same_run(out, other)
    assert fingerprint(out / "best.pth") == fingerprint(other / "best.pth")
    best, last = RunFolder(out).behind("best.pth"), RunFolder(out).file(2, 0)
    assert RunFolder(out).behind("last.pth") == last
    assert set(RunFolder(out).files()) == {best, last}  # all others are gone
    capsys.readouterr()
    run_here(validate, "--checkpoint", out / "best.pth")
    top1 = max(line["val_top1"] for line in metrics(out))
    assert json.loads(capsys.readouterr().out)["top1"] <= top1
    micro_run(run_here, tmp_path, f"resume={out / 'last.pth'}", **knobs)
    assert not list(out.glob("*.aside*"))


def test_best_is_found_again_where_moving_the_folder_has_lost_its_link(
    run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As cp -r does onto a disk without links."""
    out = micro_run(run_here, tmp_path, **{"epochs": 3, "optim.lr": 1e-30, "optim.min_lr": 0.0})  # no epoch is better
    assert RunFolder(out).behind("best.pth") == RunFolder(out).file(1, 0)
    for name in ("best.pth", "last.pth"):
        (out / name).unlink()
    disk_without(monkeypatch, *DISKS["copies"])
    changed = {"epochs": 4, "save.keep": 1, "optim.lr": 1e-30, "optim.min_lr": 0.0}
    micro_run(run_here, tmp_path, "resume=auto", "allow_change=epochs", **changed)
    assert RunFolder(out).files() == [RunFolder(out).file(4, 0), RunFolder(out).file(1, 0)]
    assert fingerprint(out / "best.pth") == fingerprint(RunFolder(out).file(1, 0))


SHARDS = {"data.dataset": "wds/toy", "data.train_samples": None, "data.val_samples": None, "model.num_classes": 2}


@pytest.mark.parametrize("workers", [0, 2])
def test_stop_changes_nothing_for_shards(workers: int, run_here: RunHere, tmp_path: Path, shard_folder: Path) -> None:
    names = {"data.root": str(shard_folder), "data.train_split": "train-{0..2}.tar", "data.val_split": "val-0.tar"}
    knobs = WHOLE | SHARDS | names | {"data.workers": workers}
    whole = micro_run(run_here, tmp_path / "whole", **knobs)
    out = stopped(run_here, tmp_path / "stopped", 3, **knobs)
    micro_run(run_here, tmp_path / "stopped", "resume=auto", **knobs)
    assert same_run(out, whole)


@pytest.fixture
def shard_folder(tmp_path: Path) -> Path:
    """90 training images in three shards and 9 validation images in one."""
    wds = pytest.importorskip("webdataset")
    write_images(tmp_path / "images", {"all": {"a": 50, "b": 50}})
    files = sorted((tmp_path / "images").rglob("*.png"))
    for name, part in {
        "train-0": files[:20],
        "train-1": files[20:65],
        "train-2": files[65:90],
        "val-0": files[91:],
    }.items():
        with wds.TarWriter(str(tmp_path / f"{name}.tar")) as tar:
            for file in part:
                content = {"png": file.read_bytes(), "cls": int(file.parent.name == "b")}
                tar.write({"__key__": f"{file.parent.name}{file.stem}", **content})
    return tmp_path


def forget_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rng, "restore", lambda *_: None)


def forget_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "load_state", lambda *_: None)


def forget_average(monkeypatch: pytest.MonkeyPatch) -> None:
    original = checkpoint.weights
    monkeypatch.setattr(checkpoint, "weights", lambda state, _, path: original(state, False, path))


def forget_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    original = engine.Progress

    def progress(epoch: int, update: int = 0, **_: Any) -> engine.Progress:
        return original(epoch, update)

    monkeypatch.setattr(engine, "Progress", progress)


def forget_position_among_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Run.batches

    def batches(run: Run) -> Any:
        run.drawn_now = None
        return original(run)

    monkeypatch.setattr(Run, "batches", batches)


def forget_history(monkeypatch: pytest.MonkeyPatch) -> None:
    original = checkpoint.load
    monkeypatch.setattr(checkpoint, "load", lambda path: original(path) | {"history": []})


def repeat_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    original = data.TrainLoader.epoch
    monkeypatch.setattr(data.TrainLoader, "epoch", lambda loader, number, skip: original(loader, number, 0))


@pytest.mark.parametrize(
    "forget",
    [
        *(forget_random_numbers, forget_position_among_random_numbers, forget_optimizer, forget_average),
        *(forget_sums, forget_history, repeat_batches),
    ],
)
def test_run_that_does_not_take_everything_up_ends_otherwise(
    forget: Callable[[pytest.MonkeyPatch], None],
    straight: Callable[..., Path],
    run_here: RunHere,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = stopped(run_here, tmp_path, 8, **WHOLE)
    forget(monkeypatch)
    micro_run(run_here, tmp_path, "resume=auto", **WHOLE)
    assert not same_run(out, straight(run_here, **WHOLE))


def test_loss_scale_that_is_not_taken_up_is_seen(
    straight: Callable[..., Path], run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    knobs = WHOLE | {"run.precision": "fp16"}
    out = stopped(run_here, tmp_path, 8, **knobs)
    monkeypatch.setattr(GradScaler, "load_state_dict", lambda *_: None)
    micro_run(run_here, tmp_path, "resume=auto", **knobs)
    assert not same_run(out, straight(run_here, **knobs))


def test_two_processes_that_stop_in_the_middle_change_nothing(
    run_here: RunHere, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # running means are what a process could keep for itself
    network = {"model.name": "resnet10t", "model.kwargs": {}, "model.drop": 0.2}
    knobs = WHOLE | network | {"optim.batch_per_device": 4, "data.workers": 2}
    path = write_config(tmp_path / "a.yaml", **knobs)
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert command("train.py", path, f"out={whole}", processes=2).returncode == 0
    done = command("tests/end_to_end/inject.py", "stop:7:1", path, f"out={out}", "resume=auto", processes=2)
    assert done.returncode != 0
    assert re.search(r"exitcode\s*: 143", done.stderr)
    assert "SIGTERM: stopped after" in done.stderr  # in the second epoch
    assert command("train.py", path, f"out={out}", "resume=auto", processes=2).returncode == 0
    assert same_run(out, whole)
    run_here(validate, "--checkpoint", whole / "last.pth")
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(metrics(whole)[-1]["val_loss"], rel=1e-6)
