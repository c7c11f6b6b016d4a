"""Where the weights that a run starts from come from: their licence, and their name on the Hugging Face hub.

An origin is a dict of "license" and "base_model", each only if it is known. Weights of no known origin have {}.
"""

from collections.abc import Mapping
from typing import Any

from timm.models import split_model_name_tag

KEYS = ("license", "base_model")


def of_pretrained(model: Any, name: str, overlay: Mapping[str, Any]) -> dict[str, str]:
    """The origin of timm's pretrained weights.

    Args:
        model: that was built with ``pretrained=True``.
        name: that it was built by. A tag in it says which weights a file holds.
        overlay: its ``pretrained_cfg_overlay``. If it names a file and the name has no tag, it alone tells the origin.
    """
    source: Mapping[str, Any] = model.pretrained_cfg
    if {"file", "url", "hf_hub_id"} & overlay.keys() and not split_model_name_tag(name)[1]:
        source = overlay
    return _known({"license": source.get("license"), "base_model": source.get("hf_hub_id")})


def of_checkpoint(state: Mapping[str, Any]) -> dict[str, str]:
    """The origin that a checkpoint of train.py or an exported file records. Runs pass on that of the first."""
    found = state.get("origin", state.get("metadata"))
    return _known({key: found.get(key) for key in KEYS}) if isinstance(found, dict) else {}


def _known(found: Mapping[str, Any]) -> dict[str, str]:
    return {key: str(value).partition("@")[0] for key, value in found.items() if value}  # a name may have @REVISION
