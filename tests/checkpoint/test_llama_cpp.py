"""llama.cpp reads what was exported: the same answers, the same tokens, the same template."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.activations import GELUTanh

from halfbyte.checkpoint.base_model import load_base, open_base
from halfbyte.checkpoint.gguf_architectures import Layout
from halfbyte.checkpoint.gguf_export import write_gguf, write_gguf_lora
from halfbyte.checkpoint.gguf_file import GGUFFile
from halfbyte.checkpoint.gguf_verify import verify_gguf
from halfbyte.checkpoint.merged import Merged
from halfbyte.checkpoint.mxfp4_keys import dense
from halfbyte.checkpoint.peft import LoadedAdapter
from halfbyte.linear.lora import LoRAConfig, adapter_state, attach, load_adapter_state
from halfbyte.models.build import BaseRecipe
from tests.checkpoint.families import tiny_model
from tests.checkpoint.gguf_families import FAMILIES, tied
from tests.checkpoint.llama_cpp import LlamaCpp, llama_cpp
from tests.checkpoint.mxfp4_models import write_gpt_oss
from tests.tiny import tiny_tokenizer

PROMPT = list(range(3, 43))
WORDS = len(tiny_tokenizer())


def write_model(directory: Path, family: str, tokenizer: Any = None, /, **changes: Any) -> Path:
    """Write a random model whose attention and answers are far from even."""
    tokenizer = tokenizer or tiny_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "initializer_range": 0.2}
    tiny_model(family, **sizes | changes).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def export(directory: Path, file_type: Any = "f32") -> Path:
    source, path = open_base(directory), directory / "model.gguf"
    write_gguf(source, path, file_type, base=source)
    return path


def log_probabilities(model: Any, answer: list[int]) -> Tensor:
    with torch.no_grad():
        found = model(torch.tensor([PROMPT + answer])).logits[0, len(PROMPT) - 1 : -1]
    return found.float().log_softmax(1)  # type: ignore[no-any-return]


def gap(model: Any, server: LlamaCpp) -> float:
    """Return the largest difference of a log-probability along llama.cpp's own greedy answer.

    Its tokens must be the likeliest of ``model`` too, as far as that difference leaves a choice.
    """
    answer = server.greedy(PROMPT, 8)
    prefixes = [PROMPT + answer[:count] for count in range(len(answer))]
    theirs = torch.stack([server.log_probabilities(prefix, WORDS) for prefix in prefixes])
    ours = log_probabilities(model, answer)
    largest = float((theirs - ours).abs().max())
    chosen = ours[torch.arange(len(answer)), torch.tensor(answer)]
    assert (chosen >= ours.amax(1) - 2 * largest).all()
    return largest


def short(case: Any) -> str:
    return str(case if isinstance(case, int) else case[0])


class HalfGelu(torch.nn.Module):
    """llama.cpp's GELU on a CPU: a table of float16 by float16."""

    def forward(self, x: Tensor) -> Tensor:
        found = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x >= 10, x, torch.where(x <= -10, 0.0, found))


@pytest.mark.parametrize(("place", "family"), list(enumerate(FAMILIES)), ids=short)
def test_it_computes_what_the_model_computes_and_so_do_we(
    tmp_path: Path, place: int, family: tuple[str, dict[str, Any]]
) -> None:
    """llama.cpp from the file, and we from the file, what transformers computes."""
    name, changes = family
    head = {"tie_word_embeddings": tied(name, place % 2 == 0)}
    directory = write_model(tmp_path, name, **changes, **head)
    path = export(directory)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    read = load_base(path, BaseRecipe(quant="none")).model
    prompt = torch.tensor([PROMPT])
    with torch.no_grad():
        assert (read(prompt).logits - model(prompt).logits).abs().max() < 1e-4
    assert verify_gguf(open_base(directory), open_base(path), path).worst_share == 0
    for module in model.modules():
        if isinstance(getattr(module, "act_fn", None), GELUTanh):
            module.act_fn = HalfGelu()
    with llama_cpp(path) as server:
        assert gap(model, server) < 1e-4


def test_gpt_oss_as_published_is_a_little_apart(tmp_path: Path) -> None:
    """llama.cpp rounds the range of frequencies that YaRN scales; the models of OpenAI do not."""
    sizes = {"head_dim": 64, "num_local_experts": 4, "max_position_embeddings": 131072}
    rope = {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0}
    rope |= {"beta_slow": 1.0, "original_max_position_embeddings": 4096}
    apart = []
    for truncate in (True, False):
        options = {**sizes, "rope_parameters": {**rope, "truncate": truncate}}
        directory = write_model(tmp_path / str(truncate), "gpt_oss", **options)
        model = AutoModelForCausalLM.from_pretrained(directory).eval()
        with llama_cpp(export(directory)) as server:
            apart.append(gap(model, server))
    assert apart[0] < 1e-4
    assert 1e-4 < apart[1] < 0.3


