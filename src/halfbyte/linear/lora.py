"""Low-rank adapters: configuration, parameters, attaching, and their state by name.

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

Experts, and matrices of transformers' own such as routers, get adapters on request:
PEFT's ``target_parameters`` (parameter_lora.py, expert_lora.py). Other modules (embedding, head,
norms) can be trained in full: PEFT's ``modules_to_save`` (modules_to_save.py).

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

from halfbyte.errors import CheckpointError, ConfigError
from halfbyte.linear.expert_lora import ExpertLoRA
from halfbyte.linear.experts import ExpertLinear, expert_linears
from halfbyte.linear.frozen import FrozenLinear
from halfbyte.linear.fused_lora import LowRank
from halfbyte.linear.lora_targets import (
    ALL_LINEAR,
    at_end,
    choose_parameters,
    choose_targets,
    exact_parameters,
    exact_targets,
)
from halfbyte.linear.modules_to_save import modules_to_save, restore, train_whole, trained_whole
from halfbyte.linear.parameter_lora import (
    ParameterLoRA,
    adapt_parameter,
    adapter_of_parameter,
    detach_parameters,
    is_plain_matrix,
    kaiming_uniform,
    names_in_peft,
)
from halfbyte.linear.sequence_tiles import Tile, is_long, tiles_of
from halfbyte.runtime.matmul import product

_WEIGHT = ".weight"


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
        target_parameters: Parameters with an adapter, by the ends of their paths (PEFT's rule), or
            ``"experts"`` for all experts. ``r`` is the rank of each expert's adapter.
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
    target_parameters: tuple[str, ...] = ()

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
        if self.target_parameters and self.why_no_parameters is not None:
            raise ConfigError(f"target_parameters: {self.why_no_parameters}")

    @property
    def why_no_parameters(self) -> str | None:
        """Why what PEFT adapts as a parameter can get no adapter, or None if it can."""
        if self.dropout or self.use_dora:
            return "PEFT adapts it as a parameter, which excludes lora_dropout and use_dora"
        return None

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


class DropoutClock:
    """Training position that the dropout masks depend on; shared by all adapters of a model.

    Attributes:
        tile: The tile of a long sequence that is computed at the time (layers/tiled_layer.py).
    """

    def __init__(self, seed: int) -> None:
        self.seed, self.step, self.micro_batch = seed, 0, 0
        self.running = False
        self.tile: Tile | None = None

    def mask(self, like: Tensor, p: float, layer: int) -> Tensor:
        """Return a mask of the shape and dtype of ``like``: 0 with probability p, else 1/(1-p).

        That of a long sequence is drawn by tiles, so that it is the same whether ``like`` is the
        whole or the `tile` of it that a layer computes at the time.
        """
        if self.tile is None and like.dim() == 3 and is_long(*like.shape[:2]):
            mask = torch.empty_like(like)
            for tile in tiles_of(*like.shape[:2]):
                part = mask[tile.row : tile.row + 1, tile.start : tile.stop]
                part.copy_(self._draw(part, p, layer, tile))
            return mask
        return self._draw(like, p, layer, self.tile)

    def _draw(self, like: Tensor, p: float, layer: int, tile: Tile | None) -> Tensor:
        where = f"{self.seed}/{self.step}/{self.micro_batch}/{layer}"
        if tile is not None:
            where += f"/{tile.row}/{tile.start}"
        place = where.encode()
        seed = int.from_bytes(blake2b(place, digest_size=8).digest(), "little") >> 1
        generator = torch.Generator(like.device).manual_seed(seed)
        empty = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        mask = empty.bernoulli_(1.0 - p, generator=generator)
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
        """Initialise ``lora_A`` (Kaiming uniform, as PEFT does), and set ``lora_B`` to 0."""
        with torch.no_grad():
            self.lora_A.copy_(kaiming_uniform(self.lora_A.shape, seed))
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


def frozen_linears(model: nn.Module) -> dict[str, FrozenLinear]:
    """Return every ``FrozenLinear`` of ``model`` by its path, in the model's order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, FrozenLinear)}


