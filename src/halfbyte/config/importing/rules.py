"""What a key of another trainer becomes: an option, nothing, or something to be done by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from halfbyte.config.aliases import (
    ALIASES,
    REFUSED,
    SCHEDULER_KWARGS,
    Refusal,
    without_scheduler_kwargs,
)
from halfbyte.config.reading import check
from halfbyte.config.schema import OF_THE_ADAPTER, TrainConfig
from halfbyte.errors import ConfigError


@dataclass
class Imported:
    """A foreign configuration in our terms.

    Attributes:
        trainer: Whose it is.
        values: Options by name.
        origins: For each of these, where it comes from: ``micro_batch_size: 2``.
        unneeded: Foreign settings that need no option, with the reason.
        missing: Foreign settings without a counterpart, with what to do.
    """

    trainer: str
    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    unneeded: list[tuple[str, str]] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)

    def set(self, option: str, value: Any, origin: str) -> None:
        """Set an option. If it has another value already, the first is kept and this is listed."""
        if option not in self.values:
            self.values[option], self.origins[option] = value, origin
        elif self.values[option] == value:
            self.unneeded.append((origin, f"says the same as {self.origins[option]}"))
        else:
            before = f"{self.values[option]!r} ({self.origins[option]})"
            self.missing.append((origin, f"`{option}` is {before} already; keep one of the two"))


def set_defaults(into: Imported, defaults: Mapping[str, Any]) -> None:
    """Set what a configuration leaves to its trainer, where that has another default than we."""
    for option, value in defaults.items():
        if option not in into.values and value != TrainConfig.model_fields[option].default:
            into.set(option, value, f"{into.trainer}'s default")


TRANSFORMERS_DEFAULTS: dict[str, Any] = {
    "batch_size": 8,
    "gradient_accumulation_steps": 1,
    "learning_rate": 5e-5,
    "epochs": 3.0,
    "lr_scheduler_type": "linear",
    "seed": 42,
}
"""Where transformers' ``TrainingArguments`` (5.17) have other defaults than we; see `warm_up`."""


def warm_up(into: Imported) -> None:
    """Set the trainer's default, no warm-up, if none is given."""
    if not {"warmup_ratio", "warmup_steps"} & into.values.keys():
        into.set("warmup_steps", 0, f"{into.trainer}'s default")


def settled(found: Imported) -> Imported:
    """List what ``halfbyte train`` would refuse, so that it takes the rest.

    That is a value which an option does not have, an option without the other that it needs, or the
    later of two that exclude each other.
    """
    if "init_adapter" in found.values:
        for option in found.values.keys() & {*OF_THE_ADAPTER}:
            del found.values[option]
            why = "the adapter that the run starts from decides"
            found.unneeded.append((found.origins.pop(option), why))
    accepted: dict[str, Any] = dict.fromkeys(("model", "data", "output"), "-")
    # First the schedule: its options are wrong for it, not it for them.
    left = sorted(found.values, key=lambda option: option != "lr_scheduler_type")
    while True:  # those that need another are accepted after it
        refused: dict[str, str] = {}
        for option in left:
            both = accepted | {option: found.values[option]}
            try:
                check(TrainConfig, both).require_held_out()
            except ConfigError as error:
                refused[option] = str(error)
            else:
                accepted = both
        if len(refused) == len(left):
            break
        left = list(refused)
    for option, reason in refused.items():
        del found.values[option]
        found.missing.append((found.origins.pop(option), reason))
    return found


class NoCounterpartError(Exception):
    """A value has no counterpart; the message says what to do."""


Read = Callable[[Any], Any]


@dataclass(frozen=True)
class Rule:
    """What a key becomes.

    Attributes:
        option: Our option; None if there is none.
        read: Converts the value. None as a result sets nothing.

            Raises `NoCounterpartError` if the value has no counterpart.
        why: Why the key needs no option.
    """

    option: str | None = None
    read: Read = lambda value: value
    why: str = ""


def to(option: str, read: Read | Mapping[str, Any] | None = None) -> Rule:
    """An option of another name; ``read`` converts its value, or is a table of values."""
    if isinstance(read, Mapping):
        return Rule(option, _from_table(read))
    return Rule(option, read or (lambda value: value))


def unneeded(why: str) -> Rule:
    """A setting that asks for nothing that halfbyte does not do, or decides, itself."""
    return Rule(why=why)


def missing(todo: str, harmless: tuple[Any, ...] = (False, None)) -> Rule:
    """A setting without a counterpart, unless its value is one that asks for nothing."""

    def read(value: Any) -> None:
        if not any(value is one or value == one for one in harmless) and value not in ([], {}, ""):
            raise NoCounterpartError(todo)

    return Rule(read=read, why="asks for nothing")


def _from_table(table: Mapping[str, Any]) -> Read:
    def read(value: Any) -> Any:
        name = str(value).lower()
        if name not in table:
            known = ", ".join(table)
            raise NoCounterpartError(f"no such value here; those that have one: {known}")
        found = table[name]
        if isinstance(found, NoCounterpartError):
            raise found
        return found

    return read


def from_alias(name: str) -> Rule:
    """The rule of a name that ``halfbyte train`` accepts too."""
    alias = ALIASES[name]

    def read(value: Any) -> Any:
        try:
            found = alias.read(value)
            return found == "true" if found in ("true", "false") else found
        except ValueError as error:
            raise NoCounterpartError(f"{error}{alias.only or ''}") from error

    return Rule(alias.field, read)


def apply(given: Mapping[str, Any], rules: Mapping[str, Rule], into: Imported) -> None:
    """Convert each key by its rule, by an alias, or as an option of the same name; or list it."""
    for name, value in given.items():
        origin = f"{name}: {shown(value)}"
        if name in rules:
            rule = rules[name]
        elif name in ALIASES:
            rule = from_alias(name)
        elif name in REFUSED:
            rule = _refused(REFUSED[name])
        elif name in TrainConfig.model_fields or name == SCHEDULER_KWARGS:
            rule = Rule(name)
        else:
            into.missing.append((origin, "not known here; see whether your results depend on it"))
            continue
        if value is None:
            into.unneeded.append((origin, "has no value"))
            continue
        if name == SCHEDULER_KWARGS:
            options, problems = without_scheduler_kwargs({name: value}, TrainConfig)
            apply(options, {}, into)
            into.missing += [(origin, problem) for problem in problems]
            continue
        try:
            found = rule.read(value)
        except NoCounterpartError as error:
            into.missing.append((origin, str(error)))
            continue
        if rule.option is None:
            into.unneeded.append((origin, rule.why))
        elif found is not None:
            into.set(rule.option, found, origin)
        else:
            into.unneeded.append((origin, "asks for nothing"))


def _refused(refusal: Refusal) -> Rule:
    def read(value: Any) -> None:
        if not refusal.allows(value):
            raise NoCounterpartError(refusal.reason)

    return Rule(read=read, why="asks for nothing")


_LONGEST = 100  # characters of a value that are quoted


def shown(value: Any) -> str:
    """A value as YAML would show it in one line, shortened."""
    text = {True: "true", False: "false", None: "null"}.get(value) if _is_word(value) else None
    text = text or (value if isinstance(value, str) else repr(value))
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _is_word(value: Any) -> bool:
    return value is None or isinstance(value, bool)
