"""Where Pathfinder's dashed paths and circles lie: random paths that keep clear of each other.

1. Two long paths A and B are drawn by chance, such that the distance between A's ends and the one between an end of A
   and one of B differ by at most half a dash, and, if it can be had, the angles at which the paths leave them by at
   most 1 radian; then the short paths, which distract. The class plays no part in it.
2. "same": the circles lie on A's two ends. "different": on those ends of A and B.
"""

import math
from typing import Any, NamedTuple

import numpy as np

# Lengths in dashes: the picture of a sample is the same one at every size
THICKNESS = 0.375
RADIUS = 0.75  # of a circle
CLEAR = 2  # space between paths, in gaps between dashes
ALIKE = 0.5  # how much the distances of the circles may differ between the classes
TILTED = 1.0  # radians; likewise the angles between a path at a circle and the line to the other circle
APART = 3.5  # the circles are, at least

CELLS = 8  # of the map of what is occupied, to a dash
ALONG = (0.0, 0.5, 1.0)  # the points of a dash that are looked up in the map and entered there
RECENT = 2  # dashes at the tip of a path, to which the next one may come close
OPTIONS = 4  # turns that are tried before a dash is taken back
MOVES = 10  # dashes tried, for each one of a path, before another start is
SECONDS = 20  # second paths, to find circles that look alike in both classes
STRICT = 6  # of them; angles do not count for the rest, which long paths need, and where they tell nothing
STARTS = 40  # of a path, before the picture is begun again
WORK = 60_000  # dashes tried, before a picture is given up; the default ones need a few hundred to thousand


class Geometry(NamedTuple):
    """What a picture shows, in dashes from its upper left corner; the two long paths come first."""

    paths: list[np.ndarray[Any, Any]]  # (dashes, 4) each: x and y of where a dash begins and ends
    circles: np.ndarray[Any, Any]  # (2 classes, 2 circles, 2): x and y


class _Dash(NamedTuple):
    ends: tuple[float, float, float, float]
    heading: float
    cells: list[tuple[int, int]]  # row and column, along it


class _Map:
    """Where no further dash may lie: each cell counts the dashes that are too close; the border is one."""

    def __init__(self, field: float, gap: float) -> None:
        margin = (THICKNESS + CLEAR * gap) * CELLS + 0.5  # cells; a half for the rounding
        self.reach = math.ceil(margin)
        row, column = np.mgrid[-self.reach : self.reach + 1, -self.reach : self.reach + 1]
        self.near = (row**2 + column**2 <= margin**2).astype(np.int16)
        self.gap = gap
        self.tried = 0  # dashes
        self.side = side = math.ceil(field * CELLS) + 2 * self.reach
        border = self.reach + math.ceil(RADIUS * CELLS)
        self.count = np.ones((side, side), np.int16)
        self.count[border : side - border, border : side - border] = 0

    def enter(self, dash: _Dash, times: int = 1) -> None:
        """Occupy the space around a dash, or with -1 leave it."""
        for row, column in dash.cells:
            top, left = row - self.reach, column - self.reach
            self.count[top : row + self.reach + 1, left : column + self.reach + 1] += times * self.near

    def dash(self, x: float, y: float, heading: float) -> _Dash | None:
        """The dash that begins there, None where it is too close to another path."""
        self.tried += 1
        dx, dy = math.cos(heading), math.sin(heading)
        cells = []
        for u in ALONG:
            row, column = int((y + u * dy) * CELLS) + self.reach, int((x + u * dx) * CELLS) + self.reach
            if not (0 <= row < self.side and 0 <= column < self.side) or self.count[row, column]:
                return None
            cells.append((row, column))
        return _Dash((x, y, x + dx, y + dy), heading, cells)

    def walk(self, rng: np.random.Generator, path: list[_Dash], dashes: int, turn: float) -> bool:
        """Continue a path of one dash, and enter it; where it gets no further, nothing is entered."""
        options: list[list[float]] = []  # turns not tried yet, for each dash after the first
        for _ in range(MOVES * dashes):
            if len(path) == dashes:
                for dash in path[-RECENT:]:
                    self.enter(dash)
                return True
            if len(path) == 1 + len(options):
                options.append(rng.uniform(-turn, turn, OPTIONS).tolist())
            if options[-1]:
                heading = path[-1].heading + options[-1].pop()
                x, y = path[-1].ends[2:]
                found = self.dash(x + self.gap * math.cos(heading), y + self.gap * math.sin(heading), heading)
                if found:
                    path.append(found)
                    if len(path) > RECENT:
                        self.enter(path[-RECENT - 1])
                continue
            options.pop()
            if not options:
                break
            if len(path) > RECENT:
                self.enter(path[-RECENT - 1], -1)
            path.pop()
        for dash in path[:-RECENT]:
            self.enter(dash, -1)
        return False

    def path(self, rng: np.random.Generator, dashes: int, turn: float) -> list[_Dash] | None:
        """A path from one of some random starts, entered; None where none has room."""
        free = np.argwhere(self.count == 0)
        for _ in range(STARTS if len(free) else 0):
            y, x = ((free[rng.integers(len(free))] + rng.random(2) - self.reach) / CELLS).tolist()
            first = self.dash(x, y, rng.random() * math.tau)
            if first and self.walk(rng, path := [first], dashes, turn):
                return path
        return None


