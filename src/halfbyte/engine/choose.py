"""Selection of the engine for a model: `LayerEngine` if it reproduces the model's loss.

On a GPU all kernels of a step are compiled ahead in parallel, by a dry run of its parts
(runtime/compile_ahead.py). A model whose loss `LayerEngine` does not reproduce is trained by
`AutogradEngine`, and the reason is reported. So is the reason why documents are not packed
(engine/packing_check.py).
"""

import logging
from collections.abc import Sequence
from itertools import chain
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from halfbyte.engine.autograd import AutogradEngine
from halfbyte.engine.buckets import Buckets, PartShape
from halfbyte.engine.layerwise import LayerEngine
from halfbyte.engine.packing import Batch, part_of_shape
from halfbyte.engine.packing_check import pack_documents
from halfbyte.engine.recorded_layers import EngineError
from halfbyte.engine.router_loss import RouterLoss
from halfbyte.linear.lora import adapters
from halfbyte.linear.sequence_tiles import LONG_TOKENS, is_long
from halfbyte.optim import AdamW
from halfbyte.plan.policy import ActivationPolicy
from halfbyte.quant.format import gpu_kernels
from halfbyte.runtime.device import spec_of

logger = logging.getLogger("halfbyte")


def choose_engine(
    model: PreTrainedModel,
    device: str,
    *,
    graphs: bool = True,
    lengths: Sequence[Sequence[int]] = (),
    state_bits: Literal[8, 32] | None = None,
) -> tuple[LayerEngine | AutogradEngine, str]:
    """Return the engine for ``model`` and a one-line description with the reason.

    Args:
        model: A model of ``models.build``, adapters attached.
        device: ``cpu`` or ``cuda``. On a GPU with kernels, layers are fused.
        graphs: Whether passes may be CUDA graphs there.
        lengths: For each step of a run, the tokens of its documents; the kernels of these steps are
            compiled ahead.
        state_bits: Precision of the optimizer state, to compile its update as well.
    """
    on_gpu = device.startswith("cuda") and gpu_kernels() is not None
    vocabulary = int(model.config.get_text_config().vocab_size)
    try:
        engine = LayerEngine(model, fuse=on_gpu, graphs=graphs and on_gpu)
        if on_gpu:
            engine.max_seqlen = max(map(max, lengths), default=0)
            buckets = buckets_of(engine, lengths) if lengths and engine.packs else None
            compile_ahead(engine, buckets, vocabulary=vocabulary, state_bits=state_bits)
        probe(engine, vocabulary, device)
    except EngineError as error:
        plain = AutogradEngine(model)
        why = f"plain autograd, layer by layer is not possible: {error}"
        return plain, why + _packing(plain, vocabulary)
    packing = _packing(engine, vocabulary)  # first: it decides what the summary says
    return engine, engine.summary() + packing


def _packing(engine: LayerEngine | AutogradEngine, vocabulary: int) -> str:
    """Have an engine pack documents, if it can; return what to say of it."""
    if isinstance(engine, LayerEngine) and engine.fused:
        return ""  # fused layers take documents
    why = pack_documents(engine, vocabulary)
    if why is None and isinstance(engine, LayerEngine) and not engine.packs:
        why = "adapters have dropout, or a document is longer than the attention window"
    return "" if why is None else f", documents not packed: {why}"


@torch.no_grad()
def probe(engine: LayerEngine, vocabulary: int, device: str) -> None:
    """Compare an engine's loss with the model's own on a few tokens.

    Raises:
        EngineError: If they differ by more than rounding, or the layers cannot be called.
    """
    got, wanted = _probe_losses(engine, vocabulary, device)
    # The same products in the same dtype; only the summation order differs.
    if not torch.allclose(got, wanted, rtol=1e-4 if engine.dtype == torch.float32 else 2e-2):
        raise EngineError(f"run layer by layer, the loss of a probe is {got:.6f}, not {wanted:.6f}")


