"""The output folder of a run: which checkpoints stay, what last.pth and best.pth are, on disks of every kind."""

import errno
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import refused, small_model
from test_checkpoint import STATE, contents, leave_room, names, same_weights
from timm.models import load_checkpoint
from training_helpers import DISKS, disk_without

from sgconvnext.training import checkpoint, checksum
from sgconvnext.training.checksum import checksum_of
from sgconvnext.training.run_folder import RunFolder, kind_of_links

# ---- the checkpoints of a run


def run(path: Path, *positions: tuple[int, int], keep: int = 99, best: int = -1) -> RunFolder:
    """A folder with checkpoints of those positions, written in that order; number ``best`` is the best."""
    folder = RunFolder(path)
    for number, position in enumerate(positions):
        folder.add(folder.file(*position), STATE | {"epoch": position[0]}, keep, number == best)
    return folder


def positions(folder: RunFolder) -> list[tuple[int, int]]:
    return [tuple(map(int, re.findall(r"\d+", path.name))) for path in folder.files()]  # type: ignore[misc]


def link(folder: RunFolder, name: str) -> str:
    """What a link says, which must be a file beside it."""
    target = (folder.path / name).readlink()
    assert target.name == str(target)
    assert checkpoint.load(folder.path / name)
    return target.name


def test_newest_position_comes_first_whatever_was_written_last(tmp_path: Path) -> None:
    folder = run(tmp_path, (1, 0), (10000, 0), (9, 5), (0, 1000000), (0, 200000), (9, 10), (9999, 0))
    for name in ("checkpoint-1.pth", "checkpoint-0099-000000.pth.aside", "best-0099-000000.pth", "model.pth"):
        (tmp_path / name).touch()
    assert positions(folder) == [(10000, 0), (9999, 0), (9, 10), (9, 5), (1, 0), (0, 1000000), (0, 200000)]
    assert [folder.file(*position) for position in positions(folder)] == folder.files()


def test_newest_skips_damaged_ones_and_says_what_is_wrong(tmp_path: Path) -> None:
    folder = run(tmp_path, (1, 0), (2, 0), (3, 0))
    assert folder.newest() == (folder.file(3, 0), [])
    folder.file(3, 0).write_bytes(b"")
    torch.save([1], folder.file(4, 0))
    newest, wrong = folder.newest()
    assert newest == folder.file(2, 0)
    assert ["checkpoint-0004-000000.pth" in wrong[0], "checkpoint-0003-000000.pth" in wrong[1]] == [True, True]
    for path in folder.files():
        path.write_bytes(b"")
    with refused(str(tmp_path), "no good checkpoint", "among 4", "checkpoint-0004-000000.pth"):
        folder.newest()
    assert RunFolder(tmp_path / "none").newest() == (None, [])


