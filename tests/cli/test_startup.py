"""Postponed imports: torch._dynamo is there when it is used, and a library's user keeps his own."""

import subprocess
import sys

import pytest

from tests.cli.test_main import with_source

pytestmark = pytest.mark.slow  # fresh interpreters that import transformers

_OURS = """
import sys
from halfbyte.cli import startup
startup.claim_process()
startup.import_transformers()
assert "torch._dynamo.utils" not in sys.modules
import torch
"""


def run(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env=with_source(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "use",
    [
        "assert torch.compile(torch.sin, backend='eager')(torch.zeros(2)).sum() == 0",
        "assert torch._dynamo.config.recompile_limit > 0",
        "import torch._dynamo as d; assert d.utils.counters is not None",
        "from torch._dynamo.eval_frame import OptimizedModule as m; assert m.__module__",
        "assert torch.compiler.disable(torch.sin)(torch.zeros(2)).sum() == 0",
    ],
)
def test_what_was_postponed_is_imported_once_when_it_is_used(use: str) -> None:
    run(f"""{_OURS}
{use}
import torch._dynamo.eval_frame
real = sys.modules["torch._dynamo"]
assert real is torch._dynamo and real.__file__, real
assert real.eval_frame is sys.modules["torch._dynamo.eval_frame"]
assert real.optimize is real.eval_frame.optimize
""")


def test_masks_that_transformers_maps_over_are_made() -> None:
    out = run(f"""{_OURS}
from transformers.masking_utils import causal_mask_function, sdpa_mask
mask = sdpa_mask(
    batch_size=1,
    q_length=3,
    kv_length=3,
    mask_function=causal_mask_function,
    allow_is_causal_skip=False,
    use_vmap=True,
)
print(mask.int()[0, 0].tolist())
""")
    assert out.strip() == "[[1, 0, 0], [1, 1, 0], [1, 1, 1]]"


def test_all_models_of_transformers_are_known() -> None:
    """The list is made once, for the two packages that ask for it."""
    names = "import transformers.models; print(sorted(dir(transformers.models)))"
    ours, plain = run(f"{_OURS}{names}"), run(names)
    assert ours == plain
    assert "LlamaForCausalLM" in ours


def test_in_a_process_of_others_nothing_is_prevented() -> None:
    run("""
from halfbyte.cli import startup
startup.import_transformers()
import sys
assert "transformers" not in sys.modules
from transformers.utils import is_torch_distributed_available
from transformers import PreTrainedModel
assert is_torch_distributed_available()
assert "torch._dynamo.utils" in sys.modules
""")


def test_a_gpu_wakes_beside_the_imports_and_none_is_needed() -> None:
    run(
        """
import os, threading
from halfbyte.cli import startup
startup.claim_process()
startup.import_transformers(gpu=True)
settings = dict(pair.split(":") for pair in os.environ["PYTORCH_ALLOC_CONF"].split(","))
assert settings["expandable_segments"] == settings["pinned_use_cuda_host_register"] == "True"
threads = int(settings["pinned_num_register_threads"])
assert threads.bit_count() == 1 and threads <= max(1, os.cpu_count())  # or torch refuses it
import torch
for thread in threading.enumerate():
    if thread.name == "wake-gpu":
        thread.join(60)
        assert not thread.is_alive()
assert torch.cuda.is_initialized() == torch.cuda.is_available()
"""
    )


def test_what_a_user_says_of_the_allocator_stays() -> None:
    run(
        """
import os
os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "max_split_size_mb:128"
from halfbyte.runtime.precision import configure_allocators
configure_allocators()
assert "PYTORCH_ALLOC_CONF" not in os.environ
"""
    )


def test_what_is_installed_is_looked_up_by_name() -> None:
    run("""
import importlib.metadata
from halfbyte.cli.startup import _distributions_by_name
every = importlib.metadata.packages_distributions
listed = every()
with _distributions_by_name():
    found = importlib.metadata.packages_distributions()
    assert found.get("torch") == ["torch"] and "_all" not in vars(found)  # nothing was listed
    assert found.get("yaml") == listed["yaml"]  # which is not its distribution's name
    assert found.get("no_such_package", []) == []
assert importlib.metadata.packages_distributions is every
""")
