"""train.py and validate.py as a user runs them: one process, torchrun, resuming, and every refusal before training."""

import json
import logging
import math
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from helpers import relative_error
from timm.models import create_model, load_checkpoint
from training_helpers import (
    AUGMENTED,
    CONFIGS,
    MICRO,
    TIMING,
    TREE,
    command,
    flatten,
    metrics,
    micro_run,
    only_line,
    write_config,
    write_images,
)

import train
import validate
from sgconvnext.training import checkpoint, engine, run_folder
from sgconvnext.training.config import Config, load_config, to_dict

KEYS = [
    *("epoch", "train_loss", "val_top1", "val_top5", "val_loss"),
    *("lr", "grad_norm", "skipped", "unreadable", *TIMING),
]
EMA_KEYS = [*KEYS[:5], "ema_top1", "ema_top5", "ema_loss", *KEYS[5:]]
LINE = re.compile(r"^epoch (\d+) update (\d+)/(\d+) loss (\d+\.\d+) ", re.MULTILINE)


def losses(log: str) -> list[float]:
    """Of all ten updates, in order."""
    found = LINE.findall(log)
    order = [(int(epoch), int(update)) for epoch, update, _, _ in found]
    assert order == [(epoch, update) for epoch in (0, 1) for update in (1, 2, 3, 4, 5)]
    return [float(loss) for _, _, _, loss in found]


def weights(path: Path, key: str = "state_dict") -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in checkpoint.load(path)[key].values()])


def validated(
    run_here: Callable[..., None], capsys: pytest.CaptureFixture[str], *arguments: object
) -> dict[str, float]:
    capsys.readouterr()
    run_here(validate, "--checkpoint", *arguments)
    [line] = capsys.readouterr().out.splitlines()
    result: dict[str, float] = json.loads(line)
    return result


