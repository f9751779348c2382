"""What can be done with what a command has written: commands that can be pasted into a shell."""

import re
import shlex
from pathlib import Path
from typing import Any

from halfbyte.checkpoint.reading import read_json, rope_scaling_in
from halfbyte.checkpoint.serving import llama_cpp_refuses, vllm_rank, vllm_refuses
from halfbyte.config.command_line import invocation
from halfbyte.config.data_sources import Data, as_words


def show_next(introduction: str, commands: list[str]) -> None:
    """Print the commands, each on a line of its own."""
    from halfbyte.report import show

    show.paragraph(introduction)
    for line in commands:
        show.command(line)


def served_name(path: Path) -> str:
    """A name of a directory that Ollama and vLLM accept for a model."""
    name = re.sub(r"[^a-z0-9._-]+", "-", path.resolve().name.lower()).strip("-._")
    return name or "model"


def beside(path: Path, what: str) -> str:
    """A directory beside another, such as ``out-merged`` beside ``out``, that does not exist."""
    found = [f"{path}-{what}", *(f"{path}-{what}-{number}" for number in range(2, 100))]
    return next((name for name in found if not Path(name).exists()), found[0])


def _options(words: dict[str, str | None]) -> list[str]:
    return [
        word for name, value in words.items() if value is not None for word in (f"--{name}", value)
    ]


def after_training(
    model: str, adapter: Path, *, revision: str | None = None, data: Data | None = None
) -> tuple[list[str], list[str]]:
    """The commands for an adapter that was trained, and what cannot serve it by itself, and why.

    Args:
        model: The base model as it was named.
        adapter: The adapter's directory.
        revision: The base model's revision, if one was named.
        data: Held-out data, if there was any.
    """
    fields = read_json(adapter / "adapter_config.json", "an adapter's directory holds one")
    both = _options({"model": model, "revision": revision, "adapter": str(adapter)})
    at = _options({"revision": revision})
    commands = [invocation("chat", *both)]
    if data is not None:
        named = [word for one in as_words(data) for word in ("--data", one)]
        commands.append(invocation("eval", *both, *named))
    commands += [
        invocation("merge", model, str(adapter), beside(adapter, "merged"), *at),
        invocation("export", model, str(adapter), beside(adapter, "gguf"), *at),
    ]
    warnings, info = [], adapter / "halfbyte.json"
    scaled = rope_scaling_in(read_json(info, "") if info.exists() else {})
    if refused := vllm_refuses(fields, scaled):
        warnings.append(f"vLLM cannot serve it without merging: {', '.join(refused)}")
    elif not _is_gguf(model):
        commands.append(_vllm(model, adapter, fields, revision))
    if refused := llama_cpp_refuses(fields, scaled):
        warnings.append(f"llama.cpp cannot load it without merging: {', '.join(refused)}")
    return commands, warnings


def _vllm(model: str, adapter: Path, fields: dict[str, Any], revision: str | None) -> str:
    rank = ["--max-lora-rank", str(vllm_rank(fields))]
    modules = ["--lora-modules", f"{served_name(adapter)}={adapter}"]
    at = _options({"revision": revision})
    return shlex.join(["vllm", "serve", model, *at, "--enable-lora", *rank, *modules])


def _is_gguf(model: str) -> bool:
    path = Path(model).expanduser()
    return path.suffix == ".gguf" or (path.is_dir() and not (path / "config.json").exists())


def after_writing_model(out: Path, *, vllm: bool = True) -> list[str]:
    """The commands for a model's directory that transformers loads."""
    served = [shlex.join(["vllm", "serve", str(out)])] if vllm else []
    return [invocation("chat", "--model", str(out)), *served]


def after_export(out: Path, *, base: str | None) -> list[str]:
    """The commands for an export.

    Args:
        out: Its directory.
        base: The base model as it was named, if only an adapter was exported.
    """
    name = served_name(out)
    commands = [
        shlex.join(["ollama", "create", name, "-f", str(out / "Modelfile")]),
        shlex.join(["ollama", "run", name]),
    ]
    if base is None:
        return [shlex.join(["llama-server", "-m", str(out / "model.gguf")]), *commands]
    if Path(base).expanduser().is_file():
        lora = ["--lora", str(out / "adapter.gguf")]
        commands.insert(0, shlex.join(["llama-server", "-m", base, *lora]))
    return commands
