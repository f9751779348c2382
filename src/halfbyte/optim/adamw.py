"""AdamW as an optimizer of torch: groups, steps, and a state that has one form wherever it lives.

The rule is in rule.py and, for a GPU, in gpu.py; where the state lives is paging.py's matter. This
file knows which parameters there are, what their update depends on, and when it happens.

A step asks nothing of the host: learning rates, step counts and the gradient's scale are on the
device. The scale is where clipping goes (min(1, limit / norm)), and where it is NaN or infinite,
since a loss or a gradient was, neither parameters nor state nor step counts change. So a step can
be queued behind its backward before anyone has looked at the loss, and captured in a CUDA graph.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from halfbyte.errors import CheckpointError, ConfigError
from halfbyte.optim import rule
from halfbyte.optim.layout import Group, Piece, pieces_of
from halfbyte.optim.paging import Resident

logger = logging.getLogger("halfbyte")

_TYPES = (torch.float32, torch.bfloat16, torch.float16)


@cache
def _gpu_kernels() -> ModuleType | None:
    """Return gpu.py, or None, having announced why, where there is no Triton."""
    try:
        from halfbyte.optim import gpu
    except ImportError as error:
        logger.warning("no Triton (%s): AdamW on the GPU is plain PyTorch", error)
        return None
    return gpu


class AdamW(torch.optim.Optimizer):
    """AdamW with state of 32 or 8 bits, in memory of the device or paged to the host's.

    Args:
        params: Parameters, or groups of them, as for every optimizer of torch: float32, bfloat16
            or float16, contiguous, all on one device.
        lr: Learning rate; a scalar tensor is read on the device at every step.
        betas: Decays of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay.
        state_bits: Width of the moments. With 8, parameters of fewer than 4096 elements keep 32.
        bfloat16: How a bfloat16 parameter keeps small updates: a float32 ``master`` copy in the
            state, or ``stochastic`` rounding.
        impl: ``gpu`` for Triton, ``torch`` for plain PyTorch; ``auto`` for Triton on a GPU.

    Raises:
        ConfigError: If an argument, or a parameter's type, device or layout, is not as above.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        state_bits: Literal[32, 8] = 32,
        bfloat16: Literal["master", "stochastic"] = "master",
        impl: Literal["auto", "gpu", "torch"] = "auto",
    ) -> None:
        for name, value, known in (
            ("state_bits", state_bits, (32, 8)),
            ("bfloat16", bfloat16, ("master", "stochastic")),
            ("impl", impl, ("auto", "gpu", "torch")),
        ):
            if value not in known:
                raise ConfigError(f"{name} must be one of {known}, not {value!r}")
        self._bits, self._master = state_bits, bfloat16 == "master"
        self._store: Resident | None = None
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self._parameters = [p for group in self.param_groups for p in group["params"]]
        devices = {parameter.device for parameter in self._parameters}
        if len(devices) != 1:
            raise ConfigError(
                f"all parameters must be on one device, not on {sorted(map(str, devices))}"
            )
        (self._device,) = devices
        wants_gpu = impl == "gpu" or (impl == "auto" and self._device.type == "cuda")
        self._gpu = _gpu_kernels() if wants_gpu else None
        self._steps = self._vector(torch.float32)
        self._lr = self._vector(torch.float32)
        self._one = torch.ones((), device=self._device)
        self._seen: dict[str, Any] = {}
        self._launches: dict[tuple[Any, ...], list[Any]] = {}
        self._begun: tuple[Tensor, Any] | None = None
        self._done: set[int] = set()

    def _vector(self, dtype: torch.dtype) -> Tensor:
        return torch.zeros(len(self._parameters), dtype=dtype, device=self._device)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, before the first step.

        Raises:
            ConfigError: If a parameter is of a type or layout that is not supported, or there has
                been a step.
        """
        if self._store is not None:
            raise ConfigError("parameters cannot be added to AdamW after its first step")
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if parameter.dtype not in _TYPES or not parameter.is_contiguous():
                raise ConfigError(
                    f"AdamW takes contiguous float32, bfloat16 and float16 parameters, not "
                    f"{parameter.dtype} with strides {parameter.stride()}"
                )
            if parameter.dtype == torch.float16 and not self._master:
                raise ConfigError(
                    "stochastic rounding is for bfloat16; float16 needs a master copy"
                )
        self._parameters = [p for group in self.param_groups for p in group["params"]]

    # --- steps ----------------------------------------------------------------------------------

    @torch.no_grad()
    def step(
        self, closure: Callable[[], Any] | None = None, *, grad_scale: Tensor | None = None
    ) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: Called first, with gradients enabled, as torch has it.
            grad_scale: float32 scalar on the device, by which gradients are multiplied. If it is
                not finite, nothing changes.

        Returns:
            What ``closure`` returned.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        scalars, scale = self._begin(grad_scale)
        store = self._state_store()
        updated = [self._parameters[i] for i in self._seen["active"]]
        store.visit(lambda group, memory, base: self._update(group, memory, base, scalars, scale))
        # A kernel writes without counting it, and what is derived from a parameter is derived anew
        # when the count has changed.
        torch.autograd.graph.increment_version(updated)
        return result

    def _begin(self, grad_scale: Tensor | None) -> tuple[Any, Tensor]:
        """Count the step, and compute what the update depends on besides tensors."""
        scale = self._one if grad_scale is None else grad_scale
        constants = []
        place = 0
        for number, group in enumerate(self.param_groups):
            (beta1, beta2), eps, decay = group["betas"], group["eps"], group["weight_decay"]
            logs = [math.log(beta) if beta else -math.inf for beta in (beta1, beta2)]
            count = len(group["params"])
            constants.append((count, (beta1, beta2, eps, decay, *logs)))
            lr, mine = group["lr"], self._lr[place : place + count]
            if isinstance(lr, Tensor):
                mine.copy_(lr.detach())
                self._seen.pop(f"lr {number}", None)
            elif self._seen.get(f"lr {number}") != lr:
                mine.fill_(lr)
                self._seen[f"lr {number}"] = lr
            place += count
        if self._seen.get("constants") != constants:
            rows = [row for count, row in constants for _ in range(count)]
            self._constants = torch.tensor(rows, dtype=torch.float64).to(self._device)
            self._seen["constants"] = constants
        active = tuple(i for i, p in enumerate(self._parameters) if p.grad is not None)
        if self._seen.get("active") != active:
            self._active = self._vector(torch.float32)
            self._active[list(active)] = 1.0
            self._seen["active"] = active
            self._launches.clear()
        if self._gpu is not None:
            scalars = self._gpu.prepare(self._steps, self._active, self._lr, self._constants, scale)
            return scalars, scale
        if not math.isfinite(float(scale)):
            return None, scale
        self._steps += self._active
        rows = rule.scalars_of(self._steps, self._lr, self._constants[:, :4]).tolist()
        return [rule.Scalars(*row) for row in rows], scale

    def _update(self, group: Group, memory: Tensor, base: int, scalars: Any, scale: Tensor) -> None:
        """Update the pieces of a group, whose state is ``memory`` from byte ``base`` on."""
        if self._gpu is not None:
            key = group.offset, memory.data_ptr()
            if key not in self._launches:
                kinds: dict[torch.dtype, list[Piece]] = {}
                for piece in self._active_ones(group):
                    kinds.setdefault(self._parameters[piece.index].dtype, []).append(piece)
                self._launches[key] = [
                    self._gpu.Launch(pieces, memory, base) for pieces in kinds.values()
                ]
            for launch in self._launches[key]:
                launch(self._parameters, [p.grad for p in self._parameters], scalars, scale)
            return
        if scalars is None:
            return
        for piece in self._active_ones(group):
            parameter = self._parameters[piece.index]
            part = slice(piece.start, piece.start + piece.count)
            rule.update(
                parameter.detach().view(-1)[part],
                parameter.grad.view(-1)[part],
                piece.views(memory, base),
                scalars[piece.index],
                float(scale),
                seed=piece.index,
                start=piece.start,
            )

    def _active_ones(self, group: Group) -> list[Piece]:
        return [p for p in group.pieces if self._parameters[p.index].grad is not None]

    # --- state ----------------------------------------------------------------------------------

    @property
    def pieces(self) -> list[Piece]:
        """How the state is laid out."""
        return pieces_of(self._parameters, bits=self._bits, master=self._master)

    def _state_store(self) -> Resident:
        """Return where the state is, making it the first time."""
        if self._store is None:
            self._store = Resident(self.pieces, self._device)
            for piece in self._store.pieces:
                views = piece.views(self._store.memory)
                if "master" in views:
                    flat = self._parameters[piece.index].detach().view(-1)
                    views["master"].copy_(flat[piece.start : piece.start + piece.count])
        return self._store

    def state_dict(self) -> dict[str, Any]:
        """Return the state in the form that every mode of paging shares, on the CPU.

        ``state`` has, by number of the parameter, ``step``, and ``exp_avg`` and ``exp_avg_sq`` in
        the parameter's shape: float32, or uint8 with ``exp_avg_scales`` and ``exp_avg_sq_scales``
        (float32, one for 256 elements in a row); and ``master`` where there is such a copy. It is
        empty before the first step.
        """
        groups, place = [], 0
        for group in self.param_groups:
            numbers = list(range(place, place + len(group["params"])))
            groups.append({**group, "params": numbers})
            place += len(numbers)
        state: dict[int, dict[str, Tensor]] = {}
        if self._store is not None:
            parts: dict[int, dict[str, list[Tensor]]] = {}
            for piece in self._store.pieces:
                mine = parts.setdefault(piece.index, {})
                for name, view in piece.views(self._store.memory).items():
                    mine.setdefault(name, []).append(view.to("cpu", copy=True))
            steps = self._steps.cpu()
            for index, fields in parts.items():
                shape = self._parameters[index].shape
                whole = {name: torch.cat(views) for name, views in fields.items()}
                state[index] = {"step": steps[index].clone()} | {
                    name: value if name.endswith("_scales") else value.view(shape)
                    for name, value in whole.items()
                }
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, bit for bit, whatever the paging was.

        Raises:
            CheckpointError: If it is of other parameters, or of another width.
        """
        groups = state_dict["param_groups"]
        if [len(g["params"]) for g in groups] != [len(g["params"]) for g in self.param_groups]:
            raise CheckpointError("the optimizer's state is of other groups of parameters")
        for mine, theirs in zip(self.param_groups, groups, strict=True):
            mine.update({key: value for key, value in theirs.items() if key != "params"})
        self._seen.clear()
        if not state_dict["state"]:
            return
        store = self._state_store()
        for piece in store.pieces:
            given = state_dict["state"][piece.index]
            for name, view in piece.views(store.memory).items():
                value = given.get(name)
                total = self._parameters[piece.index].numel()
                count = -(-total // rule.BLOCK) if name.endswith("_scales") else total
                if value is None or value.numel() != count or value.dtype != view.dtype:
                    raise CheckpointError(
                        f"the optimizer's state of parameter {piece.index} has no {name} of "
                        f"{count} {str(view.dtype).removeprefix('torch.')}: it is of another "
                        "parameter, or of another width than optim asks for"
                    )
                start = piece.start // rule.BLOCK if name.endswith("_scales") else piece.start
                view.copy_(value.reshape(-1)[start : start + view.numel()])
        self._steps.copy_(
            torch.stack([state_dict["state"][i]["step"] for i in range(len(self._parameters))])
        )
