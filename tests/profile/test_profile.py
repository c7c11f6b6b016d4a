"""The commands of sgconvnext.profile: their tables, their refusals, and what stands in README."""

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import BACKENDS_HERE, refused
from PIL import Image
from torch import Tensor
from training_helpers import ROOT, environment

from sgconvnext.longconv import BACKENDS
from sgconvnext.profile import __main__ as main
from sgconvnext.profile import flops, ops, plot, throughput
from sgconvnext.profile.flops import UncountedError
from sgconvnext.profile.timing import Timing
from sgconvnext.profile.workload import DoesNotFitError, Workload

ATTO = "sgconvnext_atto,depths=[1,1,1,1]"
BRIEF = ["--rounds", "2", "--seconds", "0.001"]
Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quiet: None) -> Run:
    """A command in this process; its standard output."""

    def told(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["profile", *map(str, arguments)])
        main.main()
        return capsys.readouterr().out

    return told


@pytest.fixture
def refusal(run: Run, capsys: pytest.CaptureFixture[str]) -> Run:
    """The one line that a command ends with."""

    def told(*arguments: object) -> str:
        with pytest.raises(SystemExit) as stopped:
            run(*arguments)
        assert stopped.value.code == 2
        captured = capsys.readouterr()
        assert not captured.out
        return captured.err.splitlines()[-1]

    return told


@pytest.fixture
def no_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that measure memory take seconds to start."""
    monkeypatch.setattr(throughput, "peak_memory", lambda spec, work: work.batch * 2**30)


def test_flops_counts_per_image_whatever_the_batch(run: Run) -> None:
    one, four = (
        json.loads(run("flops", "convnext_atto", ATTO, "--img-size", "64", "--batch", batch, "--json"))["tables"]
        for batch in (1, 4)
    )
    (convnext, ours), (convnext_4, ours_4) = one[0]["rows"], four[0]["rows"]
    assert convnext == convnext_4
    assert ours_4["GMACs"] < ours["GMACs"]  # the kernels are shared
    assert ours["GFLOPs"] == 2 * ours["GMACs"]
    assert [row["model"] for row in one[1]["rows"]] == ["convnext_atto", ATTO]


def test_parts_of_the_stages_add_up(run: Run) -> None:
    text = run("flops", ATTO, "convnext_atto", "--img-size", "64", "--batch", 2, "--stages", "--json")
    totals, parts, details = (table["rows"] for table in json.loads(text)["tables"])
    for total, by_part in zip(totals, parts, strict=True):
        rows = [row for row in details if row["model"] == total["model"]]
        assert {row["stage"] for row in rows} == {"stem", "1", "2", "3", "4", "head"}
        for heading, unit in {"parameters": 1, "activations": 1, "executed": 1000}.items():
            assert sum(row[heading] for row in rows) == pytest.approx(unit * total[heading])
        assert sum(row["MFLOPs"] for row in rows) == pytest.approx(1000 * total["GFLOPs"])
        for part in {row["part"] for row in rows}:
            assert sum(row["MMACs"] for row in rows if row["part"] == part) == pytest.approx(by_part[part])
    assert parts[0]["convolution, executed"] != parts[0]["convolution"]  # the last stages are matrix products
    assert parts[1]["convolution, executed"] == parts[1]["convolution"]


@pytest.fixture
def halving(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is timed: the first thing takes a second, the second two, the third three."""

    def timed(steps: list[Any], device: Any, rounds: int, seconds: float) -> list[Timing]:
        for step in steps:
            step()
        return [Timing([[i + 1.0]] * rounds, [[1.0]] * rounds) for i in range(len(steps))]

    monkeypatch.setattr(throughput, "interleave", timed)


def test_throughput_compares_with_the_first_of_each_group(run: Run, no_children: None, halving: None) -> None:
    models = ["convnext_atto", ATTO, ATTO, "convnext_atto"]
    text = run("throughput", *models, "--group", 2, "--img-size", 32, "--batch", 1, 2, *BRIEF, "--json")
    rows = json.loads(text)["tables"][0]["rows"]
    assert [(row["batch"], row["model"]) for row in rows] == [(b, model) for b in (1, 2) for model in models]
    assert [row["ratio"] for row in rows] == [1, 0.5] * 4
    assert [row["images/s"] for row in rows] == [1, 0.5, 1, 0.5, 2, 1, 2, 1]
    assert all(len(row["seconds"]) == 2 and row["spread, %"] == 0 for row in rows)
    assert all(row["peak GiB"] == row["batch"] for row in rows)
    assert rows[0]["parameters"] == 3_695_520 != rows[1]["parameters"]


