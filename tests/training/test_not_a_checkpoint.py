"""Files that people hand over by mistake, each refused in a sentence of its own; what holds weights is read."""

import argparse
import errno
import gzip
import json
import os
import pickle
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import refused
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from sgconvnext.training import checkpoint
from sgconvnext.training.recorded_model import recorded_model

WEIGHTS = OrderedDict(weight=torch.arange(6.0).view(2, 3), bias=torch.ones(2))
STATE = {"state_dict": WEIGHTS}
SHA256 = "ab" * 32


def zipped(path: Path, *names: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "content")


def tarred(path: Path) -> None:
    (path.parent / "inside.txt").write_text("content")
    with tarfile.open(path, "w") as archive:
        archive.add(path.parent / "inside.txt", "inside.txt")


def cut(path: Path, share: float) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])


def cut_torch(path: Path) -> None:
    torch.save(STATE, path)
    cut(path, 0.5)


def cut_safetensors(path: Path, share: float = 0.9) -> None:
    save_file(WEIGHTS, path)
    cut(path, share)


def exported(path: Path) -> None:
    program = torch.export.export(nn.Linear(3, 2), (torch.zeros(1, 3),))
    torch.export.save(program, path)


Write = Callable[[Path], Any]
MISTAKES: dict[str, tuple[Write, str]] = {
    "empty.pth": (lambda p: p.touch(), "it is empty; copy or download it again"),
    "imagenet.yaml": (lambda p: p.write_text("epochs: 300\n"), "it is text, beginning 'epochs: 300'; name a .pth"),
    "umlaut.txt": (lambda p: p.write_text("ä" * 3000), "it is text, beginning 'ää"),
    "config.json": (lambda p: p.write_text(json.dumps({"a": 1})), "it is JSON text, such as a config.json; name a"),
    "a.png": (lambda p: Image.new("RGB", (4, 4)).save(p), "it is a PNG image; name a .pth"),
    "a.jpg": (lambda p: Image.new("RGB", (4, 4)).save(p), "it is a JPEG image; name a .pth"),
    "a.gif": (lambda p: Image.new("RGB", (4, 4)).save(p), "it is a GIF image; name a .pth"),
    "a.zip": (lambda p: zipped(p, "runs/best.pth", "b"), "a zip archive of 2 files such as 'runs/best.pth'; unpack"),
    "none.zip": (lambda p: zipped(p), "it is a zip archive of 0 files; unpack"),
    "a.tar": (tarred, "it is an archive (tar); unpack it first"),
    "a.pth.gz": (lambda p: p.write_bytes(gzip.compress(b"content")), "it is compressed (gzip); unpack it first"),
    "a.npz": (lambda p: np.savez(p, weight=np.zeros(3)), "it holds NumPy arrays (.npz); name a .pth"),
    "a.npy": (lambda p: np.save(p, np.zeros(3)), "it is a NumPy array; name a .pth"),
    "page.pth": (lambda p: p.write_text("\n<!DOCTYPE html>\n<html>404"), "it is a web page, often an error"),
    "plain.pth": (lambda p: p.write_text("<html><body>Not found"), "it is a web page, often an error"),
    "pointer.pth": (
        lambda p: p.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{SHA256}\nsize 3\n"),
        "it is a Git LFS pointer, which stands for the file; fetch the file itself with git lfs pull",
    ),
    "best.pth.sha256": (lambda p: p.write_text(f"{SHA256}  best.pth\n"), "it is a checksum; name the file that"),
    "script.pt": (lambda p: torch.jit.script(nn.Linear(3, 2)).save(str(p)), "it is a TorchScript program, which"),
    "model.pt2": (exported, "it is a program of torch.export; name a .pth"),
    "model.onnx": (lambda p: p.write_bytes(b"\x08\x0a\x12\x07pytorch\x1a\x032.1"), "it is an ONNX model, a graph"),
    "onnx.pth": (lambda p: p.write_bytes(b"\x08\x08\x12\x07pytorch\x1a\x032.1"), "it is an ONNX model, a graph"),
    "keras.h5": (lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99)), "it is an HDF5 file, as Keras"),
    "a.pkl": (lambda p: p.write_bytes(pickle.dumps({"weight": np.zeros(3)})), "it is a pickle that torch.save did"),
    "cut.pth": (cut_torch, "it is cut short: its end is missing; copy or download it again"),
    "cut.safetensors": (cut_safetensors, "it is cut short: a safetensors file of"),
    "header.safetensors": (lambda p: cut_safetensors(p, 0.3), "it is cut short: a safetensors file of"),
    "broken.safetensors": (lambda p: p.write_bytes((9).to_bytes(8, "little") + b"{{{{{{{{{"), "its header, of a safe"),
    "zeros.pth": (lambda p: p.write_bytes(bytes(999)), "it is nothing that torch.save or safetensors writes"),
    "noise.pth": (lambda p: p.write_bytes(bytes([200, 13, 99]) * 99), "it is nothing that torch.save or safetensors"),
    "optimizer.pth": (
        lambda p: torch.save(torch.optim.AdamW(nn.Linear(3, 2).parameters()).state_dict(), p),
        "is the state of an optimiser, without weights; use another",
    ),
    "model.pth": (lambda p: torch.save(nn.Linear(3, 2), p), "it holds a whole model (torch.nn.modules.linear.Linear)"),
    "old_model.pth": (
        lambda p: torch.save(nn.Linear(3, 2), p, _use_new_zipfile_serialization=False),
        "it holds a whole model (torch.nn.modules.linear.Linear)",
    ),
    "object.pth": (lambda p: torch.save(STATE | {"a": Path("b")}, p), "it holds objects (pathlib"),
    "scalar.pth": (lambda p: torch.save(STATE | {"a": np.float64(3)}, p), "it holds objects (numpy."),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_file_that_holds_no_weights_is_told_for_what_it_is(name: str, tmp_path: Path) -> None:
    write, told = MISTAKES[name]
    write(tmp_path / name)
    with refused(f"checkpoint {str(tmp_path / name)!r} ", told):
        checkpoint.load(tmp_path / name)


