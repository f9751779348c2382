"""The cost of four bits in quality: after fine-tuning on three tasks, and on prose before training.

    python benchmarks/quality.py --model MODEL --work /tmp/quality --write-docs

Six bases are made from one model: 16 bits (that is LoRA), NF4 with and without double quantisation,
FP4, plain 4-bit integers, and NF4 by search. Each is trained on each task with each seed, with the
same options. A seed fixes the examples, their order and the adapter's initialisation, so the bases
are compared in pairs. Finished runs are kept in ``--work``, and a second call continues. Further
arms are options for NF4: search in blocks of 32, and adapters initialised with the quantisation
error (``-qera``). ``nf4-fp8`` trains on the base of ``nf4`` with ``compute: fp8``, and is evaluated
twice: as others are, without, which is how the model will be used, and with.

Two tasks have exact answers, and a model that has learned them has almost no loss, so any
difference is many percent of it. The third is a book, most of which cannot be predicted: the model
is trained on nine chapters, and evaluated on the other three.

Plain integers are not a format of halfbyte: their base is rounded to them and held in 16 bits,
which is the same arithmetic.
"""

import argparse
import json
import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import measuring
import quality_table
import timetable
import torch
from torch import Tensor

from halfbyte.atomic import new_directory
from halfbyte.checkpoint.base_model import BaseSource, load_base, open_base
from halfbyte.checkpoint.bitsandbytes import write_quantized
from halfbyte.checkpoint.directory import write_description
from halfbyte.checkpoint.safetensors_file import Planned, write_model
from halfbyte.config.schema import TrainConfig
from halfbyte.models.build import BaseRecipe, build, frozen_linears
from halfbyte.report import open_report
from halfbyte.tools import demo_task
from halfbyte.train.evaluate import evaluate
from halfbyte.train.loading import choose_products, open_model
from halfbyte.train.run import train

PACKED: dict[str, dict[str, Any]] = {
    "nf4": {"quant": "nf4"},
    "nf4-single": {"quant": "nf4", "double_quant": False},
    "nf4-search": {"quant": "nf4", "quant_search": True},
    "fp4": {"quant": "fp4"},
    "nf4-search-32": {"quant": "nf4", "quant_search": True, "block_size": 32},
}
# Trained from the plain base, which is packed as it is read.
BEGUN = {f"{arm}-qera": arm for arm in ("nf4", "nf4-search", "nf4-search-32")}
# Trained with products in 8 bits.
IN_FP8 = {"nf4-fp8": "nf4", "nf4-search-fp8": "nf4-search"}
ARMS = ("lora", "nf4", "nf4-single", "nf4-search", "fp4", "int4")

# The demo's recipe; the second task is harder, and takes more of the same.
RECIPE: dict[str, Any] = {
    "lora_r": 16,
    "learning_rate": 8e-4,
    "warmup_ratio": 0.05,
    "batch_size": 8,
    "gradient_accumulation_steps": 1,
    "max_length": 512,
    "activations": "save",
}
_QUIETLY: dict[str, Any] = {"samples": 0, "save_steps": 10**6}
# There is little of the book: small batches make some steps of it, at half the rate.
CHANGES: dict[str, dict[str, Any]] = {"prose": {"batch_size": 2, "learning_rate": 4e-4}}
EXAMPLES = {"orders": 448, "timetable": 1536, "prose": 60}
TEXTS = Path(__file__).with_name("texts")
HELD_OUT, TRAINING = "alice.txt", "alice_training.txt"
PROSE_CHARACTERS = 1800  # of a row of prose: under 512 tokens

Row = dict[str, Any]


# --- the bases ------------------------------------------------------------------------------------


