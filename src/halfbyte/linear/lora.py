"""Low-rank adapters: which layers get one, what it holds, and how it goes in and out by name.

LoRA (Hu et al. 2021) leaves a weight W alone and trains W + s·B·A with A [r, in], B [out, r].
A starts as Kaiming-uniform noise and B as zero, so an attached adapter changes nothing at first.
The scaling is s = alpha / r, or alpha / √r with rank-stabilised LoRA (Kalajdzievski 2023). It is
applied in one place: the product in ``linear/group.py``. Patterns give
some layers another r or alpha.

DoRA (Liu et al. 2024) trains the length of each row of the weight apart from its direction: the
layer's weight is m ∘ (W + s·B·A) / ‖W + s·B·A‖, with norms of rows, m [out] trained and ‖W‖ at
first. The norm counts as a constant in backward, as the paper proposes and PEFT does. All of it is
a factor on each output of the ordinary product, c = m / ‖W + s·B·A‖.

A and B are float32 whatever the dtype of the product: a bfloat16 adapter stops learning when
learning rate x update falls under half a unit in its last place (at |w| = 0.01 that is 3e-5).

Beside the pairs, modules that are no frozen linears (embedding, head, norms) can be trained whole:
PEFT's ``modules_to_save``. A float32 copy takes the place of the base's parameter and is cast at
use. The base's own is kept for ``detach``, and whatever was tied to it stays tied to it.

Dropout acts on the adapter's input only. Its masks are a function of (seed, step, micro-batch,
layer), not of a generator's state, so that a layer that is recomputed in backward, a micro-batch
that is run in another order, and a run that is resumed all see the same masks.
"""

import math
import re
from collections.abc import Mapping
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
    """What to attach, and how.

    Attributes:
        r: Rank of the update.
        alpha: Numerator of the scaling (``lora_alpha``).
        dropout: Probability with which an element of the adapter's input is zeroed in training.
        use_rslora: Scale by alpha / √r instead of alpha / r.
        target_modules: ``"all-linear"`` (every frozen linear, so not the output head), names as
            PEFT takes them (a module matches when its path is the name or ends with ``.name``), or
            one regular expression that must match the whole path.
        rank_pattern: Another ``r`` for the modules a key matches. A key is a regular expression
            that must match the whole path, or its end after a dot; the first that matches counts
            (PEFT's rule).
        alpha_pattern: Another ``alpha``, likewise.
        use_dora: Train the lengths of the weight's rows too.
        modules_to_save: Modules to train whole: all whose path ends so (PEFT's rule).
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
        """Return what holds for the module at ``path``: the patterns applied, and gone."""
        return replace(
            self,
            r=next((v for k, v in self.rank_pattern.items() if at_end(k, path)), self.r),
            alpha=next((v for k, v in self.alpha_pattern.items() if at_end(k, path)), self.alpha),
            rank_pattern={},
            alpha_pattern={},
        )


def at_end(pattern: str, path: str) -> bool:
    """Whether the expression matches ``path``, or what follows one of its dots, to the end."""
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


class DropoutClock:
    """Where training is, as the dropout masks see it; one for all adapters of a model."""

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

    With DoRA there is ``lora_magnitude_vector`` [out], float32, too; else it is None.

    Args:
        linear: What it is for, its weight in place; its device is the adapter's.
        config: What holds for this module, see ``LoRAConfig.at``.
        index: The place among the adapters of the model, for the dropout masks.
        clock: The model's.
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
        self._linear = (linear,)  # in a tuple, or it would be a child of its own child
        self._norms: tuple[Any, Tensor] | None = None

    def reset(self, seed: int) -> None:
        """Draw ``lora_A`` anew (Kaiming uniform, a = √5, as PEFT does) and set ``lora_B`` to 0."""
        bound = 1.0 / math.sqrt(self.lora_A.shape[1])
        # Drawn on the CPU, so that a seed means the same adapter on every device.
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.empty(self.lora_A.shape).uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            self.lora_A.copy_(drawn)
            self.lora_B.zero_()

    @torch.no_grad()
    def begin(self, a: Tensor, b: Tensor) -> None:
        """Begin with the update b·a instead of with none: a [k, in], b [out, k], k at most r.

        ``lora_A`` gets the size of a fresh one, so that one learning rate suits both beginnings.
        """
        size = a.square().mean().sqrt() * math.sqrt(3 * a.shape[1])
        if size > 0:
            self.lora_A[: len(a)] = a / size
            self.lora_B[:, : len(a)] = b * (size / self.config.scaling)

    @property
    def factors(self) -> tuple[Tensor, Tensor, float]:
        """A [r, in], B [out, r] and the scaling s."""
        return self.lora_A, self.lora_B, self.config.scaling

    def update(self, x: Tensor) -> LowRank:
        """Return the update for the input ``x``; see ``linear.fused_lora.LowRank``."""
        keep = self.clock.mask(x, self.config.dropout, self.index) if self.drops else None
        return LowRank(*self.factors, keep)

    @property
    def drops(self) -> bool:
        """Whether `update` draws a dropout mask."""
        return self.clock.running and self.config.dropout > 0.0

    @property
    def rescales(self) -> bool:
        """Whether `rescale` does anything: with DoRA."""
        return self.lora_magnitude_vector is not None

    def rescale(self, y: Tensor) -> Tensor:
        """Return the layer's output for y = x(W + s·B·A)ᵀ + b: with DoRA c·(y - b) + b.

        As y + (c - 1)·(y - b), because bfloat16 has no number between 1 and 1.0078.
        """
        if self.lora_magnitude_vector is None:
            return y
        bias = self._linear[0].bias
        excess = (self.lora_magnitude_vector / self._row_norms(y.dtype) - 1.0).to(y.dtype)
        return torch.addcmul(y, y if bias is None else y - bias.to(y.dtype), excess)

    @torch.no_grad()
    def _row_norms(self, dtype: torch.dtype) -> Tensor:
        """Return ‖W + s·B·A‖ of each row [out], W in ``dtype``, float32 or wider.

        The square is multiplied out, so that no second matrix of the size of W is made. What it
        depends on changes once in an optimizer step, so it is computed once for all micro-batches,
        and for generation once at all.
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
            # A row of zeros stays one, instead of becoming 0/0.
            smallest = torch.finfo(wide).tiny
            self._norms = key, square.clamp_(min=smallest).sqrt_()
        return self._norms[1]

    def forget(self) -> None:
        """Let go of DoRA's norms, if they were computed in a dry run, of weights nobody decoded."""
        self._norms = None


