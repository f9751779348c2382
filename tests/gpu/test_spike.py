"""A batch several times longer than the others, on a card that is nearly full.

The cap is between what the run takes with the optimizer's state on the device and what it takes
without, so the spike ends a run whose state stays. One whose state leaves ahead of it passes, and
ends with the adapter of a run that had no cap.
"""

import gc

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig

from halfbyte.config.schema import TrainConfig
from halfbyte.engine.layerwise import LayerEngine
from halfbyte.engine.packing import Batch
from halfbyte.linear.lora import adapter_parameters
from halfbyte.optim import managed
from halfbyte.optim.buckets import GROUP_BYTES
from halfbyte.plan.policy import ActivationPolicy
from halfbyte.train.schedule import Schedule
from halfbyte.train.trainer import Trainer
from tests.engine.test_layerwise import SIZES, model_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LARGER = {"hidden_size": 1024, "intermediate_size": 2048, "max_position_embeddings": 1024}
SHAPE = LlamaConfig(**SIZES | LARGER)
LENGTHS = (64, 64, 512, 64)  # the third is the spike
SPIKE = 2


def batches(length):
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(0, 120, (4, length + 1), generator=generator).cuda()
    return [Batch(ids[:, :-1], ids[:, 1:])]


def _raise(_step, error, *, updating):
    raise error


def in_use():
    """Bytes on the device once what is no longer wanted is gone."""
    for _ in range(2):  # an autograd graph in a cycle takes two
        gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def run(optim, paging="auto", cap=None):
    """Returns the adapter, the peak, the state's bytes, and where its pages were in the spike.

    Peak and cap are beside what was there before: that may be less by the time of another run.
    """
    before = in_use()
    torch.cuda.reset_peak_memory_stats()
    model = model_of(SHAPE, r=1024).cuda()
    config = TrainConfig(
        model="-", data="-", output="-", optim=optim, paging=paging, learning_rate=1e-3
    )
    trainer = Trainer(
        LayerEngine(model), adapter_parameters(model), config, Schedule(1e-3, "constant", 0, 4)
    )
    trainer.memory.use(ActivationPolicy(3))
    trainer.memory.is_short = lambda given: given[0].input_ids.shape[1] == max(LENGTHS)
    # The ladder would save the run whose state stays: it is not what is tried here.
    trainer.memory.fall_back = _raise
    optimizer, seen, resident = trainer.optimizer, [], []
    backward = trainer.engine.step

    def watched(*arguments, **options):
        store = optimizer._store
        seen.append(store.last_prefetch() if isinstance(store, managed.Managed) else None)
        resident.append(torch.cuda.memory_allocated() - before)
        return backward(*arguments, **options)

    trainer.engine.step = watched
    if cap is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((before + cap) / total)
    try:
        with sdpa_kernel(SDPBackend.MATH):  # its backward adds in one order
            for step, length in enumerate(LENGTHS):
                step_result = trainer.step(step, batches(length))
                if step == SPIKE and paging != "explicit" and optim.startswith("paged"):
                    assert step_result.paging.paged_bytes == 2 * optimizer.state_bytes
        result = [p.detach().cpu() for p in trainer.parameters.values()]
        peak = torch.cuda.max_memory_allocated() - before
        return result, peak, optimizer.state_bytes, seen[SPIKE]
    except torch.OutOfMemoryError as error:
        error.add_note(f"{optim}, {paging}: {before} bytes before; at each step {resident}")
        raise
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def same(ones, others):
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


def test_a_spike_ends_a_run_whose_state_stays_and_no_other():
    free, peak, state, _ = run("adamw")
    left = in_use()  # cuBLAS' workspaces, and what other tests left
    assert same(run("adamw")[0], free)  # it is a function of its inputs
    # What paging needs besides is less: explicitly 32 MiB of buffers, and what is fragmented.
    cap = peak - state // 2
    assert state // 2 > 2 * GROUP_BYTES + (128 << 20)
    with pytest.raises(torch.OutOfMemoryError):
        run("adamw", cap=cap)
    for paging in ("explicit", "auto", "managed"):
        assert in_use() <= left + (1 << 20)  # a run takes its memory with it, one that failed, too
        paged, lower, _, where = run("paged_adamw_32bit", paging, cap=cap)
        assert same(paged, free), paging
        assert lower <= cap
        if paging == "managed":
            assert where == managed.HOST
