"""The commands with nothing stood in: a tiny model is trained, asked, packed and merged."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from halfbyte import cli
from halfbyte.linear.lora import delta
from halfbyte.report.journal import read_journal
from halfbyte.version import __version__
from tests.tiny import tiny_llama, tiny_tokenizer, write_tiny_model


class Ground(NamedTuple):
    """What a person has before the first command, and after `halfbyte train`."""

    model: Path
    data: Path
    out: Path


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    root = tmp_path_factory.mktemp("ground")
    data = root / "train.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{n}"},
                {"role": "assistant", "content": "Paris"},
            ]
        }
        for n in range(16)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = Ground(write_tiny_model(root / "model"), data, root / "out")
    code = cli.main([*train(found), "--max-steps", "4", "--learning-rate", "0.02", "--seed", "1"])
    assert code == 0
    return found


def train(ground: Ground, **changed: Any) -> list[str]:
    paths = {"model": ground.model, "data": ground.data, "output": ground.out} | changed
    words = [word for name, path in paths.items() for word in (f"--{name}", str(path))]
    return ["train", *words, "--lora-r", "4", "--batch-size", "4", "--warmup-steps", "0"]


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run a command with ``--json`` and return its answer."""

    def run(*words: object) -> Any:
        capsys.readouterr()
        code = cli.main([*map(str, words), "--json"])
        out, err = capsys.readouterr()
        assert code == 0, err
        return json.loads(out)

    return run


def test_a_run_leaves_what_the_outside_relies_on(ground: Ground) -> None:
    assert {path.name for path in ground.out.iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "journal.jsonl",
        "config.yaml",
        "checkpoint-4",
    }
    records = read_journal(ground.out / "journal.jsonl")
    assert [one["step"] for one in records if one["event"] == "step"] == [1, 2, 3, 4]
    assert {
        "step",
        "loss",
        "grad_norm",
        "learning_rate",
        "tokens",
        "supervised_tokens",
        "tokens_per_second",
        "peak_memory_bytes",
    } <= set(next(one for one in records if one["event"] == "step"))
    assert records[-1]["event"] == "finish"


def test_the_saved_configuration_repeats_the_run(ground: Ground, tmp_path: Path) -> None:
    words = ["train", str(ground.out / "config.yaml"), "--output", str(tmp_path)]
    assert cli.main(words) == 0
    name = "adapter_model.safetensors"
    assert (tmp_path / name).read_bytes() == (ground.out / name).read_bytes()


def test_the_adapter_does_better_than_its_base(ground: Ground, ask: Callable[..., Any]) -> None:
    words = ["eval", "--model", ground.model, "--data", ground.data, "--max-new-tokens", 8]
    before = ask(*words)
    after = ask(*words, "--adapter", ground.out)
    assert after["loss"] < before["loss"] - 0.5
    assert after["cases"] == before["cases"] == 16
    assert after["supervised_tokens"] == before["supervised_tokens"]


def test_a_prompt_is_answered(ground: Ground, ask: Callable[..., Any]) -> None:
    words = ["generate", "--model", ground.model, "--prompt", "7", "--max-new-tokens", 4]
    assert ask(*words)["prompt"] == "7"
    assert isinstance(ask(*words, "--adapter", ground.out)["answer"], str)


