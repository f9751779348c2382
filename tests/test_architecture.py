"""The tour of the code names files that are there, in its text and in its figures."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "halfbyte"
FILE = re.compile(r"[a-z_]+/[a-z_0-9]+\.(?:py|cpp)\b")


@pytest.mark.parametrize("page", ["architecture.md", "batch.svg", "weight.svg"])
def test_every_file_it_names_is_there(page: str) -> None:
    named = set(FILE.findall((ROOT / "docs" / page).read_text())) - {"docs/trace.py"}
    assert len(named) > 10
    assert [name for name in sorted(named) if not (SOURCE / name).exists()] == []


def test_both_figures_begin_and_end_where_they_say() -> None:
    batch = FILE.findall((ROOT / "docs" / "batch.svg").read_text())
    assert batch[0] == "cli/__init__.py"
    assert {"engine/forward_backward.py", "optim/adamw.py", "checkpoint/peft.py"} <= set(batch)
    weight = FILE.findall((ROOT / "docs" / "weight.svg").read_text())
    assert (weight[0], weight[-1]) == ("checkpoint/base_model.py", "linear/decoded_cache.py")
