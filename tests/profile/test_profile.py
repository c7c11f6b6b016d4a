"""The commands of sgconvnext.profile: their tables, their refusals, and what stands in README."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import refused
from PIL import Image
from torch import Tensor

from sgconvnext.profile import __main__ as main
from sgconvnext.profile import flops, plot, throughput
from sgconvnext.profile.flops import UncountedError
from sgconvnext.profile.session import DoesNotFitError, Session
from sgconvnext.profile.timing import Timing
from sgconvnext.profile.workload import Workload

ATTO = "sgconvnext_atto,depths=[1,1,1,1]"
CONVNEXT = "convnext_atto,depths=[1,1,1,1]"
BRIEF = ["--rounds", "2", "--round-seconds", "0.001"]
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
        json.loads(run("flops", CONVNEXT, ATTO, "--img-size", "64", "--batch", batch, "--json"))["tables"]
        for batch in (1, 4)
    )
    (convnext, ours), (convnext_4, ours_4) = one[0]["rows"], four[0]["rows"]
    assert convnext == convnext_4
    assert ours_4["GMACs"] < ours["GMACs"]  # the kernels are shared
    assert ours["GFLOPs"] == 2 * ours["GMACs"]
    assert [row["model"] for row in one[1]["rows"]] == [CONVNEXT, ATTO]


def test_parts_of_the_stages_add_up(run: Run) -> None:
    text = run("flops", ATTO, CONVNEXT, "--img-size", "64", "--batch", 2, "--stages", "--json")
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
def no_models(no_children: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is counted or run."""
    monkeypatch.setattr(throughput, "_counted", lambda spec, img_size: (1000, 1.0, ""))
    monkeypatch.setattr(throughput, "prepare", lambda spec, work: lambda: None)