def make_bases(model: str, arms: tuple[str, ...], work: Path, device: str) -> None:
    """Writes a directory for each arm that has none; the packed ones are made of the 16-bit one."""
    plain = work / "base-lora"
    if not plain.exists():
        write_plain(open_base(model), plain, lambda name, weight: weight)
    source = open_base(plain)
    linears = {f"{path}.weight" for path in frozen_linears(build(source.config, BaseRecipe()))}
    for arm in dict.fromkeys((BEGUN | IN_FP8).get(arm, arm) for arm in arms):
        directory, began = work / f"base-{arm}", time.monotonic()
        if directory.exists():
            continue
        if arm == "int4":
            write_plain(source, directory, lambda name, w: int4(w) if name in linears else w)
        else:
            write_quantized(source, directory, BaseRecipe(device=device, **PACKED[arm]))
        print(f"{directory.name} made in {time.monotonic() - began:.1f} s", flush=True)


def write_plain(
    source: BaseSource, directory: Path, change: Callable[[str, Tensor], Tensor]
) -> None:
    """Writes ``source`` in bfloat16, each tensor changed on the way."""
    plan = [Planned(p.name, torch.bfloat16, p.shape) for p in source.parameters]

    def changed() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in source.tensors():
            assert isinstance(tensor, Tensor)
            yield name, change(name, tensor).to(torch.bfloat16)

    with new_directory(directory) as fresh:
        write_model(fresh, plan, changed())
        write_description(
            fresh,
            source.config,
            model_class=type(source.skeleton).__name__,
            dtype=torch.bfloat16,
            tokenizer=source.tokenizer(),
            generation_config=source.generation_config(),
        )


def int4(weight: Tensor) -> Tensor:
    """Rounds to −7 … 7 sevenths of the largest magnitude of each block of 64."""
    blocks = weight.float().view(-1, 64)
    scales = blocks.abs().amax(1, keepdim=True).clamp(min=1e-30) / 7
    return (blocks / scales).round().mul(scales).view(weight.shape)


# --- what is measured -----------------------------------------------------------------------------


def bare(arm: str, work: Path, device: str) -> Row:
    """Error of the weights and perplexity of the base as it is."""
    plain, held = (
        load_base(work / f"base-{name}", BaseRecipe(quant="none" if name in _PLAIN else "nf4"))
        for name in ("lora", arm)
    )
    error = total = 0.0
    packed = frozen_linears(held.model)
    for path, linear in frozen_linears(plain.model).items():
        weight = linear.decode(torch.float32)
        error += float((packed[path].decode(torch.float32) - weight).double().square().sum())
        total += float(weight.double().square().sum())
    bytes_held = (
        held.memory_report.quantized_bytes if held.memory_report.quantized_parameters else None
    )
    bits = 8 * bytes_held / held.memory_report.quantized_parameters if bytes_held else None
    del plain, held, packed
    model, tokenizer, _ = open_model(str(work / f"base-{arm}"), device=device, **_quant(arm))
    read = evaluate(
        model,
        tokenizer,
        _prose(HELD_OUT, work),
        max_length=512,
        train_on="all",
        batch_size=4,
        exact_match=False,
    )
    return {
        "weight_error": math.sqrt(error / total),
        "bits_per_weight": bits,
        "prose_loss": read.loss,
        "prose_perplexity": read.perplexity,
        "prose_tokens": read.supervised_tokens,
    }


_PLAIN = ("lora", "int4")


def _quant(arm: str) -> dict[str, Any]:
    # A packed directory stays as it is; the option only says that it is not to be decoded.
    return {"quant": "none" if arm in _PLAIN else PACKED[arm]["quant"]}


def _prose(name: str, folder: Path, most: int | None = None) -> Path:
    """A text as rows of whole paragraphs."""
    rows = [""]
    for paragraph in (TEXTS / name).read_text(encoding="utf-8").strip().split("\n\n"):
        if rows[-1] and len(rows[-1]) + len(paragraph) > PROSE_CHARACTERS:
            rows.append("")
        rows[-1] = f"{rows[-1]}\n\n{paragraph}".strip()
    path = folder / f"{Path(name).stem}-{os.getpid()}.jsonl"
    lines = (json.dumps({"text": row}) + "\n" for row in rows[:most])
    path.write_text("".join(lines), encoding="utf-8")
    return path


