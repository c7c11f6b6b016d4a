"""What README says of tests, files and scripts is true."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_helpers import ROOT, environment, write_config

from sgconvnext.models.sgconvnext import SIZES
from sgconvnext.profile import flops
from sgconvnext.training import checkpoint
from sgconvnext.training.image_folders import SUFFIXES

README = (ROOT / "README.md").read_text()


def test_tests_that_the_fault_table_names_exist() -> None:
    tests = {path.name: path.read_text() for path in (ROOT / "tests").glob("*.py")}
    defined = {name for text in tests.values() for name in re.findall(r"^def (test_\w+)\(", text, re.MULTILINE)}
    rows = [line for line in README.splitlines() if re.match(r"\|[^|]+\|[^|]+\| .*(test_|tests/|the same)", line)]
    assert len(rows) >= 17
    named = [name for row in rows for name in re.findall(r"`(test_\w+)`", row)]
    assert len(named) >= 18
    assert set(named) <= defined
    for row in rows:
        assert all(name.removeprefix("tests/") in tests for name in re.findall(r"tests/\w+\.py", row)), row


def test_modules_that_the_layout_names_exist_and_none_is_missing() -> None:
    layout = README.split("## Layout")[1].split("```")[1]
    named = set(re.findall(r"\b(\w+\.py)\b", layout))
    there = {path.name for path in (ROOT / "sgconvnext").glob("*.py")} - {"__init__.py"}
    for package in ("longconv", "profile", "visualize"):
        [line] = re.findall(rf"^  {package}/ .*(?:\n {{10,}}.*)*$", layout, re.MULTILINE)
        modules = {path.stem for path in (ROOT / "sgconvnext" / package).glob("[!_]*.py")} - {"precision"}
        assert modules <= set(re.findall(r"\w+", line)), package
    assert there <= named
    assert named - there == {"train.py", "validate.py", "kills.py"}


def test_suffixes_that_are_named_are_those_that_are_read() -> None:
    [named] = re.findall(r"these suffixes are read: ([^,]*), of several frames the first", README)
    assert set(named.split()) == SUFFIXES


def tables_of(text: str) -> list[list[dict[str, str]]]:
    """Every Markdown table: its rows, heading to cell."""
    found = []
    for block in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        header, _, *rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in block.splitlines()]
        found.append([dict(zip(header, row, strict=True)) for row in rows])
    return found


def cells_of(name: str, heading: str) -> list[dict[str, str]]:
    """The rows of a model in every table with that heading."""
    return [
        row for rows in tables_of(README) for row in rows if heading in row and row.get("model", "").strip("`") == name
    ]


@pytest.mark.parametrize("size", SIZES)
def test_parameters_and_macs_that_are_printed_are_true(size: str) -> None:
    ours = f"sgconvnext_{size}"
    totals, parts = flops.tables([f"convnext_{size}", ours], (224, 224), batch=1, stages=False)
    for table in (totals, parts):
        for row, cells in zip(table.rows, table.cells(), strict=True):
            true = dict(zip(table.columns, cells, strict=True))
            heading = "executed" if table is totals else "MLP"
            [printed] = cells_of(row["model"], heading)
            assert printed == true
    for row in totals.rows:
        parameters, gmacs = f"{row['parameters']:,d}", f"{row['GMACs']:.2f}"
        timed = [printed for printed in cells_of(row["model"], "ratio") if printed["px"] == "224"]
        assert len(timed) >= 2  # inference and training
        assert {printed["parameters"] for printed in timed} == {parameters}
        assert {printed["GMACs"] for printed in timed} == {gmacs}
    assert {row["parameters"] for row in cells_of(ours, "depths")} == {f"{totals.rows[1]['parameters']:,d}"}


def test_pictures_that_are_shown_are_small_and_all_are_shown() -> None:
    shown = {ROOT / path for path in re.findall(r"\]\((docs/[^)]+\.png)\)", README)}
    assert shown == set((ROOT / "docs").glob("*.png"))
    assert len(shown) >= 8
    assert all(path.stat().st_size < 200_000 for path in shown)


def test_slurm_script_lets_the_run_save_and_queues_up_again(tmp_path: Path) -> None:
    """srun, torchrun and scontrol are stood in for; bash, the trap and train.py are real."""
    [script] = re.findall(r"```sh\n(#!/bin/bash\n.*?)```", README, re.DOTALL)
    (tmp_path / "slurm.sh").write_text(script)
    config, out, log = write_config(tmp_path / "a.yaml", epochs=100), tmp_path / "out", tmp_path / "log"
    stubs = {
        "srun": f'echo "$@" > {tmp_path}/srun.said\nexec {sys.executable} train.py {config} out={out} "${{@: -2}}"',
        "scontrol": f'[ "$1" = show ] && echo node7 && echo node8 || echo "$@" > {tmp_path}/scontrol.said',
    }
    for name, text in stubs.items():
        (tmp_path / "bin" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "42", "SLURM_NNODES": "4", "SLURM_JOB_NODELIST": "node[7-10]"}
    variables = environment(**slurm, PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    with log.open("wb") as file:
        job = subprocess.Popen(
            ["bash", str(tmp_path / "slurm.sh")], cwd=ROOT, env=variables, stdout=file, stderr=subprocess.STDOUT
        )
    while job.poll() is None and "epoch 1 update" not in log.read_text():
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    assert job.wait(60) == 0, log.read_text()
    assert "SIGTERM: stopped after" in log.read_text()
    assert (tmp_path / "scontrol.said").read_text() == "requeue 42\n"
    assert checkpoint.load(out / "last.pth")["epoch"] >= 0
    said = (tmp_path / "srun.said").read_text()
    assert "--rdzv-endpoint=node7:29500 --rdzv-id=42-0" in said
    assert said.endswith("resume=auto save.every=500\n")
