"""Files for runtimes: what they give in their runtime, and every refusal."""

from pathlib import Path

import pytest
import torch
from helpers import refused, relative_error, small_model

from sgconvnext import formats


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (32, 160)], ids=str)
def test_torchscript_file_gives_what_the_network_gives(size: tuple[int, int], tmp_path: Path) -> None:
    model, out = small_model(ls_init_value=0.5), str(tmp_path / "model.pt")
    assert formats.write(model, out, "torchscript", size=size, dynamic=["batch"]) <= 1e-4
    x = torch.randn(3, 3, *size)
    with torch.no_grad():
        assert relative_error(torch.jit.load(out)(x), model(x)) <= 1e-5


@pytest.mark.parametrize(
    ("kind", "size", "dynamic", "opset", "words"),
    [
        ("pt2", (16, 64), [], None, ["16x64", "32x32"]),
        ("onnx", (64, 64), [], 11, ["--opset 11", "too old", "18"]),
        ("pt2", (64, 64), [], 18, ["--opset 18", "leave it out"]),
        ("torchscript", (64, 64), ["hw"], None, ["hw", "pt2"]),
        ("pt2", (64, 80), ["hw"], None, ["64x80", "multiples of 32"]),
    ],
)
def test_what_no_file_can_hold_is_refused(
    kind: str, size: tuple[int, int], dynamic: list[str], opset: int | None, words: list[str], tmp_path: Path
) -> None:
    with refused(*words):
        formats.refuse(str(tmp_path / f"m{formats.SUFFIXES[kind]}"), kind, size, dynamic, opset)


def test_output_that_exists_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.pt2").touch()
    with refused("m.pt2", "exists"):
        formats.refuse(str(tmp_path / "m.pt2"), "pt2", (64, 64), [], None)


def test_missing_runtime_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(formats.RUNTIMES, "openvino", ("no_such_runtime",))
    with refused("no_such_runtime", "pip install"):
        formats.refuse(str(tmp_path / "m.xml"), "openvino", (64, 64), [], None)
