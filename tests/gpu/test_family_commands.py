"""The commands on a GPU for mixtures and hybrids, as typed: train, merge, eval and generate.

The models are tiny and random, so answers mean nothing; losses do. A run whose weights wait on the
host makes nearly the same adapter, and a merged model has nearly the same loss as its adapter.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from benchmarks.family_configs import tiny_model

from halfbyte.report.journal import read_journal
from tests.tiny import tiny_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FAMILIES = ("gpt_oss", "lfm2", "lfm2_moe", "qwen3_next", "qwen3_moe", "granitemoehybrid")
OPTIONS = "--max-steps 6 --learning-rate 0.01 --warmup-steps 0 --samples 1 --lora-r 8"


def call(root: Path, words: str) -> str:
    paths = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, paths))}
    done = subprocess.run(
        [sys.executable, "-m", "halfbyte", *words.split()],
        cwd=root,
        env=environment | {"HF_HUB_OFFLINE": "1"},
        text=True,
        capture_output=True,
        timeout=240,
    )
    assert done.returncode == 0, f"{words}: {done.returncode}\n{done.stderr[-3000:]}"
    return done.stdout


def commands(root: Path, family: str) -> dict[str, object]:
    """Type the commands on a family; return what they found."""
    folder = root / family
    tiny_model(family).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = [{"prompt": f"Count to {i}.", "completion": "one two three " * i} for i in range(1, 17)]
    (folder / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    call(folder, f"train --model model --data data.jsonl --output here {OPTIONS}")
    call(folder, f"train --model model --data data.jsonl --output away --weights host {OPTIONS}")
    found: dict[str, object] = {}
    for run in ("here", "away"):
        records = read_journal(folder / run / "journal.jsonl")
        found[run] = [record["loss"] for record in records if record["event"] == "step"]
    call(folder, "merge model here merged --into decoded --no-measure")
    for name, words in (("adapter", "--model model --adapter here"), ("merged", "--model merged")):
        more = "" if name == "adapter" else " --quant none"
        text = call(folder, f"eval {words} --data data.jsonl --max-new-tokens 4 --json{more}")
        found[name] = json.loads(text)["loss"]
    found["answer"] = call(
        folder, "generate --model model --adapter here --prompt hi --max-new-tokens 4"
    )
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    root = tmp_path_factory.mktemp("families")
    with ThreadPoolExecutor(len(FAMILIES)) as pool:
        begun = {family: pool.submit(commands, root, family) for family in FAMILIES}
        return {family: future.exception() or future.result() for family, future in begun.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_commands_work_on_a_gpu(family: str, results: dict[str, object]) -> None:
    found = results[family]
    assert isinstance(found, dict), found
    assert len(found["here"]) == len(found["away"]) == 6
    assert found["here"][-1] < found["here"][0] - 0.1
    assert found["away"] == pytest.approx(found["here"], rel=2e-2)
    assert found["merged"] == pytest.approx(found["adapter"], rel=2e-2)
