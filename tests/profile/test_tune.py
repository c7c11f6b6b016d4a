"""sgconvnext.tune: what it measures, what it leaves out, and that "auto" then takes what it chose."""

import copy
import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import GAP, refused, relative_error, small_model
from timm.utils import reparameterize_model
from torch import Tensor

import sgconvnext
from sgconvnext import tuning
from sgconvnext.longconv import BACKENDS, choose_backend, dft, fft, tuned
from sgconvnext.longconv import compiled as compiled_backends
from sgconvnext.profile import __main__ as main
from sgconvnext.profile import tune
from sgconvnext.tuning import Choice

TOKENS = [256, 64, 16, 4]  # of the stages at 64 px


pytestmark = pytest.mark.usefixtures("untuned")


@pytest.fixture
def dft_is_fastest(fastest: Callable[[str], None]) -> None:
    fastest("dft")


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 64, 64)


def wrong(which: str) -> Any:
    """The DFT, with one of y, dx and dtaps a hundredth too large."""
    own = dft.BACKEND.operations
    assert own is not None
    scale = functools.partial(torch.mul, other=1.01)
    damaged = {
        "y": replace(own, convolve=lambda x, taps, adjoint: own.convolve(x, taps, adjoint) * (1 if adjoint else 1.01)),
        "dx": replace(own, gradients=None, convolve=lambda x, taps, a: own.convolve(x, taps, a) * (1.01 if a else 1)),
        "dtaps": replace(own, gradients=None, correlate=lambda x, dy, taps: scale(own.correlate(x, dy, taps))),
    }
    return replace(dft.BACKEND, operations=damaged[which])


@pytest.mark.parametrize(("mode", "work"), [("train", "training"), ("eval", "inference"), ("fixed", "frozen")])
@pytest.mark.parametrize("options", [{}, GAP], ids=str)
def test_auto_takes_what_was_measured_and_outputs_agree(
    mode: str, work: str, options: dict[str, Any], dft_is_fastest: None
) -> None:
    model = small_model(ls_init_value=0.5, **options).train(mode == "train")
    if mode == "fixed":
        model = reparameterize_model(model)
    x = images()
    with torch.set_grad_enabled(mode == "train"):
        before = model(x)
        found = sgconvnext.tune(model, x)
        after = model(x)
        signal = torch.empty(2, model.stages[0].blocks[0].sgconv.channels, 1)
        length = model.stages[0].blocks[0].sgconv.length
        assert choose_backend(signal, length=length, frozen=mode == "fixed") == "dft"
    first = found.choices[0]
    assert (first.work, first.batch, first.backend, first.shipped) == (work, 2, "dft", "fft")
    assert not torch.equal(before, after)  # another backend ran
    assert relative_error(after, before) <= 1e-5
    names = {"y error", "dx error", "dtaps error"} if mode == "train" else {"y error"}
    assert all(set(errors) == names for each in found.choices for errors in each.errors.values())
    assert max(error for each in found.choices for errors in each.errors.values() for error in errors.values()) <= 1e-5


def test_real_clock_chooses_among_backends_that_are_right() -> None:
    model = small_model().train()
    found = sgconvnext.tune(model, images())
    assert sorted((each.length for each in found.choices), reverse=True) == TOKENS
    for each in found.choices:
        assert each.backend in each.seconds
        assert {*each.seconds, *each.left_out} == {"fft", "toeplitz", "dft"}
        assert all(seconds > 0 for seconds in each.seconds.values())
        assert each.gain >= 1


@pytest.mark.parametrize("which", ["y", "dx", "dtaps"])
def test_wrong_backend_is_left_out_and_named(
    which: str, dft_is_fastest: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BACKENDS, "dft", wrong(which))
    found = sgconvnext.tune(small_model().train(), images())
    for each in found.choices:
        assert each.backend != "dft"
        assert "dft" not in each.seconds
        assert each.left_out["dft"].startswith("wrong, y error ")
        assert "dft left out: wrong" in str(each)
    assert "left out: wrong" in found.table().cells()[-1][-1]


def test_wrong_shipped_backend_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    own = fft.BACKEND.operations
    assert own is not None
    damaged = replace(own, convolve=lambda x, taps, adjoint: torch.zeros_like(x))
    monkeypatch.setitem(BACKENDS, "fft", replace(fft.BACKEND, operations=damaged, freeze=None))
    found = sgconvnext.tune(small_model(), images())
    assert {each.backend for each in found.choices if each.shipped == "fft"} <= {"toeplitz", "dft"}
    assert all(each.left_out["fft"] == "wrong, y error 1.0e+00" for each in found.choices)


def test_backend_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Tensor:
        raise RuntimeError("no kernel\nfor this device")

    own = dft.BACKEND.operations
    assert own is not None
    monkeypatch.setitem(BACKENDS, "dft", replace(dft.BACKEND, operations=replace(own, convolve=fail)))
    found = sgconvnext.tune(small_model(), images())
    assert all(each.left_out["dft"] == "fails: no kernel for this device" for each in found.choices)


