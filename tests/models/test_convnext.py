"""A converted ConvNeXt is the ConvNeXt: logits, features, gradients, at every size; timm's ConvNeXt is the oracle."""

import copy
from typing import Any

import pytest
import timm
import torch
from helpers import in_the_authors_names, mixers, random_gates, refused, relative_error, visible
from torch import Tensor, nn

import sgconvnext
from sgconvnext.models import conversion, convnext
from sgconvnext.models.sgconvnext import FURTHER, SIZES

BOUND = 1e-5  # float32, relative
NARROW = {"depths": (1, 2, 2, 1), "dims": (16, 24, 32, 40)}


def theirs(name: str = "convnext_atto", **kwargs: Any) -> Any:
    return visible(timm.create_model(name, **(NARROW | kwargs)))


def images(*size: int, batch: int = 1, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_same(got: Any, want: Any, x: Tensor, bound: float = BOUND) -> None:
    """Logits, and the feature maps of all four stages."""
    assert relative_error(got(x), want(x)) <= bound
    pairs = zip(*(model.forward_intermediates(x, intermediates_only=True) for model in (got, want)), strict=True)
    for a, b in pairs:
        assert relative_error(a, b) <= bound


@pytest.mark.parametrize(
    "size",
    [pytest.param(size, marks=pytest.mark.end_to_end if size != "atto" else []) for size in SIZES],
)
def test_every_size_is_timms_convnext(size: str) -> None:
    source = visible(timm.create_model(f"convnext_{size}"))
    got = sgconvnext.from_convnext(source)
    assert got.pretrained_cfg["architecture"] == f"sgconvnext_{size}_gap3"
    assert_same(got, source, images(224, 224))


@pytest.mark.parametrize(
    "size", [(224, 224), (96, 160), (32, 32), (64, 32), (288, 288), (384, 224), (132, 228), (512, 384)], ids=str
)
def test_at_every_image_size(size: tuple[int, int]) -> None:
    source = theirs("convnext_tiny", depths=(3, 3, 9, 3))
    assert_same(sgconvnext.from_convnext(source), source, images(*size))


KINDS: dict[str, dict[str, Any]] = {
    "output stride 8": {"output_stride": 8},
    "output stride 16": {"output_stride": 16},
    "grey": {"in_chans": 1},
    "13 channels": {"in_chans": 13},
    "1x1 convolutions": {"conv_mlp": True},
    "linear layers": {"conv_mlp": False},
    "no classifier, as DINOv3": {"num_classes": 0},
    "22k classes": {"num_classes": 21841},
    "CLIP's projection": {"num_classes": 640},
    "CLIP's head": {"head_hidden_size": 48, "num_classes": 768},
    "another eps, as xxlarge": {"norm_eps": 1e-3},
    "maximum pooling": {"global_pool": "max"},
    "small kernels": {"kernel_sizes": (7, 5, 5, 3)},
}


@pytest.mark.parametrize("kwargs", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("batch", [1, 5])
def test_of_every_kind(kwargs: dict[str, Any], batch: int) -> None:
    source = theirs(**kwargs)
    got = sgconvnext.from_convnext(source)
    assert_same(got, source, images(128, 96, batch=batch, channels=kwargs.get("in_chans", 3)))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.05), (torch.float16, 0.01), (torch.float64, 1e-9)])
def test_in_other_precisions(dtype: torch.dtype, bound: float) -> None:
    source = theirs().to(dtype)
    got = sgconvnext.from_convnext(source)
    assert {parameter.dtype for parameter in got.parameters()} == {dtype}
    assert_same(got, source, images(128, 96).to(dtype), bound)


def test_training_drops_the_same_paths_and_has_the_same_gradients() -> None:
    source = theirs(drop_path_rate=0.5, drop_rate=0.3)
    got = sgconvnext.from_convnext(source)
    outputs = []
    for model in (source, got):
        model.train()
        torch.manual_seed(3)
        outputs.append(model(images(96, 96, batch=4)))
        outputs[-1].square().sum().backward()
    assert relative_error(outputs[1], outputs[0]) <= BOUND
    ours, shared = dict(got.named_parameters()), 0
    for name, parameter in source.named_parameters():
        if ".conv_dw." not in name:
            assert relative_error(ours[name].grad.flatten(), parameter.grad.flatten()) <= 1e-4, name
            shared += 1
        elif name.endswith("bias"):
            assert relative_error(ours[name.replace("conv_dw", "sgconv")].grad, parameter.grad) <= 1e-4, name
    assert shared == len(list(source.parameters())) - 2 * sum(NARROW["depths"])


