"""Every knob of a training run, declared once: typed sections, YAML files with one optional base, dotted overrides."""

import dataclasses
import difflib
import functools
import math
import re
import types
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import yaml

from ..errors import one_line
from ..files import expand

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def knob(default: Any, text: str, path: bool = False) -> Any:
    """A dataclass field with its unit or reason, which `describe` prints for --help; in a path ``~`` is home."""
    metadata = {"text": text, "path": path}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(kw_only=True, slots=True)
class Model:
    """What is trained: any model that timm can create."""

    name: str = knob("sgconvnext_tiny", "timm model name")
    num_classes: int | None = knob(None, "null: as many as the data has; needed for datasets that cannot tell")
    img_size: int | tuple[int, int] | None = knob(
        None, "pixels that a model tied to a size is built for, if it is one; null: data.img_size"
    )
    drop_path: float | None = knob(None, "stochastic depth of the last block, from 0 up; null: the model's own")
    drop: float | None = knob(None, "dropout before the classifier; null: the model's own")
    checkpoint: str = knob("", "file whose weights to start from, every key matching; '': none", path=True)
    checkpoint_ema: bool = knob(False, "take the EMA weights of model.checkpoint")
    new_head: bool = knob(False, "leave the classifier of model.checkpoint out, to train on other classes")
    pretrained: bool = knob(False, "timm's pretrained weights of this model")
    grad_checkpointing: bool = knob(False, "recompute activations in backward: less memory, a third slower")
    channels_last: bool = knob(False, "NHWC memory format")
    compile: bool = knob(False, "torch.compile the model")
    kwargs: dict[str, Any] = knob({}, "further arguments of timm.create_model")


@dataclass(kw_only=True, slots=True)
class Data:
    """Where the images come from, and their size."""

    dataset: str = knob(
        "", "'': folder of class folders, or tar; torch/..., hfds/..., wds/... as timm; digits; synthetic"
    )
    root: str = knob("", "folder that holds the splits; for hfds the cache folder", path=True)
    train_split: str = knob(
        "train", "folder or tar file under data.root, or the dataset's own name of the split", path=True
    )
    val_split: str = knob("val", "the same for validation", path=True)
    train_samples: int | None = knob(None, "images per epoch, for datasets that cannot tell (wds, synthetic)")
    val_samples: int | None = knob(None, "validation images, for datasets that cannot tell")
    download: bool = knob(False, "let torch/... datasets download what is missing")
    img_size: int | tuple[int, int] = knob(224, "pixels, height and width")
    crop_pct: float = knob(0.875, "evaluation: the image is resized to img_size / crop_pct, then cropped")
    crop_mode: Literal["center", "squash", "border"] = knob("center", "evaluation: squash resizes both sides")
    interpolation: Literal["bicubic", "bilinear", "nearest"] = knob("bicubic", "of every resize")
    mean: tuple[float, float, float] = knob(IMAGENET_MEAN, "subtracted from the channels, which are in 0..1")
    std: tuple[float, float, float] = knob(IMAGENET_STD, "divides them")
    upright: bool = knob(False, "turn images as their EXIF orientation says; ConvNeXt, timm and torchvision do not")
    max_unreadable: float = knob(0.01, "share of a split's images that may be unreadable before the run stops")
    workers: int = knob(8, "loader processes per device; 0 loads in the training process")
    pin_memory: bool = knob(True, "page-locked batches; used on CUDA only")


@dataclass(kw_only=True, slots=True)
class Augment:
    """What training does to an image, in this order; mixing comes last, on whole batches."""

    scale: tuple[float, float] = knob((0.08, 1.0), "random resized crop: share of the area")
    ratio: tuple[float, float] = knob((3 / 4, 4 / 3), "random resized crop: width over height")
    hflip: float = knob(0.5, "probability of a left-right flip")
    auto_augment: str = knob("", "timm's policy string, e.g. rand-m9-mstd0.5-inc1; '': none")
    color_jitter: float = knob(0.0, "brightness, contrast, saturation; has no effect under auto_augment")
    reprob: float = knob(0.0, "random erasing: probability per image")
    remode: Literal["const", "rand", "pixel"] = knob("pixel", "random erasing: what fills the hole")
    recount: int = knob(1, "random erasing: holes per image")
    mixup: float = knob(0.0, "alpha of mixup; 0: off")
    cutmix: float = knob(0.0, "alpha of cutmix; 0: off")
    mixup_prob: float = knob(1.0, "probability that a batch is mixed at all")
    mixup_switch_prob: float = knob(0.5, "probability of cutmix where both are on")
    mixup_mode: Literal["batch", "pair", "elem"] = knob("batch", "what shares one mixing weight")
    smoothing: float = knob(0.0, "label smoothing")