def test_nothing_else_changes() -> None:
    model = small_model(drop_rate=0.5).train()
    model.stages[1].eval()  # as a user may have frozen it
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    x, drawn = images(), torch.get_rng_state()
    sgconvnext.tune(model, x)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_choices_are_of_autocasts_dtype(dft_is_fastest: None) -> None:
    model = small_model()
    with torch.autocast("cpu", torch.bfloat16):
        found = sgconvnext.tune(model, images())
        assert choose_backend(torch.empty(2, 8, 256)) == "fft"  # another mode: gradients are on
        with torch.no_grad():
            assert choose_backend(torch.empty(2, model.stages[0].blocks[0].sgconv.channels, 256)) == "dft"
    assert {each.dtype for each in found.choices} == {"bfloat16"}


@pytest.mark.parametrize(
    ("batch", "backend"),
    [(3, "fft"), (4, "dft"), (16, "dft"), (17, "fft"), (29, "fft"), (30, "toeplitz"), (120, "toeplitz")],
)
def test_choice_holds_for_batches_near_its_own(batch: int, backend: str) -> None:
    which = tuned.Convolution("cpu", torch.float32, 4, 256, "training")
    tuned.prefer(which, 8, "dft")
    tuned.prefer(which, 60, "toeplitz")
    x = torch.empty(batch, 4, 256)
    assert choose_backend(x) == backend
    assert choose_backend(x.double()) == choose_backend(x[:, :3]) == choose_backend(x[..., :255]) == "fft"


def test_exports_and_named_backends_do_not_look_at_choices() -> None:
    tuned.prefer(tuned.Convolution("cpu", torch.float32, 4, 256, "training"), 2, "toeplitz")
    x = torch.empty(2, 4, 256)
    assert choose_backend(x) == "toeplitz"
    assert choose_backend(x, "dft") == "dft"

    class Asks(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * (2 if choose_backend(x) == "fft" else 3)

    assert torch.jit.trace(Asks(), torch.ones(2, 4, 256))(torch.ones(2, 4, 256))[0, 0, 0] == 2


@pytest.mark.end_to_end
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_network_takes_choices_and_any_batch(dft_is_fastest: None, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    own = compiled_backends._operations

    def noting(backend: str) -> Any:
        ran.append(backend)
        return own(backend)

    model = small_model(ls_init_value=0.5)
    with torch.no_grad():
        sgconvnext.tune(model, images())
        monkeypatch.setattr(compiled_backends, "_operations", noting)
        compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
        for batch in (2, 3):
            x = images(batch)
            ran.clear()
            assert relative_error(compiled(x), model(x)) <= 1e-6
            assert ran == ["dft"] * 4


def test_one_convolution_is_measured_once(dft_is_fastest: None, monkeypatch: pytest.MonkeyPatch) -> None:
    which = tuned.Convolution("cpu", torch.float32, 4, 16, "inference")
    asked = [tuned.Asked(which, 2, dtype, False, True) for dtype in (torch.float32, torch.bfloat16)]

    class Asks(torch.nn.Module):
        def forward(self, x: Tensor) -> None:
            for listener in tuned._LISTENERS:
                listener.extend(asked)

    assert tune._asked(Asks().eval(), images()) == asked[:1]


def test_no_right_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tune.TOLERANCE, torch.float32, -1.0)
    with refused("no backend convolves 8 channels x 256 samples rightly", "fft: wrong, y error"):
        sgconvnext.tune(small_model(), images())


def test_dilated_layers_ask_for_what_they_convolve() -> None:
    model = small_model(output_stride=8)
    found = sgconvnext.tune(model, images())
    assert [(each.length, each.batch) for each in found.choices] == [(256, 2), (64, 2), (16, 8), (4, 32)]


def test_model_that_asks_for_no_backend_is_refused() -> None:
    with refused("ConvNeXt has no SGConv layer", "backend='auto'"):
        sgconvnext.tune(timm.create_model("convnext_atto"), images())
    with refused("no SGConv layer with backend='auto'"):
        sgconvnext.tune(small_model(backend="fft"), images())


def test_table_has_every_backend() -> None:
    found = sgconvnext.tune(small_model(), images())
    cells = found.table().cells()
    assert len(cells) == 3 * len(found.choices)
    assert list(found.table().columns) == list(tuning.COLUMNS)
    assert sum("chosen" in line[-1] for line in cells) == len(found.choices)


def test_command_prints_every_backend_and_saves_the_choices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quiet: None
) -> None:
    spec, path = "sgconvnext_atto,depths=[1,1,1,1],dims=[8,16,24,32]", tmp_path / "a.json"
    monkeypatch.setattr(
        "sys.argv", ["profile", *f"tune {spec} --img-size 64 --batch 2 3 --save {path} --json".split()]
    )
    main.main()
    rows = json.loads(capsys.readouterr().out)["tables"][0]["rows"]
    choices = [each for each in sgconvnext.Tuning.load(path).choices if isinstance(each, Choice)]
    assert {(each.work, each.batch) for each in choices} == {
        (work, batch) for work in ("training", "inference") for batch in (2, 3)
    }
    assert len(rows) == 3 * len(choices) == 3 * 16
