"""timm's doors for weights: resized for another img_size, checked key by key, rebuilt at the size they had."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import GAP, SMALL, mixers, refused, relative_error
from timm.models import save_for_hf

BUILT = {key: value for key, value in SMALL.items() if key != "img_size"} | {"ls_init_value": 0.5}


def built(size: Any, name: str = "sgconvnext_atto", **kwargs: Any) -> Any:
    """Weights as after training: none at its initial value, so that the norm is no longer the kernels' own."""
    torch.manual_seed(1)
    model = timm.create_model(name, img_size=size, **(BUILT | kwargs)).eval()
    for name, parameter in model.named_parameters():
        if not name.endswith("gamma"):  # 0.5: at its initial 1e-6 nobody sees what a block computes
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def from_file(path: Path, overlay: dict[str, Any] | None = None, name: str = "sgconvnext_atto", **kwargs: Any) -> Any:
    cfg = {"file": str(path), "num_classes": 10} | (overlay or {})
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=cfg, **({**BUILT} | kwargs)).eval()


def assert_same(got: Any, want: Any, size: tuple[int, int] = (96, 64)) -> None:
    assert [mixer.input_size for mixer in mixers(got)] == [mixer.input_size for mixer in mixers(want)]
    for key, tensor in want.state_dict().items():
        assert relative_error(got.state_dict()[key], tensor) <= 1e-6, key
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        assert relative_error(got(images), want(images)) <= 1e-5


def kept(model: Any, tmp_path: Path) -> Path:
    torch.save({"state_dict": model.state_dict()}, tmp_path / "a.pth")
    return tmp_path / "a.pth"


def saved(model: Any, tmp_path: Path) -> str:
    save_for_hf(model, str(tmp_path / "folder"), safe_serialization=True)
    return f"local-dir:{tmp_path / 'folder'}"


KINDS = [{}, {"bidirectional": False}, {"alpha": (1.0, 0.25)}, {"decay": "position"}, {"num_scales": 3}, GAP]


@pytest.mark.parametrize("kwargs", KINDS, ids=str)
@pytest.mark.parametrize("size", [96, 256, (64, 96)], ids=str)
def test_file_built_at_224_is_resized_as_the_model_would_resize_itself(
    size: Any, kwargs: dict[str, Any], tmp_path: Path
) -> None:
    want = built(224, **kwargs)
    got = from_file(kept(want, tmp_path), img_size=size, **kwargs)
    want.set_input_size(size)
    assert_same(got, want)


@pytest.mark.parametrize(
    ("before", "after"), [(64, 96), (96, 64), ((64, 96), 224), (32, 224), (96, (32, 256))], ids=str
)
def test_folder_tells_the_size_that_its_weights_were_built_at(before: Any, after: Any, tmp_path: Path) -> None:
    want = built(before)
    got = timm.create_model(saved(want, tmp_path), pretrained=True, img_size=after).eval()
    want.set_input_size(after)
    assert_same(got, want)


def test_size_that_the_taps_do_not_tell_is_asked_for(tmp_path: Path) -> None:
    want = built(96)
    path = kept(want, tmp_path)
    with refused("sgconvnext_atto: the pretrained file", "6 sizes go with their 36/9/3/1 taps", "(3, 96, 96)"):
        from_file(path, img_size=64)
    got = from_file(path, {"input_size": (3, 96, 96)}, img_size=64)
    want.set_input_size(64)
    assert_same(got, want)


def test_size_that_the_taps_tell_is_found(tmp_path: Path) -> None:
    want = built(288)
    got = from_file(kept(want, tmp_path), img_size=64)
    want.set_input_size(64)
    assert_same(got, want)


@pytest.mark.parametrize(
    ("before", "after", "sizes"),
    [(224, 64, 1), ((64, 96), 64, 10), (128, (64, 96), 1), (160, 96, 2), ((96, 64), 64, 3)],
    ids=str,
)
def test_built_size_of_a_model_with_gaps_is_found_or_asked_for(
    before: Any, after: Any, sizes: int, tmp_path: Path
) -> None:
    """Where a map is small, its width alone gives the taps; sizes of another height then are no others to them."""
    want, told = built(before, "sgconvnext_atto_gap3"), {}
    path = kept(want, tmp_path)
    if sizes > 1:
        example = {160: "160, 160", (64, 96): "96, 96"}.get(before, "H, W")
        with refused("sgconvnext_atto_gap3: the pretrained file", f"{sizes} sizes go with their", f"(3, {example})"):
            from_file(path, name="sgconvnext_atto_gap3", img_size=after)
        told = {"input_size": (3, *(before if isinstance(before, tuple) else (before, before)))}
    got = from_file(path, told, "sgconvnext_atto_gap3", img_size=after)
    want.set_input_size(after)
    assert_same(got, want)


