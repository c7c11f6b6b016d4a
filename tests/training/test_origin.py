"""The licence and the hub name of the weights that a run starts from: they stay with what is made of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
from helpers import hub_folder, visible
from huggingface_hub import ModelCard
from timm.models import save_for_hf
from training_helpers import MICRO, change, micro_config, micro_run, trained

from sgconvnext.convert import convert
from sgconvnext.export import export_checkpoint
from sgconvnext.training import build, checkpoint

NAME = "sgconvnext_atto_gap3.d2_in1k"
ORIGIN = {"license": "apache-2.0", "base_model": "timm/convnext_atto.d2_in1k"}


@pytest.fixture
def convnext(hub: Path) -> Path:
    """A small ConvNeXt under timm's name on the hub; its folder."""
    folder = hub_folder(hub, ORIGIN["base_model"])
    small = {key: MICRO[key] for key in ("depths", "dims")}
    save_for_hf(visible(timm.create_model("convnext_atto.d2_in1k", **small)), str(folder), safe_serialization=True)
    return folder


def origin_of(**changes: Any) -> dict[str, str]:
    model: Any = build.create_model(micro_config(**changes), 10)
    origin: dict[str, str] = model.origin
    return origin


def test_pretrained_weights_have_the_licence_and_the_hub_name_of_their_tag(convnext: Path) -> None:
    start: dict[str, Any] = {"model.name": NAME, "model.pretrained": True}
    assert origin_of(**start) == ORIGIN
    file = {"file": str(convnext / "model.safetensors")}
    with_file = {"model.kwargs": MICRO | {"pretrained_cfg_overlay": file}}
    assert origin_of(**start, **with_file) == ORIGIN  # the name has a tag
    assert origin_of(**start | with_file | {"model.name": "sgconvnext_atto_gap3"}) == {}
    told = {"model.kwargs": MICRO | {"pretrained_cfg_overlay": file | {"license": "mit"}}}
    assert origin_of(**start | told | {"model.name": "sgconvnext_atto_gap3"}) == {"license": "mit"}


def test_random_weights_have_no_origin(tmp_path: Path) -> None:
    assert origin_of() == {}
    path, _, _ = trained(tmp_path)
    assert origin_of(**{"model.checkpoint": path, "model.new_head": True}) == {}


def test_licence_goes_from_checkpoint_to_folder_to_checkpoint(tmp_path: Path, uncounted: None) -> None:
    path, _, _ = trained(tmp_path)
    change(path, origin=ORIGIN)
    export_checkpoint(path, str(tmp_path / "folder"))
    for start in (path, str(tmp_path / "folder" / "model.safetensors")):
        assert origin_of(**{"model.checkpoint": start, "model.new_head": True}) == ORIGIN
    folder: dict[str, Any] = {"model.name": f"local-dir:{tmp_path / 'folder'}", "model.pretrained": True}
    assert origin_of(**folder, **{"model.kwargs": {}}) == {"license": "apache-2.0"}  # a folder has no name on the hub
    written = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert written["pretrained_cfg"]["license"] == "apache-2.0"


def test_converted_weights_keep_the_licence_and_the_name_of_their_source(tmp_path: Path) -> None:
    small = {key: MICRO[key] for key in ("depths", "dims")}
    path, _, _ = trained(tmp_path, **{"model.name": "convnext_atto", "model.kwargs": small})
    for number, (origin, licence) in enumerate([({}, "unknown"), (ORIGIN, "apache-2.0")]):
        change(path, origin=origin)
        convert(path, str(tmp_path / f"{number}"))
        front = ModelCard.load(tmp_path / f"{number}" / "README.md").data.to_dict()
        assert (front["license"], front.get("base_model")) == (licence, origin.get("base_model"))
        written = json.loads((tmp_path / f"{number}" / "config.json").read_text())
        assert written["pretrained_cfg"]["license"] == origin.get("license")


@pytest.mark.end_to_end
def test_run_records_its_origin_and_keeps_it_when_it_is_resumed(
    convnext: Path, tmp_path: Path, run_here: Callable[..., None]
) -> None:
    changes: dict[str, Any] = {"model.name": NAME, "model.pretrained": True, "epochs": 1}
    out = micro_run(run_here, tmp_path / "a", **changes)
    assert checkpoint.load(out / "last.pth")["origin"] == ORIGIN
    micro_run(run_here, tmp_path / "a", "resume=auto", "allow_change=epochs", **changes | {"epochs": 2})
    state = checkpoint.load(out / "last.pth")
    assert (state["epoch"], state["origin"]) == (1, ORIGIN)
    plain = micro_run(run_here, tmp_path / "b", epochs=1)
    assert "origin" not in checkpoint.load(plain / "last.pth")
