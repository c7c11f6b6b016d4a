"""Exported folders: the same weights and answers through timm alone, the run's preprocessing, and every refusal."""

import json
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from helpers import refused
from safetensors import safe_open
from timm.data import resolve_model_data_config
from timm.models import load_checkpoint
from training_helpers import MICRO, change, command, micro_config, randomized, trained, write_config

import train
from sgconvnext import export
from sgconvnext.export import export_checkpoint
from sgconvnext.training import build, checkpoint

pytestmark = pytest.mark.usefixtures("uncounted")

PREPROCESSING = {
    "data.img_size": [32, 64],
    "data.mean": [0.1, 0.2, 0.3],
    "data.std": [0.4, 0.5, 0.6],
    "data.crop_pct": 0.9,
    "data.crop_mode": "squash",
    "data.interpolation": "bilinear",
}


def load(folder: str) -> Any:
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def assert_same(got: torch.nn.Module, want: torch.nn.Module, size: tuple[int, int] = (32, 32)) -> None:
    """Bit for bit, weights and logits."""
    assert got.state_dict().keys() == want.state_dict().keys()
    for key, tensor in want.state_dict().items():
        assert torch.equal(got.state_dict()[key], tensor), key
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        assert torch.equal(got(images), want(images))


@pytest.mark.parametrize("ema", [False, True])
def test_timm_loads_the_same_weights_bit_for_bit(ema: bool, tmp_path: Path) -> None:
    path, model, average = trained(tmp_path)
    folder = str(tmp_path / "new" / "folder")
    told = export_checkpoint(path, folder, ema)
    assert f"{'ema' if ema else 'model'} weights of sgconvnext_atto, after 5 epochs" in told
    assert f"timm.create_model('local-dir:{folder}', pretrained=True)" in told
    assert_same(load(folder), average if ema else model)
    assert sorted(os.listdir(folder)) == ["README.md", "config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}), ("vit_tiny_patch16_224", {"depth": 1})],
)
def test_models_of_timm_are_exported_too(name: str, kwargs: dict[str, Any], tmp_path: Path) -> None:
    path, model, _ = trained(tmp_path, **{"model.name": name, "model.kwargs": kwargs})
    export_checkpoint(path, str(tmp_path / "folder"))
    loaded = load(str(tmp_path / "folder"))
    assert_same(loaded, model)
    assert not loaded.pretrained_cfg.get("tag")  # such as d2_in1k, of weights that these are not


def test_channels_last_weights_are_exported(tmp_path: Path) -> None:
    path, model, _ = trained(tmp_path, **{"model.channels_last": True})
    assert not model.get_parameter("stem.0.weight").is_contiguous()
    export_checkpoint(path, str(tmp_path / "folder"))
    assert_same(load(str(tmp_path / "folder")), model.to(memory_format=torch.contiguous_format))


def test_tied_weights_are_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, model, _ = trained(tmp_path)
    norm: Any = model.get_submodule("stages.0.blocks.0.norm")
    norm.bias = norm.weight
    change(path, state_dict=model.state_dict())
    monkeypatch.setattr(build, "create_model", lambda *args, **kwargs: model)
    export_checkpoint(path, str(tmp_path / "folder"))
    assert_same(load(str(tmp_path / "folder")), model)


def test_load_checkpoint_takes_the_file(tmp_path: Path) -> None:
    path, model, _ = trained(tmp_path)
    export_checkpoint(path, str(tmp_path / "folder"))
    other = randomized(micro_config(**{"model.num_classes": 3}))
    load_checkpoint(other, str(tmp_path / "folder" / "model.safetensors"))
    assert_same(other, model)


def test_folder_carries_the_preprocessing_of_the_run(tmp_path: Path) -> None:
    path, model, _ = trained(tmp_path, **PREPROCESSING)
    export_checkpoint(path, str(tmp_path / "folder"))
    loaded = load(str(tmp_path / "folder"))
    assert_same(loaded, model, (32, 64))
    found = {key: tuple(v) if isinstance(v, list) else v for key, v in resolve_model_data_config(loaded).items()}
    assert found == {
        "input_size": (3, 32, 64),
        "mean": (0.1, 0.2, 0.3),
        "std": (0.4, 0.5, 0.6),
        "crop_pct": 0.9,
        "crop_mode": "squash",
        "interpolation": "bilinear",
    }


