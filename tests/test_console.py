"""What a command says when its output cannot be written, and when Ctrl-C comes: one line or none, and a code."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import refused
from training_helpers import ROOT, command_line, environment, only_line, trained

import validate
from sgconvnext import console, figure
from sgconvnext.profile import throughput
from sgconvnext.training import checkpoint

ATTO = "sgconvnext_atto,depths=[1,1,1,1],dims=[8,16,24,32]"
FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint whose validation images are noise."""
    path = Path(trained(tmp_path_factory.mktemp("run"))[0])
    checkpoint.save(path, checkpoint.load(path) | {"class_to_idx": None})
    return str(path)


COMMANDS = {
    "validate": ["validate.py", "--checkpoint", "{run}"],
    "profile": ["-m", "sgconvnext.profile", "flops", ATTO, "--img-size", "32"],
    "export": ["-m", "sgconvnext.export", "{run}", "{folder}/exported"],
    "visualize": ["-m", "sgconvnext.visualize", "energy", "{run}", "--out", "{folder}/a.png"],
}


def started(name: str, run: str, folder: Path, shell: str = "", **options: object) -> "subprocess.Popen[str]":
    """A command of ours; ``shell`` is what a shell would read behind it."""
    line = command_line(*(part.format(run=run, folder=folder) for part in COMMANDS[name]))
    words = ["bash", "-c", f'"$@" {shell}', "bash", *line]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, cwd=ROOT, env=environment(), **(pipes | options))  # type: ignore[call-overload, no-any-return]


@needs_full
@pytest.mark.parametrize("name", COMMANDS)
def test_result_that_cannot_be_written_is_told_in_the_line_that_ends_the_command(
    name: str, run_of: str, tmp_path: Path
) -> None:
    process = started(name, run_of, tmp_path, "> /dev/full")
    told = process.communicate(timeout=240)[1]
    assert process.returncode == 1, told
    assert "Traceback" not in told
    *above, last = told.splitlines()
    assert re.match(r"(validate\.py|sgconvnext\.\w+): error: standard output cannot be written \(No space left", last)
    if name == "profile":
        assert any(line.startswith(ATTO) for line in above)  # the table, which may have taken hours
    else:
        assert not above
    if name == "validate":
        assert json.loads(last.partition("; it would have held: ")[2])["count"] == 7


@pytest.mark.parametrize(
    ("shell", "reason"), [("| true", ""), (">&-", "Bad file descriptor"), ("> /dev/full 2>&1", "")]
)
def test_result_without_a_reader_ends_in_a_code_of_its_own(
    shell: str, reason: str, run_of: str, tmp_path: Path
) -> None:
    process = started("validate", run_of, tmp_path, f"{shell}; exit ${{PIPESTATUS[0]}}")
    told = process.communicate(timeout=240)[1]
    assert process.returncode == 1, told
    assert reason in told
    assert "2>&1" in shell or only_line("validate", told)


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


INTERRUPTED = {
    "validate.py": ["sgconvnext.training.engine.evaluate", "--checkpoint", "{run}"],
    "sgconvnext.export": ["sgconvnext.export.write_folder", "{run}", "{folder}/exported"],
    "sgconvnext.visualize": ["sgconvnext.visualize.kernels.draw_energy", "energy", "{run}", "--out", "{folder}/a.png"],
    "sgconvnext.profile": ["sgconvnext.profile.flops.tables", "flops", ATTO],
}
SIGNALLED = """
import os, runpy, signal, sys
from unittest import mock
script, where = sys.argv.pop(1), sys.argv.pop(1)
if script == "sgconvnext.export":  # which runs as a module of another name
    where = "sgconvnext.training.build.trained_model"
def ring(*_, **__):
    os.kill(os.getpid(), signal.SIGINT)
    signal.pause()
with mock.patch(where, ring):
    sys.argv[0] = script
    runpy.run_path(script, run_name="__main__") if script.endswith(".py") else runpy.run_module(
        script, run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("script", INTERRUPTED)
def test_ctrl_c_ends_a_command_with_130_and_no_traceback(script: str, run_of: str, tmp_path: Path) -> None:
    arguments = [part.format(run=run_of, folder=tmp_path) for part in INTERRUPTED[script]]
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED, script, *arguments],
        cwd=ROOT,
        env=environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["train.py", "validate.py"])
def test_ctrl_c_during_the_imports_prints_no_traceback(script: str) -> None:
    process = subprocess.Popen(
        command_line("-X", "importtime", script, "--help"), cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    while "argparse" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGINT)
    told = process.stderr.read()
    assert process.wait(60) == -signal.SIGINT
    assert "Traceback" not in told


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


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_ctrl_c_while_memory_is_measured_ends_its_process_without_a_word(tmp_path: Path) -> None:
    line = command_line(
        *f"-m sgconvnext.profile throughput {ATTO} --img-size 32 --batch 1 --round-seconds 0.1".split()
    )
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(line, cwd=ROOT, env=environment(), stdout=log, stderr=log, start_new_session=True)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        spawned: list[str] = []
        while not spawned and process.poll() is None:
            spawned = [
                child
                for child in children.read_text().split()
                if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
            ]
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        assert process.wait(60) == 130
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert not any(Path(f"/proc/{child}").exists() for child in spawned)


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