@pytest.mark.parametrize("how", [[], ["--quant-search"]])
def test_packed_once_the_model_is_the_same(
    ground: Ground, ask: Callable[..., Any], tmp_path: Path, how: list[str]
) -> None:
    packed = ask("quantize", ground.model, tmp_path / "packed", *how)
    assert packed["bytes"] == sum(f.stat().st_size for f in (tmp_path / "packed").iterdir())
    losses = [
        ask("eval", "--model", *model, "--data", ground.data, "--no-exact-match")["loss"]
        for model in ([ground.model, *how], [tmp_path / "packed"])
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_merged_the_model_computes_what_was_trained(
    ground: Ground, ask: Callable[..., Any], tmp_path: Path
) -> None:
    merged = ask("merge", ground.model, ground.out, tmp_path / "merged", "--dtype", "float32")
    packing = {"quant": "nf4", "double_quant": True, "block_size": 64}
    packing |= {"quantize_head": False, "quantize_embeddings": False, "quant_search": False}
    assert merged["base"] == packing
    words = ["--data", ground.data, "--no-exact-match", "--compute-dtype", "float32"]
    trained = ask("eval", "--model", ground.model, "--adapter", ground.out, *words)
    plain = ask("eval", "--model", tmp_path / "merged", "--quant", "none", *words)
    assert plain["loss"] == pytest.approx(trained["loss"], abs=1e-5)
    # Of the ways, the one that came out nearest was taken.
    assert merged["into"] == "decoded"
    assert merged["positions"] > 500
    distances = merged["distances"]
    assert list(distances) == ["decoded", "original", "nf4", "no adapter"]
    assert set(distances["nf4"]) == {"kl", "largest_gap", "top1_agreement", "forgotten"}
    assert distances["decoded"]["kl"] < 1e-6 < distances["original"]["kl"]
    assert merged["sizes"]["nf4"] < merged["sizes"]["decoded"] / 2


def test_a_merge_into_nf4_is_what_was_measured(
    ground: Ground, ask: Callable[..., Any], tmp_path: Path
) -> None:
    words = ["--into", "nf4", "--data", ground.data, "--verify", "--min-agreement", "0"]
    merged = ask("merge", ground.model, ground.out, tmp_path / "merged", *words)
    assert merged["into"] == "nf4"
    by_heart = merged["verified"].pop("by_heart")
    assert merged["verified"] == merged["distances"]["nf4"]
    assert merged["verified"]["forgotten"] <= by_heart
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"


def test_a_merge_that_is_not_what_was_trained_fails_when_verified(
    ground: Ground, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["merge", str(ground.model), str(ground.out), str(tmp_path / "merged"), "--no-measure"]
    words += ["--into", "nf4", "--verify", "--min-agreement", "1", "--json"]
    assert cli.main(words) == 1
    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert answer["verified"]["top1_agreement"] < 1
    assert answer["distances"] == {}
    assert "differs from what was trained" in err
    assert "(--min-agreement)" in err
    assert (tmp_path / "merged" / "config.json").exists()


def test_what_was_taught_survives_the_merge_or_the_merge_fails(
    ask: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Rows of the adapter's own data, which its configuration names, answered by heart."""
    model = tiny_llama(tiny_tokenizer(), tied=False)
    model.lm_head.weight.data.mul_(10)  # a fresh head is too faint to be sure of anything
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    data, cities = tmp_path / "facts.jsonl", ["Paris", "Leeds", "Oslo", "Rome"]
    rows = [{"prompt": str(n), "completion": cities[n % 4]} for n in range(16)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ground = Ground(tmp_path / "model", data, tmp_path / "out")
    assert cli.main([*train(ground), "--max-steps", "40", "--learning-rate", "0.01"]) == 0

    words = ["merge", str(ground.model), str(ground.out), "--no-measure", "--verify", "--into"]
    kept = ask(*words, "decoded", tmp_path / "decoded")["verified"]
    assert kept["by_heart"] >= 8
    assert kept["forgotten"] == 0
    with monkeypatch.context() as patch:
        patch.setattr(  # all is lost
            "halfbyte.checkpoint.merged.delta", lambda linear: 0 * delta(linear)
        )
        words += ["decoded", str(tmp_path / "lost"), "--min-agreement"]
        lost = ask(*words, 0)["verified"]
        assert lost["forgotten"] == lost["by_heart"] == kept["by_heart"]
        capsys.readouterr()
        # What it agrees in on other text would be enough.
        least = str(lost["top1_agreement"])
        assert float(least) > 0
        assert cli.main([*words, least, "--overwrite"]) == 1
        said = f"of {lost['by_heart']} examples that the adapter reproduces"
        assert said in capsys.readouterr().err
    data.unlink()
    assert ask(*words, 0, "--overwrite")["verified"]["by_heart"] == 0


def test_merges_that_cannot_be(
    ground: Ground, ask: Callable[..., Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ask("quantize", ground.model, tmp_path / "packed")
    adapter = shutil.copytree(ground.out, tmp_path / "adapter")
    (adapter / "halfbyte.json").unlink()
    words = ["merge", str(tmp_path / "packed"), str(adapter), str(tmp_path / "merged")]
    message = refused([*words, "--into", "original"], capsys)
    assert "its original weights are not available" in message
    assert "`into` best needs `measure`" in refused([*words, "--no-measure"], capsys)
    assert "none.jsonl" in refused([*words, "--data", str(tmp_path / "none.jsonl")], capsys)
    assert not (tmp_path / "merged").exists()


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The message of a command that is refused: exit code 2, one message, nothing else."""
    capsys.readouterr()
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    message = err[err.index(f"halfbyte {words[0]}: ") :]
    return message.removeprefix(f"halfbyte {words[0]}: ")


def half(path: Path, name: str) -> None:
    """Cut a file of a copied model in two."""
    os.truncate(path / name, (path / name).stat().st_size // 2)


def test_a_missing_model(
    ground: Ground, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(train(ground, model=tmp_path / "none", output=tmp_path / "o"), capsys)
    assert str(tmp_path / "none") in message
    assert not (tmp_path / "o" / "journal.jsonl").exists()


def test_a_truncated_model(
    ground: Ground, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(ground.model, tmp_path / "m")
    half(tmp_path / "m", "model.safetensors")
    message = refused(train(ground, model=tmp_path / "m", output=tmp_path / "o"), capsys)
    assert "model.safetensors" in message
    assert not any((tmp_path / "o").glob("*"))


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "There is no data file"), ("", "is empty"), ('{"a": 1}\n', "data.jsonl")],
)
def test_data_that_cannot_be_used(
    content: str | None,
    said: str,
    ground: Ground,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = tmp_path / "data.jsonl"
    if content is not None:
        data.write_text(content)
    message = refused(train(ground, data=data, output=tmp_path / "o"), capsys)
    assert said in message
    assert not any((tmp_path / "o").glob("*"))


def test_long_examples_are_cut_and_counted(
    ground: Ground, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    long = {"prompt": "say", "completion": "word " * 200}
    data.write_text(json.dumps(long) + "\n" + json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    words = train(ground, data=data, output=tmp_path / "o")
    assert cli.main([*words, "--max-length", "32", "--max-steps", "1"]) == 0
    assert "truncated to max_length 32: 1 row (line 1)" in capsys.readouterr().err
    notes = [one["text"] for one in read_journal(tmp_path / "o" / "journal.jsonl") if "text" in one]
    assert any("truncated to max_length 32" in note for note in notes)


def test_an_adapter_for_another_base(
    ground: Ground, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_tiny_model(tmp_path / "other", hidden=128)
    words = ["--adapter", str(ground.out), "--data", str(ground.data)]
    message = refused(["eval", "--model", str(other), *words], capsys)
    assert "this model differs: the weights differ" in message
    message = refused(["merge", str(other), str(ground.out), str(tmp_path / "merged")], capsys)
    assert "this model differs: the weights differ" in message
    assert not (tmp_path / "merged").exists()


def test_a_directory_that_cannot_be_written(
    ground: Ground, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    message = refused(train(ground, output=tmp_path / "file" / "out"), capsys)
    assert message.startswith(f"cannot write {tmp_path}/file/out: ")


def test_a_disk_that_is_full(
    ground: Ground,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    message = refused(["quantize", str(ground.model), str(tmp_path / "packed")], capsys)
    assert "free some space" in message
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_not_overwritten(ground: Ground, capsys: pytest.CaptureFixture[str]) -> None:
    assert "already contains a run" in refused(train(ground), capsys)


@pytest.mark.parametrize("command", ["quantize", "merge"])
def test_an_output_that_is_taken(
    command: str, ground: Ground, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "taken" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    words = [command, str(ground.model), *([str(ground.out)] if command == "merge" else [])]
    assert "--overwrite" in refused([*words, str(mine.parent)], capsys)
    assert "contains no model" in refused([*words, str(mine.parent), "--overwrite"], capsys)
    assert mine.read_text() == "mine"


def test_a_model_is_overwritten_when_asked(
    ground: Ground, ask: Callable[..., Any], tmp_path: Path
) -> None:
    words = ("quantize", ground.model, tmp_path / "m")
    ask(*words)
    (tmp_path / "m" / "left-over.safetensors").write_text("")
    ask(*words, "--quant", "fp4", "--overwrite")
    assert not (tmp_path / "m" / "left-over.safetensors").exists()
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "fp4"
    assert config["halfbyte_version"] == __version__


def test_a_model_of_somebody_else_is_not_overwritten(
    ground: Ground, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(ground.model, tmp_path / "m")
    words = ["quantize", str(ground.model), str(tmp_path / "m"), "--overwrite"]
    assert "was not written by halfbyte, so --overwrite does not" in refused(words, capsys)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (tmp_path / "m" / name).read_bytes() == (ground.model / name).read_bytes()
