"""Model cards: what a run recorded and nothing else, the hub's front matter, and settings that make the same run."""

import dataclasses
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from torch.distributed.run import get_args_parser
from training_helpers import AUGMENTED, MICRO, change, fingerprint, micro_config, micro_run, trained

import train
from sgconvnext.export import export_checkpoint
from sgconvnext.model_card import gmacs, run_settings
from sgconvnext.profile import flops
from sgconvnext.training import checkpoint
from sgconvnext.training.config import Config, from_dict, load_config

HISTORY = [{"epoch": 4, "val_top1": 71.25, "val_top5": 90.5, "val_loss": 1.125}]
AVERAGE = {"ema_top1": 72.5, "ema_top5": 91.0, "ema_loss": 1.0}
PATHS = {"data.root": "/home/somebody/imagenet", "out": "/home/somebody/runs/1", "data.dataset": ""}


def card_of(path: str, folder: Path, ema: bool = False) -> ModelCard:
    export_checkpoint(path, str(folder), ema)
    return ModelCard.load(folder / "README.md")


@pytest.mark.parametrize("ema", [False, True])
def test_model_card_says_what_the_weights_are(ema: bool, tmp_path: Path, uncounted: None) -> None:
    path, model, _ = trained(tmp_path, **PATHS, epochs=5)
    history = [HISTORY[0] | AVERAGE]
    change(path, history=history, progress={"update": 0}, facts={"training_images": "1281167 (0123456789ab)"})
    card = card_of(path, tmp_path / "folder", ema)
    front = card.data.to_dict()
    assert {"timm", "image-classification"} <= set(front["tags"])
    assert front["library_name"] == "timm"
    for told in (
        "sgconvnext_atto",
        f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        "**Started from:** random weights",
        "imagenet, 1281167 images, 3 classes, 32x32 px",
        "top-1 72.50 %, top-5 91.00 %, loss 1.0000" if ema else "top-1 71.25 %, top-5 90.50 %, loss 1.1250",
        f"{'their average (EMA)' if ema else 'as trained'}, after 5 epochs of 5",
        "import sgconvnext, timm",
        'timm.create_model("local-dir:',
        "AutoModelForImageClassification",
        "arxiv.org/abs/2210.09298",
    ):
        assert told in card.text, told
    assert "somebody" not in card.content


def test_model_card_claims_nothing_that_was_not_measured(tmp_path: Path, uncounted: None) -> None:
    path, _, _ = trained(tmp_path)
    cases: list[dict[str, Any]] = [{}, {"history": HISTORY, "progress": {"update": 3}}]
    for number, changes in enumerate(cases):
        change(path, **changes)
        card = card_of(path, tmp_path / f"{number}")
        assert "none at this point of the run" in card.text
        assert not {"metrics", "model-index", "datasets", "base_model"} & card.data.to_dict().keys()
        assert "**GMACs:** unknown\n" in card.text
        more = " and 3 updates" if number else ""
        assert f"after 5 epochs of 2{more}\n" in card.text
        assert f"**Cost of the training:** 5 epochs{more}\n" in card.text
    change(path, progress={"update": 0})
    assert (
        "none at this point of the run" in card_of(path, tmp_path / "ema", ema=True).text
    )  # of a history without one


def test_gmacs_are_counted_at_the_size_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def count(model: Any, images: torch.Tensor) -> flops.Count:
        assert images.shape == (1, 3, 32, 64)
        return flops.Count({("1", flops.MLP): flops.Cost(macs=1.234e9), ("2", flops.MLP): flops.Cost(macs=1e9)})

    monkeypatch.setattr(flops, "count", count)
    assert gmacs(torch.nn.Identity(), micro_config(**{"data.img_size": [32, 64]})) == "2.23 for an image of 32x64 px"


def test_model_card_of_another_model_does_not_cite_sgconv(tmp_path: Path, uncounted: None) -> None:
    path, _, _ = trained(tmp_path, **{"model.name": "convnext_atto"})
    text = card_of(path, tmp_path / "folder").text
    assert "import timm\n" in text
    assert "2210.09298" not in text
    assert "import sgconvnext" not in text


@pytest.mark.parametrize(
    ("origin", "told"),
    [
        ({}, {"license": "unknown"}),
        ({"license": "mit", "base_model": "timm/a"}, {"license": "mit", "base_model": "timm/a"}),
        ({"license": "dinov3-license"}, {"license": "other", "license_name": "dinov3-license"}),
    ],
    ids=str,
)
def test_licence_and_base_model_are_those_of_the_start(
    origin: dict[str, str], told: dict[str, str], tmp_path: Path, uncounted: None
) -> None:
    path, _, _ = trained(tmp_path, **{"model.checkpoint": "/home/somebody/a.pth"})
    change(path, origin=origin)
    card = card_of(path, tmp_path / "folder")
    front = card.data.to_dict()
    assert {key: front[key] for key in ("license", "license_name", "base_model") if key in front} == told
    made_of = f", made of {origin['base_model']}" if "base_model" in origin else ""
    start = f"a.pth{made_of}, licence {origin.get('license', 'unknown')}"
    assert f"**Started from:** {start}\n" in card.text
    assert "somebody" not in card.content


