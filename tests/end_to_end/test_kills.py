"""A run that is killed at random moments, by signals that can and cannot be caught, ends as if it never had been."""

import signal
import sys
from pathlib import Path

import pytest
from kills import Killed, restart, survive

from sgconvnext.training.run_folder import RunFolder

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")


def test_run_survives_twelve_kills_at_random_moments(tmp_path: Path) -> None:
    done = survive(tmp_path, kills=12, processes=0, seed=4)
    assert len(done) == 12
    for name in ("SIGTERM", "SIGINT", "SIGKILL"):
        assert sum(line.startswith(name) for line in done) >= 2, done
    assert sum("after -" not in line for line in done) >= 6, done  # the others came before the first update


@pytest.mark.parametrize("disk", ["links:1", "links:2"], ids=["hard links", "copies"])
def test_run_on_a_disk_without_symbolic_links_survives_kills(disk: str, tmp_path: Path) -> None:
    assert len(survive(tmp_path, kills=2, processes=0, seed=7, script=("tests/end_to_end/inject.py", disk))) == 2
    for out in tmp_path.glob("killed-*/out"):
        assert not (out / "best.pth").is_symlink()
        assert RunFolder(out).behind("best.pth") in RunFolder(out).files()
        assert not list(out.glob("*.partial"))


def test_run_of_two_processes_survives_two_kills_of_torchrun(tmp_path: Path) -> None:
    assert len(survive(tmp_path, kills=2, processes=2, seed=1)) == 2


def test_processes_stop_when_torchrun_is_killed(tmp_path: Path) -> None:
    run = Killed(tmp_path, 2)
    assert not run.kill(signal.SIGKILL, 0.5)  # and then no process is left
    assert "SIGTERM: stopped after" in (tmp_path / "0.log").read_text()


def test_torchrun_restarts_a_run_whose_processes_are_killed_twice(tmp_path: Path) -> None:
    log = restart(tmp_path, kills=2, seed=2)
    assert log.count("disk: ") == 3  # it started once, and twice again
    assert "best top-1" in log
