"""What was exported computes, read by transformers and by the gguf package, what it was made of."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from halfbyte.checkpoint.base_model import load_base, open_base
from halfbyte.checkpoint.gguf_architectures import Layout
from halfbyte.checkpoint.gguf_export import (
    value_of,
    write_gguf,
    write_gguf_lora,
)
from halfbyte.checkpoint.gguf_verify import rounding, verify_gguf, verify_gguf_lora
from halfbyte.checkpoint.gguf_vocabulary import pre_tokenizer
from halfbyte.checkpoint.merged import Merged
from halfbyte.checkpoint.modelfile import go_template, modelfile
from halfbyte.checkpoint.peft import LoadedAdapter
from halfbyte.errors import CheckpointError, HalfbyteError, WeightError
from halfbyte.linear.lora import LoRAConfig, adapter_state, attach, load_adapter_state
from halfbyte.models.build import BaseRecipe
from tests.checkpoint.families import tiny_model
from tests.checkpoint.gguf_models import write_gguf as reference_gguf
from tests.tiny import LLAMA2, tiny_tokenizer, write_tiny_model

PROMPT = torch.arange(3, 43)[None]
TEXT = "It's 1234 boxes of nails,  for Priya\n\n<|im_end|> naïve — 两"


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(PROMPT).logits.float()  # type: ignore[no-any-return]


def write_family(directory: Path, family: str, **changes: Any) -> Path:
    tiny_model(family, **changes).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def export(directory: Path, file_type: Any = "f32") -> Path:
    # Apart: transformers would mix the files of a directory with what the GGUF file holds.
    source, path = open_base(directory), directory / "gguf" / "model.gguf"
    path.parent.mkdir(exist_ok=True)
    write_gguf(source, path, file_type, base=source)
    return path


def packed(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def adapter(directory: Path, **changes: Any) -> LoadedAdapter:
    model = load_base(directory, BaseRecipe(quant="none")).model
    config = LoRAConfig(
        **{"r": 4, "alpha": 8, "target_modules": ("q_proj", "k_proj", "down_proj")} | changes
    )
    config = replace(config, target_modules=tuple(attach(model, config, seed=0)))
    generator = torch.Generator().manual_seed(1)
    state = {
        name: 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in adapter_state(model).items()
    }
    return LoadedAdapter(config, state, {}, "tiny", {})


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"head_dim": 32}),
        ("mistral", {}),
        ("qwen2", {}),
        (
            "qwen3",
            {"head_dim": 128, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        ),
    ],
)
def test_transformers_reads_what_the_model_computes(
    tmp_path: Path, family: str, changes: dict[str, Any], tied: bool
) -> None:
    directory = write_family(tmp_path / "m", family, tie_word_embeddings=tied, **changes)
    expected = logits(AutoModelForCausalLM.from_pretrained(directory))
    path = export(directory)
    read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
    assert logits(read).sub(expected).abs().max() < 1e-5
    found = verify_gguf(open_base(directory), open_base(path), path)
    assert found.worst_share == 0
    assert found.tensors == len(list(read.parameters()))


@pytest.mark.parametrize("file_type", ["f16", "bf16", "q8_0", "q4_0"])
def test_values_are_rounded_once_as_the_gguf_package_does(tmp_path: Path, file_type: Any) -> None:
    # Rows of 64 and 96: both whole blocks.
    directory = write_family(tmp_path / "m", "qwen2", tie_word_embeddings=True)
    path = export(directory, file_type)
    source, tensors = open_base(directory), packed(path)
    kind = Kind[file_type.upper()]
    for parameter in source.parameters:
        [name] = Layout(source.config).form(parameter.name).names
        wanted = Kind.F32 if len(parameter.shape) == 1 else kind
        if (file_type, name) == ("q4_0", "token_embd.weight"):
            wanted = Kind.Q8_0
        value = value_of(source, parameter.name)
        assert tensors[name].tensor_type == wanted
        stored = gguf.quants.quantize(value.numpy(), wanted)
        assert tensors[name].data.tobytes() == stored.tobytes()
    found = verify_gguf(source, open_base(path), path)
    assert 0.3 < found.worst_share <= 1


def test_rows_that_no_block_fits_are_float16(tmp_path: Path) -> None:
    directory = write_family(tmp_path / "m", "llama", intermediate_size=80)
    path = export(directory, "q8_0")
    kinds = {name: tensor.tensor_type for name, tensor in packed(path).items()}
    assert kinds["blk.0.ffn_down.weight"] == Kind.F16
    assert kinds["blk.0.ffn_up.weight"] == Kind.Q8_0
    assert verify_gguf(open_base(directory), open_base(path), path).worst_share <= 1


@settings(deadline=None, max_examples=60)
@given(
    arrays(np.float32, (3, 64), elements=st.floats(-1000, 1000, width=32)),
    st.sampled_from([Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.F32]),
)
@example(np.full((3, 64), 1e-42, np.float32), Kind.Q8_0)
@example(np.full((3, 64), 1e-42, np.float32), Kind.Q4_0)
@example(np.full((3, 64), 1e-42, np.float32), Kind.BF16)
def test_no_rounding_is_larger_than_allowed(values: Any, kind: Kind) -> None:
    with np.errstate(all="ignore"):
        back = gguf.dequantize(gguf.quants.quantize(values, kind), kind)
    value = torch.from_numpy(values)
    assert ((torch.from_numpy(np.array(back)) - value).abs() <= rounding(value, kind)).all()


@pytest.mark.parametrize(
    "changes",
    [{}, {"use_rslora": True, "rank_pattern": {"q_proj": 6}, "alpha_pattern": {"k_proj": 3}}],
)
def test_an_adapter_alone_adds_what_the_merged_model_has(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    directory = write_family(tmp_path / "m", "llama")
    found, source = adapter(directory, **changes), open_base(directory)
    write_gguf_lora(source, found, tmp_path / "a.gguf", "f32")
    model = load_base(directory, BaseRecipe(quant="none")).model
    found.put_on(model)
    merged = Merged(source, model, "decoded", torch.float32)
    write_gguf(merged, tmp_path / "m.gguf", "f32", base=source)
    before, after = packed(export(directory)), packed(tmp_path / "m.gguf")
    parts, keys = packed(tmp_path / "a.gguf"), gguf.GGUFReader(tmp_path / "a.gguf").fields
    assert keys["general.type"].contents() == "adapter"
    assert keys["adapter.type"].contents() == "lora"
    assert keys["general.architecture"].contents() == "llama"
    alpha = keys["adapter.lora.alpha"].contents()
    for name, tensor in before.items():
        sum_ = tensor.data.copy()
        if f"{name}.lora_a" in parts:
            a, b = parts.pop(f"{name}.lora_a").data, parts.pop(f"{name}.lora_b").data
            sum_ += alpha / b.shape[1] * (b @ a)
            assert not np.allclose(sum_, tensor.data, atol=1e-3)
        assert np.allclose(sum_, after[name].data, atol=1e-6)
    assert not parts
    assert verify_gguf_lora(source, found, tmp_path / "a.gguf").worst_share <= 1


@pytest.mark.parametrize("file_type", ["f16", "bf16"])
def test_a_rounded_adapter_is_within_its_rounding(tmp_path: Path, file_type: Any) -> None:
    directory = write_family(tmp_path / "m", "llama")
    found, source = adapter(directory), open_base(directory)
    write_gguf_lora(source, found, tmp_path / "a.gguf", file_type)
    assert 0.05 < verify_gguf_lora(source, found, tmp_path / "a.gguf").worst_share <= 1
    scaled = found._replace(config=replace(found.config, alpha=9))
    assert verify_gguf_lora(source, scaled, tmp_path / "a.gguf").worst_share > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"saved": {"model.norm.weight": torch.ones(64)}}, r"trained in full \(norm\)"),
        ({"config": LoRAConfig(r=4, use_dora=True)}, "DoRA"),
    ],
)
def test_adapters_that_are_more_than_lora_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    directory = write_family(tmp_path / "m", "llama")
    found = adapter(directory)._replace(**change)
    with pytest.raises(CheckpointError, match=message):
        write_gguf_lora(open_base(directory), found, tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("falcon", {}, "models of type falcon"),
        ("llama", {"hidden_act": "gelu"}, "'gelu'"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("mistral", {"attention_bias": True}, "biases"),
        ("gemma2", {"query_pre_attn_scalar": 99}, "query_pre_attn_scalar = '99'"),
        ("gemma2", {"layer_types": ["full_attention"] * 2}, "1 of 2"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers"),
        ("phi3", {"head_dim": 32}, "head_dim = '32'"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "'dynamic'",
        ),
    ],
)
def test_what_a_file_cannot_say_is_refused(
    family: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        Layout(tiny_model(family, **changes).config)


def test_llama3_frequencies_become_a_table(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    directory = write_family(tmp_path / "m", "llama", rope_parameters=rope)
    table = packed(export(directory))["rope_freqs.weight"].data
    rotary = AutoModelForCausalLM.from_pretrained(directory).model.rotary_emb
    plain = 10000.0 ** -(np.arange(0, 16, 2) / 16)
    assert np.allclose(plain / table, rotary.inv_freq.numpy(), rtol=1e-5)
    assert table.max() == pytest.approx(8.0)


def test_a_window_bounds_the_context(tmp_path: Path) -> None:
    directory = write_family(tmp_path / "m", "mistral", sliding_window=48)
    fields = gguf.GGUFReader(export(directory)).fields
    assert fields["llama.context_length"].contents() == 48


def test_numbers_beyond_the_type_are_refused(tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(directory)
    weight = model.model.layers[1].mlp.up_proj.weight
    for number, message in ((1e6, "bf16"), (float("nan"), "NaN")):
        weight.data[0, 0] = number
        model.save_pretrained(directory)
        with pytest.raises(WeightError, match=f"blk.1.ffn_up.weight.*{message}"):
            export(directory) if message == "NaN" else export(directory, "f16")
        assert list((directory / "gguf").iterdir()) == []


def test_a_row_of_the_smallest_numbers_becomes_zeros(tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(directory)
    model.model.layers[1].mlp.up_proj.weight.data[0] = 1e-42
    model.save_pretrained(directory)
    path = export(directory, "q4_0")
    assert verify_gguf(open_base(directory), open_base(path), path).worst_share <= 1


def test_a_damaged_file_does_not_pass(tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path / "m")
    path = export(directory, "q8_0")
    raw = bytearray(path.read_bytes())
    place = packed(path)["blk.1.ffn_up.weight"].data_offset
    raw[place + 7] ^= 0x40
    path.write_bytes(raw)
    assert verify_gguf(open_base(directory), open_base(path), path).worst_share > 10
    other = write_family(tmp_path / "o", "llama", rms_norm_eps=1e-3)
    with pytest.raises(HalfbyteError, match=r"rms_norm_eps|intermediate_size"):
        verify_gguf(open_base(other), open_base(path), path)


def test_the_tokenizer_and_its_template_come_with_it(tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path / "m")
    path = export(directory)
    ours, theirs = tiny_tokenizer(), AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    assert theirs(TEXT)["input_ids"] == ours(TEXT)["input_ids"]
    assert theirs.chat_template == ours.chat_template
    fields = gguf.GGUFReader(path).fields
    assert fields["tokenizer.ggml.eos_token_id"].contents() == ours.eos_token_id
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False
    assert fields["tokenizer.ggml.token_type"].contents()[:4] == [3, 3, 3, 1]


def test_the_tokenizer_of_a_gguf_file_is_copied(tmp_path: Path) -> None:
    """Its name for the cut too, which transformers' tokenizer has lost."""
    path = reference_gguf(tmp_path / "base.gguf", Kind.F16)
    raw = path.read_bytes()
    assert raw.count(b"gpt-2") == 1
    path.write_bytes(raw.replace(b"gpt-2", b"qwen2"))
    source, out = open_base(path), tmp_path / "out.gguf"
    write_gguf(source, out, "f16", base=source)
    before, after = (gguf.GGUFReader(file).fields for file in (path, out))
    keys = [key for key in before if key.startswith("tokenizer.")]
    assert len(keys) > 8
    assert keys == [key for key in after if key.startswith("tokenizer.")]
    for key in keys:
        assert before[key].contents() == after[key].contents()
        assert before[key].types == after[key].types
    assert verify_gguf(source, open_base(out), out).worst_share == 0
    # The file of another writer holds the same tensors.
    wanted, got = packed(path), packed(out)
    assert wanted.keys() == got.keys()
    for name, tensor in wanted.items():
        assert tensor.data.tobytes() == got[name].data.tobytes()


