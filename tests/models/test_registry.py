"""Arguments that there are not: told what they are, or what was meant."""

import inspect
from typing import Any

import pytest
import timm
from helpers import refused
from timm.models.convnext import ConvNeXt

from sgconvnext import SGConvNeXt


@pytest.mark.parametrize(
    ("argument", "value", "told"),
    [
        ("conv_mlp", True, "linear layers"),
        ("kernel_sizes", 7, "as long as its map"),
        ("use_grn", True, "ConvNeXt-V2"),
        ("patch_size", 2, "4x4"),
        ("stem_type", "overlap", "4x4"),
        ("conv_bias", False, "skip in place of a bias"),
        ("act_layer", "relu", "GELU"),
        ("norm_layer", "batchnorm", "LayerNorm"),
        ("norm_eps", 1e-5, "1e-6"),
        ("head_norm_first", True, "pools first"),
        ("head_hidden_size", 64, "one linear layer"),
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
