"""What is fuzzed: every reader of files that users give or that a run left behind.

Valid inputs are made by code; nothing is read from the repository.
"""

import importlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from halfbyte.checkpoint.base_model import load_base, open_base
from halfbyte.checkpoint.bitsandbytes import write_quantized
from halfbyte.checkpoint.gguf_file import ARRAY, GGUFFile
from halfbyte.checkpoint.peft import load_adapter, save_adapter
from halfbyte.checkpoint.run_state import OPTIMIZER_NAME, STATE_NAME, latest_run, load_run, save_run
from halfbyte.checkpoint.safetensors_file import SafetensorsFile, write_safetensors
from halfbyte.cli import COMMANDS
from halfbyte.cli.opening import as_trained
from halfbyte.config.reading import check, load_config, to_yaml
from halfbyte.config.schema import BaseOptions
from halfbyte.data import Encoder, load_dataset
from halfbyte.linear.lora import LoRAConfig
from halfbyte.models.build import BaseRecipe
from halfbyte.report.comparison import Comparison, finished_run, read_result
from halfbyte.report.journal import Journal
from halfbyte.report.page import write_page
from halfbyte.train.loss_scale import LossScale
from tests.checkpoint.gguf_models import write_gguf
from tests.fuzz import mutation
from tests.fuzz.mutation import Mutation
from tests.tiny import CHATML, GENERATION, LLAMA2, tiny_tokenizer, write_tiny_model


@dataclass(frozen=True)
class Target:
    """A reader, and what it reads.

    Attributes:
        file: The file that is damaged, below the directory of a case.
        prepare: Makes the other files in that directory; returns valid contents of ``file``.
        read: Reads the directory as a command of halfbyte would. It may write to ``out`` in it.
        mutations: How ``file`` is damaged.
        share: Share of the time; readers of whole models are slow.
    """

    file: str
    prepare: Callable[[Path], list[bytes]]
    read: Callable[[Path], object]
    mutations: Sequence[Mutation]
    share: float = 1.0


BYTES = (mutation.change_bytes, mutation.change_numbers)
JSON = (mutation.change_json, mutation.change_json, mutation.change_bytes)
LINES = (mutation.change_lines(mutation.change_json), mutation.change_bytes)
HEADER = (mutation.change_header, mutation.change_numbers, mutation.change_bytes)

# --- files of tensors -----------------------------------------------------------------------------


def _tensors(case: Path) -> list[bytes]:
    with open(case / "a.safetensors", "wb") as file:
        write_safetensors(
            file,
            {
                "a": torch.arange(6.0).reshape(2, 3),
                "b.weight": torch.ones(2, dtype=torch.bfloat16),
                "": torch.zeros(0, 4, dtype=torch.uint8),
                "scalar": torch.tensor(7),
            },
            {"format": "pt"},
        )
    empty = json.dumps({}).encode()
    return [(case / "a.safetensors").read_bytes(), len(empty).to_bytes(8, "little") + empty]


def _read_tensors(case: Path) -> None:
    file = SafetensorsFile(case / "a.safetensors")
    for name in file.entries:
        file.read(name)


def _gguf(case: Path) -> list[bytes]:
    bare = write_gguf(case / "bare.gguf", tokenizer=False).read_bytes()
    return [bare, write_gguf(case / "whole.gguf").read_bytes()]


def _read_gguf_file(case: Path) -> None:
    file = GGUFFile(case / "a.gguf")
    for name, key in file.keys.items():
        if key.kind == ARRAY:
            file.array(name)
    for tensor in file.tensors.values():
        file.read(tensor)


def _read_gguf_model(case: Path) -> None:
    source = open_base(case / "a.gguf")
    source.tokenizer()
    source.generation_config()


# --- adapters and checkpoints ---------------------------------------------------------------------

_LAYER = "model.layers.0.self_attn.q_proj"
_STATE = {f"{_LAYER}.lora_A.weight": torch.ones(2, 4), f"{_LAYER}.lora_B.weight": torch.ones(3, 2)}


def _adapter(file: str, case: Path) -> list[bytes]:
    base = {"name": "base", "fingerprint": "0123456789abcdef"}
    recipe = {"quant": "nf4", "double_quant": True, "block_size": 64}
    found = []
    for config in (
        LoRAConfig(r=2),
        LoRAConfig(r=2, rank_pattern={"q_proj": 2}, alpha_pattern={"layers.0": 3.0}),
        LoRAConfig(r=2, use_rslora=True, target_modules="model.*q_proj"),
    ):
        save_adapter(case, _STATE, config, base=base, recipe=recipe)
        found.append((case / file).read_bytes())
    return found


def _as_trained(case: Path) -> None:
    recipe = as_trained(BaseOptions(model="m"), case)
    assert recipe["quant"] in ("nf4", "fp4", "none")
    assert type(recipe["block_size"]) is int


