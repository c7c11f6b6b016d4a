"""The output folder of a run: its lock; its checkpoints; last.pth and best.pth, links to two of them; and saving."""

import contextlib
import errno
import fcntl
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import one_line
from ..files import write_whole
from . import checkpoint, checksum
from .checksum import checksum_of
from .config import SaveConfig
from .distributed import World

_logger = logging.getLogger(__name__)

RETRY_S = 30.0  # at least so long between two attempts to save


@contextlib.contextmanager
def lock(out: Path) -> Iterator[None]:
    """Make the output folder and lock it, on this machine: two runs in one folder would mix their files."""
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        folder = os.open(out, os.O_RDONLY)
    except OSError as error:
        raise ValueError(f"out={str(out)!r} cannot be made a folder ({error.strerror}); name another") from error
    try:
        if not os.access(out, os.W_OK):
            raise ValueError(f"out={str(out)!r} is not writable; name another")
        _lock(folder, out)
        yield
    finally:
        os.close(folder)
        if made:
            with contextlib.suppress(OSError):  # which fails where the folder holds a run by now
                out.rmdir()


def _lock(folder: int, out: Path) -> None:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"out={str(out)!r} is in use by another run; wait for it, or name another") from error
    except OSError as error:
        _logger.warning("out=%r: its disk has no locks (%s); start no second run in it", str(out), error.strerror)


SYMBOLIC, HARD, COPY = "symbolic links", "hard links", "copies"  # what last.pth and best.pth can be
TRIED = ".sgconvnext-"  # begins the name of the folder in which links are tried
# The errors of disks that have no such links: exFAT, FAT, some shares and mounted buckets
_HAVE_NONE = (errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EMLINK, errno.ELOOP)


def kind_of_links(folder: Path) -> str:
    """SYMBOLIC, HARD or COPY: the first that the disk of an existing folder can do, found out by trying.

    Raises:
        OSError: the disk is full, or cannot even replace a file by another.
    """
    with tempfile.TemporaryDirectory(prefix=TRIED, dir=folder, ignore_cleanup_errors=True) as name:
        file, other = Path(name) / "file", Path(name) / "other"
        for content in (b"before", b"now"):
            write_whole(file, content)
        if file.read_bytes() != b"now":
            raise OSError(errno.EIO, "a file that replaced another cannot be read back")
        for kind, make in ((SYMBOLIC, _symbolic), (HARD, _hard)):
            write_whole(other, b"before")
            with _unless_there_are_none():
                partial = Path(name) / kind
                make(partial, file)
                partial.replace(other)
                if other.read_bytes() == b"now":
                    return kind
    return COPY


def _symbolic(link: Path, path: Path) -> None:
    link.symlink_to(path.name)


def _hard(link: Path, path: Path) -> None:
    link.hardlink_to(path)


@contextlib.contextmanager
def _unless_there_are_none() -> Iterator[None]:
    try:
        yield
    except NotImplementedError:  # from Python, where the system has no such call
        pass
    except OSError as error:
        if error.errno not in _HAVE_NONE:
            raise


def _problem(path: Path) -> str:
    """Why a checkpoint cannot be loaded; '' if it can."""
    try:
        checkpoint.load(path)
    except ValueError as error:
        return str(error)
    return ""


