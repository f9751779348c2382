"""A model's directory with anything damaged in it: an error of ours that tells, or a model.

Readers of single formats are fuzzed beside their own tests; here the files of a packed checkpoint
are damaged together with what transformers reads of them.
"""

import contextlib
import json
import shutil
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from halfbyte.checkpoint.base_model import load_base, open_base
from halfbyte.checkpoint.bitsandbytes import write_quantized
from halfbyte.errors import CheckpointError, UserError
from halfbyte.models.build import BaseRecipe
from tests.tiny import tiny_tokenizer, write_tiny_model

quick = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**40), 2**40)
    | st.floats(allow_nan=False)
    | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    write_tiny_model(directory / "model", layers=1)
    recipe = BaseRecipe()
    return write_quantized(directory / "model", directory / "packed", recipe, shard_bytes=60_000)


@contextlib.contextmanager
def copied(packed: Path) -> Iterator[Path]:
    copy = packed.with_name("copy")
    shutil.copytree(packed, copy)
    try:
        yield copy
    finally:
        shutil.rmtree(copy)


def load(directory: Path) -> None:
    """Load it; of all exceptions, only those that tell the user what is wrong may come."""
    tracemalloc.start()
    try:
        with contextlib.suppress(UserError):
            load_base(directory, BaseRecipe())
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()


CONFIG_KEYS = [
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "model_type"),
    *("architectures", "dtype", "rope_parameters", "rope_scaling", "tie_word_embeddings"),
    *("quantization_config", "hidden_act", "rms_norm_eps", "pad_token_id", "eos_token_id"),
]


@quick
@given(st.sampled_from(CONFIG_KEYS), json_values)
@example("pad_token_id", 400)  # what torch answers with an AssertionError
@example("num_hidden_layers", 2**40)
@example("vocab_size", 2**60)
def test_any_value_of_the_configuration_may_lie(packed: Path, key: str, value: Any) -> None:
    with copied(packed) as copy:
        fields = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(fields | {key: value}))
        load(copy)


@quick
@given(
    st.sampled_from(
        [
            "config.json",
            "generation_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "model.safetensors.index.json",
            "model-00001-of-00002.safetensors",
        ]
    ),
    st.floats(0, 1),
    st.integers(0, 255),
    st.booleans(),
)
def test_any_file_may_be_cut_or_changed(
    packed: Path, name: str, where: float, value: int, cut: bool
) -> None:
    with copied(packed) as copy:
        raw = bytearray((copy / name).read_bytes())
        at = int(where * (len(raw) - 1))
        if cut:
            del raw[at:]
        else:
            raw[at] = value
        (copy / name).write_bytes(raw)
        load(copy)


@quick
@given(st.lists(st.tuples(st.integers(0, 60), json_values), min_size=1, max_size=3))
def test_the_index_may_name_anything(packed: Path, changes: list[tuple[int, Any]]) -> None:
    with copied(packed) as copy:
        path = copy / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        keys = list(index["weight_map"])
        for at, value in changes:
            index["weight_map"][keys[at % len(keys)]] = value
        path.write_text(json.dumps(index))
        load(copy)


def of_tokenizer(change: dict[str, Any], copy: Path, name: str = "tokenizer_config.json") -> None:
    fields = json.loads((copy / name).read_text())
    (copy / name).write_text(json.dumps(fields | change))


@quick
@given(
    st.sampled_from(
        [
            *("bos_token", "eos_token", "unk_token", "pad_token", "model_max_length", "backend"),
            *("tokenizer_class", "added_tokens_decoder", "extra_special_tokens", "chat_template"),
        ]
    ),
    json_values,
)
@example("model_max_length", "")
@example("unk_token", "")
def test_any_field_of_the_tokenizer_may_lie(packed: Path, key: str, value: Any) -> None:
    """What loads can be used: it cuts text and knows its special tokens."""
    with copied(packed) as copy:
        of_tokenizer({key: value}, copy)
        with contextlib.suppress(CheckpointError):
            tokenizer = open_base(copy).tokenizer()
            assert tokenizer("a b")["input_ids"]
            assert isinstance(tokenizer.unk_token_id, int | None)


def test_a_token_s_number_is_not_believed(packed: Path) -> None:
    with copied(packed) as copy:
        model = json.loads((copy / "tokenizer.json").read_text())["model"]
        model["vocab"] |= {"Z": 2**31}
        of_tokenizer({"model": model}, copy, "tokenizer.json")
        with pytest.raises(CheckpointError, match=f"a token number {2**31}"):
            load_base(copy, BaseRecipe())


@pytest.mark.parametrize("name", ["\ud800", "a\0b", "../model.safetensors"])
def test_the_index_names_files_of_its_directory(packed: Path, name: str) -> None:
    with copied(packed) as copy:
        path = copy / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"][next(iter(index["weight_map"]))] = name
        path.write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match="has no weight_map of file names"):
            open_base(copy)


def test_a_buffer_that_only_the_configuration_knows_of_has_limits(tmp_path: Path) -> None:
    config = AutoConfig.for_model("gptj", vocab_size=400, n_embd=64, n_layer=1, n_head=4)
    config.rotary_dim = 8
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    load_base(tmp_path, BaseRecipe())
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"n_positions": 2**40}))
    with pytest.raises(CheckpointError, match=r"requires a buffer .*embed_positions of 35184 GB"):
        load_base(tmp_path, BaseRecipe())


def test_pickles_are_named_and_not_read(packed: Path) -> None:
    with copied(packed) as copy:
        for file in copy.glob("model*"):
            file.unlink()
        (copy / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
        with pytest.raises(CheckpointError, match=r"only pickles \(pytorch_model.bin\), which can"):
            open_base(copy)
        # Under the name of a safetensors file it is no better.
        (copy / "pytorch_model.bin").rename(copy / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            open_base(copy)
