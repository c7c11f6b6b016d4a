"""The network: ConvNeXt but for the mixer, timm's contract, and the fixed kernel norm through everything users do."""

import copy
import math
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import BACKENDS_HERE, GAP, GATED, mixers, random_gates, refused, relative_error, small_model
from timm.models import create_feature_extractor, group_parameters
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sgconvnext import SGConv, SGConvNeXt
from sgconvnext.longconv import BACKENDS
from sgconvnext.models.block import SGConvNeXtBlock
from sgconvnext.models.kernel import multiscale_kernel
from sgconvnext.models.sgconvnext import SIZES

ROOT = Path(__file__).parents[2]
scripting = pytest.mark.filterwarnings("ignore:.*torch.jit:Warning")


def images(size: tuple[int, int] = (64, 64), channels: int = 3) -> Tensor:
    return torch.randn(2, channels, *size)


@cache
def weightless(name: str) -> nn.Module:
    """A registered model at its full size on the meta device; slow enough to build to be shared. Not to be changed."""
    return timm.create_model(name, device="meta")


def same_weights(**kwargs: Any) -> nn.Module:
    """A small model, initialised from the same seed at every call."""
    torch.manual_seed(1)
    return small_model(**kwargs)


def norms(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if name.endswith(".kernel_norm")}


def assert_same_norms(model: nn.Module, want: dict[str, Tensor]) -> None:
    got = norms(model)
    assert len(got) == len(mixers(model)) == 4
    assert list(got) == list(want)
    assert all(torch.equal(got[name], want[name]) for name in want)


def train_step(model: nn.Module) -> None:
    """One step of gradient descent that moves every kernel by about its own size."""
    model.train()(images()).square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(parameter.grad / (parameter.grad.abs().mean() + 1e-12))
            parameter.grad = None


# The block


@pytest.mark.parametrize("ls_init_value", [0.5, None])
def test_block_computes_its_formula(ls_init_value: float | None) -> None:
    block = SGConvNeXtBlock(6, (5, 4), ls_init_value=ls_init_value)
    norm, fc1, fc2 = block.norm, block.mlp.fc1, block.mlp.fc2
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 6, 5, 4)
    y = block.sgconv(x).movedim(1, -1)
    y = F.gelu(F.linear(F.layer_norm(y, (6,), norm.weight, norm.bias, norm.eps), fc1.weight, fc1.bias))
    y = F.linear(y, fc2.weight, fc2.bias).movedim(-1, 1)
    assert fc1.weight.shape == (24, 6)
    assert norm.eps == 1e-6
    assert relative_error(block(x) - x, (ls_init_value or 1.0) * y) <= 1e-5


def test_block_drops_its_branch_for_whole_samples() -> None:
    block = SGConvNeXtBlock(6, (5, 4), ls_init_value=1.0, drop_path=0.5)
    x = torch.randn(64, 6, 5, 4)
    branch = block.eval()(x) - x
    kept = (block.train()(x) - x).flatten(1).norm(dim=1) > 0
    assert 16 <= int(kept.sum()) <= 48
    torch.manual_seed(3)
    ratio = (block(x) - x).flatten(1).norm(dim=1) / branch.flatten(1).norm(dim=1)
    assert all(value < 1e-6 or abs(value - 2) < 1e-4 for value in ratio.tolist())


# Sizes and names


@pytest.mark.parametrize(
    ("size", "count"), [("tiny", 29_652_712), ("small", 51_847_144), ("base", 90_756_072), ("large", 201_014_248)]
)
def test_parameter_count_is_exact(size: str, count: int) -> None:
    model = weightless(f"sgconvnext_{size}")
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize("size", SIZES)
def test_stages_are_those_of_timms_convnext(size: str) -> None:
    def structure(name: str) -> list[tuple[int, int, int]]:
        model = weightless(name)
        depths = [len(stage.blocks) for stage in model.stages]
        return [(depth, f["num_chs"], f["reduction"]) for depth, f in zip(depths, model.feature_info, strict=True)]

    assert structure(f"sgconvnext_{size}") == structure(f"convnext_{size}")


