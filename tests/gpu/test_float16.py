"""Training in float16 on a GPU, and what GPUs that are not here are given, run on the one that is.

An H100 runs whatever a T4, an A100 or an RTX 4090 is given: the dispatch is told of another device
(tests/devices.py), and gradients must be the same but for rounding.
"""

import json
import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, LlamaConfig

from halfbyte.config.schema import TrainConfig
from halfbyte.engine.choose import choose_engine
from halfbyte.engine.layerwise import LayerEngine
from halfbyte.engine.packing import Batch
from halfbyte.layers.attention import attend
from halfbyte.linear.lora import LoRAConfig, adapter_parameters, attach
from halfbyte.models.build import BaseRecipe, build, finalize, load_tensor
from halfbyte.plan.policy import ActivationPolicy
from halfbyte.quant.format import gpu_kernels
from halfbyte.runtime import device as devices
from halfbyte.train.schedule import Schedule
from halfbyte.train.trainer import Trainer
from tests.devices import DEVICES
from tests.gpu.test_loop import data, model, run  # noqa: F401

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# SmolLM2-135M's widths, and layers so wide and steps so long that Hopper's kernels run.
SMOL = LlamaConfig(
    vocab_size=2048,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=6,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)
WIDE = LlamaConfig(
    vocab_size=2048,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=3,
    num_attention_heads=16,
    num_key_value_heads=4,
    tie_word_embeddings=False,
)
# Rows of one length stay rows; others are packed where documents share rows.
EQUAL, MIXED = [512] * 4, [300, 512, 77, 450, 200]


def made(config, dtype, rank=16, seed=0):
    torch.manual_seed(seed)
    source = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    found = build(config, BaseRecipe(compute_dtype=dtype))
    for name, tensor in source.state_dict().items():
        if not (config.tie_word_embeddings and name == "lm_head.weight"):
            # Larger than a fresh model's, so that every path matters to the loss.
            load_tensor(found, name, tensor * 2 if tensor.dim() == 2 else tensor)
    finalize(found)
    attach(found, LoRAConfig(r=rank, alpha=16), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapter_parameters(found).items():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 50)
    return found.to("cuda")


def batches(lengths, seed=0):
    """One micro-batch, right padded."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 2048, (len(lengths), max(lengths)), generator=generator)
    labels = torch.randint(3, 2048, ids.shape, generator=generator)
    for row, length in enumerate(lengths):
        ids[row, length:], labels[row, length:] = 0, -100
    return [Batch(ids, labels, lengths)]


def trainer(config, dtype, lengths, **options):
    found = made(config, dtype)
    engine, reason = choose_engine(found, "cuda")
    assert isinstance(engine, LayerEngine), reason
    asked = TrainConfig(model="-", data="-", output="-", learning_rate=3e-4, **options)
    schedule = Schedule(asked.learning_rate, "constant", 0, 100)
    found = Trainer(engine, adapter_parameters(found), asked, schedule)
    found.fit([[(len(lengths), max(lengths))]], [lengths])
    found.use(ActivationPolicy(1))
    found.capture()
    return found


def losses(trainer, first, last, lengths):
    """Of steps over two step's worth of examples in turn."""
    return [trainer.step(step, batches(lengths, step % 2)).loss for step in range(first, last)]


@pytest.mark.parametrize("lengths", [EQUAL, MIXED], ids=["equal", "mixed"])
@pytest.mark.parametrize("config", [SMOL, WIDE], ids=["smol", "wide"])
def test_losses_are_nearer_to_float32s_than_bfloat16s(config, lengths):
    exact, found, off = losses(trainer(config, torch.float32, lengths), 0, 24, lengths), {}, {}
    for dtype in (torch.bfloat16, torch.float16):
        trained = trainer(config, dtype, lengths)
        found[dtype] = losses(trained, 0, 24, lengths)
        off[dtype] = max(abs(a / b - 1) for a, b in zip(found[dtype], exact, strict=True))
        assert not trained.engine.messages
    assert exact[-1] < 0.97 * exact[0]
    assert trained.loss_scale.state()["skipped"] == 0
    assert off[torch.float16] < off[torch.bfloat16], (exact, found)


