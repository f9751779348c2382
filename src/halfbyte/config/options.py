"""The base class of all options, and readers of values written as text: sizes, lists, pairs."""

import re
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

# Python writes bytes of a path that are not UTF-8 as U+DC80 to U+DCFF.
_NOT_IN_PATHS = re.compile("[\0\ud800-\udc7f\udd00-\udfff]")

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY_UNITS = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(value: Any) -> Any:
    """Read a size such as ``16GB`` (10^9), ``16GiB`` (2^30) or a plain number of bytes.

    Anything but a string or a number is returned unchanged, for pydantic to validate.

    Raises:
        ValueError: It is not a size, or a number without a unit that cannot be meant as bytes.
    """
    if not isinstance(value, str | int | float):
        return value
    number = str(value).strip()
    if re.fullmatch(r"\d{1,4}(\.\d+)?", number) and float(number):
        raise ValueError(f"{number} has no unit; write {number}GB or {number}GiB")
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"([\d.]+(?:e\d+)?)\s*([kmgt]?i?)b?", value.strip().lower())
    scale = (_UNITS | _BINARY_UNITS).get(match[2]) if match else None
    if match is None or scale is None or match[1].count(".") > 1:
        raise ValueError("expected a size such as 16GB or 12.5GiB")
    return int(min(float(match[1]) * scale, 2.0**63))


def parse_pairs(value: Any) -> Any:
    """Read ``name=value,name=value``, or a list of these; anything else is returned unchanged.

    Raises:
        ValueError: the string is not a list of pairs.
    """
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        value = ",".join(value)
    if not isinstance(value, str):
        return value
    pairs = [pair.rpartition("=") for pair in value.split(",") if pair.strip()]
    if not all(name.strip() and number.strip() for name, _, number in pairs):
        raise ValueError("expected NAME=VALUE,NAME=VALUE")
    return {name.strip(): number.strip() for name, _, number in pairs}


def one_or_several(value: Any) -> Any:
    """Read a text as a list of it; anything else is returned unchanged."""
    return [value] if isinstance(value, str) else value


def parse_names(value: Any) -> Any:
    """Read ``name,name``, or a list of these; anything else is returned unchanged."""
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        value = ",".join(value)
    if not isinstance(value, str):
        return value
    return [name.strip() for name in value.split(",") if name.strip()]


def parse_trackers(value: Any) -> Any:
    """Read ``name,name`` as ``parse_names`` does, without transformers' ``none``."""
    names = parse_names(value)
    return [name for name in names if name != "none"] if isinstance(names, list) else names


def known_share(value: float | None) -> float | None:
    """Check a share below 1, or a number of rows.

    Raises:
        ValueError: It is neither; 1 could be meant as one row or as all.
    """
    if value is None or 0 < value < 1 or (value >= 2 and value == int(value)):
        return value
    raise ValueError("expected a share between 0 and 1, or a number of rows from 2")


def _known_block_size(value: int) -> int:
    if not 32 <= value <= 4096 or value & (value - 1):
        raise ValueError("expected a power of 2 from 32 to 4096")
    return value


# huggingface_hub's rules: letters, digits, -, _ and ., but no two of -- or .., 96 characters.
_REPOSITORY = re.compile(r"(?!.*(--|\.\.))[a-zA-Z0-9][\w-]*/[a-zA-Z0-9_][\w.-]*(?<![-.])", re.ASCII)


def _owner_and_name(value: str) -> str:
    if not _REPOSITORY.fullmatch(value) or len(value) > 96 or value.endswith(".git"):
        raise ValueError("expected owner/name, a repository on the Hugging Face hub")
    return value


Repository = Annotated[str, AfterValidator(_owner_and_name)]
Positive = Annotated[float, Field(gt=0)]
BlockSize = Annotated[int, AfterValidator(_known_block_size)]


class Options(BaseModel):
    """Base class of all options: frozen, no unknown names, no NaN or infinity."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=()
    )
    sections: ClassVar[dict[str, str]] = {}
    """Headings of ``--help``, keyed by the field that each precedes."""

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        # YAML reads `yes` and `on` as true, which pydantic would convert to the number 1.
        field = cls.model_fields[info.field_name or ""]
        if isinstance(value, bool) and field.annotation is not bool:
            raise ValueError("expected a value")
        if isinstance(value, str) and _NOT_IN_PATHS.search(value):
            raise ValueError("expected text without null characters and halves of surrogate pairs")
        return value
