"""A training run, from a configuration to an adapter: read, check, load, train, save.

Errors in the user's input are raised before the model is loaded, or on a GPU while it is loading.
Nothing is written into the output directory until data and model have been checked.

A checkpoint contains the adapter, the optimizer state and the step; the order of the data, the
learning rate and the dropout masks are functions of the step and the seed. So on a CPU a resumed
run is identical to an uninterrupted one, byte for byte, also if it was stopped (train/stopping.py).
"""

import math
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from halfbyte.atomic import new_file, require_writable
from halfbyte.checkpoint.base_model import BaseSource, LoadedBase, open_base
from halfbyte.checkpoint.peft import save_adapter
from halfbyte.checkpoint.run_state import RunState, step_of
from halfbyte.config.reading import to_yaml
from halfbyte.config.schema import TrainConfig
from halfbyte.data import Dataset, MicroBatch
from halfbyte.engine.autograd import AutogradEngine
from halfbyte.engine.choose import choose_engine
from halfbyte.engine.layerwise import LayerEngine
from halfbyte.engine.memory_policy import (
    HeapTrimmer,
    MemoryPlan,
    keep_few_products,
    memory_limit,
    peak_memory,
    used_memory,
)
from halfbyte.engine.packing import Batch
from halfbyte.errors import BETWEEN_STEPS, Interrupted, ProcessFailed, RunStopped
from halfbyte.layers.vocabulary import embedding_to_host, head_to_host
from halfbyte.linear.fp8_choice import require_fp8
from halfbyte.linear.lora import (
    adapter_parameters,
    adapter_state,
    attach,
    in_peft_terms,
    load_adapter_state,
)
from halfbyte.models.support import require_trainable
from halfbyte.report.journal import read_journal
from halfbyte.runtime.distributed import ProcessGroup
from halfbyte.runtime.malloc import give_back, keep_freed_memory
from halfbyte.runtime.matmul import float32_library
from halfbyte.runtime.precision import choose_device_and_dtype, deterministic
from halfbyte.train import metadata
from halfbyte.train.evaluate import Progress, as_batch
from halfbyte.train.hub import describe_run, repository_of
from halfbyte.train.init_adapter import InitialAdapter, rope_scaling_of_run, template_of_run
from halfbyte.train.loading import Loading, choose_products, lora_of, recipe_of
from halfbyte.train.loss_watch import LossWatch
from halfbyte.train.memory_check import FIRST_LOOK, Prediction, shape_of_source, sizes_of
from halfbyte.train.metrics import Metric, measured_on
from halfbyte.train.nonfinite import NonFiniteSteps, rows_in_words
from halfbyte.train.output import claim_output, write_rows
from halfbyte.train.processes import (
    SlowRank,
    processes_of,
    require_same_run,
    require_same_start,
)
from halfbyte.train.program import Program, RunCallbacks, WeightsChanged
from halfbyte.train.qera import begin_with_error, require_plain
from halfbyte.train.result import TrainResult
from halfbyte.train.resume import check_same_run, identity_of_run, resume_from
from halfbyte.train.run_data import RunData
from halfbyte.train.run_evaluation import RunEvaluation
from halfbyte.train.saving import Checkpoints, CheckpointWriter
from halfbyte.train.schedule import Schedule
from halfbyte.train.stopping import StopRequest
from halfbyte.train.trainer import StepResult, Trainer
from halfbyte.train.weight_location import Processes, connect, locate
from halfbyte.user_cache import temporary_directory

if TYPE_CHECKING:
    from halfbyte.report import RunReport


def train(
    config: TrainConfig,
    report: "RunReport",
    stop: StopRequest | None = None,
    *,
    callbacks: Sequence[object] = (),
    train_data: Iterable[object] | None = None,
    eval_data: Iterable[object] | None = None,
    metrics: Sequence[Metric] = (),
) -> TrainResult:
    """Fine-tune, from a configuration to an adapter on disk.

    Args:
        config: The options.
        report: Where to log.
        stop: Lets another thread or a signal handler stop the run after a step.
        callbacks: Objects with `on_step`, `on_evaluate`, `on_save` (train/callbacks.py).
        train_data: Rows to train on (data/in_memory.py); ``config.data`` is then their name.
        eval_data: Rows to evaluate on, likewise.
        metrics: Functions of the model's answers to held-out rows (train/metrics.py).

    Raises:
        UserError: For errors the user can fix; no incomplete output is left behind.
        NonFiniteLossError: If training diverges; the last checkpoint is kept.
        RunStopped: If ``stop`` was requested; the steps that were made are saved.
        UploadError: The adapter is complete, and could not be uploaded (``push_to_hub``).
        ProcessFailed: Another process of the run has failed; the steps that were made are saved.
    """
    program = Program(callbacks, train_data, eval_data, metrics)
    program.check(config)
    stop = stop or StopRequest()
    with processes_of(config) as processes, ExitStack() as writing:
        if not processes.is_first:
            return _train(config, report, stop, program, processes)
        writing.enter_context(claim_output(config))
        repository = repository_of(config)
        result = _train(config, report, stop, program, processes)
        describe_run(result.adapter_dir, repository, report)
        if repository is None:
            return result
        return replace(result, hub_url=repository.push(result.adapter_dir, report))


