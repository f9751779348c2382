"""Trains variants of a run: each with the same seeds and data, each in its own process.

A variant is ``lora``, ``qlora``, ``fp4``, ``no-double-quant``, any option of training as
``name=value``, or several joined by ``+``, such as ``lora+r=64``. In its own process, a run's
memory is its own. It runs ``halfbyte train`` with a configuration file, then ``halfbyte eval``, as
a user would, except that both share the process, which imports and compiles once. Seeds are the
outer loop, so that a slower phase of the machine affects all variants.

Finished runs are not repeated, and unfinished ones resume from their checkpoint.
"""

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from halfbyte.atomic import new_file, require_writable
from halfbyte.config.aliases import translate
from halfbyte.config.reading import check, load_config, to_yaml
from halfbyte.config.schema import TrainConfig
from halfbyte.errors import ConfigError, HalfbyteError, Interrupted, OutputError
from halfbyte.foreign_text import quote
from halfbyte.report.comparison import (
    EVALUATION,
    Comparison,
    Result,
    comparison_page,
    finished_run,
    read_result,
)
from halfbyte.report.page import require_page
from halfbyte.report.rejected import REJECTED_NAME
from halfbyte.report.runs import Run, mapping, number, read_run
from halfbyte.runtime.signals import first_signal

KNOWN: dict[str, dict[str, Any]] = {
    "lora": {"quant": "none"},
    "qlora": {"quant": "nf4"},
    "fp4": {"quant": "fp4"},
    "no-double-quant": {"double_quant": False},
}
"""Words that stand for options."""

_SECONDS_BETWEEN_LOOKS = 0.5

Progress = Callable[[int, int], None]

logger = logging.getLogger("halfbyte")


class Variant(NamedTuple):
    """The name of a variant, as given, and its options."""

    name: str
    options: dict[str, Any]


def parse_variants(names: Sequence[str]) -> list[Variant]:
    """Read variants.

    Raises:
        ConfigError: A word is unknown, a name is given twice, or none is given.
    """
    found: list[Variant] = []
    problems: list[str] = []
    for name in names:
        options: dict[str, Any] = {}
        for word in name.split("+"):
            option, equals, value = word.strip().partition("=")
            if equals:
                ours = translate({option.replace("-", "_"): value}, TrainConfig)
                problems += ours.problems
                options |= ours.values
            elif option in KNOWN:
                options |= KNOWN[option]
            else:
                problems.append(
                    f"`variants`: {quote(word)} is not known; expected {', '.join(KNOWN)}, an "
                    "option such as r=64, or several joined by +"
                )
        if any(variant.name == name for variant in found):
            problems.append(f"`variants`: {quote(name)} is given twice")
        found.append(Variant(name, options))
    if problems or not found:
        raise ConfigError("; ".join(problems) or "`variants` names nothing to train")
    return found


@dataclass(frozen=True)
class Job:
    """One variant with one seed.

    Attributes:
        variant: Its name.
        config: What is trained; its output is the run's directory.
        evaluation: The words of ``halfbyte eval``, or none for a run that is not evaluated.
        module: What trains: ``halfbyte`` itself, or the module for random weights.
    """

    variant: str
    config: TrainConfig
    evaluation: tuple[str, ...] = ()
    module: tuple[str, ...] = ("halfbyte", "train")

    @property
    def file(self) -> Path:
        """Its configuration file, next to its output."""
        return self.config.output.with_name(self.config.output.name + ".yaml")

    @property
    def log(self) -> Path:
        """The file for its processes' standard error."""
        return self.file.with_suffix(".log")

    def finished(self) -> Run | None:
        """The finished run, or None."""
        return finished_run(self.config.output, evaluated=bool(self.evaluation))


def jobs(
    variants: Sequence[Variant],
    seeds: Sequence[int],
    given: dict[str, Any],
    output: Path,
    *,
    evaluation: Callable[[TrainConfig], tuple[str, ...]],
    module: tuple[str, ...] = ("halfbyte", "train"),
) -> list[Job]:
    """Return all runs, seeds as the outer loop, after checking their options.

    Args:
        variants: What differs.
        seeds: The seeds of each.
        given: Options that all share, by name.
        output: The comparison's directory.
        evaluation: The words of ``halfbyte eval`` for a run.
        module: See ``Job``.

    Raises:
        ConfigError: An option is wrong, or ``output`` holds a run that was made with others.
    """
    found = []
    for seed in seeds:
        for variant in variants:
            place = {"output": output / _directory(variant.name) / f"seed-{seed}", "resume": True}
            config = check(TrainConfig, given | variant.options | {"seed": seed} | place)
            job = Job(variant.name, config, evaluation(config), module)
            if job.file.exists() and (job.config.output / "journal.jsonl").exists():
                _require_same(job)
            found.append(job)
    return found