def test_parameter_names_are_those_of_convnext_but_for_the_mixer() -> None:
    ours = list(weightless("sgconvnext_tiny").state_dict())
    theirs = list(weightless("convnext_tiny").state_dict())
    mixer = {key for key in ours if ".sgconv." in key}
    assert [key for key in ours if key not in mixer] == [key for key in theirs if ".conv_dw." not in key]
    assert mixer == {
        f"stages.{i}.blocks.{j}.sgconv.{name}"
        for i, depth in enumerate((3, 3, 9, 3))
        for j in range(depth)
        for name in ("weight", "skip", "kernel_norm")
    }


def test_convnext_checkpoint_loads_but_for_the_mixer() -> None:
    model = timm.create_model("sgconvnext_tiny", img_size=32)
    checkpoint = timm.create_model("convnext_tiny").state_dict()
    missing, unexpected = model.load_state_dict(checkpoint, strict=False)
    assert len(missing) == 18 * 3
    assert all(".sgconv." in key for key in missing)
    assert len(unexpected) == 18 * 2
    assert all(".conv_dw." in key for key in unexpected)
    assert all(torch.equal(value, checkpoint[key]) for key, value in model.state_dict().items() if key not in missing)


@pytest.mark.parametrize("output_stride", [32, 16, 8])
@pytest.mark.parametrize("size", [(64, 64), (72, 100)], ids=str)
def test_network_is_convnext_but_for_the_mixer(size: tuple[int, int], output_stride: int) -> None:
    sizes = {"depths": (1, 2, 1, 1), "dims": (8, 16, 24, 32), "output_stride": output_stride, "ls_init_value": 0.5}
    theirs = timm.create_model("convnext_tiny", **sizes).eval()
    ours = small_model(num_classes=1000, **sizes)
    ours.load_state_dict(theirs.state_dict(), strict=False)
    x = images(size)
    assert relative_error(ours(x), theirs(x)) >= 1e-3
    for stage, their_stage in zip(ours.stages, theirs.stages, strict=True):
        for block, their_block in zip(stage.blocks, their_stage.blocks, strict=True):
            assert block.sgconv.dilation == their_block.conv_dw.dilation[0]
            block.sgconv, their_block.conv_dw = nn.Identity(), nn.Identity()
    assert relative_error(ours(x), theirs(x)) <= 1e-6


def test_weights_start_as_convnexts() -> None:
    model = small_model(dims=(32, 64, 96, 128), num_classes=1000, ls_init_value=1e-6, head_init_scale=0.5)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            std = 0.01 if name == "head.fc" else 0.02
            assert float(module.weight.detach().std()) == pytest.approx(std, rel=0.1), name
            assert not module.bias.any(), name
        elif isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all(), name
            assert not module.bias.any(), name
        elif isinstance(module, SGConvNeXtBlock):
            assert (module.gamma == 1e-6).all(), name


def test_drop_path_grows_linearly_over_the_blocks() -> None:
    model = small_model(depths=(2, 1, 3, 2), drop_path_rate=0.7)
    got = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert got == pytest.approx(torch.linspace(0, 0.7, 8).tolist())


# Registration


@pytest.mark.end_to_end
def test_import_is_all_it_takes_to_register() -> None:
    code = "import timm, sgconvnext; print(type(timm.create_model('sgconvnext_atto', img_size=32)).__name__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["SGConvNeXt"]


def test_every_size_is_listed_and_only_convnexts_weights_are_claimed() -> None:
    sizes = ("atto", "femto", "pico", "nano", "tiny", "small", "base", "large")
    plain = {f"sgconvnext_{size}" for size in sizes}
    gap3 = {f"sgconvnext_{size}_gap3" for size in (*sizes, "large_mlp", "xlarge", "xxlarge")}
    gated = {f"sgconvnext_{size}_gated" for size in sizes}
    assert set(timm.list_models("sgconvnext*")) == plain | gap3 | gated
    assert {name.partition(".")[0] for name in timm.list_pretrained("sgconvnext*")} == gap3  # ConvNeXt's


