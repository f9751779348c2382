"""The story of a run: read, check, load, train, save. Everything it decides it tells.

What can fail for the user's sake fails before the model is loaded, or, on a GPU, while it is; and
nothing is written into the output directory until the data and the model are known to be good.

A checkpoint holds the adapter, the optimizer's moments and the step; the order of the data, the
learning rate and the dropout masks are functions of the step and the seed. So a run that is
resumed is, on a CPU, the run that was not interrupted, byte for byte.
"""

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from halfbyte.checkpoint.atomic import new_file, require_writable
from halfbyte.checkpoint.base_model import BaseSource, open_base
from halfbyte.checkpoint.identity import identity_of
from halfbyte.checkpoint.peft import CONFIG_NAME, save_adapter, write_card
from halfbyte.checkpoint.run_state import RunState, latest_run, load_run, save_run
from halfbyte.config.schema import TrainConfig, to_yaml
from halfbyte.data import Dataset, Example, MicroBatch, load_dataset, steps
from halfbyte.data.batching import StepPlan
from halfbyte.engine.autograd import AutogradEngine
from halfbyte.engine.choose import choose_engine
from halfbyte.engine.layerwise import LayerEngine
from halfbyte.engine.memory_policy import (
    HeapTrimmer,
    keep_few_products,
    memory_limit,
    peak_memory,
    used_memory,
)
from halfbyte.engine.packing import Batch
from halfbyte.errors import CheckpointError, ConfigError, OutOfMemoryError, OutputError
from halfbyte.layers.vocabulary import embedding_to_host
from halfbyte.linear.lora import adapter_parameters, adapter_state, attach, load_adapter_state
from halfbyte.runtime.device import is_out_of_memory
from halfbyte.runtime.malloc import give_back, keep_freed_memory
from halfbyte.runtime.matmul import float32_library
from halfbyte.runtime.precision import choose_device_and_dtype, deterministic
from halfbyte.train import metadata
from halfbyte.train.evaluate import as_batch, evaluate_loss
from halfbyte.train.loading import Loading, lora_of, recipe_facts, recipe_of
from halfbyte.train.memory_check import FIRST_LOOK, Prediction
from halfbyte.train.qera import begin_with_error, require_plain
from halfbyte.train.saving import CheckpointWriter
from halfbyte.train.schedule import Schedule
from halfbyte.train.trainer import StepResult, Trainer

if TYPE_CHECKING:
    from halfbyte.report import RunReport

# What may differ between a run and its continuation, because no result depends on it.
_FREE_TO_CHANGE = {
    "output",
    "resume",
    "save_steps",
    "save_total_limit",
    "logging_steps",
    "eval_data",
    "eval_steps",
    "activations",
    "memory_budget",
    "samples",
    "report_to",
    "model",  # the base's fingerprint is compared instead
    "data",  # the tokens' digest is compared instead
    "revision",
    "cache_quantized",
    "paging",
    "cuda_graphs",
    "deterministic",
}

SAVES_PER_RUN = 10  # if save_steps is not given