def test_cost_of_the_training_is_what_the_checkpoint_records(tmp_path: Path, uncounted: None) -> None:
    path, _, _ = trained(tmp_path, **{"optim.global_batch": 100, "optim.batch_per_device": 50})
    facts = {"training_images": "3650 (0123)", "processes": 2, "device": "cuda"}
    history = [{"epoch": epoch, "images_per_s": rate} for epoch, rate in enumerate([1.0, 2.0, 2.0, 2.0, 2.0])]
    change(path, facts=facts, history=history)
    text = card_of(path, tmp_path / "folder").text  # 3600 images an epoch are seen
    assert "5 epochs x 3650 images, 3 hours of updates, 2 processes on cuda\n" in text
    change(path, facts=facts, history=history[1:])  # an epoch without a rate
    assert "5 epochs x 3650 images, 2 processes on cuda\n" in card_of(path, tmp_path / "other").text
    change(path, epoch=-1, history=[], progress={"update": 2})  # inside the first epoch
    text = card_of(path, tmp_path / "first").text
    assert "0 epochs x 3650 images and 2 updates, 2 processes on cuda\n" in text


@pytest.mark.parametrize("dataset", ["hfds/somebody/flowers", "digits"])
def test_hub_is_told_the_accuracy_and_the_data_that_it_has(dataset: str, tmp_path: Path, uncounted: None) -> None:
    path, _, _ = trained(tmp_path, **{"data.dataset": dataset})
    change(path, history=HISTORY, progress={"update": 0})
    data = card_of(path, tmp_path / "folder").data
    name = dataset.removeprefix("hfds/")
    assert data.to_dict().get("datasets") == ([name] if dataset != name else None)
    assert data.to_dict()["metrics"] == ["accuracy"]
    found = [(each.dataset_name, each.metric_name, each.metric_value) for each in data.eval_results]
    assert found == [(name, "top-1", 0.7125), (name, "top-5", 0.905)]


def write_settings(text: str, folder: Path) -> Path:
    """What the card tells to write into run.yaml."""
    [settings] = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (folder / "run.yaml").write_text(settings)
    return folder / "run.yaml"


def test_settings_in_the_card_make_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uncounted: None
) -> None:
    changes = {"model.drop_path": 0.1, "augment.mixup": 0.8, "data.img_size": [32, 64], "optim.betas": [0.9, 0.95]}
    path, _, _ = trained(tmp_path, **PATHS, **changes)
    change(path, facts={"processes": 8})
    text = card_of(path, tmp_path / "folder").text
    [command] = re.findall(r"^torchrun (.*)$", text, re.MULTILINE)
    args = get_args_parser().parse_args(shlex.split(command))
    assert args.nproc_per_node == "8"
    write_settings(text, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [args.training_script, *args.training_script_args])
    again, before = train.parse_args(), from_dict(checkpoint.load(path)["args"], path)
    before.out, before.data.root = Config().out, "imagenet"
    assert load_config(again.config, again.overrides) == before


@pytest.mark.end_to_end
def test_run_of_the_card_gives_the_same_weights(tmp_path: Path, run_here: Callable[..., None]) -> None:
    out = micro_run(run_here, tmp_path / "before", **AUGMENTED, **{"ema.decay": 0.9})
    card = card_of(str(out / "last.pth"), tmp_path / "folder")
    for told in ("2 epochs x 80 images, ", " hours of updates, 1 process on cpu", "for an image of 32x32 px"):
        assert told in card.text
    run_here(train, write_settings(card.text, tmp_path), f"out={tmp_path / 'again'}")
    assert fingerprint(tmp_path / "again" / "last.pth") == fingerprint(out / "last.pth")


def test_exported_folder_names_no_folder_of_this_machine(tmp_path: Path, uncounted: None) -> None:
    overlay = {"file": "/home/somebody/a.safetensors"}
    path, _, _ = trained(tmp_path, **PATHS, **{"model.kwargs": MICRO | {"pretrained_cfg_overlay": overlay}})
    text = card_of(path, tmp_path / "folder").text
    assert "python train.py run.yaml" in text  # the checkpoint does not say how many processes there were
    for file in (tmp_path / "folder").iterdir():
        assert b"somebody" not in file.read_bytes(), file.name


@pytest.mark.parametrize("folder", ["/home/somebody", "../somebody"])
def test_settings_hold_no_folder_of_this_machine(folder: str) -> None:
    overlay = {"file": f"{folder}/a.safetensors", "url": "https://host/b/c.pth"}
    config = micro_config(
        **PATHS,
        **{
            "model.name": f"local-dir:{folder}/a",
            "model.checkpoint": "somebody/best.pth",
            "model.kwargs": MICRO | {"pretrained_cfg_overlay": overlay},
            "data.val_split": "~/somebody/val.tar",
        },
    )
    told = run_settings(config)
    assert "somebody" not in str(told)
    assert told["model"]["name"] == "local-dir:a"
    assert told["model"]["checkpoint"] == "best.pth"
    assert told["model"]["kwargs"]["pretrained_cfg_overlay"] == overlay | {"file": "a.safetensors"}
    assert (told["data"]["root"], told["data"]["val_split"]) == ("imagenet", "val.tar")
    assert dataclasses.asdict(config)["model"]["kwargs"]["pretrained_cfg_overlay"] == overlay  # is left as it was
