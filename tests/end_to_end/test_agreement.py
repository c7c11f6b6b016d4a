"""Processes that see other data or knobs than the rest: every run and evaluation ends before it has begun."""

import subprocess
import sys
from pathlib import Path

import pytest
from training_helpers import ROOT, command, environment, write_config, write_images

BESIDE = """
import os, sys
sys.path.insert(0, {root!r})
os.chdir("rank" + os.environ["RANK"])
import {script}
{script}.main()
"""


def torchrun(folder: Path, script: str, *arguments: object) -> str:
    """stderr of two processes of which each sees a ``data`` of its own."""
    (folder / "beside.py").write_text(BESIDE.format(root=str(ROOT), script=script))
    launched = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launched, folder / "beside.py", *map(str, arguments)],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    [line] = [line for line in done.stderr.splitlines() if line.startswith(f"{script}.py: error: ")]
    return line


@pytest.mark.parametrize("what", ["data", "configuration"])
def test_processes_that_see_other_data_or_knobs_end_the_run_before_its_first_update(what: str, tmp_path: Path) -> None:
    changes = {"data.dataset": "", "data.root": "data", "model.num_classes": None, "optim.batch_per_device": 8}
    for rank in range(2):
        other = rank if what == "data" else 0
        counts = {"cat": 8, "dog": 8 + other}
        write_images(tmp_path / f"rank{rank}" / "data", {"train": counts, "val": {"cat": 1, "dog": 1}})
        write_config(tmp_path / f"rank{rank}" / "a.yaml", **changes, epochs=2 + rank - other)
    line = torchrun(tmp_path, "train", "a.yaml", f"out={tmp_path / 'out'}")
    assert f"give every process the same {what}" in line
    seen = "data.train_split: number of images: 16" if what == "data" else "epochs: 2"
    assert f"{seen} on rank 0, but {17 if what == 'data' else 3} on rank 1; " in line
    assert not list((tmp_path / "out").glob("*.pth"))


def test_processes_that_see_other_labels_end_an_evaluation(tmp_path: Path) -> None:
    for rank, (first, second) in enumerate([("cat", "dog"), ("dog", "cat")]):
        write_images(tmp_path / f"rank{rank}" / "data", {"val": {first: 2, second: 1}})
    write_images(tmp_path / "rank0/data", {"train": {"cat": 8, "dog": 8}})
    config = write_config(
        tmp_path / "a.yaml",
        **{"epochs": 1, "data.dataset": "", "data.root": str(tmp_path / "rank0/data"), "model.num_classes": None},
    )
    out = tmp_path / "out"
    assert command("train.py", config, f"out={out}").returncode == 0
    line = torchrun(tmp_path, "validate", "--checkpoint", out / "last.pth", "--data-root", "data")
    assert "data.val_split: list of files and labels: " in line
    assert "on rank 0, but " in line
