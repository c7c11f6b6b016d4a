"""A run measures its backends, keeps what it chose in its checkpoints, and repeats it when it is resumed."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import refused
from torch import Tensor, nn
from training_helpers import fingerprint, metrics, micro_config, micro_model, micro_run, stop_in, training

import sgconvnext
from sgconvnext.longconv import tuned
from sgconvnext.profile.table import device_name
from sgconvnext.training import backends, checkpoint
from sgconvnext.tuning import Choice, Tuning

RunHere = Callable[..., None]


pytestmark = pytest.mark.usefixtures("untuned")


@pytest.fixture
def dft_is_fastest(fastest: Callable[[str], None]) -> None:
    fastest("dft")


def never(model: nn.Module, batch: Tensor) -> Tuning:
    raise AssertionError("measured")


def test_run_that_tunes_says_so_keeps_it_and_repeats_it(
    dft_is_fastest: None,
    run_here: RunHere,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    plain = micro_run(run_here, tmp_path / "plain", epochs=2)
    assert "backend: " not in caplog.text
    assert "tuning" not in checkpoint.load(plain / "last.pth")

    whole = micro_run(run_here, tmp_path / "whole", epochs=2, **{"run.tune": True})
    told = [line for line in caplog.messages if line.startswith("backend: ")]
    assert told[0] == "backend: 8 channels x 64 samples, batch 16, float32, training: dft, 2.00 times as fast as fft"
    assert len(told) == 10  # a training step and an evaluation: of four stages, and of the first one's block
    assert len(checkpoint.load(whole / "last.pth")["tuning"]["choices"]) == 10
    assert fingerprint(whole / "last.pth") != fingerprint(plain / "last.pth")
    assert metrics(whole)[-1]["train_loss"] == pytest.approx(metrics(plain)[-1]["train_loss"], rel=1e-3)

    with monkeypatch.context() as patched:
        stop_in(3, patched)
        with pytest.raises(SystemExit, match=r"^143$"):
            micro_run(run_here, tmp_path / "stopped", epochs=2, **{"run.tune": True})
    tuned.forget()
    monkeypatch.setattr(sgconvnext, "tune", never)
    out = micro_run(run_here, tmp_path / "stopped", "resume=auto", epochs=2, **{"run.tune": True})
    assert fingerprint(out / "last.pth") == fingerprint(whole / "last.pth")
    assert checkpoint.load(out / "last.pth")["tuning"] == checkpoint.load(out / "checkpoint-0000-000003.pth")["tuning"]


def choices(device: str = device_name(torch.device("cpu")), images: str = "16 x 32 x 32") -> dict[str, Any]:
    """What a run of `micro_config` keeps, of one stage."""
    sizes: dict[str, Any] = {"channels": 8, "length": 64, "work": "training", "batch": 16}
    choice = Choice(device="cpu", dtype="float32", **sizes, backend="dft", shipped="fft")
    return Tuning([choice], {"device": device, "images": images}).state()


def test_choices_of_a_checkpoint_are_used_only_with_the_knob() -> None:
    assert backends.settle(training(micro_config(**{"run.tune": True})), choices(), never) == choices()
    assert tuned._TUNED
    assert backends.settle(training(micro_config()), choices(), never) is None
    assert not tuned._TUNED


@pytest.mark.parametrize(
    ("kept", "told"),
    [(choices(device="Abacus"), "measured on Abacus"), (choices(images="8 x 32 x 32"), "for 8 x 32 x 32 images")],
    ids=["device", "images"],
)
def test_choices_for_something_else_are_measured_again(
    kept: dict[str, Any], told: str, dft_is_fastest: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    found = backends.settle(training(micro_config(**{"run.tune": True})), kept, sgconvnext.tune)
    assert told in caplog.text
    assert found is not None
    assert len(found["choices"]) == 10


def test_model_without_a_layer_that_asks_is_refused() -> None:
    other = timm.create_model("resnet10t", num_classes=10)
    with refused("ResNet has no SGConv layer"):
        backends.settle(training(micro_config(**{"run.tune": True}), other), None, sgconvnext.tune)


def test_measuring_changes_no_mode_weight_or_random_number() -> None:
    config = micro_config(**{"run.tune": True, "optim.batch_per_device": 2, "optim.global_batch": 2})
    t = training(config, micro_model(config).eval())
    before, drawn = [value.clone() for value in t.model.state_dict().values()], torch.get_rng_state()
    assert backends.settle(t, None, sgconvnext.tune) is not None
    assert not t.model.training
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(a, b) for a, b in zip(before, t.model.state_dict().values(), strict=True))
