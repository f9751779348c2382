"""Finds the first tensor of a step that is not finite.

Normal steps pay nothing for this. After a step whose loss or gradient is NaN or infinite, its
micro-batches go through the model again, module by module without fused layers or CUDA graphs, and
every output is looked at. If all are finite, the loss is. Then it was backward: the gradients that
the step has left are looked at in its order, from the last layer to the first.

The forward pass is made without the adapters' dropout, which can hide a value that is not finite
but hardly make one.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from halfbyte.engine.autograd import AutogradEngine
from halfbyte.engine.layerwise import LayerEngine
from halfbyte.engine.packing import Batch
from halfbyte.errors import NonFiniteLossError
from halfbyte.runtime.device import is_out_of_memory


class FailedStep(NamedTuple):
    """A step whose loss or gradient is not finite.

    Attributes:
        step: Its number (0-based).
        loss: Mean token loss.
        grad_norm: Norm of all gradients, before clipping.
        batches: Its micro-batches.
        updated: Whether layers were updated before it was known.
        message: A sentence for the user.
    """

    step: int
    loss: float
    grad_norm: float
    batches: Sequence[Batch]
    updated: bool
    message: str


def diverged(step: int, loss: float, grad_norm: float, updated: bool) -> str:
    """Return the message about a failed step (0-based)."""
    changed = "Some layers were updated" if updated else "Nothing was updated"
    return (
        f"step {step + 1}: loss {loss}, gradient norm {grad_norm}. {changed}. Try a lower "
        "learning_rate, or compute_dtype float32"
    )


def raise_nonfinite(failed: FailedStep) -> NoReturn:
    """Raise a `NonFiniteLossError` with the message of a failed step."""
    raise NonFiniteLossError(failed.message)


class Origin(NamedTuple):
    """The first tensor that is not finite.

    Attributes:
        name: What it is, for the user; empty if there is none.
        tensors: It, and tensors it was computed from, by name, as JSON values (`_summary`).
        micro_batch: The index of its micro-batch; None if it is of the whole step.
        rows: The rows of that micro-batch in which it is not finite.
        why: If there is none, a sentence about that.
    """

    name: str
    tensors: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
    micro_batch: int | None = None
    rows: tuple[int, ...] = ()
    why: str = ""


def find_origin(
    engine: LayerEngine | AutogradEngine,
    parameters: Mapping[str, nn.Parameter],
    failed: FailedStep,
) -> Origin:
    """Return the first tensor of a failed step that is not finite.

    Args:
        engine: Made the step; its parameters are those of the step.
        parameters: The trained parameters, by name, with the gradients of the step.
        failed: The step.
    """
    try:
        found = _in_forward(engine, failed.batches)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return Origin("", why="there was not enough memory to look for it")
    return found or _in_backward(engine.model, parameters)


# --- forward -------------------------------------------------------------------------------------


def _in_forward(engine: LayerEngine | AutogradEngine, batches: Sequence[Batch]) -> Origin | None:
    plain = engine
    if isinstance(engine, LayerEngine) and engine.fused:
        plain = LayerEngine(engine.model)  # fused layers do not call their modules
        plain.tuple_output = engine.tuple_output
    unpadded, plain.unpadded = plain.unpadded, None  # not packed, a row is an example
    try:
        for index, batch in enumerate(batches):
            with _watched(engine.model, len(batch.input_ids)) as found:
                loss = plain.loss([batch], engine.objective)
            if found:
                return found[0]._replace(micro_batch=index)
            if not loss.isfinite():
                rows = tuple(range(len(batch.input_ids)))
                return Origin("the loss, or the logits it is computed from", {}, index, rows)
    finally:
        plain.unpadded = unpadded
    return None


@contextmanager
def _watched(model: nn.Module, rows: int) -> Iterator[list[Origin]]:
    """Yield a list that gets the first output of a module that is not finite.

    A module's output is complete after those of its parts, so the innermost comes first.

    Args:
        model: The model.
        rows: Rows of the micro-batch, the leading dimension of most outputs.
    """
    found: list[Origin] = []
    names = {module: name or "the model" for name, module in model.named_modules()}

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        bad = next((one for one in _float_tensors(output) if not one.isfinite().all()), None)
        if bad is not None and not found:
            tensors = {"output": _summary(bad)} | _beside(module, [args, kwargs])
            name = f"the output of {names[module]}"
            found.append(Origin(name, tensors, None, _rows_of(bad, rows)))

    hooks = [module.register_forward_hook(look, with_kwargs=True) for module in names]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _beside(module: nn.Module, given: Any) -> dict[str, dict[str, Any]]:
    """Return summaries of a module's first input, and of its own parameters and adapter."""
    tensors = {}
    if (first := next(_float_tensors(given), None)) is not None:
        tensors["input"] = _summary(first)
    for name, parameter in module.named_parameters():
        if name.count(".") <= 1:
            tensors[name] = _summary(parameter)
    return tensors


def _rows_of(tensor: Tensor, rows: int) -> tuple[int, ...]:
    """Return the rows in which a tensor is not finite; all if it does not have these rows."""
    if len(tensor) != rows:
        return tuple(range(rows))
    return tuple((~tensor.isfinite()).flatten(1).any(1).nonzero().flatten().tolist())


def _float_tensors(value: Any) -> Iterator[Tensor]:
    """Yield the floating-point tensors in a module's arguments or output."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.dim():
            yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _float_tensors(one)
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _float_tensors(one)


# --- backward ------------------------------------------------------------------------------------


def _in_backward(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Origin:
    """Return the first gradient of a trained parameter, in the order of backward."""
    order = {parameter: index for index, parameter in enumerate(model.parameters())}
    last_first = sorted(parameters.items(), key=lambda item: order[item[1]], reverse=True)
    square = 0.0
    for name, parameter in last_first:
        if parameter.grad is None:
            continue
        if not parameter.grad.isfinite().all():
            tensors = {"gradient": _summary(parameter.grad), "parameter": _summary(parameter)}
            return Origin(f"the gradient of {name}", tensors)
        square += float(parameter.grad.double().square().sum())
    if square > torch.finfo(torch.float32).max:
        return Origin("the norm of all gradients, whose square overflows")
    return Origin("", why="every output and every gradient is finite when the step is repeated")


def _summary(tensor: Tensor) -> dict[str, Any]:
    """Return shape, dtype, how many values are not finite, and the range of the others."""
    tensor = tensor.detach()
    bad, low, high = ~tensor.isfinite(), math.inf, -math.inf
    if tensor.numel():
        low = float(tensor.masked_fill(bad, math.inf).min())
        high = float(tensor.masked_fill(bad, -math.inf).max())
    return {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "nan": int(tensor.isnan().sum()),
        "infinite": int(tensor.isinf().sum()),
        "min": low if math.isfinite(low) else None,
        "max": high if math.isfinite(high) else None,
    }


def in_words(summary: Mapping[str, Any]) -> str:
    """Return a tensor's summary as a phrase, such as ``bfloat16 [2, 9], 3 NaN``."""
    shape = f"{summary['dtype']} {summary['shape']}"
    counts = [f"{summary[key]} {key}" for key in ("nan", "infinite") if summary[key]]
    values = [one.replace("nan", "NaN") for one in counts]
    if summary["min"] is not None:
        rest = "the others from" if values else "from"
        values.append(f"{rest} {summary['min']:.3g} to {summary['max']:.3g}")
    return ", ".join([shape, *values])
