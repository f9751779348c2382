"""Chats of realistic lengths, as JSONL: the data of whole-run benchmarks.

    python benchmarks/chats.py --count 2000 --output chats.jsonl

Kernels are timed on steps of one length, but real data has all lengths, and how a trainer handles
that (padding, packing, shapes it has not seen) is a large part of its speed. A row here has a
lognormal number of tokens, as chats do: half have fewer than 310, one in a hundred is truncated at
2048, and the mean is 417. Some have several turns. The text is a random walk over the word pairs of
*Alice's Adventures in Wonderland* (``texts/``): meaningless, but with the words, their order and
the commas of English, so that it is tokenised like prose.

Row i is a function of the seed and i alone: fewer rows are a prefix of more. No tokenizer is
needed, since tokens are estimated from words; ``tests/benchmarks/test_chats.py`` compares this with
SmolLM2's.
"""

import argparse
import json
import math
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

TEXTS = Path(__file__).with_name("texts")
MEDIAN, SIGMA = 315.0, 0.8  # of the lognormal: its mean is exp(σ²/2) = 1.38 times its median
LONGEST, SHORTEST = 2048, 60  # tokens of a row
TOKENS_PER_WORD = 1.355  # SmolLM2's, of this text
TOKENS_OF_TEMPLATE, TOKENS_OF_TURN = 21, 11  # its system message; the marks of question and answer
TURNS = (1, 1, 1, 1, 1, 1, 2, 2, 3, 4)  # one of them is drawn
HELD_OUT = 1_000_000  # added to a seed, it makes rows that no training has seen

Row = dict[str, Any]


class Walk:
    """English-like text: each word is followed as it is somewhere in the book."""

    def __init__(self) -> None:
        self._after: defaultdict[str, list[str]] = defaultdict(list)
        for name in ("alice.txt", "alice_training.txt"):
            words = (TEXTS / name).read_text(encoding="utf-8").split()
            for word, following in zip(words, [*words[1:], words[0]], strict=True):
                self._after[word].append(following)
        self._starts = sorted(word for word in self._after if word[0].isupper() and word.isalpha())

    def text(self, draw: random.Random, words: int, end: str) -> str:
        """``words`` words, at least one, of which the last has ``end`` behind it."""
        said = [draw.choice(self._starts)]
        while len(said) < words:
            said.append(draw.choice(self._after[said[-1]]))
        return " ".join(said).rstrip(" ,.;:!?’”)–") + end


def chat(walk: Walk, seed: int, index: int) -> Row:
    """Row ``index`` of the rows of ``seed``: questions and answers in turn."""
    draw = random.Random(f"{seed}/{index}")
    drawn = draw.lognormvariate(math.log(MEDIAN), SIGMA)
    tokens = min(LONGEST, max(SHORTEST, drawn))
    turns = draw.choice(TURNS) if tokens > 4 * SHORTEST else 1
    left = tokens - TOKENS_OF_TEMPLATE - turns * TOKENS_OF_TURN
    words = left / TOKENS_PER_WORD / turns
    messages = []
    for _ in range(turns):
        asked = max(2, round(words * draw.uniform(0.1, 0.5)))
        replied = max(1, round(words) - asked)
        messages += [
            {"role": "user", "content": walk.text(draw, asked, "?")},
            {"role": "assistant", "content": walk.text(draw, replied, ".")},
        ]
    return {"messages": messages}


def write_chats(path: Path, count: int, *, seed: int = 0, held_out: bool = False) -> Path:
    """Write ``count`` rows; those of ``held_out`` are others than those of any training seed."""
    walk, seed = Walk(), seed + HELD_OUT * held_out
    lines = (json.dumps(chat(walk, seed, index), ensure_ascii=False) for index in range(count))
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out", action="store_true", help="rows that are in no training data")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    print(write_chats(args.output, args.count, seed=args.seed, held_out=args.held_out))


if __name__ == "__main__":
    main()
