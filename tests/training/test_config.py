"""Configuration: every shipped file, every knob, ConvNeXt's recipe item by item, and every way to get one wrong."""

import os
import pwd
import re
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import timm
import torch
import yaml
from helpers import refused
from training_helpers import CONFIGS, flatten, unflatten

import sgconvnext  # noqa: F401  registers the models with timm
from sgconvnext.training import optim, rng
from sgconvnext.training.config import KNOBS, Config, describe, from_dict, load_config, to_dict
from sgconvnext.training.yaml_files import read_overrides

SHIPPED = sorted(CONFIGS.glob("*.yaml"))
DEFAULTS = flatten(to_dict(Config()))

# Liu et al. 2022; facebookresearch/ConvNeXt at 048efce: TRAINING.md:16-118, main.py:53-140, datasets.py:52-96
RECIPE = {
    "epochs": 300,
    "seed": 0,
    "model.drop_path": 0.1,
    "data.img_size": 224,
    "data.crop_pct": 0.875,
    "data.crop_mode": "center",
    "data.interpolation": "bicubic",
    "data.mean": [0.485, 0.456, 0.406],
    "data.std": [0.229, 0.224, 0.225],
    "augment.scale": [0.08, 1.0],
    "augment.ratio": [3 / 4, 4 / 3],
    "augment.hflip": 0.5,
    "augment.auto_augment": "rand-m9-mstd0.5-inc1",
    "augment.color_jitter": 0.4,
    "augment.reprob": 0.25,
    "augment.remode": "pixel",
    "augment.recount": 1,
    "augment.mixup": 0.8,
    "augment.cutmix": 1.0,
    "augment.mixup_prob": 1.0,
    "augment.mixup_switch_prob": 0.5,
    "augment.mixup_mode": "batch",
    "augment.smoothing": 0.1,
    "optim.global_batch": 4096,
    "optim.batch_per_device": 128,
    "optim.lr": 4e-3,
    "optim.min_lr": 1e-6,
    "optim.warmup_epochs": 20,
    "optim.weight_decay": 0.05,
    "optim.betas": [0.9, 0.999],
    "optim.eps": 1e-8,
    "optim.layer_decay": 1.0,
    "optim.clip_grad": None,
    "ema.decay": 0.9999,
    "run.precision": "fp32",
    "run.tf32": False,
    "run.cudnn_benchmark": True,
    "run.tune": False,
}
FINETUNE_384 = RECIPE | {  # TRAINING.md:293-354
    "epochs": 30,
    "data.img_size": 384,
    "data.crop_pct": 1.0,
    "data.crop_mode": "squash",
    "augment.mixup": 0.0,
    "augment.cutmix": 0.0,
    "optim.global_batch": 512,
    "optim.batch_per_device": 32,
    "optim.lr": 5e-5,
    "optim.warmup_epochs": 0,
    "optim.weight_decay": 1e-8,
    "optim.layer_decay": 0.7,
    "ema.decay": 0.0,
}
SMALLEST = dict.fromkeys(["atto", "femto", "pico", "nano"], (0.0, 128))
SIZES = SMALLEST | {"tiny": (0.1, 128), "small": (0.4, 128), "base": (0.5, 128), "large": (0.5, 64)}
SIZES_384 = {"base": (0.8, False), "large": (0.95, True)}


def write(folder: Path, **files: str) -> Path:
    """Write ``name="text"`` to folder/name.yaml; returns the path of the first."""
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / f"{next(iter(files))}.yaml"


def flat(path: Path, *overrides: str) -> dict[str, Any]:
    return flatten(to_dict(load_config(path, overrides)))


# ---- the shipped files


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_config_loads_and_survives_the_round_trip(path: Path) -> None:
    config = load_config(path)
    assert from_dict(to_dict(config), "again") == config
    assert from_dict(yaml.safe_load(yaml.safe_dump(to_dict(config))), "again") == config


@pytest.mark.parametrize("item", RECIPE, ids=str)
def test_recipe_file_states_every_item_with_convnexts_value(item: str) -> None:
    path, want = CONFIGS / "imagenet.yaml", RECIPE[item]
    stated = flatten(yaml.safe_load(path.read_text()))
    assert item in stated
    assert (float(stated[item]) if isinstance(want, float) else stated[item]) == want  # PyYAML takes 4e-3 for text
    assert flat(path)[item] == want