class RunFolder:
    """The checkpoints of one run: ``checkpoint-EPOCHS-UPDATES.pth`` by the epochs finished and the updates since.

    ``last.pth`` and ``best.pth`` are links to two of them. On a disk without symbolic links they are hard links or
    copies, and have checksums of their own, by which they are known. Only one process of a run may write here.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.owed: Path | None = None  # what best.pth should point to, where that has failed so far

    @cached_property
    def links(self) -> str:
        """What last.pth and best.pth are on this disk."""
        return kind_of_links(self.path)

    def clear(self) -> None:
        """Remove what a kill left half-written."""
        for partial in self.path.glob("*.partial"):
            partial.unlink()
        for tried in self.path.glob(f"{TRIED}*"):
            shutil.rmtree(tried)

    def file(self, epochs: int, updates: int) -> Path:
        """The checkpoint of that position of the run."""
        return self.path / f"checkpoint-{epochs:04d}-{updates:06d}.pth"

    def files(self) -> list[Path]:
        """Newest position first."""
        found = [path for path in self.path.glob("*.pth") if path.is_file() and self.position(path)]
        return sorted(found, key=self.position, reverse=True)

    @staticmethod
    def position(path: Path) -> tuple[int, ...]:
        """Epochs and updates of a file by its name; () for any other file."""
        match = re.fullmatch(r"checkpoint-(\d+)-(\d+)\.pth", path.name)
        return tuple(map(int, match.groups())) if match else ()

    def newest(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint that can be read, and what is wrong with every later one.

        Raises:
            ValueError: there are checkpoints, but none can be read.
        """
        wrong: list[str] = []
        for path in self.files():
            problem = _problem(path)
            if not problem:
                return path, wrong
            wrong.append(problem)
        if wrong:
            raise ValueError(
                f"out={str(self.path)!r} has no good checkpoint among {len(wrong)}, the newest: {wrong[0]}; restore "
                "one, or name another out"
            )
        return None, wrong

    def add(self, path: Path, state: dict[str, Any], keep: int, best: bool) -> None:
        """Save, point ``last.pth`` (and ``best.pth``) at it, then remove all but the newest ``keep`` and the best."""
        checkpoint.save(path, state)
        self.owed = path if best else self.owed
        self._name("last.pth", path)
        if self.owed is not None and self._name("best.pth", self.owed):
            self.owed = None
        try:
            self._prune(keep, path)
        except OSError as error:
            _logger.warning("old checkpoints in %s cannot be removed: %s", self.path, one_line(error))

    def _name(self, link: str, path: Path) -> bool:
        """Make a link and return whether it could be made; if not, the next checkpoint tries again."""
        try:
            self.point(link, path)
        except OSError as error:
            _logger.warning("%s cannot be made of %s: %s", self.path / link, path, one_line(error))
            return False
        return True

    def _prune(self, keep: int, newest: Path) -> None:
        spared = {*self.files()[:keep], newest, self.owed}
        old = [path for path in self.files() if path not in spared]
        if old:
            best = self.behind("best.pth")
        for path in old:
            if path != best:
                self._remove(path)

    @staticmethod
    def _remove(path: Path) -> None:
        path.unlink(missing_ok=True)
        checksum_of(path).unlink(missing_ok=True)

    def behind(self, name: str) -> Path | None:
        """The file in this folder that ``last.pth`` or ``best.pth`` is another name or a copy of; None for none."""
        link = self.path / name
        if link.is_symlink():
            target = self.path / link.resolve().name
            return target if target.exists() else None
        if not link.is_file():
            return None
        others = [*self.files(), *(path for path in self.path.glob("*.aside*") if path.suffix != ".sha256")]
        size, own = link.stat().st_size, None
        for path in others:
            if path.samefile(link):
                return path
        for path in others:
            if path.stat().st_size == size:
                own = own or checksum.identity(link)
                if checksum.identity(path) == own:
                    return path
        return None

    def point(self, link: str, path: Path) -> None:
        """Make ``link`` another name of ``path``, or a copy of it where the disk has no links, in one step."""
        here = self.path / link

        def stand_in(partial: Path) -> str:
            if self.links == HARD:
                _hard(partial, path)
                return checksum.identity(path)
            return checksum.copy(path, partial)

        if self.links == SYMBOLIC:
            partial = self.path / (link + ".partial")
            partial.unlink(missing_ok=True)
            _symbolic(partial, path)
            partial.replace(here)
            checksum_of(here).unlink(missing_ok=True)  # left from a disk without symbolic links
        elif here.is_symlink() or self.behind(link) != path or not checksum_of(here).exists():
            checksum.replace(here, stand_in)

    def adopt(self) -> None:
        """Turn last.pth and best.pth into links, if the folder comes from another disk and holds copies."""
        for name in ("last.pth", "best.pth"):
            stands = (self.path / name).is_file() and not (self.path / name).is_symlink()
            if stands and (self.links == SYMBOLIC or not checksum_of(self.path / name).exists()):
                file = self.behind(name)
                if file is not None:
                    self.point(name, file)

    def restore_best(self, file: Path, going_on_from: Path | None) -> None:
        """Point best.pth at the best epoch's checkpoint, if it should be that and is not.

        A kill may have come between checkpoint and link; a disk without links may have lost the link when the folder
        moved. A best.pth that was set aside or comes from elsewhere stays, unless the run goes on from its best epoch.
        """
        files = self.files()
        if file not in files:
            return
        named, here = self.behind("best.pth"), self.path / "best.pth"
        if file != named and (file == going_on_from or named in files or not here.exists()):
            self.point("best.pth", file)

    def set_aside(self, after: tuple[int, int]) -> list[Path]:
        """Rename every checkpoint of a later position to ``*.aside``: it is damaged, or this run leaves its path."""
        renamed = []
        for path in [path for path in self.files() if self.position(path) > after]:
            free = path.with_name(path.name + ".aside")
            while free.exists():
                free = free.with_name(free.name + "+")
            was_best = (self.path / "best.pth").is_symlink() and self.behind("best.pth") == path
            path.rename(free)
            if checksum_of(path).exists():
                write_whole(checksum_of(free), checksum_of(path).read_text().replace(path.name, free.name).encode())
                checksum_of(path).unlink()
            if was_best:  # a symbolic link is lost with its target's name, a hard link or copy is not
                self.point("best.pth", free)
            renamed.append(free)
        if renamed and self.files():
            self.point("last.pth", self.files()[0])
        elif renamed:
            self._remove(self.path / "last.pth")
        return renamed