# ---- one run, looked at from all sides


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the log of a run in one process."""
    folder = tmp_path_factory.mktemp("first")
    out = folder / "out"
    done = command("train.py", write_config(folder / "a.yaml", **{"ema.decay": 0.9}), f"out={out}")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    return out, done.stderr


def test_run_writes_its_configuration_metrics_and_checkpoints(first: tuple[Path, str]) -> None:
    out, log = first
    files = ["checkpoint-0001-000000.pth", "checkpoint-0002-000000.pth"]
    named = {"config.yaml", "metrics.jsonl", "curves.png", "last.pth", "best.pth"}
    assert {item.name for item in out.iterdir()} == {*files, *(f"{file}.sha256" for file in files), *named}
    assert (out / "last.pth").resolve().name == files[1]
    assert (out / "best.pth").resolve().name in files
    lines = metrics(out)
    assert [list(line) for line in lines] == [EMA_KEYS, EMA_KEYS]
    assert [line["epoch"] for line in lines] == [0, 1]
    for epoch, line in enumerate(lines):
        assert line["train_loss"] == pytest.approx(sum(losses(log)[5 * epoch : 5 * epoch + 5]) / 5, rel=1e-5)
        for key in ("val_top1", "val_top5", "ema_top1", "ema_top5"):  # percent of 7 images
            assert line[key] * 7 / 100 == pytest.approx(round(line[key] * 7 / 100), abs=1e-9)
            assert 0 <= line[key] <= 100
        assert line["val_top1"] <= line["val_top5"]
        assert line["images_per_s"] > 0
        assert 0 <= line["data_wait"] < 1
        assert 0.05 < line["memory_gib"] < 10
        assert (line["skipped"], line["unreadable"]) == (0, 0)
        norms = [float(norm) for norm in re.findall(rf"^epoch {epoch} update .* norm (\S+)", log, re.MULTILINE)]
        assert line["grad_norm"] == pytest.approx(sum(norms) / 5, rel=1e-2)
    assert lines[1]["lr"] == 1e-6 + 0.5 * (1e-3 - 1e-6) * (1 + math.cos(math.pi * 9 / 10))
    assert lines[1]["train_loss"] < lines[0]["train_loss"]


def test_resolved_configuration_loads_back_equal(first: tuple[Path, str]) -> None:
    out, _ = first
    config = load_config(out / "config.yaml")
    assert to_dict(config) == checkpoint.load(out / "last.pth")["args"]
    changed = {"out": str(out), "ema.decay": 0.9, "model.img_size": 32}
    assert flatten(to_dict(config)) == flatten(to_dict(Config())) | flatten(TREE) | changed
    assert flatten(yaml.safe_load((out / "config.yaml").read_text())).keys() == flatten(to_dict(Config())).keys()


def test_log_states_the_arithmetic_of_the_batch(first: tuple[Path, str]) -> None:
    _, log = first
    for part in ("10 classes", "80 training and 7 validation images", "sgconvnext_atto", "fp32"):
        assert part in log
    assert "global batch 16 = 16 per device x 1 cpu x 1 accumulation; 5 updates per epoch, 10 in all" in log


def test_checkpoints_have_timms_keys_and_the_metrics_of_their_epoch(first: tuple[Path, str]) -> None:
    out, _ = first
    last, best = checkpoint.load(out / "last.pth"), checkpoint.load(out / "best.pth")
    timm_keys = {"state_dict", "state_dict_ema", "optimizer", "epoch", "arch", "args", "version", "metric"}
    assert timm_keys <= set(last)
    assert last["version"] == 2
    assert (last["arch"], last["epoch"], last["history"]) == ("sgconvnext_atto", 1, metrics(out))
    assert best["history"] == metrics(out)[: best["epoch"] + 1]
    scores = [max(line["val_top1"], line["ema_top1"]) for line in metrics(out)]
    assert best["epoch"] == scores.index(max(scores))
    assert best["metric"] == last["best"] == max(scores)
    assert not any(key.startswith(("module.", "_orig_mod.")) for key in last["state_dict"])


@pytest.mark.parametrize("ema", [False, True])
def test_timm_reads_the_checkpoint_of_a_run(ema: bool, first: tuple[Path, str]) -> None:
    out, _ = first
    model = create_model("sgconvnext_atto", num_classes=10, img_size=32, **MICRO)
    load_checkpoint(model, str(out / "last.pth"), use_ema=ema)
    got = torch.cat([tensor.flatten() for tensor in model.state_dict().values()])
    assert torch.equal(got, weights(out / "last.pth", "state_dict_ema" if ema else "state_dict"))
    assert not torch.equal(weights(out / "last.pth"), weights(out / "last.pth", "state_dict_ema"))


@pytest.mark.parametrize(("processes", "ema"), [(0, False), (3, True)])
def test_validation_repeats_the_runs_own_numbers_whatever_the_processes(
    processes: int, ema: bool, first: tuple[Path, str]
) -> None:
    out, _ = first
    done = command("validate.py", "--checkpoint", out / "last.pth", *["--use-ema"] * ema, processes=processes)
    assert done.returncode == 0, done.stderr
    [line] = done.stdout.splitlines()
    result, own = json.loads(line), metrics(out)[-1]
    assert list(result) == ["top1", "top5", "loss", "count", "unreadable"]
    assert result["count"] == 7
    kind = "ema" if ema else "val"
    assert result["top1"] == pytest.approx(own[f"{kind}_top1"], rel=1e-12)
    assert result["top5"] == pytest.approx(own[f"{kind}_top5"], rel=1e-12)
    assert result["loss"] == pytest.approx(own[f"{kind}_loss"], rel=1e-6)
    assert own["val_loss"] != pytest.approx(own["ema_loss"], rel=1e-4)


def same_run(out: Path, log: str, first: tuple[Path, str]) -> None:
    """Ten updates and two evaluations agree with the first run's, whatever the batch was divided into."""
    assert losses(log) == pytest.approx(losses(first[1]), rel=1e-4)
    for got, want in zip(metrics(out), metrics(first[0]), strict=True):
        assert list(got) == EMA_KEYS
        assert got["lr"] == want["lr"]
        for key in ("train_loss", "val_loss", "ema_loss"):
            assert got[key] == pytest.approx(want[key], rel=1e-4)
    for key in ("state_dict", "state_dict_ema"):
        assert relative_error(weights(out / "last.pth", key), weights(first[0] / "last.pth", key)) <= 1e-3


