"""Write a ConvNeXt as the SGConvNeXt with the same outputs, in timm's folder layout.

    python -m sgconvnext.convert convnext_tiny.fb_in1k converted/tiny
    python -m sgconvnext.convert runs/convnext/best.pth converted/mine
    python -m sgconvnext.convert --to-convnext local-dir:converted/mine converted/back

    import sgconvnext, timm
    model = timm.create_model("local-dir:converted/tiny", pretrained=True)

SOURCE is timm's name of a ConvNeXt with weights (a tag, hf-hub:OWNER/NAME or local-dir:FOLDER), a checkpoint of
train.py, or a file of weights. Both networks run on one random image before anything is written. The folder holds
model.safetensors, config.json and README.md, which names the source, its licence and the error.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import timm

from . import console, export, model_card
from .models import conversion
from .training import build, checkpoint, origin

LARGEST = 4096  # pixels a side; 1,048,576 tokens in the first stage


@console.interruptible()
def main() -> None:
    args = parse_args()
    try:
        told = convert(args.source, args.folder, args.img_size, args.use_ema, args.to_convnext)
    except ValueError as error:
        console.fail("sgconvnext.convert", error)
    console.tell("sgconvnext.convert", told + "\n")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m sgconvnext.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE", help="timm's name of a model with weights, or a file")
    parser.add_argument("folder", metavar="FOLDER", type=console.path, help="to write; it must hold no weights yet")
    parser.add_argument(
        "--img-size",
        type=console.size,
        metavar="PX",
        help="224 or 256x192, that the kernels are built for (the source's)",
    )
    parser.add_argument("--use-ema", action="store_true", help="of a checkpoint: the average of the weights")
    parser.add_argument(
        "--to-convnext",
        action="store_true",
        help="write an SGConvNeXt without taps outside of the 7x7 as a ConvNeXt",
    )
    return parser.parse_args()


def convert(
    source: str, folder: str, img_size: tuple[int, int] | None = None, ema: bool = False, to_convnext: bool = False
) -> str:
    """Write the converted network of a source.

    Args:
        source: timm's name of a model with weights, or a file.
        folder: made if it is not there.
        img_size: H, W in pixels that the kernels are built for; None for the source's.
        ema: of a checkpoint, the average of the weights.
        to_convnext: from SGConvNeXt to ConvNeXt.

    Returns:
        the comparison of the two networks, and how to load what was written.

    Raises:
        ValueError: no such source, one that cannot be converted, or a folder that is taken or not writable.
    """
    export.refuse_taken(folder)
    if img_size and max(img_size) > LARGEST:
        raise ValueError(
            f"--img-size={max(img_size)} must be at most {LARGEST}: the kernels have a tap for every token"
        )
    try:
        before, start, of_run = _read(source, ema)
        if to_convnext:
            after, error = conversion.to_convnext(before)
        else:
            after, error = conversion.convert(
                conversion.convnext(before), **({"img_size": img_size} if img_size else {})
            )
    except ValueError as wrong:
        told = str(wrong)
        raise ValueError(told if repr(source) in told else f"SOURCE {source!r}: {told}") from wrong
    arguments = {key: value for key, value in after._model_args.items() if key != "num_classes"}
    name = after.pretrained_cfg["architecture"]
    metadata = start | {"format": "pt", "arch": name, "timm_model_args": json.dumps(arguments)}
    card = _card(source, before, after, error, start)
    try:
        export.write_folder(folder, after, metadata, card, **of_run)
    except OSError as failed:
        raise ValueError(f"folder {folder!r} cannot be written ({failed.strerror}); name another") from failed
    counts = [model_card.num_parameters(model) for model in (before, after)]
    return (
        f"{conversion.name_of(before)}, {counts[0]} parameters -> {name}, {counts[1]}; "
        f"their outputs on a random image differ by {error:.1e}; load it: import sgconvnext, timm; "
        f"timm.create_model('local-dir:{folder}', pretrained=True)"
    )


def _read(source: str, ema: bool) -> tuple[Any, dict[str, str], dict[str, Any]]:
    """The network of a source, the origin of its weights, and what `export.write_folder` is told of its run."""
    if ":" in source or timm.is_model(source):
        if ema:
            raise ValueError(f"--use-ema is of a checkpoint, and {source!r} is a name of timm: leave it out")
        named = build.from_timm(source, {"pretrained": True}, "SOURCE ")
        return named, origin.of_pretrained(named, source, {}), {}
    if not os.path.isfile(source):  # which also takes names that are too long
        raise ValueError(
            f"SOURCE {source!r} is neither a model of timm nor a file; of a folder, write local-dir:FOLDER"
        )
    state = checkpoint.load(source)
    start = origin.of_checkpoint(state)
    if "args" not in state:
        return conversion.convnext(checkpoint.weights(state, ema, source)), start, {}
    model, config = build.trained_model(state, ema, source)
    described = export.model_config(state.get("class_to_idx"), model.num_classes, start)
    return model, start, {"described": described, "preprocessing": export.data_config(config)}


def _card(source: str, before: Any, after: Any, error: float, start: dict[str, str]) -> str:
    """The card of a converted network, which names the source, its licence and the error."""
    place = Path(source).name if Path(source).exists() else model_card.without_folders(source)
    details = {
        "Source": f"{place}, licence {start.get('license', 'unknown')}",
        "Parameters": f"{model_card.num_parameters(after)} (source: {model_card.num_parameters(before)})",
        "Difference": f"{error:.1e}, relative, of features and outputs in float32 on a random image",
    }
    name = after.pretrained_cfg["architecture"]
    outputs = f"`{name}` with the outputs of `{conversion.name_of(before)}`, by sgconvnext.convert."
    return model_card.card(after, outputs, details, start)


if __name__ == "__main__":
    main()
