"""Whole runs on one GPU, from files to an adapter, on chats of realistic lengths.

    python benchmarks/gpu_run.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf
    python benchmarks/gpu_run.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --commands

``gpu_step.py`` times steps of one length; this is ``halfbyte train`` as typed, with everything
around its steps. The model is Llama-2-7B's shape with random weights, bfloat16 in files of 2 GB,
with SmolLM2's tokenizer and template. The data is 2000 chats of ``chats.py``; a step is two batches
of 8; r = 16 on all linears, alpha 16, no dropout, learning rate 1e-4, rows of at most 2048 tokens.
Everything else is each program's default: ours chooses what is kept for backward, TRL and Unsloth
recompute layers, Unsloth's AdamW has 8-bit state. ``smollm2`` is SmolLM2-135M from its GGUF file,
for three times as many steps.

All train on the same tokens and labels, prepared by halfbyte's data code (the assistant's tokens,
including its end-of-turn token; TRL takes ``input_ids`` and ``labels`` as they are). Unsloth packs
the rows of a batch by itself; ``unsloth-packed`` is its ``packing=True``, with 2 blocks of 2048
tokens for 8 rows, which are about as many tokens. TRL pads.

Each contestant has a process and a time limit, and a row even if it fails, with the reason. Tokens
are real ones, never padding. ``first_step_s`` is from the command to the end of the first step;
kernels are compiled once per machine, so name a contestant twice (``--only halfbyte halfbyte``) to
see it with and without. A step of a peer ends when the device is done, and its time is that since
the end of the previous step; ours is from ``journal.jsonl``. Steady figures exclude the first ten
steps, or if there are fewer than eleven, the first half.
"""

import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

# Of what is imported here, nothing imports torch: Unsloth must come before all that it changes.
import chats

MODEL = dict(hidden_size=4096, intermediate_size=11008, num_attention_heads=32)
MODEL |= dict(num_key_value_heads=32, max_position_embeddings=4096)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BATCH, ACCUMULATION, RANK, RATE = 8, 2, 16, 1e-4
BLOCKS = 2  # of a packed batch: 8 rows of 425 tokens are 1.7 blocks of 2048
WARM = 10  # steps that steady figures leave out

OURS: dict[str, list[str]] = {
    "halfbyte": [],
    "halfbyte-24GB": ["--memory-budget", "24GB"],
    "halfbyte-offload": ["--activations", "offload"],
    # What Unsloth with packing reserves on an H200.
    "halfbyte-5.8GB": [
        "--activations=offload",
        "--optim=adamw_8bit",
        "--memory-budget=5.8GB",
    ],
    "halfbyte-no-graphs": ["--no-cuda-graphs"],
    "smollm2": [],
}
PEERS = ("unsloth", "unsloth-packed", "trl-liger")

# What people type besides `train`, on SmolLM2; each word is formatted by itself.
COMMANDS = {
    "train": "train --model {model} --data {data} --output {work}/run --max-steps {steps}"
    " --max-length {longest} {device}",
    "eval": "eval --model {model} --adapter {work}/run --data {held_out} {device}",
    "generate": "generate --model {model} --adapter {work}/run --prompt {prompt}"
    " --max-new-tokens 100 {device}",
    "demo": "demo --model {model} --output {work}/demo",
    "doctor": "doctor",
    "merge": "merge {model} {work}/run {work}/merged {device}",
    "export": "export {model} {work}/run {work}/exported {device}",
    "quantize": "quantize {model} {work}/quantized",
    "report": "report {work}/run",
    "compare": "compare --model {model} --data {data} --eval-data {held_out} --no-exact-match"
    " --output {work}/compared --max-steps 20 {device}",
}

Row = dict[str, Any]


class Missing(Exception):
    """A run did not write down what this benchmark is about."""


# --- ours, from the journal -----------------------------------------------------------------------


def field(record: Row, name: str) -> Any:
    """A field of a journal's line, which is ``Missing`` where it is not there."""
    if record.get(name) is None:
        there = ", ".join(key for key, value in record.items() if value is not None)
        raise Missing(f"the journal's `{record['event']}` has no `{name}`; it has {there}")
    return record[name]


def last(records: Iterable[Row], event: str) -> Row:
    """The last line about ``event``, which is ``Missing`` where there is none."""
    found = [record for record in records if record["event"] == event]
    if not found:
        raise Missing(f"the journal has no `{event}`")
    return found[-1]


