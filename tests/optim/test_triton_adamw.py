"""The Triton kernels in Triton's interpreter: the plain rule's bits, in every field.

The interpreter's bfloat16 is wrong, so a 16-bit parameter is float16 here, with its master copy;
bfloat16 is tried on a GPU (tests/gpu/test_optim.py).
"""

import os

import pytest
import torch

from halfbyte.optim import AdamW, dynamic, reference
from tests.optim.problems import follow, gradients, in_groups, parameters

gpu = pytest.importorskip(
    "halfbyte.optim.triton_adamw", reason="needs Triton", exc_type=ImportError
)
pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1",
        reason="Triton compiles here, so tests/gpu/ tests these",
    ),
    # NumPy says so when the interpreter divides by zero or multiplies NaN.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
CPU = torch.device("cpu")


def assert_same(ours, theirs):
    (params, optimizer), (others, other) = ours, theirs
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
    state = other.state_dict()["state"]
    for i, fields in optimizer.state_dict()["state"].items():
        assert fields.keys() == state[i].keys()
        for name, value in fields.items():
            assert torch.equal(value, state[i][name]), (i, name)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_one_launch_gives_the_bits_of_the_plain_rule(bits, dtype):
    start = parameters([(64, 65), (17,), (4097,), ()], dtype)
    grads = gradients(start, 4)
    options = {"lr": 1e-2, "weight_decay": 0.1, "state_bits": bits}
    assert_same(
        follow(AdamW, start, grads, impl="gpu", **options),
        follow(AdamW, start, grads, impl="torch", **options),
    )


@pytest.mark.parametrize("bits", [32, 8])
def test_groups_with_and_without_decay_give_the_bits_of_the_plain_rule(bits):
    start = parameters([(64, 65), (17,), (4097,)])
    grads = gradients(start, 3)
    options = {"lr": 1e-2, "weight_decay": 0.1, "state_bits": bits}
    assert_same(
        follow(in_groups(AdamW), start, grads, impl="gpu", **options),
        follow(in_groups(AdamW), start, grads, impl="torch", **options),
    )


def test_memory_behind_a_parameter_is_left_alone():
    memory = torch.full((5000,), torch.nan)
    parameter = memory[1:4500].detach()  # not aligned, either
    parameter.copy_(parameters([(4499,)])[0])
    parameter.grad = gradients([parameter], 1)[0][0]
    AdamW([parameter], state_bits=8, impl="gpu").step()
    assert parameter.isfinite().all()
    assert memory[0].isnan()
    assert memory[4500:].isnan().all()


def test_a_gradient_need_not_be_contiguous_but_of_its_parameters_type():
    start = parameters([(70, 80)])
    found = []
    for impl in ("gpu", "torch"):
        parameter = start[0].clone()
        parameter.grad = gradients([start[0].t()], 1)[0][0].t()
        AdamW([parameter], state_bits=8, impl=impl).step()
        found.append(parameter)
    assert torch.equal(*found)
    half = torch.zeros(9, dtype=torch.float16)
    half.grad = torch.zeros(9, dtype=torch.float16)
    optimizer = AdamW([half], impl="gpu")
    optimizer.step()
    other = torch.zeros(9)
    (launches,) = optimizer._launches.values()
    with pytest.raises(TypeError, match="must be of its parameter's type"):
        launches[0]([half], {0: other}, None, None)


@pytest.mark.parametrize("signed", [True, False])
def test_every_level_every_midpoint_and_their_neighbours_are_encoded(signed):
    """As first moments (β1 = 0) or second ones (β2 = 0) of blocks whose largest is 1."""
    levels, middles = dynamic.levels(signed, CPU), dynamic.bounds(signed, CPU)
    beside = [torch.nextafter(middles, middles.new_tensor(side)) for side in (-2.0, 2.0)]
    wanted = torch.cat([levels, middles, *beside, levels.new_tensor([-0.0, 1e-30])])
    wanted = wanted[wanted >= 0] if not signed else wanted
    blocks = torch.nn.functional.pad(wanted, (0, -len(wanted) % 255)).view(-1, 255)
    values = torch.nn.functional.pad(blocks, (0, 1), value=1.0).view(-1)
    values = torch.nn.functional.pad(values, (0, max(0, 4096 - len(values))))
    found = []
    for impl in ("gpu", "torch"):
        parameter = torch.zeros_like(values)
        parameter.grad = values if signed else values.double().sqrt().float()
        optimizer = AdamW([parameter], betas=(0.0, 0.0), state_bits=8, impl=impl)
        optimizer.step()
        found.append(optimizer.state_dict()["state"][0])
    name = "exp_avg" if signed else "exp_avg_sq"
    assert torch.equal(found[0][name], found[1][name])
    if signed:
        assert torch.equal(found[0][name], reference.encode(values, signed=True)[0])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_scale_that_is_no_number_changes_nothing(bad):
    start = parameters([(64, 65), (17,)])
    grads = gradients(start, 2)
    ours, optimizer = follow(AdamW, start, grads, state_bits=8, impl="gpu")
    before = optimizer.state_dict()["state"]
    optimizer.step(grad_scale=torch.tensor(bad))
    held = optimizer.param_groups[0]["params"]
    assert all(torch.equal(p, q) for p, q in zip(held, ours, strict=True))
    for i, fields in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, before[i][name]) for name, value in fields.items())


def test_scalars_are_those_of_the_plain_rule():
    steps = torch.arange(300, dtype=torch.float32)
    lr = torch.linspace(1e-5, 1e-2, 300)
    beta1, beta2 = 0.9, 0.999
    row = [beta1, beta2, 1e-8, 0.1]
    constants = torch.tensor([row + torch.tensor([beta1, beta2]).double().log().tolist()] * 300)
    constants = constants.double()
    constants[:, :4] = torch.tensor(row, dtype=torch.float64)
    constants[:, 4:] = constants[:, :2].log()
    active = (steps % 2 == 0).float()
    counted = steps.clone()
    got = gpu.prepare(counted, active, lr, constants, torch.ones(()))
    assert torch.equal(counted, steps + active)
    expected = reference.scalars_of(counted, lr, constants[:, :4])
    torch.testing.assert_close(got[1:], expected[1:], rtol=2e-7, atol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_gradient_that_is_no_number_spoils_its_block_and_no_other(bad):
    """Where no scale says so; what it must not do is to read beyond a table."""
    for impl in ("gpu", "torch"):
        parameter = torch.ones(5000)
        parameter.grad = torch.full((5000,), 0.1)
        parameter.grad[300] = bad
        AdamW([parameter], state_bits=8, impl=impl, lr=1e-2).step()
        assert not parameter[300].isfinite()
        others = torch.cat([parameter[:256], parameter[512:]])
        assert torch.equal(others, others[:1].expand_as(others))