class _Cast(nn.Module):
    """What stands between a parameter that is trained whole and its module: a cast."""

    def __init__(self, base: nn.Parameter) -> None:
        super().__init__()
        self.base = (base,)  # in a tuple, or it would be a parameter of the model still

    def forward(self, trained: Tensor) -> Tensor:
        return trained.to(self.base[0].dtype)


def trained_whole(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return what is trained in place of the module's own parameters, by their names; float32."""
    lists: Any = getattr(module, "parametrizations", {})
    return {leaf: one.original for leaf, one in lists.items() if isinstance(one[0], _Cast)}


def _train_whole(module: nn.Module) -> None:
    for leaf, base in list(module.named_parameters(recurse=False)):
        copy = base.detach().to(torch.float32, copy=True)
        setattr(module, leaf, nn.Parameter(copy))
        # "unsafe" is torch's word for a dtype that changes.
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
    for path, module in chosen.items():
        if path not in able:
            why = "it is made of other modules, or has no parameters"
            if type(module) is FrozenLinear:
                why = "its weight is frozen; give it an adapter (target_modules)"
            elif isinstance(module, FrozenLinear):
                why = "it is packed in 4 bits; leave out quantize_head and quantize_embeddings"
            raise ConfigError(f"modules_to_save: {path} cannot be trained whole, {why}")
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
        ConfigError: If a name or an expression matches no module; the message lists what there is.
            If a module cannot be trained whole, or there is nothing to train.
    """
    _restore(model)
    whole = _modules_to_save(model, config.modules_to_save)
    # A packed head or embedding is a subclass, and takes none.
    linears = {n: m for n, m in frozen_linears(model).items() if type(m) is FrozenLinear}
    if not linears and not whole:
        raise ConfigError(
            f"{type(model).__name__} has no linear layer (torch.nn.Linear) that could get an "
            "adapter; a model made of others, such as GPT-2's Conv1D, cannot be trained"
        )
    names = _targets(list(linears), config.target_modules)
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


def _targets(paths: list[str], wanted: str | tuple[str, ...]) -> list[str]:
    if wanted == ALL_LINEAR:
        return paths
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


def _ends_with(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


def detach(model: nn.Module) -> None:
    """Take every adapter off; the base model is what it was."""
    for linear in frozen_linears(model).values():
        linear.adapter = None
    _restore(model)


def adapters(model: nn.Module) -> dict[str, LoRA]:
    """Return the attached adapters by the path of the module they sit on."""
    return {
        name: linear.adapter
        for name, linear in frozen_linears(model).items()
        if isinstance(linear.adapter, LoRA)
    }


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what is trained, by name.

    The names are ``<module path>.lora_A.weight``, ``….lora_B.weight`` and, with DoRA,
    ``….lora_magnitude_vector``; of modules that are trained whole, those of their parameters.
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
        CheckpointError: If a tensor is missing, unexpected or of another shape: all are listed,
            and nothing has been copied.
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
    """Return the clock the adapters of ``model`` share, or None if there are none."""
    return next((adapter.clock for adapter in adapters(model).values()), None)


@torch.no_grad()
def delta(linear: FrozenLinear) -> Tensor:
    """Return what the adapter adds to the weight: s·B·A, or with DoRA c·(W + s·B·A) - W.

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
