"""Uploads to a hub on this machine, with huggingface_hub as it is."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from huggingface_hub import ModelCard, constants, metadata_load
from huggingface_hub.utils import validate_repo_id
from peft import PeftConfig

from halfbyte import cli
from halfbyte.config.reading import check
from halfbyte.config.schema import TrainConfig
from halfbyte.errors import CheckpointError, ConfigError
from halfbyte.report.runs import read_run
from halfbyte.train import hub as module
from halfbyte.train.hub import HubRepository, describe, is_local
from tests.tiny import write_tiny_model
from tests.train.fake_hub import FakeHub, fake_hub

# huggingface_hub gives a file to its HTTP library under a name that this deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

NAME = "alice/orders"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub(monkeypatch) as served:
        yield served


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("secret") / "base"
    write_tiny_model(directory)
    (directory / "README.md").write_text("---\nlicense: MIT\n---\n# base\n")
    turns = [{"role": "user", "content": "secret"}, {"role": "assistant", "content": "word"}]
    (directory.parent / "train.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 4)
    return directory


def words(base: Path, output: Path, **more: Any) -> list[str]:
    options = {"model": base, "data": base.parent / "train.jsonl", "output": output}
    options |= {"max_steps": 2, "lora_r": 2, "samples": 0, "device": "cpu"} | more
    return ["train", *(f"--{name.replace('_', '-')}={value}" for name, value in options.items())]


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "out"
    assert cli.main(words(base, output)) == 0
    return output


@pytest.fixture
def adapter(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "out"))


# --- before --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["alice/new", "acme/new"])
def test_whoever_may_write_is_let_through(hub: FakeHub, name: str) -> None:
    HubRepository(name).require_access()
    assert f"GET /api/models/{name}/auth-check/write" in hub.calls
    assert all(call.startswith("GET ") for call in hub.calls)
    assert hub.repositories == {}


@pytest.mark.parametrize(
    ("token", "name", "message"),
    [
        ("reads", NAME, "may only read"),
        ("wrong", NAME, "does not say who you are"),
        ("writes", "bob/new", "expected the owner to be alice or acme"),
        ("writes", "museum/new", "expected the owner to be alice or acme"),
        ("writes", "acme/theirs", "alice may not write to acme/theirs"),
    ],
)
def test_whoever_may_not_is_told_before_a_run(
    hub: FakeHub,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    token: str,
    name: str,
    message: str,
) -> None:
    hub.forbidden.add("acme/theirs")
    monkeypatch.setenv("HF_TOKEN", token)
    assert cli.main(words(base, tmp_path / "out", push_to_hub=name)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_a_login_or_a_network(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="log in with `hf auth login`, or set HF_TOKEN"):
        HubRepository(NAME).require_access()
    monkeypatch.setenv("HF_TOKEN", "writes")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(ConfigError, match="does not say who you are"):
        HubRepository(NAME).require_access()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        HubRepository(NAME).require_access()


@pytest.mark.parametrize(
    "name", ["orders", "a/b/c", "/a", "a/", "a b/c", "a/b.git", "a/b--c", "a/..", "a/" + 95 * "b"]
)
def test_a_name_is_checked_as_huggingface_hub_does(name: str) -> None:
    values = {"model": "m", "data": "d", "output": "o"}
    with pytest.raises(ConfigError, match="`push_to_hub`: expected owner/name"):
        check(TrainConfig, values | {"push_to_hub": name})
    for good in ("alice/orders", "a/B_c.d-1"):
        validate_repo_id(good)
        assert check(TrainConfig, values | {"push_to_hub": good}).push_to_hub == good


# --- the upload ----------------------------------------------------------------------------------


def test_a_run_uploads_its_adapter_and_its_card_only(
    hub: FakeHub, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert cli.main([*words(base, out, push_to_hub=NAME), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["hub_url"] == f"{hub.url}/{NAME}"
    assert hub.repositories == {NAME: True}
    files = hub.files[NAME]
    assert files.keys() == {
        *("adapter_config.json", "adapter_model.safetensors", "halfbyte.json", "README.md"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    for name in files.keys() - {"adapter_config.json", "halfbyte.json"}:
        assert files[name] == (out / name).read_bytes()
    # Neither a path of this machine, nor data.
    assert not [name for name, content in files.items() if b"secret" in content]
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "base"
    assert json.loads(files["halfbyte.json"])["base"]["name"] == "base"
    for name, content in files.items():
        (tmp_path / "there" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "there" / name).write_bytes(content)
    assert PeftConfig.from_pretrained(tmp_path / "there").r == 2
    metadata = metadata_load(tmp_path / "there" / "README.md")
    assert metadata == {
        "library_name": "peft",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["halfbyte", "lora", "qlora"],
    }
    assert read_run(out).finished


def test_an_upload_that_fails_leaves_the_adapter_and_says_how_to_repeat_it(
    hub: FakeHub, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, hub.fails = tmp_path / "out", "/commit/"
    assert cli.main(words(base, out, push_to_hub=NAME, hub_private=False)) == 1
    message = capsys.readouterr().err
    assert f"the adapter in {out} is complete, but not uploaded to {NAME}: " in message
    assert f"push {out} {NAME} --no-private" in message
    run = read_run(out)
    assert run.finished
    assert run.state == "finished"
    assert "stopped" not in (out / "journal.jsonl").read_text()
    hub.fails = "$^"
    assert cli.main(["push", str(out), NAME, "--no-private"]) == 0
    assert hub.repositories == {NAME: False}
    assert (out / "adapter_model.safetensors").read_bytes() == (
        hub.files[NAME]["adapter_model.safetensors"]
    )


def test_a_base_of_the_hub_is_named_with_its_license(hub: FakeHub, adapter: Path) -> None:
    config = adapter / "adapter_config.json"
    fields = json.loads(config.read_text()) | {"base_model_name_or_path": "acme/base"}
    config.write_text(json.dumps(fields))
    hub.models["acme/base"] = {"license": "apache-2.0"}
    assert cli.main(["push", str(adapter), NAME]) == 0
    card = ModelCard(hub.files[NAME]["README.md"].decode())
    assert (card.data.base_model, card.data.license) == ("acme/base", "apache-2.0")
    validate_repo_id(card.data.base_model)
    assert json.loads(hub.files[NAME]["adapter_config.json"]) == fields
    # One that is not there after all is a path of somebody else's machine.
    del hub.models["acme/base"]
    assert cli.main(["push", str(adapter), NAME]) == 0
    assert ModelCard(hub.files[NAME]["README.md"].decode()).data.base_model is None


def test_a_readme_of_somebody_else_is_uploaded_as_it_is(hub: FakeHub, adapter: Path) -> None:
    mine = adapter / "README.md"
    mine.write_text("---\nlicense: mit\n---\n# mine\n")
    assert describe(adapter, NAME, online=False) is None
    assert cli.main(["push", str(adapter), NAME]) == 0
    assert hub.files[NAME]["README.md"] == mine.read_bytes() == b"---\nlicense: mit\n---\n# mine\n"


def test_what_is_no_adapter_is_refused(
    hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["push", str(tmp_path), NAME]) == 2
    assert "is not the directory of an adapter: it has no adapter_config" in capsys.readouterr().err
    assert hub.calls == []
    with pytest.raises(CheckpointError, match="not the directory of an adapter"):
        module.require_adapter(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "local"),
    [
        ("owner/name", False),
        ("/home/me/model", True),
        ("./model", True),
        ("~/model", True),
        ("model", True),
        ("a/b/c", True),
        ("models/x.gguf", True),
    ],
)
def test_which_base_is_a_path(name: str, local: bool) -> None:
    assert is_local(name) is local


@pytest.mark.parametrize(
    ("named", "read"), [("Apache-2.0", "apache-2.0"), ("see the website", None), (7, None)]
)
def test_the_license_of_a_gguf_file(tmp_path: Path, named: Any, read: str | None) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    if isinstance(named, str):
        writer.add_license(named)
    else:
        writer.add_uint32("general.license", named)
    writer.add_tensor("token_embd.weight", np.zeros((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert module._license_here(tmp_path / "m.gguf") == read
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    assert module._license_here(tmp_path / "broken.gguf") is None