def test_folder_of_a_model_with_gaps_tells_its_size(tmp_path: Path) -> None:
    want = built((64, 96), "sgconvnext_atto_gap3")
    want.set_input_size((96, 80))
    got = timm.create_model(saved(want, tmp_path), pretrained=True, img_size=128).eval()
    want.set_input_size(128)
    assert_same(got, want)


def test_gaps_and_none_are_told_apart(tmp_path: Path) -> None:
    with refused("with a bias in its mixers", "_gap3", "bias=True"):
        from_file(kept(built(64, "sgconvnext_atto_gap3"), tmp_path), img_size=64)
    with refused("without a bias in its mixers", "bias=False"):
        from_file(kept(built(64), tmp_path), name="sgconvnext_atto_gap3", img_size=64)


def test_sizes_with_equally_many_tokens_are_one() -> None:
    """Why it is enough to know the tokens of each stage: the rule stretches along the flattened map."""
    square, wide = built(128), built((64, 256))
    wide.load_state_dict(square.state_dict())
    for model in (square, wide):
        model.set_input_size(96)
    assert_same(square, wide)


def test_kernels_are_scaled_where_only_the_tokens_differ(tmp_path: Path) -> None:
    """256 tokens and 255 have as many parameters, but kernels of other lengths, and so of other norms."""
    want = built(64)
    norm = mixers(want)[0].kernel_norm.clone()
    got = timm.create_model(saved(want, tmp_path), pretrained=True, img_size=(60, 68)).eval()
    assert torch.equal(mixers(got)[0].weight, mixers(want)[0].weight)
    want.set_input_size((60, 68))
    assert not torch.equal(mixers(want)[0].kernel_norm, norm)
    assert_same(got, want)


@pytest.mark.parametrize("wrap", [dict, lambda s: {"model": s}, lambda s: {f"module.{k}": v for k, v in s.items()}])
def test_resizing_is_the_same_whatever_the_layout_of_the_file(wrap: Callable[[Any], Any], tmp_path: Path) -> None:
    want = built(224)
    torch.save(wrap(want.state_dict()), tmp_path / "a.pth")
    got = from_file(tmp_path / "a.pth", img_size=96)
    want.set_input_size(96)
    assert_same(got, want)


def test_features_are_resized_too(tmp_path: Path) -> None:
    want = built(224)
    got = from_file(kept(want, tmp_path), img_size=96, features_only=True, output_stride=16)
    want.set_input_size(96)
    assert (
        relative_error(got(torch.ones(1, 3, 96, 96))[0], want.forward_intermediates(torch.ones(1, 3, 96, 96))[1][0])
        <= 1e-5
    )


def test_weights_in_half_precision_are_resized_in_the_models(tmp_path: Path) -> None:
    half = built(224).half()
    got = from_file(kept(half, tmp_path), img_size=96)
    want = half.float()
    want.set_input_size(96)
    assert_same(got, want)


def test_resizing_draws_no_random_number(tmp_path: Path) -> None:
    path = kept(built(224), tmp_path)
    states = []
    for pretrained in (False, True):
        torch.manual_seed(0)
        cfg = {"file": str(path), "num_classes": 10}
        timm.create_model("sgconvnext_atto", pretrained=pretrained, pretrained_cfg_overlay=cfg, img_size=96, **BUILT)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


# ---- what timm would load without a word


def test_classifier_of_which_the_configuration_does_not_know_is_not_dropped_in_silence(tmp_path: Path) -> None:
    path = kept(built(64), tmp_path)
    with refused("of 10 classes", "pretrained_cfg says 1000", "add 'num_classes': 10 to pretrained_cfg_overlay"):
        from_file(path, {"num_classes": 1000}, img_size=64)
    assert torch.equal(from_file(path, img_size=64).head.fc.weight, built(64).head.fc.weight)
    assert from_file(path, {"num_classes": 1000}, img_size=64, num_classes=0)  # it needs none