@pytest.mark.parametrize("size", SIZES)
def test_size_differs_from_the_recipe_in_what_it_states(size: str) -> None:
    path, (drop_path, batch) = CONFIGS / f"sgconvnext_{size}.yaml", SIZES[size]
    stated = {"base", "out", "model.name", "model.drop_path"} | (
        {"optim.batch_per_device"} if size == "large" else set()
    )
    assert set(flatten(yaml.safe_load(path.read_text()))) == stated
    assert flat(path) == flat(CONFIGS / "imagenet.yaml") | {
        "out": f"runs/sgconvnext_{size}",
        "model.name": f"sgconvnext_{size}",
        "model.drop_path": drop_path,
        "optim.batch_per_device": batch,
    }


@pytest.mark.parametrize("item", FINETUNE_384, ids=str)
def test_fine_tuning_at_384_px_has_convnexts_values(item: str) -> None:
    assert flat(CONFIGS / "finetune_384.yaml")[item] == FINETUNE_384[item]


@pytest.mark.parametrize("size", SIZES_384)
def test_size_at_384_px_starts_from_its_weights_at_224_px(size: str) -> None:
    drop_path, ema = SIZES_384[size]
    assert flat(CONFIGS / f"sgconvnext_{size}_384.yaml") == flat(CONFIGS / "finetune_384.yaml") | {
        "out": f"runs/sgconvnext_{size}_384",
        "model.name": f"sgconvnext_{size}",
        "model.drop_path": drop_path,
        "model.img_size": 224,  # what the kernels of the checkpoint are built for
        "model.checkpoint": f"runs/sgconvnext_{size}/best.pth",
        "model.checkpoint_ema": ema,
    }


def test_start_from_convnext_has_the_values_of_its_fine_tuning_at_224_px() -> None:
    path = CONFIGS / "sgconvnext_tiny_from_convnext.yaml"
    at_384 = {key: FINETUNE_384[key] for key in FINETUNE_384 if not key.startswith("data.")}
    want = flat(CONFIGS / "imagenet.yaml") | at_384
    differs = {key: value for key, value in flat(path).items() if value != want[key]}
    assert differs == {
        "out": "runs/sgconvnext_tiny_from_convnext",
        "model.name": "sgconvnext_tiny_gap3.fb_in1k",
        "model.pretrained": True,
        "optim.batch_per_device": 64,
        "optim.lr_scale": "*.sgconv.weight=4",
        "optim.no_weight_decay": "*.sgconv.weight",
    }


def test_every_value_of_the_start_from_convnext_has_its_reason() -> None:
    lines = (CONFIGS / "sgconvnext_tiny_from_convnext.yaml").read_text().splitlines()
    values = [line for line in lines if re.match(r" *\w+: *[^ #]", line) and not line.startswith("out:")]
    bare = [line for line in values if "#" not in line]
    assert len(values) > 12
    assert [line.strip() for line in bare] == ["mixup: 0.0", "cutmix: 0.0", "lr_scale: '*.sgconv.weight=4'"]  # above


def test_start_from_convnext_names_a_model_and_parameters_that_exist() -> None:
    config = load_config(CONFIGS / "sgconvnext_tiny_from_convnext.yaml")
    with torch.device("meta"):
        model = timm.create_model(config.model.name)
    groups = optim.configured_groups(model, config.optim)
    kernels = {id(module.weight): name for name, module in model.named_modules() if name.endswith(".sgconv")}
    found = [(group, kernels[id(p)]) for group in groups for p in group["params"] if id(p) in kernels]
    assert len(found) == 18
    assert {group["weight_decay"] for group, _ in found} == {0.0}
    for group, name in found:
        layer = {"0": 1, "1": 2, "3": 6}.get(name.split(".")[1], 3 + int(name.split(".")[3]) // 3)
        assert group["lr_scale"] == pytest.approx(4 * 0.7 ** (7 - layer), rel=1e-12)


# ---- knobs


def another(name: str) -> Any:
    """A valid value of a knob that is not its default."""
    default = DEFAULTS[name]
    special = {
        "model.drop": 0.25,
        "model.drop_path": 0.25,
        "model.kwargs": {"depths": [1, 1, 1, 1]},
        "data.kwargs": {"length": 1},
        "data.crop_mode": "border",
        "data.interpolation": "nearest",
        "augment.remode": "rand",
        "augment.mixup_mode": "elem",
        "optim.lr_scale": "*.sgconv.weight=10, head.*=0.5",
        "run.device": "cpu",
        "run.precision": "bf16",
    }
    if name in special:
        return special[name]
    if default is None:
        return 64
    if isinstance(default, bool):
        return not default
    if isinstance(default, str):
        return f"other-{default}"
    if isinstance(default, list):
        return [item / 2 for item in default]
    if isinstance(default, int):
        return default + 2
    return default / 2 or 0.25


@pytest.mark.parametrize("name", sorted(DEFAULTS.keys() - {"model.new_head", "model.checkpoint_ema"}))
def test_knob_set_in_a_file_or_on_the_command_line_changes_nothing_else(name: str, tmp_path: Path) -> None:
    value = another(name)
    want = DEFAULTS | {name: value}
    assert want != DEFAULTS
    in_file = write(tmp_path, a=yaml.safe_dump(unflatten({name: value})))
    assert flat(in_file) == want
    typed = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True)
    assert flat(write(tmp_path, b=""), f"{name}={typed}") == want
    assert from_dict(to_dict(load_config(in_file)), "again") == load_config(in_file)


