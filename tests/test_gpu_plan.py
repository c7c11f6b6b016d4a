"""The GPU plan tried out on a CPU with tiny networks: tables, verdicts and the clock, but no number of a GPU."""

import json
import math
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import refused, relative_error
from torch import Tensor

from sgconvnext.longconv import BACKENDS
from sgconvnext.profile import __main__ as main
from sgconvnext.profile import gpu, gpu_models, gpu_ops, ops, timing
from sgconvnext.profile.gpu_models import Variant
from sgconvnext.profile.gpu_plan import TIMED, Deadline, Plan, Stage
from sgconvnext.profile.table import Table
from sgconvnext.profile.timing import Timing
from sgconvnext.profile.workload import Workload

HERE = ("fft", "toeplitz", "dft")  # that run on a CPU
PLAN = Plan(
    device="cpu",
    sizes=("atto",),
    img_size=32,
    backends=HERE,
    forward_batch=3,
    backward_batch=2,
    check_batches=(1, 3),
    copy_bytes=2**10,
    matmul_side=16,
    rounds=2,
    seconds=1e-4,
    model_rounds=2,
    model_seconds=1e-4,
)


@pytest.fixture(autouse=True)
def _short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "TURN_S", 1e-4)


def test_stages_are_those_of_the_network() -> None:
    tiny, large = (Plan(sizes=(size,)).stages() for size in ("tiny", "large"))
    assert [stage.shape for stage in tiny] == [(96, 56, 56), (192, 28, 28), (384, 14, 14), (768, 7, 7)]
    assert [stage.shape[0] for stage in large] == [192, 384, 768, 1536]
    assert [stage.blocks for stage in tiny] == [3, 3, 9, 3]
    assert str(large[2]) == "large's stage 3"
    assert Plan().stages() == tiny + large
    assert (Plan().batch("inference"), Plan().batch("training")) == (256, 128)


def test_deadline_stops_what_runs_and_leaves_out_the_rest() -> None:
    deadline, ran = Deadline(0.2), []
    before = signal.getsignal(signal.SIGALRM)
    start = time.monotonic()
    deadline.run("first", lambda: ran.append(1))
    deadline.run("second", lambda: [time.sleep(0.01) for _ in range(1000)])
    deadline.run("third", lambda: ran.append(3))
    assert time.monotonic() - start < 2
    assert ran == [1]
    assert deadline.notes() == ["Not reached before the deadline: second; third."]
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_deadline_is_no_exception_that_a_compiler_could_swallow() -> None:
    def stubborn() -> None:
        try:
            time.sleep(5)
        except Exception:
            time.sleep(5)

    start = time.monotonic()
    Deadline(0.1).run("stubborn", stubborn)
    assert time.monotonic() - start < 2


def test_failure_is_noted_and_the_rest_goes_on() -> None:
    deadline, ran = Deadline(60), []

    def fails() -> None:
        raise RuntimeError("CUDA error:\n  out of memory")

    deadline.run("first", fails)
    deadline.run("second", lambda: ran.append(2))
    assert ran == [2]
    assert deadline.notes() == ["first failed: CUDA error: out of memory"]


def test_share_ends_earlier_and_shares_its_memory() -> None:
    deadline = Deadline(100)
    half = deadline.share(0.5)
    assert 49 < half.left <= 50 < deadline.left
    Deadline(-1).share(0.5).run("elsewhere", lambda: None)
    deadline.share(-1).run("something", lambda: None)
    assert deadline.notes() == half.notes() == ["Not reached before the deadline: something."]


