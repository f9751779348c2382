"""AdamW as a torch optimizer: parameter groups, steps, and state on the device or the host.

The update rule is in reference.py and, for a GPU, in triton_adamw.py; paging.py decides where the
state is stored. This file defines the parameters, the inputs of their update, and its timing.

A step needs nothing from the host: learning rates, step counts and the gradient's scale are on the
device. The scale implements clipping (min(1, limit / norm)); if it is NaN or infinite, because the
loss or a gradient is, neither parameters nor state nor step counts change. So a step can be queued
behind its backward before the host has read the loss, and captured in a CUDA graph.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from halfbyte.errors import CheckpointError, ConfigError
from halfbyte.optim import reference
from halfbyte.optim.buckets import Bucket, StateChunk, groups_of, pieces_of
from halfbyte.optim.managed import Managed, why_not
from halfbyte.optim.paging import Paging, Store, Streamed
from halfbyte.optim.sharded_state import SharedState
from halfbyte.quant.format import gpu_kernels

_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def _gpu_kernels() -> ModuleType | None:
    """Return the Triton kernels, or None if the GPU is not supported, which has been logged."""
    if gpu_kernels() is None:
        return None
    from halfbyte.optim import triton_adamw

    return triton_adamw


class AdamW(torch.optim.Optimizer):
    """AdamW with 32- or 8-bit state, on the device or paged to host memory.

    Args:
        params: Parameters or parameter groups, as for any torch optimizer: float32, bfloat16 or
            float16, contiguous, all on one device.
        lr: Learning rate; a scalar tensor is read on the device at every step.
        betas: Decays of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay.
        state_bits: Bits of the moments. With 8, parameters of fewer than 4096 elements keep 32.
        paging: Where the state is stored: ``off``, ``explicit``, ``auto`` or ``managed``, see
            paging.py. Results are identical. On a CPU it is ``off``.
        bfloat16: How a bfloat16 parameter keeps small updates: a float32 ``master`` copy in the
            state, or ``stochastic`` rounding.
        shared: Shares the state with other processes; paging is ``explicit`` then. A step updates a
            part of the parameters, `updated_parts`, and the caller must exchange them.
        impl: ``gpu`` for Triton, ``torch`` for plain PyTorch; ``auto`` for Triton on a GPU that it
            supports.

    Raises:
        ConfigError: If an argument, or a parameter's type, device or layout, is not as above, the
            device does not support this paging, or ``impl`` is ``gpu`` without Triton.
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
        paging: Literal["off", "explicit", "auto", "managed"] = "off",
        bfloat16: Literal["master", "stochastic"] = "master",
        shared: SharedState | None = None,
        impl: Literal["auto", "gpu", "torch"] = "auto",
    ) -> None:
        for name, value, known in (
            ("state_bits", state_bits, (32, 8)),
            ("paging", paging, ("off", "explicit", "auto", "managed")),
            ("bfloat16", bfloat16, ("master", "stochastic")),
            ("impl", impl, ("auto", "gpu", "torch")),
        ):
            if value not in known:
                raise ConfigError(f"{name} must be one of {known}, not {value!r}")
        self._bits, self._master = state_bits, bfloat16 == "master"
        self._store: Store | None = None
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self._parameters = [p for group in self.param_groups for p in group["params"]]
        devices = {parameter.device for parameter in self._parameters}
        if len(devices) != 1:
            raise ConfigError(
                f"all parameters must be on one device, not on {sorted(map(str, devices))}"
            )
        (self._device,) = devices
        self._wants_paging = paging != "off"
        self.paging = paging if self._device.type == "cuda" else "off"
        self._shared = shared
        if shared is not None:
            self.paging = "explicit"
        if self.paging == "managed" and (reason := why_not(self._device)) is not None:
            raise ConfigError(f'paging "managed" is not possible: {reason}. Use paging "explicit"')
        wants_gpu = impl == "gpu" or (impl == "auto" and self._device.type == "cuda")
        self._gpu = _gpu_kernels() if wants_gpu else None
        if impl == "gpu" and self._gpu is None:
            raise ConfigError('impl "gpu" needs Triton, which is not available. Use impl "auto"')
        self._steps = self._vector(torch.float32)
        self._lr = self._vector(torch.float32)
        self._one = torch.ones((), device=self._device)
        self._seen: dict[str, Any] = {}
        self._launches: dict[tuple[Any, ...], list[Any]] = {}
        self._begun: tuple[Any, Tensor] | None = None
        self._left: list[Bucket] = []
        self._ready: set[int] = set()

    def _vector(self, dtype: torch.dtype) -> Tensor:
        return torch.zeros(len(self._parameters), dtype=dtype, device=self._device)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, before the first step.

        Raises:
            ConfigError: If the dtype or layout of a parameter is not supported, or after the first
                step.
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
            closure: Called first, with gradients enabled, as in torch.
            grad_scale: float32 scalar on the device, factor of all gradients. If it is not finite,
                nothing changes.

        Returns:
            The result of ``closure``.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        self._begin(grad_scale)
        self._ready.update(self._seen["active"])
        self._visit_ready(last=True)
        self._begun = None
        self._ready.clear()
        return result

    @torch.no_grad()
    def step_parameters(
        self, parameters: Iterable[Tensor], *, grad_scale: Tensor | None = None
    ) -> None:
        """Update some parameters early, once their gradients are final.

        So a layer's update and its paging can overlap with the backward of the layers below it.
        `step` ends the step. All parameters must have a gradient (zeros at first). State on the
        host is updated in groups of at most 16 MiB, each when all of it is ready; state on the
        device is updated by `step`.

        This cannot be combined with clipping by the global norm, which requires all gradients
        before the first update; then only `prefetch` can run early.

        Args:
            parameters: The parameters with final gradients.
            grad_scale: As for `step`; the first call of a step decides.
        """
        if self._begun is None:
            self._begin(grad_scale)
        numbers = {id(parameter): i for i, parameter in enumerate(self._parameters)}
        self._ready.update(numbers[id(parameter)] for parameter in parameters)
        self._visit_ready(last=False)

    def _visit_ready(self, *, last: bool) -> None:
        """Update the groups whose parameters are all ready and that have not been updated."""
        assert self._begun is not None
        scalars, scale = self._begun
        waiting = set(self._seen["active"]) - self._ready
        due: list[Bucket] = []
        left: list[Bucket] = []
        for group in self._left:
            ready = waiting.isdisjoint(piece.index for piece in group.pieces)
            (due if ready else left).append(group)
        self._left = left
        self._state_store().visit(
            due,
            lambda group, memory, base: self._update(group, memory, base, scalars, scale),
            last=last,
        )
        # Kernels do not increment the version counters of parameters, from which caches of derived
        # tensors detect changes.
        done = {piece.index for group in due for piece in group.pieces}
        torch.autograd.graph.increment_version([self._parameters[i] for i in done])

    # --- paging ---------------------------------------------------------------------------------

    @property
    def state_bytes(self) -> int:
        """Bytes of all state, on the device and the host."""
        return sum(piece.nbytes for piece in self.pieces)

    def device_bytes(self, *, tight: bool = False) -> int:
        """Return the bytes of state on the device during a step; ``tight``: one short of memory."""
        if self.paging == "explicit":
            if self._shared is None:
                groups = groups_of(self.pieces)
            else:
                groups = groups_of(self.pieces, self._shared.size)
                own = self._shared.own(groups)
                groups = groups[own.start : own.stop]
            return sum(sorted(group.nbytes for group in groups)[-2:])
        return 0 if tight and self.paging != "off" else self.state_bytes

    def describe(self) -> str:
        """Return a one-line description."""
        where = {
            "off": "on the GPU",
            "explicit": "in the host's memory, streamed through the GPU at each update",
            "auto": "on the GPU; on the host while a step is short of memory",
            "managed": "in managed memory, on the host while a step is short of memory",
        }[self.paging]
        if self._shared is not None:
            where = (
                f"once in host memory for {self._shared.size} processes, which update a part each"
            )
        elif self._device.type != "cuda":
            where = "in the host's memory"
            if self._wants_paging:
                where += f": there is nothing to page from on {self._device}"
        return f"AdamW, state of {self._bits} bits: {self.state_bytes / 1e6:.0f} MB, {where}"

    def allocate(self) -> None:
        """Allocate the state now instead of in the first step."""
        self._state_store()

    def page_out(self) -> None:
        """Move the state to the host, ahead of a step that is short of memory.

        `step` moves it back before the update. No effect if paging is ``off``, or ``explicit``,
        which always has it on the host.
        """
        if self.paging in ("auto", "managed"):
            if self._store is None and self.paging == "auto":
                self._store = self._made(away=True)
            self._state_store().page_out()
            self._launches.clear()

    def prefetch(self) -> None:
        """Start to fetch the state that is updated first, e.g. before backward."""
        if self._store is not None:
            self._store.prefetch()

    def report(self) -> Paging | None:
        """Return statistics of paging since the last call; None if nothing is paged."""
        in_place = self._shared is not None and self._device.type != "cuda"
        if self._store is None or self.paging == "off" or in_place:
            return None
        return self._store.report()

    # --- parts of a step ------------------------------------------------------------------------

    def _begin(self, grad_scale: Tensor | None) -> None:
        """Count the step and compute the scalars of the update."""
        if self._begun is not None:
            return
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
        store = self._state_store()
        if self.paging in ("auto", "managed"):
            store.page_in()
        scalars = None
        if self._gpu is not None:
            scalars = self._gpu.prepare(self._steps, self._active, self._lr, self._constants, scale)
        elif math.isfinite(float(scale)):
            self._steps += self._active
            rows = reference.scalars_of(self._steps, self._lr, self._constants[:, :4]).tolist()
            scalars = [reference.Scalars(*row) for row in rows]
        self._begun, self._left = (scalars, scale), list(store.units())

    def _update(
        self, group: Bucket, memory: Tensor, base: int, scalars: Any, scale: Tensor
    ) -> None:
        """Update the pieces of a group; ``memory`` holds the state from byte ``base`` on."""
        if self._gpu is not None:
            key = group.offset, memory.data_ptr()
            if key not in self._launches:
                kinds: dict[torch.dtype, list[StateChunk]] = {}
                for piece in self._active_ones(group):
                    kinds.setdefault(self._parameters[piece.index].dtype, []).append(piece)
                self._launches[key] = [
                    self._gpu.Launch(pieces, memory, base) for pieces in kinds.values()
                ]
            numbers = {piece.index for piece in group.pieces}
            held = {i: grad for i in numbers if (grad := self._parameters[i].grad) is not None}
            grads = {i: grad.contiguous() for i, grad in held.items()}
            for launch in self._launches[key]:
                launch(self._parameters, grads, scalars, scale)
            return
        if scalars is None:
            return
        for piece in self._active_ones(group):
            parameter = self._parameters[piece.index]
            part = slice(piece.start, piece.start + piece.count)
            reference.update(
                parameter.detach().view(-1)[part],
                parameter.grad.reshape(-1)[part],
                piece.views(memory, base),
                scalars[piece.index],
                float(scale),
                seed=piece.index,
                start=piece.start,
            )

    def _active_ones(self, group: Bucket) -> list[StateChunk]:
        return [p for p in group.pieces if self._parameters[p.index].grad is not None]

    # --- several processes ----------------------------------------------------------------------

    @property
    def is_whole(self) -> bool:
        """Whether the state is that of one step: no other process has begun another update."""
        return self._shared is None or self._shared.is_whole

    def updated_parts(self) -> list[tuple[Tensor, slice]]:
        """Return the parameters that `step` updates here, and which elements of each, flat."""
        return [
            (self._parameters[piece.index], slice(piece.start, piece.start + piece.count))
            for group in self._state_store().units()
            for piece in group.pieces
        ]

    # --- state ----------------------------------------------------------------------------------

    @property
    def pieces(self) -> list[StateChunk]:
        """The layout of the state."""
        return pieces_of(self._parameters, bits=self._bits, master=self._master)

    def _made(self, *, away: bool) -> Store:
        """Allocate the initial state."""
        pieces = self.pieces
        if self.paging == "managed":
            store: Store = Managed(pieces, self._device)
        else:
            store = Streamed(pieces, self._device, away=away, shared=self._shared)
        for piece, views in _state_of(store):
            if "master" in views:
                flat = self._parameters[piece.index].detach().view(-1)
                views["master"].copy_(flat[piece.start : piece.start + piece.count])
        return store

    def _state_store(self) -> Store:
        """Return the storage of the state, allocated on the first call."""
        if self._store is None:
            self._store = self._made(away=self.paging == "explicit")
        return self._store

    def state_dict(self) -> dict[str, Any]:
        """Return the state on the CPU, in a form independent of the mode of paging.

        ``state`` has, by index of the parameter, ``step``, and ``exp_avg`` and ``exp_avg_sq`` in
        the parameter's shape: float32, or uint8 with ``exp_avg_scales`` and ``exp_avg_sq_scales``
        (float32, one per 256 contiguous elements); and ``master`` if there is a master copy. It is
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
            for piece, views in sorted(_state_of(self._store), key=lambda one: one[0].offset):
                mine = parts.setdefault(piece.index, {})
                for name, view in views.items():
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
        """Restore the result of `state_dict`, bit for bit, whatever the mode of paging.

        Shared state is restored when all processes have done this.

        Raises:
            CheckpointError: If it belongs to other parameters, or has another precision.
        """
        groups = state_dict["param_groups"]
        if [len(g["params"]) for g in groups] != [len(g["params"]) for g in self.param_groups]:
            raise CheckpointError("the optimizer state has other parameter groups")
        for mine, theirs in zip(self.param_groups, groups, strict=True):
            mine.update({key: value for key, value in theirs.items() if key != "params"})
        self._seen.clear()
        if not state_dict["state"]:
            return
        store = self._state_store()
        for piece, views in _state_of(store):
            given = state_dict["state"][piece.index]
            for name, view in views.items():
                value = given.get(name)
                total = self._parameters[piece.index].numel()
                count = -(-total // reference.BLOCK) if name.endswith("_scales") else total
                if value is None or value.numel() != count or value.dtype != view.dtype:
                    raise CheckpointError(
                        f"the optimizer's state of parameter {piece.index} has no {name} of "
                        f"{count} {str(view.dtype).removeprefix('torch.')}: it is of another "
                        "parameter, or has another precision than optim"
                    )
                start = piece.start // reference.BLOCK if name.endswith("_scales") else piece.start
                view.copy_(value.reshape(-1)[start : start + view.numel()])
        steps = [state_dict["state"][i].get("step") for i in range(len(self._parameters))]
        for number, step in enumerate(steps):
            if step is None or step.shape != () or not 0 <= step.item() < 2**53:
                raise CheckpointError(
                    f"the optimizer's state of parameter {number} has no number of steps"
                )
        self._steps.copy_(torch.stack(steps))


def _state_of(store: Store) -> Iterator[tuple[StateChunk, dict[str, Tensor]]]:
    """Yield every piece with its state, for the host to read or write."""
    for group, memory, base in store.parts():
        for piece in group.pieces:
            yield piece, piece.views(memory, base)
