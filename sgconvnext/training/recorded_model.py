"""Which model a checkpoint's weights were trained in: other models of the same shapes may compute something else."""

import argparse
import inspect
import json
from typing import Any, NamedTuple

import timm
from timm.models import split_model_name_tag
from timm.models.convnext import ConvNeXt
from torch import nn

# Arguments that do not change what a trained model computes, or that the shapes of its weights show
UNCOMPARED = {
    *("backend", "ls_init_value", "init_values", "head_init_scale", "weight_init", "fused_attn", "output_stride"),
    *("drop_rate", "drop_path_rate", "drop_block_rate", "img_size", "num_classes", "in_chans", "depths", "dims"),
    "subsample",  # for the same signals at another rate
    *("num_scales", "bidirectional", "depth", "embed_dim", "patch_size", "device", "dtype"),
    *("pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict"),
}
SHARED = {"norm_eps", "global_pool"}  # arguments of ConvNeXt and of SGConvNeXt, which no shape shows
SAME_CONVNEXT = {"conv_mlp", "kernel_sizes"}  # a conversion takes any: 1x1 convolutions are linear layers


class RecordedModel(NamedTuple):
    """Name, arguments and image size that the model was made with."""

    name: str
    arguments: dict[str, Any]
    img_size: Any

    def refuse_another(
        self, model: nn.Module, name: str, arguments: dict[str, Any], path: str, new_head: bool = False
    ) -> None:
        """Refuse a model that would take the weights and compute something else with them.

        Args:
            model: that is to take them.
            name, arguments: that it was made with.
            path: of the checkpoint.
            new_head: the classifier is left out, so that it may see features that are pooled otherwise.

        Raises:
            ValueError: naming what differs, both values and the cure.
        """
        if ":" in name + self.name:  # of a folder or the hub: the arguments are not recorded
            return
        before, now = (split_model_name_tag(each)[0] for each in (self.name, name))
        if self.is_convnext_of(name):
            self.refuse_other_convnext(arguments, path, new_head)
            return
        if before != now:
            other = f" or sg{before}_gap3" if timm.is_model(f"sg{before}_gap3") else ""
            raise ValueError(
                f"checkpoint {path!r} was trained as {self.name}, this model is {name}; "
                f"use model.name={self.name}{other}"
            )
        defaults: dict[str, Any] = {}
        owner: Any
        for owner in reversed(type(model).__mro__):  # a network may hand arguments on to what it is derived from
            defaults |= {key: each.default for key, each in inspect.signature(owner.__init__).parameters.items()}
        defaults |= getattr(model, "kernel_defaults", {})
        uncompared = UNCOMPARED | {"global_pool"} if new_head else UNCOMPARED
        # entry points of timm's own models set arguments, which are not known here
        ours = type(model).__module__.startswith("sgconvnext.")
        keys = self.arguments.keys() | arguments.keys() if ours else self.arguments.keys() & arguments.keys()
        for key in sorted(keys - uncompared):
            then, here = (_plain(given.get(key, defaults.get(key))) for given in (self.arguments, arguments))
            if then != here and not key.endswith("_drop_rate"):
                raise _another_value(path, key, then, here, f"use model.kwargs={{{key}: {then}}}")

    def is_convnext_of(self, name: str) -> bool:
        """Whether the checkpoint is of the ConvNeXt whose weights the model of that name converts."""
        before, now = (split_model_name_tag(each)[0] for each in (self.name, name))
        return now == f"sg{before}_gap3"

    def refuse_other_convnext(self, arguments: dict[str, Any], path: str, new_head: bool = False) -> None:
        """Refuse a ConvNeXt whose arguments make it compute something else than the SGConvNeXt of its weights.

        Args:
            arguments: of the SGConvNeXt.
            path, new_head: as for `refuse_another`.

        Raises:
            ValueError: naming what differs, both values and the cure.
        """
        defaults = {key: each.default for key, each in inspect.signature(ConvNeXt.__init__).parameters.items()}
        uncompared = UNCOMPARED | SAME_CONVNEXT | ({"global_pool"} if new_head else set())
        for key in sorted((self.arguments.keys() & defaults.keys() | SHARED) - uncompared):
            then = _plain(self.arguments.get(key, defaults[key]))
            here = _plain(arguments.get(key, defaults[key]) if key in SHARED else defaults[key])
            if then == here:
                continue
            cure = "no SGConvNeXt computes the same"
            if key in SHARED:
                cure = f"use model.kwargs={{{key}: {then}}}" if key in self.arguments else f"leave {key} out"
            raise _another_value(path, key, then, here, cure)


def _another_value(path: str, key: str, then: Any, here: Any, cure: str) -> ValueError:
    return ValueError(
        f"checkpoint {path!r} was trained with {key}={then}, this model has {key}={here}, which would compute "
        f"something else with the same weights; {cure}"
    )


def recorded_model(state: dict[str, Any]) -> RecordedModel | None:
    """What a checkpoint of train.py or timm, or an exported file, says of its model; None for weights alone."""
    args = state.get("args")
    if isinstance(args, dict) and isinstance(args.get("model"), dict):
        model = args["model"]
        return RecordedModel(str(model.get("name", "")), model.get("kwargs") or {}, model.get("img_size"))
    if isinstance(args, argparse.Namespace) and isinstance(state.get("arch"), str):
        given = dict(getattr(args, "model_kwargs", None) or {})
        return RecordedModel(state["arch"], given, given.get("img_size"))
    exported = state.get("metadata")
    if isinstance(exported, dict) and {"timm_model_args", "arch"} <= exported.keys():  # of sgconvnext.export
        given = json.loads(exported["timm_model_args"])
        return RecordedModel(exported["arch"], given, given.get("img_size"))
    return None


def _plain(value: Any) -> Any:
    """Pairs come as lists out of YAML and JSON."""
    return list(value) if isinstance(value, tuple) else value