def test_first_part_measures_every_stage_layout_and_backend() -> None:
    deadline = Deadline(600)
    rates, depthwise, exact, speed, sums = gpu_ops.tables(PLAN, deadline)
    assert deadline.notes() == []
    assert [row["unit"] for row in rates.rows] == ["GB/s", "TFLOP/s"]
    assert all(row["rate"] > 0 for row in rates.rows)
    assert [(row["stage"], row["layout"]) for row in depthwise.rows] == [
        (stage, layout) for stage in (1, 2, 3, 4) for layout in ("NHWC", "NCHW")
    ]
    for row in depthwise.rows:
        samples = 2 * row["channels"] * int(row["map"].split("x")[0]) ** 2
        assert row["dgrad ps/sample"] == pytest.approx(row["dgrad ms"] * 1e9 / samples)
        assert row["forward ps/sample"] == pytest.approx(row["forward ms"] * 1e9 / samples / 1.5)
    truth, *rows = exact.rows
    assert truth["backend"] == "fft, float64"
    assert [(row["stage"], row["backend"]) for row in rows] == [(s, name) for s in (1, 2, 3, 4) for name in HERE]
    assert [row["right"] for row in exact.rows] == ["yes"] * 13
    assert all(0 < row["y"] < 5e-3 for row in rows)
    assert len(speed.rows) == 2 * 2 * 4
    assert all(row[f"{name} ms"] > 0 for row in speed.rows for name in ("7x7", "SGConv", "kernel", *HERE))
    assert {f"{name} ms" for name in HERE} < set(speed.columns)
    assert not {"reference ms", "right"} & set(speed.columns)
    assert len(sums.rows) == 2 * 2
    assert not any("reference" in heading for row in (*speed.rows, *sums.rows) for heading in row)


def test_first_part_says_what_it_did_not_reach() -> None:
    deadline = Deadline(-1)
    found = gpu_ops.tables(PLAN, deadline)
    assert not any(table.rows for table in found)
    [note] = deadline.notes()
    assert "rates; 7x7 of atto's stage 1 in NHWC; " in note
    assert "exactness of dft in atto's stage 4; " in note
    assert note.endswith("training of atto's stage 4 in NCHW.")


def test_gradients_of_the_depthwise_convolution_are_those_of_autograd() -> None:
    x, weight = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(3, 1, 7, 7, requires_grad=True)
    dy = torch.randn(2, 3, 8, 8)
    y: Any = gpu_ops._forward_step(x, weight)()
    want = torch.autograd.grad(y, [x, weight], dy)
    for i, which in enumerate(("dgrad", "wgrad")):
        got: Any = gpu_ops._backward_step(dy, x.detach(), weight.detach(), which)()
        assert [tensor is not None for tensor in got] == [i == 0, i == 1, False]
        assert relative_error(got[i], want[i]) < 1e-6


def test_inputs_take_turns() -> None:
    ran: list[int] = []
    step = gpu_ops._in_turns([lambda i=i: ran.append(i) for i in range(3)])
    for _ in range(7):
        step()
    assert ran == [0, 1, 2, 0, 1, 2, 0]


STAGE = Stage("atto", 1, 4, 6, 2)


def broken(fault: str) -> Callable[[Tensor, Tensor], Tensor]:
    toeplitz = BACKENDS["toeplitz"]
    return {
        "reversed": lambda x, taps: toeplitz(x, taps.flip(-1)),
        "zero": lambda x, taps: 0 * (x + taps.sum().to(x.dtype)),
        "NaN": lambda x, taps: toeplitz(x, taps) * math.nan,
        "random": lambda x, taps: toeplitz(x, taps) * (1 + 1e-2 * torch.rand(1)).to(x.dtype),
        "taps rounded": lambda x, taps: toeplitz(x, taps.to(x.dtype)),  # and so their gradient
    }[fault]


@pytest.mark.parametrize(
    ("fault", "again"),
    {"reversed": "yes", "zero": "yes", "NaN": "no", "random": "no", "taps rounded": "yes"}.items(),
)
def test_broken_backend_is_not_right(fault: str, again: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "broken", broken(fault))
    row = gpu_ops.exactness(PLAN, STAGE, "broken")
    assert (row["right"], row["again"]) == ("no", again)
    assert gpu_ops.exactness(PLAN, STAGE, "toeplitz")["right"] == "yes"


