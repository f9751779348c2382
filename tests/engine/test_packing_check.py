"""Documents that share a row: the steps are those of documents alone, or they do not."""

import pytest
import torch
import torch.nn.functional as F
from benchmarks.family_configs import tiny_config
from transformers import (
    AutoModelForCausalLM,
    GPTBigCodeConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MiniMaxConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
)
from transformers.models.llama import modeling_llama

from halfbyte.data import Example, collate
from halfbyte.engine.autograd import AutogradEngine
from halfbyte.engine.buckets import Buckets, UnpaddedParts
from halfbyte.engine.choose import choose_engine
from halfbyte.engine.layerwise import LayerEngine
from halfbyte.engine.objective import Objective
from halfbyte.engine.packing import Batch, parts_of
from halfbyte.linear.lora import delta, dropout_clock
from halfbyte.plan.ledger import CPU_PART_TOKENS
from halfbyte.plan.policy import ActivationPolicy
from halfbyte.train.evaluate import as_batch
from tests.engine.test_layerwise import FAMILIES, SIZES, gradients, model_of

# transformers 5.17 has scripted functions in GPT-BigCode.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

LENGTHS = [[70, 3, 1], [41, 17], [96], [2, 64, 5]]
SMALL = {key: SIZES[key] for key in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
PACKING = FAMILIES | {
    "gpt_neox": GPTNeoXConfig(**SIZES, attn_implementation="sdpa"),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, sliding_window=None),
}
BY_AUTOGRAD = GPTBigCodeConfig(**SMALL, n_embd=32, n_layer=2, n_head=4, n_positions=128)


def batches_of(lengths=LENGTHS, *, vocabulary=120):
    """Micro-batches, padded, with labels as if every position were supervised."""
    generator, made = torch.Generator().manual_seed(3), []
    for rows in lengths:
        shape = (len(rows), max(rows))
        ids = torch.randint(3, vocabulary, shape, generator=generator)
        labels = torch.randint(3, vocabulary, shape, generator=generator)
        for row, length in enumerate(rows):
            ids[row, length:], labels[row, length:] = 0, -100
        made.append(Batch(ids, labels, rows))
    return made


def alone(batches):
    """The documents of a step, each in a micro-batch of its own."""
    return [
        Batch(ids[None, :n], labels[None, :n], [n])
        for batch in batches
        for ids, labels, n in zip(*batch[:3], strict=True)
    ]


def step(engine, batches, *, packed, saved=1):
    known, engine.unpadded = engine.unpadded, engine.unpadded if packed else None
    loss = engine.step(batches, 50.0, ActivationPolicy(saved))
    engine.unpadded = known
    return loss, gradients(engine.model)


def difference(found, wanted):
    """The norm of the difference of all gradients, relative to theirs."""
    one, other = (torch.cat([g.double().flatten() for g in of.values()]) for of in (found, wanted))
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("family", PACKING)
def test_a_packed_step_is_that_of_documents_alone(family):
    engine, message = choose_engine(model_of(PACKING[family]), "cpu")
    assert isinstance(engine, LayerEngine)
    assert message.endswith(", documents packed"), message
    batches = batches_of()
    assert any(part.documents is not None for part in engine.make_parts(batches))
    loss, found = step(engine, batches, packed=True)
    wanted, true = step(engine, alone(batches), packed=False)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-6)
    assert difference(found, true) < 1e-6


def test_gradients_are_those_of_transformers_in_float64():
    """Document by document, over transformers' own model with the adapters in its weights."""
    config = FAMILIES["llama"]
    model = model_of(config)
    engine, _ = choose_engine(model, "cpu")
    batches = batches_of()
    loss, found = step(engine, batches, packed=True)
    reference = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            held = getattr(module, leaf)
            parameter.copy_(held if held is not None else module.dense(torch.float32).double())
            if getattr(module, "adapter", None) is not None:
                parameter.add_(delta(module).double())
    total = 0.0
    for batch in alone(batches):
        logits = reference(input_ids=batch.input_ids).logits
        one = F.cross_entropy(logits[0], batch.labels[0], reduction="sum") / 50
        one.backward()
        total += float(one.detach())
    assert float(loss) == pytest.approx(total, rel=1e-6)
    weights = {name: parameter.grad for name, parameter in reference.named_parameters()}
    adapters = {n: m.adapter for n, m in model.named_modules() if getattr(m, "adapter", None)}
    wanted = {}
    for name, adapter in adapters.items():
        a, b = adapter.lora_A.detach().double(), adapter.lora_B.detach().double()
        dw = weights[f"{name}.weight"] * adapter.config.scaling
        wanted[f"{name}.lora_A.weight"], wanted[f"{name}.lora_B.weight"] = b.T @ dw, dw @ a.T
    assert wanted.keys() == found.keys()
    assert difference(found, wanted) < 1e-6