@pytest.mark.parametrize("name", DEFAULTS)
def test_help_text_gives_the_knob_its_default_and_its_reason(name: str) -> None:
    [line] = [line for line in describe().splitlines() if line.startswith(f"  {name} ")]
    _, shown, reason = re.split(r"\s{2,}", line.strip(), maxsplit=2)
    default, told = DEFAULTS[name], yaml.safe_load(shown)
    assert told == (pytest.approx(default, rel=1e-3) if isinstance(default, list) else default)
    assert type(told) is type(default)
    assert len(reason) >= 5


@pytest.mark.parametrize("name", DEFAULTS)
def test_knob_that_is_a_number_states_its_limits(name: str) -> None:
    schema, *keys = Config, *name.split(".")
    for key in keys:
        schema = get_type_hints(schema)[key]
    if re.search(r"\b(int|float)\b", str(schema)):
        assert KNOBS[name].limits is not None, "give knob() its limits; ANY, if any number will do"


def test_to_dict_holds_plain_values_that_a_checkpoint_may_carry() -> None:
    def check(value: Any) -> None:
        assert type(value) in (dict, list, str, int, float, bool, type(None))
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            check(item)

    check(to_dict(load_config(CONFIGS / "finetune_384.yaml")))


def test_configurations_do_not_share_model_kwargs() -> None:
    first, second = Config(), Config()
    first.model.kwargs["depths"] = [1]
    assert second.model.kwargs == {}
    tree = to_dict(first)
    tree["model"]["kwargs"]["depths"].append(2)
    assert first.model.kwargs == {"depths": [1]}


@pytest.mark.parametrize("text", ["4e-3", "0.004", ".004", "4.0e-3", "4E-3"])
def test_number_is_a_number_however_it_is_written(text: str, tmp_path: Path) -> None:
    for config in (
        load_config(write(tmp_path, a=f"optim: {{lr: {text}}}")),
        load_config(write(tmp_path, b=""), [f"optim.lr={text}"]),
    ):
        assert config.optim.lr == 0.004
        assert type(config.optim.lr) is float


def test_whole_number_is_taken_for_a_fraction_and_stays_exact(tmp_path: Path) -> None:
    lr = load_config(write(tmp_path, a=""), ["optim.lr=1"]).optim.lr
    assert lr == 1.0
    assert type(lr) is float


def test_image_size_may_be_a_height_and_a_width(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, a="data: {img_size: [64, 96]}")).data.img_size == (64, 96)


def test_nested_override_of_model_kwargs_keeps_the_other_arguments(tmp_path: Path) -> None:
    path = write(tmp_path, a="model: {kwargs: {depths: [3, 3, 9, 3], ls_init_value: 1.0}}")
    config = load_config(path, ["model.kwargs.depths=[1, 1, 1, 1]", "model.kwargs.dims=[8,16,24,32]"])
    assert config.model.kwargs == {"depths": [1, 1, 1, 1], "ls_init_value": 1.0, "dims": [8, 16, 24, 32]}


def test_value_may_contain_an_equals_sign() -> None:
    assert read_overrides(["out=runs/lr=3"], Config).tree == {"out": "runs/lr=3"}


def test_text_may_be_empty(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, a="data: {root: }\nmodel: {checkpoint: null}"), ["resume="])
    assert (config.data.root, config.model.checkpoint, config.resume) == ("", "", "")


def test_later_override_wins() -> None:
    layer = read_overrides(["optim.lr=1", "optim.eps=2", "optim.lr=3"], Config)
    assert layer.tree == {"optim": {"lr": 3.0, "eps": 2.0}}


# ---- files and their base


