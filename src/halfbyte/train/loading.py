"""Opens a base model: chooses device and dtype, loads it, attaches an adapter, and logs it all."""

import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halfbyte.checkpoint.base_model import (
    BaseSource,
    LayerStore,
    LoadedBase,
    load_base,
    open_base,
)
from halfbyte.checkpoint.cache import cached
from halfbyte.checkpoint.identity import require_same_base
from halfbyte.checkpoint.peft import load_adapter, template_in
from halfbyte.checkpoint.reading import rope_scaling_in
from halfbyte.config.schema import TrainConfig
from halfbyte.data.named_templates import choose_template
from halfbyte.layers.multimodal import decoder_layers
from halfbyte.linear.experts import ExpertLinear
from halfbyte.linear.fp8_check import check_kernels
from halfbyte.linear.fp8_choice import use_fp8
from halfbyte.linear.lora import LoRAConfig, frozen_linears
from halfbyte.models.build import BaseRecipe
from halfbyte.quant.format import gpu_kernels
from halfbyte.runtime.precision import choose_device_and_dtype

if TYPE_CHECKING:
    from halfbyte.report import RunReport


class Loading:
    """Loads a base model: in a thread if `start` is called, otherwise in `result`.

    A context manager, which stops the thread on exit.

    Args:
        source: The model.
        recipe: How to store its weights.
        tokenizer: The source's, if it has been read before.
        cache: Whether to load from a packed copy in the user's cache.
        store: Where the frozen weights of layers wait, if not on the device.

    Attributes:
        seconds: How long loading took.
    """

    def __init__(
        self,
        source: BaseSource,
        recipe: BaseRecipe,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        cache: bool = False,
        store: LayerStore | None = None,
    ) -> None:
        self._name, self._left_out, self.seconds = source.name, source.left_out, 0.0
        self._load = partial(
            load_base,
            source,
            recipe,
            tokenizer=tokenizer,
            progress=self._tell,
            packed_copy=cached if cache else None,
            store=store,
        )
        self._gpu = torch.cuda.current_device() if recipe.device == "cuda" else None
        self._progress: Callable[[int, int], None] | None = None
        self._stopped = False
        self._thread = ThreadPoolExecutor(1, "load-base")
        self._loaded: Future[LoadedBase] | None = None

    def start(self) -> None:
        """Start loading in a thread."""
        self._loaded = self._thread.submit(self._timed)

    def result(self, report: "RunReport | None") -> LoadedBase:
        """Return the model; show progress, and log what was packed and what was not.

        Raises:
            UserError: As `load_base`.
        """
        if report is None:
            return self._timed() if self._loaded is None else self._loaded.result()
        with report.task(f"loading {self._name}") as self._progress:
            base = self._timed() if self._loaded is None else self._loaded.result()
        for line in (self._left_out, *base.memory_report.lines()):
            if line is not None:
                report.note(line)
        return base

    def _timed(self) -> LoadedBase:
        if self._gpu is not None:
            torch.cuda.set_device(self._gpu)  # a thread has a current device of its own
        began = time.perf_counter()
        base = self._load()
        self.seconds = time.perf_counter() - began
        return base

    def _tell(self, done: int, total: int) -> None:
        if self._stopped:
            raise _Stopped
        if self._progress is not None:
            self._progress(done, total)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped = True
        self._thread.shutdown()


class _Stopped(Exception):
    """The model is no longer needed."""