@pytest.mark.parametrize("relative", [False, True])
def test_newest_few_and_the_best_are_kept(relative: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    folder = run(Path("out") if relative else tmp_path / "out", *((e, 0) for e in range(1, 8)), keep=2, best=2)
    assert positions(folder) == [(7, 0), (6, 0), (3, 0)]
    assert link(folder, "last.pth") == "checkpoint-0007-000000.pth"
    assert link(folder, "best.pth") == "checkpoint-0003-000000.pth"
    files = [f"checkpoint-{epoch:04d}-000000.pth" for epoch in (3, 6, 7)]
    assert names(folder.path) == sorted(["best.pth", "last.pth", *files, *(f"{file}.sha256" for file in files)])


def test_links_point_to_files_whenever_a_kill_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked at before and after everything that adding a checkpoint does to the folder."""
    folder = run(tmp_path, (1, 0), best=0)
    looked = []

    def watched(name: str) -> None:
        inner = getattr(Path, name)

        def step(path: Path, *arguments: Any, **options: Any) -> Any:
            result = inner(path, *arguments, **options)
            looked.append((link(folder, "last.pth"), link(folder, "best.pth")))
            return result

        monkeypatch.setattr(Path, name, step)

    for name in ("replace", "unlink", "symlink_to"):
        watched(name)
    folder.add(folder.file(2, 0), STATE, 1, best=True)
    assert len(looked) >= 7
    assert looked[0] == ("checkpoint-0001-000000.pth",) * 2
    assert looked[-1] == ("checkpoint-0002-000000.pth",) * 2


def test_save_that_fails_removes_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run(tmp_path, (1, 0), (2, 0), keep=2, best=0)
    before = contents(tmp_path)
    leave_room(monkeypatch, 500)
    with pytest.raises(OSError, match="No space left"):
        folder.add(folder.file(3, 0), STATE, 1, best=True)
    assert contents(tmp_path) == before


def test_later_checkpoints_are_set_aside_with_their_checksums(tmp_path: Path) -> None:
    folder = run(tmp_path, (1, 0), (2, 0), (3, 0), best=2)
    aside = folder.set_aside(after=(1, 0))
    assert sorted(path.name for path in aside) == [f"checkpoint-000{epoch}-000000.pth.aside" for epoch in (2, 3)]
    assert positions(folder) == [(1, 0)]
    assert link(folder, "last.pth") == "checkpoint-0001-000000.pth"
    assert link(folder, "best.pth") == "checkpoint-0003-000000.pth.aside"
    for path in aside:
        assert checkpoint.load(path)["epoch"] in (2, 3)
        assert checksum_of(path).is_file()
    assert not list(tmp_path.glob("*.pth.sha256"))[1:]
    assert folder.set_aside(after=(1, 0)) == []


def test_nothing_that_was_set_aside_is_overwritten_or_removed(tmp_path: Path) -> None:
    folder = run(tmp_path, (1, 0))
    for number in range(3):
        folder.add(folder.file(2, 0), STATE | {"epoch": 10 + number}, 1, best=number == 0)
        run(tmp_path, (1, 0))
        folder.set_aside(after=(1, 0))
    aside = [f"checkpoint-0002-000000.pth.aside{plus}" for plus in ("", "+", "++")]
    assert [checkpoint.load(tmp_path / name)["epoch"] for name in aside] == [10, 11, 12]
    assert link(folder, "best.pth") == aside[0]


def test_half_written_files_are_cleared_and_nothing_else(tmp_path: Path) -> None:
    folder = run(tmp_path, (1, 0), best=0)
    before = contents(tmp_path)
    for name in ("checkpoint-0002-000000.pth.partial", "checkpoint-0002-000000.pth.sha256.partial"):
        (tmp_path / name).write_bytes(b"PK")
    (tmp_path / "last.pth.partial").symlink_to("nowhere.pth")
    folder.clear()
    assert contents(tmp_path) == before


# ---- disks without symbolic links

without_links = pytest.mark.parametrize("disk", ["hard links", "copies"])


def epochs(folder: RunFolder) -> dict[str, int]:
    """What last.pth and best.pth hold, each checked against its own checksum."""
    held = {}
    for name in ("last.pth", "best.pth"):
        path = folder.path / name
        if path.exists():
            held[name] = checkpoint.load(path)["epoch"]
            assert path.is_symlink() or checksum_of(path).exists()
    return held


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EACCES])
@pytest.mark.parametrize("disk", DISKS)
def test_what_a_disk_has_in_place_of_links_is_found_out_by_trying(
    disk: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk_without(monkeypatch, *DISKS[disk], number=number)
    assert kind_of_links(tmp_path) == disk
    assert names(tmp_path) == []


def test_full_disk_is_not_taken_for_one_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk_without(monkeypatch, "symlink_to", number=errno.ENOSPC)
    with pytest.raises(OSError, match="No space left"):
        kind_of_links(tmp_path)
    assert names(tmp_path) == []


@without_links
def test_newest_few_and_the_best_are_kept_without_links(
    disk: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk_without(monkeypatch, *DISKS[disk])
    folder = run(tmp_path, *((epoch, 0) for epoch in range(1, 8)), keep=2, best=2)
    assert positions(folder) == [(7, 0), (6, 0), (3, 0)]
    assert epochs(folder) == {"last.pth": 7, "best.pth": 3}
    files = [*(f"checkpoint-{epoch:04d}-000000.pth" for epoch in (3, 6, 7)), "last.pth", "best.pth"]
    assert names(tmp_path) == sorted([*files, *(f"{file}.sha256" for file in files)])
    assert [(tmp_path / name).stat().st_nlink for name in ("last.pth", "best.pth")] == [1 + (disk == "hard links")] * 2
    assert caplog.records == []
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict", "best.pth.sha256"], cwd=tmp_path, check=True)


@without_links
def test_timm_reads_the_file_without_links(disk: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk_without(monkeypatch, *DISKS[disk])
    source, model, folder = small_model(), small_model(), RunFolder(tmp_path)
    folder.add(folder.file(1, 0), STATE | {"state_dict": source.state_dict()}, 1, best=True)
    load_checkpoint(model, str(tmp_path / "best.pth"))
    assert same_weights(model.state_dict(), source.state_dict())


class Killed(BaseException):
    pass


@pytest.mark.parametrize("disk", DISKS)
def test_folder_is_whole_whenever_a_kill_comes(disk: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before the first, the second, ... thing that adding a checkpoint does to the folder, then gone on."""
    for number in range(100):
        out, left = tmp_path / str(number), [number]
        out.mkdir()
        with monkeypatch.context() as patched:
            disk_without(patched, *DISKS[disk])
            folder = run(out, (1, 0), (2, 0), keep=1, best=0)
            assert folder.links == disk
            with patched.context() as killing:
                for name in ("replace", "unlink", "symlink_to", "hardlink_to", "open"):
                    kill_in(killing, name, left)
                try:
                    folder.add(folder.file(3, 0), STATE | {"epoch": 3}, 1, best=True)
                    ended = True
                except Killed:
                    ended = False
            held = epochs(folder)
            assert (held["last.pth"], held["best.pth"]) in [(2, 1), (3, 1), (3, 3)]
            again = RunFolder(out)
            again.clear()
            again.adopt()
            assert epochs(again) == held
            again.add(again.file(4, 0), STATE | {"epoch": 4}, 1, best=True)
            assert positions(again) == [(4, 0)]
            assert epochs(again) == {"last.pth": 4, "best.pth": 4}
            assert not list(out.glob("*.partial"))
        if ended:
            assert number >= 10
            return
    raise AssertionError("it never ends")


def kill_in(monkeypatch: pytest.MonkeyPatch, name: str, left: list[int]) -> None:
    inner: Any = getattr(Path, name)

    def step(path: Path, *arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return inner(path, *arguments, **options)

    monkeypatch.setattr(Path, name, step)


@without_links
def test_later_checkpoints_are_set_aside_without_links(
    disk: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk_without(monkeypatch, *DISKS[disk])
    folder = run(tmp_path, (1, 0), (2, 0), (3, 0), best=2)
    assert sorted(path.name[:15] for path in folder.set_aside(after=(1, 0))) == ["checkpoint-0002", "checkpoint-0003"]
    assert epochs(folder) == {"last.pth": 1, "best.pth": 3}
    assert folder.behind("best.pth") == tmp_path / "checkpoint-0003-000000.pth.aside"
    folder.add(folder.file(2, 0), STATE | {"epoch": 22}, 1, best=False)
    assert epochs(folder) == {"last.pth": 22, "best.pth": 3}
    folder.set_aside(after=(0, 0))
    assert epochs(folder) == {"best.pth": 3}
    assert not (tmp_path / "last.pth.sha256").exists()


@pytest.mark.parametrize("disk", DISKS)
@pytest.mark.parametrize("before", DISKS)
def test_folder_that_comes_from_another_disk_keeps_its_best(
    before: str, disk: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old").mkdir()
    with monkeypatch.context() as patched:
        disk_without(patched, *DISKS[before])
        run(tmp_path / "old", (1, 0), (2, 0), (3, 0), best=1)
    shutil.copytree(tmp_path / "old", tmp_path / "new", symlinks=False)  # links become files of their own
    disk_without(monkeypatch, *DISKS[disk])
    folder = RunFolder(tmp_path / "new")
    folder.adopt()
    assert [(folder.path / name).is_symlink() for name in ("last.pth", "best.pth")] == [disk == "symbolic links"] * 2
    assert epochs(folder) == {"last.pth": 3, "best.pth": 2}
    assert folder.behind("best.pth") == folder.file(2, 0)
    folder.add(folder.file(4, 0), STATE | {"epoch": 4}, 1, best=False)
    assert positions(folder) == [(4, 0), (2, 0)]
    assert epochs(folder) == {"last.pth": 4, "best.pth": 2}


def test_hard_link_that_a_kill_left_is_not_written_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run(tmp_path, (1, 0), (2, 0))
    (tmp_path / "last.pth.partial").hardlink_to(folder.file(1, 0))
    disk_without(monkeypatch, *DISKS["copies"])
    RunFolder(tmp_path).point("last.pth", folder.file(2, 0))
    assert checkpoint.load(folder.file(1, 0))["epoch"] == 1
    assert checkpoint.load(tmp_path / "last.pth")["epoch"] == 2


def test_damaged_checkpoint_is_not_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk_without(monkeypatch, *DISKS["copies"])
    folder = run(tmp_path, (1, 0))
    checkpoint.save(folder.file(2, 0), STATE)
    folder.file(2, 0).write_bytes(b"PK")
    with pytest.raises(OSError, match="not what its checksum says"):
        folder.point("last.pth", folder.file(2, 0))
    assert epochs(folder) == {"last.pth": 1}


def test_old_checkpoints_go_and_the_best_stays_where_the_copies_do_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk_without(monkeypatch, *DISKS["copies"])
    folder, copy = run(tmp_path, (1, 0), (2, 0), best=0), checksum.copy

    def full(path: Path, to: Path) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checksum, "copy", full)
    for epoch in (3, 4):
        folder.add(folder.file(epoch, 0), STATE | {"epoch": epoch}, 1, best=epoch == 3)
    assert positions(folder) == [(4, 0), (3, 0), (1, 0)]  # the best, and what best.pth still is
    assert epochs(folder) == {"last.pth": 2, "best.pth": 1}
    assert "best.pth cannot be made of" in caplog.text
    monkeypatch.setattr(checksum, "copy", copy)
    folder.add(folder.file(5, 0), STATE | {"epoch": 5}, 1, best=False)
    assert positions(folder) == [(5, 0), (3, 0)]
    assert epochs(folder) == {"last.pth": 5, "best.pth": 3}


def test_checkpoints_without_checksums_are_known_by_what_is_in_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk_without(monkeypatch, *DISKS["copies"])
    folder = run(tmp_path, (1, 0), (2, 0), best=0)
    for path in tmp_path.glob("*.sha256"):
        path.unlink()
    assert folder.behind("best.pth") == folder.file(1, 0)
    assert folder.behind("last.pth") == folder.file(2, 0)
