"""profile signals: the three are what they say, and a layer that is wrong is told."""

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import refused, relative_error

from sgconvnext.longconv import reference
from sgconvnext.profile import __main__ as main
from sgconvnext.profile import memory, signals, timing
from sgconvnext.profile.signals import Signals


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quiet: None) -> Callable[..., Any]:
    """The command in this process, with a memory that is not measured: its table, and its exit code."""
    monkeypatch.setattr(timing, "TURN_S", 1e-4)
    monkeypatch.setattr(memory, "peak", lambda what, device, prepare: 2**30)

    def told(*arguments: object) -> tuple[Any, Any]:
        brief = ["--rounds", "2", "--round-seconds", "0.0001", "--json"]
        monkeypatch.setattr(sys, "argv", ["profile", "signals", *map(str, arguments), *brief])
        code = None
        try:
            main.main()
        except SystemExit as stopped:
            code = stopped.code
        [table] = json.loads(capsys.readouterr().out)["tables"]
        return table, code

    return told


def test_rows_are_of_every_length_and_mode_and_attention_ends_at_its_longest(run: Callable[..., Any]) -> None:
    table, code = run("--length", 64, 200, "--channels", 64, "--batch", 2, "--longest-attention", 64)
    assert code is None
    found = [(row["L"], row["mode"], row["what"]) for row in table["rows"]]
    mixers = {64: ["SGConv", "rfft", "attention"], 200: ["SGConv", "rfft"]}
    assert found == [
        (length, mode, name) for length in mixers for mode in ("inference", "training") for name in mixers[length]
    ]
    assert all(row["ms"] > 0 and row["peak GiB"] == 1 and len(row["seconds"]) == 2 for row in table["rows"])


@pytest.mark.parametrize("length", [1, 64, 100, 1000])
def test_the_convolution_by_torchs_fft_is_the_layers_definition(length: int) -> None:
    layer, x = signals._layer(Signals(length, channels=64))
    with torch.no_grad():
        want = reference.long_conv(x.double(), layer.built_taps().double())
        assert relative_error(signals.by_rfft(layer, x), want) <= 2e-6


@pytest.mark.parametrize("name", signals.MIXERS)
def test_training_takes_the_gradient_of_everything_and_inference_of_nothing(name: str) -> None:
    inputs, mix = signals.MIXERS[name](Signals(16, channels=64, mode="training"))
    y = mix()
    assert all(gradient.norm() > 0 for gradient in torch.autograd.grad(y, inputs, torch.ones_like(y)))
    inputs, _ = signals.MIXERS[name](Signals(16, channels=64))
    assert not inputs[0].requires_grad
    signals.prepare(name, Signals(16, channels=64, mode="training"))()


def test_layer_that_differs_is_told(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "difference", lambda work: 0.5)
    table, code = run("--length", 16, "--channels", 64, "--mode", "inference")
    assert code == 1
    assert any("SGConv and rfft differ by 5.0e-01 in inference of 1 x 64 x 16." in note for note in table["notes"])


def test_channels_that_make_no_heads_are_refused() -> None:
    with refused("--channels 100", "multiple of 64"):
        signals.works([16], 100, [1], ["inference"])
