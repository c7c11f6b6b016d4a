"""Which backends of the long convolution were measured to be the fastest, to use, to save, and to show."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .errors import one_line
from .files import write_whole
from .longconv import BACKENDS, check, check_backend, tuned
from .models import ways
from .profile.table import Table, device_name

TIE = 1.05  # a backend has to be so many times as fast as the shipped choice: rounds differ by nearly as much
BLOCK_ERRORS = ("y error", "dx error", "weights error")
_MIDDLE = {"dtype": "", "work": "", "backend": "", "ms": ".3g", "ratio": ".2f"}
COLUMNS = {"convolution": "", "batch": "d", **_MIDDLE, **dict.fromkeys(check.ERRORS, ".1e"), "mark": ""}
BLOCK_COLUMNS = {
    **{"channels": "d", "tokens": "d", "hidden": "d", "gated": ""},
    **_MIDDLE,
    **dict.fromkeys(BLOCK_ERRORS, ".1e"),
    "mark": "",
}
NOTES = [
    "convolution: channels x length. training: forward and backward; inference: forward; frozen: forward with fixed "
    "taps. ratio: how many times as fast as the shipped choice; above 1 is faster. errors: from the definition in "
    f"float64, ||got - want|| / ||want|| at {check.PLACES} places.",
    f"chosen: what auto takes now, the shipped choice unless another backend is {TIE - 1:.0%} faster. A backend is "
    "left out where it is wrong, fails, is slow at its first turn, or would need very large matrices.",
]
BLOCK_NOTES = [
    "tokens: of all images of a batch. backend: modules calls norm and MLP as they are, packed takes weights laid out "
    "for oneDNN, triton takes the fused norm and sum; behind the slash, the tokens that go through at a time. errors: "
    "of the block without its shortcut, from the same in float64; ratio, chosen and left out as of the convolutions.",
]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured of one part of a network.

    Args:
        device, dtype, channels, work: the part, see `longconv.tuned.Convolution` and `models.ways.Block`.
        backend: the chosen one; of a block, the `models.ways.Way` as a string.
        shipped: what runs without a measurement.
        seconds: by backend, of those that are right.
        errors: by backend, relative, from the computation in float64.
        left_out: by backend, why it was not timed to the end.
    """

    device: str
    dtype: str
    channels: int
    work: tuned.Work
    backend: str
    shipped: str
    seconds: dict[str, float] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def gain(self) -> float:
        """How many times as fast as the shipped choice."""
        return self.seconds[self.shipped] / self.seconds[self.backend] if self.shipped in self.seconds else 1.0

    def told(self, what: str) -> str:
        """One line."""
        if self.backend == self.shipped:
            gain = "as shipped"
        elif self.shipped in self.left_out:
            gain = f"in place of {self.shipped}"
        else:
            gain = f"{self.gain:.2f} times as fast as {self.shipped}"
        unwell = {name: why for name, why in self.left_out.items() if name == self.shipped or why.startswith("wrong")}
        left_out = "".join(f"; {name} left out: {why}" for name, why in unwell.items())
        return f"{what}, {self.dtype}, {self.work}: {self.backend}, {gain}{left_out}"

    def check(self) -> None:
        """Raise ValueError if this version does not know the dtype."""
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"dtype {self.dtype!r}")


@dataclass(frozen=True, kw_only=True)
class Choice(Measured):
    """What was measured of one convolution of ``batch`` signals of ``length`` samples."""

    length: int
    batch: int

    @property
    def convolution(self) -> tuned.Convolution:
        """What the choice is made for."""
        return tuned.Convolution(self.device, getattr(torch, self.dtype), self.channels, self.length, self.work)

    def check(self) -> None:
        """Raise ValueError if this version does not know the dtype or the backend."""
        super().check()
        if type(self.batch) is not int:
            raise ValueError(f"batch {self.batch!r}")
        check_backend(self.backend)

    def use(self) -> None:
        """Let "auto" take it."""
        tuned.prefer(self.convolution, self.batch, self.backend)

    def __str__(self) -> str:
        return self.told(f"{self.channels} channels x {self.length} samples, batch {self.batch}")


