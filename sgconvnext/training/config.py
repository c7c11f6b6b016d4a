"""Every knob of a training run, declared once, see `knob`; and the configuration that files and overrides make.

A new knob needs one line here, and nothing elsewhere: --help, YAML files, overrides, checkpoints and resume know it.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

from ..files import expand
from .knob import ANY, BELOW_1, FACTOR, POSITIVE, SEE_PAIRS, Knob, Limits, at_least, between, knob
from .patterns import FACTORS, are_factors
from .typed import build, merge, sections, typed
from .yaml_files import Layer, read_layers, read_overrides

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
WHOLE = 2**31 - 1  # torch takes no larger size
TINY, HUGE = 2.0**-126, 2.0**127  # of float32, in which training computes: beyond them 0 and infinity begin


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """What is trained: any model that timm can create."""

    name: str = knob("sgconvnext_tiny", "timm model name")
    num_classes: int | None = knob(
        None, "number of outputs; null: the classes of the data; needed if the data does not tell them", at_least(1)
    )
    img_size: int | tuple[int, int] | None = knob(
        None, "pixels for which a model that is tied to a size is built; null: data.img_size", at_least(1)
    )
    drop_path: float | None = knob(
        None, "stochastic depth, from 0 in the first block to this in the last; null: the model's own", BELOW_1
    )
    drop: float | None = knob(None, "dropout before the classifier; null: the model's own", BELOW_1)
    checkpoint: str = knob(
        "", "file whose weights to start from, every key matching; '': none", resume="local", path=True
    )
    checkpoint_ema: bool = knob(False, "take the EMA weights of model.checkpoint", resume="free")
    new_head: bool = knob(
        False, "leave the classifier of model.checkpoint out, to train on other classes", resume="free"
    )
    pretrained: bool = knob(False, "timm's pretrained weights (of _gap3 models, ConvNeXt's)", resume="free")
    grad_checkpointing: bool = knob(False, "recompute activations in backward: less memory, a third slower")
    channels_last: bool = knob(False, "NHWC memory format")
    compile: bool = knob(False, "torch.compile the model")
    kwargs: dict[str, Any] = knob({}, "further arguments of timm.create_model")


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Where the images come from, and their size."""

    dataset: str = knob(
        "",
        "'': folder of class folders, or tar; torch/..., hfds/..., wds/... as timm; sequence/...; digits, synthetic",
    )
    kwargs: dict[str, Any] = knob({}, "further arguments of a sequence/... dataset")
    root: str = knob("", "folder that holds the splits; for hfds the cache folder", resume="local", path=True)
    train_split: str = knob(
        "train", "folder or tar file under data.root, or the dataset's own name of the split", path=True
    )
    val_split: str = knob("val", "likewise, for validation", path=True)
    train_samples: int | None = knob(
        None, "images per epoch, for datasets that cannot tell (wds, synthetic, sequences that are made)", at_least(1)
    )
    val_samples: int | None = knob(None, "validation images, for datasets that cannot tell", at_least(1))
    download: bool = knob(False, "let torch/... datasets download what is missing", resume="free")
    img_size: int | tuple[int, int] = knob(
        224, "pixels, height and width", at_least(32, "at least 32 pixels, for one token in the last stage")
    )
    crop_pct: float = knob(
        0.875, "evaluation: the image is resized to img_size / crop_pct, then cropped", between(0.1, 1)
    )
    crop_mode: Literal["center", "squash", "border"] = knob(
        "center", "evaluation: how the image is cropped; squash resizes both sides instead"
    )
    interpolation: Literal["bicubic", "bilinear", "nearest"] = knob("bicubic", "how every resize interpolates")
    mean: tuple[float, float, float] = knob(IMAGENET_MEAN, "subtracted from the channels, which are in 0..1", ANY)
    std: tuple[float, float, float] = knob(IMAGENET_STD, "divides the channels, after mean", POSITIVE)
    upright: bool = knob(False, "turn images as their EXIF orientation says; ConvNeXt, timm and torchvision do not")
    max_unreadable: float = knob(
        0.01, "share of a split's images that may be unreadable before the run stops", BELOW_1, resume="free"
    )
    workers: int = knob(
        8,
        "loader processes per device; 0 loads in the training process",
        between(0, 1024),
        resume="local",
        order="shards",
    )
    pin_memory: bool = knob(True, "page-locked batches; used on CUDA only", resume="local")


