"""Which model a checkpoint's weights were trained in: other models of the same shapes may compute something else."""

import argparse
import inspect
import json
from typing import Any, NamedTuple

from timm.models import split_model_name_tag
from torch import nn

# Arguments that do not change what a trained model computes, or that the shapes of its weights show
UNCOMPARED = {
    *("backend", "ls_init_value", "init_values", "head_init_scale", "weight_init", "fused_attn", "output_stride"),
    *("drop_rate", "drop_path_rate", "drop_block_rate", "img_size", "num_classes", "in_chans", "depths", "dims"),
    *("num_scales", "bidirectional", "depth", "embed_dim", "patch_size", "device", "dtype"),
}


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
        if before != now:
            raise ValueError(
                f"checkpoint {path!r} was trained as {self.name}, this model is {name}; use model.name={self.name}"
            )
        defaults = {key: each.default for key, each in inspect.signature(type(model).__init__).parameters.items()}
        defaults |= getattr(model, "kernel_defaults", {})
        uncompared = UNCOMPARED | {"global_pool"} if new_head else UNCOMPARED
        # entry points of timm's own models set arguments, which are not known here
        ours = type(model).__module__.startswith("sgconvnext.")
        keys = self.arguments.keys() | arguments.keys() if ours else self.arguments.keys() & arguments.keys()
        for key in sorted(keys - uncompared):
            then, here = (_plain(given.get(key, defaults.get(key))) for given in (self.arguments, arguments))
            if then != here and not key.endswith("_drop_rate"):
                raise ValueError(
                    f"checkpoint {path!r} was trained with {key}={then}, this model has {key}={here}, which would "
                    f"compute something else with the same weights; use model.kwargs={{{key}: {then}}}"
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
