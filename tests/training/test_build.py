"""From a configuration to the network and the loss."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from helpers import hub_folder, in_the_authors_names, mixers, refused, relative_error
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn
from training_helpers import MICRO, micro_config, noise, trained

from sgconvnext import SGConvNeXt, export
from sgconvnext.training import build, checkpoint


def create(classes: int = 10, **changes: Any) -> Any:
    return build.create_model(micro_config(**changes), classes)


def test_model_is_the_one_that_was_named_with_its_arguments() -> None:
    model = create(7, **{"model.drop": 0.25, "model.drop_path": 0.3})
    assert type(model) is SGConvNeXt
    assert model.stem[0].out_channels == 8
    assert model.head.fc.out_features == 7
    assert model.head.drop.p == 0.25
    rates = [getattr(stage.blocks[0].drop_path, "drop_prob", 0.0) for stage in model.stages]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3], rel=1e-6)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("sgconvnext_tinny", "sgconvnext_tiny"), ("convnext_atoo", "convnext_atto"), ("SGConvNeXt", "")],
)
def test_unknown_model_is_refused_with_a_suggestion(name: str, meant: str) -> None:
    with refused(f"model.name={name!r}", "no timm model", f"did you mean {meant!r}?" if meant else "model"):
        create(**{"model.name": name})


@pytest.mark.parametrize("argument", ["colour", "depth", "pretrained_"])
@pytest.mark.parametrize("name", ["sgconvnext_atto", "convnext_atto"])
def test_unknown_argument_is_refused(name: str, argument: str) -> None:
    with refused(f"model.name={name!r}", argument):
        create(**{"model.name": name, "model.kwargs": {argument: 3}})


@pytest.mark.parametrize(("knob", "rate"), [(None, 0.1), (0.0, 0.0), (0.2, 0.2)], ids=str)
def test_drop_path_is_the_models_own_unless_set(knob: float | None, rate: float) -> None:
    model = create(**{"model.name": "swin_tiny_patch4_window7_224", "model.kwargs": {}, "model.drop_path": knob})
    assert getattr(model.layers[-1].blocks[-1].drop_path2, "drop_prob", 0.0) == pytest.approx(rate)


@pytest.mark.parametrize(
    "kwargs",
    [{"depths": [1, 1]}, {"decay": "none"}, {"num_scales": 0}, {"backend": "fast"}],
    ids=str,
)
def test_argument_of_a_wrong_value_is_refused(kwargs: dict[str, Any]) -> None:
    with refused("model.name='sgconvnext_atto' cannot be built"):
        create(**{"model.kwargs": kwargs})


@pytest.mark.parametrize("key", ["num_classes", "drop_rate", "drop_path_rate", "img_size", "pretrained"])
def test_argument_with_a_knob_of_its_own_is_refused(key: str) -> None:
    with refused(f"model.kwargs sets {key}", "knob"):
        create(**{"model.kwargs": MICRO | {key: 1}})


def test_argument_that_timm_would_drop_is_refused() -> None:
    with refused("model.kwargs has ls_init_value=null", "leave it out"):
        create(**{"model.kwargs": MICRO | {"ls_init_value": None}})


def test_pretrained_weights_that_do_not_exist_are_refused() -> None:
    with refused("sgconvnext_atto", "no pretrained weights", "pretrained=False"):
        create(**{"model.pretrained": True})


def test_pretrained_weights_that_cannot_be_fetched_are_refused(hub: Path) -> None:
    with refused("model.name='convnext_atto'"):
        create(1000, **{"model.name": "convnext_atto", "model.pretrained": True, "model.kwargs": {}})


@pytest.mark.parametrize(
    ("knobs", "lengths"),
    [
        ({"data.img_size": 32}, [64, 16, 4, 1]),
        ({"data.img_size": 96}, [576, 144, 36, 9]),
        ({"data.img_size": [64, 96]}, [384, 96, 24, 6]),
        ({"data.img_size": 96, "model.img_size": 64}, [256, 64, 16, 4]),
    ],
    ids=str,
)
def test_kernels_are_built_for_the_image_size(knobs: dict[str, Any], lengths: list[int]) -> None:
    assert [mixer.length for mixer in mixers(create(**knobs))] == lengths


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("convnext_atto", MICRO),  # takes no img_size
        ("resnet10t", {}),
        ("vit_tiny_patch16_224", {"depth": 1}),  # built for a size, as ours
    ],
)
def test_other_models_of_timm_are_built_under_the_same_configuration(name: str, kwargs: dict[str, Any]) -> None:
    model = create(**{"model.name": name, "model.kwargs": kwargs})
    assert model(noise(2)[0]).shape == (2, 10)


def test_memory_knobs_reach_the_model() -> None:
    plain = create()
    saving = create(**{"model.grad_checkpointing": True, "model.channels_last": True})
    assert [stage.grad_checkpointing for stage in saving.stages] == [True] * 4
    assert [stage.grad_checkpointing for stage in plain.stages] == [False] * 4
    assert saving.stem[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert plain.stem[0].weight.is_contiguous()
    saving.load_state_dict(plain.state_dict())
    images, targets = noise(4)
    gradients = []
    for model in (plain, saving):
        F.cross_entropy(model(images), targets).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert relative_error(gradients[1], gradients[0]) <= 1e-5


# ---- starting from a checkpoint


@pytest.fixture
def start(tmp_path: Path) -> Path:
    model, average = create(), create()
    state = {"state_dict": model.state_dict(), "state_dict_ema": average.state_dict()}
    checkpoint.save(tmp_path / "start.pth", state)
    return tmp_path / "start.pth"


@pytest.mark.parametrize("ema", [False, True])
def test_model_starts_from_the_weights_or_the_average_of_a_checkpoint(ema: bool, start: Path) -> None:
    model = create(**{"model.checkpoint": str(start), "model.checkpoint_ema": ema})
    want = checkpoint.load(start)["state_dict_ema" if ema else "state_dict"]
    assert all(torch.equal(value, want[key]) for key, value in model.state_dict().items())


def test_other_number_of_classes_needs_a_new_head(start: Path) -> None:
    knobs = {"model.checkpoint": str(start), "model.num_classes": 3}
    with refused("start.pth", "of 10 classes, the model of 3; model.new_head=true"):
        create(3, **knobs)
    model = create(3, **knobs, **{"model.new_head": True})
    want = checkpoint.load(start)["state_dict"]
    assert model.head.fc.out_features == 3
    assert all(torch.equal(v, want[k]) for k, v in model.state_dict().items() if not k.startswith("head.fc."))


def test_checkpoint_of_another_architecture_is_refused(start: Path) -> None:
    with refused("start.pth", "is of an SGConvNeXt, the model is a ConvNeXt"):
        create(**{"model.checkpoint": str(start), "model.name": "convnext_atto"})
    with refused("start.pth", "kernels for another image size", "does not say for which", "model.img_size"):
        create(**{"model.checkpoint": str(start), "data.img_size": 64})
    with refused("nowhere.pth", "does not exist"):
        create(**{"model.checkpoint": "nowhere.pth"})


def test_weights_at_another_image_size_keep_the_kernels_they_were_built_with(start: Path) -> None:
    model = create(**{"model.checkpoint": str(start), "model.img_size": 32, "data.img_size": 64})
    assert [mixer.length for mixer in mixers(model)] == [64, 16, 4, 1]
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 10)


# ---- starting from a ConvNeXt

OURS = "sgconvnext_atto_gap3"


def convnext(folder: Path, **kwargs: Any) -> tuple[str, torch.nn.Module, torch.nn.Module]:
    """A run's checkpoint of timm's ConvNeXt with 3 classes, the network and its average."""
    return trained(folder, **{"model.name": "convnext_atto", "model.kwargs": MICRO | kwargs})


def started(path: str | Path, classes: int = 3, **changes: Any) -> Any:
    return create(classes, **{"model.name": OURS, "model.checkpoint": str(path)} | changes).eval()


def evaluated(path: str, *overrides: str) -> Any:
    """As validate.py makes the model."""
    return build.trained_model(checkpoint.load(path), False, path, [f"model.name={OURS}", *overrides])[0].eval()


def difference(got: torch.nn.Module, want: torch.nn.Module, size: tuple[int, int] = (32, 32)) -> float:
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        return relative_error(got(images), want(images))


@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("size", [(32, 32), (96, 96), (64, 96)], ids=str)
def test_run_starts_as_the_convnext_of_its_checkpoint(ema: bool, size: tuple[int, int], tmp_path: Path) -> None:
    path, *networks = convnext(tmp_path)
    got = started(path, **{"model.checkpoint_ema": ema, "data.img_size": list(size)})
    assert difference(got, networks[ema], size) <= 1e-5
    assert difference(networks[0], networks[1]) > 0.1
    assert mixers(got)[0].input_size == (size[0] // 4, size[1] // 4)
    assert not got.pretrained_cfg.get("state_dict")


@pytest.mark.parametrize("kind", ["bare", "safetensors", "of its authors"])
def test_weights_of_a_convnext_alone_are_enough(kind: str, tmp_path: Path) -> None:
    _, network, _ = convnext(tmp_path)
    path, state = tmp_path / "a.pth", network.state_dict()
    if kind == "safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state if kind == "bare" else {"model": in_the_authors_names(state)}, path)
    assert difference(started(path), network) <= 1e-5
    with refused("a.pth", "cannot hold 7x7 kernels", "name a _gap3 model"):
        started(path, **{"model.name": "sgconvnext_atto"})


def test_run_starts_from_a_run_that_took_its_weights_from_a_file(tmp_path: Path) -> None:
    network = convnext(tmp_path)[1]
    torch.save(network.state_dict(), tmp_path / "a.pth")
    overlay = {"pretrained_cfg_overlay": {"file": str(tmp_path / "a.pth"), "num_classes": 3}}
    knobs = {"model.name": OURS, "model.pretrained": True, "model.kwargs": MICRO | overlay}
    assert difference(create(3, **knobs).eval(), network) <= 1e-5
    (tmp_path / "first").mkdir()
    path, first, _ = trained(tmp_path / "first", **knobs)
    assert difference(started(path), first) == 0
    assert difference(first, network) > 0.1


def test_convnexts_classifier_is_kept_only_for_as_many_classes(tmp_path: Path) -> None:
    path, network, _ = convnext(tmp_path)
    with refused("best.pth", "of 3 classes, the model of 7; model.new_head=true"):
        started(path, 7)
    for classes in (3, 7):
        got = started(path, classes, **{"model.new_head": True})
        assert got.head.fc.out_features == classes
        assert classes == 7 or difference(got, network) > 0.1
        got.head.fc = network.head.fc
        assert difference(got, network) <= 1e-5
    bare = {key: value for key, value in network.state_dict().items() if "head.fc" not in key}
    torch.save(bare, tmp_path / "bare.pth")
    with refused("bare.pth", "has no classifier", "model.new_head=true"):
        started(tmp_path / "bare.pth")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.name": "sgconvnext_atto"}, ["was trained as convnext_atto", "or sgconvnext_atto_gap3"]),
        ({"model.name": "sgconvnext_femto_gap3"}, ["was trained as convnext_atto", "or sgconvnext_atto_gap3"]),
        ({"model.kwargs": MICRO | {"in_chans": 1}}, ["reads images of 3 channels, the model of 1"]),
        ({"model.kwargs": MICRO | {"depths": [1, 1, 2, 1]}}, ["depths [1, 1, 1, 1]", "the model depths [1, 1, 2, 1]"]),
        ({"model.kwargs": MICRO | {"row_gap": 2}}, ["row_gap=2", "build it with row_gap=3"]),
        ({"model.kwargs": MICRO | {"norm_eps": 1e-3}}, ["norm_eps=0.001", "leave norm_eps out"]),
        ({"model.kwargs": MICRO | {"global_pool": "max"}}, ["global_pool=avg", "leave global_pool out"]),
    ],
    ids=str,
)
def test_model_that_a_convnext_does_not_become_is_refused(
    changes: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    with refused(f"checkpoint '{tmp_path}/best.pth'", *words):
        started(convnext(tmp_path)[0], **changes)


@pytest.mark.parametrize(
    "kwargs", [{"act_layer": "relu"}, {"norm_layer": "rmsnorm2d"}, {"stem_type": "overlap"}], ids=str
)
def test_convnext_that_computes_something_else_is_refused(kwargs: dict[str, str], tmp_path: Path) -> None:
    path, *_ = convnext(tmp_path, **kwargs)
    [(key, value)] = kwargs.items()
    for make in (started, evaluated):
        with refused("best.pth", f"was trained with {key}={value}", "no SGConvNeXt computes the same"):
            make(path)


def test_epsilon_of_a_convnexts_norms_must_be_named(tmp_path: Path) -> None:
    path, network, _ = convnext(tmp_path, norm_eps=0.1)
    with refused("trained with norm_eps=0.1", "use model.kwargs={norm_eps: 0.1}"):
        started(path)
    assert difference(started(path, **{"model.kwargs": MICRO | {"norm_eps": 0.1}}), network) <= 1e-5


@pytest.mark.parametrize("kwargs", [{}, {"conv_mlp": True}], ids=str)
@pytest.mark.parametrize("name", ["convnext_atto", "convnext_tiny"])  # timm builds the first with conv_mlp
def test_run_of_a_convnext_is_evaluated_as_an_sgconvnext(name: str, kwargs: dict[str, Any], tmp_path: Path) -> None:
    path, network, _ = trained(tmp_path, **{"model.name": name, "model.kwargs": MICRO | kwargs})
    for size in (32, 64):  # 32 px alone have no offsets of two rows in the last stage
        got = evaluated(path, f"model.name=sg{name}_gap3", f"data.img_size={size}")
        assert difference(got, network, (size, size)) <= 1e-5


def test_kernels_of_a_larger_size_hold_more_of_a_convnext(tmp_path: Path) -> None:
    path, network, _ = convnext(tmp_path)
    got = [started(path, **{"model.img_size": size}) for size in (32, 128)]
    assert difference(got[0], network) <= 1e-5
    assert difference(got[0], network, (128, 128)) > 0.01
    assert difference(got[1], network, (128, 128)) <= 1e-5


@pytest.mark.parametrize("name", [OURS, f"{OURS}.d2_in1k"])
@pytest.mark.parametrize("classes", [1000, 3])
def test_pretrained_weights_of_convnext_come_out_of_the_hubs_cache(name: str, classes: int, hub: Path) -> None:
    network = timm.create_model("convnext_atto").eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    folder = hub_folder(hub, "timm/convnext_atto.d2_in1k")
    safetensors.torch.save_file(network.state_dict(), folder / "model.safetensors")
    got = create(classes, **{"model.name": name, "model.pretrained": True, "model.kwargs": {}}).eval()
    assert mixers(got)[0].input_size == (8, 8)  # of data.img_size=32, not of the 224 px of the weights' cfg
    assert got.head.fc.out_features == classes
    got.head.fc = network.head.fc if classes == 3 else got.head.fc
    assert difference(got, network) <= 1e-5


# ---- the loss


@pytest.mark.parametrize(
    ("knobs", "want"),
    [
        ({}, nn.CrossEntropyLoss),
        ({"augment.smoothing": 0.1}, LabelSmoothingCrossEntropy),
        ({"augment.mixup": 0.8, "augment.smoothing": 0.1}, SoftTargetCrossEntropy),
        ({"augment.cutmix": 1.0}, SoftTargetCrossEntropy),
    ],
    ids=str,
)
def test_loss_follows_from_the_augmentation(knobs: dict[str, float], want: type) -> None:
    assert type(build.create_criterion(micro_config(**knobs).augment)) is want


def test_smoothing_of_the_loss_is_the_one_that_was_asked_for() -> None:
    logits, targets = torch.randn(8, 10), torch.arange(8)
    criterion = build.create_criterion(micro_config(**{"augment.smoothing": 0.3}).augment)
    want = F.cross_entropy(logits, targets, label_smoothing=0.3)
    assert relative_error(criterion(logits, targets), want) <= 1e-6


def test_folder_of_weights_is_found_in_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uncounted: None
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path, model, _ = trained(tmp_path)
    export.export_checkpoint(path, str(tmp_path / "exported"))
    found = build.from_timm("local-dir:~/exported", {"pretrained": True})
    assert torch.equal(found.state_dict()["head.fc.weight"], model.state_dict()["head.fc.weight"])


def test_override_of_a_checkpoints_run_is_told_by_its_place(tmp_path: Path) -> None:
    path = trained(tmp_path)[0]
    with refused("command line: data.crop_pct=2.0 must be"):
        build.run_config(checkpoint.load(path), path, ["data.crop_pct=2"])
    state = checkpoint.load(path)
    state["args"]["data"]["crop_pct"] = 2.0
    with refused(f"{path}: data.crop_pct=2.0 must be"):
        build.run_config(state, path)
