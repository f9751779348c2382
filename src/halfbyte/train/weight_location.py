"""Decides where the frozen weights of layers are while a step does not need them.

On the GPU if a step fits beside them, otherwise in host memory, otherwise on the disk; with
``shard``, divided among the processes of the machine, on their GPUs or in host memory. This is
decided before anything is loaded, from the plan's arithmetic, for one example of ``max_length``
tokens. When the run's data is known, as many layers as fit are brought to the GPU after all
(engine/memory_policy.py), so a cautious decision costs little.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal, NamedTuple

import torch
from transformers import PreTrainedModel

from halfbyte.checkpoint.base_model import LayerStore
from halfbyte.config.schema import TrainConfig
from halfbyte.engine.memory_policy import FREE_SHARE, MARGIN, free_memory
from halfbyte.errors import ConfigError
from halfbyte.linear.layer_store import DiskLayers, HostLayers
from halfbyte.linear.layer_stream import stream_of
from halfbyte.linear.sharded_layers import ShardedLayers
from halfbyte.models.build import BaseRecipe
from halfbyte.plan.advice import smallest_parts
from halfbyte.plan.holding import Holding
from halfbyte.plan.ledger import Ledger, Run, ledger, policy_of
from halfbyte.plan.model_shape import ModelShape
from halfbyte.runtime import device as devices
from halfbyte.runtime.distributed import ProcessGroup
from halfbyte.user_cache import cache_home

# Share of the host's free memory that waiting weights may take.
HOST_SHARE = 0.8

Location = Literal["gpu", "host", "disk", "gpus"]


class WeightLocation(NamedTuple):
    """Where weights wait.

    Attributes:
        location: The place.
        store: For `load_base`; None on the device.
        message: Why, for the user; empty if there is nothing to say.
    """

    location: Location
    store: LayerStore | None = None
    message: str = ""


class Processes(NamedTuple):
    """The processes of a run on this machine; see `runtime.distributed.ProcessGroup`."""

    size: int = 1
    rank: int = 0

    @classmethod
    def of(cls, group: ProcessGroup) -> "Processes":
        """Return those of a run's processes that are on this machine."""
        return cls(group.on_this_host, group.rank_on_this_host)


def locate(
    config: TrainConfig,
    shape_of: Callable[[], ModelShape],
    recipe: BaseRecipe,
    processes: Processes = Processes(),  # noqa: B008
) -> WeightLocation:
    """Return where the weights of a run wait.

    Args:
        config: The options; ``weights`` other than auto is obeyed.
        shape_of: Returns the shape of the base model; called if it is needed.
        recipe: How it is stored.
        processes: Those that each hold the model, or a part of it.

    Raises:
        ConfigError: ``weights`` is disk, and there is no directory for them; or ``shard`` needs
            more processes.
    """
    wanted, on_gpu = config.weights, recipe.device == "cuda"
    if config.shard and processes.size == 1:
        raise ConfigError(
            "`shard` divides the weights among the processes of a machine, and there is one: start "
            "several with --gpus 2, or with torchrun"
        )
    if wanted == "disk":
        return WeightLocation("disk", _on_disk())
    if not config.shard and (not on_gpu or wanted == "gpu"):  # a CPU computes in host memory
        return WeightLocation("gpu")
    if wanted == "host" or not on_gpu:
        return WeightLocation("host", _in_memory(config, processes, "host"))
    if wanted == "gpu":
        return WeightLocation("gpus", _in_memory(config, processes, "gpu"))
    entries = _least(config, shape_of(), recipe, processes)
    budget = float(config.memory_budget or FREE_SHARE * free_memory("cuda"))
    if MARGIN * entries.needed <= budget:
        if config.shard:
            return WeightLocation("gpus", _in_memory(config, processes, "gpu"))
        return WeightLocation("gpu")
    whole = _least(config, shape_of(), recipe, None).base
    waiting, room = (
        whole * (1 if config.shard else processes.size),
        HOST_SHARE * free_memory("cpu"),
    )
    need = (
        f"with all weights on the GPU{'s' * config.shard} a step needs "
        f"{MARGIN * entries.needed / 1e9:.1f} GB of {budget / 1e9:.1f}"
    )
    if waiting <= room or config.shard:
        return WeightLocation(
            "host",
            _in_memory(config, processes, "host"),
            f"{need}: those of layers wait in host memory",
        )
    return WeightLocation(
        "disk",
        _on_disk(),
        f"{need}, and host memory has room for {room / 1e9:.1f} GB: those of layers wait on the "
        "disk",
    )


def connect(model: PreTrainedModel, group: ProcessGroup) -> None:
    """Let the processes of a machine read each other's part of the weights, once all are loaded.

    Raises:
        ConfigError: They cannot.
    """
    stream = stream_of(model)
    if stream is not None and isinstance(stream.source, ShardedLayers):
        stream.source.connect(group, machine=group.host)


def _in_memory(
    config: TrainConfig, processes: Processes, place: Literal["gpu", "host"]
) -> LayerStore:
    if not config.shard:
        return HostLayers
    return partial(ShardedLayers, rank=processes.rank, size=processes.size, place=place)


def _least(
    config: TrainConfig, shape: ModelShape, recipe: BaseRecipe, processes: Processes | None
) -> Ledger:
    """Return the memory of a step of one example, with all that saves activations.

    With ``shard``, of one of the processes, if they are given.
    """
    spec = devices.spec_of(torch.device(recipe.device))
    run = Run(
        Holding.of(recipe),
        config.lora_r,
        length=config.max_length,
        optimizer=config.optim,
        device=recipe.device,
        gpu=spec,
        embedding_on_host=True,
        fp8=config.compute == "fp8",
    )
    if config.shard and processes is not None:
        run = replace(run, waits="gpus", shards=processes.size)
    policy = policy_of(shape, run, 0, offload=config.activations in ("auto", "offload"))
    streamed = shape.layers if run.waits else 0
    return ledger(shape, smallest_parts(replace(run, policy=replace(policy, streamed=streamed))))


def _on_disk() -> LayerStore:
    directory = cache_home() / "weights"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"weights: disk needs a directory in the user's cache: {error}") from None
    return partial(DiskLayers, directory=directory)
