"""Low-rank adapters: configuration, parameters, attaching, and saving and loading by name.

LoRA (Hu et al. 2021) keeps a weight W frozen and trains W + s·B·A with A [r, in], B [out, r].
A starts as Kaiming-uniform noise and B as zero, so an attached adapter changes nothing at first.
The scaling is s = alpha / r, or alpha / √r with rank-stabilised LoRA (Kalajdzievski 2023). It is
applied in one place: the product in ``linear/group.py``. Patterns override r or alpha per layer.

DoRA (Liu et al. 2024) trains the norm of each row of the weight separately from its direction: the
layer's weight is m ∘ (W + s·B·A) / ‖W + s·B·A‖, with row norms; m [out] is trained and starts as
‖W‖. The norm is a constant in backward, as the paper proposes and PEFT does. All of this is a
factor on each output of the ordinary product, c = m / ‖W + s·B·A‖.

A and B are float32 whatever the dtype of the product: a bfloat16 adapter stops learning when
learning rate x update falls below half a unit in its last place (at |w| = 0.01 that is 3e-5).

In addition, modules other than frozen linears (embedding, head, norms) can be trained in full:
PEFT's ``modules_to_save``. A float32 copy replaces the base model's parameter and is cast at use.
The original is kept for ``detach``, and parameters tied to it stay tied to it.

Dropout acts on the adapter's input only. Its masks are a function of (seed, step, micro-batch,
layer), not of a generator's state, so recomputed layers, reordered micro-batches and resumed runs
all see the same masks.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from halfbyte.errors import CheckpointError, ConfigError
from halfbyte.linear.frozen import FrozenLinear
from halfbyte.linear.fused_lora import LowRank
from halfbyte.runtime.matmul import product

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class LoRAConfig:
    """Configuration of the adapters to attach.

    Attributes:
        r: Rank of the update.
        alpha: Numerator of the scaling (``lora_alpha``).
        dropout: Probability with which an element of the adapter's input is zeroed in training.
        use_rslora: Scale by alpha / √r instead of alpha / r.
        target_modules: ``"all-linear"`` (every frozen linear, so not the output head), names as
            PEFT takes them (a module matches when its path is the name or ends with ``.name``), or
            one regular expression that must match the whole path.
        rank_pattern: Overrides ``r`` for modules that match a key. A key is a regular expression
            that must match the whole path, or its end after a dot; the first match wins (PEFT's
            rule).
        alpha_pattern: Overrides ``alpha``, likewise.
        use_dora: Also train the norms of the weight's rows.
        modules_to_save: Modules to train in full: all whose path ends with the name (PEFT's rule).
    """

    r: int = 16
    alpha: float = 16.0
    dropout: float = 0.0
    use_rslora: bool = False
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_dora: bool = False
    modules_to_save: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ConfigError(f"lora_r must be at least 1, got {self.r}")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"lora_dropout must be in [0, 1), got {self.dropout}")
        for name in ("rank_pattern", "alpha_pattern"):
            for key, value in getattr(self, name).items():
                try:
                    at_end(key, "")
                except re.error as error:
                    raise ConfigError(f"{name} {key!r} is no regular expression: {error}") from None
                if value < (1 if name == "rank_pattern" else 0):
                    raise ConfigError(f"{name} {key!r} must be positive, got {value}")

    @property
    def scaling(self) -> float:
        """The factor s of the update s·B·A."""
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def at(self, path: str) -> "LoRAConfig":
        """Return the configuration of the module at ``path``, with the patterns resolved."""
        return replace(
            self,
            r=next((v for k, v in self.rank_pattern.items() if at_end(k, path)), self.r),
            alpha=next((v for k, v in self.alpha_pattern.items() if at_end(k, path)), self.alpha),
            rank_pattern={},
            alpha_pattern={},
        )


def at_end(pattern: str, path: str) -> bool:
    """Whether the expression matches the whole ``path``, or its end after a dot."""
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


class DropoutClock:
    """Training position that the dropout masks depend on; shared by all adapters of a model."""

    def __init__(self, seed: int) -> None:
        self.seed, self.step, self.micro_batch = seed, 0, 0
        self.running = False

    def mask(self, like: Tensor, p: float, layer: int) -> Tensor:
        """Return a mask of the shape and dtype of ``like``: 0 with probability p, else 1/(1-p)."""
        place = f"{self.seed}/{self.step}/{self.micro_batch}/{layer}".encode()
        seed = int.from_bytes(blake2b(place, digest_size=8).digest(), "little") >> 1
        generator = torch.Generator(like.device).manual_seed(seed)
        mask = torch.empty_like(like).bernoulli_(1.0 - p, generator=generator)
        return mask.div_(1.0 - p)


class LoRA(nn.Module):
    """One adapter: ``lora_A`` [r, in] and ``lora_B`` [out, r], float32, and how to apply them.

    With DoRA there is also ``lora_magnitude_vector`` [out], float32; otherwise it is None.

    Args:
        linear: The adapted layer, with its weight loaded; the adapter is on its device.
        config: The configuration of this module, see ``LoRAConfig.at``.
        index: Index among the adapters of the model, for the dropout masks.
        clock: The clock of the model.
    """

    def __init__(
        self, linear: FrozenLinear, config: LoRAConfig, *, index: int, clock: DropoutClock
    ) -> None:
        super().__init__()
        device = linear.device
        self.config, self.index, self.clock = config, index, clock
        self.lora_A = nn.Parameter(torch.empty(config.r, linear.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, config.r, device=device))
        self.lora_magnitude_vector: nn.Parameter | None = None
        if config.use_dora:
            norms = torch.linalg.vector_norm(linear.dense(torch.float32), dim=1)
            self.lora_magnitude_vector = nn.Parameter(norms)
        self._linear = (linear,)  # in a tuple, so that it is not registered as a submodule
        self._norms: tuple[Any, Tensor] | None = None

    def reset(self, seed: int) -> None:
        """Initialise ``lora_A`` (Kaiming uniform, a = √5, as PEFT does) and set ``lora_B`` to 0."""
        bound = 1.0 / math.sqrt(self.lora_A.shape[1])
        # Sampled on the CPU, so that a seed gives the same adapter on every device.
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.empty(self.lora_A.shape).uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            self.lora_A.copy_(drawn)
            self.lora_B.zero_()

    @torch.no_grad()
    def begin(self, a: Tensor, b: Tensor) -> None:
        """Start from the update b·a instead of zero: a [k, in], b [out, k], k at most r.

        ``lora_A`` is scaled to the norm of a random one, so that the same learning rate suits both.
        """
        size = a.square().mean().sqrt() * math.sqrt(3 * a.shape[1])
        if size > 0:
            self.lora_A[: len(a)] = a / size
            self.lora_B[:, : len(a)] = b * (size / self.config.scaling)

    @property
    def factors(self) -> tuple[Tensor, Tensor, float]:
        """Return A [r, in], B [out, r] and the scaling s."""
        return self.lora_A, self.lora_B, self.config.scaling

    def update(self, x: Tensor) -> LowRank:
        """Return the update for the input ``x``; see ``linear.fused_lora.LowRank``."""
        keep = self.clock.mask(x, self.config.dropout, self.index) if self.drops else None
        return LowRank(*self.factors, keep)

    @property
    def drops(self) -> bool:
        """Whether `update` applies a dropout mask."""
        return self.clock.running and self.config.dropout > 0.0

    @property
    def rescales(self) -> bool:
        """Whether `rescale` changes y, as with DoRA."""
        return self.lora_magnitude_vector is not None

    def rescale(self, y: Tensor) -> Tensor:
        """Return the layer's output for y = x(W + s·B·A)ᵀ + b: with DoRA c·(y - b) + b.

        Computed as y + (c - 1)·(y - b), since bfloat16 has no value between 1 and 1.0078.
        """
        if self.lora_magnitude_vector is None:
            return y
        bias = self._linear[0].bias
        excess = (self.lora_magnitude_vector / self._row_norms(y.dtype) - 1.0).to(y.dtype)
        return torch.addcmul(y, y if bias is None else y - bias.to(y.dtype), excess)

    @torch.no_grad()
    def _row_norms(self, dtype: torch.dtype) -> Tensor:
        """Return ‖W + s·B·A‖ of each row [out], W in ``dtype``, float32 or wider.

        The square is expanded, which avoids a second matrix of the size of W. Its inputs change
        once per optimizer step, so it is computed once for all micro-batches, and only once for
        generation.
        """
        linear, s = self._linear[0], self.config.scaling
        held = (
            self.lora_A,
            self.lora_B,
            *linear.parameters(recurse=False),
            *linear.buffers(recurse=False),
        )
        key = (dtype, [(t.device, t.data_ptr(), t._version) for t in held])
        if self._norms is None or self._norms[0] != key:
            weight, wide = linear.dense(dtype), torch.promote_types(dtype, torch.float32)
            square = torch.linalg.vector_norm(weight, dim=1, dtype=wide).square_()
            a, b = self.lora_A.to(wide), self.lora_B.to(wide)
            across = product(weight, a.to(dtype)).to(wide)
            square += (b * (2.0 * s * across + s * s * (b @ (a @ a.t())))).sum(1)
            # Avoids 0/0 for a row of zeros.
            smallest = torch.finfo(wide).tiny
            self._norms = key, square.clamp_(min=smallest).sqrt_()
        return self._norms[1]

    def forget(self) -> None:
        """Drop DoRA's cached norms; after a dry run they come from weights never decoded."""
        self._norms = None


class _Cast(nn.Module):
    """Casts a parameter that is trained in full to the dtype its module expects."""

    def __init__(self, base: nn.Parameter) -> None:
        super().__init__()
        self.base = (base,)  # in a tuple, so that it is not registered as a parameter

    def forward(self, trained: Tensor) -> Tensor:
        return trained.to(self.base[0].dtype)


def trained_whole(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the float32 copies trained in place of the module's parameters, by name."""
    lists: Any = getattr(module, "parametrizations", {})
    return {leaf: one.original for leaf, one in lists.items() if isinstance(one[0], _Cast)}


def _train_whole(module: nn.Module) -> None:
    for leaf, base in list(module.named_parameters(recurse=False)):
        copy = base.detach().to(torch.float32, copy=True)
        setattr(module, leaf, nn.Parameter(copy))
        # torch requires unsafe=True for a parametrization that changes the dtype.
        parametrize.register_parametrization(module, leaf, _Cast(base), unsafe=True)


def _restore(model: nn.Module) -> None:
    for module in list(model.modules()):
        for leaf in trained_whole(module):
            (cast,) = module.parametrizations[leaf]  # type: ignore[index]
            parametrize.remove_parametrizations(module, leaf, leave_parametrized=False)
            setattr(module, leaf, cast.base[0])


def _modules_to_save(model: nn.Module, names: tuple[str, ...]) -> list[nn.Module]:
    modules = dict(model.named_modules())
    able = {
        path
        for path, module in modules.items()
        if not isinstance(module, FrozenLinear | LoRA)
        and any(True for _ in module.parameters(recurse=False))
        and not any(True for _ in module.children())
    }
    chosen = {path: module for path, module in modules.items() if path.endswith(names)}
    # PEFT would make copies of these as well, which the adapter does not hold.
    unloaded = [path for path in getattr(model, "halfbyte_removed", ()) if path.endswith(names)]
    if unloaded:
        raise ConfigError(
            f"modules_to_save: {', '.join(names)} also matches {unloaded[0]}, and encoders are not "
            f"trained; write more of the path, as in {next(iter(chosen), 'model.norm')}"
        )
    for path, module in chosen.items():
        if path not in able:
            why = "it is made of other modules, or has no parameters"
            if type(module) is FrozenLinear:
                why = "its weight is frozen; give it an adapter (target_modules)"
            elif isinstance(module, FrozenLinear):
                why = "it is packed in 4 bits; leave out quantize_head and quantize_embeddings"
            raise ConfigError(f"modules_to_save: {path} cannot be trained in full, {why}")
    if unknown := [name for name in names if not any(path.endswith(name) for path in chosen)]:
        kinds = ", ".join(sorted({path.rpartition(".")[2] for path in able}))
        raise ConfigError(
            f"modules_to_save names what this model does not have: {', '.join(unknown)}; it has: "
            f"{kinds}"
        )
    return list(chosen.values())


def frozen_linears(model: nn.Module) -> dict[str, FrozenLinear]:
    """Return every ``FrozenLinear`` of ``model`` by its path, in the model's order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, FrozenLinear)}


def attach(model: nn.Module, config: LoRAConfig, *, seed: int) -> list[str]:
    """Put a fresh adapter on every module that ``config.target_modules`` names.

    Args:
        model: A model of ``models.build`` whose weights are in place.
        config: Rank, scaling, dropout, targets.
        seed: Fixes the initial A of each adapter, and the dropout masks.

    Returns:
        The paths of the adapted modules, in the model's order.

    Raises:
        ConfigError: If a name or expression matches no module (the message lists the modules), if a
            module cannot be trained in full, or if there is nothing to train.
    """
    _restore(model)
    whole = _modules_to_save(model, config.modules_to_save)
    # A packed head or embedding is a subclass and takes no adapter.
    linears = {n: m for n, m in frozen_linears(model).items() if type(m) is FrozenLinear}
    refused = {path: why for path, linear in linears.items() if (why := linear.why_no_adapter)}
    names = choose_targets(list(linears), refused, config.target_modules)
    if not names and not whole:
        raise ConfigError(f"{type(model).__name__} has no linear layer that could get an adapter")
    for option in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, option):
            if not any(at_end(key, name) for name in names):
                raise ConfigError(
                    f"{option} {key!r} matches no layer that gets an adapter; it must match a "
                    f"path such as {names[0]!r}, or its end"
                )
    clock = DropoutClock(seed)
    for index, name in enumerate(names):
        adapter = LoRA(linears[name], config.at(name), index=index, clock=clock)
        digest = blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
        adapter.reset(int.from_bytes(digest, "little") >> 1)
        linears[name].adapter = adapter
    for module in whole:
        _train_whole(module)
    return names


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
        chosen = [path for path in paths if pattern.fullmatch(path) or _ends_with(path, wanted)]
        if not chosen:
            raise ConfigError(
                f"target_modules {wanted!r} matches no linear layer of this model; an expression "
                f"must match a whole path such as {paths[0]!r}, and the names are: {kinds}"
            )
        return chosen
    unknown = [name for name in wanted if not any(_ends_with(path, name) for path in paths)]
    if unknown or not wanted:
        raise ConfigError(
            "target_modules names what this model does not have: "
            f"{', '.join(unknown) or '(nothing)'}; it has: {kinds}"
        )
    return [path for path in paths if any(_ends_with(path, name) for name in wanted)]


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
        ambiguous = any(_ends_with(path, name) for path in others for name in wanted)
    return tuple(adapted) if ambiguous else wanted


def _ends_with(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


def detach(model: nn.Module) -> None:
    """Remove every adapter and restore the base model."""
    for linear in frozen_linears(model).values():
        linear.adapter = None
    _restore(model)


def adapters(model: nn.Module) -> dict[str, LoRA]:
    """Return the attached adapters by module path."""
    return {
        name: linear.adapter
        for name, linear in frozen_linears(model).items()
        if isinstance(linear.adapter, LoRA)
    }


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters by name.

    The names are ``<module path>.lora_A.weight``, ``….lora_B.weight`` and, with DoRA,
    ``….lora_magnitude_vector``; modules trained in full keep the names of their parameters.
    """
    found: dict[str, nn.Parameter] = {}
    for name, adapter in adapters(model).items():
        found[f"{name}.lora_A.weight"] = adapter.lora_A
        found[f"{name}.lora_B.weight"] = adapter.lora_B
        if adapter.lora_magnitude_vector is not None:
            found[f"{name}.lora_magnitude_vector"] = adapter.lora_magnitude_vector
    for path, module in model.named_modules():
        found |= {f"{path}.{leaf}": one for leaf, one in trained_whole(module).items()}
    return found


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the trained tensors by name, detached but not copied; float32."""
    return {name: parameter.detach() for name, parameter in adapter_parameters(model).items()}


def load_adapter_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy ``state`` into the attached adapters.

    Raises:
        CheckpointError: If a tensor is missing, unexpected or has another shape. All of them are
            listed, and nothing is copied.
    """
    own = adapter_parameters(model)
    faults = [f"missing: {name}" for name in own if name not in state]
    faults += [f"unexpected: {name}" for name in state if name not in own]
    faults += [
        f"{name}: expected shape {list(own[name].shape)}, got {list(state[name].shape)}"
        for name in own
        if name in state and own[name].shape != state[name].shape
    ]
    if faults:
        shown = faults[:8] + ([f"… and {len(faults) - 8} more"] if len(faults) > 8 else [])
        raise CheckpointError("the adapter does not fit this model:\n  " + "\n  ".join(shown))
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name])


def dropout_clock(model: nn.Module) -> DropoutClock | None:
    """Return the clock shared by the adapters of ``model``, or None if it has none."""
    return next((adapter.clock for adapter in adapters(model).values()), None)


@torch.no_grad()
def delta(linear: FrozenLinear) -> Tensor:
    """Return the adapter's change of the weight: s·B·A, or with DoRA c·(W + s·B·A) - W.

    Float32 [out, in].

    Raises:
        ValueError: If the layer has no adapter.
    """
    if not isinstance(linear.adapter, LoRA):
        raise ValueError("this layer has no adapter; attach one, or skip it")
    adapter = linear.adapter
    added = (adapter.lora_B.float() @ adapter.lora_A.float()).mul_(adapter.config.scaling)
    if adapter.lora_magnitude_vector is None:
        return added
    weight = linear.dense(torch.float32)
    factor = adapter.lora_magnitude_vector / adapter._row_norms(torch.float32)
    return (weight + added).mul_(factor[:, None]).sub_(weight)