def attach(model: nn.Module, config: LoRAConfig, *, seed: int) -> list[str]:
    """Put a fresh adapter on every module that ``config.target_modules`` names, and others.

    Args:
        model: A model of ``models.build`` whose weights are in place.
        config: Rank, scaling, dropout, targets.
        seed: Fixes the initial A of each adapter, and the dropout masks.

    Returns:
        What has an adapter, as PEFT would target it: the paths of modules, in the model's order,
        then those of parameters.

    Raises:
        ConfigError: If a name or expression matches no module (the message lists the modules), if a
            module cannot be trained in full, or if there is nothing to train.
    """
    detach(model)
    whole = modules_to_save(model, config.modules_to_save)
    # A packed head or embedding is a subclass and takes no adapter.
    linears = {n: m for n, m in frozen_linears(model).items() if type(m) is FrozenLinear}
    parameters = choose_parameters(_adaptable_parameters(model), config.target_parameters)
    as_parameters = {path for path in linears if path + _WEIGHT in parameters}
    refused = _refused(linears, config)
    names: list[str] = []
    if config.target_modules or not parameters:
        names = choose_targets(list(linears), refused, config.target_modules)
    if unable := sorted(as_parameters & {*refused}):
        raise ConfigError(f"target_parameters: {unable[0]}.weight, {refused[unable[0]]}")
    owners = {model.get_submodule(path.rpartition(".")[0]): path for path in parameters}
    if twice := [path for module, path in owners.items() if module in whole]:
        raise ConfigError(f"target_parameters and modules_to_save both name {twice[0]}; remove one")
    if not names and not parameters and not whole:
        raise ConfigError(f"{type(model).__name__} has no linear layer that could get an adapter")
    for option in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, option):
            if not any(at_end(key, name) for name in (*names, *parameters)):
                raise ConfigError(
                    f"{option} {key!r} matches no layer that gets an adapter; it must match a "
                    f"path such as {(*names, *parameters)[0]!r}, or its end"
                )
    clock = DropoutClock(seed)
    own = {name: config.at(name) for name in names}
    own |= {path: config.at(path + _WEIGHT) for path in as_parameters}
    for index, name in enumerate(path for path in linears if path in own):
        adapter = LoRA(linears[name], own[name], index=index, clock=clock)
        adapter.reset(_seed_of(seed, name))
        linears[name].adapter = adapter
    for path in parameters:
        if path.removesuffix(_WEIGHT) not in as_parameters:
            _attach_to_parameter(model, path, config.at(path), seed=_seed_of(seed, path))
    for module in whole:
        train_whole(module)
    as_parameters |= {path for path in names if linears[path].is_parameter_in_peft}
    return [
        *(path for path in names if path not in as_parameters),
        *(path + _WEIGHT for path in linears if path in as_parameters),
        *(path for path in parameters if path.removesuffix(_WEIGHT) not in as_parameters),
    ]


def _refused(linears: Mapping[str, FrozenLinear], config: LoRAConfig) -> dict[str, str]:
    """Return why some of the linears must not get an adapter."""
    refused = {path: why for path, linear in linears.items() if (why := linear.why_no_adapter)}
    if (why := config.why_no_parameters) is not None:
        parameters = (path for path, linear in linears.items() if linear.is_parameter_in_peft)
        refused = dict.fromkeys(parameters, why) | refused
    return refused


def _seed_of(seed: int, name: str) -> int:
    digest = blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _adaptable_parameters(model: nn.Module) -> dict[str, bool]:
    """Return the parameters of transformers' model that can get an adapter, and if of experts."""
    found: dict[str, bool] = {}
    for path, module in model.named_modules():
        if isinstance(module, ExpertLinear):
            found[path] = True
        elif type(module) is FrozenLinear or is_plain_matrix(module):
            found[path + _WEIGHT] = False
    return found


def _attach_to_parameter(model: nn.Module, path: str, config: LoRAConfig, *, seed: int) -> None:
    owner, _, leaf = path.rpartition(".")
    module = model.get_submodule(owner)
    adapter: ParameterLoRA
    if isinstance(linear := module._modules.get(leaf), ExpertLinear):
        adapter = ExpertLoRA(linear, r=config.r, scaling=config.scaling)
        adapter.reset(seed)
        linear.adapter = adapter
        return
    weight = module._parameters[leaf]
    assert weight is not None
    rows, columns = weight.shape
    adapter = ParameterLoRA(columns, rows, r=config.r, scaling=config.scaling, device=weight.device)
    adapter.reset(seed)
    adapt_parameter(module, leaf, adapter)


