"""Compiles Triton kernels in parallel, before they are needed.

A kernel is compiled at its first launch, which takes 0.1 to 1.6 s, and as long again if Triton has
the C compiler build its launcher. The first step after installation launches about forty different
ones: in sequence they took 20 s (LAB.md). Most of that time does not hold the GIL, so threads help.
If Triton has the kernels in its cache, there is nothing to gain.
"""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import Any

import triton
from triton import knobs
from triton.runtime.jit import JITFunction

_MOST_THREADS = 16
# If this many kernels are in the cache and none has to be compiled, the others are assumed cached.
_ENOUGH = 8


class Ahead(ThreadPoolExecutor):
    """Compiles kernels, builds their launchers and loads them, in threads.

    Attributes:
        needless: Whether Triton's cache turned out to have the kernels; compiling stops then.
    """

    def __init__(self) -> None:
        super().__init__(min(_MOST_THREADS, os.cpu_count() or 1), "compile")
        self.needless = False
        self._futures: list[Future[Any]] = []
        self._found_all, self._looked = True, False

    def submit(self, call: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
        """Have ``call`` compile a kernel; see ``concurrent.futures.Executor``."""

        def ready() -> Any:
            kernel = call(*args, **options)
            kernel.run  # noqa: B018 (a property with side effects)
            return kernel

        self._futures.append(super().submit(ready))
        return self._futures[-1]

    def compiled(self, *, found: bool) -> None:
        """Record that a kernel was compiled, or found in the cache."""
        self._found_all &= found

    def look(self) -> None:
        """Once there are a few kernels, wait until one was compiled or all of them were found."""
        if self._looked or len(self._futures) < _ENOUGH:
            return
        self._looked = True
        for future in as_completed(self._futures):
            if future.exception() is not None or not self._found_all:
                return
        self.needless = True


@contextmanager
def compiling_ahead() -> Iterator[Ahead]:
    """Compile the kernels this thread launches inside the context, in parallel; run none of them.

    Everything else runs: allocations, torch's own operations, changes of host state. They read
    uninitialised tensors, so results are meaningless, may be NaN, and must be discarded by the
    caller. Autograd must stay in this thread (``set_multithreading_enabled(False)``).

    A kernel that cannot be compiled raises when it is launched, not here.
    """
    launch, listener, thread = JITFunction.run, knobs.compilation.listener, threading.get_ident()
    with Ahead() as ahead:

        def listen(*, cache_hit: bool, **message: Any) -> None:
            ahead.compiled(found=cache_hit)
            if listener is not None:
                listener(cache_hit=cache_hit, **message)

        def compiled(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            if threading.get_ident() != thread:
                return launch(kernel, *args, grid=grid, warmup=warmup, **options)
            ahead.look()
            if ahead.needless:
                return None
            return launch(kernel, *args, grid=grid, warmup=True, **options)

        JITFunction.run, knobs.compilation.listener = compiled, listen
        try:
            with triton.AsyncCompileMode(ahead, ignore_errors=True):
                yield ahead
        finally:
            JITFunction.run, knobs.compilation.listener = launch, listener
