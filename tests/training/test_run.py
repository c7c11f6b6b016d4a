"""A run in this process: what it leaves behind, how it goes on after a stop, and what it does when it cannot save."""

import errno
import logging
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from training_helpers import AUGMENTED, alone, fingerprint, metrics, micro_config

import train
from sgconvnext.training import checkpoint, run_folder
from sgconvnext.training.config import SaveConfig
from sgconvnext.training.run import Run
from sgconvnext.training.run_folder import RunFolder, Saver

# everything that draws random numbers or keeps a state
KNOBS = AUGMENTED | {"ema.decay": 0.9, "optim.batch_per_device": 8, "optim.clip_grad": 1.0, "data.train_samples": 48}


def begun(out: Path, **changes: Any) -> Run:
    out.mkdir(exist_ok=True)
    run = train.prepare(micro_config(out=str(out), **KNOBS, **changes), alone())
    run.begin()
    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two epochs that nothing has stopped."""
    out = tmp_path_factory.mktemp("finished")
    train.train(begun(out))
    return out


def test_run_leaves_its_checkpoints_metrics_and_configuration(finished: Path) -> None:
    state = checkpoint.load(finished / "last.pth")
    assert RunFolder(finished).behind("last.pth") == finished / "checkpoint-0002-000000.pth"
    assert state["progress"]["epoch"] == 2
    assert state["history"] == metrics(finished)
    assert [line["epoch"] for line in metrics(finished)] == [0, 1]
    assert state["best"] == max(max(line["val_top1"], line["ema_top1"]) for line in metrics(finished))
    assert (finished / "best.pth").exists()
    assert (finished / "config.yaml").exists()


def test_run_that_was_stopped_in_an_epoch_ends_as_the_run_that_was_not(finished: Path, tmp_path: Path) -> None:
    run = begun(tmp_path / "out")
    run.training.stop.received = signal.SIGTERM  # as if it came during the first update
    with pytest.raises(SystemExit, match="143"):
        train.train(run)
    again = begun(tmp_path / "out", resume="auto")
    assert again.progress.position() == "0 epochs and 1 updates"
    train.train(again)
    assert fingerprint(tmp_path / "out/last.pth") == fingerprint(finished / "last.pth")


def test_finished_run_has_nothing_to_do(finished: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = fingerprint(finished / "last.pth")
    with caplog.at_level(logging.INFO):
        train.train(begun(finished, resume="auto"))
    assert f"nothing to do: {finished} has finished 2 epochs" in caplog.text
    assert fingerprint(finished / "last.pth") == before


def test_failure_to_save_is_told_and_tried_again_and_the_last_of_a_row_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    saver = Saver(RunFolder(tmp_path), alone(), SaveConfig(max_failures=3))
    state = {"state_dict": {}}

    def save(epoch: int, leaving: bool = False) -> bool:
        return saver.save(saver.folder.file(epoch, 0), lambda: state, best=False, leaving=leaving)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert save(1)
    assert not saver.is_due_again()
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save", full)
        assert not save(2)
        assert "checkpoint-0001-000000.pth, and the run goes on" in caplog.text
        assert not saver.is_due_again()  # for half a minute
        patched.setattr(run_folder, "RETRY_S", 0.0)
        assert saver.is_due_again()
        assert not save(2)
        with pytest.raises(OSError, match=r"given up after 3 failures in a row, the last good checkpoint is .*0001"):
            save(2)
        assert not save(2, leaving=True)
    assert save(2)
    assert (saver.failures, saver.saved) == (0, saver.folder.file(2, 0))
