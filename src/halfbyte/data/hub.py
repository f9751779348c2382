"""Data sets of the hub, read through the optional package ``datasets``."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from halfbyte.data.readers import RawRow
from halfbyte.data.specs import Spec
from halfbyte.data.tables import rows_of
from halfbyte.errors import DataError
from halfbyte.foreign_text import shorten

_LONGEST_ERROR = 400


@dataclass(frozen=True)
class HubData:
    """A data set of the hub.

    Attributes:
        name: What messages call it: its id, with configuration and split if given.
        count: Number of its rows; None if it is streamed.
        fingerprint: Changes whenever its rows do; None if that is not known.
    """

    name: str
    count: int | None
    fingerprint: str | None
    _data: Any

    def rows(self, start: int = 0, stop: int | None = None) -> Iterator[RawRow]:
        """Read rows, numbered from 1 in the whole data set.

        Raises:
            DataError: The connection fails, or a file of the data set is damaged.
        """
        try:
            yield from rows_of(self._part(start, stop), start + 1)
        except Exception as error:
            raise _unreadable(self.name, error) from error

    def _part(self, start: int, stop: int | None) -> Iterable[Mapping[str, Any]]:
        data = self._data
        if self.count is not None:
            used = range(self.count)[start:stop]
            return data.select(used) if used else ()
        data = data if stop is None else data.take(stop)
        return data.skip(start) if start else data  # type: ignore[no-any-return]


def open_hub(spec: Spec, *, streaming: bool = False) -> HubData:
    """Open a data set; unless it is streamed, it is downloaded first.

    Raises:
        DataError: The package is missing, or the data set, its configuration or split cannot be
            read.
    """
    if importlib.util.find_spec("datasets") is None:
        raise DataError(
            f"{spec.path} is neither a file nor a directory. To read a data set from the hub, "
            "install the optional package 'datasets': pip install datasets."
        )
    datasets = importlib.import_module("datasets")
    split = spec.split or "train"
    name = spec.name
    try:
        with _without_warnings():
            data = datasets.load_dataset(spec.path, spec.config, split=split, streaming=streaming)
        count = None if streaming else len(data)
    except Exception as error:
        # The package and the libraries below it raise errors of their own, of the network's client
        # and of Python, which have no base in common.
        raise _unreadable(name, error) from error
    return HubData(name, count, getattr(data, "_fingerprint", None), data)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Keep the client from logging each of its attempts without a network, over half a minute."""
    client = logging.getLogger("huggingface_hub")
    level = client.level
    client.setLevel(logging.ERROR)
    try:
        yield
    finally:
        client.setLevel(level)


def _unreadable(name: str, error: Exception) -> DataError:
    text = shorten(" ".join(str(error).split()), _LONGEST_ERROR).rstrip(".")
    hint = ""
    if isinstance(error, ConnectionError):
        hint = " Without a network, only what has been downloaded before can be read."
    elif "gated" in text or "authenticat" in text or "private" in text:
        hint = " If it is gated or private, accept its conditions and log in: hf auth login."
    elif "Config name is missing" in text or "BuilderConfig" in text or "Unknown split" in text:
        hint = " Write owner/name:split, or owner/name:config:split."
    return DataError(f"The data set {name} could not be read from the hub: {text}.{hint}")