@pytest.mark.parametrize("factor", [2.0**-3, 2.0**5, 2.0**9])
@pytest.mark.parametrize("config", [SMOL, WIDE], ids=["smol", "wide"])
def test_gradients_have_float16s_digits_whatever_the_scale(config, factor):
    off = {}
    exact = gradients(config, torch.float32)
    for dtype, scale in ((torch.bfloat16, None), (torch.float16, factor)):
        off[dtype] = error(gradients(config, dtype, scale=scale), exact)
    assert off[torch.float16] < off[torch.bfloat16] / 3, off


def gradients(config, dtype, *, lengths=MIXED, scale=None, graphs=False, fuse=True, rank=16):
    found = made(config, dtype, rank)
    engine = LayerEngine(found, fuse=fuse, graphs=graphs)
    (batch,) = batches(lengths)
    tokens = float((batch.labels != -100).sum())
    engine.step([batch], tokens if scale is None else 1.0 / scale, ActivationPolicy(1))
    factor = 1.0 if scale is None else 1.0 / (scale * tokens)
    return [parameter.grad * factor for parameter in adapter_parameters(found).values()]


def error(got, exact):
    pairs = list(zip(got, exact, strict=True))
    apart = sum(float((a - b).double().square().sum()) for a, b in pairs)
    return math.sqrt(apart / sum(float(b.double().square().sum()) for _, b in pairs))


@pytest.mark.parametrize("lengths", [EQUAL, MIXED], ids=["equal", "mixed"])
def test_overflow_leaves_out_updates_until_gradients_are_held(lengths):
    trained = trainer(WIDE, torch.float16, lengths)
    losses(trained, 0, 4, lengths)
    assert trained.loss_scale.skipped == 0
    before = {name: p.detach().clone() for name, p in trained.parameters.items()}
    state = trained.optimizer_state()
    trained.loss_scale.factor = 2.0**40  # float16 has no such number: the gradient is infinite
    result = trained.step(4, batches(lengths))
    assert result.skipped
    assert math.isfinite(result.loss)
    assert not math.isfinite(result.grad_norm)
    for name, parameter in trained.parameters.items():
        assert torch.equal(parameter, before[name]), name
    for name, value in trained.optimizer_state().items():
        assert torch.equal(value, state[name]), name
    assert trained.loss_scale.factor == 2.0**39
    assert "update is skipped" in trained.engine.messages.pop()
    trained.loss_scale.factor = 2.0**5
    result = trained.step(5, batches(lengths, 1))  # nothing infinite was left
    assert not result.skipped
    assert math.isfinite(result.grad_norm)
    moved = [not torch.equal(p, before[name]) for name, p in trained.parameters.items()]
    assert any(moved)


def test_a_run_from_a_file_learns_in_float16_and_goes_on_byte_for_byte(model, data, tmp_path):  # noqa: F811
    options = {"compute_dtype": "float16", "deterministic": True, "save_steps": 6}
    wanted, events = run(model, data, tmp_path / "whole", **options)
    assert "float16" in [event.get("compute_dtype") for event in events]
    assert wanted[-1] < 0.95 * wanted[0]
    usual, _ = run(model, data, tmp_path / "bfloat16", compute_dtype="bfloat16")
    assert wanted[0] == pytest.approx(usual[0], rel=1e-2)
    assert wanted[-1] == pytest.approx(usual[-1], rel=5e-2)
    whole, part = tmp_path / "whole", tmp_path / "part"
    part.mkdir()
    (whole / "checkpoint-6").rename(part / "checkpoint-6")
    saved = json.loads((part / "checkpoint-6" / "run_state.json").read_text())
    assert saved["progress"]["loss_scale"]["clean"] == 6
    rest, _ = run(model, data, part, resume=True, **options)
    assert rest == wanted[6:]
    name = "adapter_model.safetensors"
    assert (part / name).read_bytes() == (whole / name).read_bytes()