def test_weights_of_another_model_are_refused_though_the_classifier_is_new(tmp_path: Path) -> None:
    convnext = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), num_classes=10)
    with refused("sgconvnext_atto: the pretrained file is of a ConvNeXt"):
        from_file(kept(convnext, tmp_path), img_size=64, num_classes=7)
    with refused("sgconvnext_atto: the pretrained file is of another size", "dims [8, 16, 24, 40]"):
        from_file(kept(built(64, dims=(8, 16, 24, 40)), tmp_path), img_size=64, num_classes=7)
    partial = {key: value for key, value in built(64).state_dict().items() if "sgconv" not in key}
    torch.save(partial, tmp_path / "partial.pth")
    with refused("keys 12 missing (stages.0.blocks.0.sgconv.weight"):
        from_file(tmp_path / "partial.pth", img_size=64, num_classes=7)


def test_keys_may_be_missing_where_that_is_asked_for(tmp_path: Path) -> None:
    state = built(224).state_dict()
    del state["head.norm.bias"]
    torch.save(state, tmp_path / "a.pth")
    got = from_file(tmp_path / "a.pth", img_size=96, pretrained_strict=False)
    assert not got.head.norm.bias.any()
    want = built(224)
    want.set_input_size(96)
    assert torch.equal(mixers(got)[0].weight, mixers(want)[0].weight)
    with refused("keys 1 missing (head.norm.bias)"):
        from_file(tmp_path / "a.pth", img_size=96)


def test_new_classifier_and_other_channels_are_still_timms(tmp_path: Path) -> None:
    want = built(224)
    got = from_file(kept(want, tmp_path), img_size=96, num_classes=7, in_chans=1)
    assert got.head.fc.out_features == 7
    assert relative_error(got.stem[0].weight, want.stem[0].weight.sum(1, keepdim=True)) <= 1e-6
    want.set_input_size(96)
    assert torch.equal(got.stages[0].blocks[0].sgconv.weight, want.stages[0].blocks[0].sgconv.weight)


def test_reparameterized_weights_are_told(tmp_path: Path) -> None:
    path = kept(timm.utils.reparameterize_model(built(64)), tmp_path)
    with refused("sgconvnext_atto: the pretrained file is of a reparameterized model"):
        from_file(path, img_size=64)


def test_load_state_dict_and_checkpoint_path_tell_the_sizes_apart(tmp_path: Path) -> None:
    """timm applies no filter here."""
    path = kept(built(64), tmp_path)
    told = r"stages\.0\.blocks\.0\.sgconv: the state dict has 5 scales of 16 taps, the layer 5 of 36: it is of another"
    with pytest.raises(RuntimeError, match=told):
        timm.create_model("sgconvnext_atto", img_size=96, checkpoint_path=path, **BUILT)
    with pytest.raises(RuntimeError, match=told):
        built(96).load_state_dict(built(64).state_dict(), strict=False)


# ---- what timm saves


@pytest.mark.parametrize("size", [96, (64, 96)], ids=str)
def test_saved_model_is_rebuilt_at_its_size(size: Any, tmp_path: Path) -> None:
    model = built(size)
    assert_same(timm.create_model(saved(model, tmp_path), pretrained=True).eval(), model)


@pytest.mark.parametrize("before", [64, None])
def test_resized_model_is_rebuilt_at_its_new_size(before: int | None, tmp_path: Path) -> None:
    model = built(before)
    model.set_input_size((96, 64))
    assert_same(timm.create_model(saved(model, tmp_path), pretrained=True).eval(), model)


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ({}, {"alpha": 0.7}, "trained with alpha=0.5, not (0.7, 0.7); leave alpha out"),
        ({}, {"decay": "position"}, "trained with decay=scale, not position"),
        ({"alpha": (1.0, 0.25)}, {"alpha": 0.5}, "trained with alpha="),
        ({"decay": "position", "exponent": 0.5}, {"exponent": 1.0}, "trained with exponent=0.5, not 1.0"),
    ],
    ids=str,
)
def test_folder_of_another_function_of_the_same_shapes_is_refused(
    before: dict[str, Any], after: dict[str, Any], told: str, tmp_path: Path
) -> None:
    model = built(64, **before)
    name = saved(model, tmp_path)
    assert_same(timm.create_model(name, pretrained=True, **before).eval(), model)
    with refused(told):
        timm.create_model(name, pretrained=True, **after)