def test_command_line_wins_over_the_file_and_the_file_over_its_bases(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path, grandparent="epochs: 7\nseed: 7\noptim: {lr: 0.7, eps: 0.7, betas: [0.7, 0.7]}")
    write(tmp_path, parent="base: grandparent.yaml\nseed: 8\noptim: {eps: 0.8}")
    path = write(tmp_path / "sub", child="base: ../parent.yaml\noptim: {betas: [0.9, 0.9]}")
    assert flat(path, "data.workers=3") == DEFAULTS | {
        "epochs": 7,
        "seed": 8,
        "optim.lr": 0.7,
        "optim.eps": 0.8,
        "optim.betas": [0.9, 0.9],
        "data.workers": 3,
    }
    assert flat(path, "optim.betas=[0.5, 0.5]", "seed=1", "epochs=2") == flat(path) | {
        "optim.betas": [0.5, 0.5],
        "seed": 1,
        "epochs": 2,
    }


def test_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, a="# nothing\n")) == Config()


def test_base_files_that_form_a_circle_are_refused(tmp_path: Path) -> None:
    for files in ({"a": "base: a.yaml"}, {"a": "base: b.yaml", "b": "base: c.yaml", "c": "base: a.yaml"}):
        with refused("a.yaml", "circle"):
            load_config(write(tmp_path, **files))


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with refused("nowhere.yaml", "No such file", "existing YAML file"):
        load_config(tmp_path / "nowhere.yaml")
    with refused("nowhere.yaml", "No such file"):
        load_config(write(tmp_path, a="base: nowhere.yaml"))
    with refused(str(tmp_path), "existing YAML file"):
        load_config(tmp_path)


@pytest.mark.parametrize("text", ["optim: {lr: 1", "a: b: c", "optim:\n\t lr: 1", "? [", "&a *b"])
def test_file_that_is_no_yaml_is_refused(text: str, tmp_path: Path) -> None:
    with refused("a.yaml", "not valid YAML"):
        load_config(write(tmp_path, a=text))


def test_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"out: \xff\xfe")
    with refused("a.yaml", "not valid YAML"):
        load_config(tmp_path / "a.yaml")


@pytest.mark.parametrize("text", ["- epochs", "epochs", "3"])
def test_file_without_keys_is_refused(text: str, tmp_path: Path) -> None:
    with refused("a.yaml", "sections of keys and values"):
        load_config(write(tmp_path, a=text))


def test_error_names_the_file_it_is_in(tmp_path: Path) -> None:
    write(tmp_path, parent="optim: {weigth_decay: 1}")
    with refused("parent.yaml: unknown key 'optim.weigth_decay'"):
        load_config(write(tmp_path, child="base: parent.yaml\nepochs: 3"))


# ---- refusals, in a file and on the command line alike

MISSPELT = {
    "epoch": "did you mean 'epochs'?",
    "optim.weigth_decay": "did you mean 'optim.weight_decay'?",
    "optimizer": "did you mean 'optim'?",
    "lr": "did you mean 'optim.lr'?",
    "optim.mixup": "did you mean 'augment.mixup'?",
    "ema.decay_rate": "did you mean 'ema.decay'?",
    "model.xyzzy": "known here: name, num_classes",
    "model.droppath": "did you mean 'model.drop_path'?",
}


@pytest.mark.parametrize("key", MISSPELT)
def test_misspelt_key_is_refused_with_a_suggestion(key: str, tmp_path: Path) -> None:
    with refused("a.yaml", f"unknown key '{key}'", MISSPELT[key]):
        load_config(write(tmp_path, a=yaml.safe_dump(unflatten({key: 1}))))
    with refused("command line", f"unknown key '{key}'", MISSPELT[key]):
        load_config(write(tmp_path, b=""), [f"{key}=1"])
    with refused("some place", f"unknown key '{key}'", MISSPELT[key]):
        from_dict(unflatten({key: 1}), "some place")


