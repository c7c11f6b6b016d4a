"""From a run of timm's ConvNeXt on real images to a run of the SGConvNeXt that it becomes, as a user goes there."""

import json
import logging
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_helpers import CONFIGS, MICRO, fingerprint, metrics

import train
import validate
from sgconvnext.training import checkpoint, engine

RunHere = Callable[..., None]
OURS = "model.name=sgconvnext_atto_gap3"
KNOBS = [
    f"model.kwargs={json.dumps(MICRO)}",
    "epochs=1",
    "data.img_size=32",
    "run.device=cpu",
    "optim.warmup_epochs=0",
]


def digits(run_here: RunHere, out: Path, *overrides: str) -> Path:
    run_here(train, CONFIGS / "digits.yaml", f"out={out}", *KNOBS, *overrides)
    return out / "last.pth"


def validated(run_here: RunHere, capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, float]:
    capsys.readouterr()
    run_here(validate, "--checkpoint", *arguments)
    result: dict[str, float] = json.loads(capsys.readouterr().out)
    return result


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("convnext")


@pytest.fixture
def convnext(start: Path, run_here: RunHere) -> str:
    """A checkpoint of timm's ConvNeXt after one epoch of digits, made once."""
    if not (start / "last.pth").exists():
        digits(run_here, start, "model.name=convnext_atto")
    return str(start / "last.pth")


@pytest.mark.parametrize("size", [32, 96])
def test_converted_network_has_the_numbers_of_the_convnext(
    size: int, convnext: str, run_here: RunHere, capsys: pytest.CaptureFixture[str]
) -> None:
    want = validated(run_here, capsys, convnext, f"data.img_size={size}")
    got = validated(run_here, capsys, convnext, OURS, f"data.img_size={size}")
    assert (got["top1"], got["top5"], got["count"]) == (want["top1"], want["top5"], want["count"])
    assert got["loss"] == pytest.approx(want["loss"], rel=1e-6)
    if size == 32:
        assert want["top1"] == metrics(Path(convnext).parent)[0]["val_top1"] > 20  # of ten classes


def test_run_from_a_convnext_is_stopped_and_ends_as_if_it_were_not(
    convnext: str,
    run_here: RunHere,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    knobs = [OURS, f"model.checkpoint={convnext}", "optim.lr_scale=*.sgconv.weight=10"]
    knobs += ["optim.no_weight_decay=*.sgconv.weight", "optim.lr=1e-3", "resume=auto"]
    straight = digits(run_here, tmp_path / "straight", *knobs)
    assert "at the end; optim.lr_scale multiplies it: *.sgconv.weight=10" in caplog.text
    original = engine.train_update

    def stopped(t: engine.Training, batches: Any, progress: engine.Progress, lr: float) -> Any:
        if progress.update == 9:
            t.stop.received = signal.SIGTERM
        return original(t, batches, progress, lr)

    with monkeypatch.context() as patched:
        patched.setattr(engine, "train_update", stopped)
        with pytest.raises(SystemExit, match=r"^143$"):
            digits(run_here, tmp_path / "stopped", *knobs)
    assert not metrics(tmp_path / "stopped")
    resumed = digits(run_here, tmp_path / "stopped", *knobs)
    assert fingerprint(resumed) == fingerprint(straight)

    before, after = (metrics(Path(path).parent)[0]["val_loss"] for path in (convnext, straight))
    assert after < before
    weights, groups = checkpoint.load(straight)["state_dict"], checkpoint.load(straight)["optimizer"]["param_groups"]
    assert sorted((group["lr_scale"], group["weight_decay"]) for group in groups) == [(1, 0), (1, 0.05), (10, 0)]
    far = weights["stages.0.blocks.0.sgconv.weight"][:, 2:]  # scales after the two that hold the 7x7
    assert torch.count_nonzero(far) > far.numel() / 2  # the others lead to no pixel of the map


def test_factor_may_change_on_resume_and_the_groups_may_not(
    convnext: str, run_here: RunHere, refusal: Callable[..., str], tmp_path: Path
) -> None:
    knobs = [OURS, f"model.checkpoint={convnext}", "resume=auto", "allow_change=optim,epochs"]
    digits(run_here, tmp_path / "out", *knobs, "optim.lr_scale=*.sgconv.weight=10")
    told = refusal(
        train, CONFIGS / "digits.yaml", f"out={tmp_path / 'out'}", *KNOBS, *knobs, "optim.lr_scale=head.*=2"
    )
    assert "has 3 parameter groups" in told
    assert "optim.lr_scale" in told
    digits(run_here, tmp_path / "out", *knobs, "optim.lr_scale=*.sgconv.weight=5", "epochs=2")
    groups = checkpoint.load(tmp_path / "out/last.pth")["optimizer"]["param_groups"]
    assert sorted(group["lr_scale"] for group in groups) == [1, 1, 5]