def figures(steps: Sequence[tuple[int, float]]) -> Row:
    """Speeds of steps, each so many tokens in so many seconds."""
    warm = WARM if len(steps) > WARM else len(steps) // 2
    tokens, seconds = (sum(part) for part in zip(*steps, strict=True))
    return {
        "steps": len(steps),
        "tokens": int(tokens),
        "steady_tokens_per_s": round(statistics.median(t / s for t, s in steps[warm:])),
        "tokens_per_s": round(tokens / seconds),
        "steady_step_ms": round(1e3 * statistics.median(s for _, s in steps[warm:]), 1),
        "slowest_steady_ms": round(1e3 * max(s for _, s in steps[warm:]), 1),
        "warm_steps_s": round(sum(s for _, s in steps[:warm]), 2),
    }


def of_journal(path: Path, started: float, device: str) -> Row:
    """The figures of a finished run of ours, begun at ``started`` (seconds of the epoch).

    Raises:
        Missing: A figure is not in the journal.
    """
    from halfbyte.report.journal import read_journal

    records = read_journal(path)
    last(records, "step")  # or why there is none
    steps = [record for record in records if record["event"] == "step"]
    first = datetime.fromisoformat(field(steps[0], "time")).timestamp()
    finish = last(records, "finish")
    row = {"first_step_s": round(first - started, 2)}
    row |= {"load_s": round(field(last(records, "loaded"), "seconds"), 2)}
    row |= figures([(field(step, "tokens"), field(step, "seconds")) for step in steps])
    row |= {"peak_gb": gigabytes(field(finish, "peak_memory_bytes"))}
    if device == "cuda":
        row |= {"reserved_gb": gigabytes(field(finish, "reserved_bytes"))}
    row |= {"loss": round(statistics.mean(field(step, "loss") for step in steps[-WARM:]), 4)}
    return row | forecast(records)


def forecast(records: Sequence[Row]) -> Row:
    """What was said before the run against what was measured, and the plan in its own words."""
    memory = last(records, "memory")
    row = {
        "forecast_gb": gigabytes(field(memory, "predicted_bytes")),
        "forecast_off": round(
            field(memory, "measured_bytes") / field(memory, "predicted_bytes") - 1, 4
        ),
    }
    if memory.get("predicted_reserved_bytes"):  # on a GPU
        row["forecast_reserved_gb"] = gigabytes(memory["predicted_reserved_bytes"])
    captured = [record for record in records if record["event"] == "captured"]
    if captured:
        row["graphs"] = captured[-1]["graphs"]
        row["capture_s"] = round(captured[-1]["seconds"], 2)
    # Seconds are foretold for the cards that halfbyte has in its table.
    for name in ("measured_seconds", "predicted_seconds"):
        row[name] = memory.get(name)
    plans = [record for record in records if record["event"] == "plan"]
    if plans:
        row["plan"] = {key: value for key, value in plans[-1].items() if key != "time"}
    return row


def gigabytes(count: float) -> float:
    return round(count / 1e9, 2)


# --- a process and its time -----------------------------------------------------------------------


class Ended(NamedTuple):
    """A process that has ended; ``code`` is None where that was at its time limit."""

    started: float
    seconds: float
    code: int | None
    problem: str


