"""Which backends of the long convolution were measured to be the fastest, to use, to save, and to show."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .errors import one_line
from .files import write_whole
from .longconv import BACKENDS, check, check_backend, tuned
from .profile.table import Table, device_name

TIE = 1.05  # a backend has to be so many times as fast as the shipped choice: rounds differ by nearly as much
COLUMNS = {
    "convolution": "",
    "batch": "d",
    "dtype": "",
    "work": "",
    "backend": "",
    "ms": ".3g",
    "ratio": ".2f",
    **dict.fromkeys(check.ERRORS, ".1e"),
    "mark": "",
}
NOTES = [
    "convolution: channels x length. training: forward and backward; inference: forward; frozen: forward with fixed "
    "taps. ratio: how many times as fast as the shipped choice; above 1 is faster. errors: from the definition in "
    f"float64, ||got - want|| / ||want|| at {check.PLACES} places.",
    f"chosen: what auto takes now, the shipped choice unless another backend is {TIE - 1:.0%} faster. A backend is "
    "left out where it is wrong, fails, is slow at its first turn, or would need very large matrices.",
]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What was measured of one convolution.

    Args:
        device, dtype, channels, length, work, batch: the convolution, see `longconv.tuned.Convolution`.
        backend: the chosen one.
        shipped: what "auto" takes without a measurement.
        seconds: by backend, of those that are right.
        errors: by backend, relative, from the definition in float64.
        left_out: by backend, why it was not timed to the end.
    """

    device: str
    dtype: str
    channels: int
    length: int
    work: tuned.Work
    batch: int
    backend: str
    shipped: str
    seconds: dict[str, float] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def convolution(self) -> tuned.Convolution:
        """What the choice is made for."""
        return tuned.Convolution(self.device, getattr(torch, self.dtype), self.channels, self.length, self.work)

    @property
    def gain(self) -> float:
        """How many times as fast as the shipped choice."""
        return self.seconds[self.shipped] / self.seconds[self.backend] if self.shipped in self.seconds else 1.0

    def __str__(self) -> str:
        told = f"{self.channels} channels x {self.length} samples, batch {self.batch}, {self.dtype}, {self.work}"
        if self.backend == self.shipped:
            gain = "as shipped"
        elif self.shipped in self.left_out:
            gain = f"in place of {self.shipped}"
        else:
            gain = f"{self.gain:.2f} times as fast as {self.shipped}"
        unwell = {name: why for name, why in self.left_out.items() if name == self.shipped or why.startswith("wrong")}
        return f"{told}: {self.backend}, {gain}" + "".join(f"; {name} left out: {why}" for name, why in unwell.items())


@dataclass(frozen=True)
class Tuning:
    """Measured choices, and what they were measured on: device, versions, date."""

    choices: list[Choice]
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
            check_backend(each.backend)
        for each in self.choices:
            tuned.prefer(each.convolution, each.batch, each.backend)
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
        choices = [Choice(**each) for each in state["choices"]]
        for each in choices:
            if not isinstance(each.convolution.dtype, torch.dtype) or type(each.batch) is not int:
                raise ValueError(f"dtype {each.dtype!r}, batch {each.batch!r}")
        return cls(choices, {"device": state["facts"]["device"], **state["facts"]})

    def table(self) -> Table:
        """Every backend of every convolution."""
        rows = [row for each in self.choices for row in _rows(each)]
        return Table("Backends of the long convolution, measured here", COLUMNS, rows, list(NOTES))


def forget() -> None:
    """Let "auto" take the shipped choices again, in this process."""
    tuned.forget()


def _name(device: torch.device) -> str:
    there = device.type != "cuda" or torch.cuda.is_available()
    return device_name(device) if there else "a machine without CUDA"


def _rows(each: Choice) -> list[dict[str, Any]]:
    first = {"convolution": f"{each.channels} x {each.length}", "batch": each.batch, "dtype": each.dtype}
    first |= {"work": each.work}
    rows = []
    for name in BACKENDS:
        seconds, why = each.seconds.get(name), each.left_out.get(name)
        if seconds is None and why is None:
            continue
        marks = [
            *(["chosen"] if name == each.backend else []),
            *(["shipped"] if name == each.shipped else []),
            *([f"left out: {why}"] if why else []),
        ]
        row = first | {"backend": name} | each.errors.get(name, {})
        if seconds is not None:
            shipped = each.seconds.get(each.shipped)
            row |= {"ms": 1000 * seconds, "ratio": shipped / seconds if shipped else None}
        rows.append(row | {"mark": ", ".join(marks)})
    return rows