def test_wrong_truth_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_ops._truth(PLAN)["right"] == "yes"
    monkeypatch.setitem(BACKENDS, "fft", broken("reversed"))
    assert gpu_ops._truth(PLAN)["right"] == "no"


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_layers_are_timed_on_bf16_tensors_in_their_layout(
    mode: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, torch.dtype, torch.dtype, bool, int]] = []
    long_conv = ops.long_conv

    def watched(x: Tensor, taps: Tensor, backend: str) -> Tensor:
        seen.append((backend, x.dtype, taps.dtype, x.is_contiguous(), x.data_ptr()))
        return long_conv(x, taps, backend)

    monkeypatch.setattr(ops, "long_conv", watched)
    row = gpu_ops._speed(PLAN, STAGE, mode, layout)
    assert (row["size"], row["stage"], row["layout"], row["mode"], row["L"]) == ("atto", 1, layout, mode, 36)
    assert row["batch"] == (3 if mode == "inference" else 2)
    assert {call[:4] for call in seen} == {(name, torch.bfloat16, torch.float32, layout == "NCHW") for name in HERE}
    assert len({call[4] for call in seen}) == gpu_ops.SETS


def test_layers_without_autocast_have_weights_of_their_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes: list[Any] = []

    def watched(self: torch.nn.Conv2d, x: Tensor) -> Tensor:
        dtypes.append((x.dtype, self.weight.dtype, torch.is_autocast_enabled("cpu")))
        return x

    monkeypatch.setattr(torch.nn.Conv2d, "forward", watched)
    for autocast in (True, False):
        ops.prepare(ops.Layer((4, 6, 6), dtype="bf16", autocast=autocast))["7x7"]()
    assert dtypes == [(torch.float32, torch.float32, True), (torch.bfloat16, torch.bfloat16, False)]


def speed_rows(milliseconds: dict[str, list[float]], mode: str = "inference") -> list[dict[str, Any]]:
    """Of the four stages, with the fastest backend named."""
    rows = []
    for i in range(4):
        times = {f"{name} ms": values[i] for name, values in milliseconds.items() if values[i]}
        backends = {name: values[i] for name, values in milliseconds.items() if name != "7x7" and values[i]}
        fastest = min(backends, key=backends.__getitem__)
        rows.append({"size": "atto", "mode": mode, "layout": "NHWC", "stage": i + 1, "fastest": fastest} | times)
    return rows


