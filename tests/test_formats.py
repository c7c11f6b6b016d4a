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
        ("pt2", (64, 4128), [], None, ["64x4128", "4096x4096"]),
        ("onnx", (64, 64), [], 11, ["--opset 11", "too old", "18"]),
        ("onnx", (64, 64), [], 99, ["--opset 99", "too new", "24"]),
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


def test_file_takes_one_image_unless_the_batch_is_open(tmp_path: Path) -> None:
    model, out = small_model(ls_init_value=0.5), str(tmp_path / "model.pt2")
    formats.write(model, out, "pt2", size=(64, 64))
    run, x = formats.RUN["pt2"](Path(out)), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert relative_error(run(x), model(x)) <= 1e-5


def test_file_that_gives_nan_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(formats.RUN, "torchscript", lambda path: lambda x: torch.full((1, 10), torch.nan))
    with refused("torchscript", "differs from PyTorch by nan"):
        formats.write(small_model(), str(tmp_path / "m.pt"), "torchscript", size=(64, 64))
    assert not list(tmp_path.iterdir())


def test_network_that_overflows_or_gives_no_tensor_is_refused(tmp_path: Path) -> None:
    model = small_model()
    with torch.no_grad():
        model.get_classifier().weight.mul_(1e8)
    with refused("not finite in float16", "leave out --half"):
        formats.write(model, str(tmp_path / "m.pt"), "torchscript", size=(64, 64), half=True)
    backbone = small_model(features_only=True)
    with refused("gives a list"):
        formats.write(backbone, str(tmp_path / "m.pt"), "torchscript", size=(64, 64))
    assert not list(tmp_path.iterdir())


def test_file_that_another_export_has_written_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = formats.RUN["torchscript"]
    monkeypatch.setitem(
        formats.RUN, "torchscript", lambda path: ((tmp_path / "m.pt").write_text("theirs"), run(path))[1]
    )
    with refused("m.pt", "exists"):
        formats.write(small_model(), str(tmp_path / "m.pt"), "torchscript", size=(64, 64))
    assert (tmp_path / "m.pt").read_text() == "theirs"
