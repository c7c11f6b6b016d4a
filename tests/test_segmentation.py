"""The comparison of docs/dense-prediction.md: its scenes, its figures by hand, and a run on made images."""

import runpy
import struct
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.integrations
SCRIPT = Path(__file__).parents[1] / "docs" / "segmentation.py"


@pytest.fixture(scope="module")
def segmentation() -> Any:
    return SimpleNamespace(**runpy.run_path(str(SCRIPT)))


def test_every_pixel_of_a_scene_has_the_class_of_what_lies_on_top(segmentation: Any) -> None:
    items, kinds = torch.full((2, 28, 28), 255, dtype=torch.uint8), torch.tensor([3, 7])
    images, masks = segmentation.scenes(items, kinds, 6, seed=0)
    assert images.shape == (6, 1, *segmentation.SIZE)
    assert set(masks.unique().tolist()) == {0, 4, 8}
    assert torch.equal(images[:, 0] > 0.99, masks > 0)  # an item is white here, the ground is not
    assert images[:, 0][masks == 0].max() < 0.31
    assert torch.equal(segmentation.scenes(items, kinds, 6, seed=0)[0], images)
    assert not torch.equal(segmentation.scenes(items, kinds, 6, seed=1)[1], masks)


def test_scores_are_those_by_hand(segmentation: Any) -> None:
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
def test_run_tells_an_epoch_in_a_line(
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
