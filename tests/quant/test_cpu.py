"""The C++ kernels: every variant equals plain PyTorch, and where there are none, that is said."""

import itertools
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch

from halfbyte.errors import ConfigError
from halfbyte.quant import BLOCK_SIZES, cpu, dequantize, quantize
from halfbyte.quant.format import _encode
from halfbyte.quant.weight import FLOAT_TYPES, QuantizedWeight
from halfbyte.runtime.native import shared_object

KERNELS = cpu.kernels()
assert KERNELS is not None, "these tests need a C++ compiler"
VARIANTS = KERNELS.variants
COUNTS = [1, 31, 32, 63, 64, 4095, 4097, 40000]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from threads, and on a busy machine lose much."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def values(count: int, dtype: torch.dtype, magnitude: float = 1.0) -> torch.Tensor:
    return (torch.randn(count, generator=torch.Generator().manual_seed(count)) * magnitude).to(
        dtype
    )


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({4: torch.int32, 2: torch.int16}[tensor.element_size()])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_decode_equals_plain_pytorch(quant_type, dtype, variant):
    """On a poisoned buffer at an odd address, whose neighbours stay as they are."""
    for block_size, double, count in itertools.product(BLOCK_SIZES, [True, False], COUNTS):
        q = quantize(
            values(count, torch.float32),
            quant_type=quant_type,
            block_size=block_size,
            double_quant=double,
        )
        around = torch.full((count + 9,), float("nan"), dtype=dtype)
        KERNELS.decode(q, around[3 : count + 3], variant=variant)
        expected = dequantize(q, dtype, impl="torch")
        assert torch.equal(bits(around[3 : count + 3]), bits(expected))
        assert around[:3].isnan().all()
        assert around[count + 3 :].isnan().all()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_every_scale_is_rounded_as_torch_rounds(dtype, variant):
    """Random bit patterns: subnormals, overflow of float16, infinity and NaN are among them."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.randint(-(2**31), 2**31, (3000,), generator=generator).int().view(torch.float32)
    special = [0.0, -0.0, 1e-45, 1.17549435e-38, 6e-8, 65504.0, 65519.9, 65520.0, 3.4e38]
    scales[: len(special)] = torch.tensor(special)
    codes = torch.randint(0, 256, (3000 * 16,), generator=generator).to(torch.uint8)
    q = QuantizedWeight(codes, scales, None, None, None, (3000, 32), dtype, "nf4", 32)
    out = torch.empty(3000, 32, dtype=dtype)
    KERNELS.decode(q, out, variant=variant)
    expected = dequantize(q, impl="torch")
    numbers = ~expected.isnan()
    assert torch.equal(numbers, ~out.isnan())
    assert torch.equal(bits(out[numbers]), bits(expected[numbers]))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_encode_equals_plain_pytorch(quant_type, dtype, variant):
    for block_size, count in itertools.product(BLOCK_SIZES, COUNTS):
        for magnitude in (1.0, 1e-6, 1e-40):
            flat = values(count, dtype, magnitude)
            flat[::5] = 0
            codes, scales = KERNELS.encode(flat, quant_type, block_size, variant=variant)
            expected_codes, expected_scales = _encode(flat, quant_type, block_size)
            assert torch.equal(codes, expected_codes)
            assert torch.equal(scales, expected_scales)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_is_read_right(dtype, variant):
    """In blocks of numbers of like size, so that their codes tell them apart."""
    flat = torch.arange(65536).to(torch.uint16).view(dtype)
    codes, scales = KERNELS.encode(flat, "nf4", 32, variant=variant)
    finite = flat.isfinite().view(-1, 32).all(1)
    assert torch.equal(finite, scales.isfinite())
    numbers = flat.view(-1, 32)[finite].view(-1)
    expected_codes, expected_scales = _encode(numbers, "nf4", 32)
    assert torch.equal(codes.view(-1, 16)[finite].view(-1), expected_codes)
    assert torch.equal(scales[finite], expected_scales)


@pytest.mark.parametrize("own_threads", [False, True])
def test_results_do_not_depend_on_the_number_of_threads(own_threads, monkeypatch):
    if own_threads:
        monkeypatch.setattr(KERNELS, "_fork", None)
    flat = values(5 * cpu._DECODE_SHARE + 77, torch.float32)
    codes, scales = KERNELS.encode(flat, "nf4", 64, threads=1)
    q = QuantizedWeight(codes, scales, None, None, None, flat.shape, flat.dtype, "nf4", 64)
    one = torch.empty_like(flat)
    KERNELS.decode(q, one, threads=1)
    for threads in (2, 5):
        again = KERNELS.encode(flat, "nf4", 64, threads=threads)
        assert torch.equal(again[0], codes)
        assert torch.equal(again[1], scales)
        out = torch.full_like(flat, float("nan"))
        KERNELS.decode(q, out, threads=threads)
        assert torch.equal(out, one)


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_a_large_result_is_an_ordinary_tensor(dtype):
    q = quantize(values(2**24 + 1, dtype))
    result = dequantize(q)
    assert torch.equal(result, dequantize(q, impl="torch"))
    assert result.is_contiguous()
    assert not result._is_view()
    result.mul_(torch.ones(1, dtype=dtype, requires_grad=True))  # as any tensor may be


def test_a_variant_this_cpu_lacks_is_refused():
    q = quantize(torch.ones(64))
    with pytest.raises(ValueError, match="this CPU runs scalar"):
        KERNELS.decode(q, torch.empty(64), variant="avx1024")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_openmp_runtime_serves_torch_and_the_kernels():
    program = """
