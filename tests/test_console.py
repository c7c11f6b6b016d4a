"""What a command says when its output cannot be written, and when Ctrl-C comes: one line or none, and a code."""

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import refused
from training_helpers import ROOT, trained

import validate
from sgconvnext import console, figure
from sgconvnext.profile import throughput
from sgconvnext.training import checkpoint

ATTO = "sgconvnext_atto,depths=[1,1,1,1],dims=[8,16,24,32]"


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint whose validation images are noise."""
    path = Path(trained(tmp_path_factory.mktemp("run"))[0])
    checkpoint.save(path, checkpoint.load(path) | {"class_to_idx": None})
    return str(path)


@pytest.mark.end_to_end
def test_standard_output_that_knows_no_such_letter_gets_another(capsys: pytest.CaptureFixture[str]) -> None:
    process = subprocess.run(
        [sys.executable, "-c", "from sgconvnext import console; console.tell('x', 'runs/\\u017eluv\\udcff\\n')"],
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert process.stdout == "runs/\\u017eluv\\udcff\n"


# ---- Ctrl-C


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_interrupted_validation_ends_with_130_and_no_word(
    run_of: str, run_here: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(validate.engine, "evaluate", interrupted)
    try:
        with pytest.raises(SystemExit, match=r"^130$"):
            run_here(validate, "--checkpoint", run_of)
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr() == ("", "")


def test_rows_that_were_measured_before_ctrl_c_are_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sgconvnext.profile import __main__ as profile

    done: list[str] = []

    def compare(what: str, models: list[str], works: object, session: object, table: Any, best: object) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(what)
        table.rows.append({"model": models[0], "mode": "inference", "px": "32", "batch": len(done)})

    monkeypatch.setattr(throughput, "compare", compare)
    before = signal.getsignal(signal.SIGINT)
    for line, missed in {
        "throughput --img-size 32 --batch 1 2 3": "32 px, batch 3",
        "scaling --img-size 32 64 96": "96 px, batch 1",
    }.items():
        done.clear()
        monkeypatch.setattr(sys, "argv", ["profile", *line.split(), "--json", "--", ATTO])
        with pytest.raises(SystemExit, match=r"^130$"):
            profile.main()
        [table] = json.loads(capsys.readouterr().out)["tables"]
        assert [row["batch"] for row in table["rows"]] == [1, 2]
        assert table["notes"][-1] == f"Not measured before Ctrl-C: inference, {missed} of {ATTO}."
    signal.signal(signal.SIGINT, before)


# ---- files and arguments


@pytest.mark.parametrize("name", ["x.pdf", "x.svg", "x.jpg", "x", "png"])
def test_picture_of_another_kind_is_refused(name: str, tmp_path: Path) -> None:
    with refused(repr(str(tmp_path / name)), "PNG", f"{Path(name).stem}.png"):
        figure.check(tmp_path / name)
    figure.check(tmp_path / "x.PNG")


def test_home_folder_is_found_in_every_path_of_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from sgconvnext import export
    from sgconvnext.profile import __main__ as profile
    from sgconvnext.visualize import __main__ as visualize

    monkeypatch.setenv("HOME", "/home/me")
    for parse, line, names in [
        (validate.parse_args, "--checkpoint=~/a.pth", ["checkpoint"]),
        (export.parse_args, "~/a.pth ~/out", ["checkpoint", "folder"]),
        (visualize.parse_args, "erf ~/a.pth ~/b.jpg --against=~/c.pth --out=~/d.png", ["network", "image"]),
        (visualize.parse_args, "erf ~/a.pth ~/b.jpg --against=~/c.pth --out=~/d.png", ["against", "out"]),
        (profile.parse_args, "throughput a --plot=~/a.png --accuracy=~/b.csv", ["plot", "accuracy"]),
    ]:
        monkeypatch.setattr(sys, "argv", ["command", *line.split()])
        args = parse()  # type: ignore[operator]
        assert [getattr(args, name)[:10] for name in names] == ["/home/me/" + getattr(args, name)[9] for name in names]


@pytest.mark.parametrize("text", ["0", "-1", "2147483648", "9" * 5000, "1.5", ""])
def test_count_that_torch_does_not_take_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="at least 1 and at most 2147483647"):
        console.count(text)
    assert console.count("2147483647") == 2**31 - 1


@pytest.mark.parametrize("text", ["0", "nan", "inf", "1e300", "-1", "x"])
def test_seconds_that_nobody_waits_for_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="positive number of seconds, at most 1000000"):
        console.seconds(text)
    assert console.seconds("0.5") == 0.5