WRONG_TYPES = [
    ("epochs", "many", "'many' must be a whole number"),
    ("epochs", 1.5, "1.5 must be a whole number"),
    ("epochs", True, "True must be a whole number"),
    ("epochs", None, "None must be a whole number"),
    ("epochs", [3], "[3] must be a whole number"),
    ("out", 3, "3 must be text"),
    ("model.name", [], "[] must be text"),
    ("model.kwargs", [1], "[1] must be"),
    ("optim.lr", "fast", "'fast' must be a finite number"),
    ("optim.lr", True, "True must be a finite number"),
    ("optim.lr", float("nan"), "nan must be a finite number"),
    ("optim.lr", "nan", "'nan' must be a finite number"),
    ("optim.lr", float("inf"), "inf must be a finite number"),
    ("optim.lr", "-inf", "'-inf' must be a finite number"),
    ("optim.betas", [0.9], "[0.9] must be a list of 2"),
    ("optim.betas", [0.9, float("inf")], "must be a list of 2"),
    ("optim.betas", 0.9, "0.9 must be a list of 2"),
    ("optim.clip_grad", "none", "'none' must be a finite number or null"),
    ("data.mean", [1, 2], "[1, 2] must be a list of 3"),
    ("data.img_size", 224.0, "224.0 must be a whole number or a list of 2"),
    ("data.img_size", [224, "x"], "must be a whole number or a list of 2"),
    ("run.tf32", 1, "1 must be true or false"),
    ("run.tf32", "maybe", "'maybe' must be true or false"),
    ("run.precision", "fp8", "'fp8' must be one of fp32, bf16, fp16"),
    ("run.precision", "bfloat16", "did you mean 'bf16'?"),
    ("run.device", "gpu", "'gpu' must be one of auto, cuda, cpu"),
    ("data.crop_mode", "squish", "did you mean 'squash'?"),
    ("optim", 3, "3 must be a section of keys and values"),
    ("optim", None, "None must be a section of keys and values"),
]


@pytest.mark.parametrize(("key", "value", "cure"), WRONG_TYPES, ids=lambda item: str(item)[:24])
def test_wrong_type_is_refused_with_the_right_one(key: str, value: Any, cure: str, tmp_path: Path) -> None:
    with refused(f"a.yaml: {key}=", cure):
        load_config(write(tmp_path, a=yaml.safe_dump(unflatten({key: value}))))
    if "must be text" not in cure:  # whatever is typed for a text knob is text
        with refused(f"command line: {key}=", cure):
            load_config(write(tmp_path, b=""), [f"{key}={yaml.safe_dump(value, default_flow_style=True)}"])


@pytest.mark.parametrize("text", ["2024", "a #1", "{", "null", "a: b", "'", "@x", "x=y", " "])
def test_text_is_taken_from_the_command_line_as_typed(text: str, tmp_path: Path) -> None:
    assert load_config(write(tmp_path, a=""), [f"data.root={text}"]).data.root == text


@pytest.mark.parametrize("knob", ["model.new_head", "model.checkpoint_ema"])
def test_knob_of_a_starting_checkpoint_is_refused_without_one(knob: str, tmp_path: Path) -> None:
    with refused(f"{knob}=True", "model.checkpoint"):
        load_config(write(tmp_path, a=""), [f"{knob}=true"])
    load_config(write(tmp_path, a=""), [f"{knob}=true", "model.checkpoint=a.pth"])


@pytest.mark.parametrize("body", ["epochs: 1\nepochs: 2", "optim: {lr: 1}\noptim: {eps: 1}", "optim: {lr: 1, lr: 2}"])
def test_key_given_twice_is_refused(body: str, tmp_path: Path) -> None:
    with refused("a.yaml", "given twice"):
        load_config(write(tmp_path, a=body))


@pytest.mark.parametrize(
    "text", ["optim.lr", "--optim.lr=3", "-optim.lr=3", "--optim.lr", "=3", "", "optim.lr:3", "runs/other"]
)
def test_argument_that_is_no_override_is_refused(text: str) -> None:
    with refused("command line", repr(text), "section.key=value"):
        read_overrides([text], Config)


@pytest.mark.parametrize("text", ["epochs={", "epochs=[1", "epochs=a: b: c", "epochs='", "epochs=@x"])
def test_override_whose_value_is_no_yaml_is_refused(text: str) -> None:
    with refused("command line", text, "quotes"):
        read_overrides([text], Config)


@pytest.mark.parametrize("text", ["2026-11-22", "2024-13-01", "2026-11-22 12:30:00"])
def test_date_is_text_such_as_the_name_of_a_folder(text: str, tmp_path: Path) -> None:
    # PyYAML would make a date or a number of it, and fail without a place where there is no such day
    assert load_config(write(tmp_path, a=f"out: {text}")).out == text
    assert load_config(write(tmp_path, b=""), [f"out={text}"]).out == text