import torch, re
from halfbyte.quant import cpu, quantize, dequantize
dequantize(quantize(torch.randn(2**21)))
maps = open("/proc/self/maps").read()
runtimes = set(re.findall(r"\\S*/lib[gi]?omp\\S*", maps))
assert len(runtimes) == 1, runtimes
assert "torch" in cpu.describe(), cpu.describe()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.fixture
def nothing_found_yet(monkeypatch, tmp_path) -> Iterator[None]:
    """As in a new process of a user without a cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cpu._find.cache_clear()
    yield
    cpu._find.cache_clear()


@pytest.mark.usefixtures("nothing_found_yet")
def test_without_a_compiler_plain_pytorch_is_announced_once(monkeypatch, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler")
    w = values(1000, torch.float32)
    q = quantize(w)
    assert torch.equal(dequantize(q), dequantize(q, impl="torch"))
    [record] = caplog.records
    assert record.name == "halfbyte"
    assert record.levelname == "WARNING"
    assert "plain PyTorch" in record.message
    assert "'no-such-compiler'" in record.message
    assert "no-such-compiler" in cpu.describe()
    with pytest.raises(ConfigError, match="no-such-compiler"):
        quantize(w, impl="cpu")


@pytest.mark.usefixtures("nothing_found_yet")
def test_without_any_compiler_names_are_told(monkeypatch, caplog):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    assert cpu.kernels() is None
    assert "install one" in caplog.text


@pytest.mark.usefixtures("nothing_found_yet")
def test_a_failed_build_is_announced_with_the_compilers_error(monkeypatch, caplog, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'noise' >&2\necho 'x.cpp:1: error: boom' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert cpu.kernels() is None
    assert "error: boom" in caplog.text
    assert list((tmp_path / "cache" / "halfbyte").iterdir()) == []


@pytest.mark.usefixtures("nothing_found_yet")
def test_a_cache_that_cannot_be_written_is_announced(monkeypatch, caplog, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cpu.kernels() is None
    assert str(tmp_path / "file") in caplog.text


def built():
    return shared_object(cpu._SOURCE, cpu._FLAGS)


@pytest.mark.usefixtures("nothing_found_yet")
def test_first_uses_at_the_same_time_build_one_library_that_is_kept(tmp_path):
    found = []
    users = [
        threading.Thread(target=lambda: found.append(cpu.Kernels(built()).variants))
        for _ in range(2)
    ]
    for user in users:
        user.start()
    for user in users:
        user.join()
    assert found == [VARIANTS, VARIANTS]
    [library] = (tmp_path / "cache" / "halfbyte").iterdir()
    made = library.stat().st_mtime_ns
    assert built() == library
    assert library.stat().st_mtime_ns == made
