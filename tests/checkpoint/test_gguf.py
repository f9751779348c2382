"""GGUF: the model, configuration and tokenizer transformers makes of a file, read in a stream."""

import json
import logging
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from halfbyte.checkpoint.base_model import load_base, open_base
from halfbyte.checkpoint.gguf import read_tokenizer
from halfbyte.checkpoint.gguf_blocks import encode
from halfbyte.checkpoint.gguf_file import GGUFFile, held_as
from halfbyte.checkpoint.gguf_vocabulary import pre_tokenizer
from halfbyte.errors import CheckpointError, HalfbyteError
from halfbyte.models.build import BaseRecipe
from tests.checkpoint.families import tiny_model
from tests.checkpoint.gguf_models import write_family, write_gguf
from tests.checkpoint.streams import streamed

PROMPT = torch.arange(3, 43)[None]


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(PROMPT).logits  # type: ignore[no-any-return]


def tensors(path: Path) -> dict[str, Tensor]:
    return streamed(open_base(path))


# What the package can quantise itself; the others are tried with random bytes below.
KINDS = [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q5_1, Kind.Q4_0, Kind.Q4_1, Kind.MXFP4]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_file_is_the_model_transformers_makes_of_it(tmp_path: Path, kind: Kind) -> None:
    path = write_gguf(tmp_path / "m.gguf", kind, tied=kind != Kind.Q8_0)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf")
    expected = theirs.state_dict()
    source = open_base(path)
    streamed = tensors(path)
    assert [parameter.name for parameter in source.parameters] == list(streamed)
    for parameter in source.parameters:
        value = streamed[parameter.name]
        assert (value.dtype, tuple(value.shape)) == (parameter.dtype, parameter.shape)
        assert value.float().equal(expected[parameter.name]), parameter.name
    assert source.total_bytes < path.stat().st_size
    ours = load_base(path, BaseRecipe(quant="none")).model
    assert logits(ours).sub(logits(theirs)).abs().max() < 1e-5
    assert ours.config.tie_word_embeddings == theirs.config.tie_word_embeddings


# Family in transformers, llama.cpp's name, and sizes transformers does not find in the file.
FAMILIES: list[tuple[str, str, dict[str, Any]]] = [
    ("qwen2", "qwen2", {}),
    ("qwen3", "qwen3", {"head_dim": 128}),
    ("gemma2", "gemma2", {"head_dim": 16}),
    ("gemma3_text", "gemma3", {"head_dim": 16}),
    ("phi3", "phi3", {}),
    ("stablelm", "stablelm", {}),
    ("starcoder2", "starcoder2", {}),
    ("qwen3_moe", "qwen3moe", {"head_dim": 16, "num_experts": 3, "moe_intermediate_size": 768}),
]