def test_folder_names_the_classes_in_the_order_of_the_logits(tmp_path: Path) -> None:
    path, _, _ = trained(tmp_path)
    export_checkpoint(path, str(tmp_path / "named"))
    assert load(str(tmp_path / "named")).pretrained_cfg["label_names"] == ["zebra", "walrus", "ant"]
    change(path, class_to_idx=None)
    export_checkpoint(path, str(tmp_path / "nameless"))
    assert not load(str(tmp_path / "nameless")).pretrained_cfg.get("label_names")
    assert "label_names" not in json.loads((tmp_path / "nameless" / "config.json").read_text())


def test_nameless_classes_are_not_taken_for_those_of_imagenet() -> None:
    assert export.model_config(None, 1000, {})["label_names"] == [str(index) for index in range(1000)]
    assert export.model_config(None, 999, {})["label_names"] is None
    named = {f"n{index}": index for index in range(1000)}
    assert export.model_config(named, 1000, {})["label_names"] == list(named)


def test_number_of_classes_is_given_once(tmp_path: Path) -> None:
    path, model, _ = trained(tmp_path, **{"data.img_size": 64})
    export_checkpoint(path, str(tmp_path / "folder"))
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert (config["num_classes"], config["model_args"]["img_size"]) == (3, [64, 64])
    # what transformers' TimmWrapper does
    assert timm.create_model(config["architecture"], num_classes=config["num_classes"], **config["model_args"])
    assert_same(load(str(tmp_path / "folder")), model)


@pytest.mark.parametrize("door", ["AutoModelForImageClassification", "TimmWrapperForImageClassification"])
def test_transformers_reads_the_folder(door: str, tmp_path: Path) -> None:
    path, model, _ = trained(tmp_path, **{"data.img_size": 64})
    export_checkpoint(path, str(tmp_path / "folder"))
    wrapped = getattr(transformers, door).from_pretrained(str(tmp_path / "folder")).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(wrapped(images).logits, model(images))
    assert wrapped.config.id2label == {0: "zebra", 1: "walrus", 2: "ant"}
    features = transformers.AutoModel.from_pretrained(str(tmp_path / "folder")).eval()
    with torch.no_grad():
        assert torch.equal(features(images).last_hidden_state, model.forward_features(images))  # type: ignore[operator]
    seen = transformers.AutoImageProcessor.from_pretrained(str(tmp_path / "folder"))
    assert tuple(seen.data_config["input_size"]) == (3, 64, 64)


def test_gated_models_are_exported_with_the_import_that_registers_them(tmp_path: Path) -> None:
    for name in ("sgconvnext_atto_gated", "convnext_atto_gated"):
        path, model, _ = trained(tmp_path, **{"model.name": name})
        folder = tmp_path / name
        export_checkpoint(path, str(folder))
        got = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        assert all(value.any() for key, value in got.state_dict().items() if ".gate." in key)
        images = torch.randn(2, 3, 64, 64)
        assert torch.equal(got(images), model.eval()(images))
        card = (folder / "README.md").read_text()
        assert "import sgconvnext, timm" in card
        assert ("2210.09298" in card) == name.startswith("sg")


def test_run_starts_from_exported_weights_as_from_the_checkpoint(tmp_path: Path) -> None:
    path, model, _ = trained(tmp_path, **{"data.img_size": 64})
    export_checkpoint(path, str(tmp_path / "folder"))
    start = {"model.checkpoint": str(tmp_path / "folder" / "model.safetensors"), "model.num_classes": 3}
    got = build.create_model(micro_config(**start, **{"data.img_size": 96}), 3)
    model.set_input_size(96)  # type: ignore[operator]
    assert_same(got.eval(), model, (96, 96))
    with refused("model.safetensors", "alpha=0.5, this model has alpha=0.25"):
        build.create_model(micro_config(**start, **{"model.kwargs": MICRO | {"alpha": 0.25}}), 3)