def test_sums_weigh_layers_by_their_blocks() -> None:
    rows = speed_rows({"7x7": [1, 2, 3, 4], "fft": [2, 2, 2, 2], "toeplitz": [0, 1, 1, 1]})
    table = gpu_ops.sums(PLAN, rows)
    [row] = table.rows  # of one mode and layout; the others are not complete
    assert (row["7x7 ms"], row["fft ms"]) == (2 * 1 + 2 * 2 + 6 * 3 + 2 * 4, 2 * 12)  # 2, 2, 6 and 2 blocks
    assert "toeplitz ms" not in row
    assert row["best ms"] == 2 * 2 + 2 * 1 + 6 * 1 + 2 * 1
    assert row["7x7 / best"] == 32 / 14
    assert gpu_ops.sums(PLAN, rows[:3]).rows == []


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An allocator whose peak over what was there before grows by 1 GiB with every model; and no compiler."""
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 5 * 2**30)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: calls.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: (5 + calls.count("reset")) * 2**30)
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: calls.append("compiled") or model)
    return calls


@pytest.mark.filterwarnings("ignore:.*lr_scheduler:UserWarning")
def test_third_part_compares_models_eager_and_compiled(memory: list[str]) -> None:
    plan, deadline = replace(PLAN, backends=("dft",)), Deadline(600)
    models, verdicts = gpu_models.tables(plan, deadline)
    assert deadline.notes() == []
    specs = ["convnext_atto", "sgconvnext_atto,backend=dft"]
    assert [(row["model"], row["run"], row["mode"], row["batch"]) for row in models.rows] == [
        (spec, run, mode, batch)
        for mode, batch in (("inference", 3), ("training", 2))
        for run in ("eager", "compiled")
        for spec in specs
    ]
    assert memory == 2 * ["reset", "reset", "compiled", "reset", "compiled", "reset"]
    assert [row["peak GiB"] for row in models.rows] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert all(row["images/s"] > 0 for row in models.rows)
    assert models.rows[0]["ratio"] == models.rows[4]["ratio"] == 1
    assert [(row["mode"], row["measure"]) for row in verdicts.rows] == [
        ("inference", "speed"),
        ("training", "speed"),
        ("training", "peak memory"),
    ]
    assert not any("must" in row for row in verdicts.rows[:2])  # atto has no goal


def test_models_run_as_the_plan_says(memory: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    works: list[tuple[str, Workload]] = []
    monkeypatch.setattr(gpu_models, "prepare", lambda spec, work: works.append((spec, work)) or (lambda: None))
    plan = Plan(device="cpu", model_rounds=1, model_seconds=1e-4, backends=("fft", "dft"))
    gpu_models.compare(plan, "large", "training", Deadline(60))
    assert [spec for spec, _ in works] == 2 * [
        "convnext_large",
        "sgconvnext_large,backend=fft",
        "sgconvnext_large,backend=dft",
    ]
    assert {work for _, work in works} == {
        Workload("training", 128, (224, 224), "bf16", channels_last=True, compile=compiled, device="cpu")
        for compiled in (False, True)
    }


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_only_models_that_infer_are_reparameterized(
    mode: str, memory: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed: set[bool] = set()
    monkeypatch.setattr(gpu_models, "prepare", lambda spec, work: fixed.add(work.reparameterize) or (lambda: None))
    gpu_models.compare(replace(PLAN, reparameterize=True), "atto", mode, Deadline(60))
    assert fixed == {mode == "inference"}


def test_model_that_fails_or_comes_too_late_leaves_the_others_in(
    memory: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(spec: str, work: Workload) -> Callable[[], None]:
        if "fft" in spec:
            raise torch.OutOfMemoryError("out of memory")
        if work.compile:
            time.sleep(30)
        return lambda: None

    monkeypatch.setattr(gpu_models, "prepare", prepare)
    monkeypatch.setattr(gpu_models, "_free", lambda: None)  # collecting garbage takes half a second
    deadline = Deadline(1.0)
    variants = gpu_models.compare(replace(PLAN, backends=("fft", "dft")), "atto", "inference", deadline)
    assert [(variant.spec, variant.run) for variant in variants] == [
        ("convnext_atto", "eager"),
        ("sgconvnext_atto,backend=dft", "eager"),
    ]
    missed, failed = deadline.notes()
    assert missed == (
        "Not reached before the deadline: inference of convnext_atto, compiled; inference of "
        "sgconvnext_atto,backend=fft, compiled; inference of sgconvnext_atto,backend=dft, compiled."
    )
    assert failed == "inference of sgconvnext_atto,backend=fft failed: out of memory"


def variant(spec: str, compiled: bool, times: list[float], gib: float) -> Variant:
    return Variant(spec, Workload(compile=compiled), int(gib * 2**30), Timing([times], [[1.0] * len(times)]))


@pytest.mark.parametrize(
    ("ours", "gib", "reached", "memory_reached"),
    [(2.0, 10.0, "target", "target"), (2.4, 10.4, "must", "must"), (2.5, 10.6, "neither", "neither")],
)
def test_verdict_is_of_the_best_of_both(ours: float, gib: float, reached: str, memory_reached: str) -> None:
    speed, memory = gpu_models.verdict(
        "tiny",
        "training",
        [
            variant("convnext_tiny", False, [3.0, 3.0, 3.0], 12),
            variant("convnext_tiny", True, [2.4, 2.4, 9.0], 10),
            variant("sgconvnext_tiny,backend=dft", False, [ours, ours, ours], gib),
            variant("sgconvnext_tiny,backend=dft", True, [4.0, 4.0, 4.0], 1),
        ],
    )
    assert (speed["theirs"], speed["ours"]) == ("convnext_tiny, compiled", "sgconvnext_tiny,backend=dft, eager")
    assert speed["ratio"] == 2.4 / ours
    assert (speed["must"], speed["target"], speed["reached"]) == (1.0, 1.15, reached)
    assert memory["ratio"] == pytest.approx(gib / 10)
    assert (memory["must"], memory["target"], memory["reached"]) == (1.05, 1.0, memory_reached)


def test_inference_has_no_verdict_on_memory() -> None:
    [row] = gpu_models.verdict(
        "large", "inference", [variant("convnext_large", False, [1.0], 1), variant("sgconvnext_large", True, [1.0], 9)]
    )
    assert (row["must"], row["target"], row["reached"]) == (0.97, 1.05, "must")


def test_too_many_backends_to_compile_are_refused() -> None:
    with refused("--backends", "9", "8"):
        gpu_models.tables(Plan(backends=("fft",) * 9), Deadline(60))


Run = Callable[..., tuple[str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quiet: None, tmp_path: Path) -> Run:
    """The command in an empty folder; its standard output and its last line on standard error."""
    monkeypatch.chdir(tmp_path)

    def told(*arguments: object) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["profile", "gpu", *map(str, arguments)])
        main.main()
        captured = capsys.readouterr()
        return captured.out, captured.err

    return told


def test_without_a_gpu_one_line_says_so(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for part in gpu.PARTS:
        with pytest.raises(SystemExit) as stopped:
            run("--part", part)
        assert stopped.value.code == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        [line] = captured.err.splitlines()
        assert "CUDA device, and none is there" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--part", "4"], ["--part", "4"]),
        ([], ["--part"]),
        (["--part", "1", "--sizes", "huge"], ["--sizes", "huge", "tiny"]),
        (["--part", "1", "--backends", "reference"], ["--backends", "reference", "dft"]),
        (["--part", "1", "--deadline", "-1"], ["--deadline", "-1"]),
        (["--part", "1", "--out", "no/a.json"], ["--out", "no/a.json"]),
    ],
)
def test_bad_arguments_end_with_one_line(run: Run, capsys: Any, arguments: list[str], words: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert all(word in line for word in words)


def test_command_prints_its_tables_and_writes_them_as_json(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[Plan, float]] = []

    def part(plan: Plan, deadline: Deadline) -> list[Table]:
        asked.append((plan, deadline.left))
        deadline.run("beads", lambda: 1 / 0)
        empty = Table("Nothing", {"a": ""})
        return [empty, Table("Beads", {"ms": ".2f"}, [{"ms": 0.5, "seconds": [1, 2]}])]

    monkeypatch.setattr(main, "chosen_device", lambda name: "cuda")
    monkeypatch.setattr(main, "environment", lambda device, command, **more: {"device": device.type} | more)
    for number in gpu.PARTS:
        monkeypatch.setitem(gpu.PARTS, number, part)
        out, _ = run("--part", number, "--sizes", "tiny", "--mode", "training", "--deadline", 77)
        assert "Beads\n" in out
        assert "0.50" in out
        assert "beads failed: division by zero" in out
        assert "Nothing" not in out
        found = json.loads((tmp_path / f"gpu_part{number}.json").read_text())
        assert found["environment"]["device"] == "cuda"
        assert found["tables"][0]["rows"] == [{"ms": 0.5, "seconds": [1, 2]}]
        plan, left = asked[-1]
        assert (plan.sizes, plan.modes, plan.device) == (("tiny",), ("training",), "cuda")
        assert plan.backends == gpu.BACKENDS_OF[number]
        assert 70 < left <= 77
    run("--part", 1, "--backends", "dft", "--reparameterize", "--out", tmp_path / "a.json")
    assert asked[-1][0].reparameterize
    assert asked[-1][0].backends == ("dft",)
    assert asked[-1][0].sizes == ("tiny", "large")
    assert (tmp_path / "a.json").exists()


def test_parts_end_within_nine_minutes_unless_asked_otherwise() -> None:
    assert gpu.DEADLINE_S == 9 * 60
    assert set(gpu.BACKENDS_OF) == set(gpu.PARTS)
    assert set(gpu.BACKENDS_OF[1]) == set(TIMED) == set(BACKENDS) - {"reference"}
    assert gpu.BACKENDS_OF[3]


def test_driver_is_named_where_nvidia_smi_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "driver, power limit, top clock" not in gpu.facts()
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho '580.1, 700.00 W, 1980 MHz'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert gpu.facts()["driver, power limit, top clock"] == "580.1, 700.00 W, 1980 MHz"