@dataclass(kw_only=True, slots=True)
class Optim:
    """AdamW and its schedule."""

    global_batch: int = knob(256, "images per update over all devices; lr belongs to it and is never rescaled")
    batch_per_device: int = knob(256, "images per forward; the accumulation steps follow from both")
    lr: float = knob(1e-3, "peak learning rate")
    min_lr: float = knob(1e-6, "learning rate at the end of the cosine")
    warmup_epochs: int = knob(0, "linear from 0 to lr, both ends included, counted inside epochs")
    weight_decay: float = knob(0.05, "not on biases and other one-dimensional parameters")
    betas: tuple[float, float] = knob((0.9, 0.999), "AdamW's averages")
    eps: float = knob(1e-8, "AdamW's denominator")
    layer_decay: float = knob(1.0, "factor on lr per layer below the head, as ConvNeXt groups them; 1: off")
    clip_grad: float | None = knob(None, "largest L2 norm of the gradient, in every precision; null: no clipping")


@dataclass(kw_only=True, slots=True)
class Ema:
    """Exponential moving average of the weights, evaluated beside them."""

    decay: float = knob(0.0, "per update; 0: no average is kept")


@dataclass(kw_only=True, slots=True)
class Run:
    """The machine."""

    device: Literal["auto", "cuda", "cpu"] = knob("auto", "auto: CUDA with nccl if there, else CPU with gloo")
    precision: Literal["fp32", "bf16", "fp16"] = knob("fp32", "autocast dtype; fp16 scales the loss")
    tf32: bool = knob(False, "let CUDA round the inputs of float32 products to TF32")
    cudnn_benchmark: bool = knob(True, "let cuDNN time its kernels")
    max_skips: int = knob(20, "fp16: updates in a row that the loss scaler may skip before the run stops")
    log_every: int = knob(50, "updates between two lines of the log")


@dataclass(kw_only=True, slots=True)
class Save:
    """Checkpoints. Each epoch's end has one, and a run that is asked to stop leaves one."""

    every: int | None = knob(None, "also every so many updates within an epoch; null: at its end only")
    keep: int = knob(3, "the newest so many stay, beside the best")
    max_failures: int = knob(5, "failures to save in a row, as on a full disk, before the run stops")


@dataclass(kw_only=True, slots=True)
class Watch:
    """Where the metrics of an epoch go, beside metrics.jsonl and, where matplotlib is installed, curves.png."""

    tensorboard: bool = knob(False, "event files in out/tensorboard; needs the package tensorboard")
    wandb: str = knob("", "Weights & Biases project; needs the package wandb; '': none")