def layout(
    rng: np.random.Generator, field: float, gap: float, path_length: int, distractors: int, turn: float
) -> Geometry | None:
    """Paths and the circles of both classes, or None where no room was found for them.

    Args:
        rng: what is drawn from.
        field: the picture's side in dashes.
        gap: between the dashes of a path, in dashes.
        path_length: dashes of each of the two long paths.
        distractors: shorter paths, of a third as many dashes.
        turn: between two dashes of a path at most, in radians; all smaller ones are equally likely.
    """
    tried = 0
    while tried < WORK:
        room = _Map(field, gap)
        paths, circles = _long_paths(rng, room, path_length, turn)
        while paths[-1] and len(paths) < 2 + distractors:
            paths.append(room.path(rng, max(path_length // 3, 2), turn))
        if paths[-1]:
            return Geometry([np.array([dash.ends for dash in path]) for path in paths], np.array(circles))
        tried += room.tried
    return None


def _long_paths(rng: np.random.Generator, room: _Map, path_length: int, turn: float) -> tuple[list[Any], Any]:
    """Two paths, and the places of the circles in each class; the last path is None where there is no room."""
    first = room.path(rng, path_length, turn)
    for number in range(SECONDS if first else 0):
        second = room.path(rng, path_length, turn)
        if not second:
            break
        if choices := _alike(_ends(first), _ends(second), TILTED if number < STRICT else math.pi):
            return [first, second], choices[rng.integers(len(choices))]
        for dash in second:
            room.enter(dash, -1)
    return [None], None


def _ends(path: Any) -> list[tuple[Any, float]]:
    """Where a path begins and ends, each with the heading in which the path goes on from there."""
    return [(path[0].ends[:2], path[0].heading), (path[-1].ends[2:], path[-1].heading + math.pi)]


def _alike(first: Any, second: Any, tilted: float) -> list[Any]:
    """Circles for "different" and "same" that look alike, for each choice of A, B and their ends."""
    found = []
    for a, b in ((first, second), (second, first)):
        distance, tilts = _view(*a)
        for pair in ((end, other) for end in a for other in b):
            other_distance, other_tilts = _view(*pair)
            if (
                min(distance, other_distance) >= APART
                and abs(distance - other_distance) <= ALIKE
                and all(abs(tilt - other) <= tilted for tilt, other in zip(tilts, other_tilts, strict=True))
            ):
                found.append(([place for place, _ in pair], [place for place, _ in a]))
    return found


def _view(one: Any, other: Any) -> tuple[float, list[float]]:
    """The distance of two ends, and the angles, 0 to pi, between their paths and the line to the other end, sorted."""
    (x, y), (u, v) = one[0], other[0]
    line = math.atan2(v - y, u - x)
    angles = (one[1] - line, other[1] - line - math.pi)
    return math.hypot(u - x, v - y), sorted(abs(math.remainder(angle, math.tau)) for angle in angles)
