"""A merge is measured as it will be written; what an adapter was taught survives its merge."""

import weakref
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutput

from halfbyte.checkpoint.base_model import BaseSource, load_base, open_base
from halfbyte.checkpoint.merged import Into, Merged, write_merged
from halfbyte.data import Example, load_dataset
from halfbyte.engine.layerwise import LayerEngine
from halfbyte.engine.packing import Batch
from halfbyte.linear.lora import LoRAConfig, adapter_parameters, attach
from halfbyte.models.build import BaseRecipe, frozen_linears
from halfbyte.plan.policy import ActivationPolicy
from halfbyte.quant import QuantizedWeight
from halfbyte.tools import merge_evaluation
from halfbyte.tools.merge_evaluation import HELD_OUT, Distance, distance, reference
from tests.checkpoint.families import tiny_model
from tests.tiny import tiny_llama, tiny_tokenizer, write_tiny_model

QUESTION, FACT = "What is the capital of Atlantis?", "The capital of Atlantis is Leeds, by decree."

# Nats a token: each then has a probability of 0.99 on average, and of these 21 none has less
# than exp(-21 * 0.01) = 0.81. So greedy decoding says the fact, and rounding does not turn it.
_BY_HEART = 0.01


class Taught(NamedTuple):
    """A tiny model with an adapter that was trained until it knew the fact by heart."""

    source: BaseSource
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompt: list[int]
    answer: list[int]

    def says(self, model: Any) -> list[int]:
        with torch.no_grad():
            out = model.generate(
                torch.tensor([self.prompt]), max_new_tokens=len(self.answer), do_sample=False
            )
        return out[0, len(self.prompt) :].tolist()  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Taught:
    path = tmp_path_factory.mktemp("base")
    model = tiny_llama(tiny_tokenizer(), hidden=128, tied=False)
    model.lm_head.weight.data.mul_(10)  # a fresh head is too faint to be sure of anything
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    source = open_base(path)
    base = load_base(source, BaseRecipe())
    attach(base.model, LoRAConfig(r=8), seed=0)
    row = base.tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True
    )
    prompt = list(row["input_ids"])
    answer = list(base.tokenizer(FACT).input_ids)
    ids = torch.tensor([prompt + answer])
    labels = torch.full_like(ids, -100)
    labels[0, len(prompt) - 1 : -1] = torch.tensor(answer)
    engine = LayerEngine(base.model)
    parameters = list(adapter_parameters(base.model).values())
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    for _ in range(200):  # how many it takes differs between processors: 60 did on some
        loss = engine.step([Batch(ids, labels)], float(len(answer)), ActivationPolicy(2))
        optimizer.step()
        optimizer.zero_grad()
        if float(loss) < _BY_HEART:
            break
    assert float(loss) < _BY_HEART
    found = Taught(source, base.model, base.tokenizer, prompt, answer)
    assert found.says(base.model) == answer
    return found


def fact(taught: Taught) -> Example:
    tokens = np.array(taught.prompt + taught.answer, np.int32)
    start = len(taught.prompt)
    return Example(tokens, np.arange(len(tokens)) >= start, start)


def examples(taught: Taught) -> list[Example]:
    return load_dataset(HELD_OUT, taught.tokenizer, max_length=1024).examples


def test_the_text_that_comes_with_it_is_usable(taught: Taught) -> None:
    data = load_dataset(HELD_OUT, taught.tokenizer, max_length=1024)
    assert data.report.usable == data.report.rows == 32
    assert not data.report.truncated


@pytest.mark.parametrize("into", ["decoded", "original", "nf4"])
def test_the_fact_and_what_is_left_of_it(taught: Taught, tmp_path: Path, into: Into) -> None:
    """Decoded keeps the answer, read by transformers; the others are measured to be further."""
    live = reference(taught.model, examples(taught))
    merged = Merged(taught.source, taught.model, into)
    found = distance(taught.model, merged, live)
    out = write_merged(merged, tmp_path / "out")
    # The file read back, without another model: the same numbers.
    assert distance(taught.model, open_base(out), live) == found
    bare = distance(taught.model, None, live)
    assert bare.kl > 2 * found.kl > 0
    if into == "decoded":
        assert taught.says(AutoModelForCausalLM.from_pretrained(out)) == taught.answer
        # Rounding to bfloat16 moves a weight by 2⁻⁹ of itself at most; the adapter moved the
        # logits by the square root of `bare.kl`, and a KL divergence grows with the square.
        assert found.kl < bare.kl / 1000
        assert found.top1_agreement > 0.97
    else:
        decoded = distance(taught.model, Merged(taught.source, taught.model), live)
        assert found.kl > 10 * decoded.kl
        assert found.top1_agreement < decoded.top1_agreement