def test_default_configuration_names_modules_that_exist() -> None:
    model = small_model()
    config = model.pretrained_cfg
    assert config["input_size"] == (3, 224, 224)
    assert isinstance(model.get_submodule(config["first_conv"]), nn.Conv2d)
    assert model.get_submodule(config["classifier"]) is model.get_classifier()


@pytest.mark.parametrize("size", [*SIZES, "atto_gated"])
def test_pretrained_is_refused_while_no_weights_exist(size: str) -> None:
    with refused(f"sgconvnext_{size}", "pretrained=False", "pretrained_cfg_overlay"):
        timm.create_model(f"sgconvnext_{size}", pretrained=True, device="meta")


def test_own_weights_are_loaded_from_a_file(tmp_path: Path) -> None:
    torch.manual_seed(1)
    saved, path = small_model(), tmp_path / "weights.pth"
    torch.save(saved.state_dict(), path)
    torch.manual_seed(2)
    loaded = small_model(pretrained=True, pretrained_cfg_overlay={"file": str(path), "num_classes": 10})
    torch.manual_seed(2)
    x = images()
    assert not torch.equal(small_model()(x), saved(x))
    assert torch.equal(loaded(x), saved(x))
    assert_same_norms(loaded, norms(saved))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_scalse": 3}, ["no argument 'num_scalse'", "did you mean 'num_scales'?"]),
        ({"scale_dim": 8}, ["no scale_dim", "use num_scales"]),
        ({"sgconv": 3}, ["no argument 'sgconv'"]),
        ({"dilation": 2}, ["no argument 'dilation'", "it takes in_chans, num_classes,"]),
        ({"act_layer": "relu"}, ["no act_layer", "always GELU"]),
    ],
    ids=str,
)
def test_unknown_argument_is_refused_however_the_model_is_built(options: dict[str, Any], words: list[str]) -> None:
    with refused("SGConvNeXt has", *words):
        SGConvNeXt(**options)
    with refused("sgconvnext_atto has", *words):
        small_model(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"img_size": 31}, ["31x31", "32x32"]),
        ({"img_size": (64,)}, ["img_size=(64,)", "a pair"]),
        ({"img_size": "224"}, ["img_size='224'", "whole number"]),
        ({"img_size": (64, 16)}, ["64x16", "32x32"]),
        ({"img_size": (0, 64)}, ["0x64", "32x32"]),
        ({"output_stride": 4}, ["output_stride=4", "8, 16 or 32"]),
        ({"depths": (1, 1, 1)}, ["depths=(1, 1, 1)", "four"]),
        ({"dims": (8, 16, 24, 32, 40)}, ["(8, 16, 24, 32, 40)", "four"]),
        ({"decay": "linear"}, ["'linear'", "scale", "position"]),
        ({"backend": "cuda"}, ["'cuda'", *BACKENDS]),
        ({"num_scales": 0}, ["num_scales=0", "at least 1"]),
    ],
    ids=str,
)
def test_impossible_model_is_refused(options: dict[str, object], words: list[str]) -> None:
    with refused(*words):
        small_model(**options)


# The norm is fixed at construction


def test_norm_is_in_the_state_dict_and_the_same_after_a_forward() -> None:
    model = small_model()
    before = norms(model)
    for layer in mixers(model):
        want = layer.kernel_norm * layer.kernel().norm(dim=-1, keepdim=True)
        assert relative_error(layer.kernel_norm, want) <= 1e-6
        assert float(layer.kernel_norm.std()) > 0.01  # one per channel and direction
    model(images())
    assert_same_norms(model, before)
    train_step(model)
    model(images((96, 40)))
    assert_same_norms(model, before)


def test_norm_survives_ema() -> None:
    model = small_model()
    before = norms(model)
    ema = ModelEmaV3(model, decay=0.5)
    assert_same_norms(ema.module, before)
    weight = mixers(model)[0].weight.detach().clone()
    for _ in range(3):
        train_step(model)
        ema.update(model)
    assert_same_norms(ema.module, before)
    averaged = mixers(ema.module)[0].weight
    assert relative_error(averaged, weight) > 0.01
    assert relative_error(averaged, mixers(model)[0].weight) > 0.01


