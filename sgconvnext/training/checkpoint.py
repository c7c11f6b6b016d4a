"""Checkpoint files in timm's keys: written whole or not at all, checked when read, and no code in them is run."""

import argparse
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from .. import fit
from ..errors import one_line
from ..files import flush
from . import checksum, not_a_checkpoint

VERSION = 2  # of timm's checkpoint layout
MODELS = ("torch.nn.modules.", "timm.models.", "torchvision.models.", "sgconvnext.")
HARMLESS: list[Any] = [argparse.Namespace]  # timm's train.py keeps its command line as one: values by name, no code


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint and, beside it, ``path.sha256`` as the program sha256sum does, see `checksum.replace`.

    Raises:
        OSError: the disk is full or broken; ``path`` is as it was before, and nothing half-written is left.
    """

    def write(partial: Path) -> str:
        with partial.open("wb") as file:
            hashing = checksum.HashingFile(file)
            try:
                torch.save(state, hashing)  # type: ignore[arg-type]  # it needs no more of a file than write
            except RuntimeError as error:
                raise hashing.error or error from error
            flush(file)
        return hashing.sha256.hexdigest()

    try:
        checksum.replace(path, write)
    except (OSError, RuntimeError) as error:
        raise OSError(f"checkpoint {str(path)!r} cannot be written: {one_line(error)}") from error


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint, or a file of bare weights, to the CPU; no code in it is run.

    Returns:
        a dictionary with the weights under 'state_dict', and what else the file holds.

    Raises:
        ValueError: there is no such file, it is not what its checksum says, or it is no checkpoint.
    """
    path = Path(path)
    if os.path.isdir(path):  # Path.is_dir fails for names that are too long
        raise ValueError(f"checkpoint {str(path)!r} cannot be read: {not_a_checkpoint.folder_reason(path)}")
    if not os.path.isfile(path):
        raise ValueError(f"checkpoint {str(path)!r} does not exist; name a .pth file that a run has written")
    real = path.resolve()  # last.pth and best.pth are links
    try:
        # torch.load does not look at the checksums inside its files: a flipped bit would load silently
        if checksum.is_damaged(real):
            beside = checksum.checksum_of(real).name
            raise ValueError(
                f"checkpoint {str(path)!r} is damaged: its SHA-256 is not the one in {beside}; use another"
            )
        told = not_a_checkpoint.reason(path)
    except OSError as error:
        told = f"{error.strerror}; see to its permissions and its disk"
    if told:
        raise ValueError(f"checkpoint {str(path)!r} cannot be read: {told}")
    return _by_name(_read(path), path)


def _read(path: Path) -> Any:
    try:
        if not_a_checkpoint.is_safetensors(path):
            with safe_open(path, "pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  it is no dictionary
                return {"state_dict": tensors, "metadata": file.metadata() or {}}
        # opened, because torch would go by the suffix of a path
        with torch.serialization.safe_globals(HARMLESS), path.open("rb") as opened:
            return torch.load(opened, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types for a damaged file
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
        return f"it is damaged ({type(error).__name__}: {reason[:200]}); use another"  # without torch's advice
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
    if _are_tensors(state.get("model")):  # ConvNeXt's own trainer and many others write so
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


def weights(state: dict[str, Any], ema: bool, path: str | Path) -> dict[str, torch.Tensor]:
    """The weights of the model or the EMA in a checkpoint; keys lose the prefixes of DDP and torch.compile."""
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
