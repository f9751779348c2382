"""Adapters: where they go, what they start as, and how they go in and out by name."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key
from torch import nn

from halfbyte.errors import CheckpointError, ConfigError
from halfbyte.linear.frozen import FrozenLinear
from halfbyte.linear.lora import (
    LoRAConfig,
    adapter_parameters,
    adapter_state,
    adapters,
    attach,
    delta,
    detach,
    dropout_clock,
    load_adapter_state,
)
from halfbyte.linear.lora_targets import ALL_LINEAR, at_end, exact_targets
from halfbyte.quant import quantize


def compiles(pattern):
    try:
        re.compile(f"({pattern})")
    except re.error:
        return False
    return True


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = linear(8, 8), linear(8, 4)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(2))
        self.proj = linear(8, 8)


def linear(inp, out):
    torch.manual_seed(inp + out)
    packed = quantize(torch.randn(out, inp), block_size=32)
    return FrozenLinear(inp, out, quantized=packed, device="cpu")


ALL = [
    "layers.0.q_proj",
    "layers.0.v_proj",
    "layers.1.q_proj",
    "layers.1.v_proj",
    "proj",
]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", ALL),
        (("q_proj",), ["layers.0.q_proj", "layers.1.q_proj"]),
        (("proj",), ["proj"]),
        (("1.v_proj", "proj"), ["layers.1.v_proj", "proj"]),
        ("q_proj", ["layers.0.q_proj", "layers.1.q_proj"]),
        (r"layers\.0\..*", ["layers.0.q_proj", "layers.0.v_proj"]),
        (r".*\.(q|v)_proj", ALL[:4]),
    ],
)
def test_targets(targets, expected):
    model = Model()
    assert attach(model, LoRAConfig(target_modules=targets), seed=0) == expected
    assert list(adapters(model)) == expected


@pytest.mark.parametrize("targets", [("q_proj", "k_proj"), "k_proj", r"layers\.7\..*", ()])
def test_targets_that_are_not_there(targets):
    with pytest.raises(ConfigError, match=r"proj, q_proj, v_proj"):
        attach(Model(), LoRAConfig(target_modules=targets), seed=0)


def test_a_broken_expression():
    with pytest.raises(ConfigError, match="not a regular expression"):
        attach(Model(), LoRAConfig(target_modules="(q_proj"), seed=0)


@pytest.mark.parametrize("wrong", [{"r": 0}, {"dropout": 1.0}, {"dropout": -0.1}])
def test_wrong_numbers(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        LoRAConfig(**wrong)


def test_scaling():
    assert LoRAConfig(r=16, alpha=32).scaling == 2
    assert LoRAConfig(r=16, alpha=32, use_rslora=True).scaling == 8


@given(
    st.text("ab.(|)*^$", max_size=6).filter(compiles),
    st.lists(st.sampled_from(["a", "b", "ab", "aab"]), min_size=1, max_size=3),
)
def test_patterns_match_as_peft_s_do(pattern, parts):
    path = ".".join(parts)
    theirs = get_pattern_key([pattern], path) == pattern
    # PEFT returns the path itself where nothing matches, so a pattern equal to it says nothing.
    assert at_end(pattern, path) == theirs or pattern == path


def test_patterns_give_layers_their_own_rank_and_scaling():
    config = LoRAConfig(
        r=4,
        alpha=8,
        rank_pattern={"layers.0.q_proj": 2, "q_proj": 3},
        alpha_pattern={r".*v_proj": 2},
    )
    model = Model()
    attach(model, config, seed=0)
    made = {name: (a.lora_A.shape[0], a.config.scaling) for name, a in adapters(model).items()}
    assert made == dict(zip(ALL, [(2, 4), (4, 0.5), (3, 8 / 3), (4, 0.5), (4, 2)], strict=True))


@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_matches_nothing(option):
    with pytest.raises(ConfigError, match=f"{option} 'k_proj' matches no layer.*layers.0.q_proj"):
        attach(Model(), LoRAConfig(**{option: {"k_proj": 2}}), seed=0)
    with pytest.raises(ConfigError, match="no regular expression"):
        LoRAConfig(**{option: {"(q": 2}})
    with pytest.raises(ConfigError, match="must be positive"):
        LoRAConfig(**{option: {"q": -1}})


def test_a_fresh_adapter_changes_nothing_and_is_fixed_by_the_seed():
    one, two, other = Model(), Model(), Model()
    x = torch.randn(3, 8)
    before = one.proj(x)
    for model, seed in ((one, 5), (two, 5), (other, 6)):
        attach(model, LoRAConfig(r=4), seed=seed)
    assert torch.equal(one.proj(x), before)
    states = [adapter_state(model) for model in (one, two, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    a = "proj.lora_A.weight"
    assert not torch.equal(states[0][a], states[2][a])
    assert not torch.equal(states[0][a], states[0]["layers.0.q_proj.lora_A.weight"])
    bound = 1 / math.sqrt(8)  # Kaiming uniform with a = sqrt(5): what PEFT starts from
    assert states[0][a].abs().max() <= bound
    assert states[0][a].std() > 0.4 * bound


def test_names_shapes_and_dtype():
    model = Model()
    attach(model, LoRAConfig(r=4, target_modules=("v_proj",)), seed=0)
    state = adapter_state(model)
    assert {name: tuple(t.shape) for name, t in state.items()} == {
        "layers.0.v_proj.lora_A.weight": (4, 8),
        "layers.0.v_proj.lora_B.weight": (4, 4),
        "layers.1.v_proj.lora_A.weight": (4, 8),
        "layers.1.v_proj.lora_B.weight": (4, 4),
    }
    assert {t.dtype for t in state.values()} == {torch.float32}
    assert [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(adapter_parameters(model)) == 4


class Whole(Model):
    """With an embedding that its head is tied to, and norms."""

    def __init__(self, dtype=torch.bfloat16):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(6, 8, dtype=dtype)
        self.head = nn.Linear(8, 6, bias=False, dtype=dtype)
        self.head.weight = self.embed.weight
        self.norm, self.last_norm = nn.LayerNorm(8, dtype=dtype), nn.LayerNorm(8, dtype=dtype)
        self.requires_grad_(False)


def whole_names(model):
    return [name for name in adapter_parameters(model) if ".lora_" not in name]


def test_modules_to_save_are_those_whose_path_ends_so():
    model = Whole()
    attach(model, LoRAConfig(r=2, modules_to_save=("embed", "norm")), seed=0)
    norms = [f"{name}.{leaf}" for name in ("norm", "last_norm") for leaf in ("weight", "bias")]
    assert whole_names(model) == ["embed.weight", *norms]
    attach(model, LoRAConfig(r=2, modules_to_save=("last_norm",)), seed=0)
    assert whole_names(model) == norms[2:]


def test_a_module_trained_whole_computes_in_its_own_dtype_and_leaves_the_base_alone():
    model, ids = Whole(), torch.arange(6)
    base = model.embed.weight
    before = base.clone()
    attach(model, LoRAConfig(r=2, modules_to_save=("embed",)), seed=0)
    trained = adapter_parameters(model)["embed.weight"]
    assert trained.dtype == torch.float32
    assert trained.requires_grad
    assert model.embed(ids).equal(before)
    state = adapter_state(model)
    load_adapter_state(model, state | {"embed.weight": trained.detach() + 1.0})
    assert model.embed(ids).equal((before.float() + 1.0).bfloat16())
    model.embed(ids).sum().backward()
    assert trained.grad.equal(torch.ones(6, 8))
    # What was tied to it is the base's still.
    assert model.head.weight is base
    assert base.equal(before)
    detach(model)
    assert model.embed.weight is base
    assert type(model.embed) is nn.Embedding
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("embed", "heads"), "does not have: heads; it has: embed, head, last_norm, norm"),
        (("q_proj",), r"layers.0.q_proj cannot be trained in full.*give it an adapter"),
        (("layers.0",), "layers.0 cannot be .* made of other modules"),
    ],
)
def test_what_cannot_be_trained_whole(names, message):
    model = Whole()
    with pytest.raises(ConfigError, match=message):
        attach(model, LoRAConfig(r=2, modules_to_save=names), seed=0)
    assert adapter_parameters(model) == {}


def test_state_round_trip():
    one, other = Model(), Model()
    for model in (one, other):
        attach(model, LoRAConfig(r=4), seed=0)
    with torch.no_grad():
        for parameter in adapter_parameters(one).values():
            parameter.normal_()
    load_adapter_state(other, adapter_state(one))
    x = torch.randn(3, 8)
    assert torch.equal(one.proj(x), other.proj(x))


def test_a_state_that_does_not_fit_is_refused_whole():
    model = Model()
    attach(model, LoRAConfig(r=4), seed=0)
    before = {name: t.clone() for name, t in adapter_state(model).items()}
    state = {name: t + 1 for name, t in before.items()}
    del state["proj.lora_A.weight"]
    state["nowhere.lora_A.weight"] = torch.zeros(4, 8)
    state["layers.0.q_proj.lora_B.weight"] = torch.zeros(8, 5)
    with pytest.raises(CheckpointError) as error:
        load_adapter_state(model, state)
    assert "missing: proj.lora_A.weight" in str(error.value)
    assert "unexpected: nowhere.lora_A.weight" in str(error.value)
    assert "expected shape [8, 4], got [8, 5]" in str(error.value)
    assert all(torch.equal(t, before[name]) for name, t in adapter_state(model).items())


def test_delta_is_what_the_adapter_adds():
    model = Model()
    attach(model, LoRAConfig(r=4, alpha=2, use_rslora=True), seed=0)
    with torch.no_grad():
        model.proj.adapter.lora_B.normal_()
    x = torch.randn(3, 8)
    adapted = model.proj(x)
    added = x @ delta(model.proj).T
    detach(model)
    torch.testing.assert_close(adapted - model.proj(x), added, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="no adapter"):
        delta(model.proj)


def dora_model(bias, quant, dtype=torch.float64):
    torch.manual_seed(0)
    weight = torch.randn(8, 10)
    packed = quantize(weight, block_size=32) if quant else None
    made = FrozenLinear(10, 8, bias=bias, quantized=packed, dtype=dtype, device="cpu")
    if packed is None:
        made.weight.data.copy_(weight)
    if bias:
        made.bias.data.normal_()
    model = nn.ModuleDict({"proj": made})
    attach(model, LoRAConfig(r=3, alpha=5, use_dora=True), seed=0)
    return model.to(dtype), made


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("quant", [True, False])
def test_dora_in_values_and_gradients_is_peft_s_formula(bias, quant):
    _, made = dora_model(bias, quant)
    x = torch.randn(2, 3, 10, dtype=torch.float64, requires_grad=True)
    base = x @ made.dense(x.dtype).T + (made.bias if bias else 0)
    torch.testing.assert_close(made(x), base, rtol=1e-6, atol=1e-6)  # at first it changes nothing
    adapter = made.adapter
    with torch.no_grad():
        adapter.lora_B.normal_()
        adapter.lora_magnitude_vector.mul_(torch.rand(8) + 0.5)
    trained = (x, adapter.lora_A, adapter.lora_B, adapter.lora_magnitude_vector)
    _, a, b, m = trained
    weight = made.dense(x.dtype)
    norm = torch.linalg.norm(weight + 5 / 3 * b @ a, dim=1).detach()
    plain = (m / norm) * (x @ weight.T + 5 / 3 * x @ a.T @ b.T) + (made.bias if bias else 0)
    torch.testing.assert_close(made(x), plain)
    probe = torch.randn(2, 3, 8, dtype=torch.float64)
    for got, wanted in zip(
        torch.autograd.grad((made(x) * probe).sum(), trained),
        torch.autograd.grad((plain * probe).sum(), trained),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted)
    merged = x @ (weight + delta(made)).T + (made.bias if bias else 0)
    torch.testing.assert_close(made(x), merged, rtol=1e-5, atol=1e-5)  # delta is float32

    def by_length(x, m):
        return torch.func.functional_call(made, {"adapter.lora_magnitude_vector": m}, (x,))

    assert torch.autograd.gradcheck(by_length, (x, m))


def test_dora_sees_every_change_of_what_its_norms_depend_on():
    model, made = dora_model(bias=False, quant=True)
    x = torch.randn(4, 10, dtype=torch.float64)

    def check():
        adapter = made.adapter
        weight = made.dense(x.dtype) + 5 / 3 * adapter.lora_B @ adapter.lora_A
        lengths = adapter.lora_magnitude_vector / torch.linalg.norm(weight, dim=1)
        torch.testing.assert_close(made(x), x @ weight.T * lengths)

    check()
    load_adapter_state(model, {k: torch.rand_like(t) for k, t in adapter_state(model).items()})
    check()
    optimizer = torch.optim.AdamW(adapter_parameters(model).values(), lr=0.1)
    made(x).square().sum().backward()
    optimizer.step()
    check()
    made.set_quantized(quantize(torch.randn(8, 10), block_size=32))
    check()


def test_dora_keeps_a_length_that_bfloat16_cannot_tell_from_one():
    _, made = dora_model(bias=False, quant=True, dtype=torch.bfloat16)
    made.adapter.float()
    x = torch.full((1, 10), 1 / 64, dtype=torch.bfloat16)
    before = made(x).float()
    with torch.no_grad():
        made.adapter.lora_magnitude_vector.mul_(1.003)
    grown = (made(x).float() - before).abs() > 0
    assert grown.any()


def test_dora_leaves_a_row_of_zeros_alone():
    made = FrozenLinear(4, 2, device="cpu")
    made.weight.data.copy_(torch.tensor([[0.0, 0, 0, 0], [1, 2, 3, 4]]))
    attach(nn.ModuleDict({"proj": made}), LoRAConfig(r=1, use_dora=True), seed=0)
    assert made(torch.ones(1, 4)).tolist() == [[0, 10]]


def test_dropout_only_in_training_and_fixed_by_its_place():
    model = Model()
    attach(model, LoRAConfig(r=4, dropout=0.25), seed=3)
    clock = dropout_clock(model)
    x = torch.ones(1000, 8)
    adapter = model.proj.adapter
    assert adapter.update(x).keep is None
    clock.running = True
    mask = adapter.update(x).keep
    assert mask.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    # 8000 draws: three standard deviations of their mean are 0.0145.
    assert (mask == 0).float().mean() == pytest.approx(0.25, abs=0.0145)
    assert torch.equal(mask, adapter.update(x).keep)
    masks = [mask, model.layers[0].q_proj.adapter.update(x).keep]
    for place in ("step", "micro_batch"):
        setattr(clock, place, 1)
        masks.append(adapter.update(x).keep)
    assert all(not torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])


def test_a_model_without_linears_is_refused():
    with pytest.raises(ConfigError, match=r"Embedding has no linear layer .* could get an adapter"):
        attach(nn.Embedding(4, 4), LoRAConfig(), seed=0)


def test_targets_are_named_so_that_peft_adapts_no_other_module():
    """A head, or a linear that is not frozen, may end with the name of one that is adapted."""
    model = nn.ModuleDict(
        {"block": nn.ModuleDict({"proj": nn.Linear(2, 2), "out": nn.Linear(2, 2)})}
    )
    assert exact_targets(model, ["block.proj", "block.out"], ALL_LINEAR) == ("out", "proj")
    model["head"] = nn.ModuleDict({"out": nn.Linear(2, 2)})
    paths = ["block.proj", "block.out"]
    assert exact_targets(model, paths, ALL_LINEAR) == ("block.out", "proj")
    assert exact_targets(model, ["block.proj"], ("proj",)) == ("proj",)
    assert exact_targets(model, paths, ("proj", "out")) == tuple(paths)
    assert exact_targets(model, ["block.out"], r".*\.out") == ("block.out",)
    assert exact_targets(model, ["block.out"], r"block\.out") == r"block\.out"
