"""YAML files with one optional base, and section.key=value overrides, as layers of typed values."""

import dataclasses
import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import yaml

from ..errors import one_line
from ..files import expand
from .typed import merge, typed


class Layer(NamedTuple):
    """Typed values by section and key, and the place that states them."""

    place: str
    tree: dict[str, Any]

    def states(self, key: str) -> bool:
        """Whether this layer sets the knob, which is given as in optim.lr."""
        tree: Any = self.tree
        for part in key.split("."):
            if not isinstance(tree, dict) or part not in tree:
                return False
            tree = tree[part]
        return True


def read_layers(path: Path, schema: Any, above: tuple[Path, ...] = ()) -> list[Layer]:
    """The base of a YAML file, if it names one, then the file; each is checked alone, so that errors name the file.

    Args:
        path: of the file.
        schema: the dataclass that says which keys there are.
        above: the files that led here, each with the next as its base.

    Raises:
        ValueError: a file cannot be read, or holds what it must not.
    """
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
    tree = {key: value for key, value in tree.items() if not str(key).startswith("x-")}  # x-... only holds anchors
    own = Layer(str(path), typed(tree, schema, str(path)))
    if not base:
        return [own]
    try:
        beneath = path.parent / expand(base)
    except ValueError as error:
        raise ValueError(f"{path}: base={error}") from error
    return [*read_layers(beneath, schema, (*above, path)), own]


def read_overrides(overrides: Sequence[str], schema: Any) -> Layer:
    """``["optim.lr=4e-3"]`` to a layer with ``{"optim": {"lr": 0.004}}``; a later override wins."""
    tree: dict[str, Any] = {}
    for text in overrides:
        path, equals, value = text.partition("=")
        if not equals or not path or text.startswith("-"):
            raise ValueError(f"command line: {text!r} is no override; write section.key=value, as in optim.lr=1e-3")
        try:
            leaf: Any = value if _is_text(path, schema) else yaml.load(value, _Loader)
        except NO_YAML as error:
            raise ValueError(f"command line: the value of {text!r} is no YAML; put it in quotes") from error
        for key in reversed(path.split(".")):
            leaf = {key: leaf}
        tree = merge(tree, leaf)
    return Layer("command line", typed(tree, schema, "command line"))


def _is_text(path: str, schema: Any) -> bool:
    """Text is taken as typed, even a path with '#' in it or a folder called 2024."""
    hint = schema
    for key in path.split("."):
        hint = get_type_hints(hint).get(key) if dataclasses.is_dataclass(hint) else None
    return hint is str


# What PyYAML raises. ValueError is for !!int x, and for bytes that are not UTF-8
NO_YAML = (yaml.YAMLError, RecursionError, ValueError)
MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """Safe YAML in which no key is given twice, and plain words are what they look like, see `RESOLVERS`."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.flat: set[yaml.Node] = set()

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Put what ``<<`` merges beneath the mapping's own keys; of several merged mappings the first one wins.

        PyYAML calls this for a mapping itself and for every merge of it. Its own version compares keys by identity.
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
                merged = self._sources(value) | merged
        node.value = list((merged | {key: pair for key, pair in own.items() if pair[0].tag != MERGE}).values())

    def _sources(self, value: yaml.Node) -> dict[Any, tuple[yaml.Node, yaml.Node]]:
        """The keys and values of what stands behind one ``<<``."""
        merged: dict[Any, tuple[yaml.Node, yaml.Node]] = {}
        for source in value.value if isinstance(value, yaml.SequenceNode) else [value]:
            if not isinstance(source, yaml.MappingNode):
                raise yaml.YAMLError(f"<< merges keys and values, not {source.value!r}")
            self.flatten_mapping(source)
            merged = {self.construct_object(pair[0], deep=True): pair for pair in source.value} | merged
        return merged

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Refuse ``&a [*a]``, which contains itself without end."""
        if self.check_event(yaml.AliasEvent):
            anchor = self.peek_event().anchor
            if getattr(self.anchors.get(anchor), "end_mark", "") is None:
                raise yaml.YAMLError(f"*{anchor} is inside of &{anchor}")
        return super().compose_node(parent, index)


# YAML 1.1 reads 010 as 8, 1:30 as 90 and 2026-11-22, the name of a folder, as a date: here they are text.
# YAML 1.1 reads 1e-6, without a dot, as text: here it is a number.
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
