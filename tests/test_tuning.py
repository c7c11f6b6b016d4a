"""Measured choices as files: they come back as they were, and only where they hold."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import refused

import sgconvnext
from sgconvnext.longconv import choose_backend, tuned
from sgconvnext.profile.table import device_name
from sgconvnext.tuning import Choice, Tuning

CHOICE = Choice(
    device="cpu",
    dtype="float32",
    channels=4,
    length=256,
    work="training",
    batch=8,
    backend="dft",
    shipped="fft",
    seconds={"fft": 3e-3, "dft": 1e-3},
    errors={"fft": {"y error": 1e-7}, "dft": {"y error": 1e-7}},
    left_out={"toeplitz": "wrong, y error 1.0e+00"},
)
HERE = {"device": device_name(torch.device("cpu")), "torch": torch.__version__, "date": "2026-11-27"}


pytestmark = pytest.mark.usefixtures("untuned")


def test_saved_choices_come_back_and_are_used(tmp_path: Path) -> None:
    tuning = Tuning([CHOICE], HERE)
    tuning.save(tmp_path / "a.json")
    again = sgconvnext.Tuning.load(tmp_path / "a.json")
    assert again == tuning
    assert choose_backend(torch.empty(8, 4, 256)) == "fft"
    again.use()
    assert choose_backend(torch.empty(8, 4, 256)) == "dft"
    assert str(again.choices[0]) == (
        "4 channels x 256 samples, batch 8, float32, training: dft, 3.00 times as fast as fft; "
        "toeplitz left out: wrong, y error 1.0e+00"
    )


def test_choices_of_another_device_are_refused() -> None:
    with refused("'Abacus'", HERE["device"], "tune here"):
        Tuning([CHOICE], HERE | {"device": "Abacus"}).use()
    with refused("backend 'abacus' is unknown", "fft"):
        Tuning([CHOICE, replace(CHOICE, backend="abacus")], HERE).use()
    assert choose_backend(torch.empty(8, 4, 256)) == "fft"  # not even the good one of the two


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"facts": {}, "choices": [{}]}',
        json.dumps({"facts": {}, "choices": [CHOICE.__dict__]}),
        json.dumps({"facts": HERE, "choices": [CHOICE.__dict__ | {"dtype": "float33"}]}),
        json.dumps({"facts": HERE, "choices": [CHOICE.__dict__ | {"dtype": "nn"}]}),
        json.dumps({"facts": HERE, "choices": [CHOICE.__dict__ | {"batch": "8"}]}),
    ],
    ids=range(8),
)
def test_file_without_choices_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with refused("a.json", "no choices of sgconvnext.tune", "Tuning.save"):
        Tuning.load(tmp_path / "a.json")


def test_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with refused("none.json", "No such file"):
        Tuning.load(tmp_path / "none.json")


def test_choices_of_a_gpu_are_refused_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with refused("'NVIDIA H100'", "a machine without CUDA"):
        Tuning([replace(CHOICE, device="cuda")], HERE | {"device": "NVIDIA H100"}).use()


def test_reason_why_the_shipped_backend_is_not_taken_is_told() -> None:
    choice = replace(CHOICE, seconds={"dft": 1e-3}, left_out={"fft": "fails: no kernel"})
    assert str(choice).endswith("training: dft, in place of fft; fft left out: fails: no kernel")


def test_choice_that_cannot_run_here_is_not_taken() -> None:
    tuned.prefer(CHOICE.convolution, 8, "triton")
    assert choose_backend(torch.empty(8, 4, 256)) == "fft"