@dataclass(kw_only=True, slots=True)
class AugmentConfig:
    """What training does to an image, in this order; mixing comes last, on whole batches."""

    scale: tuple[float, float] = knob(
        (0.08, 1.0),
        "random resized crop: share of the area",
        Limits(lambda value: 0 < value[0] <= value[1] <= 1, "0 < low <= high <= 1"),
    )
    ratio: tuple[float, float] = knob(
        (3 / 4, 4 / 3),
        "random resized crop: width over height",
        Limits(lambda value: 0 < value[0] <= value[1], "0 < low <= high"),
    )
    hflip: float = knob(0.5, "probability of a left-right flip", between(0, 1))
    auto_augment: str = knob("", "timm's policy string, e.g. rand-m9-mstd0.5-inc1; '': none")
    color_jitter: float = knob(0.0, "brightness, contrast, saturation; has no effect under auto_augment", at_least(0))
    reprob: float = knob(0.0, "random erasing: probability per image", between(0, 1))
    remode: Literal["const", "rand", "pixel"] = knob("pixel", "random erasing: what fills the hole")
    recount: int = knob(1, "random erasing: holes per image", between(1, 1000))
    mixup: float = knob(0.0, "alpha of mixup; 0: off", at_least(0))
    cutmix: float = knob(0.0, "alpha of cutmix; 0: off", at_least(0))
    mixup_prob: float = knob(1.0, "probability that a batch is mixed at all", between(0, 1))
    mixup_switch_prob: float = knob(0.5, "probability of cutmix where both are on", between(0, 1))
    mixup_mode: Literal["batch", "pair", "elem"] = knob(
        "batch", "one mixing weight per batch, pair of images, or image"
    )
    smoothing: float = knob(0.0, "label smoothing", BELOW_1)


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """AdamW and its schedule."""

    global_batch: int = knob(
        256, "images per update over all devices; lr is never rescaled with it", at_least(1), order="always"
    )
    batch_per_device: int = knob(
        256, "images per forward; the accumulation steps follow from both", at_least(1), order="shards"
    )
    lr: float = knob(1e-3, "peak learning rate", POSITIVE)
    min_lr: float = knob(1e-6, "learning rate at the end of the cosine", SEE_PAIRS)
    warmup_epochs: int = knob(0, "the first of all epochs, in which the rate rises linearly from 0 to lr", SEE_PAIRS)
    weight_decay: float = knob(0.05, "of all parameters but the one-dimensional ones, such as biases", at_least(0))
    betas: tuple[float, float] = knob((0.9, 0.999), "AdamW: decay of the two moving averages", BELOW_1)
    eps: float = knob(1e-8, "AdamW: added to the denominator", at_least(0))
    layer_decay: float = knob(1.0, "factor on lr per layer below the head, as ConvNeXt groups them; 1: off", FACTOR)
    lr_scale: str = knob(
        "",
        "PATTERN=FACTOR, ...: factors on lr, by shell patterns of parameter names; the first match counts",
        Limits(are_factors, f"PATTERN=FACTOR, ... with factors of {FACTORS}, as in *.sgconv.weight=10"),
    )
    no_weight_decay: str = knob("", "PATTERN, ...: shell patterns of further parameters without weight decay")
    clip_grad: float | None = knob(
        None,
        "largest L2 norm of the gradient, in every precision; null: no clipping",
        Limits(lambda value: value > 0, "positive, or null"),
    )


