"""What `data` and `eval_data` accept: the name of a source, several, or mappings in YAML.

A source on the command line is text, whose grammar needs to know which files there are and is read
by `halfbyte.data.specs`. A mapping says the same in keys, and can have columns of its own.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeGuard

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
)

from halfbyte.config.options import NOT_IN_PATHS, parse_pairs
from halfbyte.foreign_text import shorten

_SOURCES_SHOWN = 3


class DataSource(BaseModel):
    """A source of rows, as a mapping in YAML."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    path: str = Field(min_length=1, description="a file, a directory, a glob, a hub id, or -")
    weight: float | None = Field(None, gt=0, description="its part of an epoch")
    config: str | None = Field(None, min_length=1, description="configuration of a hub data set")
    split: str | None = Field(None, min_length=1, description="split, such as train or test[:500]")
    columns: dict[str, str] = Field({}, description="our keys, and the columns they are read from")

    def __str__(self) -> str:
        return self.path

    def __hash__(self) -> int:
        return hash(self.model_dump_json())


DataSpec = str | DataSource
"""One source."""

Data = str | Path | DataSource | Sequence[str | Path | DataSource]
"""Sources, as Python code may give them."""


def is_sources(data: object) -> TypeGuard[Data]:
    """Whether it names sources: a name, a mapping of ours, or several; otherwise it may be rows."""
    one = str | Path | DataSource
    if isinstance(data, list | tuple) and data:
        return all(isinstance(item, one) for item in data)
    return isinstance(data, one)


def sources_of(data: Data) -> tuple[DataSpec, ...]:
    """Return sources as a tuple."""
    several = [data] if isinstance(data, str | Path | DataSource) else data
    return tuple(one if isinstance(one, DataSource) else str(one) for one in several)


def name_of(data: Data) -> str:
    """Return the names of sources for a message, the first few of them."""
    names = ["standard input" if str(one) == "-" else str(one) for one in sources_of(data)]
    more = f" and {len(names) - _SOURCES_SHOWN} more" if len(names) > _SOURCES_SHOWN else ""
    return ", ".join(names[:_SOURCES_SHOWN]) + more


def as_words(data: Data) -> list[str]:
    """Return each source as a word of a command line, from which it is read again."""
    return [
        one if isinstance(one, str) else one.model_dump_json(exclude_defaults=True)
        for one in sources_of(data)
    ]


def _read(value: Any) -> list[DataSpec]:
    """A list of sources; a word that is a mapping in JSON stands for it."""
    several = list(value) if isinstance(value, list | tuple) else [value]
    if not several:
        raise ValueError("expected a source")
    return [_one(one) for one in several]


def _one(value: Any) -> DataSpec:
    if isinstance(value, str) and value.startswith('{"'):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError("expected a source, or a mapping in JSON") from None
    match value:
        case DataSource():
            return value
        case str() | Path():
            if not str(value) or NOT_IN_PATHS.search(str(value)):
                raise ValueError("expected a name, without null characters")
            return str(value)
        case {"path": str(), **rest} if all(isinstance(key, str) for key in rest):
            try:
                return DataSource.model_validate(value)
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                where = ".".join(shorten(str(part)) for part in first["loc"])
                known = ", ".join(f"`{name}`" for name in DataSource.model_fields)
                unknown = first["type"] == "extra_forbidden"
                what = f"expected only {known}" if unknown else first["msg"]
                raise ValueError(f"`{where}` of a source: {what}") from None
    raise ValueError("expected a source: a name, or a mapping with `path`")


def _written(data: tuple[DataSpec, ...]) -> Any:
    """As it would be written by hand: one name as text, several as a list."""
    plain = [one if isinstance(one, str) else one.model_dump(exclude_defaults=True) for one in data]
    return plain[0] if len(plain) == 1 and isinstance(plain[0], str) else plain


DataSources = Annotated[
    tuple[DataSpec, ...], BeforeValidator(_read), PlainSerializer(_written, return_type=Any)
]
"""The type of an option that takes sources."""

Columns = Annotated[dict[str, str], BeforeValidator(parse_pairs)]
"""The type of an option that names columns: our keys, and those of the rows."""