@pytest.mark.parametrize("name", ["model.pth", "old_model.pth", "object.pth", "scalar.pth", "noise.pth"])
def test_nobody_is_advised_to_run_the_code_of_a_file(name: str, tmp_path: Path) -> None:
    MISTAKES[name][0](tmp_path / name)
    with pytest.raises(ValueError, match="cannot be read") as caught:
        checkpoint.load(tmp_path / name)
    message = str(caught.value)
    assert "weights_only" not in message
    assert "\x1b" not in message
    assert "torch.save(model.state_dict(), PATH)" in message or name == "noise.pth"


def test_zip_file_whose_contents_are_damaged_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "damaged.pth"
    torch.save({"state_dict": {"weight": torch.ones(3)}}, path)
    content = path.read_bytes()
    start = content.index(b"PK\x01\x02")  # of the list of what is in it
    path.write_bytes(content[:start] + b"XXXX" + content[start + 4 :])
    with refused(repr(str(path)), "its list of contents is damaged"):
        checkpoint.load(path)


def test_checksum_may_name_a_path_or_nothing(tmp_path: Path) -> None:
    (tmp_path / "sums.txt").write_text(f"{SHA256}  runs/best.pth\n")
    with refused("it is a checksum", repr(str(tmp_path / "runs" / "best.pth"))):
        checkpoint.load(tmp_path / "sums.txt")
    (tmp_path / "sums.txt").write_text(f"{SHA256}  ")
    with refused("it is text"):
        checkpoint.load(tmp_path / "sums.txt")


@pytest.mark.parametrize("metadata", [None, {}, {"timm_model_args": "{}"}])
def test_metadata_of_somebody_elses_is_no_record(metadata: object) -> None:
    assert recorded_model({"state_dict": {}, "metadata": metadata}) is None


def test_checksum_names_the_file_that_it_is_of(tmp_path: Path) -> None:
    (tmp_path / "sums.txt").write_text(f"{SHA256}  best of all.pth\n{SHA256}  last.pth\n")
    with refused(repr(str(tmp_path / "best of all.pth"))):
        checkpoint.load(tmp_path / "sums.txt")


def test_folder_is_told_with_a_file_in_it(tmp_path: Path) -> None:
    with refused(repr(str(tmp_path)), "it is a folder; name a file in it, such as best.pth"):
        checkpoint.load(tmp_path)
    torch.save(STATE, tmp_path / "last.pth")
    with refused("it is a folder", f"such as {tmp_path / 'last.pth'}"):
        checkpoint.load(tmp_path)
    (tmp_path / ".metadata").touch()
    with refused("torch.distributed.checkpoint", "dcp_to_torch"):
        checkpoint.load(tmp_path)


def test_file_without_permission_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    torch.save(STATE, tmp_path / "a.pth")
    monkeypatch.setattr(Path, "open", denied)  # root may open everything
    with refused("a.pth", "cannot be read: Permission denied; see to its permissions"):
        checkpoint.load(tmp_path / "a.pth")


READ: dict[str, Write] = {
    "a.pth": lambda p: torch.save(STATE, p),
    "old.pth": lambda p: torch.save(STATE, p, _use_new_zipfile_serialization=False),
    "timm.pth": lambda p: torch.save(STATE | {"args": argparse.Namespace(lr=1e-3), "arch": "resnet18"}, p),
    "convnext.pth": lambda p: torch.save({"model": WEIGHTS, "optimizer": {}, "epoch": 3}, p),
    "bare.pth": lambda p: torch.save(WEIGHTS, p),
    "ddp.pth": lambda p: torch.save({"state_dict": {f"module.{k}": v for k, v in WEIGHTS.items()}}, p),
    "compiled.pth": lambda p: torch.save({f"_orig_mod.module.{k}": v for k, v in WEIGHTS.items()}, p),
    "both.pth": lambda p: torch.save({f"module._orig_mod.{k}": v for k, v in WEIGHTS.items()}, p),
    "a.safetensors": lambda p: save_file(WEIGHTS, p),
    "safetensors.pth": lambda p: save_file(WEIGHTS, p),
    "torch.safetensors": lambda p: torch.save(STATE, p),
}


@pytest.mark.parametrize("name", READ)
def test_weights_are_read_whoever_wrote_them_and_whatever_the_file_is_called(name: str, tmp_path: Path) -> None:
    READ[name](tmp_path / name)
    found = checkpoint.weights(checkpoint.load(tmp_path / name), False, name)
    assert found.keys() == WEIGHTS.keys()
    assert all(torch.equal(found[key], WEIGHTS[key]) for key in WEIGHTS)


def test_average_of_convnexts_own_trainer_is_read(tmp_path: Path) -> None:
    average = {key: 2 * value for key, value in WEIGHTS.items()}
    torch.save({"model": WEIGHTS, "model_ema": average}, tmp_path / "a.pth")
    found = checkpoint.weights(checkpoint.load(tmp_path / "a.pth"), True, "a.pth")
    assert torch.equal(found["weight"], average["weight"])


def test_prefix_of_some_keys_only_is_part_of_their_names(tmp_path: Path) -> None:
    torch.save({"module.weight": torch.zeros(1), "weight": torch.ones(1)}, tmp_path / "a.pth")
    found = checkpoint.weights(checkpoint.load(tmp_path / "a.pth"), False, "a.pth")
    assert set(found) == {"module.weight", "weight"}
