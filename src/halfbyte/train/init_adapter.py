"""Starts a run from the weights of an existing adapter (``--init-adapter``), ours or PEFT's.

What the adapter is (rank, scaling, variants, targets, modules trained in full) is taken over from
it, as is the quantisation of the base model that it was trained on. An option that is given and
says otherwise is an error, since nothing of the adapter may be left out silently. The optimizer and
the steps start anew.

A resumed run has its weights in the checkpoint, so it takes these options from there.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from halfbyte.checkpoint.base_model import BaseSource, LoadedBase
from halfbyte.checkpoint.identity import PACKING, recorded_packing, require_same_base
from halfbyte.checkpoint.peft import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    LoadedAdapter,
    load_adapter,
    template_in,
)
from halfbyte.checkpoint.reading import rope_scaling_in
from halfbyte.checkpoint.run_state import RunState
from halfbyte.config.reading import check
from halfbyte.config.schema import OF_THE_ADAPTER, TrainConfig
from halfbyte.errors import ConfigError
from halfbyte.foreign_text import quote
from halfbyte.input_files import open_file
from halfbyte.linear.lora import load_adapter_state
from halfbyte.linear.lora_targets import choose_targets, ends_with
from halfbyte.train.loading import use_template

if TYPE_CHECKING:
    from halfbyte.report import RunReport

_FREE = (*PACKING, "lora_dropout")
"""Taken over unless given; another quantisation is a mismatch of the base model."""


class InitialAdapter:
    """The adapter that a run starts from.

    Args:
        config: The options of the run, with ``init_adapter``.
        source: The base model.
        resumed: The state that the run is resumed from, if any.
        report: Where a run that begins says what it starts from.

    Attributes:
        config: The options, with those of the adapter.
        record: What the journal, checkpoints and ``halfbyte.json`` say of it: ``name``, ``digest``
            (SHA-256 of its two files) and ``init_lora_weights`` of its own training.
        chat_template: The one it was trained with instead of its base model's, if any.
        rope_scaling: How rotary embeddings were scaled then, if not as in its base model.

    Raises:
        CheckpointError: If the adapter is missing or damaged, or has layers that ``source`` does
            not have.
        ConfigError: If options contradict it, or the resumed run did not start from an adapter.
    """

    def __init__(
        self,
        config: TrainConfig,
        source: BaseSource,
        resumed: RunState | None,
        report: "RunReport",
    ) -> None:
        assert config.init_adapter is not None
        self._loaded: LoadedAdapter | None = None
        self.chat_template: str | None = None
        self.rope_scaling: str | None = None
        if resumed is not None:
            before, record = map(resumed.progress.get, ("options", "init_adapter"))
            if not isinstance(record, dict):
                raise ConfigError(
                    f"`init_adapter`: the run in {config.output} did not start from an adapter; "
                    "leave it out, or start a new run with another --output"
                )
            self.record: dict[str, Any] = record
            self.config = _with(config, before if isinstance(before, dict) else {})
            return
        self._loaded = loaded = load_adapter(config.init_adapter)
        self.record = {
            "name": str(config.init_adapter),
            "digest": _digest(config.init_adapter),
            "init_lora_weights": (loaded.info.get("recipe") or {}).get("init_lora_weights"),
        }
        self.chat_template = template_in(loaded.info)
        self.rope_scaling = rope_scaling_in(loaded.info)
        theirs = _options_of(loaded, config, source.skeleton)
        theirs |= recorded_packing(loaded.info, config.init_adapter)
        different = [
            f"`{name}` is {quote(theirs[name])} there, and {quote(getattr(config, name))} is given"
            for name in OF_THE_ADAPTER
            if name in config.model_fields_set and getattr(config, name) != theirs[name]
        ]
        if different:
            raise ConfigError(
                f"`init_adapter` {config.init_adapter} is continued as it is; leave these options "
                "out, or start a new adapter:\n  " + "\n  ".join(different)
            )
        self.config = _with(config, theirs)
        own = f"r = {self.config.lora_r}, alpha = {self.config.lora_alpha:g}"
        report.note(f"starting from the adapter in {config.init_adapter}: {own}")

    def load_into(self, base: LoadedBase) -> None:
        """Copy its weights into the new adapters of ``base``; no effect in a resumed run.

        Raises:
            CheckpointError: If it was trained on another base model, or any of its tensors has no
                place, or a trained parameter is not among them.
        """
        if self._loaded is None:
            return
        require_same_base(self._loaded, base, allow_mismatch=self.config.allow_mismatch)
        load_adapter_state(base.model, self._loaded.state | self._loaded.saved)
        self._loaded = None  # frees its memory


def template_of_run(
    config: TrainConfig,
    source: BaseSource,
    initial: InitialAdapter | None,
    resumed: RunState | None,
    report: "RunReport",
) -> dict[str, Any]:
    """Have ``source`` use the chat template of a run, if it is not the model's own.

    That is the one of the checkpoint, of the options, or of the adapter that the run starts from.

    Returns:
        ``chat_template`` with its text, for checkpoints and the adapter; or nothing.

    Raises:
        ConfigError: See ``use_template``.
    """
    saved = None if resumed is None else resumed.progress.get("chat_template")
    if isinstance(saved, str):
        source.chat_template = saved
    elif config.chat_template is not None:
        use_template(source, config.chat_template, report)
    elif initial is not None:
        source.chat_template = initial.chat_template
    return {} if source.chat_template is None else {"chat_template": source.chat_template}


def rope_scaling_of_run(
    config: TrainConfig,
    source: BaseSource,
    initial: InitialAdapter | None,
    resumed: RunState | None,
) -> dict[str, Any]:
    """Have ``source`` scale its rotary embeddings as a run does, if not as its files say.

    That is as in the checkpoint, in the options, or as the adapter was trained that the run starts
    from.

    Returns:
        ``rope_scaling`` for checkpoints and the adapter; or nothing.

    Raises:
        ConfigError: See ``models.rope_scaling``.
    """
    saved = None if resumed is None else resumed.progress.get("rope_scaling")
    of_adapter = None if initial is None else initial.rope_scaling
    source.scale_rope(saved or config.rope_scaling or of_adapter)
    return {} if source.rope_scaling is None else {"rope_scaling": source.rope_scaling}


def _with(config: TrainConfig, options: Mapping[str, Any]) -> TrainConfig:
    """Return ``config`` with the adapter's options that it does not give itself."""
    given = {name: getattr(config, name) for name in config.model_fields_set}
    known = {name: options[name] for name in (*OF_THE_ADAPTER, *_FREE) if name in options}
    return check(TrainConfig, known | given)


