"""From a nested dict of plain values to typed dataclasses: unknown keys and wrong types are refused."""

import dataclasses
import difflib
import math
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def sections(schema: Any) -> list[dataclasses.Field[Any]]:
    """The fields of a dataclass that are dataclasses themselves."""
    return [item for item in dataclasses.fields(schema) if dataclasses.is_dataclass(item.type)]


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """One nested dict laid over another."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = merge(base[key], value) if both else value
    return merged


def build(schema: Any, tree: dict[str, Any]) -> Any:
    """The dataclass with the values of a typed tree; all other fields have their defaults."""
    hints = get_type_hints(schema)
    return schema(**{k: build(hints[k], v) if dataclasses.is_dataclass(hints[k]) else v for k, v in tree.items()})


def typed(tree: Any, schema: Any, place: str) -> dict[str, Any]:
    """The tree with every value converted to its field's type.

    Args:
        tree: plain values by key and section.
        schema: the dataclass that says which keys there are, and their types.
        place: the file, or the like, that the tree comes from; every message begins with it.

    Raises:
        ValueError: a key is unknown, or a value is of another type; the message says what the field takes.
    """
    return _typed(tree, schema, place, "", schema)


def _typed(tree: Any, section: Any, place: str, prefix: str, schema: Any) -> dict[str, Any]:
    if not isinstance(tree, dict):
        raise ValueError(f"{place}: {prefix.rstrip('.')}={tree!r} must be a section of keys and values")
    hints, found = get_type_hints(section), {}
    for key, value in tree.items():
        if key not in hints:
            raise ValueError(f"{place}: unknown key {prefix + str(key)!r}{_suggest(str(key), prefix, hints, schema)}")
        if dataclasses.is_dataclass(hints[key]):
            found[key] = _typed(value, hints[key], place, f"{prefix}{key}.", schema)
        else:
            found[key] = _convert(value, hints[key], f"{place}: {prefix}{key}")
    return found


def _suggest(key: str, prefix: str, hints: dict[str, Any], schema: Any) -> str:
    close = difflib.get_close_matches(key, hints, n=1)
    if close:
        return f"; did you mean {prefix + close[0]!r}?"
    for section in sections(schema):
        if key in get_type_hints(section.type):
            return f"; did you mean {section.name + '.' + key!r}?"
    return f"; known here: {', '.join(hints)}"


def _convert(value: Any, hint: Any, place: str) -> Any:
    for option in get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,):
        converted = _convert_to(value, option)
        if converted is not _NO:
            return converted
    raise ValueError(f"{place}={value!r} must be {_spoken(hint)}{_suggest_choice(value, hint)}")


_NO = object()  # means: the value is not of that type. None would be a value


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
    """YAML 1.1 reads 4e-3, without a dot, as text; here it is the number that was meant."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return _NO
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return _NO
    return number if math.isfinite(number) else _NO


def _spoken(hint: Any) -> str:
    """The type in words."""
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