def test_gradient_of_a_near_tap_is_that_of_the_7x7() -> None:
    """At kernel_norm 1 a parameter of the first scale is a tap, so that both networks take the same step."""
    source = theirs()
    got = sgconvnext.from_convnext(source)
    for model in (source, got):
        model(images(224, 224)).square().sum().backward()
    want = source.stages[0].blocks[0].conv_dw.weight.grad[:, 0]
    grad = got.stages[0].blocks[0].sgconv.weight.grad
    assert relative_error(grad[0, 0, :, 3], want[:, 3, 0]) <= 1e-4  # lag 3 is the third pixel to the left
    assert relative_error(grad[1, 0, :, 58], want[:, 4, 3]) <= 1e-4  # lag -59 is the pixel below


def test_a_narrower_gap_or_a_missing_bias_would_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    source = theirs()
    got = sgconvnext.from_convnext(source)
    for block in (block for stage in got.stages for block in stage.blocks):
        nn.init.zeros_(block.sgconv.bias)
    with pytest.raises(AssertionError):
        assert_same(got, source, images(96, 96))
    weights = {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": source.state_dict()}}
    for missing, cure in (
        ({"row_gap": 2}, "row_gap=3"),
        ({"row_gap": 0}, "row_gap=3"),
        ({"bias": False}, "bias=True"),
    ):
        with refused("sgconvnext_atto_gap3: the pretrained file", cure):
            timm.create_model("sgconvnext_atto_gap3", **NARROW, **weights, **missing)
    monkeypatch.setattr(convnext, "_reach", lambda weight, *_: weight.shape[2] // 2)  # convert all the same
    narrow = timm.create_model("sgconvnext_atto_gap3", **NARROW, **weights, row_gap=2, num_scales=3).eval()
    with pytest.raises(AssertionError):
        assert_same(narrow, source, images(96, 96))


def test_conversion_checks_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(key: str, value: Tensor) -> Tensor:
        value = value.flatten(1) if ".mlp." in key and value.ndim == 4 else value
        return 1.001 * value if key.endswith("fc1.weight") else value

    monkeypatch.setattr(convnext, "flat", wrong)
    with refused("convnext_atto.d2_in1k: the converted network's outputs differ by", "more than 0.0001"):
        sgconvnext.from_convnext(theirs())


def test_configuration_of_the_weights_goes_with_them() -> None:
    source = visible(timm.create_model("convnext_nano.r384_in12k_ft_in1k", **NARROW))
    source.pretrained_cfg["label_names"] = ("a", "b")
    got = sgconvnext.from_convnext(source)
    kept = ("tag", "input_size", "mean", "std", "crop_pct", "crop_mode", "num_classes", "label_names", "license")
    assert {key: got.pretrained_cfg[key] for key in kept} == {key: source.pretrained_cfg[key] for key in kept}
    assert got.pretrained_cfg["architecture"] == "sgconvnext_nano_gap3"
    assert "state_dict" not in got.pretrained_cfg
    assert got.stages[0].blocks[0].sgconv.input_size == (96, 96)  # 384 px
    assert not got.training


def test_arguments_are_those_of_timm() -> None:
    source = theirs()
    got = sgconvnext.from_convnext(source, num_classes=7, in_chans=1, img_size=(160, 128), backend="fft")
    assert got(images(160, 128, channels=1)).shape == (1, 7)
    assert got.stages[1].blocks[0].sgconv.backend == "fft"
    assert torch.equal(got.stages[0].blocks[0].norm.weight, source.stages[0].blocks[0].norm.weight)
    features = sgconvnext.from_convnext(source, features_only=True, out_indices=(1, 3))
    for got_map, want in zip(
        features(images(96, 64)),
        source.forward_intermediates(images(96, 64), [1, 3], intermediates_only=True),
        strict=True,
    ):
        assert relative_error(got_map, want) <= BOUND


@pytest.mark.parametrize("kwargs", [{}, {"num_classes": 0}, {"in_chans": 2, "num_classes": 5}], ids=str)
def test_state_dict_tells_what_it_is_of(kwargs: dict[str, Any]) -> None:
    source = theirs(conv_mlp=False, **kwargs)
    x = images(96, 64, channels=kwargs.get("in_chans", 3))
    authors = in_the_authors_names(source.state_dict())
    for state in (source.state_dict(), authors, {"model": authors}):
        got = sgconvnext.from_convnext(state)
        assert_same(got, source, x)
        assert not got.pretrained_cfg.get("tag")  # nobody knows whose they are


def test_state_dict_of_the_shape_of_a_size_is_of_that_size() -> None:
    got = sgconvnext.from_convnext(visible(timm.create_model("convnext_pico")).state_dict())
    assert got.pretrained_cfg["architecture"] == "sgconvnext_pico_gap3"


def test_clip_tower_is_found_in_its_checkpoint() -> None:
    source = theirs(conv_mlp=False, num_classes=0)
    state = {f"visual.trunk.{key}": value for key, value in source.state_dict().items()}
    state["visual.head.proj.weight"] = torch.randn(12, NARROW["dims"][-1])
    state["logit_scale"] = torch.ones(())
    got = sgconvnext.from_convnext(state)
    x = images(96, 64)
    with torch.no_grad():
        want = source(x) @ state["visual.head.proj.weight"].t()
        assert relative_error(got(x), want) <= BOUND


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("convnextv2_atto", ["convnextv2_atto", "ConvNeXt-V2", "response norm"]),
        ("convnext_atto_ols", ["convnext_atto_ols", "another stem"]),
        ("convnext_atto_rms", ["convnext_atto_rms", "norms without a bias"]),
        ("convnext_tiny_hnf", ["convnext_tiny_hnf", "last norm before the pooling"]),
        ("test_convnext", ["another activation than GELU"]),
        ("resnet18", ["resnet18", "is no ConvNeXt of timm", "class ResNet"]),
        ("convnext_huge", ["'convnext_huge' is no timm model"]),
        (7, ["7 is no ConvNeXt"]),
        ({}, ["the state dict is not of a ConvNeXt"]),
        ({"stages.0.blocks.0.conv_dw.weight": torch.zeros(8, 1, 7, 7)}, ["blocks [1, 0, 0, 0]"]),
    ],
    ids=str,
)
def test_what_it_does_not_contain_is_refused(source: Any, words: list[str]) -> None:
    with refused(*words):
        sgconvnext.from_convnext(source)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (lambda state: {f"module.{key}": value for key, value in state.items()}, ["'module.' before each"]),
        (lambda state: state | {3: torch.ones(2)}, ["has 3 for the name"]),
        (lambda state: {key: value for key, value in state.items() if key != "stem.0.weight"}, ["stem.0.weight"]),
        (
            lambda state: {key: value for key, value in state.items() if key != "head.fc.bias"},
            ["missing (head.fc.bias"],
        ),
        (lambda state: {"state_dict": state}, ["under 'state_dict'"]),
    ],
)
def test_state_dict_that_is_not_whole_is_refused(changed: Any, words: list[str]) -> None:
    with refused("the state dict", *words):
        sgconvnext.from_convnext(changed(dict(theirs().state_dict())))


