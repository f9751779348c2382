"""What each command hands on, and what it prints; models and training are stand-ins here."""

import builtins
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from halfbyte import cli
from halfbyte.checkpoint.peft import save_adapter
from halfbyte.linear.lora import LoRAConfig
from halfbyte.report.journal import read_journal
from halfbyte.runtime.signals import SIGNALS
from halfbyte.tools.demo_task import write_task

COMMANDS = "/reset starts a new conversation, /again answers anew, /exit quits"
SAMPLES = [
    {"prompt": "1 + 1?", "expected": "2", "got": "2"},
    {"prompt": "1 + 2?", "expected": "3", "got": "fish"},
]


@dataclass(frozen=True)
class Trained:
    adapter_dir: Path
    steps: int = 7
    final_loss: float = 0.25
    peak_memory_bytes: int = 10**9
    seconds: float = 61.0
    tokens_per_second: float = 612.0


@dataclass(frozen=True)
class Evaluated:
    loss: float = 0.5
    perplexity: float = 1.6487
    supervised_tokens: int = 1234
    exact_match: float | None = 0.5
    cases: int = 2
    samples: list[dict[str, str]] = field(default_factory=lambda: SAMPLES)


class Seam:
    """Stands where the engine is: records every call, answers what a test wants."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.answer: Callable[[list[dict[str, str]]], str] = lambda messages: "Hello there"

    def train(self, config: Any, report: Any, stop: Any) -> Trained:
        self.calls.append(("train", {"config": config}))
        report.begin(total_steps=1, start_step=0, metadata={"base": "tiny"})
        report.step({"step": 1, "loss": 0.25})
        (config.output / "adapter_config.json").write_text('{"r": 4, "use_dora": true}')
        return Trained(config.output)

    def open_model(self, model: str, **options: Any) -> tuple[Any, str, None]:
        self.calls.append(("open", {"model": model} | options))
        return SimpleNamespace(config="config"), "tokenizer", None

    def evaluate(self, model: Any, tokenizer: str, data: Any, **options: Any) -> Evaluated:
        self.calls.append(("evaluate", {"data": data} | options))
        options["progress"](1, 2)
        options.get("note", print)("d: 2 of 3 rows usable")
        if not options["exact_match"]:
            return Evaluated(exact_match=None, samples=[])
        return Evaluated()

    def generate(
        self, model: Any, tokenizer: str, prompts: list[Any], *, on_text: Any = None, **how: Any
    ) -> list[str]:
        self.calls.append(("generate", {"prompts": [list(prompt) for prompt in prompts]} | how))
        text = self.answer(prompts[0])
        for word in text.split(" "):
            on_text(word + " ")
        return [text]

    def named(self, name: str) -> list[dict[str, Any]]:
        return [options for called, options in self.calls if called == name]


@pytest.fixture
def seam(monkeypatch: pytest.MonkeyPatch) -> Seam:
    stand_in = Seam()
    for path, names in (
        ("halfbyte.train.run", ("train",)),
        ("halfbyte.train.loading", ("open_model",)),
        ("halfbyte.train.evaluate", ("evaluate",)),
        ("halfbyte.models.generate", ("generate",)),
    ):
        module = ModuleType(path)
        for name in names:
            setattr(module, name, getattr(stand_in, name))
        monkeypatch.setitem(sys.modules, path, module)
    monkeypatch.setattr("halfbyte.data.sources.require_source", lambda source: None)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setenv("COLUMNS", "80")
    return stand_in


@pytest.fixture
def adapter(tmp_path: Path) -> str:
    """An adapter that was trained on an FP4 base with blocks of 128."""
    state = {
        "model.q_proj.lora_A.weight": torch.zeros(2, 4),
        "model.q_proj.lora_B.weight": torch.zeros(4, 2),
    }
    save_adapter(
        tmp_path / "adapter",
        state,
        LoRAConfig(r=2),
        base={"name": "m", "fingerprint": "f"},
        recipe={"quant": "fp4", "double_quant": False, "block_size": 128},
    )
    return str(tmp_path / "adapter")


def run(line: str) -> int:
    return cli.main(line.split())


def lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.splitlines()]


# --- train --------------------------------------------------------------------------------------


def test_train_lays_options_over_the_file_and_says_what_it_read(
    seam: Seam, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("base_model: m\ndata: d\nlora_r: 8\nseed: 5\n")
    output = tmp_path / "out"
    assert cli.main(["train", str(file), "--output", str(output), "--lora_r", "4"]) == 0
    [call] = seam.named("train")
    assert (call["config"].model, call["config"].lora_r, call["config"].seed) == ("m", 4, 5)
    out, err = capsys.readouterr()
    assert lines(err)[:2] == ["`base_model: m` read as `model: m`", "training: steps 1 to 1"]
    assert lines(out) == [
        "The adapter has been written. To try it:",
        f"  halfbyte chat --model m --adapter {output}",
        "To merge, export or serve it:",
        f"  halfbyte merge m {output} {output}-merged",
        f"  halfbyte export m {output} {output}-gguf",
        "vLLM cannot serve it without merging: DoRA",
        "llama.cpp cannot load it without merging: DoRA",
    ]
    events = [record["event"] for record in read_journal(output / "journal.jsonl")]
    assert events == ["note", "begin", "step"]


def test_train_with_json_prints_one_object(
    seam: Seam, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(f"train --model m --data d --output {tmp_path}/out --json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {
        "adapter_dir": f"{tmp_path}/out",
        "steps": 7,
        "final_loss": 0.25,
        "peak_memory_bytes": 10**9,
        "seconds": 61.0,
        "tokens_per_second": 612.0,
    }
    assert "To try it" in err


# --- eval ---------------------------------------------------------------------------------------


def test_eval_prints_figures_and_what_was_missed(
    seam: Seam, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("eval --model m --data d.jsonl --max-length 64") == 0
    [call] = seam.named("evaluate")
    assert (call["data"], call["max_length"], call["exact_match"]) == (("d.jsonl",), 64, True)
    printed = capsys.readouterr()
    assert lines(printed.out) == [
        "  loss               0.5000",
        "  perplexity         1.649",
        "  supervised tokens  1,234",
        "  exact match        50.0 % of 2 cases",
        "",
        "› 1 + 2?",
        "  expected  3",
        "  got       fish",
    ]
    assert "d: 2 of 3 rows usable" in printed.err


def test_eval_looks_for_its_data_before_it_loads_the_model(tmp_path, capsys):
    assert cli.main(["eval", "--model", "none.gguf", "--data", str(tmp_path / "rows.jsonl")]) == 2
    assert "There is no data file or directory" in capsys.readouterr().err


def test_eval_without_exact_match_and_as_json(
    seam: Seam, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("eval --model m --data d --no-exact-match --json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["exact_match"] is None
    assert result["supervised_tokens"] == 1234


# --- how the base is opened ---------------------------------------------------------------------


def test_without_an_adapter_the_base_is_opened_as_asked(seam: Seam) -> None:
    assert run("eval --model m --data d --quant none --revision v2 --device cpu") == 0
    [call] = seam.named("open")
    assert call.pop("report") is not None
    assert call == {
        "model": "m",
        "adapter": None,
        "quant": "none",
        "double_quant": True,
        "block_size": 64,
        "quantize_head": False,
        "quantize_embeddings": False,
        "quant_search": False,
        "cache_quantized": False,
        "compute_dtype": "auto",
        "device": "cpu",
        "revision": "v2",
        "allow_mismatch": False,
        "chat_template": None,
    }


def test_with_an_adapter_the_base_is_opened_as_it_was_trained(seam: Seam, adapter: str) -> None:
    assert cli.main(["eval", "--model", "m", "--data", "d", "--adapter", adapter]) == 0
    [call] = seam.named("open")
    assert (call["quant"], call["double_quant"], call["block_size"]) == ("fp4", False, 128)


def test_what_is_asked_for_wins_over_the_adapter(seam: Seam, adapter: str) -> None:
    words = ["eval", "--model", "m", "--data", "d", "--adapter", adapter, "--quant", "nf4"]
    assert cli.main(words) == 0
    [call] = seam.named("open")
    assert (call["quant"], call["double_quant"], call["block_size"]) == ("nf4", False, 128)


def test_an_adapter_that_is_not_there(seam: Seam, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("eval --model m --data d --adapter /nowhere") == 2
    assert "/nowhere" in capsys.readouterr().err
    assert seam.calls == []


# --- generate -----------------------------------------------------------------------------------


def test_generate_streams_its_answer(seam: Seam, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "--model", "m", "--system", "Be brief.", "--prompt", "Hi, you"]
    assert cli.main([*words, "--temperature", "0.5", "--seed", "3"]) == 0
    [call] = seam.named("generate")
    assert call == {
        "prompts": [
            [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Hi, you"},
            ]
        ],
        "max_new_tokens": 256,
        "temperature": 0.5,
        "seed": 3,
    }
    assert capsys.readouterr().out == "Hello there \n"


def test_generate_reads_a_prompt_from_a_pipe_and_prints_json(
    seam: Seam, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is\nthis?\n"))
    assert cli.main(["generate", "--model", "m", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"prompt": "What is\nthis?", "answer": "Hello there"}
    assert "Hello there" in err


@pytest.mark.parametrize(
    ("typed", "terminal", "message"),
    [
        ([], True, "`prompt` is missing: give --prompt TEXT, or pipe the text in"),
        ([], False, "`prompt`: expected some text, got none"),
        (["--prompt", ""], True, "`prompt`: expected some text, got none"),
    ],
)
def test_generate_without_a_prompt(
    typed: list[str],
    terminal: bool,
    message: str,
    seam: Seam,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stream = io.StringIO("  \n")
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stdin", stream)
    assert cli.main(["generate", "--model", "m", *typed]) == 2
    assert capsys.readouterr().err == f"halfbyte generate: {message}\n"
    assert seam.calls == []


# --- chat ---------------------------------------------------------------------------------------


def typed(monkeypatch: pytest.MonkeyPatch, *said: str | type[BaseException]) -> None:
    """Let these be typed at the prompt, exceptions raised, and then the input end."""
    pending: Iterator[str | type[BaseException]] = iter(said)

    def read(prompt: str) -> str:
        one = next(pending, EOFError)
        if isinstance(one, str):
            return one
        raise one

    monkeypatch.setattr(builtins, "input", read)


def test_chat_remembers_and_forgets(seam: Seam, monkeypatch: pytest.MonkeyPatch) -> None:
    typed(monkeypatch, "one", "", "two", "/reset", "three", "/exit", "never")
    seam.answer = lambda messages: f"to {messages[-1]['content']}"
    assert cli.main(["chat", "--model", "m", "--system", "S"]) == 0
    system = {"role": "system", "content": "S"}

    def turns(*contents: str) -> list[dict[str, str]]:
        roles = ("user", "assistant")
        return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]

    assert [call["prompts"][0] for call in seam.named("generate")] == [
        [system, *turns("one")],
        [system, *turns("one", "to one", "two")],
        [system, *turns("three")],
    ]


def test_ctrl_c_stops_an_answer_and_keeps_what_was_said(
    seam: Seam, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed(monkeypatch, "tell me", KeyboardInterrupt, "/what", "go on")

    def interrupted(
        model: Any, tokenizer: str, prompts: list[Any], *, on_text: Any, **how: Any
    ) -> list[str]:
        seam.calls.append(("generate", {"prompts": [list(prompts[0])]}))
        on_text("Once upon ")
        raise KeyboardInterrupt

    sys.modules["halfbyte.models.generate"].generate = interrupted  # type: ignore[attr-defined]
    assert cli.main(["chat", "--model", "m"]) == 0
    assert seam.named("generate")[1]["prompts"][0] == [
        {"role": "user", "content": "tell me"},
        {"role": "assistant", "content": "Once upon"},
        {"role": "user", "content": "go on"},
    ]
    out = capsys.readouterr().out
    assert out.count("Once upon  …\n") == 2
    assert out.count(f"{COMMANDS}\n") == 2


def test_in_a_chat_ctrl_c_works_each_time_and_other_signals_end_it(
    seam: Seam, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pending = iter([signal.SIGINT, signal.SIGINT, signal.SIGTERM])
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def read(prompt: str) -> str:
        os.kill(os.getpid(), next(pending))
        return "/exit"

    monkeypatch.setattr(builtins, "input", read)
    try:
        assert cli.main(["chat", "--model", "m"]) == 143
    finally:
        for number, known in before.items():
            signal.signal(number, known)
    out, err = capsys.readouterr()
    assert out.count(f"{COMMANDS}\n") == 2
    assert err.endswith("\nhalfbyte chat: interrupted by SIGTERM\n")


# --- demo ---------------------------------------------------------------------------------------


@pytest.fixture
def demo_seam(seam: Seam, monkeypatch: pytest.MonkeyPatch) -> Seam:
    """Also where the adapter is put on the model that was opened."""

    def load_adapter(path: Path) -> Any:
        def put_on(model: Any) -> None:
            seam.calls.append(("put_on", {"adapter": path, "model": model.config}))

        return SimpleNamespace(put_on=put_on)

    monkeypatch.setattr("halfbyte.checkpoint.peft.load_adapter", load_adapter)
    monkeypatch.setattr("halfbyte.checkpoint.base_model.open_base", lambda name: None)
    return seam


def test_the_demo_tells_its_story(
    demo_seam: Seam, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seam = demo_seam
    output = tmp_path / "demo"
    earlier = output / "adapter" / "adapter_model.safetensors"
    earlier.parent.mkdir(parents=True)
    earlier.write_text("of an earlier demo")
    (earlier.parent / "journal.jsonl").write_text('{"event": "begin"}\n')
    write_task(output, seed=1)
    assert cli.main(["demo", "--model", "m.gguf", "--output", str(output), "--seed", "2"]) == 0
    assert [name for name, _ in seam.calls] == ["open", "evaluate", "train", "put_on", "evaluate"]
    assert seam.named("open") == [{"model": "m.gguf"}]
    assert seam.named("put_on") == [{"adapter": output / "adapter", "model": "config"}]
    [config] = [call["config"] for call in seam.named("train")]
    assert (config.data, config.seed) == ((str(output / "orders.train.jsonl"),), 2)
    assert not earlier.exists()
    text = capsys.readouterr().out
    for expected in (
        "one line of YAML",
        "› 1 + 2?",
        "✗  fish",
        "exactly right    50.0 %    50.0 %",
        "Trained in 1:01 at 612 tokens/s",
        f"halfbyte chat --model m.gguf --adapter {output}/adapter",
    ):
        assert expected in text
    assert max(map(len, text.splitlines()[:-4])) <= 80


@pytest.mark.parametrize("taken", [430_000_000, 720_000_000])
def test_the_demos_budget_is_beside_what_libraries_take(
    demo_seam: Seam, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: int
) -> None:
    monkeypatch.setattr("halfbyte.tools.demo_model.demo_model", lambda: Path("smol.gguf"))
    monkeypatch.setattr("halfbyte.engine.memory_policy.used_memory", lambda device: taken)
    assert cli.main(["demo", "--output", str(tmp_path / "one")]) == 0
    assert cli.main(["demo", "--model", "large.gguf", "--output", str(tmp_path / "two")]) == 0
    ours, named = (call["config"].memory_budget for call in demo_seam.named("train"))
    assert ours == taken + 1_020_000_000
    assert named is None


@pytest.mark.usefixtures("demo_seam")
def test_the_demo_removes_nothing_that_it_did_not_write(tmp_path: Path) -> None:
    mine = tmp_path / "adapter" / "adapter_model.safetensors"
    mine.parent.mkdir()
    mine.write_text("weeks of work")
    cli.main(["demo", "--model", "m", "--output", str(tmp_path)])
    assert mine.read_text() == "weeks of work"
    (tmp_path / "orders.train.jsonl").write_text("mine")
    assert cli.main(["demo", "--model", "m", "--output", str(tmp_path)]) == 2
    assert (tmp_path / "orders.train.jsonl").read_text() == "mine"


def test_the_demo_as_json(
    demo_seam: Seam, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["demo", "--model", "m", "--output", str(tmp_path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["exact_match_before"], result["exact_match_after"]) == (0.5, 0.5)
    assert result["peak_memory_bytes"] > 10**7


def test_a_demo_that_cannot_be_written(
    seam: Seam, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert cli.main(["demo", "--model", "m", "--output", str(tmp_path / "file" / "x")]) == 2
    assert "file, not a directory" in capsys.readouterr().err
    assert seam.calls == []
