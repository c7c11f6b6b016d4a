"""train.py on sequences: it learns, and a run that is stopped and resumed ends with the same bits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from training_helpers import command, fingerprint, metrics, write_config

from sgconvnext.training import checkpoint
from sgconvnext.training.build import trained_model

SGCONV = {"scale_dim": 4}
CLASSES: dict[str, Any] = {
    "model.name": "sequence_classifier",
    "model.kwargs": {"length": 64, "dim": 16, "layers": "CA", "sgconv": SGCONV, "attention_heads": 2},
    "data.dataset": "sequence/digits",
    "optim.lr": 1e-2,
    "model.drop": 0.1,
}
BYTES: dict[str, Any] = {
    "model.name": "sequence_lm",
    "model.kwargs": {"length": 32, "dim": 16, "layers": "AC", "sgconv": SGCONV, "attention_heads": 2},
    "data.dataset": "sequence/text",
    "data.kwargs": {"length": 32},
    "optim.lr": 1e-2,
}


@pytest.fixture
def text(tmp_path: Path) -> str:
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i}.txt").write_text(f"The number of this document is {i}. " * 30)
    return str(folder)


@pytest.mark.parametrize("task", [CLASSES, BYTES], ids=["classes", "bytes"])
def test_run_on_sequences_learns_and_resumes_exactly(task: dict[str, Any], tmp_path: Path, text: str) -> None:
    changes = task | {"model.num_classes": None, "data.root": text, "epochs": 3, "ema.decay": 0.9}
    path = write_config(tmp_path / "a.yaml", **changes)
    whole = command("train.py", path, f"out={tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stderr
    losses = [line["val_loss"] for line in metrics(tmp_path / "whole")]
    assert losses[-1] < losses[0]
    part = command("train.py", path, f"out={tmp_path / 'part'}", "save.every=3")
    assert part.returncode == 0, part.stderr
    for file in sorted((tmp_path / "part").glob("checkpoint-*"))[2:]:  # as if it had been killed after the first
        file.unlink()
    for name in ("last.pth", "best.pth"):
        (tmp_path / "part" / name).unlink(missing_ok=True)
    again = command("train.py", path, f"out={tmp_path / 'part'}", "resume=auto")
    assert again.returncode == 0, again.stderr
    assert "going on from" in again.stderr
    assert fingerprint(tmp_path / "part" / "last.pth") == fingerprint(tmp_path / "whole" / "last.pth")


def test_trained_language_model_is_evaluated_and_generates(tmp_path: Path, text: str) -> None:
    changes = BYTES | {"model.num_classes": None, "data.root": text, "epochs": 6}
    done = command("train.py", write_config(tmp_path / "a.yaml", **changes), f"out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    last = str(tmp_path / "out" / "last.pth")
    told = command("validate.py", "--checkpoint", last)
    assert told.returncode == 0, told.stderr
    assert f'"loss": {metrics(tmp_path / "out")[-1]["val_loss"]}'[:16] in told.stdout
    model, _ = trained_model(checkpoint.load(last), False, last)
    prompt = torch.tensor([list(b"The number")])
    assert bytes(model.eval().generate(prompt, 4, temperature=0)[0].tolist()).isascii()


def test_two_processes_train_on_sequences(tmp_path: Path) -> None:
    changes = CLASSES | {"model.num_classes": None, "optim.batch_per_device": 8, "epochs": 1}
    path = write_config(tmp_path / "a.yaml", **changes)
    runs = {}
    for processes in (1, 2):
        out = tmp_path / str(processes)
        batch = 16 // processes
        knobs = [f"out={out}", f"optim.batch_per_device={batch}", "model.drop=0"]
        done = command("train.py", path, *knobs, processes=processes)
        assert done.returncode == 0, done.stderr
        runs[processes] = metrics(out)[0]["val_loss"]
    assert runs[2] == pytest.approx(runs[1], rel=1e-4)
