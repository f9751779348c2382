"""Adapters on disk, in PEFT's format; for ``adapter_config.json`` see peft_config.py.

An adapter is a directory: ``adapter_config.json`` (targets and options), ``adapter_model
.safetensors`` (``base_model.model.<module path>.lora_A.weight`` [r, in] and ``.lora_B.weight``
[out, r], with DoRA ``.lora_magnitude_vector`` [out]) and, from us, ``halfbyte.json``: the exact
base model it was trained on, and its quantisation. PEFT ignores the third file; without it (PEFT's
own adapters) only the name of the base model is known.

Modules trained in full (``modules_to_save``) are stored in the same file under their names in the
model, and replace the model's tensors, in PEFT's adapters as in ours.
"""

import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from halfbyte.atomic import (
    new_file,
    output_errors,
    remove_directory,
    remove_partial,
    require_writable,
)
from halfbyte.checkpoint.peft_config import (
    check_plain,
    config_of,
    names_in,
    parameters_at,
    peft_fields,
)
from halfbyte.checkpoint.reading import read_json, rope_scaling_in
from halfbyte.checkpoint.safetensors_file import SafetensorsFile, write_safetensors
from halfbyte.errors import CheckpointError
from halfbyte.layers.multimodal import removed_modules
from halfbyte.linear.frozen import FrozenLinear
from halfbyte.linear.lora import (
    LoRAConfig,
    attach,
    detach,
    frozen_linears,
    load_adapter_state,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
CARD_NAME = "halfbyte.json"

PREFIX = "base_model.model."
_TENSOR = re.compile(r"(?P<module>.+)\.lora_([AB]\.weight|magnitude_vector)")


class LoadedAdapter(NamedTuple):
    """An adapter read from disk.

    Attributes:
        config: The adapter's configuration; its targets are the paths of the modules with tensors,
            and the parameters, by the ends of their paths.
        state: ``<module path>.lora_A.weight``, ``.lora_B.weight`` and, with DoRA,
            ``.lora_magnitude_vector``, float32.
        saved: Tensors that replace the base model's, by their names there.
        base_name: The name of the base model in training; "" if unknown.
        info: The content of ``halfbyte.json``; empty for an adapter not written by halfbyte.
        modules_to_save: The modules trained in full, whose tensors are ``saved``, as named in
            training.
    """

    config: LoRAConfig
    state: dict[str, Tensor]
    saved: dict[str, Tensor]
    base_name: str
    info: dict[str, Any]
    modules_to_save: tuple[str, ...] = ()

    def require_layers(self, linears: Collection[str], removed: Collection[str] = ()) -> None:
        """Compare the adapter's layers with the paths of a model's linear layers.

        Args:
            linears: The paths.
            removed: Paths of the modules that are not loaded (`layers.multimodal`).

        Raises:
            CheckpointError: If a layer of the adapter is not among them.
        """
        wanted = tuple(self.config.target_modules)
        if encoders := sorted({*wanted} & {*removed}):
            raise CheckpointError(
                f"the adapter changes {len(encoders)} layers of the model's encoders, such as "
                f"{encoders[0]}, and only the text decoder is loaded: merge it with PEFT, and use "
                "the merged model"
            )
        if missing := [path for path in wanted if path not in linears]:
            count = "none" if len(missing) == len(wanted) else len(wanted) - len(missing)
            raise CheckpointError(
                f"the adapter does not fit this model: of its {len(wanted)} layers {count} can be "
                f"found. It is for {missing[0]} and the like, the model has "
                f"{next(iter(linears), 'none')}"
            )

    def require_layers_of(self, skeleton: nn.Module) -> list[str]:
        """Compare the adapter's layers with a model of transformers, before its weights are read.

        Args:
            skeleton: ``BaseSource.skeleton``.

        Returns:
            The paths of the model's linear layers.

        Raises:
            CheckpointError: If a layer of the adapter is not among them.
        """
        linears = [path for path, m in skeleton.named_modules() if isinstance(m, nn.Linear)]
        self.require_layers(linears, removed_modules(skeleton))
        self._require_parameters(skeleton)
        return linears

    def _require_parameters(self, model: nn.Module) -> None:
        """Check that the modules whose parameters the adapter changes are in a model."""
        config, modules = self.config, dict(model.named_modules())
        for name in self.state:
            paths = parameters_at(_module_of(name), config.target_modules, config.target_parameters)
            if paths and paths[0].rpartition(".")[0] not in modules:
                raise CheckpointError(
                    f"the adapter does not fit this model, which does not have {paths[0]}"
                )

    def put_on(self, model: nn.Module) -> None:
        """Attach the adapter to ``model``, a model of ``load_base``.

        Raises:
            CheckpointError: If any of its tensors has no place there; nothing is attached then.
        """
        self.require_layers(frozen_linears(model), removed_modules(model))
        self._require_parameters(model)
        places = {name: _place_of(model, name, tensor) for name, tensor in self.saved.items()}
        attach(model, self.config, seed=0)
        try:
            load_adapter_state(model, self.state)
        except CheckpointError:
            detach(model)
            raise
        for name, (owner, held) in places.items():
            # A separate parameter: one that was tied to it does not change, as in PEFT.
            fresh = self.saved[name].to(held.device, held.dtype)
            setattr(owner, name.rpartition(".")[2], nn.Parameter(fresh, requires_grad=False))

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Have the adapter on ``model`` within the block, and the base model again after it.

        Raises:
            CheckpointError: As `put_on`.
        """
        places = {name: _place_of(model, name, tensor) for name, tensor in self.saved.items()}
        self.put_on(model)
        try:
            yield
        finally:
            detach(model)
            for name, (owner, held) in places.items():
                setattr(owner, name.rpartition(".")[2], held)


def _place_of(model: nn.Module, name: str, tensor: Tensor) -> tuple[nn.Module, nn.Parameter]:
    path, _, leaf = name.rpartition(".")
    try:
        owner = model.get_submodule(path)
    except AttributeError:
        raise CheckpointError(f"the adapter holds {name}, which this model does not have") from None
    held = owner._parameters.get(leaf)
    if held is None or isinstance(owner, FrozenLinear):
        raise CheckpointError(
            f"the adapter replaces {name}, which is supported only for embeddings, norms and the "
            "output head, if they are not packed. Merge it with PEFT, and use the merged model"
        )
    if held.shape != tensor.shape:
        raise CheckpointError(
            f"the adapter has {name} of shape {list(tensor.shape)}, the model of "
            f"{list(held.shape)}: it was trained with another vocabulary or model"
        )
    return owner, held


def save_adapter(
    directory: str | Path,
    state: Mapping[str, Tensor],
    config: LoRAConfig,
    *,
    base: Mapping[str, Any],
    recipe: Mapping[str, Any],
    removed: Collection[str] = (),
    fan_in_fan_out: bool = False,
    more: Mapping[str, Any] = MappingProxyType({}),
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> Path:
    """Write an adapter that PEFT and halfbyte load. Each file is replaced in one step.

    Args:
        directory: The directory; created if necessary, other files in it are kept.
        state: The result of ``lora.adapter_state``.
        config: The configuration it was attached with, in PEFT's terms (`lora.in_peft_terms`).
        base: The result of ``identity_of`` for the base model; at least its ``name``.
        recipe: The base model's quantisation in training (JSON values), for loading.
        removed: Paths of modules that the base model has in other programs and did not have in
            training (`layers.multimodal.remove_encoders`); the targets do not match them.
        fan_in_fan_out: Whether the linears are Conv1D in other programs, as PEFT says of them.
        more: More fields of ``halfbyte.json``, as JSON values.
        tokenizer: Saved with it if given, with its chat template.

    Returns:
        The directory.

    Raises:
        OutputError: If the directory cannot be written.
    """
    directory = require_writable(directory, sum(tensor.nbytes for tensor in state.values()))
    with new_file(directory / WEIGHTS_NAME) as file:
        write_safetensors(file, {PREFIX + name: tensor for name, tensor in state.items()})
    write_card(
        directory,
        state,
        config,
        base=base,
        recipe=recipe,
        removed=removed,
        fan_in_fan_out=fan_in_fan_out,
        more=more,
    )
    if tokenizer is not None:
        with output_errors(directory):
            _save_tokenizer(tokenizer, directory)
    return directory


def _save_tokenizer(tokenizer: "PreTrainedTokenizerBase", directory: Path) -> None:
    """Write a tokenizer's files, not in place: one may be a link to the base model's."""
    remove_partial(directory, "tokenizer")
    with TemporaryDirectory(dir=directory, prefix=".tokenizer.partial-") as fresh:
        tokenizer.save_pretrained(fresh)
        for entry in Path(fresh).iterdir():
            place = directory / entry.name
            if place.is_dir() and not place.is_symlink():  # of further templates
                remove_directory(place)
            os.replace(entry, place)


def write_card(
    directory: Path,
    names: Iterable[str],
    config: LoRAConfig,
    *,
    base: Mapping[str, Any],
    recipe: Mapping[str, Any],
    removed: Collection[str] = (),
    fan_in_fan_out: bool = False,
    more: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write the description of an adapter with tensors ``names``; see ``save_adapter``.

    Raises:
        OutputError: If the directory cannot be written.
    """
    whole = config.modules_to_save
    pairs = [name for name in names if _TENSOR.fullmatch(name) or not _is_of(name, whole)]
    card = {"format": 1, "base": dict(base), "recipe": dict(recipe), **more}
    in_peft = peft_fields(
        config,
        map(_module_of, pairs),
        removed,
        base["name"],
        fan_in_fan_out=fan_in_fan_out,
    )
    for name, fields in ((CARD_NAME, card), (CONFIG_NAME, in_peft)):
        with new_file(directory / name) as file:
            file.write(json.dumps(fields, indent=2).encode() + b"\n")


def _is_of(name: str, whole: Sequence[str]) -> bool:
    """Whether the parameter belongs to a module to save: its path ends with it (PEFT's rule)."""
    return name.rpartition(".")[0].endswith(tuple(whole))


def _module_of(name: str) -> str:
    match = _TENSOR.fullmatch(name)
    if match is None:
        raise ValueError(f"{name} is not the name of an adapter's tensor")
    return match["module"]


def load_adapter(directory: str | Path) -> LoadedAdapter:
    """Read an adapter written by halfbyte or PEFT; ``identity`` checks whether it fits a model.

    Raises:
        CheckpointError: If a file is missing or damaged, or if the adapter is more than LoRA or
            DoRA and modules trained in full.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory} is no directory; expected the directory of an adapter")
    fields = read_json(directory / CONFIG_NAME, "an adapter's directory holds one")
    check_plain(directory, fields)
    info: dict[str, Any] = {}
    if (directory / CARD_NAME).exists():
        info = read_json(directory / CARD_NAME, "halfbyte writes one")
        if not all(isinstance(info.get(name, {}), dict) for name in ("base", "recipe")):
            raise CheckpointError(f"{directory / CARD_NAME}: base and recipe should be objects")
    base = info.get("base", {})
    base_name = str(base.get("name") or fields.get("base_model_name_or_path") or "")
    if not (directory / WEIGHTS_NAME).exists():
        raise CheckpointError(
            f"{directory} has no {WEIGHTS_NAME}; an adapter in PyTorch's pickle format (.bin) is "
            "not read, save it with PEFT's safe_serialization=True"
        )
    config, state, saved = _read_state(SafetensorsFile(directory / WEIGHTS_NAME), fields)
    whole = tuple(fields.get("modules_to_save") or ())
    return LoadedAdapter(config, state, saved, base_name, info, whole)


def recorded_template(adapter: str | Path | None) -> str | None:
    """Return the chat template that an adapter was trained with instead of its base model's.

    Raises:
        CheckpointError: If its ``halfbyte.json`` is damaged.
    """
    if adapter is None or not (Path(adapter) / CARD_NAME).exists():
        return None
    return template_in(read_json(Path(adapter) / CARD_NAME, "halfbyte writes one"))


def template_in(card: Mapping[str, Any]) -> str | None:
    """Return the chat template in the content of a ``halfbyte.json``, if there is one."""
    template = card.get("chat_template")
    return template if isinstance(template, str) else None


def recorded_rope_scaling(adapter: str | Path | None) -> str | None:
    """Return how rotary embeddings were scaled when an adapter was trained, if not as in the model.

    Raises:
        CheckpointError: If its ``halfbyte.json`` is damaged.
    """
    if adapter is None or not (Path(adapter) / CARD_NAME).exists():
        return None
    return rope_scaling_in(read_json(Path(adapter) / CARD_NAME, "halfbyte writes one"))


def _read_state(
    file: SafetensorsFile, fields: dict[str, Any]
) -> tuple[LoRAConfig, dict[str, Tensor], dict[str, Tensor]]:
    whole = names_in(file.path.parent / CONFIG_NAME, fields, "modules_to_save")
    names = [name.removeprefix(PREFIX) for name in file.entries if name.startswith(PREFIX)]
    pairs = [name for name in names if _TENSOR.fullmatch(name)]
    saved = [name for name in names if name not in pairs and _is_of(name, whole)]
    known = {PREFIX + name for name in (*pairs, *saved)}
    foreign = [name for name in file.entries if name not in known]
    unheld = [part for part in whole if not any(_is_of(name, [part]) for name in saved)]
    if unheld:
        raise CheckpointError(f"{file.path} holds no {unheld[0]}, which modules_to_save names")
    if foreign or not pairs:
        raise CheckpointError(
            f"{file.path} should hold {PREFIX}….lora_A.weight and ….lora_B.weight, it holds "
            f"{', '.join(foreign[:4]) or 'nothing'}"
        )
    modules = list(dict.fromkeys(_module_of(name) for name in pairs))
    config = config_of(file.path.parent / CONFIG_NAME, fields, modules)
    state: dict[str, Tensor] = {}
    for module in modules:
        # Of a parameter, the rank of each matrix; how many there are is up to the model.
        rank = config.at(module).r if module in config.target_modules else None
        expected: dict[str, tuple[int | None, ...]] = {
            f"{module}.lora_A.weight": (rank, None),
            f"{module}.lora_B.weight": (None, rank),
        }
        if config.use_dora:
            expected[f"{module}.lora_magnitude_vector"] = (None,)
        for name, shape in expected.items():
            entry = file.entries.get(PREFIX + name)
            if (
                entry is None
                or len(entry.shape) != len(shape)
                or any(
                    want not in (None, got) for want, got in zip(shape, entry.shape, strict=True)
                )
            ):
                came = "is missing" if entry is None else f"has the shape {list(entry.shape)}"
                want = [f"rank {rank}" if size else "any" for size in shape]
                raise CheckpointError(f"{file.path}: {name} {came}; expected [{', '.join(want)}]")
            state[name] = _numbers(file, entry.name).to(torch.float32)
    if surplus := [name for name in pairs if name not in state]:
        raise CheckpointError(
            f"{file.path} holds {surplus[0]}, but its {CONFIG_NAME} does not say use_dora"
        )
    return config, state, {name: _numbers(file, PREFIX + name) for name in saved}


def _numbers(file: SafetensorsFile, name: str) -> Tensor:
    """Return a tensor of an adapter, checked to be finite."""
    tensor = file.read(name)
    if not tensor.is_floating_point():
        raise CheckpointError(f"{file.path}: {name} is {tensor.dtype}; expected are floats")
    if not tensor.isfinite().all():
        raise CheckpointError(
            f"{file.path}: {name} contains NaN or infinity; its training diverged, or the file is "
            "damaged. Use an earlier checkpoint"
        )
    return tensor
