"""Which layers the names of a configuration mean: PEFT's rules, and back into PEFT's terms."""

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from halfbyte.errors import ConfigError

ALL_LINEAR = "all-linear"
EXPERTS = "experts"
"""Among ``target_parameters``: those of all experts."""


def at_end(pattern: str, path: str) -> bool:
    """Whether the expression matches the whole ``path``, or its end after a dot."""
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def ends_with(path: str, name: str) -> bool:
    """Whether ``name`` is the path, or its end after a dot."""
    return path == name or path.endswith("." + name)


def choose_targets(
    paths: Sequence[str], refused: Mapping[str, str], wanted: str | tuple[str, ...]
) -> list[str]:
    """Return the paths of the linears that get an adapter, in the model's order.

    Args:
        paths: The paths of the linears.
        refused: Why some of them must not get one.
        wanted: ``LoRAConfig.target_modules``.

    Raises:
        ConfigError: If ``wanted`` names one of these, or what matches no linear.
    """
    if wanted == ALL_LINEAR:
        return [path for path in paths if path not in refused]
    chosen = _named(paths, wanted)
    if unable := [path for path in chosen if path in refused]:
        raise ConfigError(
            f"target_modules includes {unable[0]}, which cannot get an adapter: "
            f"{refused[unable[0]]}; all-linear leaves it out"
        )
    return chosen


def _named(paths: Sequence[str], wanted: str | tuple[str, ...]) -> list[str]:
    """Return the paths that names, or an expression, match."""
    kinds = ", ".join(sorted({path.rsplit(".", 1)[-1] for path in paths}))
    if isinstance(wanted, str):
        try:
            pattern = re.compile(wanted)
        except re.error as error:
            raise ConfigError(
                f"target_modules {wanted!r} is not a regular expression: {error}"
            ) from None
        chosen = [path for path in paths if pattern.fullmatch(path) or ends_with(path, wanted)]
        if not chosen:
            raise ConfigError(
                f"target_modules {wanted!r} matches no linear layer of this model; an expression "
                f"must match a whole path such as {paths[0]!r}, and the names are: {kinds}"
            )
        return chosen
    unknown = [name for name in wanted if not any(ends_with(path, name) for path in paths)]
    if unknown or not wanted:
        raise ConfigError(
            "target_modules names what this model does not have: "
            f"{', '.join(unknown) or '(nothing)'}; it has: {kinds}"
        )
    return [path for path in paths if any(ends_with(path, name) for name in wanted)]


def choose_parameters(paths: Mapping[str, bool], wanted: Sequence[str]) -> list[str]:
    """Return the paths of the parameters that get an adapter, in the model's order.

    Args:
        paths: The paths of those that could, and whether each is one of experts.
        wanted: ``LoRAConfig.target_parameters``.

    Raises:
        ConfigError: If a name means none of them.
    """

    def means(name: str, path: str) -> bool:
        return ends_with(path, name) or (name == EXPERTS and paths[path])

    if unknown := [name for name in wanted if not any(means(name, path) for path in paths)]:
        kinds = sorted({below_layer(path) for path in paths})
        raise ConfigError(
            "target_parameters names what this model does not have, or what cannot get an adapter: "
            f"{', '.join(unknown)}; it has: {', '.join(kinds)}"
        )
    return [path for path in paths if any(means(name, path) for name in wanted)]


def below_layer(path: str) -> str:
    """Return the part of a path that is the same in every layer: what follows its number."""
    return re.sub(r"^.*?\.\d+\.", "", path)


def exact_parameters(paths: Iterable[str], chosen: Sequence[str]) -> tuple[str, ...]:
    """Return ends of paths that match the parameters ``chosen`` and no others, as PEFT does.

    Args:
        paths: The paths of all parameters of the model.
        chosen: Some of them.
    """
    others = [path for path in paths if path not in set(chosen)]
    ends = {path: below_layer(path) for path in chosen}
    taken = {end for end in ends.values() if any(ends_with(path, end) for path in others)}
    return tuple(dict.fromkeys(path if end in taken else end for path, end in ends.items()))


def exact_targets(
    model: nn.Module, adapted: Sequence[str], wanted: str | tuple[str, ...]
) -> str | tuple[str, ...]:
    """Return targets that match the modules ``adapted`` and no others of the model, as PEFT does.

    These are ``wanted`` (for all-linear, the last parts of the paths) unless they also match a
    module that has no adapter, such as a linear that is not frozen; then the paths are named.
    """
    chosen = set(adapted)
    parts = tuple(f"{path}." for path in adapted)  # of the adapted modules themselves
    others = [p for p, _ in model.named_modules() if p not in chosen and not p.startswith(parts)]
    if wanted == ALL_LINEAR:
        taken = {path.rpartition(".")[2] for path in others}
        names = {path: path.rpartition(".")[2] for path in adapted}
        return tuple(sorted({path if name in taken else name for path, name in names.items()}))
    if isinstance(wanted, str):
        ambiguous = any(re.fullmatch(wanted, path) for path in others)
    else:
        ambiguous = any(ends_with(path, name) for path in others for name in wanted)
    return tuple(adapted) if ambiguous else wanted