@pytest.fixture
def halving(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is timed: the first thing takes a second, the second two, the third three."""

    def timed(self: Session, what: str, steps: list[Any], device: Any) -> list[Timing]:
        return [Timing([[i + 1.0]] * self.rounds, [[1.0]] * self.rounds) for i in range(len(steps))]

    monkeypatch.setattr(Session, "time", timed)


def test_throughput_compares_with_the_first_of_each_group(run: Run, no_models: None, halving: None) -> None:
    models = ["convnext_atto", ATTO, ATTO, "convnext_atto"]
    text = run("throughput", *models, "--group", 2, "--img-size", 32, "--batch", 1, 2, *BRIEF, "--json")
    rows = json.loads(text)["tables"][0]["rows"]
    assert [(row["batch"], row["model"]) for row in rows] == [(b, model) for b in (1, 2) for model in models]
    assert [row["ratio"] for row in rows] == [1, 0.5] * 4
    assert [row["images/s"] for row in rows] == [1, 0.5, 1, 0.5, 2, 1, 2, 1]
    assert all(len(row["seconds"]) == 2 and row["spread, %"] == 0 for row in rows)
    assert all(row["peak GiB"] == row["batch"] for row in rows)


def test_model_that_does_not_fit_is_noted_and_the_others_are_kept(
    run: Run, halving: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def peak(spec: str, work: Workload) -> int:
        if work.batch > 1 and spec == ATTO:
            raise DoesNotFitError(f"{spec}, {work}: out of memory")
        return 2**30

    monkeypatch.setattr(throughput, "peak_memory", peak)
    text = run("throughput", ATTO, "convnext_atto", "--img-size", 32, "--batch", 1, 2, *BRIEF, "--json")
    [table] = json.loads(text)["tables"]
    assert ["images/s" in row for row in table["rows"]] == [True, True, False, True]
    assert ["ratio" in row for row in table["rows"]] == [True, True, False, False]  # the first is not there
    assert table["notes"][-1] == f"{ATTO}, inference, 32 px, batch 2: out of memory; not timed."


def test_group_that_does_not_fit_together_is_noted(
    run: Run, no_children: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 5 bytes")

    monkeypatch.setattr(Session, "time", out_of_memory)
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
    throughput._counted.cache_clear()
    [table] = json.loads(run("scaling", ATTO, "--img-size", 32, 64, *BRIEF, "--json"))["tables"]
    throughput._counted.cache_clear()
    assert [row["px"] for row in table["rows"]] == ["32"]
    assert f"{ATTO}, inference, 64 px, batch 1: out of memory; not timed." in table["notes"]


@pytest.mark.parametrize(
    ("model", "word"),
    [("resnet18.bogus", "tag"), (f"{ATTO[:15]},depths=[3]", "four"), ("convnext_atto,depths=[3]", "index"),
     ("convnext_atto,act_layer=bogus", "bogus"), ("vit_tiny_patch16_224,num_heads=0", "zero")],
)  # fmt: skip
def test_model_that_cannot_be_built_is_named(model: str, word: str, refusal: Run) -> None:
    told = refusal("flops", model)
    assert repr(model.split(",")[0]) in told
    assert word in told


def test_commands_tell_memory_from_other_errors(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(message: str) -> None:
        monkeypatch.setattr(flops, "tables", lambda *_: (_ for _ in ()).throw(RuntimeError(message)))

    failing("DefaultCPUAllocator: can't allocate memory: you tried to allocate 5 bytes")
    with pytest.raises(SystemExit):
        run("flops", ATTO)
    failing("shapes differ")
    with pytest.raises(RuntimeError, match="shapes differ"):  # a bug: its traceback is needed
        run("flops", ATTO)


@pytest.mark.end_to_end
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
    throughput._counted.cache_clear()
    [table] = json.loads(run("throughput", ATTO, ATTO, "--img-size", 32, "--json", *BRIEF))["tables"]
    assert "GMACs" not in table["rows"][0]
    assert sum("aten::cumsum" in note for note in table["notes"]) == 1
    throughput._counted.cache_clear()


def test_environment_and_command_are_in_every_table(run: Run, no_children: None) -> None:
    text = run("throughput", ATTO, "--img-size", 32, "--threads", 1, "--dtype", "bf16", "--channels-last", *BRIEF)
    last = text.splitlines()[-1]
    for word in (
        "threads 1",
        f"torch {torch.__version__}",
        "bf16 autocast",
        "channels_last",
        "2 of 0.001 s",
    ):
        assert word in last
    assert f"`python -m sgconvnext.profile throughput '{ATTO}' --img-size 32 --threads 1" in last


def test_scaling_states_how_cost_grows_over_the_last_step(
    run: Run, no_models: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throughput, "peak_memory", lambda spec, work: work.img_size[0] ** 2 * 2**20)

    def timed(self: Session, what: str, steps: list[Any], device: Any) -> list[Timing]:
        sizes.append(None)
        return [Timing([[8.0 ** len(sizes)]], [[1.0]]) for _ in steps]

    sizes: list[None] = []
    monkeypatch.setattr(Session, "time", timed)
    text = run("scaling", "convnext_atto", ATTO, "--img-size", 128, 32, 64, *BRIEF, "--json")
    [table] = json.loads(text)["tables"]
    assert [row["px"] for row in table["rows"]] == ["32", "32", "64", "64", "128", "128"]
    for model, note in zip(["convnext_atto", ATTO], table["notes"][-2:], strict=True):
        assert note == f"{model}, inference, 64 to 128 px: time grows as pixels^1.50, memory as pixels^1.00."


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
        "round": (["throughput", "convnext_atto", "--round-seconds", "0"], ["--round-seconds", "0"]),
        "way": (["throughput", "convnext_atto", "--run", "eager", "fast"], ["--run", "'fast'", "compiled"]),
        "way and eager": (["throughput", "convnext_atto", "--run", "eager+compiled"], ["--run", "'eager'"]),
        "way of training": (
            ["throughput", "convnext_atto", "--run", "eager", "reparameterized", "--mode", "training"],
            ["--reparameterize", "inference"],
        ),
        "compiled twice": (
            ["throughput", *["convnext_atto"] * 5, "--run", "compiled", "compiled+channels-last"],
            ["torch.compile", "--group 4"],
        ),
        "save": (["tune", "convnext_atto", "--save", "no/a.json"], ["--save 'no/a.json'", "no folder"]),
        "nothing to tune": (["tune", "convnext_atto"], ["nothing was measured", "no SGConv layer"]),
        "fixed taps": (
            ["tune", "sgconvnext_atto", "--reparameterize", "--mode", "training"],
            ["--reparameterize", "inference"],
        ),
        "no time": (["ops", "--seconds", "1e-9"], ["nothing was measured", "inference of 1 x 96 x 56 x 56"]),
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


@pytest.mark.parametrize(
    "command",
    [["ops"], ["throughput", "convnext_atto"], ["tune", "sgconvnext_atto"], ["scaling", "convnext_atto"], ["tiles"]],
)
def test_a_gpu_is_used_where_there_is_one(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["profile", *command])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert main.chosen_device(main.parse_args().device) == "cuda"


def test_works_of_a_command_cover_every_mode_batch_size_and_way() -> None:
    class Arguments:
        mode, dtype, device, run = ["inference"], "fp32", "cpu", [[], ["compiled"], ["compiled", "reparameterized"]]
        compile = reparameterize = False
        channels_last = True

    works = main.workloads(Arguments(), [1, 2], [(32, 32), (64, 32)])  # type: ignore[arg-type]
    assert [len(set(ways)) for ways in works] == [3] * 4
    assert len({work for ways in works for work in ways}) == 12
    assert [work.run for work in works[3]] == [
        "channels-last",
        "compiled+channels-last",
        "compiled+reparameterized+channels-last",
    ]
    assert works[3][1] == Workload("inference", 2, (64, 32), compile=True, channels_last=True)


def test_model_is_run_in_several_ways_and_the_fastest_of_each_is_named(
    run: Run, no_models: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seconds = [3.0, 4.0, 8.0, 6.0]  # of both models in both ways

    def timed(self: Session, what: str, steps: list[Any], device: Any) -> list[Timing]:
        return [Timing([[time, time]], [[3.0, 3.0]]) for time in seconds]

    monkeypatch.setattr(Session, "time", timed)
    ways = ["eager", "reparameterized"]
    line = ["--img-size", 32, "--run", *ways, *BRIEF, "--json", "--plot", tmp_path / "a.png"]
    every, best = json.loads(run("throughput", "convnext_atto", ATTO, *line))["tables"]
    assert [(row["model"], row["run"]) for row in every["rows"]] == [
        (model, way) for model in ("convnext_atto", ATTO) for way in ways
    ]
    assert [row["ratio"] for row in every["rows"]] == [1, 0.75, 0.375, 0.5]
    assert [(row["run"], row["images/s"], row["ratio"]) for row in best["rows"]] == [
        ("eager", 1 / 3, 1),
        ("reparameterized", 1 / 6, 0.5),
    ]
    assert (tmp_path / "a.png").exists()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The session's clock, which the measurements move themselves."""
    now = [0.0]
    monkeypatch.setattr("sgconvnext.profile.session.time.monotonic", lambda: now[0])
    return now


def test_seconds_end_a_command_which_says_what_it_did_not_reach(
    run: Run, no_models: None, halving: None, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(spec: str, work: Workload) -> Callable[[], None]:
        clock[0] += 10
        return lambda: None

    monkeypatch.setattr(throughput, "prepare", prepare)
    sizes = ["--img-size", 32, "--batch", 1, 2, 3]
    text = run("throughput", "convnext_atto", ATTO, *sizes, "--seconds", 25, *BRIEF, "--json")
    [table] = json.loads(text)["tables"]
    # the second comparison is timed with what was ready; the first step of the second model would have come too late
    assert [(row["batch"], row["model"]) for row in table["rows"] if "images/s" in row] == [
        (1, "convnext_atto"),
        (1, ATTO),
        (2, "convnext_atto"),
    ]
    assert table["notes"][-1] == (
        f"Not measured before the 25 seconds of --seconds were over: {ATTO}, inference, 32 px, batch 2; "
        f"inference, 32 px, batch 3 of convnext_atto and {ATTO}."
    )
