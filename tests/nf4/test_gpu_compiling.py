"""Launches in a dry run compile, side by side, and compute nothing.

In a process of its own, without the interpreter; the driver is one of no device at all.
"""

import os
import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("triton", reason="needs Triton")

# `count` differs, so that there is more than one to compile; launched twice, each is compiled once.
PROGRAM = """
    import threading
    import torch, triton, triton.language as tl
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from halfbyte.nf4.gpu_compiling import compiling_ahead

    class NoDevice:
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

    driver.set_active(NoDevice())

    @triton.jit
    def add(x, count: tl.constexpr):
        at = tl.arange(0, count)
        tl.store(x + at, tl.load(x + at) + 1)

    @triton.jit
    def wrong(x, count: tl.constexpr):
        tl.store(x + tl.arange(0, count), there_is_no_such_name)

    compiled, threads = [], set()

    def listen(src, **_):
        compiled.append(src.name)
        threads.add(threading.current_thread().name)

    knobs.compilation.listener = listen
    x = torch.zeros(64)
    with compiling_ahead():
        for _ in range(2):
            for count in (16, 32, 64):
                add[(1,)](x, count)
        wrong[(1,)](x, 16)
    assert not x.any()
    assert sorted(compiled) == ["add"] * 3, compiled
    assert threading.current_thread().name not in threads
    # Afterwards launches are launches again, and find what was compiled.
    kept = add.device_caches[0][0]
    assert len(kept) == 3 and all(hasattr(kernel, "asm") for kernel in kept.values()), kept
    for kernel in (add, wrong):
        try:
            kernel[(1,)](x, 16)
        except Exception as error:  # there is no device to launch on
            print(kernel.__name__, type(error).__name__)
    assert len(compiled) == 3, compiled
"""


def test_launches_compile_and_compute_nothing(tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    program = tmp_path / "program.py"  # Triton reads the source
    program.write_text(textwrap.dedent(PROGRAM))
    done = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = dict(line.split() for line in done.stdout.splitlines())
    assert told["wrong"] == "CompilationError"
    assert told["add"] != "CompilationError"