@pytest.mark.parametrize(("family", "architecture", "sizes"), FAMILIES, ids=lambda case: str(case))
def test_families_are_rearranged_as_transformers_does(
    tmp_path: Path, family: str, architecture: str, sizes: dict[str, Any]
) -> None:
    path = write_family(tmp_path / "m.gguf", architecture, tiny_model(family, **sizes))
    source = open_base(path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf")
    expected = theirs.state_dict()
    streamed = tensors(path)
    assert streamed.keys() == expected.keys() - theirs.all_tied_weights_keys.keys()
    for parameter in source.parameters:
        value = streamed[parameter.name]
        assert (value.dtype, tuple(value.shape)) == (parameter.dtype, parameter.shape)
        assert value.float().equal(expected[parameter.name]), parameter.name


@pytest.mark.parametrize(
    ("kind", "held", "dtype"),
    [
        (Kind.F16, torch.float16, torch.float16),
        (Kind.BF16, torch.bfloat16, torch.bfloat16),
        (Kind.Q8_0, torch.float32, torch.bfloat16),
    ],
    ids=str,
)
def test_matrices_of_16_bits_stay_16_bits(
    tmp_path: Path, kind: Kind, held: torch.dtype, dtype: torch.dtype
) -> None:
    source = open_base(write_gguf(tmp_path / "m.gguf", kind))
    streamed = tensors(tmp_path / "m.gguf")
    assert {t.dtype for t in streamed.values() if t.dim() == 2} == {held}
    assert {t.dtype for t in streamed.values() if t.dim() == 1} == {torch.float32}
    assert source.dtype == dtype


def test_configuration_and_tokenizer_are_those_of_transformers(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    source = open_base(path)
    theirs = AutoConfig.from_pretrained(tmp_path, gguf_file="m.gguf")
    expected = theirs.to_dict() | {"_name_or_path": str(path)}
    del expected["_model_name_or_path"], expected["unk_token_id"]  # no options of a Llama
    assert source.config.to_dict() == expected
    tokenizer, expected = (
        source.tokenizer(),
        AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf"),
    )
    for text in ("The quick brown fox: 12 é\n", "<|im_start|>user\nParis<|im_end|>\n"):
        assert tokenizer(text).input_ids == expected(text).input_ids
    chat = [{"role": "user", "content": "Hello"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == expected.apply_chat_template(
        chat, tokenize=False
    )
    # Not as in transformers, whose 5.17 takes BOS for EOS here: as the file says.
    named = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    assert named == ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>")


def write_tensor(path: Path, raw: "np.ndarray[Any, Any]", kind: Kind) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("w", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", gguf.GGML_QUANT_SIZES, ids=lambda kind: kind.name)
def test_every_type_decodes_as_the_package_decodes_it(tmp_path: Path, kind: Kind) -> None:
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    # Enough for several pieces, and a short one at the end.
    rows, columns = 3, 5 * max(256, block)
    raw = np.random.default_rng(0).integers(
        0, 256, (rows, columns // block * block_bytes), np.uint8
    )
    try:
        with np.errstate(all="ignore"):
            expected = gguf.dequantize(raw, kind)
    except NotImplementedError:
        return  # test_a_type_that_is_not_decoded_is_told
    path = tmp_path / "m.gguf"
    write_tensor(path, raw, kind)
    file = GGUFFile(path)
    stored = file.tensors["w"]
    assert stored.shape == (rows, columns)
    read = file.read(stored)
    if held_as(stored) == np.uint16:  # bfloat16, kept as it is
        read = (read.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(read.astype(np.float32), expected.reshape(rows, columns))


def test_pieces_of_a_large_tensor_fit_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tensors(write_gguf(tmp_path / "m.gguf", Kind.Q4_1))
    monkeypatch.setattr("halfbyte.checkpoint.gguf_blocks._CPU_CHUNK", 7 * 32)
    for name, value in tensors(tmp_path / "m.gguf").items():
        assert value.equal(whole[name])


def test_decoding_takes_little_more_memory_than_the_result(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    raw = np.zeros((2048, 4096 // 32 * 34), np.uint8)
    write_tensor(path, raw, Kind.Q8_0)
    file = GGUFFile(path)
    tracemalloc.start()
    read = file.read(file.tensors["w"])
    assert tracemalloc.get_traced_memory()[1] < 1.1 * raw.nbytes  # of numpy's; not of torch's
    tracemalloc.stop()
    assert read.nbytes == 4 * 2048 * 4096


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0])
def test_every_type_we_write_is_rounded_as_by_the_package(kind: Kind) -> None:
    """Numbers of all sizes, rows of zeros, halves, equal extremes of both signs."""
    draw = np.random.default_rng(0)
    sizes = 10 ** draw.uniform(-9, 4, (500, 1))
    parts = [draw.normal(size=(500, 256)) * sizes, np.zeros((1, 256)), np.full((1, 256), 1e-44)]
    parts += [draw.integers(-3, 4, (50, 256)), draw.integers(-254, 255, (50, 256)) / 2]
    value = np.concatenate(parts).astype(np.float32)
    with np.errstate(all="ignore"):
        expected = gguf.quants.quantize(value, kind).view(np.uint8).reshape(-1)
    np.testing.assert_array_equal(encode(torch.from_numpy(value), kind).numpy(), expected)


def test_a_type_that_is_not_decoded_is_told(tmp_path: Path) -> None:
    extra = {"blk.0.ffn_gate.bias": np.zeros(32, np.int32)}
    path = write_gguf(tmp_path / "m.gguf", extra=extra)
    with pytest.raises(CheckpointError, match=r"of type I32, .* does not decode|no place for"):
        open_base(path)


def test_tensors_without_a_place_are_told(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", extra={"blk.0.strange.weight": np.zeros(4, np.float32)})
    with pytest.raises(CheckpointError, match=r"has no place for: blk.0.strange.weight \(1 in all"):
        open_base(path)


def test_scaled_rotary_frequencies_are_announced_where_transformers_leaves_them_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_family(tmp_path / "m.gguf", "starcoder2", tiny_model("starcoder2"))
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"blk.1.ffn_up.bias", b"rope_freqs.weight"))
    with caplog.at_level(logging.WARNING, logger="halfbyte"), pytest.raises(CheckpointError):
        open_base(path)
    assert "scales its rotary frequencies (rope_freqs.weight), which is not applied" in caplog.text


def test_a_file_without_a_tokenizer_is_told(tmp_path: Path) -> None:
    source = open_base(write_gguf(tmp_path / "m.gguf", tokenizer=False))
    with pytest.raises(CheckpointError, match=r"m.gguf contains no tokenizer"):
        source.tokenizer()


def with_file(change: Callable[[bytearray], object]) -> Callable[[Path], None]:
    def changed(path: Path) -> None:
        raw = bytearray(path.read_bytes())
        change(raw)
        path.write_bytes(raw)

    return changed


def put(raw: bytearray, after: bytes, code: str, *values: float | bytes) -> None:
    """Overwrite what follows the name ``after`` in the header."""
    at = raw.index(after) + len(after)
    raw[at : at + struct.calcsize("<" + code)] = struct.pack("<" + code, *values)


U64 = 2**64 - 1
LIES: dict[str, tuple[Callable[[bytearray], object], str]] = {
    "magic": (lambda raw: raw.__setitem__(slice(0, 4), b"GGML"), "does not begin with GGUF"),
    "version": (lambda raw: raw.__setitem__(4, 9), "its version is 9"),
    "tensor count": (lambda raw: raw.__setitem__(slice(8, 16), b"\xff" * 8), "entries, the file"),
    "key count": (lambda raw: raw.__setitem__(slice(16, 24), b"\xff" * 8), "entries, the file"),
    "array length": (lambda raw: put(raw, b"ggml.tokens", "IIQ", 9, 8, U64), "entries, the file"),
    "array of arrays": (lambda raw: put(raw, b"ggml.tokens", "II", 9, 9), "an array of type 9"),
    "string length": (lambda raw: put(raw, b"ggml.model", "IQ", 8, 2**40), "a text of"),
    "value type": (lambda raw: put(raw, b"ggml.model", "I", 99), "a value of type 99"),
    "no architecture": (lambda raw: put(raw, b"general.", "4s", b"ARCH"), "architecture ''"),
    "dimensions": (lambda raw: put(raw, b"blk.0.attn_q.weight", "I", 2**31), "dimensions"),
    "shape": (lambda raw: put(raw, b"blk.0.attn_q.weight", "IQQ", 2, 64, 2**60), "the shape"),
    "row": (lambda raw: put(raw, b"blk.0.attn_q.weight", "IQQ", 2, 31, 64), "the shape"),
    "type": (lambda raw: put(raw, b"blk.0.attn_q.weight", "IQQI", 2, 64, 64, 999), "type 999"),
    "offset": (
        lambda raw: put(raw, b"blk.0.attn_q.weight", "IQQIQ", 2, 64, 64, 8, 2**40),
        "should take 4352 bytes from",
    ),
    "overlap": (
        lambda raw: put(raw, b"blk.0.attn_q.weight", "IQQIQ", 2, 64, 64, 8, 32),
        "the tensor before ends at",
    ),
    "layers": (lambda raw: put(raw, b"llama.block_count", "II", 4, 2**31), "2147483648 layers"),
    "width": (lambda raw: put(raw, b"llama.embedding_length", "II", 4, 128), "the shape"),
    "text for a number": (lambda raw: put(raw, b"llama.block_count", "I", 6), "is of type 6"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_of_the_header_are_found(tmp_path: Path, lie: str) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    change, message = LIES[lie]
    with_file(change)(path)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=message):
        open_base(path)
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    raw = path.read_bytes().replace(b"blk.1.attn_norm.weight", b"blk.1.attn_n0rm.weight")
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"no place for: blk.1.attn_n0rm.weight"):
        open_base(path)


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "qwen2", "llama-bpe", "tekken"])
def test_a_known_tokenizer_is_put_together_as_transformers_does(tmp_path: Path, name: str) -> None:
    """But for the cut, which is the file's: tokens that no byte spells, some found whole."""
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, "ab", "<|endoftext|>", "<|a b|>", "« é", "<think>", "two words", "abc"]
    kinds = {"<|endoftext|>": 3, "<|a b|>": 3, "« é": 3, "<think>": 4, "two words": 4}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(tokens)
    writer.add_token_types([kinds.get(token, 1) for token in tokens])
    writer.add_token_merges(["a b", "ab c"])
    writer.add_eos_token_id(tokens.index("<|endoftext|>"))
    writer.add_bos_token_id(tokens.index("<|endoftext|>"))
    writer.add_add_bos_token(True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    ours = read_tokenizer(GGUFFile(path))
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path, gguf_file="m.gguf")
    written, expected = (json.loads(t.backend_tokenizer.to_str()) for t in (ours, theirs))
    assert pre_tokenizer(written) == name
    written["model"]["ignore_merges"] = expected["model"]["ignore_merges"] = name in (
        "llama-bpe",
        "tekken",
    )
    del written["pre_tokenizer"], expected["pre_tokenizer"]
    assert written == expected
    assert ours("abc").input_ids == [tokens.index("<|endoftext|>"), tokens.index("abc")]
    assert ours.special_tokens_map == theirs.special_tokens_map


@pytest.mark.parametrize("left", [0, 3, 20, 200, 5000, -1, -3000])
def test_a_file_that_is_cut_is_told(tmp_path: Path, left: int) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    os.truncate(path, left if left >= 0 else path.stat().st_size + left)
    with pytest.raises(CheckpointError, match=r"m\.gguf"):
        open_base(path)


def test_a_file_cut_after_it_was_opened_is_told(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    source = open_base(path)
    os.truncate(path, path.stat().st_size - 40)
    with pytest.raises(CheckpointError, match=r"m.gguf ends at byte"):
        list(source.tensors())


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"x.gguf does not exist"):
        open_base(tmp_path / "x.gguf")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "m.gguf").read_bytes()


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(st.data())
def test_damage_is_an_error_or_changes_only_values(
    tmp_path: Path, whole: bytes, data: st.DataObject
) -> None:
    raw = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        if data.draw(st.booleans()):
            at = data.draw(st.integers(0, 12_000))  # the header's end
            raw[at] = data.draw(st.integers(0, 255))
        else:
            del raw[data.draw(st.integers(0, len(raw))) :]
            break
    path = tmp_path / "m.gguf"
    path.write_bytes(raw)
    try:
        file = GGUFFile(path)
        read = [file.read(tensor) for tensor in file.tensors.values()]
    except CheckpointError as error:
        assert "m.gguf" in str(error)  # noqa: PT017
    except NotImplementedError:
        pass  # a block type the package does not decode; what opens a source asks first
    else:
        assert len(read) == len(file.tensors)


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(st.data())
def test_damage_never_gets_past_the_door(tmp_path: Path, whole: bytes, data: st.DataObject) -> None:
    raw = bytearray(whole)
    at = data.draw(st.integers(24, 900))  # the keys, which become a configuration
    raw[at] = data.draw(st.integers(0, 255))
    path = tmp_path / "m.gguf"
    path.write_bytes(raw)
    try:
        open_base(path)
    except HalfbyteError as error:
        assert "m.gguf" in str(error)  # noqa: PT017


def test_rules_of_cutting_that_are_not_known_are_announced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    raw = path.read_bytes()

    def cuts() -> list[str]:
        backend = open_base(path).tokenizer().backend_tokenizer
        return [part for part, _ in backend.pre_tokenizer.pre_tokenize_str("12 a!\n\n3")]

    with caplog.at_level(logging.WARNING, logger="halfbyte"):
        plain = cuts()
        assert caplog.text == ""
        path.write_bytes(raw.replace(b"gpt-2", b"other"))
        assert cuts() == plain
    assert "has a pre-tokenizer that halfbyte does not know ('other')" in caplog.text
    path.write_bytes(raw.replace(b"gpt-2", b"qwen2"))
    assert cuts() == ["1", "2", "Ġa", "!ĊĊ", "3"] != plain
