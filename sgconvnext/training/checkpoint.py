"""Checkpoint files in timm's keys: written whole or not at all, checked when read, and no code in them is run."""

import argparse
import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import nn

from .. import fit
from ..errors import one_line
from ..files import flush, write_whole
from . import foreign

_logger = logging.getLogger(__name__)

VERSION = 2  # of timm's checkpoint layout
MODELS = ("torch.nn.modules.", "timm.models.", "torchvision.models.", "sgconvnext.")
HARMLESS: list[Any] = [argparse.Namespace]  # as which timm's train.py keeps its command line: values by name, no code


class _Hashing:
    """A file to write into that knows the SHA-256 of what was meant to be written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256 = file, hashlib.sha256()
        self.error: OSError | None = None  # torch.save turns it into a RuntimeError about a position

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint and, beside it, ``path.sha256`` as the program sha256sum does, see `_put`.

    Raises:
        OSError: the disk is full or broken; ``path`` is as it was before, and nothing half-written is left.
    """

    def write(partial: Path) -> str:
        with partial.open("wb") as file:
            hashing = _Hashing(file)
            try:
                torch.save(state, hashing)  # type: ignore[arg-type]  # it needs no more of a file than write
            except RuntimeError as error:
                raise hashing.error or error from error
            flush(file)
        return hashing.sha256.hexdigest()

    try:
        _put(path, write)
    except (OSError, RuntimeError) as error:
        raise OSError(f"checkpoint {str(path)!r} cannot be written: {one_line(error)}") from error


def _put(path: Path, make: Callable[[Path], str]) -> None:
    """Replace a file and its checksum.

    Both go into a file of another name first, are flushed to the disk and then renamed. The checksum comes first, and
    beside it stays that of the file to be replaced, so that at no moment a checkpoint is without its own.

    Args:
        path: of the file.
        make: makes the file of another name, and returns its SHA-256.

    Raises:
        OSError, RuntimeError: of ``make``, or of the disk; both files are as they were before.
    """
    partial, beside = path.with_name(path.name + ".partial"), checksum_of(path)
    before = beside.read_bytes() if path.exists() and beside.exists() else b""
    try:
        partial.unlink(missing_ok=True)  # it may be another name of a checkpoint, which must not be written into
        line = f"{make(partial)}  {path.name}\n".encode()
        write_whole(beside, line + before)
        partial.replace(path)
        partial.unlink(missing_ok=True)  # between two names of one file a rename does nothing
    except (OSError, RuntimeError):
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
            if before:
                write_whole(beside, before)
            else:
                beside.unlink()
        raise
    # it is saved: both lines of the checksum would do, and not all folders can sync
    with contextlib.suppress(OSError):
        if before:
            write_whole(beside, line)
        _flush_folder(path.parent)


def checksum_of(path: Path) -> Path:
    """The file beside a checkpoint that holds its SHA-256."""
    return path.with_name(path.name + ".sha256")