def _train(
    config: TrainConfig,
    report: "RunReport",
    stop: StopRequest,
    program: Program,
    processes: ProcessGroup,
) -> TrainResult:
    require_same_start(processes, config)
    with processes.first():
        existed = config.output.exists()
        output = require_writable(config.output)
    try:
        device, dtype, why = choose_device_and_dtype(config.device, config.compute_dtype)
        if config.compute == "fp8" and (emulated := require_fp8(device, dtype)):
            report.note(emulated)
        limit = memory_limit(device, config.memory_budget)
        with deterministic(config.deterministic), limit, ExitStack() as opened:
            run = _Run(config, output, report, stop, program, processes, device, dtype)
            opened.callback(run.close)
            run.load(why)
            run.attach()
            run.fit()
            run.begin()
            return run.run()
    except BaseException:
        if processes.is_first and not existed and not any(output.iterdir()):
            output.rmdir()
        raise


class _Run:
    """A run: prepares everything it needs in order, then logs, evaluates and saves around steps."""

    source: BaseSource
    tokenizer: PreTrainedTokenizerBase
    data: RunData
    identity: dict[str, Any]
    base: LoadedBase
    parameters: dict[str, nn.Parameter]
    engine: LayerEngine | AutogradEngine
    trainer: Trainer
    checkpoints: Checkpoints
    memory: MemoryPlan
    prediction: Prediction
    initial: InitialAdapter | None = None
    waits: Literal["host", "disk", "gpus"] | None = None

    def __init__(
        self,
        config: TrainConfig,
        output: Path,
        report: "RunReport",
        stop: StopRequest,
        program: Program,
        processes: ProcessGroup,
        device: str,
        dtype: torch.dtype,
    ) -> None:
        self.config, self.output, self.report, self.stop = config, output, report, stop
        self.program, self.device, self.dtype = program, device, dtype
        self.processes, self.slow = processes, SlowRank()
        self.agreed_to_stop = processes.size == 1  # as soon as it is requested
        self.lora = lora_of(config)
        self.resumed: RunState | None = None
        self.more: dict[str, Any] = {}  # about the start, for checkpoints, journal and adapter
        self.start = self.done = 0  # steps made before, and in all
        self.adapter_step = 0  # of the adapter that is written
        self.ended: str | None = None  # why before the last step
        self.saved: tuple[int, str | None] | None = None  # the newest checkpoint has these
        self.evaluation: RunEvaluation | None = None
        self.embedding_on_host = False
        self.process_bytes: int | None = None
        self.loss, self.seconds, self.tokens = math.nan, 0.0, 0
        self._batches: dict[int, list[MicroBatch]] = {}  # of steps that are not finished
        self.writer = CheckpointWriter(self._saved, background=device == "cuda")

    # --- before the first step ------------------------------------------------------------------

    def load(self, why: str) -> None:
        """Read the data and the base model; ``why`` is the logged reason for the dtype."""
        config, report, device = self.config, self.report, self.device
        if self.processes.peers is not None:
            self.processes.peers.on_hang = report.note
        self.resumed = resume_from(config, self.output, report)
        report.track(config.report_to if self.processes.is_first else ())
        with self.processes.first():  # it downloads
            self.source = open_base(config.model, revision=config.revision)
        if config.init_adapter is not None:
            self.initial = InitialAdapter(config, self.source, self.resumed, report)
            config = self.config = self.initial.config
            self.lora = lora_of(config)
            self.more["init_adapter"] = self.initial.record
        self.more |= template_of_run(config, self.source, self.initial, self.resumed, report)
        self.more |= rope_scaling_of_run(config, self.source, self.initial, self.resumed)
        require_trainable(self.source.skeleton, self.lora)
        if config.init_lora_weights == "qera":
            require_plain(self.source)
        self.tokenizer = self.source.tokenizer()
        recipe = recipe_of(config, self.dtype, device)
        cache = config.cache_quantized
        shape = partial(shape_of_source, self.source)
        place = locate(config, shape, recipe, Processes.of(self.processes))
        if place.message:
            report.note(place.message)
        self.waits = None if place.location == "gpu" else place.location
        with Loading(
            self.source,
            recipe,
            tokenizer=self.tokenizer,
            cache=cache,
            store=place.store,
        ) as loading:
            if device == "cuda" and (self.processes.is_first or not cache):
                loading.start()  # while the data is read; an error in the data stops it
            with self.processes.first():  # it encodes, and the others find that in the cache
                self._read_data()
            require_same_run(self.processes, self.identity, self.resumed)
            report.note(f"on {device}, products in {str(self.dtype).removeprefix('torch.')}: {why}")
            if device == "cpu":
                self._prepare_cpu()
            with self.processes.first() if cache else nullcontext():
                self.base = loading.result(report)
        connect(self.base.model, self.processes)
        report.record("loaded", {"seconds": loading.seconds} | metadata.memory_now(device))

    def _read_data(self) -> None:
        self.data = RunData(
            self.config,
            self.tokenizer,
            self.source.config,
            self.report,
            train_data=self.program.train_data,
            eval_data=self.program.eval_data,
        )
        self.identity = identity_of_run(self.config, self.source, self.data) | self.more
        if self.resumed is not None:
            check_same_run(self.resumed, self.identity, self.total)

    def _prepare_cpu(self) -> None:
        if self.dtype == torch.float32:
            library, reason = float32_library()
            self.report.note(f"float32 products by {library}: {reason}")
        keep_freed_memory()
        keep_few_products(self.data.shapes, self.data.lengths)
        give_back()
        self.process_bytes = used_memory(self.device)

    def attach(self) -> None:
        """Attach the adapters, and choose the engine and the trainer."""
        config, report, model = self.config, self.report, self.base.model
        adapted = attach(model, self.lora, seed=config.seed)
        self.parameters = adapter_parameters(model)
        report.note(metadata.trained_in_words(self.parameters, adapted, model, self.lora))
        self.lora = in_peft_terms(model, self.lora, adapted)
        if config.init_lora_weights == "qera" and self.resumed is None:
            with report.task("initialising adapters (QERA)") as progress:
                back = begin_with_error(self.base, self.source, progress=progress)
            report.note(f"adapters initialised with {back:.0%} of the quantisation error")
        if self.initial is not None:
            self.initial.load_into(self.base)
        if moved := embedding_to_host(model):
            self.embedding_on_host = True
            report.note(f"the embedding is in host memory: {moved / 1e6:.0f} MB less on the GPU")
        if self.waits is not None and (moved := head_to_host(model)):
            report.note(f"the output head is in host memory: {moved / 1e6:.0f} MB less on the GPU")
        for message in choose_products(model, config):
            report.note(message)
        self.engine, self.engine_summary = choose_engine(
            model,
            self.device,
            graphs=config.cuda_graphs,
            lengths=self.data.lengths,
            state_bits=config.state_bits,
        )
        report.note(self.engine_summary)
        schedule = Schedule.of(config, self.total)
        self.trainer = Trainer(self.engine, self.parameters, config, schedule, self.processes)
        self.trainer.parallel.wants_stop = lambda: (
            (self.stop.signal or 0) if self.stop.requested else None
        )
        if self.processes.size > 1:
            report.note(self.trainer.parallel.in_words())
        if config.optim != "adamw":
            report.note(self.trainer.optimizer.describe())
        self.clock = metadata.StepClock(self.trainer.optimizer, self.engine, self.device)
        self.checkpoints = Checkpoints(
            config,
            self.base,
            self.lora,
            self.trainer,
            self.writer,
            self.identity,
            self.total,
            by_program=self.program.changes_result,
            processes=self.processes,
        )
        self.watch = LossWatch(config.learning_rate)
        self.nonfinite = self.trainer.on_nonfinite = NonFiniteSteps(
            config,
            self.engine,
            self.parameters,
            checkpoints=self.checkpoints,
            save=self.save,
            lines=self.data.lines,
            report=report,
            writes=self.processes.is_first,
        )
        self.callbacks = RunCallbacks(
            self.program.callbacks if self.processes.is_first else (),
            model,
            save=self._save_made,
            stop=partial(self.stop.request, quietly=True),
            finish=self._end,
        )
        if self.data.held_out is not None:
            self.evaluation = RunEvaluation(
                config,
                self.data,
                self.engine,
                report,
                stopped=lambda: self.stopped,
                end_stopped=self._end_stopped,
                end=self._end,
                save=self.save,
                measure=self._measure if self.program.metrics else None,
                tell=self.callbacks.evaluation,
                processes=self.processes,
            )
        if self.resumed is not None:
            load_adapter_state(model, self.resumed.adapter)
            self.trainer.load_progress(self.resumed.progress)
            self.start = self.done = self.adapter_step = self.resumed.step
            self.checkpoints.saved = self.start
            self.nonfinite.load(self.resumed.progress.get("nonfinite", self.nonfinite.state()))
            if self.evaluation is not None:
                self.evaluation.load(self.resumed.progress, self.start)
            ended = self.resumed.progress.get("ended")
            self.ended = None if ended is None else str(ended)
            self.saved = (self.start, self.ended)
        # GPUs may have rounded differently what adapters start from.
        self.processes.same_([*self.parameters.values()])

    @property
    def stopped(self) -> bool:
        """Whether the run is to stop after this step; with several processes, all know it."""
        return self.stop.requested and self.agreed_to_stop

    @property
    def total(self) -> int:
        """The number of steps."""
        return self.data.plan.total

    @property
    def trained(self) -> int:
        """How many parameters are trained."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    def fit(self) -> None:
        """Choose what is kept for backward, and predict memory and time."""
        config, report, engine = self.config, self.report, self.engine
        self.memory = self.trainer.fit(self.data.shapes, self.data.lengths)
        if config.activations == "offload" and self.device == "cpu":
            report.note("activations: offloading needs a GPU; on a CPU layers are recomputed")
        report.note(self.memory.summary())
        if self.device == "cpu" and isinstance(engine, LayerEngine):
            engine.passes.before_layer = HeapTrimmer(self.memory)
        if self.resumed is not None:  # after planning, which includes its bytes
            self.trainer.load_optimizer_state(self.resumed.optimizer)
        self.prediction = Prediction(
            self.source,
            self.base.model.halfbyte_recipe,
            self.parameters,
            rank=config.lora_r,
            optimizer=config.optim,
            pages=self.trainer.optimizer.paging == "explicit",
            fused=isinstance(engine, LayerEngine) and engine.fused > 0,
            policy=self.memory.policy,
            graphs=isinstance(engine, LayerEngine) and engine.captures,
            embedding_on_host=self.embedding_on_host,
            process=self.process_bytes,
            waits=self.waits,
            shards=self.processes.on_this_host if config.shard else 1,
            fp8=config.compute == "fp8",
        )

    def begin(self) -> None:
        """Write config.yaml, the first line of the journal, and rows left or held out."""
        config, data, output = self.config, self.data, self.output
        if self.processes.is_first:
            with new_file(output / "config.yaml") as file:
                file.write(to_yaml(config).encode())
        else:
            output = temporary_directory()  # for what the first process writes beside it
        self.report.begin(
            total_steps=self.total,
            start_step=self.start,
            metadata=metadata.run(
                config,
                self.base,
                data.dataset,
                data.held_out,
                device=self.device,
                trained=self.trained,
                engine=self.engine_summary,
            )
            | {"data_digest": self.identity["data"], "data_check": data.check.as_json()}
            | {"processes": self.processes.size}
            | self.more,
        )
        write_rows(output, data, self.report, self.start, self.resumed)
        journal = self.output / "journal.jsonl"
        if self.resumed is not None and journal.exists():
            self.watch.replay(read_journal(journal))
        self.samples = metadata.Samples(data.held_out or data.dataset, config.samples)

    # --- steps ----------------------------------------------------------------------------------

    def run(self) -> TrainResult:
        """Train, and write the adapter."""
        trainer, report = self.trainer, self.report
        if self.start == 0:
            self.sample(0)
        self._capture()
        self.report_engine()
        self.processes.barrier()  # the first may have taken long to answer
        with self.writer:
            self._make_steps()
            try:
                trainer.release()
                if self.evaluation is not None:
                    restore = self.checkpoints.restore_adapters
                    self.adapter_step = self.evaluation.conclude(self.done, restore)
                if self.processes.is_first:
                    self._save_adapter()
                self.sample(self.done)
            except Interrupted:
                again = self.checkpoints.resume_command
                report.note(f"all steps are saved; to finish the run: {again}")
                raise
        if self.start < self.done:
            self._compare_memory(self.done)
        return self._finish()

    def _save_adapter(self) -> None:
        state, card = adapter_state(self.base.model), self.checkpoints.card
        save_adapter(self.output, state, self.lora, tokenizer=self.tokenizer, **card)
        self.report.saved(self.output)
        self.callbacks.saved(self.adapter_step, self.output, final=True)

    def _make_steps(self) -> None:
        """Make the remaining steps.

        Raises:
            RunStopped: A stop was requested.
        """
        trainer, total, stop = self.trainer, self.total, self.stop
        if self.config.on_nonfinite == "rewind" and self.checkpoints.saved is None:
            trainer.optimizer.allocate()  # its state is part of a checkpoint
            self.save(0)  # to rewind to
        with stop.between_steps(self._announce_stop):
            try:
                if self.evaluation is not None:
                    self.evaluation.after(self.start)  # unless it was made before
                trainer.train(
                    range(self.start, total),
                    self.batches_of,
                    self.finished,
                    stopped=self._is_over,
                )
            except BETWEEN_STEPS as error:
                self.report_engine()
                if trainer.is_whole and not isinstance(error, WeightsChanged):
                    self.checkpoints.take_over()
                    self._save_made()
                if isinstance(error, ProcessFailed):
                    self.writer.wait()
                    saved = self.checkpoints.saved or 0
                    raise error.after(saved, self.checkpoints.resume_command) from error
                raise
        if self.ended is not None and self.done < total:
            report = self.report
            report.note(f"training ends after step {self.done} of {total}: {self.ended}")
            report.record("ended", {"step": self.done, "reason": self.ended})
            if self.saved != (self.done, self.ended):
                self.save(self.done)
        if self.stopped:
            self._end_stopped()

    def _announce_stop(self) -> None:
        step = min(self.done + 1, self.total)
        self.report.stopping(
            f"stopping: step {step} is finished and saved first; a second signal ends at once"
        )

    def _end_stopped(self) -> NoReturn:
        """Save the steps that were made, and say how to go on.

        Raises:
            RunStopped: Always.
            OutputError: The checkpoint cannot be written.
        """
        self._save_made()
        self.writer.wait()
        made = "stopped before its first step. To start again"
        if self.done:
            made = f"stopped after step {self.done} of {self.total}, which is saved. To go on"
        raise RunStopped(f"{made}: {self.checkpoints.resume_command}", self.stop.signal)

    def _save_made(self) -> None:
        """Save the steps made since the last checkpoint, if there are any."""
        if self.done > (self.checkpoints.saved or 0):
            self.save(self.done)

    def _capture(self) -> None:
        began, engine, report = time.perf_counter(), self.engine, self.report
        more = self.start < self.total and self.ended is None
        if isinstance(engine, LayerEngine) and engine.captures and more:
            with report.task("capturing CUDA graphs") as progress:
                self.trainer.capture(progress)
            seconds = time.perf_counter() - began
            report.record("captured", {"seconds": seconds, "graphs": engine.num_graphs})

    def _finish(self) -> TrainResult:
        outcome = TrainResult(
            adapter_dir=self.output,
            steps=self.done,
            final_loss=self.loss,
            peak_memory_bytes=peak_memory(self.device),
            seconds=self.seconds,
            tokens_per_second=self.tokens / self.seconds if self.seconds else 0.0,
            skipped_steps=self.nonfinite.skipped,
            adapter_step=self.adapter_step,
            ended=self.ended if self.done < self.total else None,
        )
        self.data.finish(self.output)
        if skipped := outcome.skipped_steps:
            self.report.note(f"{skipped} of {outcome.steps} steps were left out as not finite")
        self.report.finish(outcome.record() | metadata.memory_now(self.device))
        return outcome

    def batches_of(self, step: int) -> list[Batch]:
        """Return the micro-batches of a step (0-based)."""
        self._batches[step] = self.data.plan[step]
        return [as_batch(batch) for batch in self._batches[step]]

    def finished(self, step: int, result: StepResult) -> None:
        """Log a finished step (0-based); evaluate and save if due."""
        batches, done, config = self._batches.pop(step), step + 1, self.config
        times = self.clock.seconds()
        self.seconds += result.seconds
        if math.isfinite(result.loss):
            self.loss = result.loss
        self.tokens += sum(batch.tokens for batch in batches)
        if own := self.trainer.parallel.micro_batches(batches):
            self.prediction.see(
                (batch.input_ids.shape for batch in own),
                result.seconds,
                **sizes_of(self.engine, own),
            )
        self.report_engine()
        last = done == self.total
        if done == self.start + FIRST_LOOK and not last:
            self._compare_memory(done)
        record: dict[str, Any] = {"step": done, "epoch": done / self.data.plan.per_epoch}
        record |= metadata.step(result, batches, times, self.device)
        if rank_seconds := self.trainer.parallel.seconds:
            record["rank_seconds"] = rank_seconds  # of the step before
            if (text := self.slow.see(rank_seconds)) is not None:
                self.report.warning(done, "slow_rank", text)
        if done % config.logging_steps == 0 or last:
            self.report.step(record)
        self.done = self.adapter_step = done
        self.writer.look()
        if not result.skipped:
            self._watch(done, result)
        self.callbacks.step(record, self.total)
        self._agree()
        if self.evaluation is not None:
            self.evaluation.after(done)
        if self.checkpoints.due(done) and self.checkpoints.saved != done:
            self.save(done)

    def _agree(self) -> None:
        """Stop after this step if a process was asked to by the end of the last one."""
        if (asked := self.trainer.parallel.stop) is not None:
            self.agreed_to_stop = True
            if not self.stop.requested:
                self.stop.signal = asked or None
                self.stop.request(quietly=True)

    def _is_over(self) -> bool:
        """Return whether no more steps are made; asked before each, by all processes."""
        if self.processes.size > 1 and self.program.callbacks:  # only the first calls them
            asked, self.ended = self.processes.from_first(lambda: [self.stop.requested, self.ended])
            if asked:
                self.agreed_to_stop = True
                self.stop.request(quietly=True)
        return self.stopped or self.ended is not None

    def _watch(self, done: int, result: StepResult) -> None:
        """Warn of a loss that a healthy run does not have."""
        found = self.watch.see(result.loss, result.grad_norm, result.learning_rate)
        if found is not None:
            text = f"step {done}: {found.text}"
            if found.kind == "spike":
                lines = [line for lines in self.data.lines(done - 1) for line in lines]
                text += f" ({rows_in_words(lines, self.config.data)})"
            self.report.warning(done, found.kind, text)

    def report_engine(self) -> None:
        """Log the engine's messages, and the fallbacks taken when memory ran out."""
        for record in self.trainer.memory.fallbacks:
            self.report.record("fallback", record)
        if self.trainer.memory.fallbacks:
            self.prediction.use(self.trainer.memory.policy, graphs=self.engine.captures)
        self.trainer.memory.fallbacks.clear()
        for line in self.engine.messages:
            self.report.note(line)
        self.engine.messages.clear()

    def _compare_memory(self, done: int) -> None:
        peak, reserved = peak_memory(self.device), metadata.reserved(self.device)
        self.prediction.tell(self.report, peak, done, reserved=reserved)

    @property
    def _memory_limit(self) -> int:
        """Of answers: the memory planned for training, so that its forecast stays valid."""
        return max(self.memory.predicted_bytes, self.memory.reserved_bytes)

    def sample(self, step: int) -> None:
        """Answer a few prompts."""
        if self.samples and self.processes.is_first:
            self.trainer.free_buffer()  # generation has one of its own
            model, tokenizer = self.base.model, self.base.tokenizer
            self.samples.tell(self.report, model, tokenizer, step, memory_limit=self._memory_limit)

    def _end(self, reason: str) -> None:
        """Have training end after this step."""
        self.ended = self.ended or reason

    def _measure(self, data: Dataset, progress: Progress) -> dict[str, float]:
        """Return the program's metrics of the model's answers to some rows."""
        return measured_on(
            data,
            self.program.metrics,
            self.base.model,
            self.base.tokenizer,
            call=self.callbacks.guard,
            memory_limit=self._memory_limit,
            progress=progress,
        )

    def _saved(self, path: Path) -> None:
        self.report.saved(path)
        self.callbacks.saved(step_of(path), path, final=False)

    def save(self, step: int) -> None:
        """Write a checkpoint; on a GPU in the background."""
        state: dict[str, Any] = {"nonfinite": self.nonfinite.state(), "ended": self.ended}
        best = None
        if self.evaluation is not None:
            state |= self.evaluation.state()
            best = self.evaluation.best.step if self.config.load_best else None
        self.saved = (step, self.ended)
        self.checkpoints.save(step, state | self.data.state(step), best=best)

    def close(self) -> None:
        """End the processes that encode data."""
        if hasattr(self, "data"):
            self.data.close()