def test_class_of_several_names_has_one_label_with_all_of_them(tmp_path: Path) -> None:
    path, _, _ = trained(tmp_path)
    change(path, class_to_idx={"tench": 0, "Tinca tinca": 0, "goldfish": 1, "hammerhead": 2})  # torchvision's ImageNet
    export_checkpoint(path, str(tmp_path / "folder"))
    labels = load(str(tmp_path / "folder")).pretrained_cfg["label_names"]
    assert labels == ["tench, Tinca tinca", "goldfish", "hammerhead"]


def test_exported_backbone_takes_a_new_head(tmp_path: Path) -> None:
    path, model, _ = trained(tmp_path)
    export_checkpoint(path, str(tmp_path / "folder"))
    tuned: Any = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True, num_classes=7)
    assert tuned.head.fc.out_features == 7
    assert torch.equal(tuned.stem[0].weight, model.get_parameter("stem.0.weight"))


def test_file_says_what_it_is_and_everybody_may_read_it(tmp_path: Path) -> None:
    path, _, _ = trained(tmp_path)
    export_checkpoint(path, str(tmp_path / "folder"), ema=True)
    weights = tmp_path / "folder" / "model.safetensors"
    with safe_open(weights, "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata.pop("timm_model_args")) == MICRO | {"img_size": 32}
    assert metadata == {"format": "pt", "arch": "sgconvnext_atto", "epoch": "4", "weights": "ema"}
    assert stat.S_IMODE(weights.stat().st_mode) == stat.S_IMODE((tmp_path / "best.pth").stat().st_mode)


def test_checkpoint_that_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    path, _, _ = trained(tmp_path)
    folder = tmp_path / "folder"
    with refused("none.pth", "does not exist"):
        export_checkpoint("none.pth", str(folder))
    change(path, state_dict_ema=None)
    with refused("best.pth", "no EMA weights"):
        export_checkpoint(path, str(folder), ema=True)
    tree = checkpoint.load(path)["args"]
    change(path, args=tree | {"model": tree["model"] | {"num_classes": None}})
    with refused("best.pth", "model.num_classes=null"):
        export_checkpoint(path, str(folder))
    change(path, args=tree | {"model": tree["model"] | {"num_classes": 4}})
    with refused("best.pth", "head.fc.weight", "of 3 classes, the model of 4"):
        export_checkpoint(path, str(folder))
    change(path, args=None, epoch=None)
    with refused("best.pth", "lacks args, epoch", "not written by train.py"):
        export_checkpoint(path, str(folder))
    assert not folder.exists()


def test_checkpoint_of_another_architecture_is_refused_in_one_line(
    tmp_path: Path, refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _, _ = trained(tmp_path)
    theirs = timm.create_model("resnet10t", num_classes=3)
    change(path, state_dict=theirs.state_dict())
    for arguments in ([str(tmp_path / "folder")], [str(tmp_path / "a.onnx"), "--format", "onnx"]):
        monkeypatch.setattr(sys, "argv", ["export.py", path, *arguments])
        with pytest.raises(SystemExit):
            export.main()
        told = capsys.readouterr().err
        assert told.startswith(f"sgconvnext.export: error: checkpoint '{path}' is of another architecture; keys ")
        assert told.count("\n") == 1
    start = write_config(tmp_path / "a.yaml", **{"model.checkpoint": path})
    assert "is of another architecture; keys " in refusal(train, start, f"out={tmp_path / 'out'}")
    assert not {"folder", "a.onnx", "out"} & set(os.listdir(tmp_path))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "README.md"])
def test_folder_that_is_taken_is_refused(name: str, tmp_path: Path) -> None:
    path, _, _ = trained(tmp_path)
    (tmp_path / name).write_text("precious")
    with refused(str(tmp_path), f"already holds {name}", "name another"):
        export_checkpoint(path, str(tmp_path))
    assert (tmp_path / name).read_text() == "precious"