def _flush_folder(folder: Path) -> None:
    """A rename is on the disk only once its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint, or a file of bare weights, to the CPU; no code in it is run.

    Returns:
        a dictionary with the weights under 'state_dict', and what else the file holds.

    Raises:
        ValueError: there is no such file, it is not what its checksum says, or it is no checkpoint.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"checkpoint {str(path)!r} cannot be read: {foreign.folder_reason(path)}")
    if not path.is_file():
        raise ValueError(f"checkpoint {str(path)!r} does not exist; name a .pth file that a run has written")
    try:
        _verify(path)
        told = foreign.reason(path)
    except OSError as error:
        told = f"{error.strerror}; see to its permissions and its disk"
    if told:
        raise ValueError(f"checkpoint {str(path)!r} cannot be read: {told}")
    return _by_name(_read(path), path)


def _read(path: Path) -> Any:
    try:
        if foreign.is_safetensors(path):
            with safe_open(path, "pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  it is no dictionary
                return {"state_dict": tensors, "metadata": file.metadata() or {}}
        with torch.serialization.safe_globals(HARMLESS), path.open("rb") as opened:  # torch would go by the suffix
            return torch.load(opened, map_location="cpu", weights_only=True)
    except Exception as error:  # half a dozen types for a damaged file
        raise ValueError(f"checkpoint {str(path)!r} cannot be read: {_unreadable(path, error)}") from error


def _unreadable(path: Path, error: Exception) -> str:
    """What is wrong with a file that torch refuses, and the cure."""
    try:
        with torch.serialization.safe_globals(HARMLESS), path.open("rb") as opened:
            code = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(opened))
    except Exception:  # a file in the layout before torch 1.6 cannot be asked; torch.load names the first
        code = re.findall(r"(?:GLOBAL|class) '?((?:\w+\.)+\w+)", one_line(error))[:1]
    if not code:
        reason = one_line(error).rpartition("WeightsUnpickler error: ")[2].partition(" Check the documentation")[0]
        return f"it is damaged ({type(error).__name__}: {reason[:200]}); use another"  # without advice to run code
    what = "a whole model" if any(name.startswith(MODELS) for name in code) else "objects"
    return (
        f"it holds {what} ({', '.join(code[:3])}), and making these would run code, which can do anything; where you "
        "trust the file, load it in the program that wrote it and save the weights alone: "
        "torch.save(model.state_dict(), PATH)"
    )


def _by_name(state: Any, path: Path) -> dict[str, Any]:
    """The content of a file in timm's layout: weights under 'state_dict', their average under 'state_dict_ema'."""
    if not isinstance(state, dict):
        raise ValueError(f"checkpoint {str(path)!r} holds a {type(state).__name__}, not weights by name; use another")
    if isinstance(state.get("state_dict"), dict):
        return state
    if _are_tensors(state.get("model")):  # as in ConvNeXt's own trainer, and many since
        average = {"state_dict_ema": state["model_ema"]} if state.get("model_ema") else {}
        return (
            {key: state[key] for key in state if key not in ("model", "model_ema")}
            | average
            | {"state_dict": state["model"]}
        )
    if _are_tensors(state):
        return {"state_dict": state}
    if "param_groups" in state:
        raise ValueError(f"checkpoint {str(path)!r} is the state of an optimiser, without weights; use another")
    shown = ", ".join(repr(key) for key in list(state)[:6]) or "nothing"
    raise ValueError(
        f"checkpoint {str(path)!r} has no 'state_dict' or 'model' with weights, but {shown}; name a file written by "
        "train.py or timm"
    )


def _are_tensors(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(each, torch.Tensor) for each in value.values())


def _verify(path: Path) -> None:
    """torch.load does not look at the checksums inside its files: a flipped bit would load silently."""
    real = path.resolve()  # last.pth and best.pth are links
    if not checksum_of(real).is_file():
        return
    if _sha256(real) not in _stated(real):
        raise ValueError(
            f"checkpoint {str(path)!r} is damaged: its SHA-256 is not the one in {checksum_of(real).name}; use another"
        )


def _sha256(path: Path) -> str:
    """Of what is in the file."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            sha256.update(block)
    return sha256.hexdigest()


def _stated(path: Path) -> list[str]:
    """What the checksum beside a file says it is; two while it is replaced, none where there is no checksum."""
    beside = checksum_of(path)
    lines = beside.read_text(errors="replace").splitlines() if beside.is_file() else []
    return [line.split(" ")[0] for line in lines]


def _identity(path: Path) -> str:
    """The SHA-256 of a file: as stated, if that is clear, because reading gigabytes takes its time."""
    stated = _stated(path)
    return stated[0] if len(stated) == 1 else _sha256(path)


def weights(state: dict[str, Any], ema: bool, path: str | Path) -> dict[str, torch.Tensor]:
    """The model's or the EMA's weights out of a checkpoint, their keys without what DDP and torch.compile prepend."""
    key = "state_dict_ema" if ema else "state_dict"
    if not state.get(key):
        why = "EMA weights; the run that wrote it had ema.decay=0" if ema else "weights in 'state_dict'"
        raise ValueError(f"checkpoint {str(path)!r} has no {why}")
    found: dict[str, torch.Tensor] = state[key]
    while prefix := next((p for p in ("module.", "_orig_mod.") if all(str(k).startswith(p) for k in found)), ""):
        found = {name.removeprefix(prefix): value for name, value in found.items()}
    return found


def load_weights(
    model: nn.Module, found: dict[str, torch.Tensor], path: str | Path, skip: Collection[str] = ()
) -> None:
    """Load weights of which every key and shape must match, but for the modules named in ``skip``.

    Raises:
        ValueError: naming what differs and the cure.
    """
    fit.refuse_misfit(model, found, f"checkpoint {str(path)!r}", skip)
    kept = {key: value for key, value in found.items() if not any(fit.within(key, name) for name in skip)}
    model.load_state_dict(kept, strict=not skip)


def _problem(path: Path) -> str:
    try:
        load(path)
    except ValueError as error:
        return str(error)
    return ""


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
            with contextlib.suppress(OSError):  # it holds a run by now
                out.rmdir()


def _lock(folder: int, out: Path) -> None:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"out={str(out)!r} is in use by another run; wait for it, or name another") from error
    except OSError as error:
        _logger.warning("out=%r: its disk has no locks (%s); start no second run in it", str(out), error.strerror)


SYMBOLIC, HARD, COPY = "symbolic links", "hard links", "copies"  # what last.pth and best.pth can be
TRIED = ".sgconvnext-"  # how the name of a folder begins in which they are tried
# What disks say that have no such links: exFAT, FAT, some shares and mounted buckets
_HAVE_NONE = (errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EMLINK, errno.ELOOP)


def links(folder: Path) -> str:
    """SYMBOLIC, HARD or COPY: the first of them that the disk of an existing folder can do. Tried, then removed.

    Raises:
        OSError: it cannot even replace a file by another, or is full.
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
    except NotImplementedError:  # Python's, where the system has no such call
        pass
    except OSError as error:
        if error.errno not in _HAVE_NONE:
            raise


