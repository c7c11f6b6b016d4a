"""Write a checkpoint of train.py as safetensors in timm's folder layout, or a network as a file for a runtime.

    python -m sgconvnext.export runs/digits/best.pth exported/digits [--use-ema]
    python -m sgconvnext.export runs/digits/best.pth digits.onnx --format onnx --dynamic batch

    import sgconvnext, timm
    model = timm.create_model("local-dir:exported/digits", pretrained=True)

    import transformers
    model = transformers.AutoModelForImageClassification.from_pretrained("exported/digits")

The folder holds model.safetensors, config.json and README.md. config.json has the architecture with its arguments, the
preprocessing of the validation, and the names of the classes if the data has names. README.md is a model card;
complete it before you publish the folder. docs/export.md tells what the files for runtimes hold.
"""

import argparse
import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
from safetensors.torch import save
from timm.data import infer_imagenet_subset
from timm.layers import to_2tuple
from timm.models import split_model_name_tag
from timm.models._hub import save_config_for_hf  # save_for_hf, which is public, writes no metadata
from torch import nn

from . import console, formats, model_card
from .models.input_size import STEM_STRIDE
from .models.layer import SGConv2d
from .training import build, checkpoint, origin
from .training.config import Config
from .training.data import class_names

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"  # timm's names
SUFFIXES = (".pth", ".safetensors")  # of files that are no names of timm, even if they are not there


@console.interruptible()
def main() -> None:
    args = parse_args()
    try:
        if args.format == "safetensors":
            told = export_checkpoint(args.checkpoint, args.folder, args.use_ema)
        else:
            sizes = {"size": args.img_size, "dynamic": args.dynamic, "opset": args.opset, "half": args.half}
            told = export_file(args.checkpoint, args.folder, args.format, args.use_ema, **sizes)
    except ValueError as error:
        console.fail("sgconvnext.export", error)
    console.tell("sgconvnext.export", told + "\n")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m sgconvnext.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        type=console.path,
        help="last.pth or best.pth of a run; for the file of a runtime also timm's name of a model",
    )
    parser.add_argument(
        "folder", metavar="OUT", type=console.path, help="folder to write, or the file for a runtime; not there yet"
    )
    parser.add_argument("--use-ema", action="store_true", help="export the average of the weights")
    parser.add_argument("--format", choices=["safetensors", *formats.SUFFIXES], default="safetensors")
    parser.add_argument("--img-size", type=console.size, metavar="PX", help="224 or 256x192 (that of the model)")
    parser.add_argument("--dynamic", choices=["batch", "hw"], nargs="+", default=[], help="sizes that stay open")
    parser.add_argument("--opset", type=console.count, help=f"of ONNX ({formats.OPSET})")
    parser.add_argument("--half", action="store_true", help="write float16")
    args = parser.parse_args()
    if args.format == "safetensors" and (suffix := Path(args.folder).suffix) in formats.SUFFIXES.values():
        kind = next(kind for kind, own in formats.SUFFIXES.items() if own == suffix)
        parser.error(f"OUT {args.folder!r} would be a folder; add --format {kind} for a file, or name a folder")
    if args.format == "safetensors" and (args.img_size or args.dynamic or args.opset or args.half):
        parser.error("--img-size, --dynamic, --opset and --half need another --format than safetensors")
    return args


def export_file(
    source: str, out: str, kind: str, ema: bool = False, *, size: tuple[int, int] | None = None, **options: Any
) -> str:
    """Write a network as a file for a runtime, and compare the two.

    Args:
        source: checkpoint of train.py, or timm's name of a model; with a tag, or from the hub, it has weights.
        out, kind: the file, and its format of `formats.SUFFIXES`.
        ema: the EMA's weights of a checkpoint instead of the model's.
        size: H, W of the images; None for the model's own.
        options: dynamic, opset and half of `formats.write`.

    Returns:
        one line: what was written, and how far it is from PyTorch.

    Raises:
        ValueError: no such model, or what `formats.refuse` and `formats.write` refuse.
    """
    # before anything is built; of the model's own size, formats.write knows
    formats.refuse(out, kind, size or (formats.STRIDE * 2,) * 2, options["dynamic"], options["opset"])
    model, own, remark = _network(source, ema)
    try:
        error = formats.write(model, out, kind, size=size or own, **options)
    except OSError as failed:
        raise ValueError(f"OUT {out!r} cannot be written ({failed.strerror}); name another") from failed
    return (
        f"{out}: {kind}, {formats.mib(Path(out)):.1f} MiB; its largest relative difference from PyTorch is "
        f"{error:.1e}{remark}"
    )


