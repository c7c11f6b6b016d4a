"""The commands as processes whose output cannot be written, or which Ctrl-C ends: a line or none, and a code."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_helpers import ROOT, command_line, environment, only_line, trained

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