@dataclass(kw_only=True, slots=True)
class Config:
    """A whole run. The defaults are a plain run; configs/imagenet.yaml holds ConvNeXt's recipe."""

    out: str = knob(
        "runs/run", "output folder: config.yaml, metrics.jsonl, checkpoints, last.pth, best.pth", path=True
    )
    epochs: int = knob(300, "passes over the training data, warm-up included")
    seed: int = knob(0, "of weights, order, augmentation and mixing")
    resume: str = knob(
        "", "'auto': go on from the newest good checkpoint in out, if any; or a path; '': start anew", path=True
    )
    allow_change: str = knob(
        "", "what may differ from the resumed checkpoint: knobs, sections, processes, device, training_images"
    )
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    optim: Optim = field(default_factory=Optim)
    ema: Ema = field(default_factory=Ema)
    run: Run = field(default_factory=Run)
    save: Save = field(default_factory=Save)
    watch: Watch = field(default_factory=Watch)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file (and its base), apply ``section.key=value`` overrides, check everything.

    Raises:
        ValueError: naming the place, the key or value, and the cure.
    """
    return _checked([*_layers(Path(path), ()), *_command_line(overrides)])


def from_dict(tree: dict[str, Any], place: str, overrides: Sequence[str] = ()) -> Config:
    """The typed, checked configuration of a nested dict, such as a checkpoint carries, under overrides."""
    return _checked([Layer(place, _typed(tree, Config, place)), *_command_line(overrides)])


class Layer(NamedTuple):
    """Knobs by section, each of its type, and the place that states them."""

    place: str
    tree: dict[str, Any]

    def states(self, key: str) -> bool:
        """Whether the knob, as in optim.lr, is set here."""
        tree: Any = self.tree
        for part in key.split("."):
            if not isinstance(tree, dict) or part not in tree:
                return False
            tree = tree[part]
        return True


def _command_line(overrides: Sequence[str]) -> list[Layer]:
    return [Layer("command line", parse_overrides(overrides))]


def _checked(layers: Sequence[Layer]) -> Config:
    """The configuration of layers, the last on top; an error names the one that its value comes from."""

    def place(key: str) -> str:
        return next((layer.place for layer in reversed(layers) if layer.states(key)), "by default")

    config: Config = _build(Config, functools.reduce(merge, (layer.tree for layer in layers)))
    for key, value in _values(config).items():
        section, _, name = key.rpartition(".")
        holder = getattr(config, section) if section else config
        if holder.__dataclass_fields__[name].metadata["path"]:
            try:
                setattr(holder, name, expand(value))  # here, so that what is recorded is what is used
            except ValueError as error:
                raise ValueError(f"{place(key)}: {key}={error}") from error
    _check_values(config, place)
    return config


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """``["optim.lr=4e-3"]`` to ``{"optim": {"lr": 0.004}}``."""
    tree: dict[str, Any] = {}
    for text in overrides:
        path, equals, value = text.partition("=")
        if not equals or not path or text.startswith("-"):
            raise ValueError(f"command line: {text!r} is no override; write section.key=value, as in optim.lr=1e-3")
        try:
            leaf: Any = value if _is_text(path) else yaml.load(value, _Loader)
        except NO_YAML as error:
            raise ValueError(f"command line: the value of {text!r} is no YAML; put it in quotes") from error
        for key in reversed(path.split(".")):
            leaf = {key: leaf}
        tree = merge(tree, leaf)
    return _typed(tree, Config, "command line")


def _is_text(path: str) -> bool:
    """Text is taken as typed, be it a path with '#' in it or a folder called 2024."""
    hint: Any = Config
    for key in path.split("."):
        hint = get_type_hints(hint).get(key) if dataclasses.is_dataclass(hint) else None
    return hint is str


def to_dict(config: Config) -> dict[str, Any]:
    """Nested dict of plain YAML values; `from_dict` gives the same configuration back."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    tree: dict[str, Any] = plain(dataclasses.asdict(config))
    return tree


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"optim": {"lr": 1}}`` to ``{"optim.lr": 1}``; model.kwargs, a value, stays whole."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, dict) and prefix + key != "model.kwargs"
        flat |= flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat


def describe() -> str:
    """Every knob with its default and its unit or reason, one per line."""
    lines = []
    for prefix, cls in [("", Config), *((f"{f.name}.", f.type) for f in _sections())]:
        lines.append(f"\n{cls.__doc__.splitlines()[0]}")  # type: ignore[union-attr]
        for item in dataclasses.fields(cls):  # type: ignore[arg-type]
            if "text" in item.metadata:
                shown = yaml.safe_dump(_shown_default(item), default_flow_style=True).split("\n")[0]
                choices = get_args(item.type) if get_origin(item.type) is Literal else ()
                text = item.metadata["text"] + (f" ({', '.join(choices)})" if choices else "")
                lines.append(f"  {prefix + item.name:<26} {shown:<22} {text}")
    return "\n".join(lines)


def _shown_default(item: dataclasses.Field[Any]) -> Any:
    if item.default_factory is not dataclasses.MISSING:
        return item.default_factory()
    return [float(f"{v:.4g}") for v in item.default] if isinstance(item.default, tuple) else item.default


def _sections() -> list[dataclasses.Field[Any]]:
    return [item for item in dataclasses.fields(Config) if dataclasses.is_dataclass(item.type)]


NO_YAML = (yaml.YAMLError, RecursionError, ValueError)  # the last of !!int x, and of text that is not UTF-8


MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """Safe YAML in which no key is given twice, and plain words are what they look like, see `RESOLVERS`."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.flat: set[yaml.Node] = set()

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Put what ``<<`` merges beneath the mapping's own keys; of several merged mappings the first one wins.

        A mapping comes here for itself and for every merge of it. PyYAML's own decides by the identity of strings.
        """
        if node in self.flat:
            return
        self.flat.add(node)
        own: dict[Any, tuple[yaml.Node, yaml.Node]] = {}
        merged: dict[Any, tuple[yaml.Node, yaml.Node]] = {}
        for key_node, value in node.value:
            key = "<<" if key_node.tag == MERGE else self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.YAMLError(f"{key!r} cannot be a key")
            if key in own:
                raise yaml.YAMLError(f"key {key!r} is given twice")
            own[key] = key_node, value
            if key_node.tag == MERGE:
                for source in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    if not isinstance(source, yaml.MappingNode):
                        raise yaml.YAMLError(f"<< merges keys and values, not {source.value!r}")
                    self.flatten_mapping(source)
                    merged = {self.construct_object(pair[0], deep=True): pair for pair in source.value} | merged
        node.value = list((merged | {key: pair for key, pair in own.items() if pair[0].tag != MERGE}).values())

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Refuse ``&a [*a]``, which holds itself without end."""
        if self.check_event(yaml.AliasEvent):
            anchor = self.peek_event().anchor
            if getattr(self.anchors.get(anchor), "end_mark", "") is None:
                raise yaml.YAMLError(f"*{anchor} is inside of &{anchor}")
        return super().compose_node(parent, index)


# YAML 1.1 reads 010 as 8, 1:30 as 90 and 2026-11-22, the name of a folder, as a date: here they are text.
# It reads 1e-6, without a dot, as text: here it is a number.
RESOLVERS = {
    "int": (r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)", "-+0123456789"),
    "float": (
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
}
_REPLACED = {f"tag:yaml.org,2002:{name}" for name in (*RESOLVERS, "timestamp")}
_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] not in _REPLACED]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, (_pattern, _first) in RESOLVERS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), list(_first))


def _layers(path: Path, above: tuple[Path, ...]) -> list[Layer]:
    """A YAML file after its base, each checked by itself, so that an error names the file it is in."""
    if path.resolve() in [other.resolve() for other in above]:
        raise ValueError(f"{path}: base files form a circle")
    asked = f", the base of {above[-1]}" if above else ""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ValueError(f"{path}{asked}: cannot be read ({error.strerror}); name an existing YAML file") from error
    except NO_YAML as error:
        raise ValueError(f"{path}{asked}: not valid YAML ({one_line(error)})") from error
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ValueError(f"{path}{asked}: holds {type(tree).__name__}, not sections of keys and values")
    base = tree.pop("base", None)
    if not isinstance(base, str | None):
        raise ValueError(f"{path}: base={base!r} must be one YAML file")
    tree = {key: value for key, value in tree.items() if not str(key).startswith("x-")}  # which only hold anchors
    own = Layer(str(path), _typed(tree, Config, str(path)))
    if not base:
        return [own]
    try:
        beneath = path.parent / expand(base)
    except ValueError as error:
        raise ValueError(f"{path}: base={error}") from error
    return [*_layers(beneath, (*above, path)), own]


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """One nested dict laid over another."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = merge(base[key], value) if both else value
    return merged


def _build(cls: Any, tree: dict[str, Any]) -> Any:
    hints = get_type_hints(cls)
    return cls(**{k: _build(hints[k], v) if dataclasses.is_dataclass(hints[k]) else v for k, v in tree.items()})


def _typed(tree: Any, cls: Any, place: str, prefix: str = "") -> dict[str, Any]:
    """The tree with every value converted to its field's type; unknown keys and wrong types are refused."""
    if not isinstance(tree, dict):
        raise ValueError(f"{place}: {prefix.rstrip('.')}={tree!r} must be a section of keys and values")
    hints = get_type_hints(cls)
    typed = {}
    for key, value in tree.items():
        if key not in hints:
            raise ValueError(f"{place}: unknown key {prefix + str(key)!r}{_suggest(str(key), prefix, hints)}")
        if dataclasses.is_dataclass(hints[key]):
            typed[key] = _typed(value, hints[key], place, f"{prefix}{key}.")
        else:
            typed[key] = _convert(value, hints[key], f"{place}: {prefix}{key}")
    return typed


