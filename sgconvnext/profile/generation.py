"""Token by token: what a language model of SGConv takes after a long past, next to one of attention."""

import functools
import itertools
import time
from dataclasses import dataclass
from typing import Any

import torch
from timm.utils.model import reparameterize_model
from torch import Tensor

from ..longconv.check import relative_error
from ..sequences.generation import ConvState
from ..sequences.networks import LanguageModel, States
from .session import Session
from .table import Table
from .timing import RATIO, Step

VOCABULARY = 256  # bytes
CHUNK = 4096  # tokens of the past that are read at a time, as LanguageModel.generate does
SHORT, STEPS = 600, 8  # tokens of the check, so that SGConv reads its sums; the last of them step by step
TOLERANCE = 1e-4  # of what step and forward differ by
ALL_TAPS = " reparameterized"  # after the letters of a network

COLUMNS = {"layers": "", "past": "d", "batch": "d", "ms per token": ".4g", "spread, %": ".1f", "ratio": ".3f"}
COLUMNS |= {"state MiB": ".2f", "prefill s": ".3g"}
NOTES = [
    "layers: of a language model of bytes; C: SGConv, A: attention with a cache of keys and values, each with an MLP. "
    "reparameterized: the same network with fixed taps. A step then reads the whole past, tap by tap, in place of "
    "sums. Before the timing, the steps of every network are compared with its forward.",
    "past: tokens before the one that is timed; the network is built for one more. After every step the count of its "
    "states goes back by one, so that every step follows the same past.",
    "ms per token: of a step, a token of every sample in the batch; median over the rounds. spread: (slowest - "
    f"fastest round) / median. ratio: how many times as fast as the first network. {RATIO}",
    "state MiB: of the whole batch, what the states of all layers hold: of a token and layer, attention has key and "
    "value in float32, SGConv its input in float32 and a sum in float64. Taps are not counted.",
    f"prefill s: to read the past once, {CHUNK} tokens at a time, without warm-up. Where it is missing, the past was "
    "not read: keys, values and inputs of the states are random.",
]


@dataclass(frozen=True)
class Generation:
    """A past, and what steps follow it.

    Args:
        past: tokens so far.
        batch: B.
        dim: channels of the networks.
        longest_prefill: tokens that a network with attention reads; its time grows with their square.
        device: "cpu" or "cuda".
    """

    past: int
    batch: int = 1
    dim: int = 256
    longest_prefill: int = 2**14
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{self.batch} x {self.past} tokens"


def table(works: list[Generation], names: list[str], session: Session) -> Table:
    """Time the networks of these names after every past."""
    result = Table("A token after a long past", COLUMNS, notes=list(NOTES))
    for work in works:
        session.attempt(str(work), functools.partial(_measure, work, names, session, result))
    return result


def _measure(work: Generation, names: list[str], session: Session, result: Table) -> None:
    steps: list[Step] = []
    rows: list[dict[str, Any]] = []
    for name in names:
        model = network(name, work)
        if not (error := difference(model, work)) <= TOLERANCE:  # NaN is wrong too
            session.fail(f"step and forward of {name} differ by {error:.1e} before {work}.")
        states, prefill_s = read(model, work, whole="A" not in name or work.past <= work.longest_prefill)
        rows.append({"layers": name, "past": work.past, "batch": work.batch})
        rows[-1] |= {"state MiB": num_bytes(states) / 2**20, "prefill s": prefill_s}
        steps.append(prepare(model, states))
    timings = session.time(str(work), steps, torch.device(work.device))
    for row, timing in zip(rows, timings, strict=True):
        row |= {"ms per token": 1000 * timing.median, "spread, %": 100 * timing.spread, "ratio": timing.ratio}
        result.rows.append(row | {"seconds": timing.by_round})


def network(name: str, work: Generation) -> Any:
    """A network of these layers with random weights, for the past and one token more."""
    torch.manual_seed(0)
    letters = name.removesuffix(ALL_TAPS)
    model = LanguageModel(VOCABULARY, length=work.past + 1, layers=letters, dim=work.dim).to(work.device).eval()
    return reparameterize_model(model, inplace=True) if name != letters else model


@torch.no_grad()
def difference(model: Any, work: Generation) -> float:
    """||step - forward|| / ||forward|| of the logits after a few tokens, of which the last are steps."""
    tokens = _tokens(work, min(work.past + 1, SHORT))
    first = max(1, tokens.shape[1] - STEPS)
    _, states = model.prefill(tokens[:, :first])
    found = []
    for newest in tokens[:, first:].unbind(1):
        logits, states = model.step(newest, states)
        found.append(logits)
    return relative_error(torch.stack(found, 1), model(tokens)[:, first:])


def read(model: Any, work: Generation, whole: bool) -> tuple[States, float | None]:
    """The states after the past, and the seconds to read it; unless the whole is read, random ones, and None."""
    tokens = _tokens(work, work.past if whole else 1)
    start = time.perf_counter()
    states: Any = None
    for part in tokens.split(CHUNK, dim=1):
        logits, states = model.prefill(part, states)
    float(logits[0, 0])  # waits for a GPU
    if whole:
        return states, time.perf_counter() - start
    for state in states.layers:
        new = [
            part.new_empty(work.batch, *part.shape[1:-2], work.past - 1, part.shape[-1]).normal_()
            for part in state.parts
        ]
        if isinstance(state, ConvState):
            state.take(new[0])  # with its sums
        else:
            state.append(*new)
    return states, None


def prepare(model: Any, states: States) -> Step:
    """A step after the past, which leaves the states as they were."""
    newest = torch.zeros(len(states), dtype=torch.long, device=model.embed.weight.device)

    def step() -> None:
        model.step(newest, states)
        for state in states.layers:
            state.count -= 1

    return step


def num_bytes(states: States) -> int:
    """Of what is used of the states."""
    return sum(part.nbytes for state in states.layers for part in state.seen())


def _tokens(work: Generation, num: int) -> Tensor:
    return torch.randint(VOCABULARY, (work.batch, num), device=work.device)


def names(layers: list[str], depth: int, dim: int) -> list[str]:
    """The networks: a single letter stands for so many layers. Those with SGConv come again, reparameterized.

    Raises:
        ValueError: there are no such layers, or none that generate, with so many channels.
    """
    found = [letters * depth if len(letters) == 1 else letters for letters in layers]
    for letters in found:
        LanguageModel(VOCABULARY, length=1, layers=letters, dim=dim).step(torch.zeros(1, dtype=torch.long))
    return [*found, *(letters + ALL_TAPS for letters in found if "C" in letters)]


def works(pasts: list[int], batches: list[int], **how: Any) -> list[Generation]:
    """Every past and batch."""
    return [Generation(past, batch, **how) for past, batch in itertools.product(pasts, batches)]
