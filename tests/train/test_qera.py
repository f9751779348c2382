"""Adapters that begin with what packing lost."""

import json

import pytest
import torch

from halfbyte.checkpoint.base_model import load_base, open_base
from halfbyte.checkpoint.bitsandbytes import write_quantized
from halfbyte.config.schema import TrainConfig
from halfbyte.errors import ConfigError
from halfbyte.linear.lora import LoRAConfig, adapters, attach, frozen_linears
from halfbyte.models.build import BaseRecipe
from halfbyte.models.calibration import input_moments
from halfbyte.train.qera import begin_with_error, leading, require_plain
from tests.checkpoint.families import tiny_model
from tests.tiny import tiny_tokenizer, write_tiny_model
from tests.train.test_run import config, data, model, run  # noqa: F401  # fixtures


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (5, 90), (24, 24)])
def test_the_leading_triples_are_those_of_the_exact_decomposition(shape):
    generator = torch.Generator().manual_seed(3)
    # Singular values that fall as those of an error do: slowly.
    matrix = torch.randn(*shape, generator=generator) * torch.rand(shape[1], generator=generator)
    u, s, v = leading(matrix, 6)
    k = min(6, *shape)
    assert (u.shape, s.shape, v.shape) == ((shape[0], k), (k,), (shape[1], k))
    exact = torch.linalg.svdvals(matrix.double())
    assert s.double().square().sum() >= 0.97 * exact[:k].square().sum()
    assert s.double().square().sum() <= 1.0001 * exact[:k].square().sum()
    for columns in (u, v):
        torch.testing.assert_close(columns.t() @ columns, torch.eye(k), rtol=0, atol=1e-4)
    left = (matrix - (u * s) @ v.t()).double().square().sum()
    whole = matrix.double().square().sum()
    assert abs(left - (whole - s.double().square().sum())) <= 1e-5 * whole
    assert torch.equal(leading(matrix, 6)[0], u)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("plain"), hidden=64)


def begun(directory, **lora):
    source = open_base(directory)
    base = load_base(source, BaseRecipe(quant="nf4"))
    attach(base.model, LoRAConfig(**{"r": 8, "alpha": 8} | lora), seed=0)
    seen = []
    share = begin_with_error(base, source, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == source.total_bytes
    return base, share


def logits(network, ids):
    with torch.no_grad():
        return network(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize(
    "lora", [{}, {"alpha": 32}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 3}}], ids=str
)
def test_the_model_begins_nearer_to_what_it_was(plain, lora):
    whole = load_base(plain, BaseRecipe(quant="none"))
    packed = load_base(plain, BaseRecipe(quant="nf4"))
    base, share = begun(plain, **lora)
    assert 0.2 < share < 1
    ids = torch.randint(3, 390, (4, 30), generator=torch.Generator().manual_seed(1))
    true = logits(whole.model, ids)
    without, within = (logits(m.model, ids) - true for m in (packed, base))
    assert within.norm() < 0.9 * without.norm()
    # Packed bytes are what they were.
    for path, linear in frozen_linears(base.model).items():
        assert torch.equal(
            linear.quantized.codes, frozen_linears(packed.model)[path].quantized.codes
        )


def test_each_update_is_the_best_of_its_rank_for_its_inputs(plain):
    whole = frozen_linears(load_base(plain, BaseRecipe(quant="none")).model)
    packed = load_base(plain, BaseRecipe(quant="nf4"))
    moments = input_moments(packed.model, packed.tokenizer)
    base, share = begun(plain, alpha=16)
    lost = back = 0.0
    for path, adapter in adapters(base.model).items():
        error = whole[path].decode(torch.float64) - frozen_linears(base.model)[path].decode(
            torch.float64
        )
        weight = moments[f"{path}.weight"].double()
        weight = (weight / weight.mean()).clamp(min=1e-4).sqrt()
        a, b, scaling = adapter.factors
        update = scaling * b.detach().double() @ a.detach().double()
        left = float(((error - update) * weight).square().sum())
        values = torch.linalg.svdvals(error * weight).square()
        assert left <= 1.02 * float(values[8:].sum()), path
        lost, back = lost + float(values.sum()), back + float(values.sum()) - left
        # As large as a fresh A is.
        size = a.detach().square().mean().sqrt() * (3 * error.shape[1]) ** 0.5
        assert float(size) == pytest.approx(1, rel=1e-4)
    assert share == pytest.approx(back / lost, rel=1e-3)


def test_a_run_begins_so_and_says_it(model, data, tmp_path):  # noqa: F811
    firsts = []
    for name, options in (("usual", {}), ("begun", {"init_lora_weights": "qera"})):
        run(config(model, data, tmp_path / name, max_steps=1, **options))
        lines = (tmp_path / name / "journal.jsonl").read_text().splitlines()
        events = [json.loads(line) for line in lines]
        notes = [event["text"] for event in events if event["event"] == "note"]
        assert any("% of the quantisation error" in note for note in notes) == bool(options)
        firsts += [event["loss"] for event in events if event["event"] == "step"]
        card = json.loads((tmp_path / name / "halfbyte.json").read_text())
        assert card["recipe"]["init_lora_weights"] == ("qera" if options else "kaiming")
    assert firsts[0] != firsts[1]


def test_what_cannot_be_is_refused(plain, tmp_path):
    packed = write_quantized(plain, tmp_path / "packed", BaseRecipe())
    with pytest.raises(ConfigError, match="is already in 4 bits"):
        require_plain(open_base(packed))
    for other, said in (
        ({"quant": "none"}, "no error to approximate"),
        ({"use_dora": True}, "use_dora"),
    ):
        settings = {"model": "m", "data": "d", "output": "o", "init_lora_weights": "qera"}
        with pytest.raises(ValueError, match=said):
            TrainConfig.model_validate(settings | other)


def test_experts_of_a_mixture_are_passed_over(tmp_path):
    tiny_model("mixtral", num_local_experts=3).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    base, share = begun(tmp_path, target_modules=("q_proj",))  # checks the progress
    assert 0 < share < 1
    assert len(adapters(base.model)) == 2
