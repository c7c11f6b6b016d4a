"""A run that is killed at random moments, by signals that can and cannot be caught, ends as if it never had been."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock
from kills import Killed, restart, straight, survive

from sgconvnext.training.run_folder import RunFolder

Unkilled = Callable[[int], str]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")


@pytest.fixture(scope="session")
def unkilled(tmp_path_factory: pytest.TempPathFactory) -> Unkilled:
    """By the number of processes, the fingerprint of the run that nobody kills; made once for all workers."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent

    def made(processes: int) -> str:
        kept = shared / f"unkilled-{processes}"
        with FileLock(f"{kept}.lock"):
            if not kept.exists():
                kept.write_text(straight(shared / f"straight-{processes}", processes))
            return kept.read_text()

    return made


def test_run_survives_eight_kills_at_random_moments(unkilled: Unkilled, tmp_path: Path) -> None:
    done = survive(tmp_path, kills=8, processes=0, seed=10, want=unkilled(0))
    assert len(done) == 8
    for name in ("SIGTERM", "SIGINT", "SIGKILL"):
        assert sum(line.startswith(name) for line in done) >= 1, done
    assert sum("after -" not in line for line in done) >= 4, done  # the others came before the first update


@pytest.mark.parametrize("disk", ["links:1", "links:2"], ids=["hard links", "copies"])
def test_run_on_a_disk_without_symbolic_links_survives_a_kill(disk: str, unkilled: Unkilled, tmp_path: Path) -> None:
    script = ("tests/end_to_end/inject.py", disk)
    assert len(survive(tmp_path, kills=1, processes=0, seed=7, want=unkilled(0), script=script)) == 1
    for out in tmp_path.glob("killed-*/out"):
        assert not (out / "best.pth").is_symlink()
        assert RunFolder(out).behind("best.pth") in RunFolder(out).files()
        assert not list(out.glob("*.partial"))


def test_run_of_two_processes_survives_kills_of_torchrun(unkilled: Unkilled, tmp_path: Path) -> None:
    run = Killed(tmp_path, 2)
    assert not run.kill(signal.SIGKILL, 0.5)  # and then no process is left
    assert "SIGTERM: stopped after" in (tmp_path / "0.log").read_text()
    assert not run.kill(signal.SIGTERM, 0.2)
    run.finish(unkilled(2))


def test_torchrun_restarts_a_run_of_which_a_process_is_killed(unkilled: Unkilled, tmp_path: Path) -> None:
    log = restart(tmp_path, kills=1, seed=2, want=unkilled(2))
    assert log.count("disk: ") == 2  # it started once, and once again
    assert "best top-1" in log
