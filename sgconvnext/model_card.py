"""The model card of exported weights: what they are, what they cost and score, and how to load and to train them.

What a checkpoint does not record is left out, or "unknown". The front matter is that of the Hugging Face hub.
"""

import os
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.layers import to_2tuple
from timm.models._hub import generate_readme  # timm exports it nowhere else
from torch import nn

from . import __version__
from .profile import flops
from .training import optim
from .training.config import Config, to_dict

LISTED = ("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "unknown")  # others are "other" to the hub
UNTOLD = ("out", "resume", "allow_change", "save", "watch")  # settings that do not change the weights

USAGE = """```python
{imports}
model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # or "hf-hub:OWNER/NAME"
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
logits = model(transform(image)[None])  # image: PIL's, in RGB
```

With transformers:

```python
{wrapped}
model = transformers.AutoModelForImageClassification.from_pretrained("FOLDER")
processor = transformers.AutoImageProcessor.from_pretrained("FOLDER")
logits = model(**processor(image)).logits
```"""

TRAINING = """

## Training

The settings of the run that are not the defaults of SGConvNeXt {version}; save them as `run.yaml`:

```yaml
{settings}```

Then train again, in a checkout of SGConvNeXt:

```sh
{launcher} train.py run.yaml
```"""

SGCONV = """@inproceedings{li2023sgconv,
  title     = {What Makes Convolutional Models Great on Long Sequence Modeling?},
  author    = {Yuhong Li and Tianle Cai and Yi Zhang and Deming Chen and Debadeepta Dey},
  booktitle = {International Conference on Learning Representations},
  year      = {2023},
  url       = {https://arxiv.org/abs/2210.09298}
}"""


def run_card(state: dict[str, Any], config: Config, model: nn.Module, ema: bool, origin: dict[str, str]) -> str:
    """The card of a run's weights.

    Args:
        state: the checkpoint.
        config: of the run that wrote it.
        model: with the weights; it is left in evaluation mode.
        ema: they are the average.
        origin: of the weights that the run started from, see `training.origin`.
    """
    source: Any = model.pretrained_cfg
    average = "their average (EMA)" if ema else "as trained"
    results = _results(state, ema)
    told = "top-1 {top1:.2f} %, top-5 {top5:.2f} %, loss {loss:.4f}".format(**results) if results else ""
    details = {
        "Parameters": num_parameters(model),
        "GMACs": gmacs(model, config),
        "Weights": f"{average}, after " + _progress(state, f" of {config.epochs}"),
        "Started from": _start(config, origin),
        "Trained on": _data(state, config),
        "Results on the validation images": told or "none at this point of the run",
        "Recipe": f"global batch {config.optim.global_batch}, peak learning rate {config.optim.lr:g}, "
        f"weight decay {config.optim.weight_decay:g}, {config.run.precision}, seed {config.seed}",
        "Cost of the training": _training_cost(state, config),
    }
    description = f"`{source['architecture']}`, trained with SGConvNeXt's train.py."
    processes = state.get("facts", {}).get("processes")  # on all nodes
    again = TRAINING.format(
        version=__version__,
        settings=yaml.safe_dump(run_settings(config), sort_keys=False, default_flow_style=None, width=119),
        launcher=f"torchrun --nproc-per-node={processes}" if (processes or 1) > 1 else "python",
    )
    return card(model, description, details, origin, again, **_front(config, results, source["architecture"]))


def card(
    model: nn.Module, description: str, details: dict[str, str], origin: dict[str, str], more: str = "", **front: Any
) -> str:
    """Markdown with the front matter that the hub reads, by timm's and the hub's own helpers.

    Args:
        model: whose architecture the card names; how to load it follows from that.
        description: of the model, in one sentence.
        details: what else is told, by name.
        origin: licence and hub name of the weights that these are made of.
        more: Markdown after the usage.
        front: further fields of huggingface_hub's ModelCardData.
    """
    source: Any = model.pretrained_cfg
    arch = source["architecture"]
    ours = type(model).__module__.startswith("sgconvnext.")
    imports = "import sgconvnext, timm  # sgconvnext registers the model" if ours else "import timm"
    wrapped = "import sgconvnext, transformers" if ours else "import transformers"
    content: dict[str, Any] = {
        "description": description,
        "details": {name: " ".join(told.replace("`", "'").split()) for name, told in details.items()},  # a line each
        "usage": USAGE.format(imports=imports, wrapped=wrapped) + more,
    }
    text = generate_readme(content | ({"citation": SGCONV} if arch.startswith("sgconvnext_") else {}), arch)
    data = ModelCardData(
        tags=["image-classification", "timm", "transformers"],
        pipeline_tag="image-classification",
        library_name="timm",
        base_model=origin.get("base_model"),
        **_licence(origin.get("license", "unknown")),
        **front,
    )
    return f"---\n{data.to_yaml()}\n---\n{ModelCard(text).text}"


def num_parameters(model: nn.Module) -> str:
    """Parameters of a model, with a comma after the thousands."""
    return f"{flops.num_parameters(model):,}"


def gmacs(model: nn.Module, config: Config) -> str:
    """GMACs of an image of the run's size, by the counter of sgconvnext.profile; "unknown" if it cannot count them."""
    height, width = _size(config)
    try:
        cost = flops.count(model, torch.zeros(1, 3, height, width)).total()
    except flops.UncountedError:
        return "unknown"
    return f"{cost.macs / 1e9:.3g} for an image of {height}x{width} px"


def run_settings(config: Config) -> dict[str, Any]:
    """The settings of a run that are not the defaults, as train.py's YAML has them. Of a path only the name stays."""
    tree = _special(to_dict(config), to_dict(Config()))
    told: dict[str, Any] = without_folders({key: value for key, value in tree.items() if key not in UNTOLD})
    for section, key in (("data", "root"), ("model", "checkpoint")):  # also if they are not absolute
        if path := told.get(section, {}).get(key):
            told[section][key] = Path(path).resolve().name
    if file := told.get("model", {}).get("kwargs", {}).get("pretrained_cfg_overlay", {}).get("file"):
        told["model"]["kwargs"]["pretrained_cfg_overlay"]["file"] = Path(file).name
    return told


def without_folders(value: Any) -> Any:
    """A setting without the folders of this machine, local-dir:FOLDER among them."""
    if isinstance(value, dict):
        return {key: without_folders(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_folders(each) for each in value]
    if not isinstance(value, str) or "://" in value:
        return value
    scheme, colon, path = value.rpartition(":")
    is_path = scheme == "local-dir" or os.path.isabs(path) or path.startswith("~")
    return scheme + colon + Path(path).name if is_path else value


def _special(tree: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _special(value, default[key]) if isinstance(value, dict) and key != "kwargs" else value
        for key, value in tree.items()
        if value != default[key]
    }


def _front(config: Config, results: dict[str, float], arch: str) -> dict[str, Any]:
    """What the hub is told of the data and the accuracy. Only data of hfds/... have a name on the hub."""
    kind, _, dataset = config.data.dataset.partition("/")
    told: dict[str, Any] = {"datasets": [dataset]} if kind == "hfds" else {}
    if results:
        data = dataset if kind == "hfds" else _data_name(config)
        of: dict[str, Any] = {"task_type": "image-classification", "dataset_type": data, "dataset_name": data}
        told |= {"metrics": ["accuracy"], "model_name": arch}
        told["eval_results"] = [
            EvalResult(**of, metric_type="accuracy", metric_name=name, metric_value=round(results[key] / 100, 6))
            for key, name in (("top1", "top-1"), ("top5", "top-5"))
        ]
    return told


def _licence(name: str) -> dict[str, Any]:
    return {"license": name} if name in LISTED else {"license": "other", "license_name": name}


def _start(config: Config, origin: dict[str, str]) -> str:
    if not (config.model.pretrained or config.model.checkpoint):
        return "random weights"
    base = origin.get("base_model", "")
    name = Path(config.model.checkpoint).name or base or without_folders(config.model.name)
    made_of = f", made of {base}" if base not in ("", name) else ""
    return f"{name}{made_of}, licence {origin.get('license', 'unknown')}"


def _size(config: Config) -> tuple[int, int]:
    height, width = to_2tuple(config.data.img_size)
    return height, width


def _data_name(config: Config) -> str:
    return config.data.dataset or Path(config.data.root).resolve().name  # no more of the path: it is of one machine


def _updates(state: dict[str, Any]) -> int:
    """Updates since the last epoch ended."""
    return state.get("progress", {}).get("update", 0)


def _progress(state: dict[str, Any], each: str) -> str:
    """How far the run had come: the epochs that ended, what is to be told of them, and the updates since."""
    updates = _updates(state)
    return f"{state['epoch'] + 1} epochs{each}" + (f" and {updates} updates" if updates else "")


def _images(state: dict[str, Any]) -> int:
    """Training images; 0 if the checkpoint does not say."""
    return int(str(state.get("facts", {}).get("training_images", "0")).partition(" ")[0])


def _data(state: dict[str, Any], config: Config) -> str:
    images = _images(state)
    told = [_data_name(config), f"{images} images" if images else "", f"{config.model.num_classes} classes"]
    return ", ".join([*(part for part in told if part), "{}x{} px".format(*_size(config))])


def _results(state: dict[str, Any], ema: bool) -> dict[str, float]:
    """Of the evaluation after the last update, if there was one: a checkpoint within an epoch has none of its own."""
    history, kind = state.get("history"), "ema" if ema else "val"
    if not history or _updates(state) or f"{kind}_top1" not in history[-1]:
        return {}
    return {name: history[-1][f"{kind}_{name}"] for name in ("top1", "top5", "loss")}


def _training_cost(state: dict[str, Any], config: Config) -> str:
    """Epochs and images; hours by the rate of each epoch, and the devices of the run, as far as they are recorded."""
    images, facts, epochs = _images(state), state.get("facts", {}), state["epoch"] + 1
    told = _progress(state, f" x {images} images" if images else "")
    rates = [line.get("images_per_s") for line in state.get("history", [])]
    if images and rates and len(rates) == epochs and all(rates) and not _updates(state):
        seen = optim.updates_per_epoch(images, config.optim.global_batch) * config.optim.global_batch
        told += f", {sum(seen / rate for rate in rates) / 3600:.3g} hours of updates"
    if "processes" in facts and "device" in facts:
        told += f", {facts['processes']} process{'es' if facts['processes'] > 1 else ''} on {facts['device']}"
    return told