@dataclass(kw_only=True, slots=True)
class EmaConfig:
    """Exponential moving average of the weights, evaluated beside them."""

    decay: float = knob(0.0, "share of the average that an update keeps; 0: no average", BELOW_1)


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """How the machine computes, and when it stops."""

    device: Literal["auto", "cuda", "cpu"] = knob(
        "auto", "auto: CUDA with nccl if there, else CPU with gloo", resume="free"
    )
    precision: Literal["fp32", "bf16", "fp16"] = knob("fp32", "autocast dtype; fp16 scales the loss")
    tf32: bool = knob(False, "let CUDA round the inputs of float32 products to TF32")
    cudnn_benchmark: bool = knob(True, "let cuDNN time its programs and take the fastest", resume="free")
    tune: bool = knob(False, "measure the backends of the global convolution, and take the fastest", resume="free")
    max_skips: int = knob(
        20, "fp16: updates in a row that the loss scaler may skip before the run stops", at_least(0), resume="free"
    )
    log_every: int = knob(50, "updates between two lines of the log", at_least(1), resume="free")


@dataclass(kw_only=True, slots=True)
class SaveConfig:
    """Checkpoints. A run saves one after every epoch, and one when it is asked to stop."""

    every: int | None = knob(
        None,
        "updates between two checkpoints within an epoch; null: only at the end of an epoch",
        at_least(1, "at least 1, or null"),
        resume="free",
    )
    keep: int = knob(3, "how many of the newest checkpoints stay, beside the best", at_least(1), resume="free")
    max_failures: int = knob(
        5, "failures to save in a row, as on a full disk, before the run stops", at_least(1), resume="free"
    )


@dataclass(kw_only=True, slots=True)
class WatchConfig:
    """Where the metrics of an epoch go, beside metrics.jsonl and (with matplotlib) curves.png."""

    tensorboard: bool = knob(False, "event files in out/tensorboard; needs the package tensorboard", resume="free")
    wandb: str = knob("", "Weights & Biases project; needs the package wandb; '': none", resume="free")


