"""The model card of an adapter: ``README.md``, as the Hugging Face hub shows it.

Everything in it is read from the files of the run: ``adapter_config.json``, ``halfbyte.json`` and
``journal.jsonl``. It describes the data by its size and a digest, and quotes nothing of it; paths
of this machine are reduced to their last part.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from halfbyte.atomic import new_file
from halfbyte.checkpoint.reading import read_json, rope_scaling_in
from halfbyte.checkpoint.serving import llama_cpp_refuses, vllm_rank, vllm_refuses
from halfbyte.foreign_text import printable, shorten
from halfbyte.input_files import open_file
from halfbyte.report.charts import memory, plain
from halfbyte.report.live import duration
from halfbyte.report.runs import Run, mapping, number, read_run, texts

MODEL_CARD = "README.md"
_MARK = "# written by halfbyte: remove this line to keep your changes from being replaced\n"
_PATHS = ("model", "data", "eval_data", "output")
_NOT_RECIPE = {
    *("output", "push_to_hub", "hub_private", "report_to", "resume", "samples"),
    *("save_steps", "save_total_limit", "logging_steps"),
}


def last_part(name: str) -> str:
    """The last part of a path, which says nothing of this machine."""
    return Path(name).name or name


def is_ours(path: Path) -> bool:
    """Whether there is no file, or a model card of ours that nobody has taken over."""
    try:
        with open_file(path) as file:
            return _MARK.encode() in file.read(1024)
    except FileNotFoundError:
        return True
    except OSError:
        return False


def write_model_card(
    directory: Path, repository: str | None, base: str | None, license_id: str | None
) -> Path | None:
    """Write the model card of an adapter beside it, if that is not somebody else's file.

    Args:
        directory: The adapter's directory.
        repository: ``owner/name`` where it is to be published, if that is known.
        base: The base model's id on the hub; None if it is not there.
        license_id: The base model's license, if known.

    Returns:
        The file, or None if another one has its name.

    Raises:
        CheckpointError: A file of the adapter is missing or damaged.
        OutputError: The card cannot be written.
    """
    path = directory / MODEL_CARD
    if not is_ours(path):
        return None
    text = model_card(directory, repository, base, license_id)
    with new_file(path) as file:
        file.write(text.encode(errors="replace"))
    return path


def model_card(
    directory: Path, repository: str | None, base: str | None, license_id: str | None
) -> str:
    """The text of the card; see `write_model_card`."""
    fields = read_json(directory / "adapter_config.json", "an adapter's directory holds one")
    info: dict[str, Any] = {}
    if (directory / "halfbyte.json").exists():
        info = read_json(directory / "halfbyte.json", "halfbyte writes one")
    journal = directory / "journal.jsonl"
    run = read_run(directory) if journal.exists() else Run(directory.name, directory)
    recipe = mapping(info.get("recipe"))
    # Experts that the files have in another format say more than what the others would be.
    quant = str(recipe.get("experts") or recipe.get("quant", run.begin.get("quant", "none")))
    named = mapping(info.get("base")).get("name") or fields.get("base_model_name_or_path")
    base_name = base or last_part(str(named or "unknown"))
    title = (repository or directory.resolve().name).rpartition("/")[2]
    kind = "LoRA" if quant == "none" else f"QLoRA ({quant.upper()})"
    if quant == "mxfp4":
        kind = "LoRA on a base with experts in MXFP4"
    parts = [
        _metadata(base, license_id, quant, fields),
        f"# {_plain(title)}",
        f"A LoRA adapter for {_code(base_name)}, trained with halfbyte: {kind}.",
        _section("Results", _table(("", ""), _results(run))),
        _section("Base model", _table(("", ""), _base(base_name, info))),
        _section("Data", _table(("", "training", "held out"), _data(run))),
        _section("Recipe", _table(("option", "value"), _recipe(run, fields))),
        _section("How to load it", _loading(repository, base, fields, rope_scaling_in(info))),
        _section("Trained with", _table(("", ""), _machine(run))),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _metadata(base: str | None, license_id: str | None, quant: str, fields: dict[str, Any]) -> str:
    """The YAML at the top. The hub accepts as base_model only what is on the hub."""
    tags = ["halfbyte", "lora", *(["qlora"] if quant != "none" else [])]
    tags += ["dora"] if fields.get("use_dora") else []
    found: dict[str, Any] = {
        "base_model": base,
        "base_model_relation": base and "adapter",
        "library_name": "peft",
        "license": license_id,
        "pipeline_tag": "text-generation",
        "tags": tags,
    }
    known = {name: value for name, value in found.items() if value is not None}
    return "---\n" + _MARK + yaml.safe_dump(known, sort_keys=False, allow_unicode=True) + "---"


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def _plain(text: str) -> str:
    """Foreign text on one line that Markdown does not read as markup."""
    text = shorten(printable(text, lines=False))
    return "".join(f"\\{one}" if one in "\\`*_{}[]<>()#+!|~" else one for one in text)


def _code(text: str) -> str:
    """Foreign text in a code span, also within a table."""
    text = shorten(printable(text, lines=False)).replace("`", "'").replace("|", "\\|")
    return f"`{text}`" if text.strip() else ""


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    head = "| " + " | ".join(heads) + " |"
    return "\n".join([head, "|" + "---|" * (head.count("|") - 1), *lines]) if lines else ""


def _results(run: Run) -> list[tuple[str, str]]:
    held_out = run.last("held_out")
    steps, total = run.steps, number(run.begin.get("total_steps"))
    found = [
        ("training loss, last step", _shown(run.last("loss"), "{:.4f}")),
        ("held-out loss", _shown(held_out, "{:.4f}")),
        ("held-out loss before", _shown(_before(run), "{:.4f}")),
        ("optimizer steps", f"{steps:,}" + (f" of {total:,.0f}" if total else "") if steps else ""),
        ("state of the run", "" if run.finished or not run.begin else "not finished"),
    ]
    return [(name, value) for name, value in found if value]


def _before(run: Run) -> float | None:
    """The held-out loss before training, if it was measured."""
    return run.held_out[0][1] if run.held_out and run.held_out[0][0] == 0 else None


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _base(name: str, info: dict[str, Any]) -> list[tuple[str, str]]:
    base = mapping(info.get("base"))
    names = {
        "fingerprint": "fingerprint of its files",
        "weights": "digest of its weights as trained on",
        "tokenizer": "digest of its tokenizer",
        "chat_template": "digest of its chat template",
    }
    digests = [(shown, _code(str(base[key]))) for key, shown in names.items() if base.get(key)]
    return [("name", _code(name)), *digests]


def _data(run: Run) -> list[tuple[str, str, str]]:
    training = mapping(run.begin.get("data_verdict"))
    held_out = mapping(run.begin.get("held_out_verdict"))
    names = {
        "rows": "rows",
        "usable": "rows used",
        "truncated": "examples truncated",
        "tokens": "tokens",
        "supervised_tokens": "tokens of the loss",
    }
    rows = [
        (shown, _count(training.get(key)), _count(held_out.get(key)))
        for key, shown in names.items()
        if training.get(key) is not None
    ]
    if digest := run.begin.get("data_digest"):
        rows.append(("SHA-256 of tokens and loss masks", _code(str(digest)), ""))
    return rows


def _count(value: Any) -> str:
    return _shown(number(value), "{:,.0f}")


def _recipe(run: Run, fields: dict[str, Any]) -> list[tuple[str, str]]:
    """The options that were set, and those of the adapter."""
    config = mapping(run.begin.get("config"))
    always = ("quant", "lora_r", "lora_alpha", "target_modules", "learning_rate", "seed")
    given = set(texts(run.begin.get("given")))
    if not config:
        names = ("r", "lora_alpha", "target_modules", "use_rslora", "use_dora")
        return [(_code(name), _value(name, fields[name])) for name in names if name in fields]
    return [
        (_code(name), _value(name, value))
        for name, value in config.items()
        if name in given.union(always) and name not in _NOT_RECIPE
    ]


def _value(name: str, value: Any) -> str:
    if isinstance(value, float):
        return _code(plain(value))
    if isinstance(value, list):
        return _code(", ".join(map(str, value)))
    return _code(last_part(str(value)) if name in _PATHS else str(value))


def _machine(run: Run) -> list[tuple[str, str]]:
    begin = run.begin
    versions = mapping(begin.get("versions"))
    found = [(str(name), _code(str(value))) for name, value in versions.items()]
    found += [("machine", _code(str(begin["machine"])))] if begin.get("machine") else []
    found += [("peak memory", memory(run.peak_bytes))] if run.peak_bytes else []
    spent = sum(run.seconds.values())
    return found + ([("time", duration(spent))] if spent else [])


def _loading(
    repository: str | None, base: str | None, fields: dict[str, Any], scaled: str | None
) -> str:
    """Commands of four programs; what is not known is ``BASE`` and ``owner/name``."""
    hint = "" if base else "BASE is the base model: its directory, or its name on the hub.\n\n"
    if scaled is not None:
        hint += (
            f"It was trained with rotary embeddings scaled by {_code(scaled)}. halfbyte does that "
            "when it loads the adapter, merges or exports it; elsewhere the base model needs the "
            "same `rope_parameters`, or outputs are not those it was trained for.\n\n"
        )
    base, repository = _word(base or "BASE"), _word(repository or "owner/name")
    name = repository.rpartition("/")[2]
    peft = (
        "```python\nfrom peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{base}")\n'
        f'model = PeftModel.from_pretrained(model, "{repository}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{repository}")\n```'
    )
    download = f"hf download {repository} --local-dir {name}"
    halfbyte = f"```\n{download}\nhalfbyte chat --model {base} --adapter {name}\n```"
    refused = vllm_refuses(fields, scaled)
    rank = vllm_rank(fields)
    vllm = f"vLLM does not load it by itself: {', '.join(refused)}. Merge it first."
    if not refused:
        vllm = (
            f"```\nvllm serve {base} --enable-lora --max-lora-rank {rank} "
            f"--lora-modules {name}={repository}\n```"
        )
    refused = llama_cpp_refuses(fields, scaled)
    llama = f"llama.cpp does not load it by itself: {', '.join(refused)}. Export it merged."
    if not refused:
        llama = (
            f"```\n{download}\nhalfbyte export {base} {name} {name}-gguf --format gguf-lora\n"
            f"llama-cli -m BASE.gguf --lora {name}-gguf/adapter.gguf\n```"
        )
    programs = {"PEFT": peft, "halfbyte": halfbyte, "vLLM": vllm, "llama.cpp": llama}
    return hint + "\n\n".join(f"{program}:\n\n{text}" for program, text in programs.items())


def _word(text: str) -> str:
    """A name as it may stand in code of the card: without what ends a string or a block."""
    return "".join(one for one in printable(text, lines=False) if one not in "\"'`\\ $;&|<>()")
