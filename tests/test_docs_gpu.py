"""docs/gpu.sh, without a GPU: its commands are understood, and a part that fails is named."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_docs import parse
from training_helpers import ROOT

RECORDER = f"""#!{sys.executable}
import json, sys
with open("{{record}}", "a") as file:
    print(json.dumps(sys.argv[1:]), file=file)
sys.exit("{{failing}}" in sys.argv)
"""


def run(folder: Path, failing: str = "no part", cuda: bool = True) -> tuple[subprocess.CompletedProcess[str], Path]:
    """The script with programs that only record how they are called."""
    for name, text in (
        ("python", RECORDER.format(record=folder / "calls", failing=failing)),
        ("nvidia-smi", "#!/bin/sh"),
    ):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    python = str(folder / "python") if cuda else sys.executable
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": python, "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", str(ROOT / "docs" / "gpu.sh"), str(folder / "tables"), "60"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True), folder / "calls"


def test_every_command_of_the_gpu_script_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done, record = run(tmp_path)
    assert done.returncode == 0, done.stderr
    calls = [json.loads(line) for line in record.read_text().splitlines()]
    for call in calls:
        if "pytest" in call:
            assert all((ROOT / path).is_file() for path in call[3:])
        elif call[0] != "-c":
            parse(call, monkeypatch)
    profiled = [call[2] for call in calls if call[:2] == ["-m", "sgconvnext.profile"]]
    assert profiled == [*["ops", "throughput", "throughput"] * 2, "tiles", "signals", "generation", "tune"]
    assert [call[-1] for call in calls if call[0] == "train.py"][2] == "resume=auto"
    assert {path.name for path in (tmp_path / "tables").glob("*.md")} == {
        f"{part}.md"
        for part in (
            "tiles",
            "signals",
            "generation",
            *(f"{kind}_{size}" for kind in KINDS for size in ("tiny", "large")),
        )
    }


KINDS = ("ops", "inference", "training")


def test_part_that_fails_is_named_and_the_others_run(tmp_path: Path) -> None:
    done, record = run(tmp_path, failing="tiles")
    assert done.returncode == 1
    assert "FAILED: tiles.md;" in done.stderr
    assert record.read_text().splitlines()[-1].startswith('["-c"')


@pytest.mark.end_to_end
def test_machine_without_a_gpu_is_told(tmp_path: Path) -> None:
    done, _ = run(tmp_path, cuda=False)
    assert done.returncode == 2
    assert "torch sees no CUDA device" in done.stderr
    assert not (tmp_path / "tables").exists()
