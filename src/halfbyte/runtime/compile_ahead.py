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
# If so many kernels are found on disk and none has to be compiled, the others are there, too.
_ENOUGH = 8


class Ahead(ThreadPoolExecutor):
    """Compiles kernels, builds their launchers and loads them, in threads.

    Attributes:
        needless: Whether Triton turned out to have the kernels on disk: nothing more is compiled.
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
            kernel.run  # noqa: B018 (a property, which does the rest)
            return kernel

        self._futures.append(super().submit(ready))
        return self._futures[-1]

    def compiled(self, *, found: bool) -> None:
        """Take note that a kernel was compiled, or found on disk."""
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
    """Compile what this thread launches inside, all at the same time, and run none of it.

    Everything else does run: allocations, torch's own operations, what the host remembers. They see
    tensors that nobody has written to, so results mean nothing, may be NaN, and whoever enters this
    must forget them. Autograd has to stay in this thread (``set_multithreading_enabled(False)``).

    A kernel that cannot be compiled says so when it is launched, not here.
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
