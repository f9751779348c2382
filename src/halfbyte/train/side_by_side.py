"""Several adapters of one base model, which is in memory once: they are put on it in turn."""

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halfbyte.checkpoint.base_model import LoadedBase, open_base
from halfbyte.checkpoint.identity import require_same_base
from halfbyte.checkpoint.peft import LoadedAdapter, load_adapter, template_in
from halfbyte.train.loading import open_model

if TYPE_CHECKING:
    from halfbyte.report import RunReport

BASE = "base"
"""The name of the base model alone."""


class SideBySide:
    """A base model, and adapters that were trained on it.

    Args:
        base: The base model.
        adapters: The adapters, by name.
        own_templates: Whether each has the chat template of its training; otherwise that of
            ``base`` is used for all.
        allow_mismatch: As in `open_model`.

    Attributes:
        names: `BASE` and the names of the adapters.

    Raises:
        CheckpointError: If an adapter was trained on another base model, or a tensor of it has no
            place in this one.
    """

    def __init__(
        self,
        base: LoadedBase,
        adapters: dict[str, LoadedAdapter],
        *,
        own_templates: bool,
        allow_mismatch: bool,
    ) -> None:
        self._model, self._adapters = base.model, adapters
        self._tokenizers = {BASE: base.tokenizer}
        self.names = (BASE, *adapters)
        for name, adapter in adapters.items():
            tokenizer = base.tokenizer
            template = template_in(adapter.info) if own_templates else None
            if template is not None:
                tokenizer = copy.copy(tokenizer)
                tokenizer.chat_template = template
            self._tokenizers[name] = tokenizer
            same = base._replace(tokenizer=tokenizer)
            require_same_base(adapter, same, allow_mismatch=allow_mismatch)
            with adapter.applied_to(base.model):  # its tensors have their places, or this says not
                pass

    @contextmanager
    def using(self, name: str) -> Iterator[tuple[PreTrainedModel, PreTrainedTokenizerBase]]:
        """Yield the model with the adapter of this name, or without one, and its tokenizer."""
        if name == BASE:
            yield self._model, self._tokenizers[BASE]
            return
        with self._adapters[name].applied_to(self._model):
            yield self._model, self._tokenizers[name]


def open_side_by_side(
    model: str,
    adapters: Sequence[str],
    *,
    revision: str | None = None,
    allow_mismatch: bool = False,
    chat_template: str | None = None,
    report: "RunReport | None" = None,
    **recipe: Any,
) -> SideBySide:
    """Open a base model and several adapters; arguments are those of `open_model`.

    Raises:
        UserError: If the model or an adapter is missing or damaged, or they do not match.
    """
    loaded = dict(zip(_names(adapters), map(load_adapter, adapters), strict=True))
    source = open_base(model, revision=revision)
    for adapter in loaded.values():
        adapter.require_layers_of(source.skeleton)
    *_, base = open_model(source, chat_template=chat_template, report=report, **recipe)
    return SideBySide(
        base, loaded, own_templates=chat_template is None, allow_mismatch=allow_mismatch
    )


def _names(adapters: Sequence[str]) -> list[str]:
    """Return short names: those of the directories, if these differ, and none is `BASE`."""
    paths = [os.path.realpath(adapter) for adapter in adapters]
    names = [os.path.basename(path) for path in paths]
    return names if len({*names, BASE}) > len(names) else paths
