"""Write the weights of a checkpoint of train.py as safetensors, in timm's folder layout.

    python -m sgconvnext.export runs/digits/best.pth exported/digits [--use-ema]

    import sgconvnext, timm
    model = timm.create_model("local-dir:exported/digits", pretrained=True)

    import transformers
    model = transformers.AutoModelForImageClassification.from_pretrained("exported/digits")

The folder holds model.safetensors, config.json and README.md. config.json has the architecture with its arguments, the
preprocessing of the validation, and the names of the classes if the data has names. README.md is a model card;
complete it before you publish the folder.
"""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save
from timm.data import infer_imagenet_subset
from timm.models._hub import save_config_for_hf  # save_for_hf, which is public, writes no metadata beside the weights
from torch import nn

from . import console
from .model_card import model_card
from .training import build, checkpoint
from .training.config import Config
from .training.data import class_names

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"  # timm's names


@console.interruptible()
def main() -> None:
    args = parse_args()
    try:
        told = export_checkpoint(args.checkpoint, args.folder, args.use_ema)
    except ValueError as error:
        console.fail("sgconvnext.export", error)
    console.tell("sgconvnext.export", told + "\n")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m sgconvnext.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=console.path, help="last.pth or best.pth of a run")
    parser.add_argument("folder", type=console.path, help="folder to write; it must not hold exported weights yet")
    parser.add_argument("--use-ema", action="store_true", help="export the average of the weights")
    return parser.parse_args()


def export_checkpoint(path: str, folder: str, ema: bool = False) -> str:
    """Write folder/model.safetensors, folder/config.json and folder/README.md, all or none.

    Args:
        path: checkpoint of train.py.
        folder: made if it is not there.
        ema: the EMA's weights instead of the model's.

    Returns:
        one line: what was written, and how to load it.

    Raises:
        ValueError: no checkpoint, one without configuration or EMA, or a folder that is taken or not writable.
    """
    for name in (WEIGHTS, CONFIG, CARD):
        if (Path(folder) / name).exists():
            raise ValueError(f"folder {folder!r} already holds {name}; name another, or remove it")
    state = checkpoint.load(path)
    model, config = build.trained_model(state, ema, path)
    metadata = {
        "format": "pt",  # which timm and transformers look for
        "arch": model.pretrained_cfg["architecture"],
        "epoch": str(state["epoch"]),
        "weights": "ema" if ema else "model",
        "timm_model_args": json.dumps(config.model.kwargs | {"img_size": config.model.img_size}),
    }
    try:
        card = model_card(state, config, model, ema)
        write_folder(Path(folder), model, metadata, config, state.get("class_to_idx"), card)
    except OSError as error:
        raise ValueError(f"folder {folder!r} cannot be written ({error.strerror}); name another") from error
    return (
        f"{metadata['weights']} weights of {metadata['arch']}, epoch {metadata['epoch']}, are in {folder}; load them: "
        f"import sgconvnext, timm; timm.create_model('local-dir:{folder}', pretrained=True)"
    )


def write_folder(
    folder: Path,
    model: nn.Module,
    metadata: dict[str, str],
    config: Config,
    class_to_idx: dict[str, int] | None,
    card: str,
) -> None:
    """Write all files in a folder beside their place, then move them there, the weights last."""
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".export", dir=folder) as name:
        beside = Path(name)
        # copies, because safetensors takes no tensor that shares its memory or is laid out channels-last
        tensors = {k: v.clone(memory_format=torch.contiguous_format) for k, v in model.state_dict().items()}
        (beside / WEIGHTS).write_bytes(save(tensors, metadata=metadata))  # save_file makes it readable by us alone
        save_config_for_hf(
            model,
            str(beside / CONFIG),
            model_config=model_config(class_to_idx, model.num_classes),
            data_config=data_config(config),
        )
        described = json.loads((beside / CONFIG).read_text())
        # transformers passes it to timm beside these arguments, so it would be given twice; timm reads it elsewhere
        del described["model_args"]["num_classes"]
        (beside / CONFIG).write_text(json.dumps(described, indent=2))
        (beside / CARD).write_text(card)
        for file in (CARD, CONFIG, WEIGHTS):
            (beside / file).replace(folder / file)


def data_config(config: Config) -> dict[str, Any]:
    """The run's preprocessing of validation images, in timm's words."""
    data = config.data
    height, width = (data.img_size, data.img_size) if isinstance(data.img_size, int) else data.img_size
    return {
        "input_size": (3, height, width),
        "mean": data.mean,
        "std": data.std,
        "crop_pct": data.crop_pct,
        "crop_mode": data.crop_mode,
        "interpolation": data.interpolation,
    }


def model_config(class_to_idx: dict[str, int] | None, classes: Any) -> dict[str, Any]:
    """What timm cannot know: that these are not its own weights of some tag, and the classes' names by index."""
    labels = class_names(class_to_idx) if class_to_idx else None
    if labels is None and infer_imagenet_subset({"num_classes": classes}):
        labels = [str(index) for index in range(classes)]  # else 1000 nameless classes are taken for ImageNet's
    return {"pretrained_cfg": {"tag": None}, "label_names": labels}


if __name__ == "__main__":
    main()