_ADAPTER, _OPTIMIZER = {"x.lora_A.weight": torch.ones(2, 3)}, {"exp_avg/x": torch.zeros(2, 3)}
_STEP = "checkpoint-3"


def _run_state(case: Path) -> list[bytes]:
    progress = {"base": "b", "data": "d", "options": {"lora_r": 4}}
    progress |= {"loss_scale": LossScale().state()}
    save_run(case, 3, adapter=_ADAPTER, optimizer=_OPTIMIZER, progress=progress)
    return [(case / _STEP / STATE_NAME).read_bytes()]


def _read_run(case: Path) -> None:
    from halfbyte.train.resume import check_same_run

    if (newest := latest_run(case)) is None:
        return
    state = load_run(newest)
    identity = {"base": "b", "data": "d", "options": {"lora_r": 4}}
    check_same_run(state, identity, total_steps=3)
    LossScale().load(state.progress.get("loss_scale"))


def _optimizer(case: Path) -> list[bytes]:
    _run_state(case)
    return [(case / _STEP / OPTIMIZER_NAME).read_bytes()]


def _read_optimizer(case: Path) -> None:
    """Read a checkpoint whose state has the right digest of a damaged file, as an attacker's."""
    from halfbyte.checkpoint.run_state import _digest

    copy = case / "out" / _STEP
    shutil.copytree(case / _STEP, copy, dirs_exist_ok=True)
    state = json.loads((copy / STATE_NAME).read_text())
    state["files"][OPTIMIZER_NAME] = _digest(copy / OPTIMIZER_NAME)
    (copy / STATE_NAME).write_text(json.dumps(state))
    load_run(copy)


# --- configurations and command lines -------------------------------------------------------------

_YAML = b"""\
# a run
base_model: tiny
datasets: [{path: train.jsonl}]
output: out
load_in_4bit: true
lora_r: 8
lora_target_modules: [q_proj, v_proj]
rank_pattern: {v_proj: 32}
learning_rate: 2e-4
memory_budget: 16GB
warmup_ratio: .1
report_to: none
bf16: yes
"""


def _yaml(case: Path) -> list[bytes]:
    from halfbyte.config.schema import TrainConfig

    config = check(TrainConfig, {"model": "m", "data": "d", "output": "o"})
    return [_YAML, to_yaml(config).encode(), b"", b"a: &a [*a]\n"]


def _option_words() -> list[bytes]:
    from halfbyte.config.aliases import ALIASES
    from halfbyte.config.schema import TrainConfig

    names = [*TrainConfig.model_fields, *ALIASES]
    return [name.encode() for name in names] + [b"--" + name.encode() for name in names]


_WORDS = [
    *(b"true", b"false", b"none", b"null", b"0", b"-1", b"1e9", b"1e999", b"nan", b"inf", b"16GB"),
    *(b"9" * 30, b"a,b", b"a=1,b=2", b"*", b"(", b"[", b"all-linear", b"=", b"--", b": ", b"- "),
    b"\n",
]


def _command_lines(case: Path) -> list[bytes]:
    lines = [
        f"{name}\n{words}"
        for name in COMMANDS
        for words in (
            "--model\nm\n--data\nd\n--output\no\n--lora-r\n8",
            "--model=m\n--max-length=64\n--json\n--no-double-quant",
            "--help",
        )
    ]
    return [line.encode() for line in lines]


def _read_command_line(case: Path) -> None:
    """Check the options of a command as it does, without running it."""
    raw = (case / "words").read_bytes()
    name, *words = raw.decode("utf-8", "surrogateescape").split("\n")
    if name not in COMMANDS:
        return
    command = importlib.import_module(f"halfbyte.cli.{name}").COMMAND
    try:
        if name == "train":
            given = command.words(words)
            load_config(None, given.given, problems=given.problems)
        else:
            command.read(words)
    except SystemExit as leaving:  # after --help
        if leaving.code:
            raise


# --- data and chat templates ----------------------------------------------------------------------

_USER, _REPLY = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
_CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
_ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "system", "content": "Be brief."}, _USER, {**_REPLY, "weight": 1}]},
    {"messages": [_USER, {**_REPLY, "content": None, "tool_calls": [_CALL]}], "tools": [_CALL]},
    {"messages": [{**_USER, "content": [{"type": "text", "text": "W"}]}, _REPLY], "id": 7},
    {
        "conversations": [
            {"from": "human", "value": "é"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
            {"from": "observation", "value": "1"},
            {"from": "gpt", "value": "No."},
        ],
        "tools": '[{"name": "f"}]',
        "system": "Hm.",
    },
    {"prompt": "Why?", "completion": "Because."},
    {"prompt": [_USER, _REPLY, _USER], "completion": [_REPLY]},
    {"instruction": "Sum", "input": "1 1", "output": "2", "history": [["a", "b"]], "system": "S"},
    {"text": "Once upon a time"},
    {"prompt": "a", "chosen": "b", "rejected": "c"},
]