def test_model_that_does_not_fit_is_noted_and_the_others_are_kept(
    run: Run, halving: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def peak(spec: str, work: Workload) -> int:
        if work.batch > 1 and spec == ATTO:
            raise DoesNotFitError(f"{spec}, {work}: out of memory")
        return 2**30

    monkeypatch.setattr(throughput, "peak_memory", peak)
    text = run("throughput", "convnext_atto", ATTO, "--img-size", 32, "--batch", 1, 2, *BRIEF, "--json")
    [table] = json.loads(text)["tables"]
    assert ["ratio" in row for row in table["rows"]] == [True, True, False, False]
    assert ["peak GiB" in row for row in table["rows"]] == [True, True, True, False]
    assert table["notes"][-1] == (
        f"{ATTO}, inference, 32 px, batch 2: out of memory; convnext_atto and {ATTO} were not timed."
    )


def test_group_that_does_not_fit_together_is_noted(
    run: Run, no_children: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 5 bytes")

    monkeypatch.setattr(throughput, "interleave", out_of_memory)
    [table] = json.loads(run("throughput", ATTO, "--img-size", 32, *BRIEF, "--json"))["tables"]
    assert "images/s" not in table["rows"][0]
    assert "out of memory" in table["notes"][-1]


def test_size_that_does_not_fit_the_count_leaves_the_others(
    run: Run, no_children: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = throughput.flops.count

    def out_of_memory(model: Any, x: Tensor) -> Any:
        if x.shape[-1] > 32:
            raise RuntimeError("Storage size calculation overflowed with sizes=[1, 2]")
        return count(model, x)

    monkeypatch.setattr(throughput.flops, "count", out_of_memory)
    throughput._counted_at.cache_clear()
    [table] = json.loads(run("scaling", ATTO, "--img-size", 32, 64, *BRIEF, "--json"))["tables"]
    throughput._counted_at.cache_clear()
    assert ["images/s" in row for row in table["rows"]] == [True, False]
    assert f"{ATTO}, inference, 64 px, batch 1: out of memory; {ATTO} were not timed." in table["notes"]


@pytest.mark.parametrize(
    ("model", "word"),
    [("resnet18.bogus", "tag"), (f"{ATTO[:15]},depths=[3]", "four"), ("convnext_atto,depths=[3]", "index"),
     ("convnext_atto,act_layer=bogus", "bogus"), ("vit_tiny_patch16_224,num_heads=0", "zero")],
)  # fmt: skip
def test_model_that_cannot_be_built_is_named(model: str, word: str, refusal: Run) -> None:
    told = refusal("flops", model)
    assert repr(model.split(",")[0]) in told
    assert word in told


def test_layer_that_does_not_fit_is_noted_beside_the_others(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = ops.prepare

    def out_of_memory(layer: ops.Layer) -> Any:
        if layer.batch > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 5 bytes")
        return prepare(layer)

    monkeypatch.setattr(ops, "prepare", out_of_memory)
    [table] = json.loads(run("ops", "--shape", "4x3x3", "--batch", 1, 2, *BRIEF, "--json"))["tables"]
    assert [row["batch"] for row in table["rows"]] == [1]
    assert table["notes"][-1] == "inference of 2 x 4 x 3 x 3: out of memory; not timed."


def test_commands_tell_memory_from_other_errors(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(message: str) -> None:
        monkeypatch.setattr(flops, "tables", lambda *_: (_ for _ in ()).throw(RuntimeError(message)))

    failing("DefaultCPUAllocator: can't allocate memory: you tried to allocate 5 bytes")
    with pytest.raises(SystemExit):
        run("flops", ATTO)
    failing("shapes differ")
    with pytest.raises(RuntimeError, match="shapes differ"):  # a bug: its traceback is needed
        run("flops", ATTO)


@pytest.mark.filterwarnings("ignore:.*lr_scheduler:UserWarning")
def test_training_takes_longer_than_inference(run: Run, no_children: None) -> None:
    text = run("throughput", ATTO, "--mode", "inference", "training", "--img-size", 64, "--batch", 4, "--json", *BRIEF)
    inference, training = json.loads(text)["tables"][0]["rows"]
    assert (inference["mode"], training["mode"]) == ("inference", "training")
    assert training["images/s"] < inference["images/s"]


def test_flops_that_are_not_known_are_said_and_do_not_stop_the_clock(
    run: Run, no_children: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: Any) -> None:
        raise UncountedError("ConvNeXt runs aten::cumsum, which no formula counts")

    monkeypatch.setattr(throughput.flops, "count", unknown)
    throughput._counted_at.cache_clear()
    [table] = json.loads(run("throughput", ATTO, ATTO, "--img-size", 32, "--json", *BRIEF))["tables"]
    assert "GMACs" not in table["rows"][0]
    assert sum("aten::cumsum" in note for note in table["notes"]) == 1
    throughput._counted_at.cache_clear()


def test_environment_and_command_are_in_every_table(run: Run, no_children: None) -> None:
    text = run("throughput", ATTO, "--img-size", 32, "--threads", 1, "--dtype", "bf16", "--channels-last", *BRIEF)
    last = text.splitlines()[-1]
    for word in (
        "threads 1",
        f"torch {torch.__version__}",
        "bf16 autocast",
        "channels_last",
        "run eager",
        "2 of 0.001 s",
    ):
        assert word in last
    assert f"`python -m sgconvnext.profile throughput '{ATTO}' --img-size 32 --threads 1" in last


def test_scaling_states_how_cost_grows_over_the_last_step(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "peak_memory", lambda spec, work: work.img_size[0] ** 2 * 2**20)

    def timed(steps: list[Any], device: Any, rounds: int, seconds: float) -> list[Timing]:
        sizes.append(None)
        return [Timing([[8.0 ** len(sizes)]], [[1.0]]) for _ in steps]

    sizes: list[None] = []
    monkeypatch.setattr(throughput, "interleave", timed)
    text = run("scaling", "convnext_atto", ATTO, "--img-size", 128, 32, 64, *BRIEF, "--json")
    [table] = json.loads(text)["tables"]
    assert [row["px"] for row in table["rows"]] == ["32", "32", "64", "64", "128", "128"]
    for model, note in zip(["convnext_atto", ATTO], table["notes"][-2:], strict=True):
        assert note == f"{model}, inference, 64 to 128 px: time grows as pixels^1.50, memory as pixels^1.00."


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_ops_times_every_backend_that_fits_beside_the_depthwise_convolution(
    run: Run, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setattr(ops, "MATRIX_LIMIT", 2 * 36**2 * 4)
    text = run("ops", "--shape", "2x6x4", "2x6x6", "2x7x7", "--batch", 2, "--mode", mode, *BRIEF, "--json")
    small, middle, large = json.loads(text)["tables"][0]["rows"]
    assert small["L"] == 24
    for row in (small, middle, large):
        measured = {name for name in BACKENDS if f"{name} ms" in row}
        assert row["fastest"] in measured
        assert row["7x7 ms"] > 0
        assert row["kernel ms"] > 0
        assert row["SGConv ms"] > 0
        assert row["ratio"] > 0
    assert {name for name in BACKENDS if f"{name} ms" in small} == set(BACKENDS_HERE)
    assert {name for name in BACKENDS if f"{name} ms" in middle} == set(BACKENDS_HERE) - {"reference"}
    assert {name for name in BACKENDS if f"{name} ms" in large} == set(BACKENDS_HERE) - {"reference", "toeplitz"}
    assert (small["auto"], large["auto"]) == ("toeplitz", "fft")


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_ops_times_convolutions_of_the_layer_and_their_gradients(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
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


@pytest.mark.parametrize(("slower", "right"), [(1.04, "yes"), (1.06, "no")])
def test_choice_is_right_within_a_tie(slower: float, right: str) -> None:
    seconds = {"7x7": 1.0, "SGConv": 4.0, "kernel": 0.5, "fft": 2.0, "toeplitz": 2.0 * slower, "reference": 9.0}
    timings = {name: Timing([[time]], [[1.0]]) for name, time in seconds.items()}
    row = ops.row(ops.Layer((8, 4, 4)), timings)
    assert (row["auto"], row["fastest"], row["right"]) == ("toeplitz", "fft", right)
    assert row["ratio"] == 0.25
    assert row["toeplitz ms"] == 2000 * slower


def rows_of(*models: str) -> list[dict[str, Any]]:
    return [
        {"model": model, "mode": mode, "px": "224", "batch": 8, "GMACs": 1.0 + i, "images/s": 100.0 / (i + 1)}
        for mode in ("inference", "training")
        for i, model in enumerate(models)
    ]


def test_plot_has_a_panel_per_mode_and_two_for_accuracy(tmp_path: Path) -> None:
    rows = rows_of("convnext_tiny", "convnext_small", "sgconvnext_tiny")
    plot.draw(rows, {}, tmp_path / "a.png")
    plot.draw(rows, {"convnext_tiny": 82.1, "sgconvnext_tiny": 82.0}, tmp_path / "b.png")
    with Image.open(tmp_path / "a.png") as two, Image.open(tmp_path / "b.png") as four:
        assert four.width == 2 * two.width
        assert len(two.convert("RGB").getcolors(10**6)) > 10
    assert (tmp_path / "b.png").stat().st_size < 200_000


def test_accuracies_are_read_as_timm_writes_them(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_text("# by hand\nmodel,top1,top1_err\nconvnext_tiny,82.066,17.934\nsgconvnext_tiny,82,18\n")
    models = ["sgconvnext_tiny", "convnext_tiny", "convnext_base"]
    assert plot.read_accuracies(path, models) == {"convnext_tiny": 82.066, "sgconvnext_tiny": 82.0}
    with refused(str(path), "none of the models", "convnext_base"):
        plot.read_accuracies(path, ["convnext_base"])


@pytest.mark.parametrize("text", ["name,top1\na,1\n", "model,top1\na,high\n", "model,top1\na\n", "\x00\n"])
def test_accuracies_in_another_form_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "results.csv"
    path.write_text(text)
    with refused(str(path), "model and top1"):
        plot.read_accuracies(path, ["a"])


def test_plot_of_nothing_is_refused(tmp_path: Path) -> None:
    with refused("--plot", "nothing to draw"):
        plot.draw([{"model": "a", "GMACs": 1.0}], {}, tmp_path / "a.png")


def test_families_are_told_apart_by_name_and_arguments() -> None:
    specs = ["convnext_tiny.fb_in1k", "sgconvnext_tiny,num_scales=4", "convnextv2_large", "resnet"]
    assert [plot._family_and_size(spec) for spec in specs] == [
        ("convnext", "tiny"),
        ("sgconvnext,num_scales=4", "tiny"),
        ("convnextv2", "large"),
        ("resnet", "resnet"),
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    {
        "unknown model": (["flops", "convnext_tinny"], ["'convnext_tinny'", "did you mean"]),
        "too small": (["flops", "sgconvnext_atto", "--img-size", "16"], ["16x16", "32x32"]),
        "second model": (["throughput", "convnext_atto", "sgconvnext_atto,num_scales=0"], ["num_scales"]),
        "one size": (["scaling", "convnext_atto", "--img-size", "64"], ["--img-size", "two sizes"]),
        "same size": (["scaling", "convnext_atto", "--img-size", "64", "64"], ["--img-size", "another number"]),
        "compile": (["throughput", *["convnext_atto"] * 9, "--compile"], ["torch.compile", "--group 8"]),
        "reparameterized training": (
            ["throughput", "convnext_atto", "--reparameterize", "--mode", "training"],
            ["--reparameterize", "inference"],
        ),
        "accuracy alone": (["throughput", "convnext_atto", "--accuracy", "a.csv"], ["--accuracy", "--plot"]),
        "no accuracies": (
            ["throughput", "convnext_atto", "--accuracy", "no.csv", "--plot", "a.png"],
            ["no.csv", "No such file"],
        ),
        "plot folder": (["throughput", "convnext_atto", "--plot", "no/a.png"], ["no/a.png"]),
        "batch": (["flops", "convnext_atto", "--batch", "0"], ["--batch", "'0'", "at least 1"]),
        "size": (["flops", "convnext_atto", "--img-size", "big"], ["--img-size", "'big'"]),
        "shape": (["ops", "--shape", "96x56"], ["--shape", "96x56x56"]),
        "seconds": (["ops", "--seconds", "-1"], ["--seconds", "-1"]),
    }.values(),
    ids=str,
)
def test_bad_input_ends_with_one_line(refusal: Run, arguments: list[str], words: list[str]) -> None:
    line = refusal(*arguments)
    for word in words:
        assert word in line
    assert line.startswith(("sgconvnext.profile: error: ", "python -m sgconvnext.profile"))


def test_cuda_that_is_not_there_is_refused(refusal: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cpu" in refusal("ops", "--device", "cuda")


def test_command_measures_memory_in_processes_of_their_own(tmp_path: Path) -> None:
    line = f"-m sgconvnext.profile throughput {ATTO} --img-size 32 --csv --plot {tmp_path / 'a.png'}"
    done = subprocess.run(
        [sys.executable, *line.split(), *BRIEF],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == f"inference, 32 px, batch 1: {ATTO}\n"
    [row] = csv.DictReader(text for text in done.stdout.splitlines() if text and not text.startswith("#"))
    assert 0 <= float(row["peak GiB"]) < 0.5
    assert float(row["GMACs"]) > 0
    assert (tmp_path / "a.png").exists()


def test_works_of_a_command_cover_every_mode_batch_and_size() -> None:
    class Arguments:
        mode, dtype, channels_last, device = ["inference", "training"], "fp32", False, "cpu"
        compile = reparameterize = False

    works = main.workloads(Arguments(), [1, 2], [(32, 32), (64, 32)])  # type: ignore[arg-type]
    assert len(set(works)) == 8
    assert Workload("training", 2, (64, 32)) in works