RANGES = [
    ("epochs", 0, 1),
    ("seed", -1, 0),
    ("model.num_classes", 0, 1),
    ("model.drop_path", 1.0, 0.99),
    ("model.drop_path", -0.1, 0.0),
    ("model.drop_path", 1.0, None),
    ("model.drop", 1.0, 0.5),
    ("data.img_size", 31, 32),
    ("data.img_size", [64, 31], [64, 32]),
    ("data.crop_pct", 0.0, 0.1),
    ("data.crop_pct", 1.1, 1.0),
    ("data.train_samples", -3, 1),
    ("data.val_samples", 0, 1),
    ("data.workers", -1, 0),
    ("data.std", [1.0, 0.0, 1.0], [1.0, 1.0, 1.0]),
    ("augment.scale", [0.0, 1.0], [0.1, 1.0]),
    ("augment.scale", [0.5, 0.4], [0.4, 0.5]),
    ("augment.scale", [0.5, 1.1], [1.0, 1.0]),
    ("augment.ratio", [0.0, 1.0], [0.1, 1.0]),
    ("augment.ratio", [2.0, 1.0], [1.0, 2.0]),
    ("augment.recount", 0, 1),
    ("augment.mixup", -0.1, 0.1),
    ("augment.cutmix", -0.1, 0.1),
    ("augment.hflip", 1.1, 1.0),
    ("augment.hflip", -0.1, 0.0),
    ("augment.reprob", 1.1, 1.0),
    ("augment.mixup_prob", 1.1, 1.0),
    ("augment.mixup_switch_prob", 1.1, 1.0),
    ("augment.smoothing", 1.0, 0.9),
    ("optim.global_batch", 0, 1),
    ("optim.batch_per_device", 0, 1),
    ("optim.lr", 0.0, 1.0),
    ("optim.min_lr", -1e-9, 0.0),
    ("optim.min_lr", 2e-3, 1e-3),  # the default lr is 1e-3
    ("optim.warmup_epochs", -1, 0),
    ("optim.warmup_epochs", 300, 299),
    ("optim.weight_decay", -0.1, 0.0),
    ("optim.betas", [1.0, 0.9], [0.0, 0.99]),
    ("optim.betas", [0.9, -0.1], [0.9, 0.0]),
    ("optim.eps", -1.0, 0.0),
    ("optim.layer_decay", 0.0, 0.1),
    ("optim.layer_decay", 1.1, 1.0),
    ("optim.clip_grad", 0.0, 0.1),
    ("ema.decay", 1.0, 0.99),
    ("ema.decay", -0.1, 0.0),
    ("run.log_every", 0, 1),
]


@pytest.mark.parametrize(("key", "bad", "good"), RANGES, ids=lambda item: str(item)[:24])
def test_value_out_of_range_is_refused_and_its_edge_accepted(key: str, bad: Any, good: Any) -> None:
    shown = tuple(bad) if isinstance(bad, list) else bad
    with refused(f"{key}={shown} must be "):
        from_dict(unflatten({key: bad}), "test")
    assert flatten(to_dict(from_dict(unflatten({key: good}), "test")))[key] == good


@pytest.mark.parametrize("mix", ["augment.mixup", "augment.cutmix"])
def test_odd_batch_cannot_be_mixed_with_its_own_reverse(mix: str) -> None:
    odd = {"optim.batch_per_device": 3, "optim.global_batch": 3}
    with refused("optim.batch_per_device=3", "even", "mixup"):
        from_dict(unflatten(odd | {mix: 0.8}), "test")
    from_dict(unflatten(odd), "test")
    from_dict(unflatten(odd | {mix: 0.8, "optim.batch_per_device": 2}), "test")
    with refused("optim.batch_per_device=3", "even", "mixup"):  # timm asks for it in every mode
        from_dict(unflatten(odd | {mix: 0.8, "augment.mixup_mode": "elem"}), "test")


# ---- the place of a value out of range


@pytest.mark.parametrize(("key", "bad"), [(key, bad) for key, bad, _ in RANGES if key != "optim.min_lr"], ids=str)
def test_value_out_of_range_is_told_with_the_file_that_states_it(key: str, bad: Any, tmp_path: Path) -> None:
    text = yaml.safe_dump(unflatten({key: bad}))
    write(tmp_path, parent=text)
    with refused(f"{tmp_path / 'parent.yaml'}: {key}="):
        load_config(write(tmp_path, child="base: parent.yaml"))
    with refused(f"{tmp_path / 'top.yaml'}: {key}="):
        load_config(write(tmp_path, top=text), ["run.tf32=true"])
    with refused(f"command line: {key}="):
        load_config(write(tmp_path, b=""), [f"{key}={yaml.safe_dump(bad, default_flow_style=True)}"])
    with refused(f"runs/a.pth: {key}="):
        from_dict(unflatten({key: bad}), "runs/a.pth")
    with refused(f"command line: {key}="):
        from_dict({}, "runs/a.pth", [f"{key}={yaml.safe_dump(bad, default_flow_style=True)}"])


