"""Launches in a dry run compile, side by side, and compute nothing.

In a process of its own, without the interpreter; the driver is one of no device at all, which notes
what is launched.
"""

import os
import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("triton", reason="needs Triton")

PROGRAM = """
    import threading
    import torch, triton, triton.language as tl
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from halfbyte.runtime.compile_ahead import compiling_ahead

    launched = []

    class Utils:
        get_device_properties = staticmethod(lambda device: {"max_shared_mem": 2**17})
        load_binary = staticmethod(lambda *_: (object(), object(), 0, 0, 1024))

    class NoDevice:
        utils = Utils
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        launcher_cls = staticmethod(lambda src, metadata: lambda *_: launched.append(src.name))

    driver.set_active(NoDevice())

    @triton.jit
    def add(x, count: tl.constexpr):
        at = tl.arange(0, 16)
        tl.store(x + at, tl.load(x + at) + count)

    @triton.jit
    def wrong(x):
        tl.store(x + tl.arange(0, 16), there_is_no_such_name)

    COUNT = 40
    found, threads = [], set()

    def listen(*, src, cache_hit, **_):
        found.append(cache_hit)
        threads.add(threading.current_thread().name)

    knobs.compilation.listener = listen
    x = torch.zeros(64)
    with compiling_ahead() as ahead:
        for _ in range(2):
            for count in range(COUNT):
                add[(1,)](x, count)
        wrong[(1,)](x)
        elsewhere = threading.Thread(target=lambda: add[(1,)](x, COUNT))
        elsewhere.start()
        elsewhere.join()
    assert launched == ["add"], launched
    before = len(found)
    for count in range(COUNT):
        add[(1,)](x, count)
    assert launched == ["add"] * (COUNT + 1), launched
    try:
        wrong[(1,)](x)
    except triton.CompilationError:
        print("said")
    assert knobs.compilation.listener is listen
    here = threading.current_thread().name in threads
    print(ahead.needless, before, len(found), sum(found), here)
"""


def test_launches_compile_and_compute_nothing(tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    program = tmp_path / "program.py"  # Triton reads the source
    program.write_text(textwrap.dedent(PROGRAM))

    def run():
        done = subprocess.run(
            [sys.executable, str(program)], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr[-3000:]
        said, last = done.stdout.splitlines()
        assert said == "said"
        return last.split()

    # Each is compiled once, though launched twice; the other thread's is launched, and not here.
    assert run() == ["False", "41", "41", "0", "False"]
    # All is on disk: after eight, and the other thread's, the rest is read when it is launched.
    assert run() == ["True", "9", "41", "41", "True"]
