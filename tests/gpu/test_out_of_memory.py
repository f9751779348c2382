"""Runs that find less memory than they planned with: repeated with less, to the same losses.

The process is capped, which the plan does not see, or memory is taken away between two steps.
"""

import gc
import subprocess
import sys
from contextlib import suppress

import pytest
import torch
from transformers import LlamaConfig

from halfbyte.config.schema import TrainConfig
from halfbyte.engine.choose import choose_engine
from halfbyte.engine.memory_policy import memory_limit
from halfbyte.engine.packing import Batch
from halfbyte.errors import OutOfMemoryError
from halfbyte.linear.lora import adapter_parameters
from halfbyte.plan.policy import ActivationPolicy
from halfbyte.train.schedule import Schedule
from halfbyte.train.trainer import Trainer
from tests.engine.test_layerwise import SIZES, model_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPE = LlamaConfig(
    **SIZES
    | {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "num_hidden_layers": 8,
        "max_position_embeddings": 1024,
    }
)
LENGTHS = [[900, 512, 300, 1000, 77, 640, 800, 512]] * 4


def batches(step):
    generator = torch.Generator().manual_seed(step)
    lengths = LENGTHS[step]
    ids = torch.randint(0, 120, (len(lengths), max(lengths)), generator=generator)
    labels = torch.randint(0, 120, ids.shape, generator=generator)
    for row, length in enumerate(lengths):
        labels[row, length:] = -100
    return [Batch(ids, labels, lengths)]


def in_use():
    for _ in range(2):  # an autograd graph in a cycle takes two
        gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def trainer(**options):
    model = model_of(SHAPE, dtype=torch.bfloat16).cuda()
    config = TrainConfig(model="-", data="-", output="-", learning_rate=1e-3, **options)
    engine, reason = choose_engine(model, "cuda")
    assert "CUDA graphs" in reason
    made = Trainer(engine, adapter_parameters(model), config, Schedule(1e-3, "constant", 0, 4))
    made.fit([[(len(lengths), max(lengths))] for lengths in LENGTHS], LENGTHS)
    return made


def losses(made, steps=range(4)):
    return [made.step(step, batches(step)).loss for step in steps]


@pytest.fixture
def capped():
    """Caps what the process may take beside what it has now."""

    def cap(beside):
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (in_use() + beside) / total))

    yield cap
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_capped_process_keeps_less_and_computes_the_same(capped):
    before = in_use()
    free = trainer()
    free.capture()
    assert free.memory.policy.saved == 8
    wanted = losses(free)
    assert not free.memory.fallbacks
    peak = torch.cuda.max_memory_reserved() - before
    del free
    in_use()
    made = trainer()
    capped(int(0.6 * peak))
    made.capture()
    got = losses(made)
    assert got == pytest.approx(wanted, rel=2e-3)
    assert made.memory.fallbacks
    assert made.memory.policy.saved < 8
    notes = [note for note in made.engine.messages if note.startswith("out of GPU memory")]
    assert len(notes) == len(made.memory.fallbacks)


def test_a_budget_is_kept_to_from_the_first_look_on():
    """Looking how much a part takes may take more than the budget, too."""
    before = in_use()
    free = trainer()
    free.capture()
    wanted = losses(free)
    peak = torch.cuda.max_memory_reserved() - before
    del free
    budget = in_use() + int(0.6 * peak)
    torch.cuda.reset_peak_memory_stats()
    with memory_limit("cuda", budget):
        made = trainer(memory_budget=budget)
        made.capture()
        assert losses(made) == pytest.approx(wanted, rel=2e-3)
    assert torch.cuda.max_memory_reserved() <= budget
    assert made.memory.plan.reserved_bytes <= budget
    assert not made.memory.fallbacks


def test_memory_that_is_taken_away_between_steps_is_done_without(capped):
    made = trainer(cuda_graphs=False)
    made.engine.stop_capturing("not asked for")
    wanted = losses(made, [0])
    del made
    in_use()
    made = trainer()
    made.engine.stop_capturing("not asked for")  # graphs keep their memory: none can be taken away
    assert losses(made, [0]) == pytest.approx(wanted, rel=2e-3)
    assert not made.memory.fallbacks
    capped(200 << 20)
    assert all(loss > 0 for loss in losses(made, [1, 2, 3]))
    assert made.memory.fallbacks


def test_where_nothing_helps_there_is_one_message_and_no_update(capped):
    made = trainer()
    made.memory.use(ActivationPolicy())  # so that nothing that is kept can be let go of
    before = {name: p.detach().clone() for name, p in made.parameters.items()}
    capped(1 << 20)
    taken = []  # what the allocator has left, but for less than a layer's decoded weights
    with suppress(torch.OutOfMemoryError):
        while True:
            taken.append(torch.empty(4 << 20, dtype=torch.uint8, device="cuda"))
    with pytest.raises(OutOfMemoryError, match="does not fit into the memory of this GPU"):
        losses(made, [0])
    taken.clear()
    torch.cuda.set_per_process_memory_fraction(1.0)
    assert all(torch.equal(p, before[name]) for name, p in made.parameters.items())


HOLDS = """
import sys, torch
free, _ = torch.cuda.mem_get_info()
held = torch.empty(free - int(sys.argv[1]), dtype=torch.uint8, device="cuda")
print("held", flush=True)
sys.stdin.read()
"""


def test_beside_another_program_no_more_is_asked_for_than_it_leaves():
    in_use()
    torch.cuda.reset_peak_memory_stats()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLDS, str(700 << 20)], **pipes) as other:
        try:
            assert other.stdout.readline().strip() == b"held"
            free, _ = torch.cuda.mem_get_info()
            before = torch.cuda.memory_reserved()
            made = trainer()
            assert made.memory.plan.reserved_bytes <= made.memory.plan.budget
            made.capture()
            assert all(loss > 0 for loss in losses(made))
        finally:
            other.kill()
    assert not made.memory.fallbacks
    assert torch.cuda.max_memory_reserved() - before <= free