@pytest.fixture
def _process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_process_group")
def test_norm_survives_distributed_training() -> None:
    model = small_model()
    before = norms(model)
    parallel = nn.parallel.DistributedDataParallel(model)
    for _ in range(2):  # a second step fails if some parameter got no gradient in the first
        train_step(parallel)
    assert_same_norms(model, before)
    x = images()
    assert torch.equal(parallel.eval()(x), model(x))


@pytest.mark.parametrize("options", [{}, GAP], ids=str)
def test_init_weights_completes_a_model_from_the_meta_device(options: dict[str, Any]) -> None:
    model = small_model(device="meta", ls_init_value=0.25, **options)
    assert all(value.is_meta for value in model.state_dict().values())
    model.to_empty(device="cpu")
    for value in model.state_dict().values():
        value.fill_(float("nan"))
    model.init_weights()
    assert all(value.isfinite().all() for value in model.state_dict().values())
    for layer in mixers(model):
        length = layer.kernel().norm(dim=-1)
        assert relative_error(length, torch.ones_like(length)) <= 1e-6
    assert all((block.gamma == 0.25).all() for stage in model.stages for block in stage.blocks)
    assert model(images()).isfinite().all()


@pytest.mark.filterwarnings("ignore:DTensor random operators")
@pytest.mark.usefixtures("_process_group")
@pytest.mark.parametrize("options", [{}, GAP], ids=str)
def test_init_weights_completes_a_model_that_is_sharded_on_the_meta_device(options: dict[str, Any]) -> None:
    model = small_model(device="meta", **options)
    mesh = init_device_mesh("cpu", (1,))
    for stage in model.stages:
        for block in stage.blocks:
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh).to_empty(device="cpu")
    for value in model.state_dict().values():
        value.fill_(float("nan"))
    model.init_weights()
    for layer in mixers(model):
        whole = layer.weight.full_tensor()
        assert 0.5 < whole.std() < 1.5
        kernel = multiscale_kernel(whole, layer.length, layer.options) / layer.kernel_norm
        assert relative_error(kernel.norm(dim=-1), torch.ones_like(kernel[..., 0])) <= 1e-6
    model.train()(images()).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.usefixtures("_process_group")
def test_cosine_init_fills_a_sharded_layer() -> None:
    layer = SGConv(6, 16, scale_dim=4, init="cosine")
    fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
    with torch.no_grad():
        layer.weight.zero_()
    layer.reset_parameters()
    assert (layer.weight.full_tensor()[..., 0] == 1).all()  # cos 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_model_is_close_to_float32(dtype: torch.dtype) -> None:
    model, x = small_model(), images()
    want = model(x)
    half = copy.deepcopy(model).half() if dtype == torch.float16 else copy.deepcopy(model).bfloat16()
    got = half(x.to(dtype))
    assert got.dtype == dtype
    assert got.isfinite().all()
    assert relative_error(got, want) <= 0.03
    for layer, exact in zip(mixers(half), mixers(model), strict=True):
        assert relative_error(layer.kernel_norm, exact.kernel_norm) <= 0.005


def test_model_is_built_in_the_dtype_it_is_asked_for() -> None:
    model = small_model(dtype=torch.bfloat16)
    assert {value.dtype for value in model.state_dict().values()} == {torch.bfloat16}
    model.reset_classifier(7)
    assert model(images().bfloat16()).dtype == torch.bfloat16


def test_every_parameter_gets_a_gradient() -> None:
    model = small_model()
    model(images()).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


# Image sizes


def test_kernels_are_built_for_the_image_size() -> None:
    model = small_model(img_size=(64, 96))
    assert [layer.input_size for layer in mixers(model)] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert [layer.weight.shape[-1] for layer in mixers(model)] == [24, 6, 2, 1]
    shapes = [tuple(x.shape[2:]) for x in model.forward_intermediates(images((64, 96)), intermediates_only=True)]
    assert shapes == [layer.input_size for layer in mixers(model)]


