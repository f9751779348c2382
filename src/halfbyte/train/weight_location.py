"""Decides where the frozen weights of layers are while a step does not need them.

On the GPU if a step fits beside them, otherwise in host memory, otherwise on the disk. This is
decided before anything is loaded, from the plan's arithmetic, for one example of ``max_length``
tokens. When the run's data is known, as many layers as fit are brought to the GPU after all
(engine/memory_policy.py), so a cautious decision costs little.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal, NamedTuple

import torch

from halfbyte.checkpoint.base_model import BaseSource, LayerStore
from halfbyte.config.schema import TrainConfig
from halfbyte.engine.memory_policy import FREE_SHARE, MARGIN, free_memory
from halfbyte.errors import ConfigError
from halfbyte.linear.layer_store import DiskLayers, HostLayers
from halfbyte.models.build import BaseRecipe
from halfbyte.plan.advice import smallest_parts
from halfbyte.plan.holding import Holding
from halfbyte.plan.ledger import Ledger, Run, ledger, policy_of
from halfbyte.plan.model_shape import ModelShape
from halfbyte.runtime import device as devices
from halfbyte.train.memory_check import shape_of_source
from halfbyte.user_cache import cache_home

# Share of the host's free memory that waiting weights may take.
HOST_SHARE = 0.8

Location = Literal["gpu", "host", "disk"]


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


def locate(
    config: TrainConfig, source: BaseSource, recipe: BaseRecipe, *, processes: int = 1
) -> WeightLocation:
    """Return where the weights of a run wait.

    Args:
        config: The options; ``weights`` other than auto is obeyed.
        source: The base model.
        recipe: How it is stored.
        processes: Processes on this machine that each hold the model.

    Raises:
        ConfigError: ``weights`` is disk, but there is no directory for them.
    """
    return choose_location(config, partial(shape_of_source, source), recipe, processes=processes)


def choose_location(
    config: TrainConfig,
    shape_of: Callable[[], ModelShape],
    recipe: BaseRecipe,
    *,
    processes: int = 1,
) -> WeightLocation:
    """`locate` for a model of any origin, whose shape ``shape_of`` returns."""
    wanted = config.weights
    if wanted == "disk":
        return WeightLocation("disk", _on_disk())
    if recipe.device != "cuda" or wanted == "gpu":  # a CPU computes in host memory
        return WeightLocation("gpu")
    if wanted == "host":
        return WeightLocation("host", HostLayers)
    entries = _least(config, shape_of(), recipe)
    free = FREE_SHARE * free_memory("cuda")
    budget = float(config.memory_budget or free)
    if MARGIN * entries.needed <= budget:
        return WeightLocation("gpu")
    waiting, room = processes * entries.base, HOST_SHARE * free_memory("cpu")
    need = (
        f"with all weights on the GPU a step needs {MARGIN * entries.needed / 1e9:.1f} GB of "
        f"{budget / 1e9:.1f}"
    )
    if waiting <= room:
        return WeightLocation("host", HostLayers, f"{need}: those of layers wait in host memory")
    return WeightLocation(
        "disk",
        _on_disk(),
        f"{need}, and host memory has room for {room / 1e9:.1f} GB: those of layers wait on the "
        "disk",
    )


def _least(config: TrainConfig, shape: ModelShape, recipe: BaseRecipe) -> Ledger:
    """Return the memory of a step of one example, with all that saves activations."""
    spec = devices.spec_of(torch.device(recipe.device))
    run = Run(
        Holding.of(recipe),
        config.lora_r,
        length=config.max_length,
        optimizer=config.optim,
        device=recipe.device,
        gpu=spec,
        embedding_on_host=True,
    )
    policy = policy_of(shape, run, 0, offload=config.activations in ("auto", "offload"))
    return ledger(shape, smallest_parts(replace(run, policy=policy)))


def _on_disk() -> LayerStore:
    directory = cache_home() / "weights"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"weights: disk needs a directory in the user's cache: {error}") from None
    return partial(DiskLayers, directory=directory)
