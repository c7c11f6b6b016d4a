"""profile ops: what is timed and checked beside the 7x7 convolution, and that a wrong backend is seen."""

import functools
import json
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import BACKENDS_HERE, refused
from torch import Tensor

from sgconvnext.longconv import BACKENDS, Backend, long_conv
from sgconvnext.profile import __main__ as main
from sgconvnext.profile import ops, timing
from sgconvnext.profile.session import Session
from sgconvnext.profile.timing import Timing

Rows = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def _short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "TURN_S", 1e-4)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quiet: None) -> Callable[..., Any]:
    """The command in this process: its table, and its exit code."""

    def told(*arguments: object) -> tuple[Any, Any]:
        brief = ["--rounds", "2", "--round-seconds", "0.0001", "--json"]
        monkeypatch.setattr(sys, "argv", ["profile", "ops", *map(str, arguments), *brief])
        code = None
        try:
            main.main()
        except SystemExit as stopped:
            code = stopped.code
        [table] = json.loads(capsys.readouterr().out)["tables"]
        return table, code

    return told


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_backend_that_fits_is_checked_and_timed_beside_the_depthwise_convolution(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setattr(ops, "MATRIX_LIMIT", 2 * 36**2 * 4)
    monkeypatch.setattr(ops, "available_backends", lambda signal: BACKENDS_HERE)  # without the interpreter's
    table, code = run("--shape", "2x6x4", "2x6x6", "2x7x7", "--batch", 2, "--dtype", dtype)
    assert code is None
    too_large: dict[str, set[str]] = {"2x6x4": set(), "2x6x6": {"reference"}, "2x7x7": {"reference", "toeplitz"}}
    for layer, mode in [(layer, mode) for layer in too_large for mode in ("inference", "training")]:
        rows = [row for row in table["rows"] if (row["layer"], row["mode"]) == (layer, mode)]
        backends = [name for name in BACKENDS_HERE if name not in too_large[layer]]
        assert [row["what"] for row in rows] == ["7x7", "SGConv", "kernel", *backends]
        assert all(row["ms"] > 0 and row["ratio"] > 0 and len(row["seconds"]) == 2 for row in rows)
        assert all("peak MiB" not in row for row in rows)  # on a CPU
        for row in rows:
            found = [row[name] for name in ops.ERRORS if name in row]
            assert len(found) == (3 if row["what"] in backends else 0)
            assert all(0 < error <= ops.TOLERANCE[dtype] for error in found)
        assert sum("fastest" in row["mark"] for row in rows) == 1
    chosen = {row["layer"]: row["what"] for row in table["rows"] if "auto" in row["mark"]}
    assert chosen["2x6x4"] == "toeplitz"
    assert chosen.get("2x7x7") == ("fft" if dtype == "fp32" else None)  # toeplitz, which is left out
    assert "median" in " ".join(table["notes"])


MODEL = "sgconvnext_atto_gap3,depths=[1,2,1,1],dims=[2,3,4,5],img_size=(64,32)"


def test_layers_of_a_model_are_measured_with_the_zeros_between_their_rows(run: Callable[..., Any]) -> None:
    assert ops.shapes_of([MODEL, MODEL]) == [(2, 16, 8, 3), (3, 8, 4, 3), (4, 4, 2, 3), (5, 2, 1, 3)]
    table, code = run(MODEL, "--batch", 2, "--mode", "training")
    assert code is None
    layers = {"2x16x8+3": 176, "3x8x4+3": 56, "4x4x2+3": 20, "5x2x1+3": 8}
    assert {row["layer"]: row["L"] for row in table["rows"]} == layers
    for row in table["rows"]:
        assert "wrong" not in row["mark"]
        assert all(0 < row[name] <= 1e-5 for name in ops.ERRORS if name in row)
    both, _ = run(MODEL, "--shape", "2x3x3", "--batch", 1, "--mode", "inference")
    assert {row["layer"] for row in both["rows"]} == {*layers, "2x3x3"}


def test_signal_of_a_layer_is_its_map_with_zeros_after_every_row() -> None:
    layer = ops.Layer((2, 3, 4), row_gap=3)
    image = torch.randn(1, 2, 3, 4)
    rows = layer.signal(image).unflatten(2, (3, 7))
    assert torch.equal(rows[..., :4], image)
    assert not rows[..., 4:].any()


def test_wrong_backend_of_a_layer_with_a_gap_is_seen(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "dft", broken("last channel"))
    table, code = run(MODEL, "--batch", 1, "--mode", "inference")
    assert code == 1
    assert {row["what"] for row in table["rows"] if "wrong" in row["mark"]} == {"dft"}
    assert "dft in inference of 1 x 2 x 16 x 8+3 is wrong: its errors are not within 1e-05." in table["notes"]


def test_model_without_a_long_convolution_is_refused() -> None:
    with refused("convnext_atto has no SGConv layer", "name an sgconvnext model"):
        ops.shapes_of(["convnext_atto"])


def as_backend(function: Callable[[Tensor, Tensor], Tensor]) -> Backend:
    return Backend(BACKENDS["toeplitz"].flops, plain=function)


def broken(fault: str) -> Backend:
    toeplitz = functools.partial(long_conv, backend="toeplitz")
    faults: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "reversed": lambda x, taps: toeplitz(x, taps.flip(-1)),
        "zero": lambda x, taps: 0 * (x + taps.sum().to(x.dtype)),
        "NaN": lambda x, taps: toeplitz(x, taps) * math.nan,
        "last channel": lambda x, taps: torch.cat([toeplitz(x, taps)[:, :-1], x[:, -1:]], 1),
        "dx": lambda x, taps: toeplitz(1.02 * x - 0.02 * x.detach(), taps),
        "dtaps": lambda x, taps: toeplitz(x, 1.02 * taps - 0.02 * taps.detach()),
    }
    return as_backend(faults[fault])