class Saver:
    """Saves the checkpoints of a run; a failure is told and tried again.

    Args:
        folder: of the run.
        world: of which rank 0 writes.
        knobs: how many checkpoints to keep, and how many failures in a row to bear.
    """

    def __init__(self, folder: RunFolder, world: World, knobs: SaveConfig) -> None:
        self.folder, self.world, self.knobs = folder, world, knobs
        self.saved: Path | None = None  # the last good checkpoint
        self.failures, self.failed = 0, 0.0  # failures in a row, and the time of the last

    def save(self, path: Path, state: Callable[[], dict[str, Any]], best: bool, leaving: bool) -> bool:
        """Write a checkpoint; whether that went well. To be called by every process.

        Args:
            path: of the checkpoint.
            state: makes its content, on rank 0.
            best: best.pth becomes another name of it.
            leaving: the run ends anyway, so that nothing is raised.

        Raises:
            OSError: it was the last of save.max_failures in a row.
        """
        try:
            self.world.on_first(lambda: self.folder.add(path, state(), self.knobs.keep, best))
        except OSError as error:
            self.failures, self.failed = self.failures + 1, time.perf_counter()
            if self.failures >= self.knobs.max_failures and not leaving:
                raise OSError(f"{error}; given up after {self.failures} failures in a row, {self.last()}") from error
            if self.world.is_first:
                _logger.warning("%s; %s%s", error, self.last(), "" if leaving else ", and the run goes on")
            return False
        self.failures, self.saved = 0, path
        return True

    def is_due_again(self) -> bool:
        """Whether the last attempt to save failed, and RETRY_S have passed."""
        return self.failures > 0 and time.perf_counter() - self.failed > RETRY_S

    def last(self) -> str:
        """The last good checkpoint, in words."""
        there = self.saved is not None and self.saved.exists()
        return f"the last good checkpoint is {self.saved}" if there else "there is no checkpoint"
