"""The ledger against a GPU's allocator."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from halfbyte.engine.buckets import Buckets
from halfbyte.engine.layerwise import LayerEngine
from halfbyte.engine.packing import Batch
from halfbyte.linear.lora import LoRAConfig, adapter_parameters, attach, frozen_linears
from halfbyte.models.build import BaseRecipe, build, finalize, load_tensor
from halfbyte.optim import AdamW
from halfbyte.plan.holding import Holding
from halfbyte.plan.ledger import Run, ledger
from halfbyte.plan.model_shape import shape_of_config
from halfbyte.plan.policy import ActivationPolicy
from halfbyte.plan.roofline import measure_machine
from halfbyte.tools.self_test import checks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LAYERS, BATCH, LENGTH, MICRO = 6, 4, 1024, 4
CONFIG = LlamaConfig(
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=LAYERS,
    num_attention_heads=16,
    num_key_value_heads=4,
    tie_word_embeddings=False,
)


def swept() -> int:
    """Return the bytes in use once what earlier tests left lying about is gone.

    That are engines in cycles, and the workspaces of cuBLAS, 32 MiB a thread and stream: capturing
    clears them, so what began with them there would seem to take less.
    """
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    return int(torch.cuda.memory_allocated())


class Trained:
    """A random model on the card with adapters and an optimizer, and what was there before it."""

    def __init__(self, quant: Any) -> None:
        self.before = swept()
        self.recipe = BaseRecipe(quant, compute_dtype=torch.bfloat16, device="cuda")
        model = build(CONFIG, self.recipe)
        with torch.device("meta"):
            names = AutoModelForCausalLM.from_config(CONFIG).state_dict()
        for name, tensor in names.items():
            shape = tuple(tensor.shape)
            value = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, device="cuda")
            load_tensor(model, name, value.cuda().mul_(0.02))
            del value
        finalize(model)
        self.base = swept() - self.before
        attach(model, LoRAConfig(r=16, alpha=16), seed=0)
        self.model = model
        self.parameters = list(adapter_parameters(model).values())
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer = AdamW(self.parameters, lr=1e-4)

    def peak(self, policy: ActivationPolicy) -> int:
        engine = LayerEngine(self.model, fuse=True, graphs=True)
        engine.keep_decoded(policy.decoded)
        engine.buckets = Buckets.of([[LENGTH] * BATCH * MICRO], CONFIG.hidden_size)
        swept()
        torch.cuda.reset_peak_memory_stats()
        engine.capture(policy)
        for seed in range(4):
            generator = torch.Generator().manual_seed(seed)
            ids = torch.randint(3, 32000, (MICRO, BATCH, LENGTH), generator=generator)
            batches = [Batch(one, one) for one in ids]
            engine.step(batches, float(ids.numel()), policy)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=False)
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated()) - self.before


@pytest.fixture(scope="module", params=["nf4", "none"])
def trained(request: pytest.FixtureRequest) -> Iterator[Trained]:
    made = Trained(request.param)
    yield made
    del made
    torch.cuda.empty_cache()


def run_of(trained: Trained, policy: ActivationPolicy) -> Run:
    return Run(
        Holding.of(trained.recipe), batch=BATCH, length=LENGTH, micro_batches=MICRO, policy=policy
    )


def test_the_base_takes_what_the_ledger_says(trained: Trained) -> None:
    shape = shape_of_config(CONFIG, "test")
    said = ledger(shape, run_of(trained, ActivationPolicy())).base
    # The allocator hands out multiples of 512 bytes, and there are buffers beside the weights.
    assert said <= trained.base < said + 8e6


def test_packed_weights_lie_in_one_tensor(trained: Trained) -> None:
    held = [m.quantized for m in frozen_linears(trained.model).values()]
    tensors = [t for q in held if q is not None for t in q.tensors().values()]
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == min(1, len(tensors))


@pytest.mark.parametrize(
    "policy",
    [
        ActivationPolicy(),
        ActivationPolicy(0, LAYERS - 1),
        ActivationPolicy(0, LAYERS - 1, LAYERS - 1),
        ActivationPolicy(0, LAYERS - 1, LAYERS - 2),
        ActivationPolicy(3),
        ActivationPolicy(LAYERS),
        ActivationPolicy(LAYERS, decoded=2),
        ActivationPolicy(LAYERS, decoded=LAYERS),
    ],
    ids=str,
)
def test_the_peak_is_within_5_percent_of_the_ledger(
    trained: Trained, policy: ActivationPolicy
) -> None:
    entries = ledger(shape_of_config(CONFIG, "test"), run_of(trained, policy))
    obtained = trained.peak(policy)
    off = (
        f"{policy} {obtained} obtained, {entries.peak} expected: {obtained / entries.peak - 1:+.2%}"
    )
    reserved = f"{torch.cuda.max_memory_reserved()} reserved, {entries.needed} needed"
    print(trained.recipe.quant, off, reserved)
    assert obtained == pytest.approx(entries.peak, rel=0.05), entries.all_lines()


def test_every_part_of_a_run_computes_rightly_here() -> None:
    wrong = [check for check in checks("cuda", torch.bfloat16) if not check.passed]
    assert not wrong, wrong


def test_a_gpu_is_measured_within_reason() -> None:
    card = measure_machine()
    assert card.device == "cuda"
    assert 1e12 < card.flops < 1e16
    assert 1e10 < card.bandwidth < 1e14
    assert 1e8 < card.link < card.bandwidth
