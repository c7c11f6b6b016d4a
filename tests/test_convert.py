"""python -m sgconvnext.convert: folders in timm's layout, the comparison it prints, the way back, every refusal."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import refused, relative_error
from safetensors import safe_open
from training_helpers import command, trained

from sgconvnext.convert import convert
from sgconvnext.training import checkpoint

TINY = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}


def run_of_convnext(tmp_path: Path, **changes: Any) -> tuple[str, Any, Any]:
    return trained(tmp_path, **({"model.name": "convnext_atto", "model.kwargs": TINY} | changes))


def same(got: Any, want: Any, size: int = 64) -> bool:
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        return relative_error(got(x), want(x)) <= 1e-5


@pytest.mark.parametrize("ema", [False, True])
def test_checkpoint_becomes_a_folder_that_timm_loads(ema: bool, tmp_path: Path) -> None:
    path, model, average = run_of_convnext(tmp_path)
    folder = str(tmp_path / "folder")
    told = convert(path, folder, ema=ema)
    assert "convnext_atto" in told
    assert "-> sgconvnext_atto_gap3" in told
    assert "differ by" in told
    assert f"timm.create_model('local-dir:{folder}', pretrained=True)" in told
    got: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert got.pretrained_cfg["architecture"] == "sgconvnext_atto_gap3"
    assert same(got, average if ema else model)
    card = (tmp_path / "folder" / "README.md").read_text()
    for word in ("Source", Path(path).name, "Difference", "import sgconvnext"):
        assert word in card
    assert str(tmp_path) not in card
    with safe_open(tmp_path / "folder" / "model.safetensors", "pt") as file:
        assert file.metadata()["arch"] == "sgconvnext_atto_gap3"


def test_preprocessing_and_classes_of_the_run_go_with_it(tmp_path: Path) -> None:
    path, _, _ = run_of_convnext(tmp_path, **{"data.mean": [0.1, 0.2, 0.3]})
    state = checkpoint.load(path)
    names = {f"class {i}": i for i in range(state["args"]["model"]["num_classes"])}
    checkpoint.save(Path(path), state | {"class_to_idx": names})
    convert(path, str(tmp_path / "folder"))
    written = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert written["pretrained_cfg"]["mean"] == [0.1, 0.2, 0.3]
    assert written["label_names"] == list(names)


def test_there_and_back_are_the_same_weights(tmp_path: Path) -> None:
    path, model, _ = run_of_convnext(tmp_path)
    convert(path, str(tmp_path / "there"), img_size=(128, 128))
    there = timm.create_model(f"local-dir:{tmp_path / 'there'}", pretrained=True)
    assert there.stages[0].blocks[0].sgconv.input_size == (32, 32)
    told = convert(f"local-dir:{tmp_path / 'there'}", str(tmp_path / "back"), to_convnext=True)
    assert "-> convnext_atto" in told
    back = timm.create_model(f"local-dir:{tmp_path / 'back'}", pretrained=True).eval()
    for key, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[key].flatten(), value.flatten()), key
    assert "sgconvnext" not in (tmp_path / "back" / "README.md").read_text().split("Usage")[-1]


def test_bare_weights_and_folders_of_timm(tmp_path: Path) -> None:
    source: Any = timm.create_model("convnext_atto", num_classes=4, **TINY).eval()
    torch.save(source.state_dict(), tmp_path / "bare.pth")
    convert(str(tmp_path / "bare.pth"), str(tmp_path / "a"))
    assert same(timm.create_model(f"local-dir:{tmp_path / 'a'}", pretrained=True).eval(), source)
    timm.models.save_for_hf(source, str(tmp_path / "theirs"), safe_serialization=True)
    convert(f"local-dir:{tmp_path / 'theirs'}", str(tmp_path / "b"))
    assert same(timm.create_model(f"local-dir:{tmp_path / 'b'}", pretrained=True).eval(), source)


def test_what_cannot_be_converted_leaves_no_folder(tmp_path: Path) -> None:
    folder = str(tmp_path / "folder")
    with refused("SOURCE 'convnext_tony'", "neither a model of timm nor a file"):
        convert("convnext_tony", folder)
    (tmp_path / "a.pth").write_text("text")
    with refused("a.pth", "cannot be read"):
        convert(str(tmp_path / "a.pth"), folder)
    path, _, _ = trained(tmp_path)
    with refused(f"SOURCE {path!r}: sgconvnext_atto is no ConvNeXt of timm, but of the class SGConvNeXt"):
        convert(path, folder)
    torch.save(timm.create_model("sgconvnext_atto_gap3", **TINY).state_dict(), tmp_path / "ours.pth")
    with refused("is of an SGConvNeXt", "local-dir:FOLDER"):
        convert(str(tmp_path / "ours.pth"), folder, to_convnext=True)
    with refused("--img-size=99999 must be at most 4096"):
        convert(path, folder, img_size=(224, 99999))
    with refused("row_gap=0"):
        convert(path, folder, to_convnext=True)
    assert not Path(folder).exists()
    with refused("SOURCE", "local-dir:FOLDER"):
        convert(str(tmp_path), folder)
    path, _, _ = run_of_convnext(tmp_path)
    convert(path, folder)
    with refused("already holds model.safetensors"):
        convert(path, folder)


@pytest.mark.end_to_end
def test_command_says_what_it_did_or_why_not(tmp_path: Path) -> None:
    path, _, _ = run_of_convnext(tmp_path)
    done = command("-m", "sgconvnext.convert", path, tmp_path / "folder")
    assert done.returncode == 0, done.stderr
    assert "-> sgconvnext_atto_gap3" in done.stdout
    failed = command("-m", "sgconvnext.convert", tmp_path / "none.pth", tmp_path / "other")
    assert failed.returncode != 0
    assert "Traceback" not in failed.stderr
    assert "neither a model of timm nor a file" in failed.stderr
