"""Every way in which weights can fail to fit, each with its own sentence; and nothing fits by accident."""

import re
from argparse import Namespace
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import GAP, GATED, SMALL, random_gates, refused, relative_error, small_model
from torch import Tensor
from training_helpers import MICRO, micro_config, trained

import validate
from sgconvnext import SGConvNeXt
from sgconvnext.export import export_checkpoint
from sgconvnext.training import build, checkpoint

Weights = dict[str, Any]


def loaded(found: Weights, model: torch.nn.Module | None = None) -> torch.nn.Module:
    model = small_model() if model is None else model
    checkpoint.load_weights(model, found, "a.pth")
    return model


def convnext(**kwargs: Any) -> Any:
    return timm.create_model(**({"model_name": "convnext_atto", "num_classes": 10} | MICRO | kwargs))


OTHERS: dict[str, tuple[Callable[[], Any], str]] = {
    "in_chans": (
        lambda: small_model(in_chans=1),
        "reads images of 1 channels, the model of 3; build it with in_chans=1",
    ),
    "causal": (
        lambda: small_model(bidirectional=False),
        "has causal kernels, the model's are bidirectional; build it with bidirectional=False",
    ),
    "scales": (lambda: small_model(num_scales=3), "has 3 scales a kernel, the model 5; build it with num_scales=3"),
    "gap": (lambda: small_model(**GAP), "is of a model with a bias in its mixers, such as the _gap3 models"),
    "gates": (
        lambda: small_model(**GATED),
        "is of a model with gates, such as the _gated models; name that model, or build it with gate=True",
    ),
    "gates alone": (lambda: small_model(gate=True), "is of a model with gates"),
    "narrower MLPs": (
        lambda: small_model(mlp_ratio=2.5),
        "has MLPs whose hidden layer has 2.5 times the width, the model's has 4 times; build it with mlp_ratio=2.5",
    ),
    "gated convnext": (
        lambda: timm.create_model("convnext_atto_gated", **MICRO, num_classes=10),
        "is of a gated ConvNeXt, whose weights no SGConvNeXt takes; name convnext_NAME_gated",
    ),
    "size": (
        lambda: small_model(img_size=96),
        "for another image size (stages.0.blocks.0.sgconv.weight has 5 scales of",
    ),
    "depths": (lambda: small_model(depths=(1, 1, 3, 1)), "another size: it has depths [1, 1, 3, 1] and dims [8, 16,"),
    "dims": (lambda: small_model(dims=(8, 16, 24, 40)), "and dims [8, 16, 24, 40], the model depths [1, 1, 1, 1]"),
    "convnext": (convnext, "is of a ConvNeXt, whose 7x7 kernels this model does not hold; name sgconvnext_NAME_gap3"),
    "resnet": (lambda: timm.create_model("resnet10t", num_classes=10), "another architecture; keys"),
    "classes": (
        lambda: small_model(num_classes=7),
        "a classifier (head.fc.weight) of 7 classes, the model of 10; model.n",
    ),
    "no classes": (
        lambda: small_model(num_classes=0),
        "has no classifier (head.fc); model.new_head=true starts from it",
    ),
    "layer scale": (
        lambda: SGConvNeXt(**SMALL, ls_init_value=None),
        "another architecture; keys 4 missing (stages.0.blocks.0.g",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_weights_of_another_model_are_told_by_what_differs(name: str) -> None:
    create, told = OTHERS[name]
    model = small_model()
    before = deepcopy(model.state_dict())
    with refused("checkpoint 'a.pth' ", told):
        loaded(create().state_dict(), model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_weights_of_a_reparameterized_model_are_told() -> None:
    model = timm.utils.reparameterize_model(small_model())
    with refused("is of a reparameterized model", "from before timm.utils.reparameterize_model"):
        loaded(model.state_dict())


def test_weights_without_gates_are_not_those_of_a_gated_model() -> None:
    told = (
        "is of a model without gates, such as the models without _gated; name that model, or build it with gate=False"
    )
    with refused("checkpoint 'a.pth' ", told, "and the mlp_ratio that it had"):
        loaded(small_model().state_dict(), small_model(**GATED))
    with refused(told):
        loaded(small_model(mlp_ratio=3.5).state_dict(), small_model(**GATED))
    with refused(told):
        loaded(convnext().state_dict(), convnext(model_name="convnext_atto_gated"))
    with refused("is of a model with gates, such as the _gated models"):
        loaded(convnext(model_name="convnext_atto_gated").state_dict(), convnext())


def test_cure_for_gates_works(tmp_path: Path) -> None:
    source = random_gates(small_model(**GATED))
    model = loaded(source.state_dict(), small_model(gate=True, mlp_ratio=3.5))
    named = timm.create_model("sgconvnext_atto_gated", **SMALL | {"ls_init_value": 1.0})
    x = torch.randn(1, 3, 64, 64)
    for got in (model, loaded(source.state_dict(), named)):
        assert torch.equal(got.eval()(x), source(x))
    path = start(tmp_path)
    with refused("best.pth", "gate=False, this model has gate=True"):
        create(path, **{"model.kwargs": MICRO | {"gate": True}})
    with refused("best.pth", "mlp_ratio=4.0, this model has mlp_ratio=3.5"):
        create(path, **{"model.kwargs": MICRO | {"mlp_ratio": 3.5}})
    with refused("best.pth", "was trained as sgconvnext_atto, this model is sgconvnext_atto_gated"):
        create(path, **{"model.name": "sgconvnext_atto_gated"})


def test_weights_of_an_sgconvnext_are_no_convnexts() -> None:
    with refused("is of an SGConvNeXt, the model is a ConvNeXt; name an sgconvnext model"):
        loaded(small_model().state_dict(), convnext())


def test_names_of_convnexts_own_code_are_left_to_timm(tmp_path: Path) -> None:
    name = {"model.name": "convnext_atto", "model.kwargs": MICRO}
    model = build.create_model(micro_config(**name), 10)
    state = {
        re.sub(r"stages\.(\d)\.blocks", r"stages.\1", key)
        .replace("stem.", "downsample_layers.0.")
        .replace("conv_dw", "dwconv")
        .replace("mlp.fc", "pwconv")
        .replace("head.norm", "norm")
        .replace("head.fc", "head"): value
        for key, value in model.state_dict().items()
    }
    state = {re.sub(r"stages\.(\d)\.downsample", r"downsample_layers.\1", key): value for key, value in state.items()}
    torch.save({"model": state}, tmp_path / "a.pth")
    with refused("a.pth", "names of ConvNeXt's own code", "pretrained_cfg_overlay: {file: PATH}"):
        build.create_model(micro_config(**name, **{"model.checkpoint": str(tmp_path / "a.pth")}), 10)
    overlay = {"pretrained_cfg_overlay": {"file": str(tmp_path / "a.pth"), "num_classes": 10}}
    cure = {"model.name": "convnext_atto", "model.kwargs": MICRO | overlay, "model.pretrained": True}
    got = build.create_model(micro_config(**cure), 10)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in got.state_dict().items())


def test_other_pooling_is_for_new_heads_only(tmp_path: Path) -> None:
    path, other = start(tmp_path), {"model.kwargs": MICRO | {"global_pool": "max"}}
    with refused("best.pth", "global_pool=avg, this model has global_pool=max"):
        create(path, **other)
    assert create(path, **other, **{"model.new_head": True})


def test_weight_without_a_name_is_refused() -> None:
    with refused("has 3 for the name of a weight"):
        checkpoint.load_weights(small_model(), {3: torch.zeros(1)}, "a.pth", ["head.fc"])  # type: ignore[dict-item]


def test_prefix_of_another_program_is_named_with_the_line_that_removes_it() -> None:
    state = {f"student.backbone.{key}": value for key, value in small_model().state_dict().items()}
    with refused("has 'student.backbone.' before each of its keys", "key.removeprefix('student.backbone.')"):
        loaded(state)


def complex_numbers(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex64)


def integers(tensor: Tensor) -> Tensor:
    return tensor.round().to(torch.int8)


def not_a_number(tensor: Tensor) -> Tensor:
    return tensor.clone().index_fill_(0, torch.tensor([0]), float("nan"))


def too_large(tensor: Tensor) -> Tensor:
    return tensor.double() + 1e300  # finite, but not in the model's float32


VALUES: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "complex": (complex_numbers, "holds complex64 under 'head.norm.bias', where the model has float32"),
    "int8": (integers, "holds int8 under 'head.norm.bias', where the model has float32"),
    "bool": (lambda t: t > 0, "holds bool under 'head.norm.bias', where the model has float32"),
    "nan": (not_a_number, "holds NaN or infinity under 'head.norm.bias'; take an earlier checkpoint"),
    "infinite": (lambda t: t / 0, "holds NaN or infinity under 'head.norm.bias'"),
    "too large": (too_large, "holds NaN or infinity under 'head.norm.bias'"),
    "list": (lambda t: t.tolist(), "holds a list under 'head.norm.bias', where a tensor belongs"),
    "nested": (lambda t: {"a": t}, "holds a dict under 'head.norm.bias', where a tensor belongs"),
    "none": (lambda t: None, "holds a NoneType under 'head.norm.bias', where a tensor belongs"),
    "meta": (lambda t: t.to("meta"), "holds a tensor without values under 'head.norm.bias' (of the meta device)"),
    "sparse": (lambda t: t.to_sparse(), "holds a sparse tensor under 'head.norm.bias'; save it as .to_dense()"),
    "scalar": (lambda t: t[0], "1 shaped differently (head.norm.bias)"),
    "broadcast": (lambda t: t[:1], "1 shaped differently (head.norm.bias)"),
    "row": (lambda t: t[None], "1 shaped differently (head.norm.bias)"),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_that_would_be_changed_by_copying_are_refused(name: str) -> None:
    change, told = VALUES[name]
    state = small_model().state_dict()
    state["head.norm.bias"] = change(state["head.norm.bias"] + 1)
    with refused("checkpoint 'a.pth' ", told):
        loaded(state)


def test_scalar_is_not_filled_from_a_vector_as_torch_does() -> None:
    model = torch.nn.Module()
    model.register_parameter("scale", torch.nn.Parameter(torch.zeros(())))
    with refused("1 shaped differently (scale)"):
        checkpoint.load_weights(model, {"scale": torch.ones(3)}, "a.pth")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_weights_in_another_precision_are_the_same_weights(dtype: torch.dtype) -> None:
    source = small_model(ls_init_value=0.5).to(dtype)
    model = loaded(source.state_dict())
    assert all(torch.equal(value, source.state_dict()[key].float()) for key, value in model.state_dict().items())


def test_buffers_that_are_infinite_by_design_and_counters_are_loaded() -> None:
    model = torch.nn.BatchNorm2d(3)
    model.register_buffer("mask", torch.full((2,), float("-inf")))
    checkpoint.load_weights(model, deepcopy(model.state_dict()), "a.pth")
    with refused("holds float32 under 'num_batches_tracked', where the model has int64"):
        checkpoint.load_weights(model, model.state_dict() | {"num_batches_tracked": torch.tensor(1.0)}, "a.pth")


# ---- the same shapes, another function


def start(tmp_path: Path, **changes: Any) -> str:
    return trained(tmp_path, **changes)[0]


def create(path: str, **changes: Any) -> Any:
    return build.create_model(micro_config(**({"model.checkpoint": path, "model.num_classes": 3} | changes)), 3)


@pytest.mark.parametrize(
    ("key", "then", "now"),
    [("alpha", 0.3, None), ("alpha", None, 0.3), ("decay", "position", None), ("exponent", 1.0, 2.0)],
)
def test_kernels_that_decay_otherwise_are_refused_though_the_shapes_fit(
    key: str, then: Any, now: Any, tmp_path: Path
) -> None:
    def kwargs(value: Any) -> dict[str, Any]:
        return {"model.kwargs": MICRO | ({} if value is None else {key: value})}

    path = start(tmp_path, **kwargs(then))
    default = {"alpha": 0.5, "decay": "scale"}.get(key)
    with refused(
        "best.pth", f"{key}={then or default}, this model has {key}={now or default}", f"model.kwargs={{{key}"
    ):
        create(path, **kwargs(now))
    assert create(path, **kwargs(then))


@pytest.mark.parametrize("kwargs", [{"alpha": 0.5}, {"backend": "dft"}, {"ls_init_value": 0.5}], ids=str)
def test_arguments_that_change_nothing_may_differ(kwargs: dict[str, Any], tmp_path: Path) -> None:
    assert create(start(tmp_path), **{"model.kwargs": MICRO | kwargs})


def test_pair_out_of_a_file_is_the_pair_that_was_given(tmp_path: Path) -> None:
    path = start(tmp_path, **{"model.kwargs": MICRO | {"alpha": (1.0, 0.5)}})
    assert create(path, **{"model.kwargs": MICRO | {"alpha": [1.0, 0.5]}})


def test_weights_trained_as_another_model_are_refused_by_name(tmp_path: Path) -> None:
    path = start(tmp_path)
    with refused(
        "best.pth", "was trained as sgconvnext_atto, this model is sgconvnext_femto", "model.name=sgconvnext_a"
    ):
        create(path, **{"model.name": "sgconvnext_femto"})


def test_timms_own_checkpoint_starts_a_run_if_it_is_of_the_same_model(tmp_path: Path) -> None:
    model = trained(tmp_path)[1]
    args = Namespace(model="sgconvnext_atto", model_kwargs=MICRO | {"img_size": 32}, lr=1e-3)
    state = {"state_dict": model.state_dict(), "args": args, "arch": "sgconvnext_atto", "epoch": 3, "version": 2}
    torch.save(state, tmp_path / "timm.pth")
    got = create(str(tmp_path / "timm.pth"))
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in got.state_dict().items())
    args.model_kwargs["alpha"] = 0.25
    torch.save(state, tmp_path / "timm.pth")
    with refused("timm.pth", "alpha=0.25, this model has alpha=0.5"):
        create(str(tmp_path / "timm.pth"))
    with refused("timm.pth", "args of another program (Namespace)", "model.checkpoint"):
        export_checkpoint(str(tmp_path / "timm.pth"), str(tmp_path / "folder"))


def test_validation_of_another_function_is_refused(tmp_path: Path, refusal: Callable[..., str]) -> None:
    path = start(tmp_path)
    checkpoint.save(Path(path), checkpoint.load(path) | {"class_to_idx": None})
    told = refusal(validate, "--checkpoint", path, "model.kwargs={depths: [1,1,1,1], dims: [8,16,24,32], alpha: 0.25}")
    assert "alpha=0.5, this model has alpha=0.25" in told


def test_new_head_replaces_both_heads_of_a_distilled_model(tmp_path: Path) -> None:
    name = {"model.name": "deit_tiny_distilled_patch16_224", "model.kwargs": {"depth": 1}}
    path, model, _ = trained(tmp_path, **name)
    got = build.create_model(micro_config(**name, **{"model.checkpoint": path, "model.new_head": True}), 10)
    assert got.head.out_features == got.head_dist.out_features == 10
    assert torch.equal(got.cls_token, model.get_parameter("cls_token"))


# ---- another image size


@pytest.mark.parametrize("size", [96, [64, 96], 36], ids=str)
def test_run_at_another_size_starts_from_resized_kernels_and_says_so(
    size: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, want, _ = trained(tmp_path, **{"data.img_size": 64})
    want.set_input_size(size)
    with caplog.at_level("INFO"):
        got = create(path, **{"data.img_size": size}).eval()
    assert all(torch.equal(value, want.state_dict()[key]) for key, value in got.state_dict().items())
    images = torch.randn(2, 3, 64, 96)
    assert relative_error(got(images), want(images)) <= 1e-6
    shown = str(size).replace(" ", "")
    assert f"was trained for 64 px: its weights are resized for {shown} px" in caplog.text
    assert "model.img_size=64 keeps them as they are" in caplog.text


def test_kernels_stay_as_they_were_built_if_the_size_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, want, _ = trained(tmp_path, **{"data.img_size": 64})
    with caplog.at_level("INFO"):
        got = create(path, **{"data.img_size": 96, "model.img_size": 64})
    assert all(torch.equal(value, want.state_dict()[key]) for key, value in got.state_dict().items())
    assert "resized" not in caplog.text


def test_other_models_that_are_built_for_a_size_are_resized_too(tmp_path: Path) -> None:
    vit = {"model.name": "vit_tiny_patch16_224", "model.kwargs": {"depth": 1}, "data.img_size": 64}
    path, want, _ = trained(tmp_path, **vit)
    want.set_input_size(img_size=96)
    got = create(path, **(vit | {"data.img_size": 96}))
    assert relative_error(got.pos_embed, want.pos_embed) <= 1e-6
    assert got.patch_embed.img_size == (96, 96)
