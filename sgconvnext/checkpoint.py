"""Checkpoint files, in timm's keys, and nothing in them but tensors and plain values."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

VERSION = 2  # of timm's checkpoint layout


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint whole or not at all: into a file beside it, flushed, then renamed over it."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU; only tensors and plain values are unpickled.

    Raises:
        ValueError: there is no such file, or it is no checkpoint.
    """
    if not Path(path).is_file():
        raise ValueError(f"checkpoint {str(path)!r} does not exist; name a .pth file that a run has written")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises half a dozen types for a damaged file
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"checkpoint {str(path)!r} cannot be read ({type(error).__name__}: {reason})") from error
    if not isinstance(state, dict) or not isinstance(state.get("state_dict"), dict):
        raise ValueError(f"checkpoint {str(path)!r} has no 'state_dict'; it was not written by train.py or timm")
    return state


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
