"""A layer by tiles of the sequence is the layer: losses, gradients, masks of dropout."""

import pytest
import torch

from halfbyte.engine.layerwise import LayerEngine
from halfbyte.layers import tiled_layer
from halfbyte.layers.decoder_layer import AttentionCheckpoint, FusedLayer
from halfbyte.linear import sequence_tiles
from halfbyte.linear.fp8_choice import use_fp8
from halfbyte.linear.lora import DropoutClock, adapter_parameters, adapters, frozen_linears
from halfbyte.linear.sequence_tiles import Tile, tiles_of
from halfbyte.plan.policy import ActivationPolicy
from tests.engine.test_layerwise import FAMILIES, batches_of, gradients, model_of

KNOWN = ("llama", "qwen2", "qwen3")


@pytest.fixture
def tiles(monkeypatch):
    """Parts of 12 tokens or more are long, and tiles have at most 5."""
    monkeypatch.setattr(sequence_tiles, "TILE_TOKENS", 5)
    monkeypatch.setattr(sequence_tiles, "LONG_TOKENS", 12)


def stepped(model, shapes, policy=None, *, fuse=True, step=0):
    engine = LayerEngine(model, fuse=fuse)
    if engine.clock is not None:
        engine.clock.running, engine.clock.step = True, step
    loss = engine.step(batches_of(shapes), 20.0, policy or ActivationPolicy(0))
    return float(loss), gradients(model)


# Of gradients in float32. Those of keys lose the most digits: what softmax sends back sums to zero.
# 5.7e-6 has been seen with MKL's code for AVX2, at rank 1.
ROUNDING = 1e-5


def assert_equal(found, wanted, rtol=2e-6):
    assert found[0] == pytest.approx(wanted[0], rel=2e-6)
    for name, gradient in found[1].items():
        scale = wanted[1][name].norm()
        assert scale > 0, name
        assert (gradient - wanted[1][name]).norm() <= rtol * scale, name


@pytest.mark.parametrize(("rows", "tokens"), [(1, 12), (1, 13), (1, 4096), (3, 7)])
def test_tiles_cover_each_token_once_in_order(rows, tokens, tiles):
    found = tiles_of(rows, tokens)
    covered = [(t.row, i) for t in found for i in range(t.start, t.stop)]
    assert covered == [(row, i) for row in range(rows) for i in range(tokens)]
    assert all(0 < t.stop - t.start <= 5 for t in found)


def test_tiles_of_a_long_sequence_are_whole_waves_of_a_product():
    assert tiles_of(1, 65536) == [Tile(0, i, i + 8192) for i in range(0, 65536, 8192)]
    assert {t.start % 128 for t in tiles_of(1, 20_001)} == {0}


@pytest.mark.parametrize("family", KNOWN)
@pytest.mark.parametrize("shapes", [[(1, 23)], [(2, 17), (1, 9)]])
def test_losses_and_gradients_are_those_of_the_untiled_layer(family, shapes, monkeypatch):
    wanted = stepped(model_of(FAMILIES[family]), shapes)
    monkeypatch.setattr(sequence_tiles, "TILE_TOKENS", 5)
    monkeypatch.setattr(sequence_tiles, "LONG_TOKENS", 12)
    found = stepped(model_of(FAMILIES[family]), shapes)
    assert_equal(found, wanted, ROUNDING)


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"r": 1}, {"quant": "none"}, {"r": 9, "use_rslora": True}]
)
def test_so_are_those_of_other_adapters(options, monkeypatch):
    wanted = stepped(model_of(FAMILIES["qwen2"], **options), [(1, 23)])
    monkeypatch.setattr(sequence_tiles, "TILE_TOKENS", 5)
    monkeypatch.setattr(sequence_tiles, "LONG_TOKENS", 12)
    assert_equal(stepped(model_of(FAMILIES["qwen2"], **options), [(1, 23)]), wanted, ROUNDING)


@pytest.mark.parametrize("saved", [1, 3])
def test_dropout_has_the_masks_of_the_untiled_layer(saved, tiles):
    """Layers that keep their activations are not tiled: the same masks, drawn by tiles."""
    wanted = stepped(model_of(FAMILIES["llama"], dropout=0.5), [(2, 17)], ActivationPolicy(3))
    found = stepped(
        model_of(FAMILIES["llama"], dropout=0.5), [(2, 17)], ActivationPolicy(3 - saved)
    )
    assert_equal(found, wanted)
    other = stepped(model_of(FAMILIES["llama"], dropout=0.5), [(2, 17)], step=1)
    assert abs(other[0] - wanted[0]) > 1e-4