def _suggest(key: str, prefix: str, hints: dict[str, Any]) -> str:
    close = difflib.get_close_matches(key, hints, n=1)
    if close:
        return f"; did you mean {prefix + close[0]!r}?"
    for section in _sections():
        if key in get_type_hints(section.type):
            return f"; did you mean {section.name + '.' + key!r}?"
    return f"; known here: {', '.join(hints)}"


def _convert(value: Any, hint: Any, place: str) -> Any:
    """The value as its field's type, or a ValueError that says what the field takes."""
    for option in get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,):
        converted = _convert_to(value, option)
        if converted is not _NO:
            return converted
    raise ValueError(f"{place}={value!r} must be {_spoken(hint)}{_suggest_choice(value, hint)}")


_NO = object()  # the value is not of that type; None is a value of its own


def _convert_to(value: Any, hint: Any) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any or (hint is type(None) and value is None):
        return value
    if origin is Literal:
        return value if value in args else _NO
    if hint is float:
        return _number(value)
    if hint is str and value is None:
        return ""  # `key=` and `key:` with nothing behind them
    if hint in (str, bool) or (hint is int and not isinstance(value, bool)):
        return value if isinstance(value, hint) else _NO
    if origin is dict:
        return dict(value) if isinstance(value, dict) else _NO
    if origin is tuple and isinstance(value, list | tuple) and len(value) == len(args):
        items = [_convert_to(item, arg) for item, arg in zip(value, args, strict=True)]
        return _NO if _NO in items else tuple(items)
    return _NO