def run(call: Sequence[str], work: Path, limit: float, settings: Row | None = None) -> Ended:
    """Run a command to its end or its limit, in ``work``; what it prints is in ``work``/log.txt."""
    paths = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, paths)),
        "HF_HUB_OFFLINE": "1",
        "UNSLOTH_DISABLE_STATISTICS": "1",
    }
    with (work / "log.txt").open("w+", encoding="utf-8", errors="replace") as log:
        started, clock = time.time(), time.perf_counter()
        process = subprocess.Popen(
            call,
            cwd=work,
            env=environment | (settings or {}),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that what it starts ends with it
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        seconds = time.perf_counter() - clock
        log.seek(0)
        said = [line for line in log.read().splitlines() if line.strip()]
    problem = ""
    if code is None:
        problem = f"did not end within {limit:g} s"
    elif code:
        lines = [line for line in said if "this is a bug in halfbyte" not in line]
        problem = (lines[-1].strip() if lines else f"exit code {code}")[:300]
    if problem:
        print("\n".join(said[-12:]), file=sys.stderr, flush=True)
    return Ended(started, seconds, code, problem)


def contestant(name: str, args: argparse.Namespace, work: Path) -> Row:
    """Run one of them and return its row, which says why if it failed."""
    work.mkdir()
    ours = name in OURS
    if ours:
        call = [sys.executable, "-m", "halfbyte", *training(name, args, work / "run")]
    else:
        call = [sys.executable, str(Path(__file__).resolve()), "--worker", name]
        call += ["--checkpoint", str(args.checkpoint), "--data", str(args.data)]
        call += ["--steps", str(args.steps), "--longest", str(args.longest)]
    # Unsloth sets this itself where it is imported before torch.
    segments = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    ended = run(call, work, args.seconds, segments if name.startswith("unsloth") else None)
    row: Row = {"wall_s": round(ended.seconds, 1)}
    if ended.problem:
        return row | {"failed": ended.problem}
    try:
        if ours:
            return row | of_journal(work / "run" / "journal.jsonl", ended.started, args.device)
        return row | of_worker(work / "worker.json", ended.started)
    except (Missing, OSError) as error:
        return row | {"failed": f"{type(error).__name__}: {error}"}


def training(name: str, args: argparse.Namespace, output: Path) -> list[str]:
    """The words of one of our commands."""
    small = name == "smollm2"
    options = {
        "model": args.gguf if small else args.checkpoint,
        "data": args.data,
        "output": output,
        "max-length": args.longest,
        "batch-size": BATCH,
        "gradient-accumulation-steps": ACCUMULATION,
        "learning-rate": RATE,
        "max-steps": 3 * args.steps if small else args.steps,
    }
    words = [word for option, value in options.items() for word in (f"--{option}", str(value))]
    device = ["--device", args.device] if args.device != "cuda" else []
    return ["train", *words, *OURS[name], *device]


# --- peers, each in a process of its own ----------------------------------------------------------


def of_worker(path: Path, started: float) -> Row:
    """The figures of a peer, from what its process wrote."""
    record = json.loads(path.read_text())
    row = {"first_step_s": round(record["first_step_at"] - started, 2)}
    row |= figures(record["steps"])
    row |= {"peak_gb": gigabytes(record["peak_bytes"])}
    row |= {"reserved_gb": gigabytes(record["reserved_bytes"])}
    return row | {"loss": record["loss"], "trainer": record["trainer"]}


def pretokenized(args: argparse.Namespace) -> Any:
    """The rows as halfbyte reads them, for a trainer of TRL's."""
    from datasets import Dataset

    from halfbyte.checkpoint.base_model import open_base
    from halfbyte.data import load_dataset

    tokenizer = open_base(str(args.checkpoint)).tokenizer()
    read = load_dataset(args.data, tokenizer, max_length=args.longest).examples
    labels = [
        [
            int(t) if learned else -100
            for t, learned in zip(row.tokens, row.labels_mask, strict=True)
        ]
        for row in read
    ]
    return Dataset.from_dict(
        {"input_ids": [[int(t) for t in row.tokens] for row in read], "labels": labels}
    )


def unsloth_model(args: argparse.Namespace) -> tuple[Any, Any, Row]:
    from unsloth import FastLanguageModel  # noqa: I001 (before all that it changes)
    import torch

    model, tokenizer = FastLanguageModel.from_pretrained(
        str(args.checkpoint),
        max_seq_length=args.longest,
        dtype=torch.bfloat16,
        load_in_4bit=True,
        local_files_only=True,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=RANK,
        lora_alpha=RANK,
        target_modules=TARGETS,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth",
        random_state=0,
    )
    return model, tokenizer, {}


def liger_model(args: argparse.Namespace) -> tuple[Any, Any, Row]:
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    four = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        args.checkpoint,
        quantization_config=four,
        dtype=torch.bfloat16,
        device_map={"": 0},
        attn_implementation="sdpa",
    )
    lora = LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=TARGETS, lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    return model, AutoTokenizer.from_pretrained(args.checkpoint), {"peft_config": lora}


def timed(trainer: Any) -> Callable[[], Row]:
    """Have a trainer's steps timed and their tokens counted; the result tells what was found."""
    import torch
    from transformers import TrainerCallback

    counts: list[int] = []
    seconds: list[float] = []
    ends: list[float] = []
    collator = trainer.data_collator
    collate = collator.torch_call

    def counted(examples: list[Row]) -> Any:  # on the host, and of rows without padding
        counts.append(sum(len(example["input_ids"]) for example in examples))
        return collate(examples)

    collator.torch_call = counted

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            counts.clear()
            self.mark = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            now = time.perf_counter()
            seconds.append(now - self.mark)
            self.mark = now
            ends.append(time.time())

    trainer.add_callback(Clock())

    def found() -> Row:
        # A batch may have been collated ahead; those of steps come first, two to a step.
        parts = [counts[i : i + ACCUMULATION] for i in range(0, len(counts), ACCUMULATION)]
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return {
            "first_step_at": ends[0],
            "steps": [(sum(part), took) for part, took in zip(parts, seconds, strict=False)],
            "peak_bytes": torch.cuda.max_memory_allocated(),
            "reserved_bytes": torch.cuda.max_memory_reserved(),
            "loss": round(float(losses[-1]), 4) if losses else None,
        }

    return found


