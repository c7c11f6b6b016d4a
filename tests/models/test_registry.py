"""Arguments that there are not: told what they are, or what was meant."""

import inspect
from typing import Any

import pytest
import timm
import torch
from helpers import SMALL, refused, small_model
from timm.models.convnext import ConvNeXt
from torch import nn

from sgconvnext import SGConvNeXt


@pytest.mark.parametrize(
    ("argument", "value", "told"),
    [
        ("conv_mlp", True, "linear layers"),
        ("kernel_sizes", 7, "as long as its map"),
        ("use_grn", True, "ConvNeXt-V2"),
        ("patch_size", 2, "4x4"),
        ("stem_type", "overlap", "4x4"),
        ("conv_bias", False, "(bias=True)"),
        ("act_layer", "relu", "GELU"),
        ("norm_layer", "batchnorm", "LayerNorm"),
        ("head_norm_first", True, "pools first"),
        ("drop_block_rate", 0.1, "drop_path_rate"),
    ],
)
def test_argument_of_timms_convnext_is_told_to_have_no_meaning_here(argument: str, value: Any, told: str) -> None:
    with refused(f"sgconvnext_tiny has no {argument} ({argument}={value!r}): ", told, "; leave it out"):
        timm.create_model("sgconvnext_tiny", **{argument: value})


def test_every_argument_of_timms_convnext_is_taken_or_told() -> None:
    ours = inspect.signature(SGConvNeXt).parameters
    for argument in inspect.signature(ConvNeXt).parameters.keys() - ours.keys():
        with refused("sgconvnext_atto has no", argument, "leave it out"):
            timm.create_model("sgconvnext_atto", **{argument: 1})


def test_norm_eps_reaches_every_norm() -> None:
    for wanted in (1e-6, 0.125):
        model = small_model(norm_eps=wanted, head_hidden_size=12)
        found = [module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)]
        assert found == [wanted] * (1 + 3 + 4 + 1)  # of the stem, the downsampling, the blocks, the head


def test_head_hidden_size_builds_the_head_of_timms_convnext_large_mlp() -> None:
    small = {key: value for key, value in SMALL.items() if key != "img_size"} | {"head_hidden_size": 12}
    theirs, ours = timm.create_model("convnext_large_mlp", **small), small_model(head_hidden_size=12)
    assert ours.head_hidden_size == theirs.head_hidden_size == 12
    shapes = [{key: value.shape for key, value in model.head.state_dict().items()} for model in (theirs, ours)]
    assert shapes[0] == shapes[1]
    assert shapes[1]["pre_logits.fc.weight"] == (12, 32)
    ours.head.load_state_dict(theirs.head.state_dict())
    features = torch.randn(2, 32, 2, 2)
    assert torch.equal(ours.forward_head(features), theirs.eval().forward_head(features))


def test_misspelt_argument_is_refused_with_a_suggestion() -> None:
    for wrong, meant in {"num_scale": "num_scales", "image_size": "img_size", "bidirectonal": "bidirectional"}.items():
        with refused(f"sgconvnext_atto has no argument {wrong!r} ({wrong}=3); did you mean {meant!r}?"):
            timm.create_model("sgconvnext_atto", **{wrong: 3})
    with refused("sgconvnext_atto has no argument 'colour'", "it takes in_chans, num_classes,", "alpha"):
        timm.create_model("sgconvnext_atto", colour=3)
    with refused("out_indices=(1, 2) is of features_only=True"):
        timm.create_model("sgconvnext_atto", out_indices=(1, 2))


def test_unknown_argument_is_a_type_error_too_as_timm_expects() -> None:
    with pytest.raises(TypeError, match="has no argument 'not_a_model_arg'"):
        timm.create_model("sgconvnext_atto", device="meta", not_a_model_arg=1)
