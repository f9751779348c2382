"""A curve of bounded size, however many steps a run has.

A journal of a million steps is a gigabyte of Python objects if every value of it is kept, and no
screen shows more than a few thousand points. So up to 4096 points are kept as they are; where there
are more, neighbours are averaged.
"""

from collections.abc import Sequence
from statistics import fmean
from typing import overload

Point = tuple[float, float]

_MOST_POINTS = 4096


class Curve(Sequence[Point]):
    """Points (x, y), x ascending; each the mean of ``share`` values and at the last of their x.

    Attributes:
        share: Values in a point: 1, and doubled whenever there are too many points.
        last: The last value, exactly; None without any.
        highest: The highest value, exactly; None without any.
        furthest: The largest x; 0 without any.
    """

    def __init__(self) -> None:
        self.share = 1
        self.last: float | None = None
        self.highest: float | None = None
        self.furthest = 0.0
        self._points: list[Point] = []
        self._pending: list[Point] = []

    def append(self, x: float, y: float) -> None:
        """Add a value."""
        self.last = y
        self.highest = y if self.highest is None else max(self.highest, y)
        self.furthest = max(self.furthest, x)
        self._pending.append((x, y))
        if len(self._pending) < self.share:
            return
        self._points.append(_mean(self._pending))
        self._pending = []
        if len(self._points) == _MOST_POINTS:
            pairs = range(0, _MOST_POINTS, 2)
            self._points = [_mean(self._points[i : i + 2]) for i in pairs]
            self.share *= 2

    @overload
    def __getitem__(self, index: int) -> Point: ...

    @overload
    def __getitem__(self, index: slice) -> list[Point]: ...

    def __getitem__(self, index: int | slice) -> Point | list[Point]:
        return self._all[index]

    def __len__(self) -> int:
        return len(self._points) + bool(self._pending)

    @property
    def _all(self) -> list[Point]:
        return [*self._points, _mean(self._pending)] if self._pending else self._points


def _mean(points: Sequence[Point]) -> Point:
    return points[-1] if len(points) == 1 else (points[-1][0], fmean(y for _, y in points))