@pytest.mark.parametrize("size", [(32, 32), (96, 64), (33, 47), (64, 200)], ids=str)
def test_model_takes_any_image_of_32_pixels_or_more(size: tuple[int, int]) -> None:
    model, x = small_model(), images(size)
    y = model(x)
    assert y.shape == (2, 10)
    assert y.isfinite().all()
    y.sum().backward()
    for backend in BACKENDS_HERE:
        for layer in mixers(model):
            layer.backend = backend
        assert relative_error(model(x), y) <= 1e-5


def test_set_input_size_makes_the_shapes_of_a_model_built_for_it() -> None:
    model = small_model()
    x = images((96, 64))
    before = model(x)
    model.set_input_size((96, 64))
    built = small_model(img_size=(96, 64))
    assert [tuple(v.shape) for v in model.state_dict().values()] == [
        tuple(v.shape) for v in built.state_dict().values()
    ]
    assert [layer.input_size for layer in mixers(model)] == [layer.input_size for layer in mixers(built)]
    for layer in mixers(model):
        length = layer.kernel().norm(dim=-1)
        assert relative_error(length, torch.ones_like(length)) <= 1e-6
    assert relative_error(model(x), before) > 1e-3
    with refused("16x64", "32x32"):
        model.set_input_size((16, 64))


@pytest.mark.parametrize("size", [(31, 64), (64, 31), (8, 8)], ids=str)
def test_image_below_32_pixels_is_refused(size: tuple[int, int]) -> None:
    model = small_model()
    words = f"{size[0]}x{size[1]}", "32x32"
    with refused(*words):
        model(images(size))
    with refused(*words):
        model.forward_features(images(size))
    with refused(*words):
        model.forward_intermediates(images(size))


@pytest.mark.parametrize("shape", [(2, 1, 64, 64), (2, 4, 64, 64), (3, 64, 64), (2, 64, 64, 3)], ids=str)
def test_image_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with refused(*map(str, shape), "(B, 3, H, W)"):
        small_model()(torch.zeros(shape))


@pytest.mark.parametrize("in_chans", [1, 5])
def test_model_takes_other_numbers_of_channels(in_chans: int) -> None:
    model = small_model(in_chans=in_chans)
    assert model(images(channels=in_chans)).shape == (2, 10)
    with refused(f"(B, {in_chans}, H, W)"):
        model(images())


# Heads and features


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"num_classes": 0}, (2, 32)),
        ({"global_pool": ""}, (2, 10, 2, 2)),
        ({"num_classes": 0, "global_pool": ""}, (2, 32, 2, 2)),
        ({"global_pool": "max"}, (2, 10)),
    ],
    ids=str,
)
def test_head_can_be_left_out(options: dict[str, Any], shape: tuple[int, ...]) -> None:
    x = images()
    model = same_weights(**options)
    assert model(x).shape == shape
    other = same_weights()
    other.reset_classifier(**{"num_classes": 10} | options)
    assert other(x).shape == shape
    features = model.forward_features(x)
    assert features.shape == (2, 32, 2, 2)
    assert torch.equal(model.forward_head(features), model(x))


def test_head_is_pool_then_norm_then_linear() -> None:
    model, x = small_model(), images()
    nn.init.normal_(model.head.norm.weight)
    features = model.forward_features(x)
    norm, fc = model.head.norm, model.get_classifier()
    pooled = F.layer_norm(features.mean((2, 3)), (32,), norm.weight, norm.bias, norm.eps)
    assert relative_error(model.forward_head(features, pre_logits=True), pooled) <= 1e-6
    assert relative_error(model(x), F.linear(pooled, fc.weight, fc.bias)) <= 1e-6
    assert model.num_features == model.head_hidden_size == 32