def _lines(case: Path) -> list[bytes]:
    lines = [json.dumps(row).encode() + b"\n" for row in _ROWS]
    return [b"".join(lines), *lines]


def _array(case: Path) -> list[bytes]:
    return [json.dumps(_ROWS, indent=1).encode(), json.dumps(_ROWS[0], indent=1).encode()]


def _other_kind(case: Path) -> list[bytes]:
    return [b"instruction,output\nWhy?,Because.\n", b"PAR1\x15\x04\x15PAR1", *_lines(case)]


_tokenizer = cache(tiny_tokenizer)


def _read_data(name: str, case: Path) -> None:
    report = load_dataset(case / name, _tokenizer(), max_length=64).report
    lines = [*report.lines(), *(text for one in report.rejections for text in one)]
    assert max(map(len, lines)) < 2000


_TOOLS = """\
{{ bos_token }}{% for m in messages %}{% if m.tool_calls is defined %}{% for c in m.tool_calls %}
{{ c.function | tojson(indent=2) }}{% endfor %}{% elif loop.last or m.role in ['user'] %}
{{ m.content | trim }}{% else %}{{ raise_exception('no ' ~ m.role) }}{% endif %}{% endfor %}
{% macro f(x) %}{{ x * 2 }}{% endmacro %}{{ f(messages | length) }}{{ strftime_now('%Y') }}
"""
_JINJA = b"""\
{{
}}
{%
%}
{#
{% endfor %}
{% endif %}
{% raw %}
{% break %}
{% generation %}
{% endgeneration %}
{% include 'a' %}
{% extends 'a' %}
{% for a in messages %}
{% for i in range(99999) %}
{% set x = namespace(a=1) %}
{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}
{{ 1 / 0 }}
{{ [][1] }}
{{ x.y.z }}
{{ 'a' * 99999999 }}
{{ 9 ** 9 ** 9 }}
{{ ''.__class__ }}
{{ '%d' % 'a' }}
{{ messages[9] }}
{{ messages | sort }}
{{ loop.index }}
{{ raise_exception(1) }}
| tojson
| length
| int
[1:]""".splitlines()


def _templates(case: Path) -> list[bytes]:
    return [template.encode() for template in (CHATML, LLAMA2, GENERATION, _TOOLS)]


def _render(case: Path) -> None:
    tokenizer = _tokenizer()
    tokenizer.chat_template = (case / "chat_template.jinja").read_bytes().decode(errors="replace")
    try:
        load_dataset(case / "rows.jsonl", tokenizer, max_length=64)
    finally:
        Encoder(tokenizer).prompt([dict(_USER)])


def _template_case(case: Path) -> list[bytes]:
    (case / "rows.jsonl").write_bytes(b"".join(_lines(case)[1:4]))
    return _templates(case)


# --- directories of models, and journals ----------------------------------------------------------


def _model(file: str, case: Path) -> list[bytes]:
    write_tiny_model(case, layers=1, hidden=32, max_shard_size="20KB")
    return [(case / file).read_bytes()]


def _packed(case: Path) -> list[bytes]:
    write_tiny_model(case / "plain", layers=1, hidden=32)
    write_quantized(case / "plain", case / "packed", BaseRecipe())
    shutil.rmtree(case / "plain")
    shutil.copytree(case / "packed", case, dirs_exist_ok=True)
    shutil.rmtree(case / "packed")
    return [(case / "model.safetensors").read_bytes()]


def _read_model(case: Path) -> None:
    source = open_base(case)
    source.tokenizer()
    source.generation_config()


def _load_model(case: Path) -> None:
    load_base(case, BaseRecipe())


def _plan(case: Path) -> None:
    importlib.import_module("halfbyte.cli.plan").main(["--model", str(case), "--card", "t4"])


def _journal(case: Path) -> list[bytes]:
    step = {"loss": 1.0, "grad_norm": 0.1, "tokens": 9, "seconds": 1.0, "forward_seconds": 0.5}
    step |= {"peak_memory_bytes": 10**9, "learning_rate": 1e-4, "paged_bytes": 3, "paging_ms": 1}
    verdict = {"lines": ["d: 3 rows"], "rejected": [{"reason": "r", "rows": 1, "lines": ["7"]}]}
    events: list[dict[str, Any]] = [
        {"event": "note", "text": "on cpu"},
        {"event": "loaded", "seconds": 1.0, "peak_memory_bytes": 10**9},
        {
            "event": "begin",
            "total_steps": 3,
            "model": "m",
            "config": {"lora_r": 4, "output": "o"},
            "given": ["lora_r"],
            "versions": {"torch": "2"},
            "data_verdict": verdict,
            "data_check": {"findings": [{"code": "HB101", "severity": "error", "text": "t"}]},
            "quant": "nf4",
        },
        *({"event": "step", "step": n} | step for n in (1, 2, 3)),
        {"event": "samples", "step": 0, "samples": [{"prompt": "a", "expected": "b", "got": "c"}]},
        {"event": "evaluation", "step": 3, "loss": 0.5, "seconds": 1.0},
        {
            "event": "memory",
            "predicted_bytes": 10**9,
            "ledger": [{"name": "base, nf4", "group": "base", "nbytes": 10**8}],
        },
        {"event": "finish", "steps": 3, "peak_memory_bytes": 10**9},
    ]
    lines = [json.dumps(e | {"time": "2026-01-01T00:00:00+00:00"}).encode() + b"\n" for e in events]
    return [b"".join(lines)]