def tuned(
    arm: str, task: str, seed: int, work: Path, device: str, cases: int, share: float, rank: int
) -> Row:
    """Trains one adapter, and puts it the held-out cases."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        directory = Path(folder)
        count = max(8, round(EXAMPLES[task] * share))
        if task == "orders":
            files = demo_task.write_task(directory, seed=seed, train=count, test=cases)
            data, test = files.train, files.test
        elif task == "prose":
            data, test = _prose(TRAINING, directory, count), _prose(HELD_OUT, directory)
        else:
            data, test = timetable.write_task(directory, seed=seed, train=count, test=cases)
        in_fp8, arm = arm in IN_FP8, IN_FP8.get(arm, arm)
        packed = BEGUN.get(arm)
        base = work / f"base-{packed or arm}"
        begun = PACKED[packed] | {"init_lora_weights": "qera"} if packed else _quant(arm)
        config = TrainConfig(
            model=str(work / "base-lora" if packed else base),
            data=str(data),
            output=directory / "run",
            seed=seed,
            device=device,
            **RECIPE | CHANGES.get(task, {}) | {"lora_r": rank},
            **_QUIETLY,
            **begun,
            compute="fp8" if in_fp8 else "auto",
        )
        with open_report(config.output, quiet=True) as report:
            done = train(config, report)
        held = PACKED[packed] if packed else _quant(arm)
        model, tokenizer, _ = open_model(
            str(base), adapter=str(done.adapter_dir), device=device, **held
        )
        measured = partial(
            evaluate,
            model,
            tokenizer,
            test,
            max_length=RECIPE["max_length"],
            train_on="all" if task == "prose" else "assistant",
            batch_size=(64 if device == "cuda" else 32) if task != "prose" else 4,
            max_new_tokens=64,
        )
        result = measured(exact_match=task != "prose")
        as_trained: Row = {}
        if in_fp8:
            choose_products(model, config)
            as_trained["loss_in_fp8"] = measured(exact_match=False).loss
    return as_trained | {
        "loss": result.loss,
        "exact_match": result.exact_match,
        "cases": result.cases,
        "steps": done.steps,
        "training_seconds": done.seconds,
        "peak_memory_bytes": done.peak_memory_bytes,
        "samples": result.samples[:2],
    }


# --- the grid -------------------------------------------------------------------------------------


def _begin(threads: int) -> None:
    torch.set_num_threads(threads)


def measure(
    executor: Executor,
    jobs: dict[str, tuple[Callable[..., Row], tuple[Any, ...]]],
    directory: Path,
    until: float,
) -> None:
    """Runs the jobs that left no file yet, and writes one for each; stops waiting at ``until``."""
    open_jobs = {name: job for name, job in jobs.items() if not (directory / name).exists()}
    futures = {
        executor.submit(run, *arguments): name for name, (run, arguments) in open_jobs.items()
    }
    began, done = time.monotonic(), 0
    try:
        for future in as_completed(futures, timeout=max(1.0, until - time.monotonic())):
            name, done = futures[future], done + 1
            if error := future.exception():
                # One that fails must not cost the others: it has no file, and is tried next time.
                print(f"{name} failed: {measuring.reason(error)}", flush=True)
                continue
            row = future.result()
            scratch = directory / f".{name}"
            scratch.write_text(json.dumps(row))
            scratch.rename(directory / name)
            shown = {key: round(row[key], 4) for key in _PRINTED if row.get(key) is not None}
            took = time.monotonic() - began
            print(f"{done}/{len(futures)} after {took:.0f} s: {name} {shown}", flush=True)
    except TimeoutError:
        for future in futures:
            future.cancel()
        print(f"out of time: {len(futures) - done} of {len(futures)} left; call again to go on")


_PRINTED = ("weight_error", "prose_perplexity", "loss", "exact_match", "training_seconds")


def collect(directory: Path) -> tuple[list[Row], list[Row]]:
    """The rows of all files there are: those of bare bases, and those of runs."""
    bases, runs = [], []
    for path in sorted(directory.glob("*.json")):
        row = json.loads(path.read_text())
        row.pop("samples", None)
        kind, *names = path.stem.split("_")
        if kind == "bare":
            bases.append({"base": names[0], **row})
        else:
            runs.append({"base": names[0], "task": names[1], "seed": int(names[2]), **row})
    return bases, runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a chat model: a directory, a GGUF file or a hub id")
    parser.add_argument("--work", type=Path, default=Path(".quality"), help="bases and runs")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cases", type=int, default=120, help="held-out cases of a task")
    parser.add_argument("--share", type=float, default=1.0, help="of the examples, for a trial")
    parser.add_argument("--rank", type=int, default=RECIPE["lora_r"], help="of the adapters")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--tasks", default=",".join(EXAMPLES))
    parser.add_argument("--workers", type=int, default=1, help="runs beside each other")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of each")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which it stops")
    parser.add_argument("--output", type=Path, help="where the record goes")
    parser.add_argument("--note", default="", help="what should be known about the model")
    parser.add_argument("--write-docs", action="store_true", help="write docs/quality.md, too")
    about = "only write docs, of these records"
    parser.add_argument("--from", type=Path, nargs="+", dest="records", help=about)
    options = parser.parse_args()
    if options.records:
        found = [json.loads(path.read_text()) for path in options.records]
        names = [path.name for path in options.records]
        quality_table.write_docs(quality_table.together(found), *names)
        return
    if options.model is None:
        parser.error("--model is missing")
    until = time.monotonic() + options.budget
    work: Path = options.work.absolute()
    name = f"results-{options.device}-{options.cases}-{options.share:g}"
    results = work / (name + (f"-r{options.rank}" if options.rank != RECIPE["lora_r"] else ""))
    results.mkdir(parents=True, exist_ok=True)
    arms = tuple(options.arms.split(","))
    known = ["lora", *PACKED, *BEGUN, *IN_FP8, "int4"]
    if unknown := set(arms) - set(known):
        parser.error(f"no such arms: {', '.join(unknown)}; there are {', '.join(known)}")
    make_bases(options.model, arms, work, options.device)
    common = (work, options.device, options.cases, options.share, options.rank)
    # Seed by seed, so that what a budget cuts off leaves whole seeds.
    jobs: dict[str, tuple[Callable[..., Row], tuple[Any, ...]]] = {
        f"run_{arm}_{task}_{seed}.json": (tuned, (arm, task, seed, *common))
        for seed in range(options.seeds)
        for task in options.tasks.split(",")
        for arm in arms
    }
    bases = {
        f"bare_{arm}.json": (bare, (arm, work, options.device))
        for arm in arms
        if arm not in BEGUN | IN_FP8
    }
    threads = options.threads or max(1, (os.cpu_count() or 1) // options.workers)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # before the workers are started
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, context, _begin, (threads,)) as executor:
        measure(executor, bases | jobs, results, until)
    rows, runs = collect(results)
    content = {
        "command": _command(options),
        "model": Path(options.model).name,
        "note": options.note,
        "recipe": RECIPE | {"lora_r": options.rank},
        "changes": CHANGES,
        "examples": {task: round(n * options.share) for task, n in EXAMPLES.items()},
        "bases": rows,
        "runs": runs,
    }
    output = options.output or Path(f"benchmarks/results/{date.today()}_quality.json")
    measuring.write("quality", output, **content)
    record = json.loads(output.read_text())
    print(quality_table.tables(record))
    if options.write_docs:
        quality_table.write_docs(record, output.name)


def _command(options: argparse.Namespace) -> str:
    """How the run was called, less what is of one machine only."""
    words = f"python benchmarks/quality.py --model {Path(options.model).name}"
    given = ("device", "seeds", "cases", "share", "rank", "arms", "tasks")
    return " ".join([words, *(f"--{name} {getattr(options, name)}" for name in given)])


if __name__ == "__main__":
    main()
