"""A script that imports timm alone, with our models registered: in this process, and under torchrun."""

import os
import sys
from pathlib import Path

import pytest
from training_helpers import command

from sgconvnext import script

SCRIPT = """
import argparse
import os

import timm
from folder_of_the_script import WORD

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    model = parser.parse_args().model
    print(WORD, timm.is_model(model), model, os.environ.get("RANK"))
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    (tmp_path / "folder_of_the_script.py").write_text("WORD = 'found'")
    (tmp_path / "script.py").write_text(SCRIPT)
    return str(tmp_path / "script.py")


def test_script_is_main_and_gets_its_own_arguments(
    path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [os.getcwd(), "/elsewhere", *sys.path])
    monkeypatch.setattr(sys, "argv", ["sgconvnext.script", path, "--model", "sgconvnext_atto"])
    script.main()
    assert capsys.readouterr().out == "found True sgconvnext_atto None\n"
    assert sys.path[:2] == [str(Path(path).parent), "/elsewhere"]  # as python SCRIPT has it


@pytest.mark.end_to_end
def test_processes_of_torchrun_have_the_models(path: str) -> None:
    done = command("-m", "sgconvnext.script", path, "--model", "sgconvnext_atto", processes=2)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"found True sgconvnext_atto {rank}" for rank in range(2)]


@pytest.mark.parametrize("name", ["trian.py", "x" * 300, "."])
def test_what_is_no_script_is_refused_in_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["sgconvnext.script", str(tmp_path / name)])
    with pytest.raises(SystemExit, match="2"):
        script.main()
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "no file that can be read" in told


def test_script_runs_as_python_runs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "script.py"
    path.write_text("import sys; print(*sys.argv, __file__)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sgconvnext.script", "script.py", "--", "-x", "--help"])
    script.main()
    assert capsys.readouterr().out == f"{path} -- -x --help {path}\n"