def in_peft_terms(model: nn.Module, config: LoRAConfig, adapted: Sequence[str]) -> LoRAConfig:
    """Return ``config`` with targets and patterns that in PEFT mean exactly what has an adapter.

    PEFT looks for a parameter's rank and scaling under the parameter's path.

    Args:
        model: The model.
        config: The configuration of its adapters.
        adapted: The result of `attach`.
    """
    linears = frozen_linears(model)
    modules = [path for path in adapted if path in linears]
    parameters = [path for path in adapted if path not in linears]
    targets: str | tuple[str, ...] = ()
    if modules:
        targets = exact_targets(model, modules, config.target_modules)
    if isinstance(targets, str) and any(linear.is_parameter_in_peft for linear in linears.values()):
        targets = tuple(modules)  # PEFT takes an expression for its matches' last parts there
    held = [*(path + _WEIGHT for path in linears), *expert_linears(model)]
    held += [path + _WEIGHT for path in getattr(model, "halfbyte_removed", ())]
    held += [name for name, _ in model.named_parameters()]
    patterns: dict[str, Mapping[str, Any]]
    patterns = {"r": config.rank_pattern, "alpha": config.alpha_pattern}
    for path in parameters:
        if (linear := linears.get(path.removesuffix(_WEIGHT))) is None:
            continue
        assert isinstance(linear.adapter, LoRA)
        for name, pattern in patterns.items():
            own = getattr(linear.adapter.config, name)
            if own != getattr(config.at(path), name):
                patterns[name] = {re.escape(path): own, **pattern}
    used = [
        {key: value for key, value in pattern.items() if any(at_end(key, n) for n in adapted)}
        for pattern in patterns.values()
    ]
    return replace(
        config,
        target_modules=targets,
        target_parameters=exact_parameters(held, parameters),
        rank_pattern=used[0],
        alpha_pattern=used[1],
    )


def detach(model: nn.Module) -> None:
    """Remove every adapter and restore the base model."""
    linears: dict[str, Any] = frozen_linears(model) | expert_linears(model)
    for linear in linears.values():
        linear.adapter = None
    detach_parameters(model)
    restore(model)


def adapters(model: nn.Module) -> dict[str, LoRA]:
    """Return the attached adapters of linear layers by module path."""
    return {
        name: linear.adapter
        for name, linear in frozen_linears(model).items()
        if isinstance(linear.adapter, LoRA)
    }


def parameter_adapters(model: nn.Module) -> dict[str, ParameterLoRA]:
    """Return the attached adapters of experts and other parameters, by the parameter's path."""
    found: dict[str, ParameterLoRA] = {}
    for path, module in model.named_modules():
        if isinstance(module, ExpertLinear) and isinstance(module.adapter, ParameterLoRA):
            found[path] = module.adapter
        elif (adapter := adapter_of_parameter(module, "weight")) is not None:
            found[path + _WEIGHT] = adapter
    return found


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters by name.

    The names are ``<module path>.lora_A.weight``, ``….lora_B.weight`` and, with DoRA,
    ``….lora_magnitude_vector``, the path of an adapted parameter being that of PEFT's wrapper
    (`names_in_peft`); modules trained in full keep the names of their parameters.
    """
    found: dict[str, nn.Parameter] = {}
    for name, adapter in adapters(model).items():
        found[f"{name}.lora_A.weight"] = adapter.lora_A
        found[f"{name}.lora_B.weight"] = adapter.lora_B
        if adapter.lora_magnitude_vector is not None:
            found[f"{name}.lora_magnitude_vector"] = adapter.lora_magnitude_vector
    others = parameter_adapters(model)
    for path, name in names_in_peft(others).items():
        found[f"{name}.lora_A.weight"] = others[path].lora_A
        found[f"{name}.lora_B.weight"] = others[path].lora_B
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
