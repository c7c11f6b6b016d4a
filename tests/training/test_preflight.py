"""What is looked at before a run: its classes, kernels, memory and disk, with nothing changed by looking."""

import errno
import os
import re
import shutil
import tarfile
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from helpers import refused
from torch import nn
from training_helpers import (
    DISKS,
    MICRO,
    batches_of,
    disk_without,
    micro_config,
    micro_model,
    noise,
    training,
    update,
    write_images,
)

from sgconvnext.training import checkpoint, data, engine, preflight, rng
from sgconvnext.training.config import Config, to_dict
from sgconvnext.training.images import Batch, Images
from sgconvnext.training.run_folder import RunFolder

GIB = 2**30
SIZE = (3, 32, 32)


# ---- classes and kernels


def folder_split(root: Path, **changes: Any) -> data.Split:
    plain = {"data.dataset": "", "data.root": str(root), "model.num_classes": None}
    return data.create_split(micro_config(**(plain | changes)), train=True)


def test_rarest_and_commonest_class_of_a_folder_are_counted(tmp_path: Path) -> None:
    write_images(tmp_path, {"train": {"ape": 2, "bat": 5, "cat": 1}})
    split = folder_split(tmp_path)
    counts = preflight.class_counts(split.dataset, split.class_to_idx)
    assert counts == "1 (cat) to 5 (bat) images per class"


def test_class_without_an_image_is_the_rarest() -> None:
    dataset = Images(SimpleNamespace(targets=[0, 0, 2]), torch.as_tensor, seed=0)
    counts = preflight.class_counts(dataset, {"ape": 0, "bat": 1, "cat": 2})
    assert counts == "0 (bat) to 2 (ape) images per class"


def test_files_that_are_not_read_are_told_by_split_and_suffix(tmp_path: Path) -> None:
    write_images(tmp_path, {"train": {"ape": 2, "bat": 5}})
    for name in ("a.txt", "ape/b.heic", "ape/c.heic"):
        (tmp_path / "train" / name).touch()
    split = folder_split(tmp_path)
    [told] = preflight.unread(train=split, val=data.create_split(micro_config(), train=False))
    assert told.startswith("not read in data.train_split")
    assert told.endswith(": .heic 2, .txt 1")


def test_classes_of_a_tar_file_are_counted(tmp_path: Path) -> None:
    write_images(tmp_path, {"train": {"ape": 2, "bat": 5}})
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        tar.add(tmp_path / "train", arcname=".")
    split = folder_split(tmp_path, **{"data.train_split": "train.tar"})
    assert preflight.class_counts(split.dataset, split.class_to_idx) == "2 (ape) to 5 (bat) images per class"


@pytest.mark.parametrize("targets", [[3, 0, 3, 3, 0], torch.tensor([3, 0, 3, 3, 0])], ids=["list", "tensor"])
def test_classes_of_a_dataset_with_targets_are_counted_without_opening_it(targets: Any) -> None:
    dataset = Images(SimpleNamespace(targets=targets), torch.as_tensor, seed=0)
    assert preflight.class_counts(dataset) == "2 (class 0) to 3 (class 3) images per class"


@pytest.mark.parametrize(
    "dataset",
    [data.create_split(micro_config(), train=True).dataset, SimpleNamespace(noun="image")],
    ids=["images", "unknown"],
)
def test_classes_that_only_opening_would_tell_are_unknown(dataset: Any) -> None:
    assert preflight.class_counts(dataset) == "images per class unknown"


@pytest.mark.parametrize(("size", "shift"), [(32, 0), (96, 1), ((64, 128), 2)], ids=str)
def test_tokens_of_every_stage_are_told_beside_the_kernels_as_built(size: Any, shift: int) -> None:
    tokens = [
        ["64 tokens (8x8)", "16 tokens (4x4)", "4 tokens (2x2)", "1 tokens (1x1)"],
        ["576 tokens (24x24)", "144 tokens (12x12)", "36 tokens (6x6)", "9 tokens (3x3)"],
        ["512 tokens (16x32)", "128 tokens (8x16)", "32 tokens (4x8)", "8 tokens (2x4)"],
    ][shift]
    built = ["8x8", "4x4", "2x2", "1x1"]
    taps = [4, 1, 1, 1]  # ceil(64 / 2^(5-1)), and 1 where there are fewer tokens than that
    assert preflight.kernels(micro_model(micro_config()), size) == [
        f"stage {i + 1}: {tokens[i]}; kernels for {built[i]} in 2 directions, 5 scales of {taps[i]} taps"
        for i in range(4)
    ]


def test_other_models_have_no_global_kernels() -> None:
    assert preflight.kernels(timm.create_model("convnext_atto", **MICRO), 32) == []


# ---- disk