def rows_left_out(job: Job) -> str | None:
    """Return a sentence on the rows of the data that a finished run left out; None if none."""
    begin = read_run(job.config.output).begin
    verdicts = [mapping(begin.get(name)) for name in ("data_verdict", "held_out_verdict")]
    count = sum((number(v.get("rows")) or 0) - (number(v.get("usable")) or 0) for v in verdicts)
    return f"{count:,.0f} rows left out: {job.config.output / REJECTED_NAME}" if count else None


def _directory(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._+=-" else "_" for c in name)


def _require_same(job: Job) -> None:
    # Options that came with a later version had their defaults then.
    before = load_config(job.file, {})[0].model_dump(mode="json")
    now = job.config.model_dump(mode="json")
    places = {"output", "memory_budget", "logging_steps"}
    places |= {"save_steps", "save_minutes", "save_total_limit"}
    changed = [
        f"{name} was {quote(before[name])}, is {quote(value)}"
        for name, value in now.items()
        if name not in places and before[name] != value
    ]
    if changed:
        raise ConfigError(
            f"{job.config.output} was run with other options; give the same, or another --output:"
            "\n  " + "\n  ".join(changed)
        )


def run(job: Job, progress: Progress | None = None) -> Result:
    """Run the remaining steps of a job.

    Args:
        job: What to do.
        progress: Called now and then with steps made, and steps in all.

    Returns:
        The result; with ``failure`` if it ended without one, and the log says why.

    Raises:
        ConfigError: Its process ended with code 2: what it was given is wrong.
    """
    seed = job.config.seed
    done = job.finished()
    if done is None:
        require_writable(job.file.parent)
        with new_file(job.file) as file:
            file.write(to_yaml(job.config).encode())
        trained = finished_run(job.config.output, evaluated=False) is not None
        answer, failure = _process(job, _words(job, trained=trained), progress)
        if failure is None and job.evaluation:
            with new_file(job.config.output / EVALUATION) as file:
                file.write(answer)
        if failure is not None:
            return Result(job.variant, seed, failure=failure)
        done = read_run(job.config.output)
    return read_result(job.variant, seed, done)


def evaluate_existing(adapter: str, words: Sequence[str], output: Path) -> Result:
    """Evaluate an adapter that exists, in a process of its own.

    Args:
        adapter: Its directory. What its training took is read from its journal, if it has one.
        words: The words of ``halfbyte eval``.
        output: The comparison's directory, for the log.

    Returns:
        The result; with ``failure`` if it ended without one, and the log says why.

    Raises:
        ConfigError: Its process ended with code 2: what it was given is wrong.
    """
    name, weights = name_of(adapter), Path(adapter) / "adapter_model.safetensors"
    place = check(TrainConfig, {"model": "-", "data": "-", "output": output / _directory(name)})
    answer, failure = _process(Job(name, place), ["halfbyte", "eval", *words, "--json"])
    if failure is not None:
        return Result(name, 0, failure=failure)
    trained = finished_run(Path(adapter), evaluated=False)
    known = Result(name, 0, adapter_bytes=float(weights.stat().st_size))
    if trained is not None:
        seed = number(mapping(trained.begin.get("config")).get("seed"))
        known = read_result(name, int(seed or 0), trained)
    found = json.loads(answer)
    return replace(known, held_out_loss=found["loss"], exact_match=found["exact_match"])


def name_of(adapter: str) -> str:
    """The name of an adapter in the table: the end of its path."""
    return "/".join(Path(adapter).parts[-2:])


def _words(job: Job, *, trained: bool) -> list[str]:
    """The arguments of ``python -m`` for the remaining steps of a job."""
    evaluate = ["eval", *job.evaluation, "--json"]
    if trained:
        return ["halfbyte", *evaluate]
    if not job.evaluation:
        return [*job.module, str(job.file)]
    return ["halfbyte.cli.series", json.dumps([["train", str(job.file)], evaluate])]


def _process(
    job: Job, words: list[str], progress: Progress | None = None
) -> tuple[bytes, str | None]:
    """Run ``python -m …``; return its standard output, and why it failed."""
    answer = job.log.with_suffix(".out")
    with open(job.log, "ab") as log, open(answer, "wb") as out:
        began = log.tell()
        call = [sys.executable, "-m", *words]
        # In its own process group, so that Ctrl-C reaches it through `_end` only, and once.
        with subprocess.Popen(
            call, stdout=out, stderr=log, env=os.environ, process_group=0
        ) as process:
            try:
                while process.returncode is None:
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(_SECONDS_BETWEEN_LOOKS)
                    if progress is not None:
                        progress(*_steps(job.config.output))
            except Interrupted as interrupted:
                _end(process, interrupted.signal)
                raise
            except BaseException:
                process.kill()
                raise
    said = job.log.read_bytes()[began:].decode(errors="replace").strip().splitlines()
    output = answer.read_bytes()
    answer.unlink()
    if process.returncode == 0:
        return output, None
    last = said[-1] if said else "it said nothing"
    if process.returncode == 2:
        message = next((i for i, line in enumerate(said) if line.startswith("halfbyte ")), -1)
        raise ConfigError(f"{job.variant}: " + "\n".join(said[message:]).partition(": ")[2])
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        memory = ", as happens when memory runs out" if name == "SIGKILL" else ""
        return output, f"it was killed by {name}{memory}; see {job.log}"
    errors = [line for line in said if "Error" in line.partition(":")[0]]
    return output, f"{errors[-1] if errors else last}; see {job.log}"


def _end(process: "subprocess.Popen[bytes]", number: int) -> None:
    """Pass a signal on to a run, which finishes its step and saves; a second one kills it."""
    logger.warning(
        "stopping: the run finishes its step and saves first; a second signal ends it at once. "
        "The same command goes on from there"
    )
    process.send_signal(number)
    with first_signal(lambda _: process.kill()):
        process.wait()


def _steps(directory: Path) -> tuple[int, int]:
    try:
        going = read_run(directory)
    except ConfigError:
        return 0, 1
    return going.steps, int(number(going.begin.get("total_steps")) or 1)


def first_runs(done: Sequence[Job]) -> Iterator[Run]:
    """The run of each variant's first seed that has a result, named as the variant."""
    named: set[str] = set()
    for job in done:
        if job.variant not in named and (one := job.finished()) is not None:
            named.add(job.variant)
            one.name = job.variant
            yield one


def require_free(output: Path) -> None:
    """Check, before anything is trained, that `write_results` will replace no file of others.

    Raises:
        OutputError: It would.
    """
    table, page = output / "compare.json", output / "compare.html"
    require_page(page)
    if table.exists() and not page.exists():
        raise OutputError(
            f"{table} was not written by a comparison, so it is not replaced: move it, or give "
            "another --output"
        )


def write_results(
    found: Comparison, done: Sequence[Job], output: Path, *, title: str, about: str, curves: bool
) -> None:
    """Write ``compare.json`` and ``compare.html``.

    Args:
        found: The results.
        done: The jobs they are of.
        output: Where the files go.
        title: What was compared, for people.
        about: On what.
        curves: Whether the runs' losses mean something.

    Raises:
        OutputError: They cannot be written.
    """
    runs = list(first_runs(done))
    if runs:
        about += f" · {runs[0].begin.get('machine')}"
    links = {
        f"{job.variant}, seed {job.config.seed}": os.path.relpath(
            job.config.output / "report.html", output
        )
        for job in done
        if job.finished()
    }
    page = comparison_page(found, runs if curves else [], title, about, links)
    with new_file(output / "compare.html") as file:
        file.write(page.encode(errors="replace"))
    with new_file(output / "compare.json") as file:
        file.write(json.dumps(found.as_json(), indent=2).encode())


def require_results(found: Comparison) -> None:
    """Raise an error, after everything is written, if a run has no result.

    Raises:
        HalfbyteError: Names every run without one.
    """
    if failures := found.failures():
        raise HalfbyteError("some runs have no result:\n  " + "\n  ".join(failures))