def rounded(x: Tensor, file_type: str) -> Tensor:
    """Return inputs as llama.cpp rounds them before it multiplies: to the weight's own kind."""
    if "_k" in file_type:  # q8_k: 256 numbers to 8 bits, with a float32
        blocks = x.reshape(-1, 256)
        extreme = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
        codes = (blocks * (-127 / extreme)).round().clamp(max=127)
        return (codes / (-127 / extreme)).view(x.shape)
    kind = {"f16": Kind.F16, "bf16": Kind.BF16}.get(file_type, Kind.Q8_0)
    return torch.from_numpy(np.array(gguf.dequantize(gguf.quants.quantize(x.numpy(), kind), kind)))


K_QUANTS = ["q3_k_m", "q4_k_m", "q5_k_m", "q6_k"]
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}


@pytest.mark.parametrize("file_type", ["f16", "bf16", "q8_0", "q4_0", *K_QUANTS])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_it_is_as_near_as_its_own_rounding(tmp_path: Path, family: str, file_type: Any) -> None:
    """llama.cpp rounds inputs too: no further from the file than that alone puts our model."""
    sizes = {**WIDE, "initializer_range": 0.06} if file_type in K_QUANTS else {}
    path = export(write_model(tmp_path, family, **sizes), file_type)
    model = load_base(path, BaseRecipe(quant="none")).model
    with llama_cpp(path) as server:
        found, answer = gap(model, server), server.greedy(PROMPT, 8)
    plain = log_probabilities(model, answer)
    for module in model.modules():
        if hasattr(module, "in_features"):
            module.register_forward_pre_hook(lambda _, x: (rounded(x[0], file_type),))
    allowed = float((log_probabilities(model, answer) - plain).abs().max())
    assert 0 < found < 2 * allowed < 1


@pytest.mark.parametrize("file_type", ["mxfp4", "q4_k_m"])
def test_experts_of_few_bits_are_near_the_file_as_well(tmp_path: Path, file_type: Any) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 2, "sliding_window": 8}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    options = {**sizes, **experts, **rope, "initializer_range": 0.06}
    path = export(write_model(tmp_path, "gpt_oss", **options), file_type)
    kinds = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(path).tensors}
    assert (
        kinds["blk.0.ffn_up_exps.weight"] == {"mxfp4": Kind.MXFP4, "q4_k_m": Kind.Q4_K}[file_type]
    )
    model = load_base(path, BaseRecipe(quant="none")).model
    with llama_cpp(path) as server:
        assert 0 < gap(model, server) < 0.3


def test_experts_in_mxfp4_keep_their_codes_and_scales(tmp_path: Path) -> None:
    """gpt-oss as it is published, exported: no number is another, for llama.cpp either."""
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    directory = write_gpt_oss(tmp_path / "m", initializer_range=0.1, rope_parameters=rope)
    tiny_tokenizer().save_pretrained(directory)
    path = export(directory, "mxfp4")
    source, file = open_base(directory), GGUFFile(path)
    for name in ("gate_up_proj", "down_proj"):
        name = f"model.layers.1.mlp.experts.{name}"
        form, wanted = Layout(source.config).form(name), dense(source.tensor(name), torch.float32)
        assert all(file.tensors[part].kind == Kind.MXFP4 for part in form.names)
        read = form.join([file.tensor(file.tensors[part]) for part in form.names])
        assert read.equal(wanted)
    assert verify_gguf(source, open_base(path), path).worst_share <= 1
    model = load_base(path, BaseRecipe(quant="none")).model
    with llama_cpp(path) as server:
        assert 0 < gap(model, server) < 0.3


def taught(directory: Path, recipe: BaseRecipe, config: LoRAConfig) -> tuple[Any, LoadedAdapter]:
    """Return a model with a random adapter on it, and the adapter."""
    model = load_base(directory, recipe).model
    attach(model, config, seed=0)
    generator = torch.Generator().manual_seed(1)
    state = {
        name: 0.2 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in adapter_state(model).items()
    }
    load_adapter_state(model, state)
    return model, LoadedAdapter(config, state, {}, "tiny", {})


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_it_answers_as_the_live_adapter(tmp_path: Path, family: str) -> None:
    """On its NF4 base, merged and exported."""
    changes = dict(FAMILIES)[family] if family == "qwen3_moe" else {}
    directory, path = write_model(tmp_path, family, **changes), tmp_path / "merged.gguf"
    model, _ = taught(directory, BaseRecipe(), LoRAConfig(r=4))
    source = open_base(directory)
    write_gguf(Merged(source, model, "decoded", torch.float32), path, "f32", base=source)
    with llama_cpp(path) as server, llama_cpp(export(directory)) as base:
        assert gap(model, server) < 1e-4
        assert gap(model, base) > 0.5


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": "all-linear"},
        {"use_rslora": True, "rank_pattern": {"o_proj": 6}, "alpha_pattern": {"o_proj": 3}},
    ],
)
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "granitemoeshared", "gpt_oss"])
def test_it_takes_the_adapter_alone(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    directory = write_model(tmp_path, family, **dict(FAMILIES)[family])
    model, adapter = taught(
        directory, BaseRecipe(quant="none"), LoRAConfig(r=4, alpha=8, **changes)
    )
    write_gguf_lora(open_base(directory), adapter, tmp_path / "adapter.gguf", "f32")
    with llama_cpp(export(directory), tmp_path / "adapter.gguf") as server:
        assert gap(model, server) < 1e-4


CORPUS = [
    "The quick brown fox isn't 1234567 boxes, they'll say we've: I'M NOT.\n\n\n  x  y\t\tz",
    "naïve café — 两个 日本語 ١٢٣ Ⅷ ½\r\n \n a   12345 67  890",
]
WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def bytewise(*cuts: Any, whole: bool = False, normalizer: Any = None) -> Tokenizer:
    backend = Tokenizer(models.BPE(ignore_merges=whole))
    own = not any(isinstance(cut, pre_tokenizers.Split) for cut in cuts)
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, last]) if cuts else last
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 3, trainer)
    return backend


