"""The README.md of an exported folder: what the weights are, on what they were trained, how well, how to load them."""

from pathlib import Path
from typing import Any

from timm.models._hub import generate_readme  # which timm's push_to_hf_hub writes a card with
from torch import nn

from .training.config import Config

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

SGCONV = """@inproceedings{li2023sgconv,
  title     = {What Makes Convolutional Models Great on Long Sequence Modeling?},
  author    = {Yuhong Li and Tianle Cai and Yi Zhang and Deming Chen and Debadeepta Dey},
  booktitle = {International Conference on Learning Representations},
  year      = {2023},
  url       = {https://arxiv.org/abs/2210.09298}
}"""


def model_card(state: dict[str, Any], config: Config, model: nn.Module, ema: bool) -> str:
    """Markdown with the front matter that the Hugging Face hub reads, by timm's own helper.

    Args:
        state: the checkpoint.
        config: of the run that wrote it.
        model: with the weights.
        ema: they are the average.
    """
    source: Any = model.pretrained_cfg
    arch = source["architecture"]
    ours = arch.partition("_")[0] == "sgconvnext"
    imports = "import sgconvnext, timm  # sgconvnext registers the model" if ours else "import timm"
    card: dict[str, Any] = {
        "tags": ["image-classification", "timm", "transformers"],
        "library_name": "timm",
        "license": source.get("license") or "unknown",
        "description": f"`{arch}`, trained with SGConvNeXt's train.py.",
        "details": {
            "Parameters": f"{sum(parameter.numel() for parameter in model.parameters()):,}",
            "Weights": f"{'their average (EMA)' if ema else 'as trained'}, after {state['epoch'] + 1} epochs of "
            f"{config.epochs}",
            "Trained on": _data(state, config),
            "Results on the validation images": _results(state, ema),
            "Recipe": f"global batch {config.optim.global_batch}, peak learning rate {config.optim.lr:g}, "
            f"weight decay {config.optim.weight_decay:g}, {config.run.precision}, seed {config.seed}",
        },
        "usage": USAGE.format(
            imports=imports, wrapped="import sgconvnext, transformers" if ours else "import transformers"
        ),
    }
    return generate_readme(card | ({"citation": SGCONV} if ours else {}), arch)


def _data(state: dict[str, Any], config: Config) -> str:
    name = config.data.dataset or Path(config.data.root).name  # no more of the path: it is of one machine
    images = str(state.get("facts", {}).get("training_images", "")).partition(" ")[0]
    size = config.data.img_size if isinstance(config.data.img_size, tuple) else (config.data.img_size,) * 2
    told = [name, f"{images} images" if images else "", f"{config.model.num_classes} classes"]
    return ", ".join([*(part for part in told if part), "{}x{} px".format(*size)])


def _results(state: dict[str, Any], ema: bool) -> str:
    """Of the evaluation after the last update, if there was one: a checkpoint within an epoch has none of its own."""
    history, kind = state.get("history"), "ema" if ema else "val"
    if not history or state.get("progress", {}).get("update") or f"{kind}_top1" not in history[-1]:
        return "none at this point of the run"
    top1, top5, loss = (history[-1][f"{kind}_{name}"] for name in ("top1", "top5", "loss"))
    return f"top-1 {top1:.2f} %, top-5 {top5:.2f} %, loss {loss:.4f}"
