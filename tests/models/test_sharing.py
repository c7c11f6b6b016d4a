"""Folders and repositories that timm writes of our models load again, with the same logits and the same labels."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from helpers import SMALL, hub_folder, random_gates, refused, visible
from timm.models import _hub, push_to_hf_hub, save_for_hf
from timm.utils import reparameterize_model
from torch import nn
from training_helpers import trained

from sgconvnext.export import export_checkpoint

OURS = ["sgconvnext_atto", "sgconvnext_atto_gap3", "sgconvnext_atto_gated"]
NAMES = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"]


def shared(name: str, size: tuple[int, int] | None = None, **arguments: Any) -> Any:
    """A small model, resized to another size than it was built for."""
    model = random_gates(visible(timm.create_model(name, **SMALL | arguments)))
    if size:
        model.set_input_size(size)
    return model


def gated_convnext() -> Any:
    shape = {key: value for key, value in SMALL.items() if key != "img_size"}
    return random_gates(visible(timm.create_model("convnext_atto_gated", **shape)))


MODELS: dict[str, Callable[[], Any]] = {
    "plain": lambda: shared("sgconvnext_atto"),
    "built for another size": lambda: shared("sgconvnext_atto", img_size=(96, 64)),
    "resized": lambda: shared("sgconvnext_atto", (96, 64)),
    "gap3": lambda: shared("sgconvnext_atto_gap3"),
    "gap3, resized": lambda: shared("sgconvnext_atto_gap3", (96, 64)),
    "gated": lambda: shared("sgconvnext_atto_gated"),
    "gated, resized": lambda: shared("sgconvnext_atto_gated", (96, 64)),
    "gated ConvNeXt": gated_convnext,
    "other kernels": lambda: shared("sgconvnext_atto", bidirectional=False, num_scales=3, decay="position"),
}


def assert_same(got: nn.Module, want: nn.Module) -> None:
    images = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        assert torch.equal(got.eval()(images), want.eval()(images))


@pytest.mark.parametrize("kind", MODELS)
def test_what_timm_saves_loads_from_the_folder_and_from_the_hub(kind: str, hub: Path) -> None:
    model, folder = MODELS[kind](), hub_folder(hub, "somebody/model")
    save_for_hf(model, str(folder), safe_serialization=True)
    assert_same(timm.create_model(f"local-dir:{folder}", pretrained=True), model)
    assert_same(timm.create_model("hf-hub:somebody/model", pretrained=True), model)


def test_what_timm_pushes_loads_from_the_hub(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hub(_hub.HfApi):
        """The calls of timm, which only copy: no test reaches the hub."""

        def create_repo(self, repo_id: str, **_: Any) -> Any:
            return type("Url", (), {"repo_id": repo_id})

        def file_exists(self, *_: Any, **__: Any) -> bool:
            return False

        def upload_folder(self, *, repo_id: str, folder_path: str, **_: Any) -> Any:
            shutil.copytree(folder_path, hub_folder(hub, repo_id), dirs_exist_ok=True)

    monkeypatch.setattr(_hub, "HfApi", Hub)
    model = MODELS["resized"]()
    push_to_hf_hub(model, "somebody/pushed", model_config={"label_names": NAMES})
    got: Any = timm.create_model("hf-hub:somebody/pushed", pretrained=True)
    assert_same(got, model)
    assert got.pretrained_cfg["label_names"] == NAMES


@pytest.mark.parametrize("name", OURS)
def test_reparameterized_model_is_shared_as_what_it_was_made_of(name: str, tmp_path: Path, hub: Path) -> None:
    model, folder = shared(name), hub_folder(hub, "somebody/model")
    fixed = reparameterize_model(model)
    save_for_hf(fixed, str(folder), safe_serialization=True)
    for place in (f"local-dir:{folder}", "hf-hub:somebody/model"):
        with refused(f"{name}: the pretrained file is of a reparameterized model", "before timm.utils.reparam"):
            timm.create_model(place, pretrained=True)
    save_for_hf(model, str(tmp_path / "before"), safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'before'}", pretrained=True).eval()
    assert_same(reparameterize_model(loaded), fixed)


@pytest.mark.parametrize("name", OURS)
def test_labels_stay_from_a_run_to_whoever_loads_it(name: str, tmp_path: Path, uncounted: None) -> None:
    path, model, _ = trained(tmp_path, **{"model.name": name, "data.img_size": [64, 32]})
    export_checkpoint(path, str(tmp_path / "1"))
    for number in (1, 2):
        loaded: Any = timm.create_model(f"local-dir:{tmp_path / f'{number}'}", pretrained=True)
        assert_same(loaded, model)
        assert loaded.pretrained_cfg["label_names"] == ["zebra", "walrus", "ant"]
        save_for_hf(loaded, str(tmp_path / f"{number + 1}"), safe_serialization=True)


@pytest.mark.integrations
@pytest.mark.parametrize("name", OURS)
def test_transformers_reads_every_kind_of_model(name: str, tmp_path: Path, uncounted: None) -> None:
    path, model, _ = trained(tmp_path, **{"model.name": name, "data.img_size": [64, 32]})
    folder = tmp_path / "folder"
    export_checkpoint(path, str(folder))
    wrapped = transformers.AutoModelForImageClassification.from_pretrained(str(folder))
    assert_same(wrapped.timm_model, model)
    assert wrapped.config.id2label == {0: "zebra", 1: "walrus", 2: "ant"}


def test_labels_of_other_classes_are_dropped(tmp_path: Path) -> None:
    model = shared("sgconvnext_atto")
    save_for_hf(model, str(tmp_path / "a"), {"label_names": NAMES}, safe_serialization=True)
    tuned: Any = timm.create_model(f"local-dir:{tmp_path / 'a'}", pretrained=True, num_classes=3)
    save_for_hf(tuned, str(tmp_path / "b"), safe_serialization=True)
    assert "label_names" not in timm.create_model(f"local-dir:{tmp_path / 'b'}", pretrained=True).pretrained_cfg