def cut_at(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


def sentencepiece() -> Tokenizer:
    parts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁ '1aceinotx"]
    merges = [("▁", "t"), ("i", "n"), ("▁", "a"), ("n", "o"), ("▁t", "o"), ("▁a", "no")]
    parts += ["".join(pair) for pair in merges]
    numbers = {part: number for number, part in enumerate(dict.fromkeys(parts))}
    backend = Tokenizer(
        models.BPE(numbers, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence(steps)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return backend


UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"


def cased(endings: str, digits: str) -> str:
    """Return the pattern of o200k_base, or, without endings and for single digits, of Tekken."""
    start, end = r"[^\r\n\p{L}\p{N}]?", r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    words = f"{start}{UPPER}*{LOWER}+{endings}|{start}{UPPER}+{LOWER}*{endings}"
    return rf"{words}|\p{{N}}{digits}{end}"


def gemma() -> Tokenizer:
    backend = sentencepiece()
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    return backend


BACKENDS = {
    "gpt-2": bytewise,
    "smollm": lambda: bytewise(pre_tokenizers.Digits(individual_digits=True)),
    "qwen2": lambda: bytewise(cut_at(WORD + REST), normalizer=normalizers.NFC()),
    "llama-bpe": lambda: bytewise(cut_at(WORD + "{1,3}" + REST), whole=True),
    "dbrx": lambda: bytewise(cut_at(WORD + "{1,3}" + REST)),
    "gpt-4o": lambda: bytewise(cut_at(cased(ENDINGS, "{1,3}")), whole=True),
    "tekken": lambda: bytewise(cut_at(cased("", "")), whole=True),
    "qwen35": lambda: bytewise(
        cut_at(
            (WORD + REST)
            .replace(r"?\p{L}+", r"?[\p{L}\p{M}]+")
            .replace(r"\p{L}\p{N}]+[", r"\p{L}\p{M}\p{N}]+[")
        ),
        normalizer=normalizers.NFC(),
    ),
    "default": sentencepiece,
    "gemma": gemma,
}
PIECES = [
    *(
        "a",
        "The",
        "é",
        "ñ",
        "ſ",
        "İ",
        "两",
        "日本",
        "😀",
        "👩‍👩‍👧",
        "\u200d",
        "_",
        "-",
        "…",
        "!",
        "'",
    ),
    *("'s", "'LL", "they'll", "1", "12", "3456", "١", "½", "Ⅷ", "𝟘", "<", "|", "</s>", "<s>"),
    *(" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2028", "\u0085", "\x1c"),
]


@pytest.fixture(scope="module", params=BACKENDS)
def speaking(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=BACKENDS[request.param](),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=tiny_tokenizer().chat_template,
    )
    path = export(write_model(tmp_path_factory.mktemp("m"), "llama", tokenizer))
    name = {"gemma": "default"}.get(request.param, request.param)
    assert gguf.GGUFReader(path).fields["tokenizer.ggml.pre"].contents() == name
    with llama_cpp(path) as server:
        yield tokenizer, server, open_base(path).tokenizer()


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=12).map("".join))
def test_it_cuts_text_into_the_same_tokens(speaking: Any, text: str) -> None:
    """As the tokenizer that was exported, and as the one that we read from the file."""
    tokenizer, server, read = speaking
    assert server.tokens(text) == tokenizer(text)["input_ids"] == read(text)["input_ids"]


def test_it_renders_the_same_template(speaking: Any) -> None:
    tokenizer, server, _ = speaking
    talk = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "two\n\nlines"},
        {"role": "assistant", "content": "'quoted' </s>"},
        {"role": "user", "content": "naïve?"},
    ]
    wanted = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert server.render(talk) == wanted