def test_in_bfloat16_packing_adds_no_more_than_rounding():
    exact, rounded = (
        choose_engine(model_of(FAMILIES["qwen3"], dtype=dtype, quant="none"), "cpu")[0]
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert rounded.unpadded is not None
    batches = batches_of()
    _, true = step(exact, alone(batches), packed=False)
    _, found = step(rounded, batches, packed=True)
    _, padded = step(rounded, batches, packed=False)
    assert difference(found, true) < 1.2 * difference(padded, true) < 0.1


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_what_is_kept_changes_no_bit(dropout, monkeypatch):
    model = model_of(FAMILIES["llama"], dtype=torch.bfloat16, dropout=dropout)
    engine, _ = choose_engine(model, "cpu")
    engine.unpadded = UnpaddedParts(100)
    dropout_clock(model).running = True
    batches = batches_of()
    assert len(engine.make_parts(batches)) == 3
    results = [step(engine, batches, packed=True, saved=saved) for saved in range(4)]
    for loss, found in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert all(torch.equal(found[name], one) for name, one in results[0][1].items())


def test_no_position_predicts_the_first_token_of_the_next_document():
    tokens, examples = 0, []
    for length in (5, 9, 2, 30):
        ids = torch.arange(tokens, tokens + length).numpy()
        examples.append(Example(ids, ids >= 0, 1))  # all supervised
        tokens += length
    batches = [as_batch(collate(examples[:2])), as_batch(collate(examples[2:]))]
    (part,) = parts_of(batches, "cpu", pack=True, buckets=UnpaddedParts())
    assert part.lengths == [5, 9, 2, 30]
    assert part.ids.tolist() == [list(range(tokens))]
    ends = part.documents.cu_seqlens[1:] - 1
    assert not set(ends.tolist()) & set(part.rows.tolist())
    assert part.targets.tolist() == (part.rows + 1).tolist()
    assert len(part.rows) == tokens - 4


class PerDocument(Objective):
    """A sum over documents of what is not linear in a document's log-probability."""

    def loss(self, logps, segments):
        return sum((logps[segments == one].sum() / 500).exp() for one in set(segments.tolist()))


@pytest.mark.parametrize("config", [FAMILIES["llama"], BY_AUTOGRAD], ids=["layers", "autograd"])
def test_an_objective_sees_the_documents(config):
    engine, _ = choose_engine(model_of(config), "cpu")
    assert engine.unpadded is not None
    batches = batches_of([[70, 3], [41, 17]])
    packed = engine.loss(batches, PerDocument())
    engine.unpadded = None
    assert float(packed) > 1
    assert float(packed) == pytest.approx(
        float(engine.loss(alone(batches), PerDocument())), rel=1e-5
    )


# Those of Granite are called with output_attentions=False, which asks for nothing unusual.
_PACKED = [
    *("qwen3_next", "granitemoehybrid", "nemotron_h", "lfm2_moe"),
    *("granitemoeshared", "granitemoe_swa"),
]


@pytest.mark.parametrize("family", _PACKED)
def test_hybrids_and_mixtures_are_packed(family):
    engine, message = choose_engine(model_of(tiny_config(family)), "cpu")
    assert isinstance(engine, LayerEngine)
    assert message.endswith(", documents packed"), message
    batches = batches_of([[40, 3], [17, 1]], vocabulary=390)
    loss, found = step(engine, batches, packed=True)
    wanted, true = step(engine, alone(batches), packed=False)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-6)
    assert difference(found, true) < 1e-5
    for saved in (0, 4):  # recurrent states recomputed, or not
        again, others = step(engine, batches, packed=True, saved=saved)
        assert torch.equal(again, loss)
        assert all(torch.equal(others[name], one) for name, one in found.items())