@torch.no_grad()
def _probe_losses(engine: LayerEngine, vocabulary: int, device: str) -> tuple[Tensor, Tensor]:
    """Return the loss of a few tokens as computed by an engine and by its model.

    Raises:
        EngineError: If the layers cannot be called.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (2, 9), generator=generator).to(device)
    outputs: list[int] = []
    watch = engine.layers[0].register_forward_hook(
        lambda _module, _args, output: outputs.append(isinstance(output, tuple) and len(output))
    )
    try:
        logits = engine.model(input_ids=ids[:, :-1], use_cache=False).logits.float()
    finally:
        watch.remove()
    engine.tuple_output = int(outputs[0]) if len(outputs) == 1 else 0
    targets = ids[:, 1:]
    wanted = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    try:
        return engine.loss([Batch(ids[:, :-1], targets)]), wanted
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        raise EngineError(f"its layers cannot be called one by one: {error}") from error


def minimise_router_loss(engine: LayerEngine | AutogradEngine, coefficient: float) -> None:
    """Have steps minimise the routers' auxiliary loss, too.

    Raises:
        ConfigError: If transformers' model has none.
    """
    loss = RouterLoss(engine.model, coefficient)
    if isinstance(engine, AutogradEngine):
        engine.router_loss = loss
        return
    engine.passes.router_loss = loss
    engine.stop_capturing("the loss of routers is computed between the passes")


def buckets_of(
    engine: LayerEngine, lengths: Sequence[Sequence[int]], part_tokens: int | None = None
) -> Buckets:
    """Return the shapes of parts for a run on the engine's device; see `Buckets.of`."""
    num_sms = spec_of(engine.model.device).num_sms
    return Buckets.of(lengths, engine.width, part_tokens, num_sms=num_sms)


def compile_ahead(
    engine: LayerEngine,
    buckets: Buckets | None,
    *,
    vocabulary: int | None = None,
    state_bits: Literal[8, 32] | None = None,
) -> None:
    """Compile the kernels of steps in parallel, if they are not in Triton's cache.

    Kernels that cannot be compiled ahead are compiled on launch.

    Args:
        engine: On a CPU there is nothing to compile.
        buckets: The shapes of parts.
        vocabulary: Size of the vocabulary, to compile the kernels of `probe` as well.
        state_bits: As in `choose_engine`.
    """
    if engine.model.device.type != "cuda":
        return
    from halfbyte.runtime.compile_ahead import compiling_ahead  # it imports triton

    gradients = [(p, p.grad) for p in engine.model.parameters() if p.requires_grad]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        with (
            torch.autograd.set_multithreading_enabled(False),
            compiling_ahead() as ahead,
        ):
            fused = buckets if engine.fused else None  # others run on no tokens of a shape
            for shape in (fused.largest, fused.smallest) if fused is not None else ():
                _run_passes(engine, shape)
            if vocabulary is not None and not ahead.needless:
                _probe_losses(engine, vocabulary, str(engine.model.device))
            if state_bits is not None and not ahead.needless:
                _run_update(state_bits, engine.model.device)
    except (RuntimeError, EngineError) as error:
        # An error of CUDA, torch or the engine is raised again when the result is needed.
        logger.info("kernels are compiled one by one, as a dry run failed: %s", error)
    finally:
        engine.passes.forget()
        engine.weights.forget()
        for linear in chain.from_iterable(engine.linears):
            linear.group.forget()
        for adapter in adapters(engine.model).values():
            adapter.forget()
        for parameter, grad in gradients:
            parameter.grad = grad
        torch.cuda.reset_peak_memory_stats()


def _run_passes(engine: LayerEngine, shape: PartShape) -> None:
    """Run two layers forward and backward, and the loss, like `LayerEngine.capture`.

    A long part has the kernels of a shorter one that is long.
    """
    if is_long(shape.rows, shape.tokens):
        shape = shape._replace(rows=1, tokens=LONG_TOKENS)
    (layer_input,) = engine.embed([part_of_shape(shape, engine.model.device)])
    engine.passes.warm_up(layer_input, ActivationPolicy(len(engine.layers)), whole=False)
    for supervised in {min(17, shape.numel), shape.numel}:  # aligned and unaligned pointers
        engine.loss_and_grad(
            layer_input.x, part_of_shape(shape, engine.model.device, supervised), 1.0
        )


def _run_update(bits: Literal[8, 32], device: torch.device) -> None:
    """Update one small parameter, in float32 as adapters are."""
    parameter = nn.Parameter(torch.zeros(4096, device=device))
    parameter.grad = torch.zeros_like(parameter)
    optimizer = AdamW([{"params": [parameter]}], lr=1.0, state_bits=bits)
    optimizer.step(grad_scale=torch.ones((), device=device))