@pytest.mark.parametrize("key", ["checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "model_name"])
def test_arguments_that_name_other_weights_are_refused(key: str) -> None:
    with refused(f"takes no {key}", "'x'"):
        sgconvnext.from_convnext(theirs(), **{key: "x"})


def test_model_that_was_changed_is_converted_or_refused() -> None:
    source = theirs()
    source.head.fc = nn.Linear(NARROW["dims"][-1], 4)
    source.head.drop = nn.Dropout(0.5)  # in training mode
    got = sgconvnext.from_convnext(source)
    assert got.num_classes == 4
    assert_same(got, source.eval(), images(96, 96))
    source.head.fc = nn.Sequential(source.head.fc)
    with refused("another head than timm's"):
        sgconvnext.from_convnext(source)
    with refused("depthwise convolutions without a bias"):
        sgconvnext.from_convnext(theirs(conv_bias=False))
    with refused("batch norms"):
        sgconvnext.from_convnext(theirs(norm_layer="batchnorm2d"))
    with refused("without values", "meta"):
        sgconvnext.from_convnext(timm.create_model("convnext_atto", **NARROW, device="meta"))


def test_device_and_dtype_are_those_asked_for() -> None:
    assert next(sgconvnext.from_convnext(theirs(), dtype=torch.float64).parameters()).dtype == torch.float64


def test_kernels_for_small_images_lack_what_their_maps_lack(caplog: pytest.LogCaptureFixture) -> None:
    source = theirs()
    got = sgconvnext.from_convnext(source, img_size=64)
    assert "is the ConvNeXt up to that size only" in caplog.text
    assert_same(got, source, images(64, 64))
    with pytest.raises(AssertionError):
        assert_same(got, source, images(128, 128))
    caplog.clear()
    assert_same(sgconvnext.from_convnext(source, img_size=128), source, images(224, 96))
    assert not caplog.text


def test_it_stays_the_convnext_at_another_input_size() -> None:
    source = theirs()
    got = sgconvnext.from_convnext(source)
    for built in ((288, 192), (128, 160)):
        got.set_input_size(built)
        for size in (built, (96, 96), (320, 64)):
            assert_same(got, source, images(*size))
        want = sgconvnext.from_convnext(source, img_size=built).state_dict()
        for key, value in got.state_dict().items():
            assert torch.allclose(value, want[key], rtol=1e-6, atol=0), key


def test_reparameterized_it_is_the_same() -> None:
    source = theirs()
    got = timm.utils.reparameterize_model(sgconvnext.from_convnext(source))
    for size in ((224, 224), (96, 160)):
        assert_same(got, source, images(*size, batch=3))


def test_back_to_convnext_with_the_same_weights() -> None:
    source = theirs(num_classes=3)
    back, error = conversion.to_convnext(sgconvnext.from_convnext(source))
    assert error <= BOUND
    want = source.state_dict()
    assert back.state_dict().keys() == want.keys()
    for key, value in back.state_dict().items():
        assert torch.equal(value.flatten(), want[key].flatten()), key
    assert back.pretrained_cfg["architecture"] == "convnext_atto"


def test_way_back_is_refused_where_energy_would_be_lost() -> None:
    model = sgconvnext.from_convnext(theirs())
    layer = model.stages[1].blocks[0].sgconv
    with torch.no_grad():
        layer.weight[0, 2, 0, 0] = layer.weight.square().sum().sqrt()
    _, lost = convnext.convolution_weight(layer)
    assert 0 < lost < 1
    with refused(f"up to {lost:.2%} of a kernel's energy", "keep the SGConvNeXt"):
        conversion.to_convnext(model)
    with refused("row_gap=0", "row_gap=3"):
        conversion.to_convnext(timm.create_model("sgconvnext_atto", **NARROW))


# With gates


def test_gates_that_are_added_change_no_output_and_are_counted() -> None:
    source = theirs(num_classes=3)
    got, plain = sgconvnext.from_convnext(source, gate=True), sgconvnext.from_convnext(source)
    added = sum(depth * (c**2 + c) for depth, c in zip(NARROW["depths"], NARROW["dims"], strict=True))
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (got, plain)]
    assert sizes[0] == sizes[1] + added
    for size in ((224, 224), (96, 160), (32, 32)):
        assert_same(got, source, images(*size))
        assert torch.equal(got(images(*size)), plain(images(*size)))
    assert_same(timm.utils.reparameterize_model(got), source, images(96, 160))


def test_gates_that_are_added_learn() -> None:
    got = sgconvnext.from_convnext(theirs(), gate=True, img_size=128).train()
    optimizer = torch.optim.SGD(got.parameters(), lr=1e-2)
    x = images(64, 64, batch=2)
    before = got(x)
    before.square().mean().backward()
    gates = {name: parameter for name, parameter in got.named_parameters() if ".gate." in name}
    assert len(gates) == 2 * sum(NARROW["depths"])
    assert all(parameter.grad.any() for parameter in gates.values())
    optimizer.step()
    assert all(parameter.any() for parameter in gates.values())
    assert relative_error(got(x), before) > 1e-4


def test_other_arguments_go_with_the_gates() -> None:
    source = theirs(drop_path_rate=0.2)
    kwargs = {"num_classes": 7, "in_chans": 1, "img_size": (96, 64), "drop_path_rate": 0.5}
    got = sgconvnext.from_convnext(source, gate=True, **kwargs)
    want = timm.create_model("sgconvnext_atto_gap3", **NARROW, gate=True, **kwargs)
    assert {k: v.shape for k, v in got.state_dict().items()} == {k: v.shape for k, v in want.state_dict().items()}
    assert got(images(96, 64, channels=1)).shape == (1, 7)
    features = sgconvnext.from_convnext(source, gate=True, features_only=True, out_indices=(1, 3))
    maps = source.forward_intermediates(images(96, 64), [1, 3], intermediates_only=True)
    for got_map, wanted in zip(features(images(96, 64)), maps, strict=True):
        assert relative_error(got_map, wanted) <= BOUND
    wide = sgconvnext.from_convnext(source, gate=True, dtype=torch.float64)
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float64}