def open_model(
    model: str | BaseSource,
    *,
    adapter: str | None = None,
    quant: Literal["nf4", "fp4", "none"] = "nf4",
    double_quant: bool = True,
    block_size: int = 64,
    quantize_head: bool = False,
    quantize_embeddings: bool = False,
    quant_search: bool = False,
    compute_dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    cache_quantized: bool = False,
    allow_mismatch: bool = False,
    chat_template: str | None = None,
    report: "RunReport | None" = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, LoadedBase]:
    """Open a base model, optionally with an adapter, for generation or evaluation.

    Args:
        model: A directory of safetensors, a GGUF file, or a hub id; or the result of `open_base`.
        adapter: Directory of an adapter that was trained on this base model.
        quant: How to store the linears: ``nf4``, ``fp4`` or ``none``.
        double_quant: Whether to quantise the scales.
        block_size: Weights that share a scale.
        quantize_head: Whether to pack the output head too.
        quantize_embeddings: Whether to pack the embedding too.
        quant_search: Whether to search for the scales of least error.
        compute_dtype: ``auto``, ``float32``, ``bfloat16`` or, on a GPU, ``float16``.
        device: ``auto``, ``cpu`` or ``cuda``.
        revision: Branch, tag or commit of a hub model.
        cache_quantized: Whether to load from a packed copy in the user's cache, created if needed.
        allow_mismatch: Whether to use the adapter, with a warning, with a base model, tokenizer or
            template other than the one it was trained with.
        chat_template: See ``data.named_templates``; None: that of the adapter's training.
        report: Logs, and shows progress.

    Raises:
        UserError: If the model or the adapter is missing or damaged, or they do not match.
    """
    resolved, dtype, why = choose_device_and_dtype(device, compute_dtype)
    source = model if isinstance(model, BaseSource) else open_base(model, revision=revision)
    loaded = None if adapter is None else load_adapter(adapter)
    if loaded is not None:
        loaded.require_layers_of(source.skeleton)
        source.chat_template = template_in(loaded.info)
        source.scale_rope(rope_scaling_in(loaded.info))
    if chat_template is not None:
        use_template(source, chat_template, report)
    recipe = BaseRecipe(
        quant,
        double_quant,
        block_size,
        dtype,
        resolved,
        quantize_head,
        quantize_embeddings,
        quant_search,
    )
    if report is not None:
        report.note(f"on {resolved}, products in {str(dtype).removeprefix('torch.')}: {why}")
    with Loading(source, recipe, cache=cache_quantized) as loading:
        base = loading.result(report)
    if loaded is not None:
        require_same_base(loaded, base, allow_mismatch=allow_mismatch)
        loaded.put_on(base.model)
    return base.model, base.tokenizer, base


def use_template(source: BaseSource, wanted: str, report: "RunReport | None") -> None:
    """Have a base model use another chat template than its tokenizer's; see `choose_template`.

    Raises:
        ConfigError: If there is no such template, or the tokenizer cannot be used with it.
    """
    source.chat_template, notes = choose_template(wanted, source.tokenizer())
    if report is not None:
        for note in notes:
            report.note(note)


def recipe_of(config: TrainConfig, dtype: torch.dtype, device: str) -> BaseRecipe:
    """Return how a run stores its base model."""
    return BaseRecipe(
        quant=config.quant,
        double_quant=config.double_quant,
        block_size=config.block_size,
        compute_dtype=dtype,
        device=device,
        quantize_head=config.quantize_head,
        quantize_embeddings=config.quantize_embeddings,
        quant_search=config.quant_search,
    )


def choose_products(model: PreTrainedModel, config: TrainConfig) -> list[str]:
    """Have the frozen linears of layers compute as a run wants; return what is to be said of it.

    Raises:
        ConfigError: FP8's kernels give wrong numbers on this GPU.
    """
    if config.compute != "fp8":
        return []
    if model.device.type == "cuda" and gpu_kernels() is not None:
        check_kernels(model.device)
    layers = decoder_layers(model)
    linears = [linear for layer in layers for linear in frozen_linears(layer).values()]
    said = [use_fp8(linears)]
    if any(isinstance(m, ExpertLinear) for layer in layers for m in layer.modules()):
        said.append("experts stay in 16 bits")
    return said


def lora_of(config: TrainConfig) -> LoRAConfig:
    """Return the adapters that a run trains."""
    return LoRAConfig(
        r=config.lora_r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        target_modules=config.target_modules,
        rank_pattern=config.rank_pattern,
        alpha_pattern=config.alpha_pattern,
        use_dora=config.use_dora,
        modules_to_save=config.modules_to_save,
        target_parameters=config.target_parameters,
    )


def recipe_metadata(recipe: BaseRecipe) -> dict[str, Any]:
    """Return ``recipe`` as JSON values, for the adapter's ``halfbyte.json``."""
    found = dataclasses.asdict(recipe)
    del found["device"]  # where, not how
    return found | {"compute_dtype": str(recipe.compute_dtype).removeprefix("torch.")}