# Of a long run, so many steps are looked at for the shapes of their parts, or one epoch.
_LOOK_AHEAD = 4096


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Attributes:
        adapter_dir: Where the adapter is.
        steps: Optimizer steps of the run, those before a resume included.
        final_loss: Loss of the last step; NaN if this call made none.
        peak_memory_bytes: Peak of the process (on a GPU: of allocations in training).
        seconds: Time spent in steps, by this call.
        tokens_per_second: Tokens, padding not counted, over that time.
    """

    adapter_dir: Path
    steps: int
    final_loss: float
    peak_memory_bytes: int
    seconds: float
    tokens_per_second: float


class _Steps:
    """The micro-batches of any step of the run, from its number alone."""

    def __init__(self, examples: Sequence[Example], config: TrainConfig, pad_id: int) -> None:
        self._examples, self._config, self._pad_id = examples, config, pad_id
        self.per_epoch = len(self._epoch(0))
        asked = math.ceil(config.epochs * self.per_epoch)
        self.total = config.max_steps if config.max_steps is not None else max(1, asked)
        self._held: tuple[int, StepPlan] | None = None

    def _epoch(self, epoch: int) -> StepPlan:
        return steps(
            self._examples,
            batch_size=self._config.batch_size,
            gradient_accumulation_steps=self._config.gradient_accumulation_steps,
            seed=self._config.seed,
            epoch=epoch,
            pad_id=self._pad_id,
        )

    def __getitem__(self, step: int) -> list[MicroBatch]:
        epoch, index = divmod(step, self.per_epoch)
        return self._of_epoch(epoch)[index]

    def lengths(self) -> list[list[list[int]]]:
        """Return the tokens of each example, by step and micro-batch.

        Of the whole run, or of the first steps of it that show all there is to see.
        """
        found = []
        for step in range(min(self.total, max(self.per_epoch, _LOOK_AHEAD))):
            epoch, index = divmod(step, self.per_epoch)
            found.append(self._of_epoch(epoch).lengths(index))
        return found

    def _of_epoch(self, epoch: int) -> StepPlan:
        if self._held is None or self._held[0] != epoch:
            self._held = (epoch, self._epoch(epoch))
        return self._held[1]


def train(config: TrainConfig, report: "RunReport") -> TrainResult:
    """Fine-tune, from a configuration to an adapter on disk.

    Args:
        config: What to do.
        report: Who is told.

    Raises:
        UserError: For whatever the user can mend; nothing half-written is left behind.
        NonFiniteLossError: If training diverges; the last checkpoint is kept.
    """
    existed = config.output.exists()
    output = require_writable(config.output)
    try:
        device, dtype, why = choose_device_and_dtype(config.device, config.compute_dtype)
        limit = memory_limit(device, config.memory_budget)
        with deterministic(config.deterministic), limit:
            return _train(config, output, report, device, dtype, why)
    except BaseException:
        if not existed and not any(output.iterdir()):
            output.rmdir()
        raise


def _train(
    config: TrainConfig,
    output: Path,
    report: "RunReport",
    device: str,
    dtype: torch.dtype,
    why: str,
) -> TrainResult:
    resumed = _resume_from(config, output, report)
    report.track(config.report_to)

    source = open_base(config.model, revision=config.revision)
    if config.init_lora_weights == "qera":
        require_plain(source)
    tokenizer = source.tokenizer()
    recipe = recipe_of(config, dtype, device)
    process = None
    with Loading(source, recipe, tokenizer=tokenizer, cache=config.cache_quantized) as loading:
        if device == "cuda":
            loading.start()  # beside the data: what is wrong with these ends it
        dataset = _read(config.data, tokenizer, config, report)
        held_out = _read(config.eval_data, tokenizer, config, report) if config.eval_data else None
        plan = _Steps(dataset.examples, config, tokenizer.pad_token_id or 0)
        lengths = plan.lengths()
        shapes = [[(len(batch), batch[0]) for batch in step] for step in lengths]
        identity = _identity(config, source, dataset)
        if resumed is not None:
            _check_same_run(resumed, identity)
        report.note(f"on {device}, products in {str(dtype).removeprefix('torch.')}: {why}")
        if device == "cpu":
            if dtype == torch.float32:
                library, reason = float32_library()
                report.note(f"float32 products by {library}: {reason}")
            keep_freed_memory()
            keep_few_products(shapes)
            give_back()
            process = used_memory(device)
        base = loading.result(report)
    report.record("loaded", {"seconds": loading.seconds} | metadata.memory_now(device))
    recipe = base.model.halfbyte_recipe
    lora = lora_of(config)
    adapted = attach(base.model, lora, seed=config.seed)
    parameters = adapter_parameters(base.model)
    trained = sum(parameter.numel() for parameter in parameters.values())
    whole = dict.fromkeys(name.split(".")[-2] for name in parameters if ".lora_" not in name)
    report.note(
        f"{trained / 1e6:.2f} M parameters trained, on {len(adapted)} linear layers"
        + (f"; trained whole: {', '.join(whole)}" if whole else "")
    )
    if config.init_lora_weights == "qera" and resumed is None:
        with report.task("what packing lost") as progress:
            back = begin_with_error(base, source, progress=progress)
        report.note(f"adapters begin with {back:.0%} of what packing lost")
    moved = embedding_to_host(base.model)
    if moved:
        report.note(f"the embedding waits in host memory: {moved / 1e6:.0f} MB less on the GPU")
    by_step = [[n for batch in step for n in batch] for step in lengths]
    engine, told = choose_engine(
        base.model,
        device,
        graphs=config.cuda_graphs,
        lengths=by_step,
        state_bits=config.state_bits,
    )
    report.note(told)
    trainer = Trainer(engine, parameters, config, Schedule.of(config, plan.total))
    if config.optim != "adamw":
        report.note(trainer.optimizer.describe())
    clock = metadata.StepClock(trainer.optimizer, engine, device)
    start = 0
    if resumed is not None:
        load_adapter_state(base.model, resumed.adapter)
        trainer.load_progress(resumed.progress)
        start = resumed.step
    memory = trainer.fit(shapes, by_step)
    if config.activations == "offload" and device == "cpu":
        report.note("activations: there is nowhere to offload to from a CPU; layers are recomputed")
    report.note(memory.summary())
    if device == "cpu" and isinstance(engine, LayerEngine):
        engine.passes.between = HeapTrimmer(memory)
    if resumed is not None:  # after planning, which counts its bytes
        trainer.load_optimizer_state(resumed.optimizer)
    prediction = Prediction(
        source,
        recipe,
        parameters,
        rank=config.lora_r,
        optimizer=config.optim,
        pages=trainer.optimizer.paging == "explicit",
        fused=isinstance(engine, LayerEngine) and engine.fused > 0,
        policy=memory.policy,
        graphs=isinstance(engine, LayerEngine) and engine.captures,
        embedding_on_host=moved > 0,
        process=process,
    )

    facts_of_recipe = recipe_facts(recipe) | {"init_lora_weights": config.init_lora_weights}

    @cache
    def card() -> dict[str, Any]:  # digests take 0.2 s, for which the first step need not wait
        return {"base": identity_of(base), "recipe": facts_of_recipe}

    with new_file(output / "config.yaml") as file:
        file.write(to_yaml(config).encode())
    report.begin(
        total_steps=plan.total,
        start_step=start,
        facts={
            "model": config.model,
            "data": config.data,
            "quant": recipe.quant,
            "device": device,
            "compute_dtype": str(dtype).removeprefix("torch."),
            "base_bytes": base.audit.total_bytes,
            "trained_parameters": trained,
            "examples": len(dataset.examples),
            "supervised_tokens": dataset.report.supervised_tokens,
            "engine": told,
            "versions": metadata.versions(),
            "machine": metadata.machine(device),
            "data_verdict": metadata.verdict(dataset),
            "held_out_verdict": metadata.verdict(held_out) if held_out else None,
        }
        | metadata.options(config),
    )
    samples = metadata.Samples(held_out or dataset, config.samples)

    def sample(step: int) -> None:
        if samples:
            # Within what is planned for training, or its forecast would be of no use.
            limit = max(memory.predicted_bytes, memory.reserved_bytes)
            try:
                with report.task(f"answering a few prompts, step {step}"):
                    answers = samples.answer(base.model, base.tokenizer, step, memory_limit=limit)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                report.note("no answers: there is too little GPU memory for them beside the run")
            else:
                report.record("samples", answers)

    writer = CheckpointWriter(report.saved, background=device == "cuda")

    def save(step: int) -> None:
        write = partial(
            save_run,
            output,
            step,
            adapter={name: t.to("cpu") for name, t in adapter_state(base.model).items()},
            optimizer=trainer.optimizer_state(),
            progress=identity | trainer.progress(),
            keep=config.save_total_limit,
            card=partial(write_card, names=parameters, config=lora, **card()),
        )
        writer.write(write)

    def measure(step: int) -> None:
        if held_out is None:
            return
        began = time.perf_counter()
        loss, tokens = evaluate_loss(
            engine, held_out.examples, batch_size=max(4, config.batch_size)
        )
        report.evaluation(
            {
                "step": step,
                "loss": loss,
                "perplexity": math.exp(min(loss, 700.0)),
                "supervised_tokens": tokens,
                "seconds": time.perf_counter() - began,
            }
        )

    save_every = config.save_steps or max(1, math.ceil(plan.total / SAVES_PER_RUN))
    loss, seconds, tokens_done = math.nan, 0.0, 0
    held: dict[int, list[MicroBatch]] = {}

    def batches_of(step: int) -> list[Batch]:
        held[step] = plan[step]
        return [as_batch(batch) for batch in held[step]]

    def told_by_engine() -> None:
        for record in trainer.fallbacks:
            report.record("fallback", record)
        if trainer.fallbacks:
            prediction.use(trainer.policy, graphs=engine.captures)
        trainer.fallbacks.clear()
        for line in engine.messages:
            report.note(line)
        engine.messages.clear()

    def made(step: int, result: StepResult) -> None:
        nonlocal loss, seconds, tokens_done
        batches, done = held.pop(step), step + 1
        tokens = sum(batch.tokens for batch in batches)
        times = clock.seconds()
        loss, seconds = result.loss, seconds + result.seconds
        tokens_done += tokens
        prediction.see(
            (batch.input_ids.shape for batch in batches), result.seconds, **_sizes(engine, batches)
        )
        told_by_engine()
        writer.look()
        if done == start + FIRST_LOOK < plan.total:
            prediction.tell(report, peak_memory(device), done, reserved=metadata.reserved(device))
        if done % config.logging_steps == 0 or done == plan.total:
            report.step(
                {
                    "step": done,
                    "loss": result.loss,
                    "grad_norm": result.grad_norm,
                    "learning_rate": result.learning_rate,
                    "epoch": done / plan.per_epoch,
                    "tokens": tokens,
                    "supervised_tokens": sum(batch.supervised_tokens for batch in batches),
                    "tokens_per_second": tokens / result.seconds,
                    "peak_memory_bytes": peak_memory(device),
                    "seconds": result.seconds,
                    "data_seconds": result.data_seconds,
                    **{f"{part}_seconds": spent for part, spent in times.items()},
                    **(result.paging._asdict() if result.paging else {}),
                    **({"skipped": True} if result.skipped else {}),
                }
            )
        if config.eval_steps and done % config.eval_steps == 0 and done < plan.total:
            measure(done)
        if done % save_every == 0 or done == plan.total:
            save(done)

    if start == 0:
        sample(0)
    began = time.perf_counter()
    if isinstance(engine, LayerEngine) and engine.captures and start < plan.total:
        with report.task("capturing CUDA graphs") as progress:
            trainer.capture(progress)
        report.record("captured", {"seconds": time.perf_counter() - began, "graphs": engine.graphs})
    told_by_engine()
    with writer:
        try:
            trainer.train(range(start, plan.total), batches_of, made)
        except OutOfMemoryError:
            told_by_engine()
            if trainer.steps_made and not trainer.updating:
                save(start + trainer.steps_made)
            raise
        trainer.release()
        measure(plan.total)
        save_adapter(output, adapter_state(base.model), lora, tokenizer=tokenizer, **card())
        report.saved(output)
        sample(plan.total)
    if start < plan.total:
        prediction.tell(report, peak_memory(device), plan.total, reserved=metadata.reserved(device))
    outcome = TrainResult(
        adapter_dir=output,
        steps=plan.total,
        final_loss=loss,
        peak_memory_bytes=peak_memory(device),
        seconds=seconds,
        tokens_per_second=tokens_done / seconds if seconds else 0.0,
    )
    report.finish(
        {
            "steps": outcome.steps,
            "seconds": outcome.seconds,
            "final_loss": None if math.isnan(loss) else loss,
            "tokens_per_second": outcome.tokens_per_second,
        }
        | metadata.memory_now(device)
    )
    return outcome


def _sizes(engine: LayerEngine | AutogradEngine, batches: Sequence[MicroBatch]) -> dict[str, Any]:
    """Return the lengths of what attention sees, and of the parts a step was made of."""
    if not (isinstance(engine, LayerEngine) and engine.packs):
        return {"lengths": [n for b in batches for n in [b.input_ids.shape[1]] * len(b.lengths)]}
    lengths = [int(n) for batch in batches for n in batch.lengths]
    return {"lengths": lengths, "parts": engine.part_sizes(lengths)}


def _resume_from(config: TrainConfig, output: Path, report: "RunReport") -> RunState | None:
    newest = latest_run(output)
    if config.resume:
        if newest is None:
            report.note(f"no checkpoint in {output}: starting from the beginning")
            return None
        report.note(f"going on from {newest}")
        return load_run(newest)
    if newest is not None or (output / CONFIG_NAME).exists():
        raise OutputError(
            f"{output} holds a run already. Give --resume to go on with it, another --output, "
            "or remove it"
        )
    return None


def _read(
    data: str, tokenizer: PreTrainedTokenizerBase, config: TrainConfig, report: "RunReport"
) -> Dataset:
    with report.task(f"reading {data}") as progress:
        dataset = load_dataset(
            data,
            tokenizer,
            max_length=config.max_length,
            train_on=config.train_on,
            progress=progress,
        )
    for line in dataset.report.lines():
        report.note(line)
    return dataset


def _identity(config: TrainConfig, source: BaseSource, dataset: Dataset) -> dict[str, Any]:
    """Return what makes two runs the same run: options, base and tokens."""
    digest = hashlib.sha256()
    for example in dataset.examples:
        digest.update(np.asarray(example.tokens).tobytes())
        digest.update(np.asarray(example.labels_mask).tobytes())
        digest.update(b"|")
    return {"base": source.fingerprint, "data": digest.hexdigest(), "options": _options(config)}


def _options(config: TrainConfig) -> dict[str, Any]:
    """Return the options that a run's result depends on."""
    options = config.model_dump(mode="json", exclude=_FREE_TO_CHANGE)
    # Where the moments live changes nothing; how wide they are does.
    options["optim"] = config.optim.removeprefix("paged_").removesuffix("_32bit")
    return options


def _check_same_run(resumed: RunState, identity: dict[str, Any]) -> None:
    """Refuse to go on with another base, other data or other options.

    Raises:
        CheckpointError: The base or the data has changed.
        ConfigError: An option has changed on which the result depends; all are named.
    """
    for what in ("base", "data"):
        if resumed.progress.get(what) != identity[what]:
            raise CheckpointError(
                f"the {what} is not what the interrupted run was training "
                f"{'on' if what == 'base' else 'with'}; give the same, or start anew in another "
                "--output"
            )
    # An option that is younger than the run was as it is by default.
    defaults = _options(TrainConfig.model_validate({"model": "-", "data": "-", "output": "-"}))
    before, now = defaults | resumed.progress.get("options", {}), identity["options"]
    changed = [
        f"{name} was {before.get(name)!r}, is {value!r}"
        for name, value in now.items()
        if before.get(name) != value
    ]
    if changed:
        raise ConfigError(
            "a resumed run must keep the options it began with, or it is another run:\n  "
            + "\n  ".join(changed)
        )
