"""Triton kernels compiled side by side, before they are needed.

A kernel is compiled at its first launch, which takes 0.1 to 1.6 s, and the first step of a first
start launches some forty different ones: one after the other they took 20 s (LAB.md). The compiler
leaves Python's lock to others for most of that time, so threads help.
"""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import triton
from triton.runtime.jit import JITFunction

_MOST_THREADS = 16


@contextmanager
def compiling_ahead() -> Iterator[None]:
    """Compile what this thread launches inside, all at the same time, and run none of it.

    Everything else does run: allocations, torch's own operations, what the host remembers. They see
    tensors that nobody has written to, so results mean nothing, may be NaN, and whoever enters this
    must forget them. Autograd has to stay in this thread (``set_multithreading_enabled(False)``).

    A kernel that cannot be compiled says so when it is launched, not here.
    """
    launch, thread = JITFunction.run, threading.get_ident()

    def compiled(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        only_compile = warmup or threading.get_ident() == thread
        return launch(kernel, *args, grid=grid, warmup=only_compile, **options)

    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as threads:
        JITFunction.run = compiled
        try:
            with triton.AsyncCompileMode(threads, ignore_errors=True):
                yield
        finally:
            JITFunction.run = launch
