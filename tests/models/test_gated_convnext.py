"""The gated ConvNeXt: with closed gates it is timm's own with narrower MLPs, and timm treats it as its own."""

import math
from typing import Any

import pytest
import timm
import torch
from helpers import SMALL, random_gates, relative_error
from timm.layers import GlobalResponseNormMlp, Mlp
from torch import Tensor, nn

from sgconvnext.models.gate import Gate
from sgconvnext.profile.flops import CONVOLUTION, GATE, KERNEL, MLP, OTHER, count

NARROW = {key: value for key, value in SMALL.items() if key != "img_size"} | {"ls_init_value": 0.5}


def gated(name: str = "convnext_atto_gated", **kwargs: Any) -> Any:
    return random_gates(timm.create_model(name, **(NARROW | kwargs))).eval()


def images(*size: int, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, *(size or (64, 64)))


def gates(model: nn.Module) -> list[Gate]:
    return [module for module in model.modules() if isinstance(module, Gate)]


def ungated(model: Any, **kwargs: Any) -> Any:
    """timm's ConvNeXt with the MLPs and all other weights of a gated one."""
    other = timm.create_model("convnext_atto", **({"conv_mlp": False} | NARROW | kwargs))
    for stage, theirs in zip(other.stages, model.stages, strict=True):
        for block, source in zip(stage.blocks, theirs.blocks, strict=True):
            assert source.mlp.fc1.weight.shape[:2] == (
                int(3.5 * block.conv_dw.out_channels),
                block.conv_dw.out_channels,
            )
            block.mlp = source.mlp
    state = {key.replace("conv_dw.conv", "conv_dw"): value for key, value in model.state_dict().items()}
    other.load_state_dict({key: value for key, value in state.items() if ".gate." not in key})
    return other.eval()


@pytest.mark.parametrize("kwargs", [{}, {"conv_mlp": True}, {"output_stride": 8}, {"in_chans": 5}], ids=str)
def test_with_closed_gates_it_is_timms_convnext(kwargs: dict[str, Any]) -> None:
    model, x = gated(**kwargs), images(channels=kwargs.get("in_chans", 3))
    opened = model(x)
    want = ungated(model, **kwargs)(x)
    assert relative_error(opened, want) > 1e-3
    for gate in gates(model):
        gate.reset_parameters()
    assert relative_error(model(x), want) <= 1e-6


def test_gate_works_on_what_the_7x7_sees() -> None:
    block = gated().double().stages[1].blocks[0]
    x, gate = torch.randn(2, 16, 5, 4, dtype=torch.float64), block.conv_dw.gate
    y = torch.conv2d(x, block.conv_dw.conv.weight, block.conv_dw.conv.bias, padding=3, groups=16)
    normed = (x - x.mean(1, keepdim=True)) / (x.var(1, False, keepdim=True) + 1e-6).sqrt()
    factor = 1 + torch.einsum("bihw,oi->bohw", normed, gate.linear.weight) + gate.linear.bias[:, None, None]
    assert relative_error(block.conv_dw(x), y * factor) <= 1e-9


def test_gates_are_zero_at_first_and_every_other_weight_is_as_in_timm() -> None:
    torch.manual_seed(0)
    model = timm.create_model("convnext_atto_gated")
    assert len(gates(model)) == 12
    assert not any(parameter.any() for gate in gates(model) for parameter in gate.parameters())
    for stage in model.stages:
        for block in stage.blocks:
            for layer in (block.mlp.fc1, block.mlp.fc2):
                assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
                assert not layer.bias.any()


def test_it_costs_what_timms_convnext_costs() -> None:
    plain, model = (count(timm.create_model(f"convnext_atto{end}"), images()) for end in ("", "_gated"))
    assert model.total().parameters == pytest.approx(plain.total().parameters, rel=5e-3)
    assert model.total().macs == pytest.approx(plain.total().macs, rel=5e-3)
    assert model.total(part=CONVOLUTION) == plain.total(part=CONVOLUTION)
    assert model.total(part=MLP).macs == plain.total(part=MLP).macs * 3.5 / 4
    blocks = {40: 2, 80: 2, 160: 6, 320: 2}  # by width
    assert model.total(part=GATE).parameters == sum(depth * (c**2 + c) for c, depth in blocks.items())
    assert model.total(part=OTHER).macs == model.total(part=KERNEL).macs == 0
    assert plain.total(part=GATE).macs == 0


def test_gate_costs_the_same_as_in_an_sgconvnext() -> None:
    ours = timm.create_model("sgconvnext_atto_gated", **SMALL)
    got, want = (count(model, images()).total(part=GATE) for model in (gated(), ours))
    assert got == want
    assert got.macs > 0


def test_every_size_is_listed_by_timm() -> None:
    sizes = ("atto", "femto", "pico", "nano", "tiny", "small", "base", "large")
    assert set(timm.list_models("convnext_*_gated")) == {f"convnext_{size}_gated" for size in sizes}
    assert not timm.list_pretrained("convnext_*_gated")


def test_there_are_no_weights_and_timm_says_so() -> None:
    with pytest.raises(
        RuntimeError, match=r"^No pretrained weights exist for convnext_atto_gated\. Use `pretrained=F"
    ):
        timm.create_model("convnext_atto_gated", pretrained=True)


def test_feature_maps_are_those_of_the_stages() -> None:
    model, x = gated(), images(96, 64)
    features = timm.create_model("convnext_atto_gated", features_only=True, out_indices=(1, 3), **NARROW).eval()
    state = {key.replace("stages.", "stages_").replace("stem.", "stem_"): v for key, v in model.state_dict().items()}
    features.load_state_dict({key: state[key] for key in features.state_dict()})
    want = model.forward_intermediates(x, [1, 3], intermediates_only=True)
    assert features.feature_info.channels() == [16, 32]
    for got, wanted in zip(features(x), want, strict=True):
        assert relative_error(got, wanted) <= 1e-6


def test_checkpointed_gradients_are_those_of_the_network() -> None:
    model, x = gated(drop_path_rate=0.3).train(), images()
    parameters, found = [parameter for gate in gates(model) for parameter in gate.parameters()], []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        torch.manual_seed(0)
        found.append(torch.autograd.grad(model(x).square().sum(), parameters))
    for got, want in zip(*found, strict=True):
        assert want.any()
        assert relative_error(got, want) <= 1e-5


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_scripted_and_traced_it_gives_the_same() -> None:
    model, x = gated(), images()
    with torch.no_grad():
        for other in (torch.jit.script(model), torch.jit.trace(model, x), torch.fx.symbolic_trace(model)):
            assert relative_error(other(x), model(x)) <= 1e-6


def test_options_reach_the_gate_and_the_mlp() -> None:
    model = gated(dtype=torch.float64, norm_eps=0.125)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert {gate.eps for gate in gates(model)} == {0.125}
    assert {p.device.type for p in timm.create_model("convnext_atto_gated", device="meta").parameters()} == {"meta"}
    other = gated(use_grn=True, act_layer="relu").stages[0].blocks[0].mlp
    assert (type(other), type(other.act)) == (GlobalResponseNormMlp, nn.ReLU)
    assert (type(model.stages[0].blocks[0].mlp), math.prod(other.fc1.weight.shape)) == (Mlp, 28 * 8)