def test_this_gpu_is_what_its_driver_says():
    from triton.runtime import driver

    spec = devices.spec_of(torch.device("cuda"))
    properties = driver.active.utils.get_device_properties(torch.cuda.current_device())
    assert spec.shared_memory == properties["max_shared_mem"]
    assert spec.num_sms == properties["multiprocessor_count"]
    assert spec.capability == torch.cuda.get_device_capability()
    assert spec.memory >= torch.cuda.mem_get_info()[1]


@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize("lengths", [EQUAL, MIXED], ids=["equal", "mixed"])
@pytest.mark.parametrize("name", ["t4", "a100", "4090", "b200"])
def test_what_another_gpu_is_given_has_the_same_gradients(monkeypatch, name, lengths, rank):
    dtype = torch.bfloat16 if DEVICES[name].has_bfloat16 else torch.float16
    exact = gradients(WIDE, torch.float32, lengths=lengths, rank=rank)
    here = error(gradients(WIDE, dtype, lengths=lengths, scale=32.0, rank=rank), exact)
    monkeypatch.setattr(devices, "spec_of", lambda _: DEVICES[name])
    assert LayerEngine(made(SMOL, dtype), fuse=True).packs == (name != "t4")
    there = gradients(WIDE, dtype, lengths=lengths, scale=32.0, rank=rank)
    assert error(there, exact) <= 1.2 * here + 1e-4


@pytest.mark.parametrize("lengths", [EQUAL, MIXED], ids=["equal", "mixed"])
def test_what_a_t4_is_given_learns_and_says_that_there_are_no_graphs(monkeypatch, lengths):
    monkeypatch.setattr(devices, "spec_of", lambda _: DEVICES["t4"])
    trained = trainer(SMOL, torch.float16, lengths)
    assert "no CUDA graphs: documents are not packed" in trained.engine.summary()
    seen = losses(trained, 0, 6, lengths)
    assert seen[-1] < seen[0]
    assert not trained.engine.messages
    assert trained.engine.num_graphs == 0


def test_a_t4s_attention_does_not_write_out_its_weights(monkeypatch):
    monkeypatch.setattr(devices, "spec_of", lambda _: DEVICES["t4"])
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(1, 4096, heads, 64, generator=generator, device="cuda").half().requires_grad_()
        for heads in (8, 2, 2)
    )
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION]):  # raises if that cannot be
        got = attend(q, k, v, None, 0.125)
        mine = torch.autograd.grad(got.float().square().sum(), [q, k, v])
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(attend(q, k, v, None, 0.125).float().square().sum(), [q, k, v])
    weights = 8 * 4096 * 4096 * 2
    assert torch.cuda.max_memory_allocated() - before < weights
    with sdpa_kernel([SDPBackend.MATH]):
        wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
        monkeypatch.setattr(devices, "spec_of", lambda _: DEVICES["h100"])
        exact = attend(*wide, None, 0.125)
        true = torch.autograd.grad(exact.square().sum(), wide)
    for one, other in zip((got, *mine), (exact, *true), strict=True):
        assert (one.double() - other).norm() <= 2e-3 * other.norm()


@pytest.fixture
def v100(monkeypatch):
    """A GPU that Triton left behind, as all but the optimizer see it."""
    monkeypatch.setattr(devices, "spec_of", lambda _: DEVICES["v100"])
    gpu_kernels.cache_clear()
    yield
    gpu_kernels.cache_clear()


def test_a_gpu_without_kernels_trains_by_plain_torch(v100, caplog):
    exact = gradients(SMOL, torch.float32, fuse=False)
    _, reason = choose_engine(made(SMOL, torch.float16), "cuda")
    assert "fused" not in reason
    assert gpu_kernels() is None
    assert "compute capability 7.0" in caplog.text
    assert error(gradients(SMOL, torch.float16, scale=32.0, fuse=False), exact) < 2**-7
    trained = trainer(SMOL, torch.float16, EQUAL)
    seen = losses(trained, 0, 6, EQUAL)
    assert seen[-1] < seen[0]