def test_way_back_is_open_while_the_gates_are_closed() -> None:
    source = theirs(num_classes=3)
    model = sgconvnext.from_convnext(source, gate=True)
    back, error = conversion.to_convnext(model)
    assert error <= BOUND
    want = source.state_dict()
    assert back.state_dict().keys() == want.keys()
    for key, value in back.state_dict().items():
        assert torch.equal(value.flatten(), want[key].flatten()), key
    for part in ("weight", "bias"):
        opened = copy.deepcopy(model)
        with torch.no_grad():
            getattr(opened.stages[2].blocks[1].gate.linear, part).flatten()[3] = 1e-3
        with refused("sgconvnext_atto_gap3.d2_in1k has gates, which a ConvNeXt would lose; keep the SGConvNeXt"):
            conversion.to_convnext(opened)


@pytest.mark.parametrize("kwargs", [{"mlp_ratio": 3.5}, {"mlp_ratio": 3.5, "gate": True}], ids=str)
def test_narrower_mlps_hold_no_convnext(kwargs: dict[str, Any]) -> None:
    told = "has MLPs whose hidden layer has 4 times the width, the model's has 3.5 times; build it with mlp_ratio=4"
    with refused("sgconvnext_atto_gap3: the pretrained file", told):
        sgconvnext.from_convnext(theirs(), **kwargs)
    model = timm.create_model("sgconvnext_atto_gap3", **NARROW, **kwargs)
    for layer in mixers(model):
        weight = torch.randn(layer.channels, 1, 7, 7)
        layer.load_state_dict(convnext.mixer_state(weight, layer), strict=False)
    with refused("has MLPs whose hidden layer has 3.5 times the width, the model's has 4 times; keep the SGConvNeXt"):
        conversion.to_convnext(model)


