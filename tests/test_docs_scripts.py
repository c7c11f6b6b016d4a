"""The scripts that make tables of docs/: their figures by hand, and a small run of each."""

import json
import logging
import runpy
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from training_helpers import trained, write_images

pytestmark = pytest.mark.integrations
DOCS = Path(__file__).parents[1] / "docs"


def script(name: str) -> Any:
    return SimpleNamespace(**runpy.run_path(str(DOCS / name)))


@pytest.fixture(scope="module")
def segmentation() -> Any:
    return script("segmentation.py")


def test_every_pixel_of_a_scene_has_the_class_of_what_lies_on_top(segmentation: Any) -> None:
    items, kinds = torch.full((2, 28, 28), 255, dtype=torch.uint8), torch.tensor([3, 7])
    images, masks = segmentation.scenes(items, kinds, 6, seed=0)
    assert images.shape == (6, 1, *segmentation.SIZE)
    assert set(masks.unique().tolist()) == {0, 4, 8}
    assert torch.equal(images[:, 0] > 0.99, masks > 0)  # an item is white here, the ground is not
    assert images[:, 0][masks == 0].max() < 0.31
    assert torch.equal(segmentation.scenes(items, kinds, 6, seed=0)[0], images)
    assert not torch.equal(segmentation.scenes(items, kinds, 6, seed=1)[1], masks)


def test_scores_of_a_segmentation_are_those_by_hand(segmentation: Any) -> None:
    class Ground(nn.Module):
        """Says of every pixel that it is the ground."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scores = torch.zeros(len(x), segmentation.CLASSES, *x.shape[2:])
            scores[:, 0] = 1
            return scores

    images, masks = torch.zeros(2, 1, 4, 4), torch.zeros(2, 4, 4, dtype=torch.long)
    masks[0, 0] = 5  # 4 of 32 pixels
    assert segmentation.evaluate(Ground(), (images, masks)) == f"mIoU {100 * (28 / 32) / 2:.2f}, pixels 87.50 %"


@pytest.mark.parametrize("backbone", ["convnext_atto", "sgconvnext_atto"])
def test_segmentation_tells_an_epoch_in_a_line(
    segmentation: Any,
    backbone: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for split, count in (("train", 20), ("t10k", 10)):
        pixels = torch.randint(256, (count * 784,), dtype=torch.uint8).numpy().tobytes()
        (raw / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, count, 28, 28) + pixels)
        labels = bytes(i % 10 for i in range(count))
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + labels)
    arguments = [backbone, "--data", str(tmp_path), "--epochs", "2", "--scenes", "32"]
    monkeypatch.setattr(sys, "argv", ["segmentation.py", *arguments])
    segmentation.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": mIoU ")[0] for line in lines] == [f"{backbone}, seed 0, epoch {i}" for i in range(2)]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """The rows that a script prints, by column."""
    disabled = logging.root.manager.disable

    def told(name: str, *arguments: object) -> list[dict[str, str]]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        script(name).main()
        head, _, *lines = capsys.readouterr().out.splitlines()
        return [dict(zip(cells(head), cells(line), strict=True)) for line in lines]

    yield told
    logging.disable(disabled)


def test_int8_keeps_nearly_all_classes_in_less_space(rows: Any, tmp_path: Path) -> None:
    write_images(tmp_path / "data", {"val": {"a": 8, "b": 8, "c": 8}})
    shape = {"depths": [1, 1, 1, 1], "dims": [32, 64, 96, 128], "ls_init_value": 0.5}
    path, *_ = trained(tmp_path, **{"model.kwargs": shape, "data.root": str(tmp_path / "data")})
    found = rows("quantisation.py", path)
    for whole, small in (found[:2], found[2:]):
        assert float(whole["same class as float32, %"]) == 100
        assert float(small["same class as float32, %"]) >= 75
        assert float(small["MiB"]) < 0.6 * float(whole["MiB"])


def test_networks_are_compared_by_their_last_epochs(rows: Any, tmp_path: Path) -> None:
    small = ["epochs=1", "optim.warmup_epochs=0", "model.kwargs.dim=16"]
    network = "model.kwargs.layers=LL optim.lr=1e-3"
    command = ["compare.py", "configs/sequences/digits.yaml", *small, "--networks", network, "--seeds", 0, 1]
    [row] = rows(*command, "--out", tmp_path)
    assert row["network"] == f"`{network}`"
    runs = [tmp_path / f"model.kwargs.layers=LL_optim.lr=1e-3_seed={seed}" for seed in (0, 1)]
    last = [json.loads((run / "metrics.jsonl").read_text()) for run in runs]
    top1 = [metrics["val_top1"] for metrics in last]
    assert [float(row["seed 0"]), float(row["seed 1"])] == pytest.approx(top1, abs=0.006)
    assert float(row["mean top-1, %"]) == pytest.approx(sum(top1) / 2, abs=0.006)
    assert float(row["samples/s"]) == pytest.approx(sum(metrics["images_per_s"] for metrics in last) / 2, rel=0.01)
    weights = torch.load(runs[0] / "last.pth", weights_only=True)["state_dict"]
    assert 500 < int(row["parameters"].replace(",", "")) <= sum(each.numel() for each in weights.values())
    assert rows(*command, "--out", tmp_path) == [row]  # finished runs are read, not made again


def test_a_network_that_does_not_train_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["compare.py", "configs/sequences/digits.yaml", "--networks", "model.kwargs.layers=Z"]
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        script("compare.py").main()
    first, second = capfd.readouterr().err.splitlines()
    assert first.startswith("train.py: error: ")
    assert second.startswith("compare.py: error: model.kwargs.layers=Z: train.py configs/sequences/digits.yaml ")


def test_export_is_beside_that_of_convnext(rows: Any) -> None:
    [row] = rows("exports.py", "atto", "--formats", "pt2", "--img-size", 32, "--turns", 1)
    assert (row["model"], row["file"], row["batch"]) == ("sgconvnext_atto", "`pt2`", "1")
    assert 10 < float(row["ConvNeXt, MiB"]) < 25  # 3.7 million parameters of four bytes, and the program
    assert 10 < float(row["MiB"]) < 25
    assert float(row["ratio"]) > 0