def test_intermediates_are_the_stages_outputs() -> None:
    model, x = small_model(), images()
    outputs: list[Tensor] = []
    hooks = [stage.register_forward_hook(lambda *args: outputs.append(args[-1])) for stage in model.stages]
    model(x)
    for hook in hooks:
        hook.remove()
    assert [tuple(y.shape) for y in outputs] == [(2, 8, 16, 16), (2, 16, 8, 8), (2, 24, 4, 4), (2, 32, 2, 2)]

    final, every = model.forward_intermediates(x)
    assert torch.equal(final, outputs[3])
    assert torch.equal(final, model.forward_features(x))
    for indices, stages in ((None, [0, 1, 2, 3]), (2, [2, 3]), ([0, 2], [0, 2]), ([-3], [1])):
        for stop_early in (False, True):
            got = model.forward_intermediates(x, indices, stop_early=stop_early, intermediates_only=True)
            assert len(got) == len(stages)
            assert all(torch.equal(y, outputs[stage]) for y, stage in zip(got, stages, strict=True))
    stopped, _ = model.forward_intermediates(x, [0, 1], stop_early=True)
    assert torch.equal(stopped, outputs[1])
    assert len(every) == 4
    with refused("'NHWC'", "'NCHW'"):
        model.forward_intermediates(x, output_fmt="NHWC")