def peer(args: argparse.Namespace) -> None:
    """A peer, in this process; what it finds is written to ``worker.json``."""
    unsloth, packed = args.worker.startswith("unsloth"), args.worker.endswith("packed")
    model, tokenizer, more = (unsloth_model if unsloth else liger_model)(args)
    import trl

    options = {"use_liger_kernel": True} if not unsloth else {}
    settings = trl.SFTConfig(
        output_dir="trained",
        max_steps=args.steps,
        max_length=args.longest,
        packing=packed,
        per_device_train_batch_size=BLOCKS if packed else BATCH,
        gradient_accumulation_steps=ACCUMULATION,
        learning_rate=RATE,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(0.03 * args.steps),
        logging_steps=WARM,
        save_strategy="no",
        report_to="none",
        bf16=True,
        seed=0,
        **options,
    )
    trainer = trl.SFTTrainer(
        model=model,
        args=settings,
        train_dataset=pretokenized(args),
        processing_class=tokenizer,
        **more,
    )
    found = timed(trainer)
    trainer.train()
    row = found()
    trainer.save_model("adapter")
    asked = ("packing", "padding_free", "optim", "gradient_checkpointing", "use_liger_kernel")
    settings = {"trl": trl.__version__}
    settings |= {name: getattr(trainer.args, name, None) for name in asked}
    settings["collator_padding_free"] = getattr(trainer.data_collator, "padding_free", None)
    row["trainer"] = {name: str(value) for name, value in settings.items()}
    Path("worker.json").write_text(json.dumps(row))