def test_two_processes_that_accumulate_have_the_losses_of_one(first: tuple[Path, str], tmp_path: Path) -> None:
    path = write_config(tmp_path / "a.yaml", **{"ema.decay": 0.9, "optim.batch_per_device": 4})
    out = tmp_path / "out"
    done = command("train.py", path, f"out={out}", processes=2)
    assert done.returncode == 0, done.stderr
    assert "16 = 4 per device x 2 cpu x 2 accumulation" in done.stderr
    same_run(out, done.stderr, first)
    assert not any(key.startswith("module.") for key in checkpoint.load(out / "last.pth")["state_dict"])


def test_accumulation_does_not_change_the_losses(
    first: tuple[Path, str], run_here: Callable[..., None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    out = micro_run(run_here, tmp_path, **{"ema.decay": 0.9, "optim.batch_per_device": 4})
    assert "16 = 4 per device x 1 cpu x 4 accumulation" in caplog.text
    same_run(out, "\n".join(caplog.messages), first)


def test_three_processes_train_and_validate_on_sets_they_do_not_divide(
    run_here: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"data.train_samples": 20, "optim.global_batch": 9, "optim.batch_per_device": 3}
    out = tmp_path / "out"
    done = command("train.py", write_config(tmp_path / "a.yaml", epochs=1, **sizes), f"out={out}", processes=3)
    assert done.returncode == 0, done.stderr
    assert "9 = 3 per device x 3 cpu x 1 accumulation; 2 updates per epoch" in done.stderr
    [line] = metrics(out)
    assert list(line) == KEYS
    result = validated(run_here, capsys, out / "best.pth")  # one process
    assert result["count"] == 7
    assert [result["top1"], result["top5"]] == pytest.approx([line["val_top1"], line["val_top5"]], rel=1e-12)
    assert result["loss"] == pytest.approx(line["val_loss"], rel=1e-6)


def test_resume_auto_goes_on_to_the_new_number_of_epochs(
    first: tuple[Path, str], run_here: Callable[..., None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    out = tmp_path / "out"
    shutil.copytree(first[0], out)
    before, earlier = weights(out / "last.pth"), metrics(out)
    run_here(train, out / "config.yaml", f"out={out}", "epochs=4", "resume=auto", "allow_change=epochs")
    assert f"going on from {out / 'checkpoint-0002-000000.pth'}, after 2 epochs and 0 updates" in caplog.text
    assert metrics(out)[:2] == earlier
    assert [line["epoch"] for line in metrics(out)] == [0, 1, 2, 3]
    assert LINE.findall("\n".join(caplog.messages))[0][:3] == ("2", "1", "5")
    assert checkpoint.load(out / "last.pth")["epoch"] == 3
    assert relative_error(weights(out / "last.pth"), before) >= 1e-4
    assert load_config(out / "config.yaml").epochs == 4


# ---- in this process


@pytest.mark.parametrize("name", ["sgconvnext_atto", "convnext_atto"])
def test_demo_configuration_trains_our_model_and_timms(
    name: str, run_here: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["epochs=1", "optim.warmup_epochs=0", "data.img_size=32", "run.device=cpu", f"model.kwargs={MICRO}"]
    run_here(train, CONFIGS / "digits.yaml", f"model.name={name}", f"out={tmp_path / 'out'}", *small)
    [line] = metrics(tmp_path / "out")
    assert list(line) == KEYS
    assert line["train_loss"] < 1.02 * math.log(10)
    assert checkpoint.load(tmp_path / "out" / "last.pth")["arch"] == name
    capsys.readouterr()
    run_here(validate, "--checkpoint", tmp_path / "out" / "best.pth")
    result = json.loads(capsys.readouterr().out)
    assert (result["count"], result["top1"], result["loss"]) == (360, line["val_top1"], line["val_loss"])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_whole_recipe_trains_in_mixed_precision(precision: str, run_here: Callable[..., None], tmp_path: Path) -> None:
    recipe = [
        *("run.device=cpu", "data.dataset=synthetic", "data.img_size=32", "data.workers=0", "data.train_samples=16"),
        *("data.val_samples=3", "model.name=sgconvnext_atto", "model.num_classes=10", f"model.kwargs={MICRO}"),
        *("epochs=2", "optim.warmup_epochs=1", "optim.global_batch=8", "optim.batch_per_device=4"),
    ]
    run_here(train, CONFIGS / "imagenet.yaml", f"out={tmp_path}", f"run.precision={precision}", *recipe)
    lines = metrics(tmp_path)
    assert [list(line) for line in lines] == [EMA_KEYS, EMA_KEYS]
    assert all(math.isfinite(line["train_loss"]) for line in lines)
    assert weights(tmp_path / "last.pth").isfinite().all()


def test_same_seed_gives_the_same_run_and_another_seed_another(run_here: Callable[..., None], tmp_path: Path) -> None:
    runs = [
        micro_run(run_here, tmp_path / str(i), f"seed={seed}", **(AUGMENTED | {"epochs": 1}))
        for i, seed in enumerate([0, 0, 1])
    ]
    first, again, other = (weights(run / "last.pth") for run in runs)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    first_loss, again_loss, other_loss = (metrics(run)[0]["train_loss"] for run in runs)
    assert first_loss == again_loss != other_loss


def test_resume_auto_starts_anew_where_there_is_nothing(run_here: Callable[..., None], tmp_path: Path) -> None:
    assert len(metrics(micro_run(run_here, tmp_path, "resume=auto", "epochs=1"))) == 1


def test_best_checkpoint_is_kept_while_later_epochs_are_worse_also_after_resuming(
    run_here: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([40.0, 50.0, 45.0, 48.0, 60.0, 55.0])
    rest = {"top5": 100.0, "loss": 1.0, "count": 7, "unreadable": 0}
    monkeypatch.setattr(engine, "evaluate", lambda *_: {"top1": next(scores), **rest})
    out = micro_run(run_here, tmp_path, "epochs=3")
    assert (checkpoint.load(out / "last.pth")["epoch"], checkpoint.load(out / "best.pth")["epoch"]) == (2, 1)
    more = ["epochs=4", "allow_change=epochs"]
    micro_run(run_here, tmp_path, "resume=auto", *more)
    assert (checkpoint.load(out / "last.pth")["epoch"], checkpoint.load(out / "best.pth")["epoch"]) == (3, 1)
    assert checkpoint.load(out / "last.pth")["best"] == 50.0
    # from the best one: the epochs after it are run again, and have one line each
    micro_run(run_here, tmp_path, f"resume={out / 'best.pth'}", *more)
    assert [(line["epoch"], line["val_top1"]) for line in metrics(out)] == [(0, 40), (1, 50), (2, 60), (3, 55)]
    assert checkpoint.load(out / "best.pth")["epoch"] == 2
    aside = {path.name for path in out.glob("*.aside")}  # what had come after it, and is nobody's future any more
    assert aside == {"checkpoint-0003-000000.pth.aside", "checkpoint-0004-000000.pth.aside"}


def test_best_of_two_equal_epochs_stays_the_first_after_resuming(
    run_here: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = {"top1": 50.0, "top5": 100.0, "loss": 1.0, "count": 7, "unreadable": 0}
    monkeypatch.setattr(engine, "evaluate", lambda *_: result)
    out = micro_run(run_here, tmp_path)
    for _ in range(2):
        assert (out / "best.pth").resolve().name == "checkpoint-0001-000000.pth"
        micro_run(run_here, tmp_path, "resume=auto")


def test_checkpoints_that_were_removed_are_missed(
    first: tuple[Path, str], refusal: Callable[..., str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(first[0], out, symlinks=True)
    for path in out.glob("checkpoint-*"):
        path.unlink()
    assert "lost the checkpoints" in refusal(train, out / "config.yaml", f"out={out}", "resume=auto")
    assert len(metrics(out)) == 2


def test_loss_that_is_not_finite_ends_the_run_and_saves_nothing(
    run_here: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match=r"^1$"):
        micro_run(run_here, tmp_path / "a", "optim.lr=1e30")
    assert re.search(r"epoch 0, update \d+, rank 0: loss nan.*optim\.lr", only_line("train", capsys.readouterr().err))
    bad = {"top1": 0.0, "top5": 0.0, "loss": math.nan, "count": 7, "unreadable": 0}
    monkeypatch.setattr(engine, "evaluate", lambda *_: bad)
    with pytest.raises(SystemExit, match=r"^1$"):
        micro_run(run_here, tmp_path / "b")
    assert "epoch 0: the validation loss is nan" in only_line("train", capsys.readouterr().err)
    for out in (tmp_path / "a" / "out", tmp_path / "b" / "out"):
        assert metrics(out) == []
        assert not list(out.glob("*.pth*"))


def test_second_run_into_the_same_folder_is_refused(
    first: tuple[Path, str], refusal: Callable[..., str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(first[0], out)
    before = {item.name: item.read_bytes() for item in out.iterdir()}
    told = refusal(train, out / "config.yaml", f"out={out}")
    assert f"out={str(out)!r} already holds a run" in told
    assert "resume=auto" in told
    assert {item.name: item.read_bytes() for item in out.iterdir()} == before


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.lr=0.1", ["optim.lr=0.001", "now it is 0.1"]),
        ("optim.batch_per_device=8", ["optim.batch_per_device=16", "now it is 8"]),
        ("ema.decay=0.5", ["ema.decay=0.9", "now it is 0.5"]),
        ("model.name=convnext_atto", ["model.name=sgconvnext_atto", "now it is convnext_atto"]),
        ("run.precision=bf16", ["run.precision=fp32", "now it is bf16"]),
        ("epochs=4", ["epochs=2", "now it is 4"]),
        ("seed=1", ["seed=0", "now it is 1"]),
        ("augment.mixup=0.8", ["augment.mixup=0.0", "now it is 0.8"]),
        ("data.train_samples=96", ["data.train_samples=80", "now it is 96"]),
    ],
    ids=lambda item: item if isinstance(item, str) else "",
)
def test_run_that_would_go_on_differently_is_refused(
    override: str, words: list[str], first: tuple[Path, str], refusal: Callable[..., str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(first[0], out)
    before = {item.name: item.read_bytes() for item in out.iterdir()}
    told = refusal(train, out / "config.yaml", f"out={out}", "resume=auto", override)
    for word in [*words, "checkpoint-0002-000000.pth", f"allow_change={words[0].split('=')[0]}", "model.checkpoint"]:
        assert word in told
    assert {item.name: item.read_bytes() for item in out.iterdir()} == before


def test_folder_of_a_living_run_is_refused(refusal: Callable[..., str], tmp_path: Path) -> None:
    out, config = tmp_path / "out", write_config(tmp_path / "a.yaml")
    with run_folder.lock(out):
        told = refusal(train, config, f"out={out}", "resume=auto")
    assert str(out) in told
    assert "in use" in told
    with run_folder.lock(out):  # the lock went with its run
        pass


def test_folder_that_lost_its_last_checkpoint_is_not_begun_anew(refusal: Callable[..., str], tmp_path: Path) -> None:
    out, config = tmp_path / "out", write_config(tmp_path / "a.yaml")
    out.mkdir()
    (out / "best.pth").write_bytes(b"the best of 300 epochs")
    for resume in ("", "auto"):
        assert str(out) in refusal(train, config, f"out={out}", f"resume={resume}")
    assert (out / "best.pth").read_bytes() == b"the best of 300 epochs"


def test_run_that_starts_from_another_folders_checkpoint_does_not_overwrite_a_third_run(
    first: tuple[Path, str], refusal: Callable[..., str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(first[0], out)
    told = refusal(train, out / "config.yaml", f"out={out}", f"resume={first[0] / 'last.pth'}")
    assert "already holds a run" in told


# ---- the same refusals as in the other modules, but from the command line


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Image folders good/, odd/ (other classes in val) and bare/ (no val)."""
    root = tmp_path_factory.mktemp("folders")
    write_images(root / "good", {"train": {"cat": 10, "dog": 10}, "val": {"cat": 2, "dog": 3}})
    write_images(root / "odd", {"train": {"cat": 10, "dog": 10}, "val": {"cat": 2, "fox": 3}})
    write_images(root / "bare", {"train": {"cat": 10, "dog": 10}, "test": {"cat": 2, "dog": 3}})
    return root


FOLDER = ["data.dataset=", "model.num_classes=null"]
BAD = {  # arguments; words of the one line
    "missing_folder": ([*FOLDER, "data.root={folders}/nowhere"], ["data.root", "nowhere", "no folder"]),
    "no_folder": (FOLDER, ["data.root=''", "no folder"]),
    "missing_split": ([*FOLDER, "data.root={folders}/bare"], ["no 'val'", "data.val_split", "test, train"]),
    "classes_differ": ([*FOLDER, "data.root={folders}/odd"], ["only in one of them: dog, fox"]),
    "classes_unlike_the_model": (
        ["data.dataset=", "model.num_classes=3", "data.root={folders}/good"],
        ["model.num_classes=3", "2 classes"],
    ),
    "dataset_without_root": (["data.dataset=torch/cifar10"], ["data.root"]),
    "unknown_dataset": (["data.dataset=imagenet"], ["data.dataset='imagenet'", "synthetic"]),
    "small_dataset": (["data.train_samples=15"], ["optim.global_batch=16", "15 training images"]),
    "batch_does_not_divide": (["optim.batch_per_device=5"], ["optim.global_batch=16", "optim.batch_per_device=5"]),
    "unknown_model": (["model.name=sgconvnext_atoo"], ["model.name='sgconvnext_atoo'", "'sgconvnext_atto'?"]),
    "unknown_argument": (["model.kwargs.depht=[1]"], ["sgconvnext_atto", "depht"]),
    "unknown_key": (["optim.weigth_decay=1"], ["command line", "did you mean 'optim.weight_decay'?"]),
    "unknown_section": (["optimizer.lr=1"], ["command line", "did you mean 'optim'?"]),
    "precision": (["run.precision=float16"], ["run.precision='float16'", "fp32, bf16, fp16"]),
    "device": (["run.device=tpu"], ["run.device='tpu'", "auto, cuda, cpu"]),
    "wrong_type": (["optim.lr=fast"], ["optim.lr='fast'", "number"]),
    "nan": (["optim.lr=nan"], ["optim.lr", "finite"]),
    "range": (["optim.warmup_epochs=2"], ["optim.warmup_epochs=2", "epochs=2"]),
    "odd_batch": (
        ["augment.mixup=0.8", "optim.batch_per_device=1"],
        ["optim.batch_per_device=1", "even"],
    ),
    "policy": (["augment.auto_augment=randm9"], ["augment.auto_augment", "randm9"]),
    "betas": (["optim.betas=[1.5,0.9]"], ["betas"]),
    "override_without_equals": (["optim.lr"], ["'optim.lr'", "section.key=value"]),
    "dashes": (["--optim.lr=3"], ["'--optim.lr=3'", "section.key=value"]),
    "dashes_alone": (["--resume"], ["'--resume'", "section.key=value"]),
    "image_size": (["data.img_size=31"], ["data.img_size=31", "32"]),
    "model_image_size": (["model.img_size=16"], ["img_size=16", "32"]),
    "pretrained": (["model.pretrained=true"], ["no pretrained weights", "sgconvnext_atto"]),
    "missing_checkpoint": (["model.checkpoint=nowhere.pth"], ["'nowhere.pth'", "does not exist"]),
    "other_architecture": (["model.checkpoint={other}"], ["other.pth", "another architecture", "missing"]),
    "no_kwargs": (["model.kwargs=null"], ["model.kwargs=None"]),
    "missing_resume": (["resume=nowhere.pth"], ["'nowhere.pth'", "does not exist"]),
    "resume_without_optimizer": (["resume={weights}"], ["weights.pth", "lacks", "optimizer", "model.checkpoint"]),
    "no_output_folder": (["out={other}/out"], ["out=", "other.pth"]),
    "cuda": (["run.device=cuda"], ["run.device=cuda", "run.device=cpu"]),
}


@pytest.fixture(scope="module")
def places(folders: Path) -> dict[str, Path]:
    """What stands in the braces of BAD: weights of another model, and of this one with nothing beside them."""
    other, fitting = folders / "other.pth", folders / "weights.pth"
    checkpoint.save(other, {"state_dict": create_model("resnet10t", num_classes=10).state_dict()})
    model = create_model("sgconvnext_atto", num_classes=10, img_size=32, **MICRO)
    checkpoint.save(fitting, {"state_dict": model.state_dict()})
    return {"folders": folders, "other": other, "weights": fitting}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_one_line_before_training(
    case: str, places: dict[str, Path], refusal: Callable[..., str], tmp_path: Path
) -> None:
    if case == "cuda" and torch.cuda.is_available():
        pytest.skip("CUDA is there")
    arguments, words = BAD[case]
    path = write_config(tmp_path / "a.yaml")
    told = refusal(train, path, f"out={tmp_path / 'out'}", *(argument.format(**places) for argument in arguments))
    for word in words:
        assert word in told
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("optim: {weigth_decay: 1}", ["a.yaml", "optim.weigth_decay", "did you mean 'optim.weight_decay'?"]),
        ("optim: {lr: [1]}", ["a.yaml", "optim.lr=[1]", "number"]),
        ("optim: {lr: 1", ["a.yaml", "not valid YAML"]),
        ("base: nowhere.yaml", ["nowhere.yaml", "No such file"]),
        ("run: {device: cpu}\naugment: {smoothing: 2}", ["augment.smoothing=2.0"]),
    ],
    ids=["key", "type", "yaml", "base", "range"],
)
def test_bad_file_ends_with_one_line_before_training(
    text: str, words: list[str], refusal: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "a.yaml").write_text(text)
    told = refusal(train, tmp_path / "a.yaml", f"out={tmp_path / 'out'}")
    for word in words:
        assert word in told
    assert not (tmp_path / "out").exists()


def test_process_of_its_own_says_nothing_but_the_line(places: dict[str, Path], tmp_path: Path) -> None:
    path = write_config(tmp_path / "a.yaml")
    done = command("train.py", path, f"out={tmp_path / 'out'}", *FOLDER, f"data.root={places['folders']}/odd")
    assert (done.returncode, done.stdout) == (2, "")
    assert "dog, fox" in only_line("train", done.stderr)


def test_two_processes_say_the_line_once(tmp_path: Path) -> None:
    path = write_config(tmp_path / "a.yaml")
    done = command("train.py", path, f"out={tmp_path / 'out'}", processes=2)
    assert done.returncode != 0
    [line] = [line for line in done.stderr.splitlines() if line.startswith("train.py: error: ")]
    assert "optim.batch_per_device=16 times 2 processes = 32" in line
    assert not list(tmp_path.glob("out/*"))


def test_help_lists_every_knob_with_its_default(
    run_here: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        run_here(train, "--help")
    shown = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    for name, default in flatten(to_dict(Config())).items():
        assert name in shown
        if isinstance(default, int | str):
            assert yaml.safe_dump(default).split("\n")[0] in shown[name]


# ---- validate.py


@pytest.fixture(scope="module")
def trained(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one epoch on the image folders."""
    out = tmp_path_factory.mktemp("trained")
    knobs = {"data.dataset": "", "data.root": str(folders / "good"), "model.num_classes": None, "epochs": 1}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["train.py", str(write_config(out / "a.yaml", **knobs)), f"out={out}"])
        train.main()
    return out / "last.pth"


def test_validation_takes_another_folder_or_split_of_the_same_classes(
    trained: Path, folders: Path, run_here: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    own = validated(run_here, capsys, trained)
    assert (own["count"], own["top5"]) == (5, 100.0)  # two classes
    assert own["loss"] == pytest.approx(metrics(trained.parent)[0]["val_loss"], rel=1e-6)
    write_images(tmp_path, {"val": {"cat": 1, "dog": 3}})
    assert validated(run_here, capsys, trained, "--data-root", tmp_path)["count"] == 4
    assert validated(run_here, capsys, trained, "data.val_split=train")["count"] == 20
    larger = validated(run_here, capsys, trained, "data.img_size=64")
    assert (larger["count"], larger["loss"] != own["loss"]) == (5, True)


def test_run_and_its_evaluation_name_the_classes_and_the_files_that_are_not_read(
    run_here: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    """Classes with folders in them, and pictures that nobody reads."""
    caplog.set_level(logging.INFO)
    nested = {"cat/day": 6, "cat/night": 6, "dog": 4}
    write_images(tmp_path, {"train": nested, "val": {"cat/night": 2, "dog/day": 1}})
    for name in ("train/cat/a.heic", "train/dog/b.heic", "train/notes.txt", "val/dog/c.svg"):
        (tmp_path / name).touch()
    knobs = {"data.dataset": "", "data.root": str(tmp_path), "model.num_classes": None, "epochs": 1}
    out = micro_run(run_here, tmp_path / "run", **knobs)
    before = caplog.messages[: caplog.messages.index(next(m for m in caplog.messages if m.startswith("epoch ")))]
    assert any(line.endswith("2 classes: cat, dog") for line in before)
    assert "16 training and 3 validation images, 4 (dog) to 12 (cat) images per class" in before
    train_told, val_told = (line for line in before if "not read in" in line)
    assert ("data.train_split" in train_told, train_told.endswith(".heic 2, .txt 1")) == (True, True)
    assert ("data.val_split" in val_told, val_told.endswith(".svg 1")) == (True, True)
    assert checkpoint.load(out / "last.pth")["class_to_idx"] == {"cat": 0, "dog": 1}
    caplog.clear()
    assert validated(run_here, capsys, out / "last.pth")["count"] == 3
    assert [line for line in caplog.messages if "not read" in line] == [val_told]


def test_validation_needs_nothing_but_the_checkpoint_and_the_validation_images(
    trained: Path, run_here: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write_images(tmp_path / "set", {"val": {"cat": 1, "dog": 1}})  # no training images
    state = checkpoint.load(trained)
    state["args"]["model"]["checkpoint"] = "a/start/that/is/gone.pth"
    checkpoint.save(tmp_path / "moved.pth", state)
    assert validated(run_here, capsys, tmp_path / "moved.pth", "--data-root", tmp_path / "set")["count"] == 2


def test_validation_refuses_in_one_line(
    trained: Path, folders: Path, places: dict[str, Path], refusal: Callable[..., str]
) -> None:
    def told(*arguments: object) -> str:
        return refusal(validate, "--checkpoint", *arguments)

    assert "does not exist" in told(folders / "nowhere.pth")
    assert "not written by train.py" in told(places["other"])
    assert "no EMA weights" in told(trained, "--use-ema")
    assert "only in one of them: dog, fox" in told(trained, "--data-root", folders / "odd")
    assert "it holds test, train" in told(trained, "--data-root", folders / "bare")
    assert "no folder" in told(trained, "--data-root", folders / "nowhere")
    assert "did you mean 'data.val_split'?" in told(trained, "data.val_spilt=x")
    assert "was trained as sgconvnext_atto, this model is convnext_atto" in told(trained, "model.name=convnext_atto")


def test_validation_refuses_a_dashed_override_in_one_line(trained: Path, refusal: Callable[..., str]) -> None:
    assert "--use-emma" in refusal(validate, "--checkpoint", trained, "--use-emma")