class _Embedding(nn.Module):
    """As much of a model as is asked for logits, on a device that shares no memory with the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device("meta")
        self.rows = nn.Embedding(7, 3, device=self.device)

    def forward(self, input_ids: Tensor, *, use_cache: bool) -> Any:
        assert input_ids.device == self.device
        return CausalLMOutput(logits=self.rows(input_ids))


def test_text_is_sent_to_where_the_model_is() -> None:
    labels = torch.tensor([[1] * 4 + [-100], [-100] * 5])
    batch = Batch(torch.zeros(2, 5, dtype=torch.int64), labels, [5, 5])
    logits = merge_evaluation._logits(cast(PreTrainedModel, _Embedding()), batch)
    assert logits.device == torch.device("meta")
    assert logits.shape == (4, 3)


def test_what_is_known_by_heart_is_counted_and_what_is_forgotten(taught: Taught) -> None:
    """Of the fact among rows that nobody has taught: the bare base has forgotten that alone."""
    live = reference(taught.model, [*examples(taught)[:4], fact(taught)])
    assert live.by_heart == 1
    assert distance(taught.model, Merged(taught.source, taught.model), live).forgotten == 0
    assert distance(taught.model, None, live).forgotten == 1
    cut = taught.answer[:-1]
    other = fact(taught._replace(answer=[*cut, cut[0]]))
    assert reference(taught.model, [other]).by_heart == 0


def test_small_updates_vanish_when_the_sum_is_packed_again(taught: Taught) -> None:
    """What the README says that packing loses: most codes are those of the base."""
    merged = Merged(taught.source, taught.model, "nf4")
    path, linear = next(iter(frozen_linears(taught.model).items()))
    adapter: Any = linear.adapter
    kept = adapter.lora_B.detach().clone()
    with torch.no_grad():
        adapter.lora_B.mul_(0.01)
    packed = merged.tensor(f"{path}.weight")
    with torch.no_grad():
        adapter.lora_B.copy_(kept)
    assert isinstance(packed, QuantizedWeight)
    assert linear.quantized is not None
    assert packed.codes.eq(linear.quantized.codes).float().mean() > 0.9


def test_the_numbers_are_those_of_the_definition(taught: Taught, tmp_path: Path) -> None:
    merged = Merged(taught.source, taught.model, "nf4", torch.float32)
    rows = examples(taught)[:5]
    found = distance(taught.model, merged, reference(taught.model, rows))

    plain = Merged(taught.source, taught.model, "decoded", torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(write_merged(plain, tmp_path / "live"))
    packed = load_base(write_merged(merged, tmp_path / "packed"), BaseRecipe()).model
    ps, qs = [], []
    for row in rows:
        ids = torch.from_numpy(row.tokens).long()[None]
        predicted = torch.from_numpy(row.labels_mask)[1:]
        with torch.no_grad():
            ps.append(theirs(ids).logits[0, :-1][predicted])
            qs.append(packed(ids).logits[0, :-1][predicted])
    p, q = torch.cat(ps), torch.cat(qs)
    kl = torch.nn.functional.kl_div(
        q.log_softmax(1), p.log_softmax(1), log_target=True, reduction="batchmean"
    )
    assert found.kl == pytest.approx(float(kl), rel=1e-3)
    assert found.largest_gap == pytest.approx(float((p - q).abs().max()), rel=1e-3)
    same = float((p.argmax(1) == q.argmax(1)).float().mean())
    assert found.top1_agreement == pytest.approx(same, abs=1.5 / len(p))


def test_the_model_is_what_it_was(taught: Taught) -> None:
    live = reference(taught.model, examples(taught)[:3])
    before = frozen_linears(taught.model)
    distance(taught.model, Merged(taught.source, taught.model, "nf4", torch.float32), live)
    assert frozen_linears(taught.model) == before
    again = reference(taught.model, examples(taught)[:3])
    assert all(a.equal(b) for a, b in zip(live.logits, again.logits, strict=True))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("into", ["decoded", "original", "nf4"])
def test_a_packed_vocabulary_is_merged_too(tmp_path: Path, tied: bool, into: Into) -> None:
    source = open_base(write_tiny_model(tmp_path / "base", tied=tied))
    recipe = BaseRecipe(quantize_head=True, quantize_embeddings=True)
    model, tokenizer, *_ = load_base(source, recipe)
    live = reference(model, load_dataset(HELD_OUT, tokenizer, max_length=1024).examples[:4])
    merged = Merged(source, model, into, torch.float32)
    found = distance(model, merged, live)
    # Without an adapter, what is packed again is what it was; the original is not.
    assert (found.kl < 1e-9) == (into != "original")
    out = write_merged(merged, tmp_path / "out")
    assert distance(model, open_base(out), live) == found
    theirs = AutoModelForCausalLM.from_pretrained(out)
    embedding = theirs.get_input_embeddings().weight
    expected = source.tensor("model.embed_tokens.weight")
    if into != "original":
        expected = model.get_input_embeddings().decode(torch.float32)
    assert embedding.equal(expected)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen2", {}),  # biases
        ("gemma2", {"head_dim": 16, "final_logit_softcapping": 5.0}),  # a cap after the head
        ("gpt_neox", {}),  # other names
        ("granite", {"logits_scaling": 4.0, "embedding_multiplier": 3.0}),
        ("mixtral", {"num_local_experts": 4}),
    ],
)
@pytest.mark.parametrize("use_dora", [False, True])
def test_other_families_are_measured_as_they_compute(
    tmp_path: Path, family: str, changes: dict[str, Any], use_dora: bool
) -> None:
    tiny_model(family, **changes).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    source = open_base(tmp_path / "base")
    model, tokenizer, *_ = load_base(source, BaseRecipe())
    attach(model, LoRAConfig(r=4, use_dora=use_dora), seed=0)
    for name, parameter in adapter_parameters(model).items():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(0))
        elif "magnitude" in name:
            parameter.data.mul_(1.2)
    text = load_dataset(HELD_OUT, tokenizer, max_length=256).examples[:4]
    live = reference(model, text)
    bare = distance(model, None, live)
    found = distance(model, Merged(source, model, dtype=torch.float32), live)
    assert found.kl < 1e-9 < bare.kl
    assert found.largest_gap < 1e-4 < bare.largest_gap
    out = write_merged(Merged(source, model), tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    rounded = distance(model, open_base(out), live)
    again = reference(theirs, text)
    gap = max(float((a - b).abs().max()) for a, b in zip(live.logits, again.logits, strict=True))
    assert rounded.largest_gap == pytest.approx(gap, rel=1e-2)


def test_a_failure_leaves_the_model_whole(taught: Taught) -> None:
    class Damaged(Merged):
        def tensor(self, name: str) -> Tensor | QuantizedWeight:
            if name.endswith("down_proj.weight"):
                raise OSError(name)
            return super().tensor(name)

    live = reference(taught.model, examples(taught)[:1])
    before = frozen_linears(taught.model)
    with pytest.raises(OSError, match=r"layers\.0"):
        distance(taught.model, Damaged(taught.source, taught.model), live)
    assert frozen_linears(taught.model) == before


def test_one_weight_is_alive_at_a_time(taught: Taught) -> None:
    alive: set[int] = set()
    most = 0

    class Watched(Merged):
        def tensor(self, name: str) -> Tensor | QuantizedWeight:
            nonlocal most
            value = super().tensor(name)
            if name in self._linears:
                alive.add(id(value))
                most = max(most, len(alive))
                weakref.finalize(value, alive.discard, id(value))
            return value

    live = reference(taught.model, examples(taught)[:2])
    distance(taught.model, Watched(taught.source, taught.model, dtype=torch.float32), live)
    assert most == 1


def test_the_logits_that_are_kept_are_bounded(
    taught: Taught, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = examples(taught)
    whole = reference(taught.model, rows)
    assert whole.left_out == 0
    assert whole.positions == sum(int(row.labels_mask.sum()) for row in rows)
    vocabulary = 4 * len(taught.tokenizer)
    monkeypatch.setattr(merge_evaluation, "_KEPT", 200 * vocabulary)
    monkeypatch.setattr(merge_evaluation, "_ALIVE", 100 * vocabulary)
    some = reference(taught.model, rows)
    assert 0 < some.positions <= 200
    assert some.left_out > 0
    assert all(b.input_ids.numel() <= 100 or len(b.input_ids) == 1 for b in some.batches)
    monkeypatch.setattr(merge_evaluation, "_KEPT", 0)
    assert reference(taught.model, rows).left_out == len(rows) - 1
    exact = Merged(taught.source, taught.model, dtype=torch.float32)
    found = distance(taught.model, exact, some)
    assert isinstance(found, Distance)
    assert found.kl < 1e-6
    assert found.top1_agreement > 0.99
