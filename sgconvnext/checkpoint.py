"""Checkpoint files in timm's keys: written whole or not at all, checked when read, and no code in them is run."""

import hashlib
import os
import re
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import load_file
from torch import nn

VERSION = 2  # of timm's checkpoint layout


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
    """Write a checkpoint and, beside it, ``path.sha256`` as the program sha256sum does.

    Both go into a file of another name first, are flushed to the disk and then renamed; the checksum comes first, so
    that no checkpoint is ever without it.

    Raises:
        OSError: the disk is full or broken; ``path`` is as it was before, and nothing half-written is left.
    """
    partial = path.with_name(path.name + ".partial")
    hashing = None
    try:
        with partial.open("wb") as file:
            hashing = _Hashing(file)
            torch.save(state, hashing)  # type: ignore[arg-type]  # it needs no more of a file than write
            _flush(file)
        write_whole(checksum_of(path), f"{hashing.sha256.hexdigest()}  {path.name}\n".encode())
        partial.replace(path)
        _flush_folder(path.parent)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        reason = (hashing and hashing.error) or error
        raise OSError(f"checkpoint {str(path)!r} cannot be written: {str(reason).splitlines()[0]}") from error


def checksum_of(path: Path) -> Path:
    """The file beside a checkpoint that holds its SHA-256."""
    return path.with_name(path.name + ".sha256")


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file whole or not at all: into one beside it, flushed to the disk, then renamed over it."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            _flush(file)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """A rename is on the disk only once its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint, or a safetensors file of bare weights, to the CPU; no code in it is run.

    Raises:
        ValueError: there is no such file, it is not what its checksum says, or it is no checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"checkpoint {str(path)!r} does not exist; name a .pth file that a run has written")
    _verify(path)
    try:
        if path.suffix == ".safetensors":
            return {"state_dict": load_file(path)}
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises half a dozen types for a damaged file
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"checkpoint {str(path)!r} cannot be read ({type(error).__name__}: {reason})") from error
    if not isinstance(state, dict) or not isinstance(state.get("state_dict"), dict):
        raise ValueError(f"checkpoint {str(path)!r} has no 'state_dict'; it was not written by train.py or timm")
    return state


def _verify(path: Path) -> None:
    """torch.load does not look at the checksums inside its files: a flipped bit would load silently."""
    real = path.resolve()  # last.pth and best.pth are links
    if not checksum_of(real).is_file():
        return
    sha256 = hashlib.sha256()
    with real.open("rb") as file:
        while block := file.read(2**20):
            sha256.update(block)
    stated = checksum_of(real).read_text(errors="replace").split()
    if stated[:1] != [sha256.hexdigest()]:
        raise ValueError(
            f"checkpoint {str(path)!r} is damaged: its SHA-256 is not the one in {checksum_of(real).name}; use another"
        )


def weights(state: dict[str, Any], ema: bool, path: str | Path) -> dict[str, torch.Tensor]:
    """The model's or the EMA's weights out of a checkpoint."""
    key = "state_dict_ema" if ema else "state_dict"
    if not state.get(key):
        why = "EMA weights; the run that wrote it had ema.decay=0" if ema else "weights in 'state_dict'"
        raise ValueError(f"checkpoint {str(path)!r} has no {why}")
    found: dict[str, torch.Tensor] = state[key]
    return found


def load_weights(model: nn.Module, found: dict[str, torch.Tensor], path: str | Path, skip: str = "") -> None:
    """Load weights of which every key and shape must match, but for the module named ``skip`` (a new classifier).

    Raises:
        ValueError: naming the missing and unexpected keys and the shapes that differ.
    """
    own = model.state_dict()
    if skip:
        own, found = ({k: v for k, v in d.items() if not k.startswith(skip + ".")} for d in (own, found))
    problems = [
        ("missing", [key for key in own if key not in found]),
        ("unexpected", [key for key in found if key not in own]),
        ("shaped differently", [key for key in own if key in found and found[key].shape != own[key].shape]),
    ]
    hint = "; was it built for another model.img_size?" if problems[2][1] else ""
    told = [f"{len(keys)} {what} ({_shown(keys)})" for what, keys in problems if keys]
    if told:
        raise ValueError(f"checkpoint {str(path)!r} is of another architecture; keys {'; '.join(told)}{hint}")
    model.load_state_dict(found, strict=not skip)


def _shown(keys: list[str]) -> str:
    return ", ".join(keys[:6]) + (", ..." if len(keys) > 6 else "")


def _problem(path: Path) -> str:
    try:
        load(path)
    except ValueError as error:
        return str(error)
    return ""


class Folder:
    """The checkpoints of one run: ``checkpoint-EPOCHS-UPDATES.pth`` by the epochs finished and the updates since.

    ``last.pth`` and ``best.pth`` are links to two of them. Only one process of a run may write here.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def clear(self) -> None:
        """Remove what a kill left half-written."""
        for partial in self.path.glob("*.partial"):
            partial.unlink()

    def place(self, epochs: int, updates: int) -> Path:
        """The file for that position of the run."""
        return self.path / f"checkpoint-{epochs:04d}-{updates:06d}.pth"

    def files(self) -> list[Path]:
        """Newest position first."""
        found = {path: re.fullmatch(r"checkpoint-(\d+)-(\d+)\.pth", path.name) for path in self.path.glob("*.pth")}
        placed = {path: (int(match[1]), int(match[2])) for path, match in found.items() if match}
        return sorted(placed, key=lambda path: placed[path], reverse=True)

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
            raise ValueError(f"out={str(self.path)!r} has no good checkpoint: {wrong[0]} (and {len(wrong) - 1} more)")
        return None, wrong

    def add(self, path: Path, state: dict[str, Any], keep: int, best: bool) -> None:
        """Save, point ``last.pth`` (and ``best.pth``) at it, then remove all but the newest ``keep`` and the best."""
        save(path, state)
        self.point("last.pth", path)
        if best:
            self.point("best.pth", path)
        spared = {*self.files()[:keep], (self.path / "best.pth").resolve(), path}
        for old in self.files():
            if old not in spared and old.resolve() not in spared:
                old.unlink()
                checksum_of(old).unlink(missing_ok=True)

    def point(self, link: str, path: Path) -> None:
        """Make ``link`` another name of ``path``, in one step."""
        partial = self.path / (link + ".partial")
        partial.unlink(missing_ok=True)
        partial.symlink_to(path.name)
        partial.replace(self.path / link)

    def set_aside(self, after: Path) -> list[Path]:
        """Rename every checkpoint later than ``after`` to ``*.aside``: damaged, or of a run that went another way."""
        files = self.files()
        renamed = []
        for path in files[: files.index(after)] if after in files else []:
            free = path.with_name(path.name + ".aside")
            while free.exists():
                free = free.with_name(free.name + "+")
            pointing = [link for link in ("best.pth", "last.pth") if (self.path / link).resolve() == path.resolve()]
            path.rename(free)
            if checksum_of(path).exists():
                checksum_of(path).rename(checksum_of(free))
            for link in pointing:
                self.point(link, free if link == "best.pth" else after)
            renamed.append(free)
        return renamed