class Folder:
    """The checkpoints of one run: ``checkpoint-EPOCHS-UPDATES.pth`` by the epochs finished and the updates since.

    ``last.pth`` and ``best.pth`` are links to two of them, or what the disk has in place of links: hard links or
    copies, either with a checksum of its own, by which they are known. Only one process of a run may write here.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.owed: Path | None = None  # what best.pth should be, and could not be made

    @cached_property
    def links(self) -> str:
        """What last.pth and best.pth are on this disk."""
        return links(self.path)

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
        """The newest checkpoint that reads well, and what is wrong with those after it.

        Raises:
            ValueError: there are checkpoints, but not one is good.
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
        save(path, state)
        self.owed = path if best else self.owed
        self._name("last.pth", path)
        if self.owed is not None and self._name("best.pth", self.owed):
            self.owed = None
        try:
            self._prune(keep, path)
        except OSError as error:
            _logger.warning("old checkpoints in %s cannot be removed: %s", self.path, one_line(error))

    def _name(self, link: str, path: Path) -> bool:
        """Whether the link could be made; the checkpoint is saved all the same, and the next one tries again."""
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
                own = own or _identity(link)
                if _identity(path) == own:
                    return path
        return None

    def point(self, link: str, path: Path) -> None:
        """Make ``link`` another name of ``path``, or a copy of it where the disk has no links, in one step."""
        here = self.path / link

        def stand_in(partial: Path) -> str:
            if self.links == HARD:
                _hard(partial, path)
                return _identity(path)
            return _copy(path, partial)

        if self.links == SYMBOLIC:
            partial = self.path / (link + ".partial")
            partial.unlink(missing_ok=True)
            _symbolic(partial, path)
            partial.replace(here)
            checksum_of(here).unlink(missing_ok=True)  # of the stand-in that it was on another disk
        elif here.is_symlink() or self.behind(link) != path or not checksum_of(here).exists():
            _put(here, stand_in)

    def adopt(self) -> None:
        """Make last.pth and best.pth what they are on this disk, where a folder from another disk has copies."""
        for name in ("last.pth", "best.pth"):
            stands = (self.path / name).is_file() and not (self.path / name).is_symlink()
            if stands and (self.links == SYMBOLIC or not checksum_of(self.path / name).exists()):
                file = self.behind(name)
                if file is not None:
                    self.point(name, file)

    def set_aside(self, after: tuple[int, int]) -> list[Path]:
        """Rename every checkpoint of a later position to ``*.aside``: damaged, or of a run that went another way."""
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
            if was_best:  # what is no symbolic link goes on to be what it is
                self.point("best.pth", free)
            renamed.append(free)
        if renamed and self.files():
            self.point("last.pth", self.files()[0])
        elif renamed:
            self._remove(self.path / "last.pth")
        return renamed


def _copy(path: Path, to: Path) -> str:
    """The SHA-256 of what was copied, which must be what the original's checksum says.

    Raises:
        OSError: it is not, or the disk is full.
    """
    with path.open("rb") as original, to.open("wb") as file:
        hashing = _Hashing(file)
        shutil.copyfileobj(original, hashing, 2**20)
        flush(file)
    found = hashing.sha256.hexdigest()
    if found not in (_stated(path) or [found]):
        raise OSError(errno.EIO, f"{str(path)!r} is not what its checksum says, and is not copied")
    return found