def test_the_mask_of_a_tile_is_that_part_of_the_whole_mask(tiles):
    clock, long = DropoutClock(7), torch.zeros(2, 12, 4)
    whole = clock.mask(long, 0.5, 3)
    for tile in tiles_of(2, 12):
        clock.tile = tile
        part = slice(tile.row, tile.row + 1), slice(tile.start, tile.stop)
        assert torch.equal(clock.mask(long[part], 0.5, 3), whole[part])
    assert not torch.equal(whole[:, :5], whole[:, 5:10])


@pytest.mark.parametrize("policy", [ActivationPolicy(0), ActivationPolicy(2), ActivationPolicy(3)])
def test_every_policy_gives_the_same(policy, tiles):
    wanted = stepped(model_of(FAMILIES["llama"]), [(1, 23)], fuse=False)
    assert_equal(stepped(model_of(FAMILIES["llama"]), [(1, 23)], policy), wanted, 1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_with_an_attention_checkpoint_attention_is_not_computed_again(family, tiles, monkeypatch):
    wanted = layer_gradients(family, checkpoint=None)
    calls = []
    attend_long = tiled_attention(monkeypatch, calls)
    assert attend_long is not None
    found = layer_gradients(family, checkpoint=AttentionCheckpoint())
    assert len(calls) == 1
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).norm() <= 2e-6 * b.norm()


def tiled_attention(monkeypatch, calls):
    from halfbyte.layers import decoder_layer

    original = decoder_layer.attend_long

    def counted(*args):
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(decoder_layer, "attend_long", counted)
    return original


def layer_gradients(family, checkpoint):
    model = model_of(FAMILIES[family])
    engine = LayerEngine(model, fuse=True)
    layer: FusedLayer = engine._fused[1]
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(1, 23, 32, generator=generator)
    dy = torch.randn(1, 23, 32, generator=generator)
    cos, sin = engine.decoder.rotary_emb(x, torch.arange(23)[None])
    if checkpoint is not None:
        with torch.no_grad():
            layer(x, cos, sin, checkpoint=checkpoint)
        checkpoint.tensors = [tensor.clone() for tensor in checkpoint.tensors]
    x.requires_grad_()
    y = layer(x, cos, sin, read=False, checkpoint=checkpoint)
    own = list(engine.trained[1])
    return torch.autograd.grad(y, [x, *own], dy)


def test_what_backward_keeps_is_the_input_attention_and_the_stream(tiles, monkeypatch):
    """Nothing as wide as the MLP is kept for a tiled layer, nor are the norms."""
    model = model_of(FAMILIES["llama"])
    engine = LayerEngine(model, fuse=True)
    layer, x = engine._fused[1], torch.randn(1, 40, 32, requires_grad=True)
    cos, sin = engine.decoder.rotary_emb(x, torch.arange(40)[None])
    kept = {}

    def count(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        y = layer(x, cos, sin, read=False)
    rotary = cos.untyped_storage().nbytes() + sin.untyped_storage().nbytes()
    assert y.shape == x.shape
    assert sum(kept.values()) <= 4 * 40 * (32 + 64 + 2 * 64 + 32) + rotary + 40 * 4 * 4 * 8


def test_the_parameters_of_a_tile_are_summed_in_their_own_precision(tiles):
    sums = tiled_layer._Sums([torch.nn.Parameter(torch.zeros(1))])
    (parameter,) = sums.parameters
    for i in range(300):
        with torch.enable_grad():
            x = torch.ones(1, requires_grad=True)
            y = parameter * (1.0 if i else 1e4) * x
        sums.gradients([y], x, [torch.ones(1)])
    assert float(sums.total()[0]) == 1e4 + 299


def test_adapters_are_found_by_the_layer(tiles):
    model = model_of(FAMILIES["llama"])
    assert len(adapters(model)) * 2 == len(adapter_parameters(model))


def test_products_in_fp8_are_those_of_all_rows_at_once(monkeypatch):
    """Each row of x and dy is rounded by a scale of its own, in a tile or not."""

    def model():
        made = model_of(FAMILIES["llama"])
        assert use_fp8(frozen_linears(made).values()).startswith("products of 21 linears")
        return made

    plain = stepped(model_of(FAMILIES["llama"]), [(1, 23)])
    wanted = stepped(model(), [(1, 23)])
    assert wanted[0] != plain[0]
    monkeypatch.setattr(sequence_tiles, "TILE_TOKENS", 5)
    monkeypatch.setattr(sequence_tiles, "LONG_TOKENS", 12)
    assert_equal(stepped(model(), [(1, 23)]), wanted)
