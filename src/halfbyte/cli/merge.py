"""``halfbyte merge M ADAPTER OUT``: merges an adapter into its base model, losing least.

Trainers disagree on which form of the base model an adapter should be merged into. So it is
measured: each way of merging is compared with the live adapter on held-out text, before anything is
written.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from halfbyte.cli.next_commands import after_writing_model, show_next
from halfbyte.cli.opening import as_trained, claim_directory
from halfbyte.cli.startup import import_transformers
from halfbyte.config.command_line import Command, results
from halfbyte.config.data_sources import Columns, DataSources, name_of
from halfbyte.config.schema import BaseOptions
from halfbyte.errors import ConfigError, HalfbyteError

if TYPE_CHECKING:
    from halfbyte.report import RunReport
    from halfbyte.tools.merge_evaluation import Distance, Reference


class MergeOptions(BaseOptions):
    """The adapter to merge, how, and the output."""

    adapter: str = Field(
        min_length=1,
        description="directory of an adapter; the base model is quantised as in its training, "
        "unless set otherwise",
    )
    out: Path = Field(description="directory to write")
    into: Literal["best", "decoded", "original", "nf4"] = Field(
        "best",
        description="what the adapter is added to: decoded: the dequantised 4-bit base it was "
        "trained on; original: the weights of the files; nf4: as decoded, with the sum quantised "
        "to NF4 again (bitsandbytes); best: the one closest to the adapter",
    )
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        "bfloat16", description="dtype of the merged weights"
    )
    overwrite: bool = Field(False, description="replace the directory if it exists")
    measure: bool = Field(True, description="compare the ways of merging on held-out text")
    verify: bool = Field(
        False,
        description="read the model back, compare it, check that training examples the adapter has "
        "memorised are still reproduced, and exit with 1 if not",
    )
    min_agreement: float = Field(
        0.95,
        ge=0,
        le=1,
        description="smallest top-1 agreement with the adapter, and smallest share of memorised "
        "examples, that verify accepts",
    )
    data: DataSources | None = Field(
        None,
        min_length=1,
        description="held-out text: sources as for train (default: 32 questions and answers that "
        "come with halfbyte)",
    )
    column: Columns = Field(
        {}, description="columns under other names, such as messages=conversation"
    )
    max_length: int = Field(
        1024, ge=2, description="longest example, in tokens; longer ones are truncated"
    )
    train_on: Literal["assistant", "all"] = Field(
        "assistant", description="tokens to compare: the assistant's, or all"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where to compute")
    allow_mismatch: bool = Field(
        False, description="use an adapter with a base model, tokenizer or template not its own"
    )

    sections: ClassVar[dict[str, str]] = {
        "model": "the base model",
        "adapter": "the merge",
        "measure": "the comparison",
    }

    @model_validator(mode="after")
    def _best_is_measured(self) -> Self:
        if self.into == "best" and not self.measure:
            raise ValueError("`into` best needs `measure`: choose another `into`, or leave it on")
        return self


COMMAND = Command(
    "merge",
    MergeOptions,
    about="Merge an adapter into its base model. Each way of merging is first compared with the "
    "live adapter on held-out text.",
    example="halfbyte merge model.gguf out merged",
    positional=("model", "adapter", "out"),
)


def main(argv: list[str]) -> None:
    """Run the command.

    Raises:
        HalfbyteError: Verification failed.
    """
    options, notes, as_json = COMMAND.read(argv)
    from halfbyte.data.sources import local_paths

    data = local_paths(options.data or ())
    with claim_directory(
        options.out, options.model, options.adapter, *data, overwrite=options.overwrite
    ):
        _merge(options, notes, as_json=as_json)


def _merge(options: MergeOptions, notes: list[str], *, as_json: bool) -> None:
    import_transformers(gpu=options.device != "cpu")
    import torch

    from halfbyte.checkpoint.base_model import open_base
    from halfbyte.checkpoint.merged import Merged, ways, write_merged
    from halfbyte.checkpoint.peft import recorded_rope_scaling, recorded_template
    from halfbyte.linear.experts import expert_linears
    from halfbyte.report import open_report, show
    from halfbyte.report.live import size
    from halfbyte.tools.merge_evaluation import distances
    from halfbyte.train.loading import open_model

    with results(as_json=as_json) as result, open_report() as report:
        for note in notes:
            report.note(note)
        recipe = as_trained(options, options.adapter)
        model, tokenizer, _ = open_model(
            options.model,
            adapter=options.adapter,
            **recipe,
            compute_dtype="float32",
            device=options.device,
            revision=options.revision,
            allow_mismatch=options.allow_mismatch,
            report=report,
        )
        source = open_base(options.model, revision=options.revision)
        source.chat_template = recorded_template(options.adapter)
        source.scale_rope(recorded_rope_scaling(options.adapter))
        names = ways(source, model)
        into = names[0] if options.into == "best" else options.into
        candidates = {
            way: Merged(source, model, way, getattr(torch, options.dtype))
            for way in dict.fromkeys([*names, into])
        }
        sizes = {way: merged.written_bytes for way, merged in candidates.items()}
        live: Reference | None = None
        measured: dict[str, Distance] = {}
        taught: Reference | None = None
        if options.measure or options.verify:
            live = _held_out(options, model, tokenizer, report)
        if options.verify:
            taught = live if options.data else _taught(options, model, tokenizer, report)
        if options.measure and live is not None:
            with report.task("comparing", None) as progress:
                measured = distances(model, candidates, live, progress)
            _show_distances(measured, sizes)
            if options.into == "best":
                into = min(names, key=lambda way: measured[way].kl)
        with report.task(f"writing {options.out}", None) as progress:
            out = write_merged(
                candidates[into], options.out, replace=options.overwrite, progress=progress
            )
        written = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
        kept = candidates[into].packing() if into == "decoded" else None
        held = "mxfp4" if model.halfbyte_recipe.experts and kept is None else recipe["quant"]
        packed = held != "none" and kept is None
        base = f"decoded {held} weights" if packed else "weights"
        experts = "" if kept is None else " Its experts are in MXFP4, with the bytes of the base."
        if into == "nf4" and expert_linears(model):
            experts = f" Its experts are in {options.dtype}: other programs load no packed ones."
        show.paragraph(f"{out}: {size(written)}. {_LOSSES[into].format(base=base)}{experts}")
        result |= {
            "directory": str(out),
            "bytes": written,
            "base": recipe,
            "dtype": options.dtype,
            "into": into,
            "positions": None if live is None else live.positions,
            "distances": {way: dataclasses.asdict(found) for way, found in measured.items()},
            "sizes": sizes,
        }
        problem = ""
        if options.verify and live is not None:
            with report.task(f"reading {out}", None):
                result["verified"], problem = _verified(options, model, live, taught)
        if not problem:
            show_next("To use it:", after_writing_model(out))
    if problem:
        raise HalfbyteError(
            f"{out} was written, but differs from what was trained: {problem}, expected at least "
            f"{100 * options.min_agreement:g} % (--min-agreement). "
            "--into decoded --dtype float32 loses least"
        )


def _verified(
    options: MergeOptions, model: Any, live: "Reference", taught: "Reference | None"
) -> tuple[dict[str, Any], str]:
    """Read the merged model back: return the comparison, and what is wrong, or an empty string."""
    from halfbyte.checkpoint.base_model import open_base
    from halfbyte.report import show
    from halfbyte.tools.merge_evaluation import distance

    found = distance(model, open_base(options.out), live)
    agreement, problem = found.top1_agreement, ""
    show.paragraph(
        f"Read back, it agrees with the adapter in {100 * agreement:.2f} % of {live.positions:,} "
        f"positions (KL {found.kl:.2g})."
    )
    if agreement < options.min_agreement:
        problem = (
            f"its most likely token is the adapter's in {100 * agreement:.2f} % of the positions"
        )
    answer = dataclasses.asdict(found) | {"by_heart": 0}
    if taught is not None:
        known = taught.by_heart
        lost = found.forgotten
        if taught is not live:
            lost = distance(model, open_base(options.out), taught).forgotten
        answer |= {"by_heart": known, "forgotten": lost}
        count = sum(len(batch.labels) for batch in taught.batches)
        show.paragraph(
            f"Of {count} training examples the adapter reproduces {known} exactly, and the merged "
            f"model {known - lost} of those."
        )
        if not problem and known - lost < options.min_agreement * known:
            problem = (
                f"of {known} examples that the adapter reproduces exactly, it reproduces "
                f"{known - lost}"
            )
    return answer, problem


_LOSSES = {
    "decoded": "The adapter was added to the {base} that it was trained on, so this model computes "
    "what was trained.",
    "original": "The adapter was added to the original weights, which it was not trained on.",
    "nf4": "The adapter was added to the {base} that it was trained on, and the sum quantised to "
    "4 bits again: small updates are lost to rounding.",
}


def _held_out(
    options: MergeOptions, model: Any, tokenizer: Any, report: "RunReport"
) -> "Reference":
    from halfbyte.data import load_dataset
    from halfbyte.tools.merge_evaluation import HELD_OUT, reference

    text = load_dataset(
        options.data or HELD_OUT,
        tokenizer,
        max_length=options.max_length,
        train_on=options.train_on,
        columns=options.column,
    )
    for line in text.report.lines():
        report.note(line)
    live = reference(model, text.examples)
    if live.left_out:
        report.note(
            f"compared on {live.positions:,} positions; {live.left_out:,} examples are left out, "
            "since their logits do not fit into memory"
        )
    return live


_TAUGHT = 64  # training examples that verify checks


def _taught(
    options: MergeOptions, model: Any, tokenizer: Any, report: "RunReport"
) -> "Reference | None":
    """The adapter's outputs on its training data, if that still exists."""
    from halfbyte.config.reading import load_config
    from halfbyte.data import load_dataset
    from halfbyte.data.sources import local_paths
    from halfbyte.tools.merge_evaluation import reference

    run = Path(options.adapter) / "config.yaml"
    trained = None
    if run.exists():
        try:
            trained, _ = load_config(run, {})
        except ConfigError as error:  # of another trainer, or of a later version
            report.note(f"memorised training examples are not checked: {error}")
            return None
    if trained is None or len(local_paths(trained.data)) < len(trained.data):
        missing = run if trained is None else name_of(trained.data)
        report.note(
            f"memorised training examples are not checked: {missing} does not exist; give the "
            "adapter's data (--data)"
        )
        return None
    text = load_dataset(
        trained.data,
        tokenizer,
        max_length=options.max_length,
        train_on=options.train_on,
        columns=trained.column,
        max_samples=trained.max_samples,
    )
    return reference(model, text.examples[:_TAUGHT])


def _show_distances(measured: dict[str, "Distance"], sizes: Mapping[Any, int]) -> None:
    from halfbyte.report import show
    from halfbyte.report.live import size

    show.columns(
        ("into", "KL from live", "largest gap", "same top-1", "size"),
        [
            (
                way,
                f"{found.kl:.2e}",
                f"{found.largest_gap:.3g}",
                f"{100 * found.top1_agreement:.2f} %",
                size(sizes[way]) if way in sizes else "",
            )
            for way, found in measured.items()
        ],
    )
