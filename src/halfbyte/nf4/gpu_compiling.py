"""Triton kernels compiled side by side, before they are needed.

A kernel is compiled at its first launch, which takes 0.1 to 1.6 s, and as long again where Triton
has the C compiler build its launcher. The first step of a first start launches some forty different
ones: one after the other they took 20 s (LAB.md). All but a little of that leaves Python's lock to
others, so threads help. Where Triton has them on disk, there is nothing to be gained.
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


@contextmanager
def compiling_ahead() -> Iterator[None]:
    """Compile what this thread launches inside, all at the same time, and run none of it.

    Everything else does run: allocations, torch's own operations, what the host remembers. They see
    tensors that nobody has written to, so results mean nothing, may be NaN, and whoever enters this
    must forget them. Autograd has to stay in this thread (``set_multithreading_enabled(False)``).
    The block is left early, without an exception, when Triton turns out to have it all.

    A kernel that cannot be compiled says so when it is launched, not here.
    """
    launch, listener, thread = JITFunction.run, knobs.compilation.listener, threading.get_ident()
    with _Threads(min(_MOST_THREADS, os.cpu_count() or 1)) as threads:

        def listen(*, cache_hit: bool, **told: Any) -> None:
            threads.found_all &= cache_hit
            if listener is not None:
                listener(cache_hit=cache_hit, **told)

        def compiled(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            own = threading.get_ident() == thread
            if own and not threads.looked and len(threads.futures) >= _ENOUGH:
                threads.look()
            return launch(kernel, *args, grid=grid, warmup=warmup or own, **options)

        JITFunction.run, knobs.compilation.listener = compiled, listen
        try:
            with triton.AsyncCompileMode(threads, ignore_errors=True):
                yield
        except _AllThere:
            return
        finally:
            JITFunction.run, knobs.compilation.listener = launch, listener


class _AllThere(Exception):
    """Triton has the kernels on disk."""


class _Threads(ThreadPoolExecutor):
    """Compiles kernels, builds their launchers and loads them.

    Attributes:
        futures: Of all.
        found_all: Whether all that are done were on disk.
        looked: Whether `look` was called.
    """

    def __init__(self, count: int) -> None:
        super().__init__(count, "compile")
        self.futures: list[Future[Any]] = []
        self.found_all, self.looked = True, False

    def submit(self, call: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
        def ready() -> Any:
            kernel = call(*args, **options)
            kernel.run  # noqa: B018 (a property, which does the rest)
            return kernel

        self.futures.append(super().submit(ready))
        return self.futures[-1]

    def look(self) -> None:
        """Wait until one has been compiled, or all so far were found.

        Raises:
            _AllThere: They were found.
        """
        self.looked = True
        for future in as_completed(self.futures):
            if not self.found_all or future.exception() is not None:
                return
        raise _AllThere