def test_on_a_gpu_layers_that_are_not_fused_are_packed_into_buckets():
    engine, _ = choose_engine(model_of(tiny_config("lfm2_moe")), "cpu")
    batches = batches_of(vocabulary=390)
    wanted, true = step(engine, alone(batches), packed=False)
    # As the check leaves an engine there.
    engine.unpadded, engine.packable = None, True
    engine.buckets = Buckets.of([[n for rows in LENGTHS for n in rows]], engine.width, 256)
    parts = engine.make_parts(batches)
    assert len(parts) == 2
    assert all(part.shape in engine.buckets.shapes for part in parts)
    assert all(sum(part.lengths) == part.ids.numel() for part in parts)
    loss, found = engine.step(batches, 50.0, ActivationPolicy(1)), gradients(engine.model)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-6)
    assert difference(found, true) < 1e-5
    engine.window = 80  # shorter than a document
    assert not any(part.lengths for part in engine.make_parts(batches))
    assert engine.messages == ["documents longer than the attention window: not packed"]


def test_under_plain_autograd_the_documents_of_a_micro_batch_share_a_row():
    engine, message = choose_engine(model_of(BY_AUTOGRAD), "cpu")
    assert isinstance(engine, AutogradEngine)
    assert "documents not packed" not in message
    seen, batches = [], batches_of()
    watch = engine.model.register_forward_pre_hook(
        lambda _module, _args, given: seen.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    loss, found = step(engine, batches, packed=True)
    watch.remove()
    assert seen == [(1, sum(rows)) for rows in LENGTHS]
    wanted, true = step(engine, alone(batches), packed=False)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-6)
    assert difference(found, true) < 1e-6


def test_the_decoder_is_found_where_get_decoder_returns_another_module():
    engine, message = choose_engine(model_of(tiny_config("modernbert-decoder")), "cpu")
    assert engine.unpadded is not None, message
    batches = batches_of([[40, 3], [17, 1]], vocabulary=390)
    loss, found = step(engine, batches, packed=True)
    wanted, true = step(engine, alone(batches), packed=False)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-6)
    assert difference(found, true) < 1e-5


def test_documents_longer_than_a_sliding_window_are_packed():
    engine, _ = choose_engine(model_of(FAMILIES["mistral"]), "cpu")  # a window of 8 tokens
    assert engine.unpadded == UnpaddedParts(CPU_PART_TOKENS, None)
    batches = batches_of([[8, 30, 7], [9, 2, 6]])
    assert [list(part.lengths) for part in engine.make_parts(batches)] == [[8, 30, 7, 9, 2, 6]]
    loss, found = step(engine, batches, packed=True)
    wanted, true = step(engine, alone(batches), packed=False)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-6)
    assert difference(found, true) < 1e-6


def test_rotary_tables_of_long_rows_limit_the_documents():
    scaling = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    scaling |= {"rope_theta": 1e4, "original_max_position_embeddings": 32}
    config = Phi3Config(**SIZES, rope_parameters=scaling, original_max_position_embeddings=32)
    engine, _ = choose_engine(model_of(config), "cpu")
    assert engine.unpadded.window == 32
    batches = batches_of([[32, 40, 7], [31, 50]])
    loss, found = step(engine, batches, packed=True)
    wanted, true = step(engine, alone(batches), packed=False)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-6)
    assert difference(found, true) < 1e-6


REFUSED = {
    "other attention": (
        OPTConfig(**SMALL, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
                  word_embed_proj_dim=32, attn_implementation="eager"),
        "its attention is transformers' own",
    ),
    "a recurrent state of its own": (
        MiniMaxConfig(**SIZES, num_local_experts=4, head_dim=8),
        "attention is computed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("config", REFUSED)
def test_what_is_not_exact_is_not_packed(config):
    config, reason = REFUSED[config]
    engine, message = choose_engine(model_of(config), "cpu")
    assert f"documents not packed: {reason}" in message
    assert engine.unpadded is None


def test_a_layer_that_mixes_tokens_is_noticed_in_bfloat16_too(monkeypatch):
    forward = modeling_llama.LlamaMLP.forward

    def shifted(self, x):
        return forward(self, x + 1e-2 * F.pad(x, (0, 0, 1, -1)))  # the token before, a little

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", shifted)
    engine, message = choose_engine(model_of(LlamaConfig(**SIZES), dtype=torch.bfloat16), "cpu")
    assert message.endswith("documents not packed: packed documents depend on each other")
    assert engine.unpadded is None