@pytest.mark.parametrize("decay", [0.0, 0.99])
@pytest.mark.parametrize("name", ["sgconvnext_atto", "resnet10t"])
def test_size_of_a_checkpoint_is_that_of_its_file(name: str, decay: float, tmp_path: Path) -> None:
    config = micro_config(**{"ema.decay": decay})
    model = timm.create_model(name, num_classes=10, **({"img_size": 32} if name == "sgconvnext_atto" else {}))
    t = training(config, model)
    told = preflight.checkpoint_bytes(t)
    update(t, batches_of(16, *noise(16)), 1e-3)
    own = {"epoch": rng.state(torch.device("cpu")), "now": rng.state(torch.device("cpu"))}
    state = {
        "state_dict": t.model.state_dict(),
        "optimizer": t.optimizer.state_dict(),
        "args": to_dict(config),
        "ranks": [own],
    }
    average = {} if t.ema is None else {"state_dict_ema": t.ema.module.state_dict()}
    checkpoint.save(tmp_path / "a.pth", state | average)
    assert told == pytest.approx((tmp_path / "a.pth").stat().st_size, rel=0.1)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """How much is free, to be set by the test, and on whose disk it was asked for."""
    disk: dict[str, Any] = {"bytes": 0, "asked": None}

    def usage(path: Path) -> SimpleNamespace:
        disk["asked"] = path
        return SimpleNamespace(total=10**15, used=0, free=disk["bytes"])

    monkeypatch.setattr(shutil, "disk_usage", usage)
    return disk


@pytest.mark.parametrize(("files", "missing"), [(0, 5), (1, 4), (4, 1), (7, 1)])
def test_disk_must_have_room_for_the_checkpoints_that_are_not_there_yet(
    files: int, missing: int, free: dict[str, Any], tmp_path: Path
) -> None:
    """Three newest, the best, and the one being written, which always needs room."""
    for epoch in range(files):
        RunFolder(tmp_path).file(epoch, 0).touch()
    free["bytes"] = missing * GIB
    assert preflight.disk(tmp_path, GIB, keep=3) == (
        f"1.00 GiB a checkpoint, 5 at most at a time; {missing}.00 GiB free in {tmp_path}"
    )
    free["bytes"] -= 1
    with refused(f"out={str(tmp_path)!r}", " free, but ", f"{missing} more", "1.00 GiB", "save.keep", "another disk"):
        preflight.disk(tmp_path, GIB, keep=3)