@dataclass(frozen=True, kw_only=True)
class BlockChoice(Measured):
    """What was measured of one `models.ways.Block`, for maps of ``tokens`` tokens in all images together."""

    tokens: int
    hidden: int
    gated: bool

    def check(self) -> None:
        """Raise ValueError if this version does not know the dtype or the way."""
        super().check()
        if type(self.tokens) is not int:
            raise ValueError(f"tokens {self.tokens!r}")
        ways.Way.of(self.backend)

    def use(self) -> None:
        """Let blocks run like that."""
        dtype = getattr(torch, self.dtype)
        block = ways.Block(self.device, dtype, self.channels, self.hidden, self.gated, self.work)
        ways.prefer(block, self.tokens, ways.Way.of(self.backend))

    def __str__(self) -> str:
        return self.told(f"{'gated ' * self.gated}block of {self.channels} channels, {self.tokens} tokens")


@dataclass(frozen=True)
class Tuning:
    """Measured choices, and what they were measured on: device, versions, date."""

    choices: Sequence[Choice | BlockChoice]
    facts: dict[str, Any]

    def is_of(self, device: torch.device) -> bool:
        """Whether they were measured on a device of this kind."""
        return bool(self.facts["device"] == _name(device))

    def use(self) -> "Tuning":
        """Let "auto" take these choices from now on, in this process.

        Raises:
            ValueError: they were measured on another device, or name a backend that this version does not have.
        """
        for kind in {each.device for each in self.choices}:
            if not self.is_of(torch.device(kind)):
                raise ValueError(
                    f"the choices are of {self.facts['device']!r}, this is {_name(torch.device(kind))!r}; tune here"
                )
        for each in self.choices:
            each.check()
        for each in self.choices:
            each.use()
        return self

    def save(self, path: str | Path) -> None:
        """Write a JSON file, which `load` reads."""
        write_whole(Path(path), (json.dumps(self.state(), indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> "Tuning":
        """Read what `save` wrote; call `use` on it.

        Raises:
            ValueError: no such file, or no choices in it.
        """
        try:
            return cls.of_state(json.loads(Path(path).read_text()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            told = (
                f"{str(path)!r} holds no choices of sgconvnext.tune ({one_line(error)}); write them with Tuning.save"
            )
            raise ValueError(told) from error

    def state(self) -> dict[str, Any]:
        """As plain values, for JSON and checkpoints; torch tells its version as an object of its own."""
        state = {"facts": self.facts, "choices": [dataclasses.asdict(each) for each in self.choices]}
        plain: dict[str, Any] = json.loads(json.dumps(state))
        return plain

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> "Tuning":
        """The counterpart of `state`."""
        choices = [(Choice if "length" in each else BlockChoice)(**each) for each in state["choices"]]
        for each in choices:
            each.check()
        return cls(choices, {"device": state["facts"]["device"], **state["facts"]})

    def table(self) -> Table:
        """Every backend of every convolution."""
        rows = [
            {"convolution": f"{each.channels} x {each.length}", "batch": each.batch} | row
            for each in self.choices
            if isinstance(each, Choice)
            for row in _rows(each, list(BACKENDS))
        ]
        return Table("Backends of the long convolution, measured here", COLUMNS, rows, list(NOTES))

    def block_table(self) -> Table:
        """Every way of every block."""
        rows = [
            {"channels": each.channels, "tokens": each.tokens, "hidden": each.hidden}
            | {"gated": "yes" if each.gated else "no"}
            | row
            for each in self.choices
            if isinstance(each, BlockChoice)
            for row in _rows(each, [*(each.errors | each.left_out)])
        ]
        return Table("Ways of the blocks, measured here", BLOCK_COLUMNS, rows, list(BLOCK_NOTES))


def forget() -> None:
    """Let "auto" take the shipped choices again, in this process."""
    tuned.forget()
    ways.forget()


def _name(device: torch.device) -> str:
    there = device.type != "cuda" or torch.cuda.is_available()
    return device_name(device) if there else "a machine without CUDA"


def _rows(each: Measured, names: list[str]) -> list[dict[str, Any]]:
    rows = []
    for name in names:
        seconds, why = each.seconds.get(name), each.left_out.get(name)
        if seconds is None and why is None:
            continue
        marks = [
            *(["chosen"] if name == each.backend else []),
            *(["shipped"] if name == each.shipped else []),
            *([f"left out: {why}"] if why else []),
        ]
        row: dict[str, Any] = {"dtype": each.dtype, "work": each.work, "backend": name} | each.errors.get(name, {})
        if seconds is not None:
            shipped = each.seconds.get(each.shipped)
            row |= {"ms": 1000 * seconds, "ratio": shipped / seconds if shipped else None}
        rows.append(row | {"mark": ", ".join(marks)})
    return rows
