"""A trained adapter merged into its base: a plain 16-bit model, for any program that loads one.

What is written is D + s·B·A, with D the *decoded* 4-bit base: exactly the function that was trained
and evaluated. Adding the update to the original 16-bit weights instead would bring back the
quantisation error the adapter has learned to live with; quantising the sum again would round small
updates away. The sum is made in float32 and rounded once, one linear layer at a time.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from halfbyte.checkpoint.atomic import new_directory, require_writable
from halfbyte.checkpoint.directory import write_description
from halfbyte.checkpoint.safetensors_file import SHARD_BYTES, Planned, write_model
from halfbyte.checkpoint.source import skeleton_of
from halfbyte.lora import delta
from halfbyte.model.build import frozen_linears


def write_merged(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    out_dir: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    *,
    replace: bool = False,
    progress: Callable[[int, int], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write ``model`` with its adapters merged in; the model in memory is left as it is.

    Beside the model, memory holds one layer's weight in float32, twice.

    Args:
        model: A model of ``load_base``, with or without adapters.
        tokenizer: Its tokenizer.
        config: Its configuration.
        out_dir: Where to.
        dtype: What the floating tensors are written in.
        replace: Whether ``out_dir`` may be there already; it goes when the new one is whole.
        progress: Called with (bytes written, bytes in all) after each tensor.
        shard_bytes: The most tensor bytes in a file.

    Returns:
        ``out_dir``.

    Raises:
        OutputError: If ``out_dir`` is there and is not to be replaced, cannot be written, or there
            is no space.
    """
    out_dir = Path(out_dir)
    skeleton = skeleton_of(config, config.name_or_path, len(model.state_dict()))
    tied: dict[str, str] = skeleton.all_tied_weights_keys
    # A head the files held apart although config.json ties it is no tie: it is written.
    same = {name for name, of in tied.items() if _held(model, name) is _held(model, of)}
    plan = [
        Planned(name, dtype if empty.is_floating_point() else empty.dtype, tuple(empty.shape))
        for name, empty in skeleton.state_dict().items()
        if name not in same
    ]
    require_writable(out_dir.absolute().parent, sum(planned.nbytes for planned in plan))
    with new_directory(out_dir, replace=replace) as directory:
        write_model(directory, plan, _merged(model, plan, progress), shard_bytes=shard_bytes)
        write_description(
            directory,
            config,
            model_class=type(skeleton).__name__,
            dtype=dtype,
            tokenizer=tokenizer,
            generation_config=model.generation_config,
        )
    return out_dir


def _held(model: PreTrainedModel, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(path), leaf)  # type: ignore[no-any-return]


def _merged(
    model: PreTrainedModel, plan: list[Planned], progress: Callable[[int, int], None] | None
) -> Iterator[tuple[str, Tensor]]:
    linears = frozen_linears(model)
    done, total = 0, sum(planned.nbytes for planned in plan)
    for planned in plan:
        path, _, leaf = planned.name.rpartition(".")
        linear = linears.get(path)
        if linear is None or leaf != "weight":
            yield planned.name, _held(model, planned.name).to(planned.dtype)
        else:
            weight = linear.dense(torch.float32)
            if linear.adapter is not None:
                weight = weight + delta(linear)
            yield planned.name, weight.to(planned.dtype)
            del weight
        done += planned.nbytes
        if progress is not None:
            progress(done, total)