@pytest.mark.parametrize(("stands", "missing"), [((), 8), (("last.pth",), 7), (("last.pth", "best.pth"), 6)], ids=str)
def test_copies_in_place_of_links_need_room_too(
    stands: tuple[str, ...], missing: int, free: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three newest, the best, and the one being written; last.pth, best.pth, and one of them being written."""
    disk_without(monkeypatch, *DISKS["copies"])
    for name in stands:
        (tmp_path / name).touch()
    free["bytes"] = missing * GIB
    told = preflight.disk(tmp_path, GIB, keep=3)
    assert told.startswith("1.00 GiB a checkpoint, 8 at most at a time; ")
    assert told.endswith(f"free in {tmp_path}; it has no symbolic links, so last.pth and best.pth are copies")
    free["bytes"] -= 1
    with refused(f"{missing} more checkpoints"):
        preflight.disk(tmp_path, GIB, keep=3)
    for epoch in range(9):
        RunFolder(tmp_path).file(epoch, 0).touch()
    with refused("2 more checkpoints"):
        free["bytes"] = 2 * GIB - 1
        preflight.disk(tmp_path, GIB, keep=3)


def test_hard_links_in_place_of_symbolic_ones_need_no_room(
    free: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk_without(monkeypatch, *DISKS["hard links"])
    free["bytes"] = 5 * GIB
    told = preflight.disk(tmp_path, GIB, keep=3)
    assert "5 at most at a time" in told
    assert told.endswith("; it has no symbolic links, so last.pth and best.pth are hard links")


def test_disk_that_cannot_replace_files_is_refused(
    free: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(path: Path, target: Path) -> Path:
        raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))

    free["bytes"] = 100 * GIB
    monkeypatch.setattr(Path, "replace", fails)
    with refused(f"out={str(tmp_path)!r} cannot hold checkpoints", "File exists", "name another disk"):
        preflight.disk(tmp_path, GIB, keep=3)
    assert not list(tmp_path.iterdir())


def test_folder_that_is_not_there_yet_is_measured_by_the_one_it_will_be_in(
    free: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    free["bytes"] = 10 * GIB
    for out in (tmp_path / "a/b/c", Path("a/b"), Path()):
        preflight.disk(out, GIB, keep=1)
        assert free["asked"] == tmp_path


# ---- a rehearsal

ROUGH = {
    "model.kwargs": MICRO | {"ls_init_value": 1.0, "drop_path_rate": 0.5},
    "augment.mixup": 0.8,
    "augment.cutmix": 1.0,
    "ema.decay": 0.9,
}


def contents(t: engine.Training) -> list[Any]:
    """All that a rehearsal could change, but for the random numbers."""
    assert t.ema is not None
    parts = [t.model.state_dict(), t.ema.module.state_dict()]
    return [
        *([tensor.clone() for tensor in part.values()] for part in parts),
        [parameter.grad for parameter in t.model.parameters()],
        deepcopy(t.optimizer.state_dict()),
        deepcopy(t.scaler.state_dict()),
    ]


def draws() -> list[float]:
    """One number of each generator."""
    state = rng.state(torch.device("cpu"))
    drawn = [torch.rand(()).item(), float(np.random.rand()), rng.random.random()]
    rng.restore(state, torch.device("cpu"))
    return drawn


def unchanged(t: engine.Training, before: list[Any]) -> None:
    weights, average, gradients, *rest = contents(t)
    assert all(map(torch.equal, weights, before[0]))
    assert all(map(torch.equal, average, before[1]))
    assert gradients == [None] * len(gradients) == before[2]
    assert rest == before[3:]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["sgconvnext_atto", "resnet10t"])
def test_rehearsal_leaves_no_trace(name: str, precision: str) -> None:
    config = micro_config(**(ROUGH | {"run.precision": precision}))
    t = training(config, timm.create_model("resnet10t", num_classes=10) if name == "resnet10t" else None)
    assert any(isinstance(module, nn.BatchNorm2d) for module in t.model.modules()) == (name == "resnet10t")
    before, passes = contents(t), []
    next(t.model.parameters()).register_hook(lambda _: passes.append("backward"))
    preflight.rehearse(t, SIZE)
    assert passes == ["backward"] * 2
    unchanged(t, before)


def test_rehearsal_leaves_random_numbers_as_they_were() -> None:
    t, drawn = training(micro_config(**ROUGH)), draws()
    preflight.rehearse(t, SIZE)
    assert draws() == drawn


def test_rehearsal_that_fails_leaves_no_trace_either() -> None:
    def fails(logits: Any, targets: Any) -> Any:
        raise RuntimeError("wrong shape")

    t = training(micro_config(**ROUGH), timm.create_model("resnet10t", num_classes=10), criterion=fails)
    before = contents(t)
    with refused("model.name='sgconvnext_atto'", "data.img_size=32", "wrong shape"):
        preflight.rehearse(t, SIZE)
    unchanged(t, before)


def gib(line: str) -> float:
    found = re.match(r"about ([\d.]+) GiB of the [\d.]+ GiB of a cpu process", line)
    assert found, line
    return float(found[1])


def kept_for_backward(t: engine.Training) -> int:
    """Bytes, of a forward of the whole batch, with which its graph is held."""
    whole = t.config.optim.batch_per_device
    targets = torch.zeros(whole, dtype=torch.int64)
    storages: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        engine.forward_loss(t, t.model, Batch(torch.randn(whole, *SIZE), targets, targets, targets, [""] * whole))
    return sum(storage.nbytes() for storage in storages.values())


def convnext(precision: str, batch: int) -> engine.Training:
    """Few tokens a layer, so that its weights are many beside the activations."""
    knobs = {"run.precision": precision, "optim.batch_per_device": batch, "optim.global_batch": batch}
    return training(micro_config(**knobs), timm.create_model("convnext_atto", num_classes=10))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_backward_keeps_of_the_weights_does_not_grow_with_the_batch(precision: str) -> None:
    t = convnext(precision, 128)
    weights = sum(parameter.numel() * 4 for parameter in t.model.parameters())
    assert gib(preflight.rehearse(t, SIZE)) == pytest.approx((3 * weights + kept_for_backward(t)) / GIB, rel=0.5)


def test_average_takes_the_memory_of_the_weights_once_more() -> None:
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2**22), nn.Linear(2**22, 1, bias=False))
    with_average, without = (training(micro_config(), model, ema=ema) for ema in (object(), None))
    for t in (with_average, without):
        t.criterion = lambda outputs, _: outputs.mean()  # type: ignore[assignment]
    weights = 5 * 2**22 * 4 / GIB
    more = gib(preflight.rehearse(with_average, SIZE)) - gib(preflight.rehearse(without, SIZE))
    assert more == pytest.approx(weights, abs=0.011)


def machine(monkeypatch: pytest.MonkeyPatch, total: int) -> None:
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": total // 4096}.__getitem__)


def test_batch_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    t = training(large())
    need = gib(preflight.rehearse(t, SIZE))
    assert need > 0.2
    machine(monkeypatch, int(need * 0.9 * GIB))
    with refused("optim.batch_per_device=4096", f"{need:.1f}", f"{need * 0.9:.1f} GiB", "grad_checkpointing=true"):
        preflight.rehearse(t, SIZE)
    assert all(parameter.grad is None for parameter in t.model.parameters())


def test_processes_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    t = training(large())
    machine(monkeypatch, int(gib(preflight.rehearse(t, SIZE)) * 1.5 * GIB))
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    preflight.rehearse(t, SIZE)  # left over in the environment: there is no RANK, so there are no others
    monkeypatch.setenv("RANK", "0")
    with refused("optim.batch_per_device=4096"):
        preflight.rehearse(t, SIZE)


def large() -> Config:
    """Of which only two images are ever computed."""
    return micro_config(**{"optim.batch_per_device": 4096, "optim.global_batch": 4096})