def _network(source: str, ema: bool) -> tuple[nn.Module, tuple[int, int], str]:
    """The network of a source, H and W of its images, and what is to be told of its weights."""
    model: Any
    if os.path.exists(source) or (":" not in source and ("/" in source or source.endswith(SUFFIXES))):
        model, config = build.trained_model(checkpoint.load(source), ema, source)
        _refuse_without_images(model, config.model.name)
        height, width = to_2tuple(config.data.img_size)
        return model, (height, width), ""
    if ema:
        raise ValueError(f"--use-ema is of a checkpoint, and {source!r} is no file: leave it out")
    pretrained = ":" in source or bool(split_model_name_tag(source)[1])
    model = build.from_timm(source, {"pretrained": pretrained}, "CHECKPOINT ")
    _refuse_without_images(model, source)
    _, height, width = model.pretrained_cfg["input_size"]
    layer = next((module for module in model.modules() if isinstance(module, SGConv2d)), None)
    if layer is not None:  # what it is built for, which timm does not record
        height, width = (STEM_STRIDE * side for side in layer.input_size)
    return model, (height, width), "" if pretrained else "; its weights are random"


def _refuse_without_images(model: Any, name: str) -> None:
    if not hasattr(model, "pretrained_cfg"):
        raise ValueError(f"{name} takes no images, and only networks of images are exported; pass its .pth file on")


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
    refuse_taken(folder)
    if not os.path.exists(path) and (":" in path or timm.is_model(path)):
        raise ValueError(
            f"{path!r} is timm's name of a model; name a checkpoint, or a --format other than safetensors"
        )
    state = checkpoint.load(path)
    model, config = build.trained_model(state, ema, path)
    _refuse_without_images(model, config.model.name)
    start = origin.of_checkpoint(state)
    arguments = {key: value for key, value in config.model.kwargs.items() if not key.startswith("pretrained_cfg")}
    metadata = start | {
        "format": "pt",  # which timm and transformers look for
        "arch": model.pretrained_cfg["architecture"],
        "epoch": str(state["epoch"]),
        "weights": "ema" if ema else "model",
        "timm_model_args": json.dumps(arguments | {"img_size": config.model.img_size}),
    }
    try:
        card = model_card.run_card(state, config, model, ema, start)
        described = model_config(state.get("class_to_idx"), model.num_classes, start)
        write_folder(folder, model, metadata, card, described, data_config(config))
    except OSError as error:
        raise ValueError(f"folder {folder!r} cannot be written ({error.strerror}); name another") from error
    return (
        f"{metadata['weights']} weights of {metadata['arch']}, after {state['epoch'] + 1} epochs, are in {folder}; "
        f"load them: import sgconvnext, timm; timm.create_model('local-dir:{folder}', pretrained=True)"
    )


def refuse_taken(path: str) -> None:
    """Refuse a folder that holds one of the files already."""
    for name in (WEIGHTS, CONFIG, CARD):
        if (Path(path) / name).exists():
            raise ValueError(f"folder {path!r} already holds {name}; name another, or remove it")


def write_folder(
    path: str,
    model: nn.Module,
    metadata: dict[str, str],
    card: str,
    described: dict[str, Any] | None = None,
    preprocessing: dict[str, Any] | None = None,
) -> None:
    """Write all files in a folder beside their place, then move them there, the weights last.

    Args:
        path: of the folder; it is made if it is not there.
        model: with the weights.
        metadata: of the safetensors file.
        card: Markdown.
        described, preprocessing: what timm writes into config.json in place of the model's own configuration.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".export", dir=folder) as name:
        beside = Path(name)
        # copies, because safetensors takes no tensor that shares its memory or is laid out channels-last
        tensors = {k: v.clone(memory_format=torch.contiguous_format) for k, v in model.state_dict().items()}
        (beside / WEIGHTS).write_bytes(save(tensors, metadata=metadata))  # save_file makes it readable by us alone
        save_config_for_hf(
            model,
            str(beside / CONFIG),
            model_config=described,
            data_config=preprocessing,
        )
        written = json.loads((beside / CONFIG).read_text())
        # transformers passes it to timm beside these arguments, so it would be given twice; timm reads it elsewhere
        written.get("model_args", {}).pop("num_classes", None)
        (beside / CONFIG).write_text(json.dumps(written, indent=2))
        (beside / CARD).write_text(card)
        refuse_taken(path)  # another export may have been faster
        for file in (CARD, CONFIG, WEIGHTS):
            (beside / file).replace(folder / file)


def data_config(config: Config) -> dict[str, Any]:
    """The run's preprocessing of validation images, in timm's words."""
    data = config.data
    height, width = to_2tuple(data.img_size)
    return {
        "input_size": (3, height, width),
        "mean": data.mean,
        "std": data.std,
        "crop_pct": data.crop_pct,
        "crop_mode": data.crop_mode,
        "interpolation": data.interpolation,
    }


def model_config(class_to_idx: dict[str, int] | None, classes: Any, start: dict[str, str]) -> dict[str, Any]:
    """What timm cannot know: that these are not its own weights of some tag, their licence, and the classes' names.

    Args:
        class_to_idx: of the data, if it has names.
        classes: how many.
        start: the origin of the weights that the run started from.
    """
    labels = class_names(class_to_idx) if class_to_idx else None
    if labels is None and infer_imagenet_subset({"num_classes": classes}):
        labels = [str(index) for index in range(classes)]  # else 1000 nameless classes are taken for ImageNet's
    return {"pretrained_cfg": {"tag": None, "license": start.get("license")}, "label_names": labels}


if __name__ == "__main__":
    main()
