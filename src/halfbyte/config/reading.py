"""Brings options together: of a YAML file, the command line and Python.

A value goes through three stages:

1. *aliases* (``aliases.py``): option names of axolotl, LLaMA-Factory and TRL are translated, and
   the translation is logged; an unknown name is an error, and the nearest name is suggested;
2. *merging*: options on the command line override those of the file;
3. *validation*: pydantic checks every value and the rules between them.

All errors of all stages are reported together, in one ``ConfigError``.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from halfbyte.config.aliases import nearest, translate
from halfbyte.config.options import Options
from halfbyte.config.schema import TrainConfig
from halfbyte.errors import ConfigError
from halfbyte.foreign_text import quote, shorten
from halfbyte.input_files import read_file

_MAX_YAML = 100_000  # bytes; PyYAML reads them in a second, and all options take 3,000

# Values far above what adapters train with, also those of tiny models, and what is usual.
_HARDLY_MEANT = {
    "learning_rate": (0.05, "adapters usually train at 1e-5 to 1e-3"),
    "lora_r": (1024, "adapters usually have a rank of 4 to 256"),
    "epochs": (100, "adapters usually train for 1 to 5"),
}

# --- checking -----------------------------------------------------------------------------------

OptionsT = TypeVar("OptionsT", bound=Options)

_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "path": "a path",
    "tuple": "a list",
}


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _in_words(error: Mapping[str, Any], options: type[Options]) -> str:
    """One pydantic error as a sentence: which option, what was expected, what was given."""
    kind, context = error["type"], error.get("ctx", {})
    if not error["loc"]:  # a rule between options: its message names them
        return str(context["error"])
    name = str(error["loc"][0])
    if kind == "missing":
        return f"`{name}` is missing: {options.model_fields[name].description}"
    if kind == "extra_forbidden":
        return f"unknown option `{shorten(name)}`{nearest(name, options.model_fields)}"
    bounds = {"gt": "more than", "ge": "at least", "lt": "less than", "le": "at most"}
    bound = next(
        (f"{words} {_number(context[key])}" for key, words in bounds.items() if key in context), ""
    )
    if bound:
        expected = f"expected {bound}"
    elif kind == "literal_error":
        expected = f"expected {context['expected']}"
    elif kind == "value_error":
        expected = str(context["error"])
    elif kind == "finite_number":
        expected = "expected a finite number"
    elif kind == "string_too_short":
        expected = "expected some text"
    else:
        thing = _EXPECTED.get(kind.split("_")[0])
        expected = f"expected {thing}" if thing else error["msg"]
        if thing and name.endswith("_steps"):
            expected += " of steps, not a share of the run"
    return f"`{name}`: {expected}, got {quote(error['input'])}"


def check(
    options: type[OptionsT], values: Mapping[str, Any], *, problems: Iterable[str] = ()
) -> OptionsT:
    """Build ``options`` from plain values, strings allowed for any type.

    Args:
        options: The class to build.
        values: Values by field name.
        problems: Errors found before; reported together with those found here.

    Raises:
        ConfigError: All errors, in one message.
    """
    found = list(problems)
    result = None
    try:
        result = options(**values)
    except ValidationError as error:
        # A union reports one error per member: one sentence per option is enough.
        sentences = {
            str(one["loc"][0]) if one["loc"] else one["msg"]: _in_words(one, options)
            for one in reversed(error.errors(include_url=False))
        }
        found += reversed(sentences.values())
    if result is None or found:
        several = f"{len(found)} errors\n  " if len(found) > 1 else ""
        raise ConfigError(several + "\n  ".join(found))
    return result


# --- files --------------------------------------------------------------------------------------


class _UniqueKeys(yaml.SafeLoader):
    """YAML's safe subset, in which a duplicate key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"`{shorten(key.value)}` is given twice", node.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read the mapping in a YAML file; dashes in its keys become underscores.

    Raises:
        ConfigError: No such file, not text, not YAML, or not a mapping.
    """
    try:
        content = yaml.load(read_file(path, _MAX_YAML).decode("utf-8"), _UniqueKeys)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise ConfigError(f"cannot read the configuration file {path}: {reason}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: its lists or mappings are nested too deeply") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # What PyYAML's constructors raise for a date that does not exist, or `!!int x`.
        raise ConfigError(
            f"{path}: a value that YAML cannot read: {shorten(str(error))}"
        ) from error
    except yaml.YAMLError as error:
        problem = shorten(getattr(error, "problem", None) or "not valid YAML")
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: {problem}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path}: expected lines such as `learning_rate: 2e-4`, got a {type(content).__name__}"
        )
    return {str(key).replace("-", "_"): value for key, value in content.items()}


def load_config(
    yaml_path: str | Path | None,
    overrides: Mapping[str, Any],
    *,
    problems: Iterable[str] = (),
) -> tuple[TrainConfig, list[str]]:
    """Read a YAML file, apply ``overrides``, and check the result.

    Args:
        yaml_path: A configuration file, or None.
        overrides: Options by name, ours or a known alias; values may be strings.
        problems: Errors found before; reported together with those found here.

    Returns:
        The configuration, and messages about it for the user.

    Raises:
        ConfigError: All errors, in one message.
    """
    in_file = translate(read_yaml(yaml_path) if yaml_path is not None else {}, TrainConfig)
    on_top = translate(overrides, TrainConfig)
    config = check(
        TrainConfig,
        {**in_file.values, **on_top.values},
        problems=[*problems, *in_file.problems, *on_top.problems],
    )
    notes = in_file.notes + on_top.notes
    for winner, loser in (("max_steps", "epochs"), ("warmup_steps", "warmup_ratio")):
        if getattr(config, winner) is not None and loser in config.model_fields_set:
            notes.append(f"`{loser}` is ignored, since `{winner}` is given")
    for name, (limit, usual) in _HARDLY_MEANT.items():
        if (value := getattr(config, name)) > limit:
            notes.append(f"`{name}` {value:g} is very high; {usual}")
    return config, notes


WRITTEN_YAML = "# The options of a run, written by halfbyte.\n"
"""The first line of a file that halfbyte has written, so that it may replace it."""


def to_yaml(config: TrainConfig) -> str:
    """The whole configuration, including defaults, as YAML that ``load_config`` reads."""
    options = config.model_dump(mode="json")
    return WRITTEN_YAML + yaml.safe_dump(options, sort_keys=False, allow_unicode=True)
