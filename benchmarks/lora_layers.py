"""The contestants of gpu_linear.py: the linears of one decoder layer with LoRA on all seven.

Each is built from the same bfloat16 weights and the same adapters; q/k/v read one tensor, gate/up
another, and every input requires a gradient. Nothing here is timed.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from measuring import from_bitsandbytes, settle_unsloth
from torch import Tensor, nn

from halfbyte.linear.frozen import FrozenLinear
from halfbyte.linear.lora import LoRAConfig, adapters, attach
from halfbyte.models.build import share_inputs
from halfbyte.quant import dequantize, quantize

RANK, ALPHA = 16, 32
INPUT_OF = {  # which input each linear reads
    "q_proj": "attention",
    "k_proj": "attention",
    "v_proj": "attention",
    "o_proj": "output",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "down",
}
Tensors = dict[str, Tensor]
Adapters = dict[str, tuple[Tensor, Tensor]]  # the A and B that all start from


class Batch(NamedTuple):
    """Inputs by name, leaves that want a gradient, and a gradient for each linear's output."""

    inputs: Tensors
    gradients: Tensors


class Contestant(NamedTuple):
    """A layer, how its outputs are computed, and the W that it multiplies with, in float64."""

    outputs: Callable[[Tensors], Tensors]
    a: Tensors
    b: Tensors
    exact: Callable[[str], Tensor]


def make_batch(shapes: dict[str, tuple[int, int]], tokens: int, device: str) -> Batch:
    inputs, gradients = {}, {}
    for name, (rows, columns) in shapes.items():
        if INPUT_OF[name] not in inputs:
            x = torch.randn(1, tokens, columns, device=device).to(torch.bfloat16)
            inputs[INPUT_OF[name]] = x.requires_grad_()
        gradients[name] = torch.randn(1, tokens, rows, device=device).to(torch.bfloat16)
    return Batch(inputs, gradients)


def our_layer(weights: Tensors, *, quant: bool) -> nn.Module:
    """A layer as halfbyte builds it: frozen linears, packed or plain, with fresh adapters."""
    layer = nn.Module()
    for name, weight in weights.items():
        rows, columns = weight.shape
        packed = quantize(weight) if quant else None
        linear = FrozenLinear(columns, rows, quantized=packed, dtype=weight.dtype)
        if not quant:
            linear.weight = nn.Parameter(weight, requires_grad=False)
        setattr(layer, name, linear)
    share_inputs(layer)
    attach(layer, LoRAConfig(r=RANK, alpha=ALPHA), seed=0)
    return layer


def our_outputs(layer: nn.Module, inputs: Tensors) -> Tensors:
    """What a decoder layer of halfbyte calls."""
    return {name: getattr(layer, name)(inputs[source]) for name, source in INPUT_OF.items()}


def ours(weights: Tensors, initial: Adapters, *, quant: bool) -> Contestant:
    layer = our_layer(weights, quant=quant)
    found = adapters(layer)
    for name, (a, b) in initial.items():
        found[name].lora_A.data.copy_(a)
        found[name].lora_B.data.copy_(b)

    def exact(name: str) -> Tensor:
        packed = getattr(layer, name).quantized
        if packed is None:
            return weights[name].double()
        return dequantize(packed, torch.float32, impl="torch").double()

    a = {name: found[name].lora_A for name in INPUT_OF}
    b = {name: found[name].lora_B for name in INPUT_OF}
    return Contestant(lambda inputs: our_outputs(layer, inputs), a, b, exact)


def peft_layer(weights: Tensors) -> nn.Module:
    """Bitsandbytes' 4-bit linears under PEFT's LoRA, adapters in float32."""
    import bitsandbytes as bnb
    from peft import LoraConfig, get_peft_model

    layer = nn.Module()
    for name, weight in weights.items():
        rows, columns = weight.shape
        linear = bnb.nn.Linear4bit(
            columns,
            rows,
            bias=False,
            compute_dtype=torch.bfloat16,
            compress_statistics=True,
            quant_type="nf4",
            device="meta",
        )
        linear.weight = bnb.nn.Params4bit(
            weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=linear
        ).to(weight.device)
        setattr(layer, name, linear)
    layer.is_loaded_in_4bit = True
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(INPUT_OF), lora_dropout=0.0)
    get_peft_model(layer, config).train()  # it puts its layers into `layer`
    return layer


def peft(weights: Tensors, initial: Adapters) -> tuple[Any, Contestant]:
    layer = peft_layer(weights)
    a = {name: getattr(layer, name).lora_A.default.weight for name in INPUT_OF}
    b = {name: getattr(layer, name).lora_B.default.weight for name in INPUT_OF}
    for name in INPUT_OF:
        a[name].data.copy_(initial[name][0])
        b[name].data.copy_(initial[name][1])

    def outputs(inputs: Tensors) -> Tensors:
        with torch.autocast(inputs["mlp"].device.type, dtype=torch.bfloat16):
            return our_outputs(layer, inputs)  # by the same names

    def exact(name: str) -> Tensor:
        held = getattr(layer, name).base_layer.weight
        packed = from_bitsandbytes(held.data, held.quant_state)
        return dequantize(packed, torch.float32, impl="torch").double()

    return layer, Contestant(outputs, a, b, exact)


def unsloth(layer: Any, of_peft: Contestant) -> Contestant:
    """Unsloth's functions over the same layer of PEFT's.

    `inplace` would write dX over x, and so change the inputs; it saves memory, not work.
    """
    settle_unsloth()
    import unsloth  # noqa: F401
    from unsloth.kernels import fast_lora

    def outputs(inputs: Tensors) -> Tensors:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            q, k, v = fast_lora.apply_lora_qkv(layer, inputs["attention"], inplace=False)
            o = fast_lora.apply_lora_o(layer, inputs["output"])
            down = fast_lora.apply_lora_mlp_swiglu(layer, inputs["mlp"], inplace=False)
        return {"q_proj": q, "k_proj": k, "v_proj": v, "o_proj": o, "down_proj": down}

    return Contestant(outputs, of_peft.a, of_peft.b, of_peft.exact)


def differentiate(one: Contestant, batch: Batch, inputs: Iterable[str] = ()) -> list[Tensor]:
    """Forward and backward: the gradients of the inputs, of every A, of every B."""
    outputs = one.outputs(batch.inputs)
    wanted = [batch.inputs[name] for name in inputs or batch.inputs]
    wanted += [*one.a.values(), *one.b.values()]
    return list(
        torch.autograd.grad(list(outputs.values()), wanted, [batch.gradients[n] for n in outputs])
    )