def make(args: argparse.Namespace) -> None:
    """The model, in this process: random weights, with the tokenizer of a GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from halfbyte.checkpoint.base_model import open_base

    tokenizer = open_base(str(args.gguf)).tokenizer()
    # SmolLM2 pads with its end of turn. There Unsloth would add a token, and rows to the embedding.
    tokenizer.pad_token = "<empty_output>"
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos")}
    config = LlamaConfig(
        **MODEL,
        **ids,
        pad_token_id=tokenizer.pad_token_id,
        num_hidden_layers=args.layers,
        vocab_size=len(tokenizer),
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(args.checkpoint, max_shard_size="2GB")
    tokenizer.save_pretrained(args.checkpoint)


# --- all of it ------------------------------------------------------------------------------------

COLUMNS: dict[str, tuple[str, str]] = {
    "first_step_s": ("first step s", ".1f"),
    "steady_tokens_per_s": ("steady tok/s", ",.0f"),
    "tokens_per_s": ("all tok/s", ",.0f"),
    "wall_s": ("wall s", ".1f"),
    "peak_gb": ("peak GB", ".2f"),
    "reserved_gb": ("reserved GB", ".2f"),
    "forecast_gb": ("forecast", ".2f"),
    "forecast_reserved_gb": ("reserved", ".2f"),
    "forecast_off": ("off", "+.1%"),
    "loss": ("loss", ".3f"),
    "tokens": ("tokens", ",.0f"),
}


def table(rows: dict[str, Row]) -> str:
    """Rows of contestants as text; those that failed say why."""
    lines = [f"{'':22s}" + "".join(f"{title:>13s}" for title, _ in COLUMNS.values())]
    for name, row in rows.items():
        cells = [
            "–" if row.get(key) is None else format(row[key], form)
            for key, (_, form) in COLUMNS.items()
        ]
        lines.append(f"{name:22s}" + "".join(f"{cell:>13s}" for cell in cells))
        if "failed" in row:
            lines.append(f"{'':22s}  failed: {row['failed']}")
    return "\n".join(lines)


def compete(args: argparse.Namespace, scratch: Path, keep: Callable[..., None]) -> dict[str, Row]:
    """Every contestant in turn; what is found is kept after each."""
    if not (args.checkpoint / "config.json").exists() and set(args.only) != {"smollm2"}:
        call = [sys.executable, str(Path(__file__).resolve()), "--worker", "make"]
        call += ["--checkpoint", str(args.checkpoint), "--gguf", str(args.gguf)]
        call += ["--layers", str(args.layers), "--device", args.device]
        made = run(call, scratch, args.seconds)
        if made.problem:
            raise SystemExit(f"no checkpoint could be made: {made.problem}")
        print(f"checkpoint made in {made.seconds:.0f} s", flush=True)
    rows: dict[str, Row] = {}
    for name in args.only:
        turn = sum(key.split(" ")[0] == name for key in rows)
        key = f"{name} ({turn + 1})" if turn else name
        rows[key] = contestant(name, args, scratch / key.replace(" ", ""))
        print(key, json.dumps(rows[key]), flush=True)
        keep(rows=rows)
    print(f"\n{table(rows)}", flush=True)
    return rows


def command(args: argparse.Namespace, scratch: Path, keep: Callable[..., None]) -> dict[str, Row]:
    """Every command in turn, as typed: seconds and exit code."""
    places = {
        "model": args.gguf,
        "data": args.data,
        "held_out": chats.write_chats(scratch / "held-out.jsonl", args.held_out, held_out=True),
        "work": scratch,
        "steps": args.steps,
        "longest": args.longest,
        "prompt": "What did the Queen say to Alice?",
        "device": f"--device={args.device}" if args.device != "cuda" else "",
    }
    rows: dict[str, Row] = {}
    for name, text in COMMANDS.items():
        words = [word.format(**places) for word in text.split()]
        call = [sys.executable, "-m", "halfbyte", *filter(None, words)]
        ended = run(call, scratch, args.seconds)
        rows[name] = {"seconds": round(ended.seconds, 1), "exit_code": ended.code}
        if ended.problem:
            rows[name]["failed"] = ended.problem
        keep(commands=rows)
        line = f"{rows[name]['seconds']:8.1f} s, exit code {ended.code}  {ended.problem}"
        print(f"{name:12s}{line.rstrip()}", flush=True)
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = [*OURS, *PEERS]
    names = ", ".join(known)
    parser.add_argument("--only", nargs="+", choices=known, default=known, help=names, metavar="N")
    parser.add_argument("--commands", action="store_true", help="time every command on SmolLM2")
    parser.add_argument("--gguf", type=Path, help="SmolLM2's file: the tokenizer, and `smollm2`")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--chats", type=int, default=2000, help="rows to train on")
    parser.add_argument("--held-out", type=int, default=100, help="chats that `eval` reads")
    parser.add_argument("--longest", type=int, default=chats.LONGEST, help="tokens of a row")
    parser.add_argument("--seconds", type=float, default=300, help="limit of each contestant")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    about = "a directory for the model, which is made there unless one is"
    parser.add_argument("--checkpoint", type=Path, default=Path("/dev/shm/whole_run"), help=about)
    parser.add_argument("--output", type=Path, help="file; a dated one in benchmarks/results")
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--worker", choices=["make", *PEERS], help=argparse.SUPPRESS)
    args = parser.parse_args()
    needs_file = not (args.checkpoint / "config.json").exists() or "smollm2" in args.only
    if args.worker is None:
        if args.gguf is None and (args.commands or needs_file):
            parser.error("--gguf is missing: the GGUF file of SmolLM2-135M-Instruct")
        if args.device == "cpu" and not args.commands and set(args.only) & set(PEERS):
            parser.error(f"--device cpu is for ours: --only {' '.join(OURS)}")
    for name in ("gguf", "checkpoint", "data"):  # processes run elsewhere
        setattr(args, name, getattr(args, name) and getattr(args, name).resolve())
    return args


def main() -> None:
    args = parse()
    if args.worker:
        (make if args.worker == "make" else peer)(args)
        return
    from measuring import require_cuda, write

    if args.device == "cuda":
        require_cuda()
    asked = ("steps", "layers", "chats", "longest", "seconds")
    options = {name: getattr(args, name) for name in asked}
    options |= {"batch": BATCH, "accumulation": ACCUMULATION, "blocks_of_a_packed_batch": BLOCKS}

    def keep(**found: dict[str, Row]) -> None:
        write("gpu_commands" if args.commands else "gpu_run", args.output, **options, **found)

    with tempfile.TemporaryDirectory(prefix="gpu_run") as name:
        scratch = Path(name)
        args.data = chats.write_chats(scratch / "chats.jsonl", args.chats)
        rows = (command if args.commands else compete)(args, scratch, keep)
    failed = [name for name, row in rows.items() if "failed" in row]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