def test_gated_convnext_is_not_converted() -> None:
    source = random_gates(theirs("convnext_atto_gated"))
    with refused("convnext_atto_gated is no ConvNeXt of timm, but of the class GatedConvNeXt"):
        sgconvnext.from_convnext(source)
    told = "is of a gated ConvNeXt, whose weights no SGConvNeXt takes; name a ConvNeXt without gates"
    with refused("the state dict", told):
        sgconvnext.from_convnext(source.state_dict())
    overlay = {"state_dict": source.state_dict()}
    with refused("sgconvnext_atto_gap3: the pretrained file", told):
        timm.create_model("sgconvnext_atto_gap3", pretrained=True, pretrained_cfg_overlay=overlay, **NARROW)


def test_energy_outside_the_square_is_that_of_all_other_lags() -> None:
    """On rows of 3 + 1, offsets of up to one row and column are lags 0, 1, 3, 4, 5 and their negatives."""
    taps = torch.stack([torch.arange(-11.0, 12), torch.zeros(23)])
    squares = torch.arange(-11.0, 12).square()
    near = 2 * (1 + 9 + 16 + 25)
    want = [1 - near / float(squares.sum()), 0.0]
    assert convnext.energy_outside(taps, (3, 3), 1, 1).tolist() == pytest.approx(want)
    causal = convnext.energy_outside(torch.ones(1, 12), (3, 3), 1, 1)
    assert causal.tolist() == pytest.approx([1 - 5 / 12])


@pytest.mark.end_to_end
@pytest.mark.parametrize("size", FURTHER)
def test_further_names_have_the_shape_of_timms(size: str) -> None:
    """Without memory: xxlarge has 850 million parameters."""
    source = timm.create_model(f"convnext_{size}", device="meta")
    ours = timm.create_model(f"sgconvnext_{size}_gap3", device="meta")
    want = {key: value.shape for key, value in source.state_dict().items() if ".conv_dw." not in key}
    got = {key: value.shape for key, value in ours.state_dict().items() if ".sgconv." not in key}
    assert got == want
    eps = [{each.eps for each in model.modules() if isinstance(each, nn.LayerNorm)} for model in (ours, source)]
    assert eps[0] == eps[1]


@pytest.mark.parametrize("broken", ["head.fc.weight", "stages.3.blocks.0.mlp.fc2.bias"])
def test_a_network_that_computes_nan_is_refused_and_one_that_computes_zero_is_not(broken: str) -> None:
    source = theirs()
    for name in ("head.fc.weight", "head.fc.bias"):
        nn.init.zeros_(source.get_parameter(name))
    sgconvnext.from_convnext(source)
    with torch.no_grad():
        source.get_parameter(broken).flatten()[0] = float("nan")
    with refused("NaN"):
        sgconvnext.from_convnext(source)