def _number(value: Any) -> Any:
    """YAML 1.1 reads 4e-3, without a dot, as a string; here it is the number that was meant."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return _NO
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return _NO
    return number if math.isfinite(number) else _NO


def _spoken(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(args)}"
    if origin is tuple:
        return f"a list of {len(args)} ({', '.join(_spoken(arg) for arg in args)})"
    if origin in (Union, types.UnionType):
        return " or ".join(_spoken(arg) for arg in args)
    names = {str: "text", int: "a whole number", float: "a finite number", bool: "true or false", type(None): "null"}
    return names.get(hint, "keys and values")


def _suggest_choice(value: Any, hint: Any) -> str:
    close = difflib.get_close_matches(str(value), [str(arg) for arg in get_args(hint)], n=1)
    return f"; did you mean {close[0]!r}?" if get_origin(hint) is Literal and close else ""


Range = tuple[Callable[[Any], bool], str]

AT_LEAST_0: Range = (lambda value: value >= 0, "at least 0")
AT_LEAST_1: Range = (lambda value: value >= 1, "at least 1")
POSITIVE: Range = (lambda value: value > 0, "positive")
SHARE: Range = (lambda value: 0 <= value <= 1, "between 0 and 1")
BELOW_1: Range = (lambda value: 0 <= value < 1, "at least 0 and below 1")
FACTOR: Range = (lambda value: 0 < value <= 1, "above 0 and at most 1")

# What a knob must be; null is always well where a knob takes it. Bounds from above are of what nobody can mean and
# what would hang, or fail without naming the knob.
RANGES: dict[str, Range] = {
    "epochs": (lambda value: 1 <= value <= 10**6, "between 1 and 1000000"),
    "seed": (lambda value: 0 <= value < 2**32, f"between 0 and {2**32 - 1}"),  # which NumPy takes
    "out": (bool, "a folder"),
    "model.num_classes": AT_LEAST_1,
    "model.img_size": (lambda value: _smallest(value) >= 1, "at least 1"),
    "model.drop_path": BELOW_1,
    "model.drop": BELOW_1,
    "data.img_size": (lambda value: _smallest(value) >= 32, "at least 32 pixels, for one token in the last stage"),
    "data.crop_pct": (lambda value: 0.1 <= value <= 1, "between 0.1 and 1"),
    "data.train_samples": AT_LEAST_1,
    "data.val_samples": AT_LEAST_1,
    "data.workers": (lambda value: 0 <= value <= 1024, "between 0 and 1024"),
    "data.std": (lambda value: min(value) > 0, "positive"),
    "data.max_unreadable": BELOW_1,
    "augment.scale": (lambda value: 0 < value[0] <= value[1] <= 1, "0 < low <= high <= 1"),
    "augment.ratio": (lambda value: 0 < value[0] <= value[1], "0 < low <= high"),
    "augment.recount": (lambda value: 1 <= value <= 1000, "between 1 and 1000"),
    "augment.color_jitter": AT_LEAST_0,
    "augment.mixup": AT_LEAST_0,
    "augment.cutmix": AT_LEAST_0,
    "augment.hflip": SHARE,
    "augment.reprob": SHARE,
    "augment.mixup_prob": SHARE,
    "augment.mixup_switch_prob": SHARE,
    "augment.smoothing": BELOW_1,
    "optim.global_batch": AT_LEAST_1,
    "optim.batch_per_device": AT_LEAST_1,
    "optim.lr": POSITIVE,
    "optim.weight_decay": AT_LEAST_0,
    "optim.betas": (lambda value: 0 <= min(value) <= max(value) < 1, "at least 0 and below 1"),
    "optim.eps": AT_LEAST_0,
    "optim.layer_decay": FACTOR,
    "optim.clip_grad": (lambda value: value > 0, "positive, or null"),
    "ema.decay": BELOW_1,
    "run.log_every": AT_LEAST_1,
    "run.max_skips": AT_LEAST_0,
    "save.every": (lambda value: value >= 1, "at least 1, or null"),
    "save.keep": AT_LEAST_1,
    "save.max_failures": AT_LEAST_1,
}
WHOLE = 2**31 - 1  # torch takes no larger size
TINY, HUGE = 2.0**-126, 2.0**127  # of float32, in which training computes: beyond them 0 and infinity begin


def _smallest(size: int | tuple[int, int]) -> int:
    return size if isinstance(size, int) else min(size)


def _check_values(config: Config, place: Callable[[str], str]) -> None:
    """Ranges, and pairs of knobs that exclude each other; what depends on data or devices is checked where it is."""
    for key, value in _values(config).items():
        holds, cure = RANGES.get(key, (lambda _: True, ""))
        if value is not None and not holds(value):
            raise ValueError(f"{place(key)}: {_told(key, value)} must be {cure}")
        for number in value if isinstance(value, tuple) else [value]:
            if isinstance(number, int) and abs(number) > WHOLE and key != "seed":
                raise ValueError(f"{place(key)}: {key}={value} must be at most {WHOLE}")
            if isinstance(number, float) and number and not TINY <= abs(number) <= HUGE:
                raise ValueError(f"{place(key)}: {key}={value} must be 0, or of size {TINY:.2g} to {HUGE:.2g}")
    _check_pairs(config, place)


def _check_pairs(config: Config, place: Callable[[str], str]) -> None:
    """Of two knobs that exclude each other, both and their places are told."""
    model, augment, optim = config.model, config.augment, config.optim
    values, start = _values(config), bool(model.checkpoint)
    mix = "augment.mixup" if augment.mixup > 0 else "augment.cutmix"
    for key, holds, cure, other in [
        ("model.new_head", start or not model.new_head, "false with", "model.checkpoint"),
        ("model.checkpoint_ema", start or not model.checkpoint_ema, "false with", "model.checkpoint"),
        ("model.pretrained", not (start and model.pretrained), "false with", "model.checkpoint"),
        ("optim.min_lr", 0 <= optim.min_lr <= optim.lr, "between 0 and", "optim.lr"),
        ("optim.warmup_epochs", 0 <= optim.warmup_epochs < config.epochs, "at least 0 and below", "epochs"),
        (
            "optim.batch_per_device",
            values[mix] == 0 or optim.batch_per_device % 2 == 0,
            "even, for mixup mixes a batch with its own reverse, with",
            mix,
        ),
    ]:
        if not holds:
            where = f" ({place(other)})" if place(other) != place(key) else ""
            raise ValueError(
                f"{place(key)}: {_told(key, values[key])} must be {cure} {_told(other, values[other])}{where}"
            )


def _values(config: Config) -> dict[str, Any]:
    """Knob to value, but for model.kwargs."""
    found: dict[str, Any] = {}
    for section in ("", *(item.name for item in _sections())):
        holder = getattr(config, section) if section else config
        for item in dataclasses.fields(holder):
            if "text" in item.metadata and item.default is not dataclasses.MISSING:
                found[f"{section}.{item.name}".lstrip(".")] = getattr(holder, item.name)
    return found


def _told(key: str, value: Any) -> str:
    return f"{key}={value!r}" if isinstance(value, str) else f"{key}={value}"
