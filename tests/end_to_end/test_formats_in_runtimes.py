"""Files for runtimes, run in the real ones at several sizes."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from helpers import GAP, GATED, refused, small_model

from sgconvnext import formats

RUNTIMES = {"onnx": "onnxruntime", "openvino": "openvino", "pt2": "torch", "torchscript": "torch"}


def write(kind: str, options: dict[str, Any], folder: Path, **arguments: Any) -> float:
    """The error of the file of a small network, for images of 64 px unless told otherwise."""
    if find_spec(RUNTIMES[kind]) is None:
        pytest.skip(f"{RUNTIMES[kind]} is not installed: pip install -e '.[test,integrations]'")
    model, out = small_model(ls_init_value=0.5, **options), str(folder / f"model{formats.SUFFIXES[kind]}")
    error = formats.write(model, out, kind, **({"size": (64, 64)} | arguments))
    assert Path(out).exists()
    return error


@pytest.mark.parametrize(("kind", "options"), [("onnx", {}), ("openvino", GATED), ("pt2", GAP)], ids=str)
def test_file_with_open_sizes_gives_what_the_network_gives(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    assert write(kind, options, tmp_path, dynamic=["batch", "hw"]) <= 1e-4


@pytest.mark.parametrize("size", [(64, 64), (96, 80), (32, 160)], ids=str)
@pytest.mark.parametrize("kind", ["onnx", "openvino", "pt2"])
def test_file_of_one_size_gives_what_the_network_gives(kind: str, size: tuple[int, int], tmp_path: Path) -> None:
    """At two of the sizes the kernels, built for 64 px, are resized. TorchScript: tests/test_formats.py."""
    assert write(kind, {}, tmp_path, size=size) <= 1e-4


def test_what_openvino_reads_wrongly_is_not_written(tmp_path: Path) -> None:
    with refused("openvino", "differs from PyTorch", "not written"):
        write("openvino", GAP, tmp_path, dynamic=["batch", "hw"])
    assert not list(tmp_path.iterdir())
    assert write("openvino", GAP, tmp_path, dynamic=["batch"]) <= 1e-4


@pytest.mark.parametrize("kind", RUNTIMES)
def test_file_in_half_precision_is_close(kind: str, tmp_path: Path) -> None:
    assert write(kind, {}, tmp_path, half=True) <= 2e-2