@dataclass(kw_only=True, slots=True)
class Config:
    """A whole run. The defaults are a plain run; configs/imagenet.yaml holds ConvNeXt's recipe."""

    out: str = knob(
        "runs/run",
        "output folder: config.yaml, metrics.jsonl, checkpoints, last.pth, best.pth",
        Limits(bool, "a folder"),
        resume="local",
        path=True,
    )
    epochs: int = knob(300, "passes over the training data, warm-up included", between(1, 10**6))
    seed: int = knob(0, "of weights, order, augmentation and mixing", between(0, 2**32 - 1), order="always")
    resume: str = knob(
        "",
        "'auto': the newest good checkpoint in out, if there is one; or a path; '': start anew",
        resume="local",
        path=True,
    )
    allow_change: str = knob(
        "",
        "may differ from the checkpoint: knobs, sections, processes, device, training_images, validation_images",
        resume="free",
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    run: RunConfig = field(default_factory=RunConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)


# every knob by its name, as in optim.lr
KNOBS: dict[str, Knob] = {
    prefix + item.name: item.metadata["knob"]
    for prefix, cls in [("", Config), *((f"{section.name}.", section.type) for section in sections(Config))]
    for item in dataclasses.fields(cls)  # type: ignore[arg-type]
    if "knob" in item.metadata
}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file (and its base), apply ``section.key=value`` overrides, check everything.

    Raises:
        ValueError: naming the place, the key or value, and the cure.
    """
    return _checked([*read_layers(Path(path), Config), read_overrides(overrides, Config)])


def from_dict(tree: dict[str, Any], place: str, overrides: Sequence[str] = ()) -> Config:
    """The typed, checked configuration of a nested dict, such as a checkpoint carries, under overrides."""
    return _checked([Layer(place, typed(tree, Config, place)), read_overrides(overrides, Config)])


def _checked(layers: Sequence[Layer]) -> Config:
    """The configuration of layers, the last on top; an error names the layer that its value comes from."""

    def place(key: str) -> str:
        return next((layer.place for layer in reversed(layers) if layer.states(key)), "by default")

    config: Config = build(Config, functools.reduce(merge, (layer.tree for layer in layers)))
    for key, facts in KNOBS.items():
        if facts.path:
            holder, name = _held(config, key)
            try:
                setattr(holder, name, expand(getattr(holder, name)))  # so that what is recorded is what is used
            except ValueError as error:
                raise ValueError(f"{place(key)}: {key}={error}") from error
    _check_values(config, place)
    _check_pairs(config, place)
    return config


def _check_values(config: Config, place: Callable[[str], str]) -> None:
    """Limits of single knobs; what depends on data or devices is checked elsewhere."""
    for key, facts in KNOBS.items():
        value = value_of(config, key)
        if value is not None and facts.limits and not facts.limits.hold(value):
            raise ValueError(f"{place(key)}: {_told(key, value)} must be {facts.limits.spoken}")
        for number in value if isinstance(value, tuple) else [value]:
            if isinstance(number, int) and abs(number) > WHOLE and key != "seed":
                raise ValueError(f"{place(key)}: {key}={value} must be at most {WHOLE}")
            if isinstance(number, float) and number and not TINY <= abs(number) <= HUGE:
                raise ValueError(f"{place(key)}: {key}={value} must be 0, or of size {TINY:.2g} to {HUGE:.2g}")


def _check_pairs(config: Config, place: Callable[[str], str]) -> None:
    """Of two knobs that exclude each other, both and their places are told."""
    model, augment, optim = config.model, config.augment, config.optim
    start = bool(model.checkpoint)
    mix = "augment.mixup" if augment.mixup > 0 else "augment.cutmix"
    unmixed = value_of(config, mix) == 0
    for key, holds, cure, other in [
        ("model.new_head", start or not model.new_head, "false with", "model.checkpoint"),
        ("model.checkpoint_ema", start or not model.checkpoint_ema, "false with", "model.checkpoint"),
        ("model.pretrained", not (start and model.pretrained), "false with", "model.checkpoint"),
        ("optim.min_lr", 0 <= optim.min_lr <= optim.lr, "between 0 and", "optim.lr"),
        ("optim.warmup_epochs", 0 <= optim.warmup_epochs < config.epochs, "at least 0 and below", "epochs"),
        (
            "optim.batch_per_device",
            unmixed or optim.batch_per_device % 2 == 0,
            "even, for mixup mixes a batch with its own reverse, with",
            mix,
        ),
    ]:
        if not holds:
            where = f" ({place(other)})" if place(other) != place(key) else ""
            told, limit = (_told(each, value_of(config, each)) for each in (key, other))
            raise ValueError(f"{place(key)}: {told} must be {cure} {limit}{where}")


def value_of(config: Config, key: str) -> Any:
    """The value of a knob that is named as in optim.lr."""
    return getattr(*_held(config, key))


def _held(config: Config, key: str) -> tuple[Any, str]:
    """The section that a knob is in, and its name there."""
    section, _, name = key.rpartition(".")
    return getattr(config, section) if section else config, name


def _told(key: str, value: Any) -> str:
    return f"{key}={value!r}" if isinstance(value, str) else f"{key}={value}"


def to_dict(config: Config) -> dict[str, Any]:
    """Nested dict of plain YAML values; `from_dict` gives the same configuration back."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    tree: dict[str, Any] = plain(dataclasses.asdict(config))
    return tree


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"optim": {"lr": 1}}`` to ``{"optim.lr": 1}``; the kwargs of a section, a value, stay whole."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, dict) and key != "kwargs"
        flat |= flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat


def describe() -> str:
    """Every knob with its default and its unit or reason, one per line."""
    lines = []
    for prefix, cls in [("", Config), *((f"{f.name}.", f.type) for f in sections(Config))]:
        lines.append(f"\n{cls.__doc__.splitlines()[0]}")  # type: ignore[union-attr]
        for item in dataclasses.fields(cls):  # type: ignore[arg-type]
            if "knob" in item.metadata:
                shown = yaml.safe_dump(_shown_default(item), default_flow_style=True).split("\n")[0]
                choices = get_args(item.type) if get_origin(item.type) is Literal else ()
                text = item.metadata["knob"].text + (f" ({', '.join(choices)})" if choices else "")
                lines.append(f"  {prefix + item.name:<26} {shown:<22} {text}")
    return "\n".join(lines)


def _shown_default(item: dataclasses.Field[Any]) -> Any:
    if item.default_factory is not dataclasses.MISSING:
        return item.default_factory()
    return [float(f"{v:.4g}") for v in item.default] if isinstance(item.default, tuple) else item.default
