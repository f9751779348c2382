"""Tests whether this machine computes correctly: the parts of a training run against references.

The parts are those of a run, on the device and in the dtype it would use here: packing and decoding
against the plain specification, bit for bit; a linear layer, attention and the optimizer against
float64; the layer engine against plain autograd; and a tiny model that must learn its examples,
twice, with the same bits. Nothing is read or written.

The tolerance of low precision follows from plain PyTorch: the error from float64 may be twice that
of the same products in the same dtype (sums in another order differ by as much), plus a rounding.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from halfbyte.config.reading import check
from halfbyte.config.schema import TrainConfig
from halfbyte.engine.choose import choose_engine
from halfbyte.engine.packing import Batch
from halfbyte.layers.attention_cpu import causal_attention
from halfbyte.layers.elementwise import qk_norm_rotary, rms_norm, rotary, swiglu
from halfbyte.linear.frozen import FrozenLinear
from halfbyte.linear.lora import DropoutClock, LoRA, LoRAConfig, adapter_parameters, attach
from halfbyte.models.build import BaseRecipe, build, finalize, load_tensor
from halfbyte.optim import AdamW
from halfbyte.plan.policy import ActivationPolicy
from halfbyte.quant import QuantizedWeight, QuantType, cpu, dequantize, quantize
from halfbyte.quant.blockwise import cuda_bounds
from halfbyte.quant.format import gpu_kernels
from halfbyte.quant.weight import FLOAT_TYPES
from halfbyte.runtime.precision import deterministic
from halfbyte.train.schedule import Schedule
from halfbyte.train.trainer import Trainer

_ODD = 1021 * 769  # the last block is not full, the last byte is half used
_LARGE = 2**24
_STEPS = 30
_MUST_FALL_TO = 0.5  # of the first loss
_VOCABULARY = 256
# Ten steps move parameters by a twentieth of their size; 8 bits of state, a few percent of that.
_CODED_STATE = 2e-3


class Check(NamedTuple):
    """One part and its outcome.

    Attributes:
        name: What was tried.
        passed: Whether it is right.
        message: The numbers, in a line.
        seconds: How long it took.
        facts: The numbers as values.
    """

    name: str
    passed: bool
    message: str
    seconds: float
    facts: dict[str, Any]


class Outcome(NamedTuple):
    """What a part returns: see `Check`."""

    passed: bool
    message: str
    facts: dict[str, Any]


class _Place(NamedTuple):
    device: str
    dtype: torch.dtype

    def random(self, *shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(*shape, generator=generator) * scale
        return values.to(self.device, self.dtype)


def checks(device: str, dtype: torch.dtype) -> Iterator[Check]:
    """Yield the outcome of each part in turn.

    Args:
        device: ``cpu`` or ``cuda``. There, torch must not have multiplied before, or the variable
            CUBLAS_WORKSPACE_CONFIG be set: else the last part ends with torch's RuntimeError.
        dtype: What products are computed in.
    """
    here = _Place(device, dtype)
    with deterministic(device == "cuda"):
        pass  # what it sets for cuBLAS is looked at once, at the first product of a process
    parts: list[tuple[str, Callable[[_Place], Outcome]]] = [
        ("packing and decoding, to the bit", _packing),
        ("speed of decoding", _speed),
        ("a 4-bit linear layer with adapter", _linear),
        ("norm, rotary embedding and SwiGLU", _elementwise),
        ("attention", _attention),
        ("an optimizer's steps", _optimizer),
        ("layer engine against plain autograd", _engine),
        ("a tiny model learns", _learning),
        ("and learns it again, bit for bit", _again),
    ]
    for name, part in parts:
        began = time.perf_counter()
        outcome = part(here)
        yield Check(name, outcome[0], outcome[1], time.perf_counter() - began, outcome[2])


# --- the format ---------------------------------------------------------------------------------


def _packing(here: _Place) -> Outcome:
    values = torch.randn(_ODD, generator=torch.Generator().manual_seed(0))
    right: dict[str, bool] = {}
    for quant_type in get_args(QuantType):
        for dtype in FLOAT_TYPES:
            weight, name = values.to(dtype), f"{quant_type} {str(dtype).removeprefix('torch.')}"
            plain = quantize(weight, quant_type=quant_type, impl="torch")
            ours = quantize(weight, quant_type=quant_type).tensors()
            right[f"quantise {name}"] = all(
                torch.equal(ours[part], tensor) for part, tensor in plain.tensors().items()
            )
            if here.device == "cuda" and gpu_kernels() is not None:
                right[f"quantise {name} (gpu)"] = _encodes(weight.to(here.device), quant_type)
            expected = dequantize(plain, dtype, impl="torch")
            for where, decoded in _decoders(plain, expected, here.device).items():
                right[f"dequantise {name} ({where})"] = torch.equal(decoded, expected)
    wrong = [name for name, fine in right.items() if not fine]
    message = f"{len(right) - len(wrong)} of {len(right)} cases as the specification has them"
    return Outcome(not wrong, message, {"cases": len(right), "wrong": wrong})


def same_but_at_bounds(ours: QuantizedWeight, plain: QuantizedWeight, weight: Tensor) -> bool:
    """Return whether a GPU's kernel packed ``weight`` as the specification did.

    The kernel's reciprocal is approximate, as is bitsandbytes'. So a code may be the neighbour's
    where the quotient is a bound but for its last bit, which FP4's bounds, short fractions, often
    are; and one scale in many thousands.
    """
    packed = zip(ours.tensors().values(), plain.tensors().values(), strict=True)
    _, *scales = [mine != tensor for mine, tensor in packed]
    if sum(int(part.sum()) for part in scales) > 1 + 1e-5 * plain.numel / plain.block_size:
        return False
    high, low = (ours.codes ^ plain.codes) >> 4 > 0, (ours.codes ^ plain.codes) & 15 > 0
    apart = torch.stack([high, low], -1).view(-1)[: plain.numel].nonzero().view(-1)
    flat = weight.flatten().double()
    blocks = nn.functional.pad(flat, (0, -len(flat) % plain.block_size)).view(-1, plain.block_size)
    quotients = flat[apart] / blocks.abs().amax(1)[apart // plain.block_size]
    bounds = cuda_bounds(plain.quant_type)[0].to(flat)
    if plain.quant_type == "fp4":
        quotients = quotients.abs()
    return bool(((quotients[:, None] - bounds).abs().amin(1) <= 2**-22).all())


def _encodes(weight: Tensor, quant_type: QuantType) -> bool:
    plain, ours = (quantize(weight, quant_type=quant_type, impl=i) for i in ("torch", "gpu"))
    return same_but_at_bounds(ours, plain, weight)


def _decoders(plain: QuantizedWeight, like: Tensor, device: str) -> dict[str, Tensor]:
    """Return the decoded weight of each available implementation, on the CPU."""
    found: dict[str, Tensor] = {}
    kernels = cpu.kernels()
    if kernels is not None:
        for variant in kernels.variants:
            found[variant] = torch.full_like(like, float("nan"))
            kernels.decode(plain, found[variant], variant=variant)
    if device == "cuda" and gpu_kernels() is not None:
        found["gpu"] = dequantize(plain.to(device), like.dtype, impl="gpu").cpu()
    return found


def _speed(here: _Place) -> Outcome:
    large = torch.randn(_LARGE, generator=torch.Generator().manual_seed(0)).to(here.device)
    packed, out = quantize(large), torch.empty_like(large)
    decode = large.nbytes / _fastest(lambda: dequantize(packed, out=out), here.device)
    copy = large.nbytes / _fastest(lambda: out.copy_(large), here.device)
    message = f"{decode / 1e9:.1f} GB/s of float32 written; copying writes {copy / 1e9:.1f}"
    facts = {"decoded_bytes_per_second": decode, "copied_bytes_per_second": copy}
    return Outcome(True, message, facts)


def _fastest(work: Callable[[], object], device: str) -> float:
    """Return the seconds of the fastest of a few tries."""
    times = []
    for _ in range(5):
        began = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times)


# --- against float64 ----------------------------------------------------------------------------


def _error(got: Tensor, truth: Tensor) -> float:
    """Return the relative error, over all elements together."""
    return float((got.double() - truth).norm() / truth.norm())


def _compared(
    here: _Place, ours: dict[str, Tensor], plain: dict[str, Tensor], truth: dict[str, Tensor]
) -> Outcome:
    """Judge results by their errors, and by those of plain PyTorch in the same dtype."""
    errors = {name: _error(ours[name], truth[name]) for name in truth}
    allowed = {
        name: 2 * _error(plain[name], truth[name]) + torch.finfo(here.dtype).eps / 2
        for name in truth
    }
    passed = all(errors[name] <= allowed[name] for name in truth)
    message = "error from float64: " + ", ".join(
        f"{name} {error:.1e}"
        + ("" if error <= allowed[name] else f" (at most {allowed[name]:.1e})")
        for name, error in errors.items()
    )
    return Outcome(passed, message, {"errors": errors, "allowed": allowed})


def _gradients(outputs: Tensor, given: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
    found = torch.autograd.grad(outputs, list(inputs.values()), given)
    named = {f"d{name}": gradient for name, gradient in zip(inputs, found, strict=True)}
    return {"y": outputs.detach()} | named


def _linear(here: _Place) -> Outcome:
    rows, wide, narrow, rank = 192, 384, 320, 8
    packed = quantize(here.random(wide, narrow, scale=0.05))
    linear = FrozenLinear(narrow, wide, quantized=packed)
    config = LoRAConfig(r=rank, alpha=2 * rank)
    adapter = LoRA(linear, config, index=0, clock=DropoutClock(0)).to(here.device)
    linear.adapter = adapter
    x, dy = here.random(rows, narrow, seed=1), here.random(rows, wide, seed=2)
    with torch.no_grad():
        for number, factor in enumerate((adapter.lora_A, adapter.lora_B)):
            factor.copy_(here.random(*factor.shape, seed=3 + number, scale=0.1).float())

    def plain(dtype: torch.dtype) -> dict[str, Tensor]:
        weight = dequantize(packed, torch.float32).view(wide, narrow).to(dtype)
        x_, a, b = (
            tensor.detach().to(here.dtype).to(dtype).requires_grad_()
            for tensor in (x, adapter.lora_A, adapter.lora_B)
        )
        y = x_ @ weight.t() + 2.0 * ((x_ @ a.t()) @ b.t())
        return _gradients(y, dy.to(dtype), x=x_, A=a, B=b)

    x.requires_grad_()
    ours = _gradients(linear(x), dy, x=x, A=adapter.lora_A, B=adapter.lora_B)
    return _compared(here, ours, plain(here.dtype), plain(torch.float64))


def _elementwise(here: _Place) -> Outcome:
    x, gate, up = (here.random(2, 40, 4, 64, seed=number) for number in (10, 11, 12))
    weight = here.random(64, seed=13)
    angles = torch.outer(torch.arange(40.0), 0.8 ** torch.arange(32.0)).repeat(1, 2)
    cos, sin = (f(angles)[None].to(here.device, here.dtype) for f in (torch.cos, torch.sin))
    dy = here.random(2, 40, 4, 64, seed=14)

    def ours(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        # Copies, because on a GPU both write over what they are given.
        y = rms_norm(x, weight, 1e-6)
        q, k = rotary(y, y * 1, cos, sin)
        same_q, same_k = qk_norm_rotary(x, x, weight, weight, 1e-6, 1e-6, cos, sin)
        return ((q + k) + (same_q + same_k)) / 4 + swiglu(gate * 1, up * 1)

    def plain(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight.to(x.dtype)
        first, second = y.chunk(2, -1)
        c, s = (table[:, :, None].to(x.dtype) for table in (cos, sin))
        return y * c + torch.cat([-second, first], -1) * s + nn.functional.silu(gate) * up

    def run(compute: Callable[..., Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in (x, gate, up)]
        named = dict(zip(("x", "gate", "up"), inputs, strict=True))
        return _gradients(compute(*inputs), dy.to(dtype), **named)

    return _compared(here, run(ours, here.dtype), run(plain, here.dtype), run(plain, torch.float64))


def _attention(here: _Place) -> Outcome:
    q, k, v = (
        here.random(2, heads, 150, 32, seed=number) for number, heads in ((5, 4), (6, 2), (7, 2))
    )
    dy = here.random(2, 4, 150, 32, seed=8)

    def run(attend: Callable[..., Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in (q, k, v)]
        named = dict(zip("qkv", inputs, strict=True))
        return _gradients(attend(*inputs), dy.to(dtype), **named)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (tensor.repeat_interleave(2, dim=1) for tensor in (k, v))
        future = torch.ones(150, 150, dtype=torch.bool, device=q.device).triu(1)
        scores = (q @ k.transpose(2, 3) / 32**0.5).masked_fill(future, -torch.inf)
        return torch.softmax(scores, -1) @ v

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if here.device == "cpu":
            return causal_attention(q, k, v, scale=32**-0.5)
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return _compared(here, run(ours, here.dtype), run(plain, here.dtype), run(plain, torch.float64))


def _optimizer(here: _Place) -> Outcome:
    rate, betas, epsilon, decay = 1e-2, (0.9, 0.999), 1e-8, 0.1
    start = here.random(3, 2000, seed=9).float()
    wide, coded = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizers = [
        AdamW([wide], rate, betas, epsilon, decay),
        AdamW([coded], rate, betas, epsilon, decay, state_bits=8),
    ]
    truth = start.double()
    mean, square = torch.zeros_like(truth), torch.zeros_like(truth)
    for step in range(1, 11):
        gradient = here.random(3, 2000, seed=9 + step).float()
        wide.grad, coded.grad = gradient, gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
        mean = betas[0] * mean + (1 - betas[0]) * gradient.double()
        square = betas[1] * square + (1 - betas[1]) * gradient.double() ** 2
        root = (square / (1 - betas[1] ** step)) ** 0.5 + epsilon
        truth = truth - rate * (decay * truth + mean / (1 - betas[0] ** step) / root)
    errors = {"wide": _error(wide.detach(), truth), "coded": _error(coded.detach(), truth)}
    return Outcome(
        errors["wide"] < 1e-6 and errors["coded"] < _CODED_STATE,
        f"error from float64 after 10: {errors['wide']:.1e}, of 8-bit state {errors['coded']:.1e}",
        {"errors": errors, "allowed": {"wide": 1e-6, "coded": _CODED_STATE}},
    )


# --- training -----------------------------------------------------------------------------------


class _Trained(NamedTuple):
    losses: list[float]
    adapters: list[Tensor]


def _tiny(here: _Place) -> tuple[Any, dict[str, nn.Parameter], list[Batch]]:
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model = build(config, BaseRecipe(compute_dtype=here.dtype, device=here.device))
    with torch.device("meta"):
        names = type(model)(config).state_dict()
    for seed, (name, tensor) in enumerate(names.items()):
        shape = tuple(tensor.shape)
        load_tensor(model, name, torch.ones(shape) if len(shape) == 1 else _normal(shape, seed))
    finalize(model)
    attach(model, LoRAConfig(r=16, alpha=16), seed=0)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, _VOCABULARY, (2, 2, 33), generator=generator).to(here.device)
    batches = [Batch(one[:, :-1].contiguous(), one[:, 1:].contiguous()) for one in ids]
    return model, adapter_parameters(model), batches


def _normal(shape: Sequence[int], seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.08


def _engine(here: _Place) -> Outcome:
    model, parameters, batches = _tiny(here)
    for number, parameter in enumerate(parameters.values()):
        parameter.data.copy_(_normal(parameter.shape, number))  # B is zero, and A's gradient then
    engine, message = choose_engine(model, here.device)
    tokens = float(sum(batch.labels.numel() for batch in batches))
    ours = float(engine.step(batches, tokens, ActivationPolicy(1)))
    got = {name: parameter.grad.double() for name, parameter in parameters.items()}  # type: ignore[union-attr]
    for parameter in parameters.values():
        parameter.grad = None
    plain = 0.0
    for batch in batches:
        logits = model(input_ids=batch.input_ids, use_cache=False).logits.float().flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, batch.labels.flatten(), reduction="sum") / tokens
        loss.backward()  # type: ignore[no-untyped-call]
        plain += float(loss.detach())
    truth = {name: parameter.grad.double() for name, parameter in parameters.items()}  # type: ignore[union-attr]
    worst = max(_error(got[name], truth[name]) for name in truth)
    apart = abs(ours / plain - 1)
    limit = 1e-4 if here.dtype == torch.float32 else 5e-2
    return Outcome(
        worst < limit and apart < limit,
        f"loss apart by {apart:.1e}, gradients by {worst:.1e} at most; {message}",
        {"loss_difference": apart, "gradient_difference": worst, "allowed": limit},
    )


def _train(here: _Place) -> _Trained:
    model, parameters, batches = _tiny(here)
    engine, _ = choose_engine(model, here.device)
    options = dict.fromkeys(("model", "data", "output"), "self-test")
    config = check(TrainConfig, options)
    trainer = Trainer(engine, parameters, config, Schedule(1e-2, "constant", 0, _STEPS))
    trainer.fit([[(2, 32)] * 2], [[32] * 4])
    trainer.capture()
    losses: list[float] = []
    trainer.train(range(_STEPS), lambda _: batches, lambda _, result: losses.append(result.loss))
    return _Trained(losses, [parameter.detach().clone() for parameter in parameters.values()])


def _learning(here: _Place) -> Outcome:
    losses = _train(here).losses
    return Outcome(
        losses[-1] < _MUST_FALL_TO * losses[0],
        f"loss {losses[0]:.2f}, after {_STEPS} steps {losses[-1]:.2f}",
        {"first_loss": losses[0], "last_loss": losses[-1], "steps": _STEPS},
    )


def _again(here: _Place) -> Outcome:
    with deterministic(here.device == "cuda"):
        one, other = _train(here), _train(here)
    equal = one.losses == other.losses
    same = sum(torch.equal(a, b) for a, b in zip(one.adapters, other.adapters, strict=True))
    message = (
        f"{_STEPS} losses {'equal' if equal else 'differ'}, {same} of {len(one.adapters)} tensors"
    )
    return Outcome(
        equal and same == len(one.adapters),
        message + " equal, to the bit",
        {"losses_equal": equal, "equal_tensors": same, "tensors": len(one.adapters)},
    )
