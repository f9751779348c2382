"""Postponed imports: torch._dynamo is there when it is used, and a library's user keeps his own."""

import json
import subprocess
import sys
from pathlib import Path

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


USES = [
    "assert torch.compile(torch.sin, backend='eager')(torch.zeros(2)).sum() == 0",
    "assert torch._dynamo.config.recompile_limit > 0",
    "import torch._dynamo as d; assert d.utils.counters is not None",
    "from torch._dynamo.eval_frame import OptimizedModule as m; assert m.__module__",
    "assert torch.compiler.disable(torch.sin)(torch.zeros(2)).sum() == 0",
]
IS_IMPORTED_ONCE = """
import torch._dynamo.eval_frame
real = sys.modules["torch._dynamo"]
assert real is torch._dynamo and real.__file__, real
assert real.eval_frame is sys.modules["torch._dynamo.eval_frame"]
assert real.optimize is real.eval_frame.optimize
"""
MASK = """
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
"""
NAMES = "import transformers.models; print(sorted(dir(transformers.models)))"
# Each in a child of a process that has made the imports, which take two seconds.
_FORKED = f"""{_OURS}
import json, os, traceback, warnings
for number, program in enumerate(json.loads(sys.stdin.read())):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # BLAS has threads; no child uses them before it ends
        child = os.fork()
    if not child:
        try:
            for stream, name in ((1, "out"), (2, "err")):
                path = os.path.join(sys.argv[1], f"{{number}}.{{name}}")
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
            exec(program, {{"sys": sys, "torch": torch}})
            code = 0
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, str]]:
    """The exit code, the output and the errors of each program after our imports."""
    place = tmp_path_factory.mktemp("printed")
    programs = [*(use + IS_IMPORTED_ONCE for use in USES), MASK, NAMES]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _FORKED, str(place)],
        input=json.dumps(programs),
        env=with_source(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stderr
    codes = list(map(int, done.stdout.split()))
    return {
        program: (code, *(Path(place, f"{n}.{name}").read_text() for name in ("out", "err")))
        for n, (program, code) in enumerate(zip(programs, codes, strict=True))
    }


@pytest.mark.parametrize("use", USES)
def test_what_was_postponed_is_imported_once_when_it_is_used(
    use: str, printed: dict[str, tuple[int, str, str]]
) -> None:
    code, _, errors = printed[use + IS_IMPORTED_ONCE]
    assert not code, errors


def test_masks_that_transformers_maps_over_are_made(
    printed: dict[str, tuple[int, str, str]],
) -> None:
    code, out, errors = printed[MASK]
    assert not code, errors
    assert out.strip() == "[[1, 0, 0], [1, 1, 0], [1, 1, 1]]"


def test_all_models_of_transformers_are_known(printed: dict[str, tuple[int, str, str]]) -> None:
    """The list is made once, for the two packages that ask for it."""
    code, ours, errors = printed[NAMES]
    assert not code, errors
    assert ours == run(NAMES)
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