def _options_of(
    adapter: LoadedAdapter, config: TrainConfig, skeleton: PreTrainedModel
) -> dict[str, Any]:
    """Return the options that describe an adapter; targets as given, if these are the same."""
    own = adapter.config
    linears = _with_adapters(adapter.require_layers_of(skeleton), skeleton)
    targets: str | tuple[str, ...] = tuple(own.target_modules)
    parameters = own.target_parameters
    # Linears that PEFT adapts as parameters are targets like others here; a pattern means one or
    # the other path.
    as_parameters = {
        path: name
        for path in linears
        for name in parameters
        if ends_with(f"{path}.weight", name) and not (own.rank_pattern or own.alpha_pattern)
    }
    wanted = {*targets, *as_parameters}
    known = config.target_modules
    if "target_modules" not in config.model_fields_set and wanted:
        known = tuple(sorted({path.rpartition(".")[2] for path in wanted}))
    if known and set(choose_targets(linears, {}, known)) == wanted:
        targets = known
        parameters = tuple(name for name in parameters if name not in as_parameters.values())
    if set(config.target_parameters) == set(parameters):
        parameters = config.target_parameters
    whole: tuple[str, ...] = adapter.modules_to_save
    if set(config.modules_to_save) == set(whole):
        whole = config.modules_to_save
    return {
        "lora_r": own.r,
        "lora_alpha": own.alpha,
        "lora_dropout": own.dropout,
        "use_rslora": own.use_rslora,
        "use_dora": own.use_dora,
        "rank_pattern": dict(own.rank_pattern),
        "alpha_pattern": dict(own.alpha_pattern),
        "target_modules": targets,
        "target_parameters": parameters,
        "modules_to_save": whole,
    }


def _with_adapters(linears: list[str], skeleton: PreTrainedModel) -> list[str]:
    """Return the linears that all-linear means: those that are not the output head."""
    head = skeleton.get_output_embeddings()
    return [path for path in linears if skeleton.get_submodule(path) is not head]


def _digest(directory: Path) -> str:
    digest = hashlib.sha256()
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        with open_file(directory / name) as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
