"""The first tensor of a step that is not finite is named, in both passes and with both engines."""

import math

import pytest
import torch

from halfbyte.config.schema import TrainConfig
from halfbyte.engine.autograd import AutogradEngine
from halfbyte.engine.layerwise import LayerEngine
from halfbyte.linear.lora import adapter_parameters
from halfbyte.train.diagnosis import find_origin, in_words
from halfbyte.train.schedule import Schedule
from halfbyte.train.trainer import Trainer
from tests.engine.test_layerwise import FAMILIES, batches_of, model_of

ENGINES = [LayerEngine, AutogradEngine]


def failing(model, kind, batches):
    """Make a step that fails; return its origin."""
    made = Trainer(
        kind(model),
        adapter_parameters(model),
        TrainConfig(model="-", data="-", output="-"),
        Schedule(1e-3, "constant", 0, 10),
    )
    found = []
    made.on_nonfinite = lambda failed: found.append(
        (failed, find_origin(made.engine, made.parameters, failed))
    )
    result = made.step(3, batches)
    assert result.skipped
    assert not made._gradients.any()
    [(failed, origin)] = found
    assert failed.step == 3
    return origin


@pytest.mark.parametrize("kind", ENGINES)
def test_the_innermost_module_of_the_forward_pass(kind):
    model = model_of(FAMILIES["llama"])
    down = model.model.layers[1].mlp.down_proj
    down.register_forward_hook(lambda module, args, output: output.index_fill(-1, BAD, math.inf))
    origin = failing(model, kind, batches_of([(2, 13), (1, 9)]))
    assert origin.name == "the output of model.layers.1.mlp.down_proj"
    assert (origin.micro_batch, origin.rows) == (0, (0, 1))
    assert origin.tensors["output"]["infinite"] == 2 * 13
    assert math.isfinite(origin.tensors["input"]["max"])
    assert any(name.endswith("lora_A") for name in origin.tensors)


BAD = torch.tensor([5])


@pytest.mark.parametrize("kind", ENGINES)
def test_the_micro_batch_and_the_row(kind):
    """A token whose embedding overflows is in one row of the second micro-batch."""
    model = model_of(FAMILIES["llama"])
    batches = batches_of([(2, 13), (3, 9)])
    for batch in batches:
        batch.input_ids.clamp_(min=1)
    batches[1].input_ids[2, 4] = 0
    model.model.embed_tokens.weight.data[0] = math.nan
    origin = failing(model, kind, batches)
    assert origin.name == "the output of model.embed_tokens"
    assert (origin.micro_batch, origin.rows) == (1, (2,))


def test_fused_layers_are_looked_into():
    """They do not call their modules, so the diagnosis makes an engine that does."""
    model = model_of(FAMILIES["llama"])
    made = LayerEngine(model, fuse=True)
    assert made.fused
    made.tuple_output = False
    model.model.layers[2].input_layernorm.weight.data.fill_(math.inf)
    origin = failing(model, lambda _: made, batches_of([(2, 13)]))
    assert origin.name == "the output of model.layers.2.input_layernorm"


def test_the_loss_of_finite_states():
    model = model_of(FAMILIES["llama"])
    model.lm_head.weight.data[3] = math.inf
    origin = failing(model, LayerEngine, batches_of([(1, 9)]))
    assert origin.name == "the loss, or the logits it is computed from"


class _Overflows(torch.autograd.Function):
    """The identity, whose gradient overflows."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * math.inf


@pytest.mark.parametrize("kind", ENGINES)
def test_the_first_gradient_of_the_backward_pass(kind):
    model = model_of(FAMILIES["llama"])
    up = model.model.layers[1].mlp.up_proj
    up.register_forward_hook(lambda module, args, output: _Overflows.apply(output))
    origin = failing(model, kind, batches_of([(2, 13)]))
    assert origin.name.startswith("the gradient of model.layers.1.mlp.up_proj.lora_")
    assert origin.micro_batch is None
    assert origin.tensors["gradient"]["nan"] + origin.tensors["gradient"]["infinite"] > 0
    assert origin.tensors["parameter"]["nan"] == 0


def test_a_norm_that_overflows():
    model = model_of(FAMILIES["llama"])
    up = model.model.layers[1].mlp.up_proj

    class Large(_Overflows):
        @staticmethod
        def backward(ctx, grad):
            return grad.sign() * 1e25

    up.register_forward_hook(lambda module, args, output: Large.apply(output))
    origin = failing(model, LayerEngine, batches_of([(2, 13)]))
    assert origin.name == "the norm of all gradients, whose square overflows"


def test_without_a_trace_it_says_so(monkeypatch):
    """As if a kernel had computed another loss than the modules do."""
    step = LayerEngine.step
    monkeypatch.setattr(LayerEngine, "step", lambda self, *args: step(self, *args) * math.nan)
    origin = failing(model_of(FAMILIES["llama"]), LayerEngine, batches_of([(2, 13)]))
    assert origin.name == ""
    assert origin.why == "every output and every gradient is finite when the step is repeated"


def test_memory_that_runs_out_in_it_is_no_error(monkeypatch):
    def fail(self, *args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 TB")

    monkeypatch.setattr(LayerEngine, "loss", fail)
    model = model_of(FAMILIES["llama"])
    model.model.norm.weight.data.fill_(math.nan)
    origin = failing(model, LayerEngine, batches_of([(2, 13)]))
    assert origin.why == "there was not enough memory to look for it"


def test_a_tensor_in_words():
    summary = {"dtype": "bfloat16", "shape": [2, 9], "nan": 3, "infinite": 0}
    words = in_words(summary | {"min": -2.0, "max": 3.5})
    assert words == "bfloat16 [2, 9], 3 NaN, the others from -2 to 3.5"
    assert in_words(summary | {"min": None, "max": None}) == "bfloat16 [2, 9], 3 NaN"