@pytest.mark.parametrize("fault", ["reversed", "zero", "NaN", "last channel", "dx", "dtaps"])
def test_wrong_backend_is_marked_and_the_command_ends_with_1(
    fault: str, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "TRUTH_LIMIT", 2 * 8 * 30**2)  # two of four channels: the first and the last
    monkeypatch.setitem(BACKENDS, "dft", broken(fault))
    table, code = run("--shape", "4x6x5", "--batch", 2, "--mode", "training")
    assert code == 1
    assert {row["what"] for row in table["rows"] if "wrong" in row["mark"]} == {"dft"}
    assert not any("fastest" in row["mark"] for row in table["rows"] if row["what"] == "dft")
    assert "dft in training of 2 x 4 x 6 x 5 is wrong: its errors are not within 1e-05." in table["notes"]


def test_backend_that_fails_leaves_the_others_in(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(x: Tensor, taps: Tensor) -> Tensor:
        raise ValueError("out of resource")

    monkeypatch.setitem(BACKENDS, "toeplitz", as_backend(fails))
    table, code = run("--shape", "4x9x9", "--batch", 2, "--mode", "inference")
    assert code == 1
    assert [row["what"] for row in table["rows"][3:]] == ["fft", "dft", "reference"]
    assert "toeplitz in inference of 2 x 4 x 9 x 9 failed: out of resource" in table["notes"]


def test_layer_that_does_not_fit_is_noted_beside_the_others(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = ops.prepare

    def out_of_memory(layer: ops.Layer) -> Any:
        if layer.batch > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 5 bytes")
        return prepare(layer)

    monkeypatch.setattr(ops, "prepare", out_of_memory)
    table, code = run("--shape", "4x3x3", "--batch", 1, 2, "--mode", "inference")
    assert code is None
    assert {row["batch"] for row in table["rows"]} == {1}
    assert table["notes"][-1] == "inference of 2 x 4 x 3 x 3: out of memory; not timed."


def test_ctrl_c_keeps_the_layers_that_were_measured(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    real = ops.results

    def interrupted(backend: str, x: Tensor, *others: Tensor) -> Any:
        if backend == "fft" and len(x) == 2:
            raise KeyboardInterrupt
        return real(backend, x, *others)

    monkeypatch.setattr(ops, "results", interrupted)
    table, code = run("--shape", "4x3x3", "--batch", 1, 2, 3, "--mode", "inference")
    assert code == 130
    assert {row["batch"] for row in table["rows"]} == {1}
    assert table["notes"][-1].startswith("Not measured before Ctrl-C: fft in inference of 2 x 4 x 3 x 3; ")
    assert table["notes"][-1].endswith("; inference of 2 x 4 x 3 x 3; inference of 3 x 4 x 3 x 3.")


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_convolutions_of_the_layer_and_their_gradients_are_timed(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    convolved, gradients = [], []
    grad, long_conv = torch.autograd.grad, ops.long_conv

    def watched_conv(x: Tensor, taps: Tensor, backend: str) -> Tensor:
        convolved.append((backend, x.shape, taps.shape))
        return long_conv(x, taps, backend)

    def watched_grad(y: Tensor, inputs: list[Tensor], dy: Tensor) -> Any:
        gradients.append([tuple(tensor.shape) for tensor in inputs])
        return grad(y, inputs, dy)

    monkeypatch.setattr(ops, "long_conv", watched_conv)
    monkeypatch.setattr(torch.autograd, "grad", watched_grad)
    steps = ops.prepare(ops.Layer((4, 6, 5), batch=2, mode=mode, channels_last=True))  # type: ignore[arg-type]
    assert list(steps) == ["7x7", "SGConv", "kernel", *BACKENDS_HERE]
    for step in steps.values():
        step()
        step()  # the graph is built anew
    assert convolved == [(backend, (2, 4, 30), (4, 59)) for backend in BACKENDS_HERE for _ in range(2)]
    image, kernel = (2, 4, 6, 5), [(2, 5, 4, 2), (4,)]
    wanted = [[image, (4, 1, 7, 7), (4,)], [image, *kernel], kernel, *[[(2, 4, 30), (4, 59)]] * len(BACKENDS_HERE)]
    assert gradients == ([shapes for shapes in wanted for _ in range(2)] if mode == "training" else [])


@pytest.mark.parametrize(("slower", "mark"), [(1.04, "auto"), (1.06, "auto, too slow")])
def test_choice_is_right_within_a_tie(slower: float, mark: str) -> None:
    seconds = {"7x7": 1.0, "SGConv": 4.0, "kernel": 0.5, "fft": 2.0, "toeplitz": 2.0 * slower, "reference": 0.1}
    timings = {name: Timing([[time]], [[1.0]]) for name, time in seconds.items()}
    errors = {name: dict.fromkeys(ops.ERRORS, 1e-7) for name in ("fft", "toeplitz", "reference")}
    errors["reference"]["dx error"] = math.nan
    rows = {row["what"]: row for row in ops.rows(ops.Layer((8, 4, 4)), timings, errors, {})}
    assert (rows["fft"]["mark"], rows["toeplitz"]["mark"], rows["reference"]["mark"]) == ("fastest", mark, "wrong")
    assert rows["SGConv"]["ratio"] == 0.25
    assert rows["toeplitz"]["ms"] == 2000 * slower


def test_gpu_runs_on_inputs_in_turns_and_tells_its_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    step = ops._in_turns([lambda i=i: ran.append(i) for i in range(3)])  # type: ignore[misc]
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 5 * 2**20)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: ran.append(-1))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7 * 2**20)
    assert ops._peak(step) == 2.0
    for _ in range(3):
        step()
    assert ran == [0, -1, 1, 2, 0, 1]


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_norm_and_sum_of_a_block_are_measured_where_triton_runs(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    found: list[Tensor] = []

    def step(layer: ops.Layer, forward: Callable[[], Tensor], inputs: list[Tensor]) -> Any:
        return lambda: found.append(forward()) or (found.extend(torch.autograd.grad(found[-1].sum(), inputs))
                                                   if mode == "training" else None)  # fmt: skip

    monkeypatch.setattr(ops, "_step", step)
    layer = ops.Layer((16, 5, 5), batch=2, mode=mode, dtype="bf16")
    steps = ops._around_the_mlp(layer, layer.images().flatten(2).requires_grad_(mode == "training"))
    for what in ("norm", "sum"):
        found.clear()
        with torch.autocast("cpu", torch.bfloat16):
            steps[f"{what} by torch"]()
            steps[f"{what} by triton"]()
        half = len(found) // 2
        assert half == (4 if mode == "training" else 1)
        for want, got in zip(found[:half], found[half:], strict=True):
            assert ops.relative_error(got, want) <= 3e-2  # in bfloat16


def test_session_of_a_wrong_backend_has_failed() -> None:
    layer = ops.Layer((4, 3, 3))
    assert ops.table([layer], session := Session(1, 1e-4)).rows
    assert not session.failed