def test_knobs_that_exclude_each_other_are_both_told_with_their_places(tmp_path: Path) -> None:
    write(tmp_path, recipe="epochs: 300\noptim: {warmup_epochs: 20, min_lr: 1e-6}")
    path, recipe = write(tmp_path, a="base: recipe.yaml"), tmp_path / "recipe.yaml"
    with refused(f"{recipe}: optim.warmup_epochs=20 must be at least 0 and below epochs=10 (command line)"):
        load_config(path, ["epochs=10"])
    with refused(f"{recipe}: optim.min_lr=1e-06 must be between 0 and optim.lr=1e-07 (command line)"):
        load_config(path, ["optim.lr=1e-7"])
    with refused("command line: model.new_head=True must be false with model.checkpoint='' (by default)"):
        load_config(path, ["model.new_head=true"])
    with refused("command line: model.pretrained=True must be false with model.checkpoint='a.pth'"):
        load_config(path, ["model.pretrained=true", "model.checkpoint=a.pth"])
    with refused("command line: optim.batch_per_device=3 must be even", "augment.cutmix=0.5"):
        load_config(path, ["optim.batch_per_device=3", "augment.cutmix=0.5"])


@pytest.mark.parametrize(
    ("key", "bad", "good"),
    [
        ("seed", 20261126172558, 2**32 - 1),  # NumPy takes no larger one
        ("epochs", 10**30, 10**6),
        ("data.workers", 10**6, 1024),
        ("data.train_samples", 2**31, 2**31 - 1),
        ("data.img_size", [64, 10**30], [64, 2**31 - 1]),
        ("model.img_size", -5, 1),
        ("save.keep", 10**30, 1),
        ("augment.recount", 10**9, 1000),
        ("augment.color_jitter", -0.1, 0.0),  # it was called no policy of timm's
        ("data.crop_pct", 1e-9, 0.1),
        ("data.std", [1e-46, 1.0, 1.0], [0.1, 1.0, 1.0]),  # zero in float32
        ("data.mean", [1e300, 0.0, 0.0], [-1.0, 0.0, 0.0]),
        ("optim.lr", 1e300, 1.0),
        ("optim.weight_decay", 1e39, 1e38),
        ("model.drop_path", 1e-300, 0.0),
    ],
    ids=lambda item: str(item)[:24],
)
def test_number_that_would_overflow_further_down_is_refused(key: str, bad: Any, good: Any, tmp_path: Path) -> None:
    shown = tuple(bad) if isinstance(bad, list) else bad
    with refused(f"a.yaml: {key}={shown} must be "):
        load_config(write(tmp_path, a=yaml.safe_dump(unflatten({key: bad}))))
    assert flat(write(tmp_path, b=yaml.safe_dump(unflatten({key: good}))))[key] == good


def test_seed_of_the_last_rank_may_be_one_more_than_the_largest() -> None:
    rng.seed(2**32 - 1, rank=1)
    assert np.random.get_state()[1][0] == 0  # type: ignore[index]


# ---- YAML


MERGED = """
x-small: &small {lr: 0.5, eps: 0.25, weight_decay: 0.125}
x-other: &other {lr: 0.75, min_lr: 0.0625}
x-both: &both {<<: *small, lr: 0.875}
"""


def test_merged_keys_lie_beneath_the_mappings_own(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, a=MERGED + "optim: {eps: 1.0, <<: *small}"))
    assert (config.optim.lr, config.optim.eps, config.optim.weight_decay) == (0.5, 1.0, 0.125)
    config = load_config(write(tmp_path, b=MERGED + "optim: {<<: *both, weight_decay: 1.0}"))
    assert (config.optim.lr, config.optim.eps, config.optim.weight_decay) == (0.875, 0.25, 1.0)


