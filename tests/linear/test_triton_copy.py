"""A layer put together from its parts by a kernel."""

import os

import pytest
import torch

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="Triton compiles here, so tests/gpu/ tests this",
)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("nbytes", [256, 256 * 67])
@pytest.mark.parametrize("missing", [0, 256])
def test_parts_are_put_side_by_side(size, nbytes, missing):
    kernels = pytest.importorskip("halfbyte.linear.triton_copy", exc_type=ImportError)
    generator = torch.Generator().manual_seed(size + nbytes)
    shape = (size, 512 + nbytes + 256)
    held = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    addresses = torch.tensor([part.data_ptr() for part in held])
    whole = torch.full((size * nbytes - missing + 64,), 7, dtype=torch.uint8)
    out = whole[: size * nbytes - missing]
    kernels.copy_parts(addresses, 512, nbytes, out, rank=size - 1)
    wanted = held[:, 512 : 512 + nbytes].flatten()[: len(out)]
    assert torch.equal(out, wanted)
    assert (whole[len(out) :] == 7).all()