@pytest.mark.parametrize("feature_cls", ["list", "fx", "getter", "hook"])
@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (1, 3), (2,), (-2, -1)], ids=str)
def test_features_only_gives_the_stages_asked_for(out_indices: tuple[int, ...], feature_cls: str) -> None:
    x = images()
    want = same_weights().forward_intermediates(x, list(out_indices), intermediates_only=True)
    model = same_weights(features_only=True, out_indices=out_indices, feature_cls=feature_cls)
    got = model(x)
    assert len(got) == len(want)
    assert all(torch.equal(y, intermediate) for y, intermediate in zip(got, want, strict=True))
    assert model.feature_info.channels() == [y.shape[1] for y in want]
    assert model.feature_info.reduction() == [64 // y.shape[2] for y in want]


@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_output_stride_trades_stride_for_dilation(output_stride: int) -> None:
    model = small_model(output_stride=output_stride)
    model.load_state_dict(small_model().state_dict())  # strictly: the parameters are the same
    reductions = [min(stride, output_stride) for stride in (4, 8, 16, 32)]
    shapes = [y.shape[2:] for y in model.forward_intermediates(images(), intermediates_only=True)]
    assert shapes == [(64 // reduction,) * 2 for reduction in reductions]
    assert [info["reduction"] for info in model.feature_info] == reductions
    assert [layer.dilation for layer in mixers(model)] == [
        stride // reduction for stride, reduction in zip((4, 8, 16, 32), reductions, strict=True)
    ]
    assert model(images((96, 64))).isfinite().all()


@pytest.mark.parametrize("indices", [1, [0, 1], [2], [0]], ids=str)
def test_pruned_model_gives_the_last_stage_kept(indices: int | list[int]) -> None:
    model, x = small_model(), images()
    want = model.forward_intermediates(x, intermediates_only=True)
    kept = model.prune_intermediate_layers(indices)
    assert kept == ([3] if indices == 1 else indices)
    assert len(model.stages) == kept[-1] + 1
    assert torch.equal(model.forward_features(x), want[kept[-1]])
    assert torch.equal(model(x), want[kept[-1]])
    assert model.num_features == model.head_hidden_size == want[kept[-1]].shape[1]
    model.reset_classifier(5, "avg")
    assert model(x).shape == (2, 5)


def test_pruning_can_keep_the_head() -> None:
    model, x = small_model(), images()
    want = model(x)
    model.prune_intermediate_layers([1, 3], prune_head=False)
    assert torch.equal(model(x), want)


@pytest.mark.parametrize("options", [{}, GAP], ids=str)
def test_gradient_checkpointing_changes_neither_outputs_nor_gradients(options: dict[str, Any]) -> None:
    x = images()
    results = []
    for enable in (False, True):
        model = same_weights(depths=(2, 1, 1, 1), **options).train()
        model.set_grad_checkpointing(enable)
        calls: list[nn.Module] = []
        for layer in mixers(model):
            layer.register_forward_hook(lambda module, *_, calls=calls: calls.append(module))
        y = model(x)
        y.square().sum().backward()
        assert len(calls) == (10 if enable else 5)  # recomputed in backward
        results.append([y, *(parameter.grad for parameter in model.parameters())])
    assert all(torch.equal(got, want) for got, want in zip(*results, strict=True))


def test_fx_extracts_features() -> None:
    model, x = small_model(), images()
    nodes = {"stages.1": "map", "stages.2.blocks.0.sgconv": "mixer", "head.fc": "logits"}
    out = create_feature_extractor(model, nodes)(x)
    assert torch.equal(out["map"], model.forward_intermediates(x, [1], intermediates_only=True)[0])
    assert out["mixer"].shape == (2, 24, 4, 4)
    assert torch.equal(out["logits"], model(x))


@scripting
@pytest.mark.parametrize(
    "options", [{}, {"output_stride": 16}, {"bidirectional": False, "ls_init_value": None}, GAP], ids=str
)
def test_scripted_model_equals_eager(options: dict[str, Any]) -> None:
    model = small_model(**options)
    scripted = torch.jit.script(model)
    for size in ((64, 64), (40, 100)):
        x = images(size)
        assert relative_error(scripted(x), model(x)) <= 1e-5
    with pytest.raises(torch.jit.Error, match="at least 32x32"):
        scripted(images((16, 64)))


def test_model_compiles_without_a_graph_break() -> None:
    torch.compiler.reset()
    model, x = random_gates(small_model(**GATED)), images()
    y = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    assert relative_error(y, model(x)) <= 1e-5
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("strict", "options"),
    [(False, {}), (True, GAP), pytest.param(True, GATED, marks=pytest.mark.end_to_end)],
    ids=str,
)
def test_model_exports(strict: bool, options: dict[str, Any]) -> None:
    model, x = random_gates(small_model(**options)), images()
    exported = torch.export.export(model, (x,), strict=strict).module()
    assert relative_error(exported(x), model(x)) <= 1e-5


@pytest.mark.parametrize("coarse", [False, True])
def test_parameters_are_grouped_as_convnexts_are(coarse: bool) -> None:
    ours, theirs = small_model(depths=(1, 2, 3, 1)), timm.create_model("convnext_atto", depths=(1, 2, 3, 1))

    def groups(model: nn.Module) -> list[list[str]]:
        found = group_parameters(model, model.group_matcher(coarse))
        return [
            [name for name in names if name.split(".")[-2] not in ("conv_dw", "sgconv")] for names in found.values()
        ]

    assert groups(ours) == groups(theirs)
    found = group_parameters(ours, ours.group_matcher(coarse), reverse=True)
    assert set(found) == {name for name, _ in ours.named_parameters()}
    assert all(found[name] == found[name.replace("sgconv.weight", "norm.weight")] for name in found)


# Golden numbers


def fill_by_formula(model: nn.Module) -> None:
    """Every parameter and the kernel norms from the sine of the squared flat index: no random numbers."""
    for i, (name, value) in enumerate(model.state_dict().items()):
        wave = torch.sin(0.37 * torch.arange(value.numel(), dtype=torch.float64) ** 2 + i).view(value.shape)
        if name.endswith("kernel_norm"):
            wave = 2 + wave
        elif value.ndim == 1 and name.endswith((".weight", ".gamma")):  # LN and layer scale
            wave = 1 + 0.1 * wave
        elif value.ndim > 1 and ".sgconv." not in name:
            wave = wave * math.sqrt(2 / value[0].numel())
        value.copy_(wave)


GOLDEN = {  # made in float64 with backend="reference"
    (64, 64): [0.97428249, -1.8574262, 2.1472577, 1.3707531, -0.77477896],
    (48, 80): [
        1.1192677,
        -1.958622,
        2.1978049,
        1.4773157,
        -0.85539341,
    ],  # pins what happens to the taps at another size
}


@pytest.mark.parametrize("backend", ["auto", *BACKENDS_HERE])
@pytest.mark.parametrize("size", GOLDEN, ids=str)
def test_logits_are_the_golden_ones(size: tuple[int, int], backend: str) -> None:
    model = small_model(depths=(1, 1, 2, 1), dims=(4, 8, 12, 16), num_classes=5, backend=backend)
    fill_by_formula(model)
    x = torch.sin(0.01 * torch.arange(3 * size[0] * size[1], dtype=torch.float64) ** 1.5).float().view(1, 3, *size)
    assert relative_error(model(x)[0], torch.tensor(GOLDEN[size])) <= 1e-5
