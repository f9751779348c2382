"""Several adapters on one model in memory: each computes what it does alone."""

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte import cli
from halfbyte.checkpoint.base_model import load_base
from halfbyte.checkpoint.identity import identity_of
from halfbyte.checkpoint.peft import save_adapter
from halfbyte.data.named_templates import choose_template
from halfbyte.errors import CheckpointError
from halfbyte.linear.lora import LoRAConfig, adapter_state, attach
from halfbyte.models.build import BaseRecipe
from halfbyte.train.loading import open_model, recipe_metadata
from halfbyte.train.side_by_side import BASE, open_side_by_side
from tests.tiny import write_tiny_model

HOW: dict[str, Any] = {"compute_dtype": "float32", "device": "cpu"}
WORDS = ("--compute-dtype", "float32", "--device", "cpu")
CASES: dict[str, LoRAConfig] = {
    "plain": LoRAConfig(r=4),
    "whole": LoRAConfig(r=2, modules_to_save=("embed_tokens", "norm")),
    "dora": LoRAConfig(r=4, use_dora=True, target_modules=("q_proj", "down_proj")),
    "other": LoRAConfig(r=4, target_modules=("v_proj",)),
    "fp4": LoRAConfig(r=4),
}


def call(*words: object) -> None:
    assert cli.main([*map(str, words)]) == 0


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, data, and adapters of it with random weights, one with a template of its own."""
    ground = tmp_path_factory.mktemp("ground")
    write_tiny_model(ground / "model")
    turns = [("user", "What is the capital of France?"), ("assistant", "Paris.")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    (ground / "data.jsonl").write_text("\n".join([json.dumps(row)] * 3))
    generator = torch.Generator().manual_seed(0)
    for name, config in CASES.items():
        recipe = BaseRecipe(quant="fp4" if name == "fp4" else "nf4")
        base, more = load_base(ground / "model", recipe), {}
        if name == "other":
            more["chat_template"], _ = choose_template("alpaca", base.tokenizer)
            base.tokenizer.chat_template = more["chat_template"]
        attach(base.model, config, seed=0)
        state = {
            name: tensor + 0.2 * torch.randn(tensor.shape, generator=generator)
            for name, tensor in adapter_state(base.model).items()
        }
        about = {"base": identity_of(base), "recipe": recipe_metadata(recipe), "more": more}
        save_adapter(ground / name, state, config, **about)
    return ground


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(input_ids=torch.arange(3, 43).view(2, 20)).logits
    return result


def test_each_computes_what_it_does_alone_in_any_order(ground: Path) -> None:
    names = [name for name in CASES if name != "fp4"]
    adapters = [str(ground / name) for name in names]
    sides = open_side_by_side(str(ground / "model"), adapters, **HOW)
    assert sides.names == (BASE, *names)
    alone = {BASE: open_model(str(ground / "model"), **HOW)[:2]}
    for name in names:
        alone[name] = open_model(str(ground / "model"), adapter=str(ground / name), **HOW)[:2]
    seen = []
    for name in (*sides.names, "whole", BASE, "dora", "whole"):
        with sides.using(name) as (model, tokenizer):
            assert torch.equal(logits(model), logits(alone[name][0]))
            assert tokenizer.chat_template == alone[name][1].chat_template
            seen.append(logits(model))
    assert not any(torch.equal(seen[0], other) for other in seen[1:4])


def test_eval_is_one_table_of_what_eval_measures_alone(
    ground: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    words = ("eval", "--model", ground / "model", "--data", ground / "data.jsonl", *WORDS)
    words += ("--max-new-tokens", 4)
    alone: dict[str, Any] = {}
    for name in ("base", "plain", "other"):
        capsys.readouterr()
        call(*words, *(() if name == "base" else ("--adapter", ground / name)), "--json")
        alone[name] = json.loads(capsys.readouterr().out)
    both = ("--adapter", ground / "plain", "--adapter", ground / "other")
    call(*words, *both, "--json")
    assert json.loads(capsys.readouterr().out) == alone
    call(*words, *both)
    head, *rows = capsys.readouterr().out.splitlines()[:4]
    assert head.split() == ["loss", "perplexity", "tokens", "exact", "match"]
    assert [row.split()[:2] for row in rows] == [
        [name, f"{one['loss']:.4f}"] for name, one in alone.items()
    ]


def test_generate_answers_with_each(ground: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("generate", "--model", ground / "model", "--prompt", "What is?", *WORDS)
    words += ("--max-new-tokens", 4, "--json")
    capsys.readouterr()
    call(*words, "--adapter", ground / "plain")
    alone = json.loads(capsys.readouterr().out)["answer"]
    call(*words, "--adapter", ground / "plain", "--adapter", ground / "dora")
    answers = json.loads(capsys.readouterr().out)["answers"]
    assert list(answers) == ["base", "plain", "dora"]
    assert answers["plain"] == alone


def test_a_chat_goes_on_with_another_adapter_and_answers_again(
    ground: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(
        ["/again", "Hi", "/adapter base", "/again", "/adapter none", "/adapter dora", "/again"]
    )
    monkeypatch.setattr(builtins, "input", lambda prompt: next(lines, "/exit"))
    asked: list[Any] = []

    def generate(model: Any, tokenizer: Any, prompts: Any, *, on_text: Any, **_: Any) -> None:
        asked.append((logits(model), [dict(message) for message in prompts[0]]))
        on_text(f"answer {len(asked)}")

    monkeypatch.setattr("halfbyte.models.generate.generate", generate)
    adapters = ("--adapter", ground / "plain", "--adapter", ground / "dora")
    capsys.readouterr()
    call("chat", "--model", ground / "model", *adapters, *WORDS)
    out = capsys.readouterr().out
    assert [messages for _, messages in asked] == [[{"role": "user", "content": "Hi"}]] * 3
    for (seen, _), name in zip(asked, ("plain", None, "dora"), strict=True):
        adapter = None if name is None else str(ground / name)
        alone, *_ = open_model(str(ground / "model"), adapter=adapter, **HOW)
        assert torch.equal(seen, logits(alone))
    assert "base answers\nanswer 2" in out
    assert out.count("/adapter NAME goes on with another: plain, dora\n") == 1


def test_adapters_of_other_bases_are_refused(
    ground: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--model", ground / "model", "--data", ground / "data.jsonl", *WORDS)
    both = ("--adapter", ground / "plain", "--adapter", ground / "fp4")
    assert cli.main([*map(str, ("eval", *words, *both))]) == 2
    assert "`quant` was nf4 in the training of" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="quant was 'nf4', now it is 'fp4'"):
        open_side_by_side(str(ground / "model"), [str(ground / "plain")], quant="fp4", **HOW)
    twice = ("--adapter", ground / "plain", "--adapter", f"{ground}/x/../plain")
    assert cli.main([*map(str, ("eval", *words, *twice))]) == 2
    assert "expected each adapter once" in capsys.readouterr().err
