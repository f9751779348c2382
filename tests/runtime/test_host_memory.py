"""Host memory that is page-locked, and shared: locked until copies have ended, found by others."""

import gc
from types import SimpleNamespace

import pytest
import torch

from halfbyte.runtime import host_memory as module
from halfbyte.runtime.host_memory import host_memory, opened_memory, shared_memory


@pytest.fixture
def runtime(monkeypatch):
    """Record what is asked of CUDA's runtime; registering fails with ``failure``."""
    made = SimpleNamespace(calls=[], failure=0, capturing=False)

    def register(address, nbytes, flags):
        made.calls.append("lock")
        return made.failure

    library = SimpleNamespace(
        cudaHostRegister=register,
        cudaHostUnregister=lambda address: made.calls.append("unlock"),
    )
    monkeypatch.setattr(module, "_cudart", lambda: library)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: made.calls.append("wait"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: made.capturing)
    return made


@pytest.mark.parametrize("capturing", [False, True])
def test_memory_stays_locked_until_copies_have_ended(runtime, capturing):
    memory = host_memory(10_000, page_locked=True)
    assert len(memory) == 10_000
    view, memory = memory[5:], None
    gc.collect()
    assert runtime.calls == ["lock"]
    runtime.capturing, view = capturing, None
    gc.collect()
    assert view is None
    assert runtime.calls == ["lock", *["wait"] * (not capturing), "unlock"]


def test_memory_that_cannot_be_locked_is_an_error(runtime):
    runtime.failure = 2
    with pytest.raises(RuntimeError, match="could not be page-locked: CUDA error 2"):
        host_memory(10_000, page_locked=True)
    gc.collect()
    assert runtime.calls == ["lock"]


def test_what_one_writes_the_other_reads_and_none_is_there_afterwards():
    own, handle = shared_memory(1000, page_locked=False)
    other = opened_memory(handle, 1000, page_locked=False)
    assert not other.any()
    own[7] = 3
    other[8] = 4
    assert other[7] == 3
    assert own[8] == 4
    own = None
    gc.collect()
    assert own is None
    assert other[7] == 3  # a mapping lives by itself
    with pytest.raises(OSError):
        opened_memory(handle, 1000, page_locked=False)
