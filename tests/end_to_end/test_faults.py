"""Every fault of the table in docs/interrupted-runs.md, put into the real train.py once, and what it says."""

import contextlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from training_helpers import (
    command,
    fingerprint,
    metrics,
    micro_run,
    only_line,
    write_config,
    write_images,
)

import train
from sgconvnext.training import build, checkpoint, run_folder
from sgconvnext.training.run import Run

RunHere = Callable[..., None]
AVERAGED = {"ema.decay": 0.9}


def error_line(stderr: str) -> str:
    """The one line of a run that failed; no traceback beside it."""
    [line] = [line for line in stderr.splitlines() if "error: " in line and line.startswith("train.py")]
    assert "Traceback" not in stderr, stderr
    return line


# ---- damaged checkpoints


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three epochs that kept all of its checkpoints."""
    folder = tmp_path_factory.mktemp("finished")
    done = command("train.py", write_config(folder / "a.yaml", **AVERAGED, epochs=3), f"out={folder / 'out'}")
    assert done.returncode == 0, done.stderr
    return folder / "out"


def damage(path: Path, kind: str) -> None:
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    path.write_bytes({"truncated": whole[:-1000], "empty": b"", "junk": b"junk" * 99, "flipped": bytes(flipped)}[kind])


@pytest.mark.parametrize("kind", ["truncated", "empty", "junk", "flipped"])
def test_damaged_checkpoint_is_set_aside_and_the_one_before_it_used(
    kind: str, finished: Path, run_here: RunHere, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out, symlinks=True)
    damage(out / "checkpoint-0003-000000.pth", kind)
    run_here(train, out / "config.yaml", f"out={out}", "resume=auto")
    [told] = [line for line in caplog.messages if "is damaged" in line]
    assert str(out / "checkpoint-0003-000000.pth") in told
    assert f"going on from {out / 'checkpoint-0002-000000.pth'}" in told
    assert (out / "checkpoint-0003-000000.pth.aside").exists()
    assert fingerprint(out / "last.pth") == fingerprint(finished / "last.pth")
    assert len(metrics(out)) == 3


def test_run_without_any_good_checkpoint_is_refused(
    finished: Path, refusal: Callable[..., str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out, symlinks=True)
    for path in out.glob("checkpoint-*.pth"):
        damage(path, "flipped")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    told = refusal(train, out / "config.yaml", f"out={out}", "resume=auto")
    assert "no good checkpoint" in told
    assert "is damaged" in told
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_damaged_checkpoint_that_is_named_is_refused(
    finished: Path, refusal: Callable[..., str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out, symlinks=True)
    damage(out / "best.pth", "flipped")
    assert "is damaged" in refusal(train, out / "config.yaml", f"out={out}", f"resume={out / 'best.pth'}")


# ---- a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fill(place: Path) -> None:
    """Write until not a byte is free."""
    with (place / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(2**16)):
            pass
    with (place / "filler").open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(1)):
            pass


def at_epochs_end(monkeypatch: pytest.MonkeyPatch, acts: dict[int, Callable[[], None]]) -> None:
    """Do something just before the checkpoint of an epoch is written."""
    original = Run.finish_epoch

    def finish(run: Run, line: dict[str, float]) -> None:
        acts.get(int(line["epoch"]), lambda: None)()
        original(run, line)

    monkeypatch.setattr(Run, "finish_epoch", finish)


def test_run_goes_on_while_the_disk_is_full_and_saves_once_it_is_not(
    finished: Path,
    small_disk: Path,
    run_here: RunHere,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = write_config(tmp_path / "a.yaml", **AVERAGED, epochs=3)
    at_epochs_end(monkeypatch, {1: lambda: fill(small_disk), 2: (small_disk / "filler").unlink})
    monkeypatch.setattr(run_folder, "RETRY_S", 0.0)
    run_here(train, path, f"out={small_disk / 'out'}", "save.max_failures=9")
    failed = [line for line in caplog.messages if "No space left" in line and "checkpoint" in line]
    assert 2 <= len(failed) < 9  # at the epoch's end, and with each line of the log after it
    assert all("checkpoint-0001-000000.pth, and the run goes on" in line for line in failed)
    assert fingerprint(small_disk / "out" / "last.pth") == fingerprint(finished / "last.pth")
    assert [line["epoch"] for line in metrics(small_disk / "out")] == [0, 1, 2]


def test_run_ends_after_so_many_failures_with_the_last_good_checkpoint_intact(
    small_disk: Path,
    run_here: RunHere,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, out = write_config(tmp_path / "a.yaml", **AVERAGED, epochs=3), small_disk / "out"
    at_epochs_end(monkeypatch, {1: lambda: fill(small_disk)})
    monkeypatch.setattr(run_folder, "RETRY_S", 0.0)
    with pytest.raises(SystemExit, match=r"^1$"):
        run_here(train, path, f"out={out}", "save.max_failures=3")
    told = only_line("train", capsys.readouterr().err)
    for words in ("No space left", "3 failures in a row", f"last good checkpoint is {out}/checkpoint-0001-000000.pth"):
        assert words in told
    assert checkpoint.load(out / "last.pth")["epoch"] == 0
    assert not list(out.glob("*.partial"))


def test_run_that_cannot_fit_its_checkpoints_is_refused_before_it_starts(
    small_disk: Path, refusal: Callable[..., str], tmp_path: Path
) -> None:
    told = refusal(train, write_config(tmp_path / "a.yaml"), f"out={small_disk / 'out'}", "save.keep=100")
    for words in (str(small_disk / "out"), "102 more checkpoints", "save.keep"):
        assert words in told


@pytest.mark.parametrize("processes", [0, 2])
def test_every_process_ends_when_the_first_cannot_save(processes: int, tmp_path: Path) -> None:
    path = write_config(tmp_path / "a.yaml", **{"optim.batch_per_device": 8})
    done = command(
        *("tests/end_to_end/inject.py", "full:1", path, f"out={tmp_path / 'out'}", "save.max_failures=2"),
        processes=processes,
    )
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("train.py: error")]
    assert len(lines) == 1
    assert "No space left" in lines[0]
    assert "2 failures in a row" in lines[0]


# ---- numbers that are not finite


@pytest.mark.parametrize("processes", [0, 2])
def test_loss_of_nan_names_update_rank_and_module_and_lists_the_images(processes: int, tmp_path: Path) -> None:
    write_images(tmp_path / "set", {"train": {"cat": 40, "dog": 40}, "val": {"cat": 2, "dog": 3}})
    knobs = {"data.dataset": "", "data.root": str(tmp_path / "set"), "model.num_classes": None}
    rank, batch = max(0, processes - 1), 16 // max(1, processes)
    path, out = write_config(tmp_path / "a.yaml", **knobs, **{"optim.batch_per_device": batch}), tmp_path / "out"
    done = command("tests/end_to_end/inject.py", f"nan:7:{rank}", path, f"out={out}", processes=processes)
    assert done.returncode == 1
    [told] = [line for line in done.stderr.splitlines() if line.startswith("train.py: error")]
    assert f"epoch 1, update 2, rank {rank}: loss nan" in told
    assert "first not finite: the images" in told
    assert str(out / "nonfinite.json") in told
    report = json.loads((out / "nonfinite.json").read_text())
    assert (report["epoch"], report["update"], [item["rank"] for item in report["ranks"]]) == (1, 2, [rank])
    images = report["ranks"][0]["images"]
    assert len(images) == batch
    assert all(Path(image).is_file() for image in images)
    assert checkpoint.load(out / "last.pth")["epoch"] == 0  # nothing was saved after it


def test_infinite_bias_is_found_in_its_module(
    run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = build.create_model

    def broken(*arguments: Any, **options: Any) -> Any:
        model = original(*arguments, **options)
        model.stages[2].blocks[0].mlp.fc1.bias.data[3] = float("inf")
        return model

    monkeypatch.setattr(build, "create_model", broken)
    with pytest.raises(SystemExit, match=r"^1$"):
        micro_run(run_here, tmp_path)
    told = only_line("train", capsys.readouterr().err)
    assert "epoch 0, update 1, rank 0" in told
    assert "first not finite: stages.2.blocks.0.mlp.fc1" in told


# ---- broken images


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """80 training images, four of them odd and one broken, and eight validation images, one of them broken."""
    root = write_images(tmp_path / "set", {"train": {"cat": 40, "dog": 40}, "val": {"cat": 4, "dog": 4}})
    rng, folder = np.random.default_rng(0), root / "train" / "cat"
    noise = Image.fromarray(rng.integers(0, 256, (48, 48, 3), "uint8"))
    noise.convert("CMYK").save(folder / "0.jpg")
    noise.quantize(16).save(folder / "1.png")
    Image.fromarray(rng.integers(0, 2**16, (48, 48), "uint16")).save(folder / "2.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    noise.save(folder / "3.jpg", exif=exif)
    whole = (folder / "4.png").read_bytes()
    (folder / "4.png").write_bytes(whole[: len(whole) // 2])
    (folder / "0.png").unlink()
    (folder / "3.png").unlink()
    (root / "val" / "dog" / "3.png").write_bytes(b"")
    return root


def picture_run(run_here: RunHere, root: Path, folder: Path, *overrides: str, **knobs: Any) -> Path:
    dataset = {"data.dataset": "", "data.root": str(root), "model.num_classes": None, "data.workers": 2}
    return micro_run(run_here, folder, "epochs=1", *overrides, **dataset, **knobs)


def test_odd_images_are_decoded_broken_ones_replaced_and_each_told_by_path(
    pictures: Path, run_here: RunHere, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = picture_run(run_here, pictures, tmp_path, "data.max_unreadable=0.2")
    folder = pictures / "train" / "cat"
    told = "\n".join(caplog.messages)
    for fault, name in [("CMYK", "0.jpg"), ("palette", "1.png"), ("16-bit", "2.png"), ("EXIF-rotated", "3.jpg")]:
        assert told.count(f"{fault} image: {folder / name}") == 1, told
    assert told.count(f"unreadable image: {folder / '4.png'} (") == 1
    assert told.count(f"unreadable image: {pictures / 'val' / 'dog' / '3.png'} (") == 1
    [line] = metrics(out)
    assert line["unreadable"] == 2
    assert line["val_top5"] == 100  # of the seven that are left


def test_too_many_broken_images_end_the_run(
    pictures: Path, run_here: RunHere, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split, words in [("train", "training images"), ("val", "validation images")]:
        limit = 0.0 if split == "train" else 0.05  # one of 81 is fewer than that, one of eight is more
        with pytest.raises(SystemExit, match=r"^1$"):
            picture_run(run_here, pictures, tmp_path / split, f"data.max_unreadable={limit}")
        told = only_line("train", capsys.readouterr().err)
        assert re.search(rf"1 of \d+ {words} cannot be read, more than data.max_unreadable={limit}", told)


def test_batch_without_a_readable_image_ends_the_run_in_one_line(
    run_here: RunHere, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_images(tmp_path / "set", {"train": {"cat": 20, "dog": 20}, "val": {"cat": 1, "dog": 1}})
    for image in (root / "train").rglob("*.png"):
        image.write_bytes(b"no image")
    for workers in (0, 2):
        with pytest.raises(SystemExit, match=r"^1$"):
            picture_run(run_here, root, tmp_path / str(workers), f"data.workers={workers}")
        told = only_line("train", capsys.readouterr().err)
        assert told.startswith("train.py: error: no image of a batch of 16 can be read, the first is /")


def test_decompression_bomb_is_not_decoded(
    run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_images(tmp_path / "set", {"train": {"cat": 40, "dog": 40}, "val": {"cat": 1, "dog": 1}})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 32 * 32)
    Image.new("L", (64, 64)).save(root / "train" / "cat" / "7.png")  # four times that
    picture_run(run_here, root, tmp_path, "data.max_unreadable=0.02")
    [told] = [line for line in caplog.messages if "7.png" in line]
    assert "unreadable image" in told
    assert "decompression bomb" in told


def test_images_that_changed_between_two_runs_are_refused_and_moved_ones_are_not(
    run_here: RunHere, refusal: Callable[..., str], tmp_path: Path
) -> None:
    root = write_images(tmp_path / "set", {"train": {"cat": 40, "dog": 40}, "val": {"cat": 2, "dog": 2}})
    out = picture_run(run_here, root, tmp_path)
    moved = root.rename(tmp_path / "moved")
    run_here(train, out / "config.yaml", f"out={out}", "resume=auto", f"data.root={moved}")
    (moved / "train" / "cat" / "0.png").rename(moved / "train" / "dog" / "99.png")  # as many, but one relabelled
    (moved / "val" / "cat" / "0.png").unlink()
    told = refusal(train, out / "config.yaml", f"out={out}", "resume=auto", f"data.root={moved}")
    for words in ("training_images=80 (", "now it is 80 (", "validation_images=4 (", "now it is 3 ("):
        assert words in told
    assert "allow_change=training_images,validation_images" in told


# ---- loader workers


def test_dead_loader_worker_ends_the_run_in_one_line(tmp_path: Path) -> None:
    path = write_config(tmp_path / "a.yaml", **{"data.workers": 2})
    done = command("tests/end_to_end/inject.py", "worker:30", path, f"out={tmp_path / 'out'}")
    assert done.returncode == 1
    told = error_line(done.stderr)
    assert re.search(r"DataLoader worker \(pid.* (killed by signal: Killed|exited unexpectedly)", told)
    assert "data.workers" in told
    assert "resume=auto" in told


def test_torchrun_restarts_a_run_whose_loader_worker_died(finished: Path, tmp_path: Path) -> None:
    knobs = {"optim.batch_per_device": 8, "data.workers": 1}
    path = write_config(tmp_path / "a.yaml", **AVERAGED, **knobs)
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert command("train.py", path, f"out={whole}", processes=2).returncode == 0
    arguments = ("tests/end_to_end/inject.py", "worker:30", path, f"out={out}", "resume=auto", "save.every=2")
    done = command(*arguments, processes=2, restarts=1)
    assert done.returncode == 0, done.stderr
    assert len(re.findall("^train.py: error: DataLoader worker", done.stderr, re.MULTILINE)) == 1
    assert "Traceback" not in done.stderr
    assert fingerprint(out / "last.pth") == fingerprint(whole / "last.pth")


# ---- looking before


def test_check_says_what_the_run_will_need_and_leaves_nothing(tmp_path: Path) -> None:
    root = write_images(tmp_path / "set", {"train": {"cat": 30, "dog": 50}, "val": {"cat": 4, "dog": 4}})
    knobs = {"data.dataset": "", "data.root": str(root), "model.num_classes": None}
    path = write_config(tmp_path / "a.yaml", **knobs, **{"optim.warmup_epochs": 1, "optim.batch_per_device": 8})
    done = command("train.py", path, f"out={tmp_path / 'out'}", "check")
    assert done.returncode == 0, done.stderr
    for words in (
        "80 training and 8 validation images, 30 (cat) to 50 (dog) images per class",
        "global batch 16 = 8 per device x 1 cpu x 2 accumulation; 5 updates per epoch, 10 in all",
        "learning rate: peak 0.001 after 5 updates of warm-up",
        "stage 1: 64 tokens (8x8); kernels for 8x8 in 2 directions, 5 scales of 4 taps",
        "memory: about 0.0",
        "GiB free in",
        "checked: data, arithmetic, memory and disk",
    ):
        assert words in done.stderr
    assert not (tmp_path / "out").exists()


def test_check_refuses_what_the_run_would_refuse(refusal: Callable[..., str], tmp_path: Path) -> None:
    path = write_config(tmp_path / "a.yaml")
    assert "did you mean 'optim.lr'?" in refusal(train, path, "check", "optim.lrr=1")
    assert "15 training images" in refusal(train, path, "data.train_samples=15", "check")


def test_run_that_needs_more_memory_than_there_is_is_refused(refusal: Callable[..., str], tmp_path: Path) -> None:
    huge = {"optim.global_batch": 10**7, "optim.batch_per_device": 10**7, "data.train_samples": 10**7}
    told = refusal(train, write_config(tmp_path / "a.yaml", **huge), f"out={tmp_path / 'out'}")
    for words in ("optim.batch_per_device=10000000 does not fit into", "GiB", "model.grad_checkpointing"):
        assert words in told
