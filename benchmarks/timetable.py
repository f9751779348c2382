"""A second task: find a bus in a timetable given in prose, and compute how long it takes.

    Buses from the mill: the one to Ashby goes at 9:05 from bay 3 and gets there at 9:50, ...
    How do I get to Ashby?
    Ashby: 9:05 from bay 3, 45 minutes

Unlike the demo's, it is more than copying: a row must be found, by its town or as the first after a
given time, and a duration computed, which a model of 135 million weights learns only partly. So its
loss is far from zero, and differences between bases are visible. Held-out cases have other towns,
places, hours and phrasings than the examples.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SYSTEM = "Answer from the timetable in one line."


def _commas(text: str) -> tuple[str, ...]:
    return tuple(" ".join(part.split()) for part in text.split(","))


@dataclass(frozen=True)
class Vocabulary:
    """What timetables are made of: one for training, one held out, with nothing in common."""

    held_out: bool
    hours: tuple[int, ...]
    towns: tuple[str, ...]
    places: tuple[str, ...]
    openings: tuple[str, ...]
    rows: tuple[str, ...]
    by_town: tuple[str, ...]
    by_time: tuple[str, ...]


def clock(minutes: int) -> str:
    """Minutes since midnight as 9:05."""
    return f"{minutes // 60}:{minutes % 60:02}"


def make_cases(vocabulary: Vocabulary, count: int, *, seed: int) -> list[dict[str, object]]:
    """Returns ``count`` rows of ``messages``; the same for the same seed."""
    draw = np.random.Generator(np.random.PCG64([seed, vocabulary.held_out, 7]))

    def one(values: Sequence[str]) -> str:
        return values[int(draw.integers(len(values)))]

    cases: list[dict[str, object]] = []
    for _ in range(count):
        towns = [vocabulary.towns[i] for i in draw.permutation(len(vocabulary.towns))[:3]]
        hour = int(draw.choice(vocabulary.hours))
        starts = [60 * hour + 5 * int(i) for i in draw.choice(24, 3, replace=False)]
        takes = [5 * int(draw.integers(2, 20)) for _ in towns]
        bays = draw.permutation(9)[:3] + 1
        row = one(vocabulary.rows)
        departures = [
            row.format(town=town, start=clock(start), end=clock(start + long), bay=bay)
            for town, start, long, bay in zip(towns, starts, takes, bays, strict=True)
        ]
        opening = one(vocabulary.openings).format(place=one(vocabulary.places))
        if draw.random() < 0.5:
            asked = int(draw.integers(3))
            question = one(vocabulary.by_town).format(town=towns[asked])
        else:
            asked = int(draw.integers(3))
            before = [start for start in starts if start < starts[asked]]
            earliest = max(before, default=starts[asked] - 20)
            now = int(draw.integers(earliest + 1, starts[asked]))
            question = one(vocabulary.by_time).format(time=clock(now))
        answer = (
            f"{towns[asked]}: {clock(starts[asked])} from bay {bays[asked]}, {takes[asked]} minutes"
        )
        user = f"{opening} {'; '.join(departures)}. {question}"
        contents = (("system", SYSTEM), ("user", user), ("assistant", answer))
        cases.append({"messages": [{"role": role, "content": text} for role, text in contents]})
    return cases


def write_task(directory: Path, *, seed: int, train: int, test: int) -> tuple[Path, Path]:
    """Writes the examples and the held-out cases, which are the same for every seed."""
    files = directory / "timetable.train.jsonl", directory / "timetable.test.jsonl"
    cases = make_cases(TRAINING, train, seed=seed), make_cases(HELD_OUT, test, seed=0)
    for path, rows in zip(files, cases, strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return files


TRAINING = Vocabulary(
    held_out=False,
    hours=(7, 8, 10, 11, 13, 14, 16, 17, 19),
    towns=_commas("""
Ashby, Barford, Corley, Denham, Elstow, Farnley, Girton, Harlow, Ilkley, Kelso, Linton, Marlow,
Norton, Olney, Penrith, Quorn, Ripley, Selby, Thirsk, Upton, Wells, Yarm, Alton, Bourne, Crewe, Diss
"""),
    places=_commas(
        "the market, the mill, the town hall, the old bridge, the hospital, the harbour"
    ),
    openings=(
        "Buses from {place}:",
        "From {place} these buses go today:",
        "Timetable for {place}:",
    ),
    rows=(
        "the one to {town} goes at {start} from bay {bay} and gets there at {end}",
        "{town} at {start}, bay {bay}, arriving {end}",
        "at {start} from bay {bay} to {town}, there at {end}",
        "to {town}, leaving {start}, arriving {end}, bay {bay}",
    ),
    by_town=(
        "How do I get to {town}?",
        "I have to be in {town} today.",
        "Which bus goes to {town}?",
        "When can I go to {town}, and how long does it take?",
        "{town}, please.",
    ),
    by_time=(
        "It is {time} now. Which bus is next?",
        "Which is the first bus after {time}?",
        "I will be there at {time} and take whatever leaves first.",
        "What leaves next, if it is {time}?",
    ),
)

HELD_OUT = Vocabulary(
    held_out=True,
    hours=(6, 9, 12, 15, 18),
    towns=_commas("""
Amble, Bruton, Cromer, Dorking, Epsom, Fakenham, Goole, Hexham, Keswick, Leek, Malton, Newark,
Oakham, Pickering, Redcar, Stroud, Totnes, Whitby
"""),
    places=_commas("the station, the library, the church, the park gate"),
    openings=("Here is what leaves from {place}:", "These buses leave from {place}:"),
    rows=(
        "to {town} from bay {bay} at {start}, in {town} at {end}",
        "bay {bay}: {town}, departs {start}, arrives {end}",
        "the {start} to {town} is at bay {bay} and arrives at {end}",
    ),
    by_town=(
        "What is the bus to {town}?",
        "I want to go to {town}.",
        "Tell me how to reach {town}.",
    ),
    by_time=(
        "Which bus can I take next? It is {time}.",
        "I'm at the stop at {time}. What is the next bus?",
        "Which bus leaves soonest after {time}?",
    ),
)
