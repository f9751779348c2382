"""How steps fit into memory: what is chosen before the first, what is given up when it runs out.

`fit` chooses the shapes of parts and the activation policy from the data. A step that runs out of
memory all the same is repeated with the next fallback of `fall_back`. Gradients are sums over the
same tokens whatever is chosen, so results are the same up to rounding.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from halfbyte.config.schema import TrainConfig
from halfbyte.engine.autograd import AutogradEngine
from halfbyte.engine.buckets import own_shape
from halfbyte.engine.choose import buckets_of, compile_ahead
from halfbyte.engine.layerwise import LayerEngine
from halfbyte.engine.memory_policy import (
    HOST_SHARE,
    MARGIN,
    MemoryPlan,
    Shapes,
    free_memory,
    plan_memory,
    used_memory,
)
from halfbyte.engine.packing import Batch, lengths_of
from halfbyte.errors import ConfigError, OutOfMemoryError
from halfbyte.linear.layer_stream import stream_of
from halfbyte.optim import AdamW
from halfbyte.plan.ledger import smaller_part
from halfbyte.plan.policy import ActivationPolicy, peak
from halfbyte.runtime.device import is_out_of_memory

# Parts are not made smaller than this, since products of fewer rows are inefficient.
SMALLEST_PART = 512


def only_said(error: RuntimeError) -> RuntimeError:
    """Return an out-of-memory error without its traceback, whose frames keep tensors alive.

    Raises:
        RuntimeError: The error itself, if it is of another kind.
    """
    if not is_out_of_memory(error):
        raise error
    error.__context__ = error.__cause__ = None
    return error.with_traceback(None)


class StepMemory:
    """Decides what a run's steps keep in memory.

    Args:
        engine: Computes gradients.
        optimizer: Its state takes memory, too.
        config: The options of the run.
        clear_gradients: Sets the gradients to zero in place.

    Attributes:
        policy: The activation policy; without `fit`, everything is recomputed.
        plan: What `fit` returned.
        fallbacks: Fallbacks applied when memory ran out; cleared once they are in the journal.
    """

    def __init__(
        self,
        engine: LayerEngine | AutogradEngine,
        optimizer: AdamW,
        config: TrainConfig,
        clear_gradients: Callable[[], None],
    ) -> None:
        self.engine, self.optimizer, self.config = engine, optimizer, config
        self._clear_gradients, self._device = clear_gradients, engine.model.device.type
        self.policy, self.fallbacks = ActivationPolicy(), list[dict[str, Any]]()
        self.plan: MemoryPlan | None = None
        self._lengths: Sequence[Sequence[int]] = ()
        self._documents: Sequence[Sequence[int]] = ()  # packed on a CPU
        self._most_tokens = 0

    def fit(self, shapes: Shapes, lengths: Sequence[Sequence[int]]) -> MemoryPlan:
        """Choose the shapes of parts and the activation policy from a run's steps.

        Args:
            shapes: For each optimizer step, the (B, T) of its micro-batches.
            lengths: For each, the tokens of its examples.

        Raises:
            ConfigError: If the memory budget is too small for any policy.
            OutOfMemoryError: If not even one layer can be run.
        """
        self._lengths, self._documents = lengths, ()
        if isinstance(self.engine, LayerEngine) and self.engine.packs and self._device == "cpu":
            parts = [self.engine.part_shapes(step) for step in lengths]
            shapes = [[(part.rows, part.tokens) for part in step] for step in parts]
            self._documents = lengths
        self._most_tokens = max(sum(b * t for b, t in step) for step in shapes)
        engine, part_tokens = self.engine, None
        while True:
            if isinstance(engine, LayerEngine):
                engine.max_seqlen = max(map(max, lengths))
            if isinstance(engine, LayerEngine) and engine.packs and not self._documents:
                engine.buckets = buckets_of(engine, lengths, part_tokens)
                engine.most_parts = max(len(engine.part_shapes(step)) for step in lengths)
                engine.parts_together = 1
                compile_ahead(engine, engine.buckets)
            failed = None
            try:
                plan = self._planned(shapes)
                if plan.reserved_bytes <= plan.budget or not self._may_shrink():
                    if isinstance(engine, LayerEngine):
                        engine.parts_together = plan.parts_together
                    self.use(plan.policy)
                    break
            except ConfigError:
                if not self._may_shrink():
                    raise
            except RuntimeError as error:
                failed = only_said(error)
            if failed is not None:
                self._clear()
                if not self._may_shrink():
                    raise self._given_up(0, updating=False) from failed
            part_tokens = self._shrunk()
        if part_tokens is not None:
            engine.messages.append(
                f"parts have at most {self._largest_part} tokens: larger ones do not fit"
            )
        self.plan = plan
        return plan

    def _planned(self, shapes: Shapes) -> MemoryPlan:
        """Plan with the optimizer state on the device or, if that does not fit, without it."""
        optimizer, config = self.optimizer, self.config

        def plan(state_bytes: int) -> MemoryPlan:
            return plan_memory(
                self.engine,
                shapes,
                config.activations,
                config.memory_budget,
                self._device,
                state_bytes=state_bytes,
                documents=self._documents,
            )

        usual, tight = optimizer.device_bytes(), optimizer.device_bytes(tight=True)
        try:
            return plan(usual)
        except ConfigError:
            if tight == usual:
                raise
        return replace(plan(tight), state_off_device=usual - tight)

    def use(self, policy: ActivationPolicy) -> None:
        """Use this policy from now on."""
        self.policy = policy
        self.engine.keep_decoded(policy.decoded)
        if isinstance(self.engine, LayerEngine):
            self.engine.stream_weights(policy.streamed)
            self.engine.forget_graphs()

    def is_short(self, batches: Sequence[Batch]) -> bool:
        """Return whether a step is short of memory, which grows with its tokens."""
        plan, buckets = self.plan, getattr(self.engine, "buckets", None)
        if plan is None or self.optimizer.paging not in ("auto", "managed"):
            return False
        if buckets is not None:
            most = buckets.largest.numel
            tokens = min(sum(lengths_of(batches)), most)
        else:
            tokens = sum(batch.input_ids.numel() for batch in batches)
            most = self._most_tokens
        room = plan.budget - plan.used - plan.state_off_device
        return bool((plan.predicted_bytes - plan.used) * tokens > room * most)

    # --- when memory runs out -------------------------------------------------------------------

    def fall_back(self, step: int, error: BaseException, *, updating: bool) -> None:
        """Apply the next fallback, so that steps need less memory.

        In this order: no decoded weights kept; parts one after the other; weights streamed, if they
        can be; as many layers saved as fit into the free memory; every layer recomputed; their
        inputs offloaded to the host; checkpointed attention recomputed; smaller parts; no CUDA
        graphs.

        Args:
            step: The step that failed (0-based).
            error: The out-of-memory error.
            updating: Whether its update had begun.

        Raises:
            OutOfMemoryError: If there is no further fallback, or the update has begun.
        """
        self._clear()
        if updating:
            raise self._given_up(step, updating=updating) from error
        before, done = self.policy, None
        if isinstance(self.engine, LayerEngine):
            done = self._less()
        if done is None:
            raise self._given_up(step, updating=updating) from error
        self.engine.messages.append(
            f"out of GPU memory at step {step + 1}: {done}, and the step is repeated"
        )
        self.fallbacks.append(
            {
                "step": step + 1,
                "reason": str(error).partition("\n")[0],
                "action": done,
                "policy_before": before.__dict__,
                "policy": self.policy.__dict__,
            }
        )

    def _less(self) -> str | None:
        """Apply the next fallback; return what was done, or None if there is none."""
        assert isinstance(self.engine, LayerEngine)
        policy, layers = self.policy, len(self.engine.layers)
        if policy.decoded:
            self.use(replace(policy, decoded=0))
            return "decoded weights are no longer kept"
        if self.engine.parts_together > 1:
            self.engine.parts_together = 1
            return "the parts of a step go through the layers one after the other"
        if stream_of(self.engine.model) is not None and policy.streamed < layers:
            self.use(replace(policy, streamed=layers))
            return "the weights of all layers are copied to the GPU when needed"
        if policy.saved:
            self.use(self._saving_less())
            return f"{self.policy.saved} of {layers} layers keep their activations"
        away = replace(ActivationPolicy.offloading(layers), streamed=policy.streamed)
        further = self._device == "cuda" and away.offloaded > policy.offloaded
        if further and self._host_has_room(away):
            self.use(away)
            return "inputs of recomputed layers wait in host memory"
        if policy.attention_checkpoints:
            self.use(replace(policy, attention_checkpoints=0))
            return "attention is recomputed, too"
        if self._may_shrink():
            self._shrunk()
            return f"parts have at most {self._largest_part} tokens"
        if self.engine.captures:
            self.engine.stop_capturing("memory ran out")
            return "CUDA graphs are given up"
        return None

    def _saving_less(self) -> ActivationPolicy:
        """Return the policy with fewer layers saved, as many as fit into the memory now free."""
        assert isinstance(self.engine, LayerEngine)
        policy, graphs = self.policy, self.engine.captures

        def of(saved: int) -> ActivationPolicy:
            # If layers are offloaded, those no longer saved are offloaded too.
            more = policy.saved - saved if policy.offloaded else 0
            offloaded = policy.offloaded + more
            checkpoints = policy.attention_checkpoints * offloaded // max(1, policy.offloaded)
            return replace(
                policy, saved=saved, offloaded=offloaded, attention_checkpoints=checkpoints
            )

        if self.plan is None or self.plan.cost is None:
            return of((policy.saved - 1) // 2)
        used = used_memory(self._device) - self.engine.weights.nbytes
        if (stream := stream_of(self.engine.model)) is not None:
            used -= stream.nbytes
        room = (used + free_memory(self._device)) / MARGIN
        # At least a quarter fewer, so that a few tries reach a limit the driver does not know.
        for saved in range(3 * policy.saved // 4, 0, -1):
            if used + peak(self.plan.cost, of(saved), graphs=graphs).reserved <= room:
                return of(saved)
        return of(0)

    def _host_has_room(self, policy: ActivationPolicy) -> bool:
        cost = self.plan.cost if self.plan is not None else None
        return cost is None or cost.host_bytes(policy) <= HOST_SHARE * free_memory("cpu")

    def _may_shrink(self) -> bool:
        """Return whether parts can have fewer tokens and still fit the longest document."""
        if not self._lengths:
            return False
        longest = max(map(max, self._lengths))
        least = max(1.25 * max(longest, SMALLEST_PART), own_shape([longest]).numel)
        return self._largest_part > least

    @property
    def _largest_part(self) -> int:
        buckets = getattr(self.engine, "buckets", None)
        return 0 if buckets is None else int(buckets.largest.numel)

    def _shrunk(self) -> int:
        """Split steps into smaller parts; return their approximate size in tokens."""
        assert isinstance(self.engine, LayerEngine)
        assert self.engine.buckets is not None
        before = self.engine.buckets.largest.numel
        most = min(before, self.engine.buckets.part_tokens)
        self.engine.forget_graphs()
        # Halving once may not be enough: two documents of just under half a part stay together.
        while most > 1 and self.engine.buckets.largest.numel >= before:
            most = smaller_part(most)
            self.engine.buckets = buckets_of(self.engine, self._lengths, most)
        return most

    def _clear(self) -> None:
        """Free what a failed attempt has left."""
        if isinstance(self.engine, LayerEngine):
            self.engine.passes.forget()
            self.engine.forget_graphs()
        self._clear_gradients()
        gc.collect()
        if self._device == "cuda":
            torch.cuda.empty_cache()

    def _given_up(self, step: int, *, updating: bool) -> OutOfMemoryError:
        changed = "Some layers were updated" if updating else "Nothing was updated"
        tried = "; ".join(dict.fromkeys(record["action"] for record in self.fallbacks))
        free, budget = free_memory(self._device) / 1e9, self.config.memory_budget
        where = f"the memory of this GPU, of which {free:.2f} GB are free"
        if budget is not None:  # the limit of torch's allocator (memory_policy.py)
            where = f"memory_budget {budget / 1e9:.2f} GB"
        return OutOfMemoryError(
            f"step {step + 1} does not fit into {where}. "
            f"Tried: {tried or 'there was no fallback left'}. {changed} in this step. "
            "End other programs on the GPU, or lower max_length; --optim paged_adamw_8bit and "
            "--quantize-head also need less"
        )