def test_rows_beyond_the_tokens_are_unused(tmp_path: Path) -> None:
    directory = write_family(tmp_path / "m", "llama", vocab_size=416)
    path = export(directory)
    fields = gguf.GGUFReader(path).fields
    assert len(fields["tokenizer.ggml.tokens"].contents()) == 416
    assert set(fields["tokenizer.ggml.token_type"].contents()[len(tiny_tokenizer()) :]) == {5}
    small = write_family(tmp_path / "s", "llama", vocab_size=300)
    with pytest.raises(CheckpointError, match="300 rows"):
        export(small)


def byte_level(*cuts: Any, own: bool = True, whole: bool = False) -> dict[str, Any]:
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole))
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, last])
    return json.loads(tokenizer.to_str())  # type: ignore[no-any-return]


QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def cut_at(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


def test_families_of_tokenizers_are_known_by_their_rules() -> None:
    llama3 = cut_at(QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|"))
    assert pre_tokenizer(byte_level()) == "gpt-2"
    assert pre_tokenizer(byte_level(pre_tokenizers.Digits(individual_digits=True))) == "smollm"
    assert pre_tokenizer(byte_level(cut_at(QWEN2), own=False)) == "qwen2"
    assert pre_tokenizer(byte_level(llama3, own=False, whole=True)) == "llama-bpe"
    assert pre_tokenizer(byte_level(llama3, own=False)) == "dbrx"
    for other in (
        byte_level(cut_at(QWEN2)),
        byte_level(cut_at(r"\p{N}+"), own=False),
        byte_level(pre_tokenizers.Digits(individual_digits=False)),
        byte_level() | {"normalizer": {"type": "Lowercase"}},
        byte_level() | {"pre_tokenizer": None},
    ):
        with pytest.raises(CheckpointError, match="tokenise text differently"):
            pre_tokenizer(other)


def test_sentencepiece_tokenizers_read_as_before(tmp_path: Path) -> None:
    letters = "▁abcdeilnorst"
    parts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    merges = [("▁", "t"), ("i", "n"), ("▁", "a"), ("n", "t"), ("▁t", "o"), ("▁a", "nt")]
    parts += ["".join(pair) for pair in merges]
    backend = Tokenizer(
        models.BPE(
            {part: number for number, part in enumerate(parts)},
            merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    ours = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    directory = tmp_path / "m"
    tiny_model("llama").save_pretrained(directory)
    ours.save_pretrained(directory)
    path = export(directory)
    fields = gguf.GGUFReader(path).fields
    assert fields["tokenizer.ggml.model"].contents() == "llama"
    assert fields["tokenizer.ggml.token_type"].contents()[:4] == [2, 3, 3, 6]
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in ("to a tin ant", "in  tent", "zebra stand\nlions"):
        wanted = ours(text)["input_ids"]
        assert theirs(text, add_special_tokens=False)["input_ids"] == wanted


LLAMA3 = (
    "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
    "+ m['content'] + '<|eot_id|>' }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
WITH_DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}"
    "{% endif %}" + tiny_tokenizer().chat_template
)


def test_a_template_in_go_is_given_where_it_says_the_same() -> None:
    chatml = (
        "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}"
        "<|im_start|>assistant\n"
    )
    assert go_template(tiny_tokenizer()) == (chatml, None)
    assert go_template(tiny_tokenizer(WITH_DEFAULT)) == (chatml, "Be kind.")
    found = go_template(tiny_tokenizer(LLAMA3))
    assert found is not None
    assert "{{ .Role }}<|end_header_id|>\n\n{{ .Content }}<|eot_id|>{{ end }}" in found[0]
    for other in (LLAMA2, None, LLAMA3 + "!"):
        assert go_template(tiny_tokenizer(other)) is None


def test_the_modelfile_says_where_to_stop() -> None:
    text = modelfile("./model.gguf", tiny_tokenizer(), [0], adapter="./adapter.gguf")
    assert text.startswith('FROM ./model.gguf\nADAPTER ./adapter.gguf\nTEMPLATE """{{ range')
    assert text.endswith('PARAMETER stop "<|im_end|>"\nPARAMETER stop "<|endoftext|>"\n')
    assert "# No TEMPLATE" in modelfile("./model.gguf", tiny_tokenizer(LLAMA2))


def test_loading_an_adapter_state_does_not_matter_for_the_base(tmp_path: Path) -> None:
    """A merged NF4 base is exported as it decodes: bit for bit in float32."""
    directory = write_tiny_model(tmp_path / "m")
    source = open_base(directory)
    model = load_base(source, BaseRecipe(quant="nf4")).model
    attach(model, LoRAConfig(r=4, target_modules=("v_proj",)), seed=0)
    load_adapter_state(model, {k: torch.ones_like(v) for k, v in adapter_state(model).items()})
    merged = Merged(source, model, "decoded", torch.float32)
    path = tmp_path / "model.gguf"
    write_gguf(merged, path, "f32", base=source)
    expected = logits(model)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name)
    assert logits(read).sub(expected).abs().max() < 1e-4
    assert verify_gguf(merged, open_base(path), path).worst_share == 0