def _report(case: Path) -> None:
    page = case / "out" / "report.html"
    page.unlink(missing_ok=True)
    write_page([case / "journal.jsonl"], page)
    write_page([case / "journal.jsonl", case], page)


def _go_on(case: Path) -> None:
    with Journal(case / "out" / "journal.jsonl") as journal:
        journal.truncate_after(2)
        journal.write("step", {"step": 3})


def _evaluation(case: Path) -> list[bytes]:
    (case / "journal.jsonl").write_bytes(_journal(case)[0])
    samples = [{"prompt": "a", "expected": "b", "got": "c"}]
    return [json.dumps({"loss": 1.0, "exact_match": 0.5, "samples": samples}).encode()]


def _compare(case: Path) -> None:
    run = finished_run(case, evaluated=True)
    if run is not None:
        Comparison((read_result("lora", 0, run),)).rows()


# --- all of them ----------------------------------------------------------------------------------

_WHOLE = partial(Target, read=_read_model, mutations=JSON, share=0.5)

TARGETS: dict[str, Target] = {
    "safetensors": Target("a.safetensors", _tensors, _read_tensors, HEADER),
    "gguf-file": Target("a.gguf", _gguf, _read_gguf_file, BYTES),
    "gguf-model": Target("a.gguf", _gguf, _read_gguf_model, BYTES, 0.5),
    "adapter-config": Target(
        "adapter_config.json", partial(_adapter, "adapter_config.json"), load_adapter, JSON
    ),
    "adapter-tensors": Target(
        "adapter_model.safetensors",
        partial(_adapter, "adapter_model.safetensors"),
        load_adapter,
        HEADER,
    ),
    "adapter-card": Target("halfbyte.json", partial(_adapter, "halfbyte.json"), _as_trained, JSON),
    "run-state": Target(f"{_STEP}/{STATE_NAME}", _run_state, _read_run, JSON),
    "run-optimizer": Target(f"{_STEP}/{OPTIMIZER_NAME}", _optimizer, _read_optimizer, HEADER),
    "yaml": Target(
        "run.yaml",
        _yaml,
        lambda case: load_config(case / "run.yaml", {}),
        (mutation.change_words([*_option_words(), *_WORDS]), mutation.change_bytes),
    ),
    "command-line": Target(
        "words",
        _command_lines,
        _read_command_line,
        (mutation.change_words([*_option_words(), *_WORDS]), mutation.change_bytes),
    ),
    "data-lines": Target("a.jsonl", _lines, partial(_read_data, "a.jsonl"), LINES),
    "data-array": Target("a.json", _array, partial(_read_data, "a.json"), JSON),
    "data-csv": Target("a.csv", _other_kind, partial(_read_data, "a.csv"), BYTES, 0.1),
    "data-parquet": Target("a.parquet", _other_kind, partial(_read_data, "a.parquet"), BYTES, 0.1),
    "template": Target(
        "chat_template.jinja",
        _template_case,
        _render,
        (mutation.change_words(_JINJA), mutation.change_bytes),
    ),
    "journal": Target("journal.jsonl", _journal, _report, LINES),
    "journal-resumed": Target("out/journal.jsonl", _journal, _go_on, LINES),
    "evaluation": Target("eval.json", _evaluation, _compare, JSON),
    "packed": Target("model.safetensors", _packed, _load_model, HEADER, 0.5),
    "config": _WHOLE("config.json", partial(_model, "config.json"), read=_load_model),
    "plan": _WHOLE("config.json", partial(_model, "config.json"), read=_plan),
    "tokenizer": _WHOLE("tokenizer.json", partial(_model, "tokenizer.json")),
    "tokenizer-config": _WHOLE("tokenizer_config.json", partial(_model, "tokenizer_config.json")),
    "generation-config": _WHOLE(
        "generation_config.json", partial(_model, "generation_config.json")
    ),
    "index": _WHOLE(
        "model.safetensors.index.json", partial(_model, "model.safetensors.index.json")
    ),
}