@pytest.mark.parametrize(("names", "lr"), [("*small, *other", 0.5), ("*other, *small", 0.75)])
def test_first_of_several_merged_mappings_wins(names: str, lr: float, tmp_path: Path) -> None:
    """PyYAML 6.0.4 itself lets the last one win, but for keys of one letter."""
    config = load_config(write(tmp_path, a=MERGED + f"optim: {{<<: [{names}]}}"))
    assert (config.optim.lr, config.optim.eps, config.optim.min_lr) == (lr, 0.25, 0.0625)
    config = load_config(write(tmp_path, b="model: {kwargs: {<<: [&a {x: 1}, &b {x: 2}], y: {<<: *b}}}"))
    assert config.model.kwargs == {"x": 1, "y": {"x": 2}}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("optim: {<<: &a {lr: 1}, eps: 1, eps: 2}", "'eps' is given twice"),
        ("optim: {<<: &a {lr: 1, lr: 2}}", "'lr' is given twice"),
        ("x-a: &a {lr: 1}\noptim: {<<: *a, <<: *a}", "'<<' is given twice"),
        ("optim: {<<: 3}", "<< merges keys and values, not '3'"),
        ("optim: {<<: [3]}", "<< merges keys and values, not '3'"),
        ("model: {kwargs: &a {x: *a}}", "*a is inside of &a"),
        ("model: {kwargs: &a {<<: *a}}", "*a is inside of &a"),
        ("? [a]\n: 3", "cannot be a key"),
        ("epochs: !!int x", "invalid literal"),
        ("out: " + "[" * 5000, "recursion"),
    ],
)
def test_yaml_that_means_nothing_is_refused_with_its_file(text: str, told: str, tmp_path: Path) -> None:
    with refused("a.yaml: not valid YAML", told):
        load_config(write(tmp_path, a=text))


@pytest.mark.parametrize(("text", "told"), [("010", "'010'"), ("1:30", "'1:30'"), ("0b11", "'0b11'")])
def test_number_that_yaml_reads_as_another_is_refused(text: str, told: str, tmp_path: Path) -> None:
    """As 8, 90 and 3."""
    with refused("a.yaml: epochs=" + told, "whole number"):
        load_config(write(tmp_path, a=f"epochs: {text}"))
    with refused("command line: epochs=" + told, "whole number"):
        load_config(write(tmp_path, b=""), [f"epochs={text}"])


def test_number_without_a_dot_is_one_in_the_models_arguments_too(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, a=""), ["model.kwargs.ls_init_value=1e-6"])
    assert config.model.kwargs == {"ls_init_value": 1e-6}


def test_file_that_asks_for_a_missing_base_is_told(tmp_path: Path) -> None:
    asking = write(tmp_path, a="base: nowhere.yaml")
    with refused(f"{tmp_path / 'nowhere.yaml'}, the base of {asking}: cannot be read (No such file"):
        load_config(asking)
    write(tmp_path, broken="[")
    with refused(f"{tmp_path / 'broken.yaml'}, the base of {tmp_path / 'b.yaml'}: not valid YAML"):
        load_config(write(tmp_path, b="base: broken.yaml"))
    with refused(f"{tmp_path / 'c.yaml'}: base=['a', 'b'] must be one YAML file"):
        load_config(write(tmp_path, c="base: [a, b]"))


# ---- the home folder

PATHS = ["out", "resume", "model.checkpoint", "data.root", "data.train_split", "data.val_split"]


@pytest.mark.parametrize("key", PATHS)
def test_home_folder_is_found_in_paths(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    root = pwd.getpwuid(os.getuid())
    for given, want in [
        ("~/a b", "/home/me/a b"),
        ("~", "/home/me"),
        (f"~{root.pw_name}/x", f"{root.pw_dir}/x"),
        ("./~/x", "./~/x"),
        ("a~", "a~"),
    ]:
        written = yaml.safe_dump(unflatten({key: given}))
        in_file = load_config(write(tmp_path, a=written))
        assert flatten(to_dict(in_file))[key] == want
        assert flat(write(tmp_path, b=""), f"{key}={given}")[key] == want
        assert flatten(to_dict(from_dict({}, "a.pth", [f"{key}={given}"])))[key] == want
        assert from_dict(to_dict(in_file), "again") == in_file  # what is recorded is what is compared
    with refused(f"a.yaml: {key}='~nobody-here/x': there is no user 'nobody-here'", "'./~nobody-here/x'"):
        load_config(write(tmp_path, a=yaml.safe_dump(unflatten({key: "~nobody-here/x"}))))


def test_home_folder_is_found_in_the_base_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, recipe="epochs: 7")
    (tmp_path / "sub").mkdir()
    assert load_config(write(tmp_path / "sub", a="base: ~/recipe.yaml")).epochs == 7


def test_paths_of_the_knobs_are_all_known() -> None:
    """Whoever adds a path says that it is one."""
    paths = [key for key in DEFAULTS if key.rpartition(".")[2] in ("out", "resume", "checkpoint", "root")]
    assert {*paths, "data.train_split", "data.val_split"} == set(PATHS)