def test_folder_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _, _ = trained(tmp_path)
    with refused("best.pth/folder", "cannot be written", "Not a directory"):
        export_checkpoint(path, f"{path}/folder")

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "save_config_for_hf", full)  # after the weights
    with refused("folder", "cannot be written", "No space left on device"):
        export_checkpoint(path, str(tmp_path / "folder"))
    assert not os.listdir(tmp_path / "folder")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sgconvnext_atto", "a.pt2", "--use-ema"], ["--use-ema", "leave it out"]),
        (["x" * 300, "a.pt2"], ["xxx", "timm"]),
        (["sgconvnext_atto", f"{'x' * 300}.pt2"], ["xxx", "cannot be written", "name too long"]),
        (["sgconvnext_atto", "taken/a.pt2"], ["taken/a.pt2", "cannot be written", "name another"]),
        (["none.pth", "a.pt2"], ["checkpoint 'none.pth' does not exist"]),
        (["run", "a.pt2"], ["checkpoint 'run' cannot be read", "folder"]),
        (["convnext_atto.d2_in1k", "a.pt2"], ["convnext_atto.d2_in1k", "cannot be built"]),
    ],
    ids=[
        "average of a name",
        "long checkpoint",
        "long file",
        "file in a file",
        "no file",
        "folder",
        "unreachable tag",
    ],
)
def test_file_that_cannot_be_made_is_refused_in_one_line(
    arguments: list[str],
    words: list[str],
    tmp_path: Path,
    hub: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").touch()
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(sys, "argv", ["export.py", *arguments, "--format", "pt2", "--img-size", "32"])
    with pytest.raises(SystemExit):
        export.main()
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert all(word in told for word in words), told


def test_file_for_a_runtime_needs_its_format_and_random_weights_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["export.py", "sgconvnext_atto", "a.pt"])
    with pytest.raises(SystemExit):
        export.main()
    assert "OUT 'a.pt' would be a folder; add --format torchscript" in capsys.readouterr().err
    told = export.export_file(
        "sgconvnext_atto", "a.pt", "torchscript", size=(32, 32), dynamic=[], opset=None, half=False
    )
    assert "its weights are random" in told


def test_checkpoint_may_have_a_colon_in_its_path(tmp_path: Path) -> None:
    path, _, _ = trained(tmp_path)
    there = Path(path).rename(tmp_path / "10:30.pth")
    out = str(tmp_path / "a.pt")
    told = export.export_file(str(there), out, "torchscript", dynamic=[], opset=None, half=False)
    assert "random" not in told


def test_file_of_a_folder_takes_the_size_that_its_kernels_are_built_for(tmp_path: Path) -> None:
    model: Any = timm.create_model("sgconvnext_atto", num_classes=3, **MICRO)
    model.set_input_size((64, 96))
    timm.models.save_for_hf(model, str(tmp_path / "folder"), safe_serialization=True)
    out = str(tmp_path / "a.pt")
    export.export_file(f"local-dir:{tmp_path / 'folder'}", out, "torchscript", dynamic=[], opset=None, half=False)
    assert torch.jit.load(out)(torch.randn(1, 3, 64, 96)).shape == (1, 3)


@pytest.mark.end_to_end
def test_command_exports_and_refuses_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _, ema = trained(tmp_path)
    done = command("-m", "sgconvnext.export", path, tmp_path / "folder", "--use-ema")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    assert f"local-dir:{tmp_path / 'folder'}" in done.stdout
    assert_same(load(str(tmp_path / "folder")), ema)

    monkeypatch.setattr(sys, "argv", ["export.py", path, str(tmp_path / "folder")])
    with pytest.raises(SystemExit) as ended:
        export.main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("sgconvnext.export: error: folder ")
    assert error.count("\n") == 1


def test_network_without_images_is_refused() -> None:
    with refused("sequence_lm", "no images"):
        export._network("sequence_lm", ema=False)
