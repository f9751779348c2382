"""``halfbyte merge M ADAPTER OUT``: a plain model with the adapter in its weights.

Which base an adapter may be merged into is disputed between trainers. It was trained beside the
*decoded* 4-bit weights, so those are what it is added to here: what comes out computes what was
trained. (Added to the original 16-bit weights it would also add the quantisation error, which
training never saw; quantised to 4 bits once more, small updates would be rounded away.)
"""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from halfbyte.cli.opening import as_trained, require_free
from halfbyte.cli.options import Verb, results
from halfbyte.train.config import BaseOptions


class MergeOptions(BaseOptions):
    """What to merge, into what, and where to."""

    adapter: str = Field(
        min_length=1,
        description="directory of an adapter; the base is then quantised as in its training, "
        "unless said otherwise",
    )
    out: Path = Field(description="directory to write")
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        "bfloat16", description="type of the merged weights"
    )
    overwrite: bool = Field(False, description="replace the directory if it is there")

    sections: ClassVar[dict[str, str]] = {
        "model": "the base, as the adapter saw it",
        "adapter": "the merge",
    }


VERB = Verb(
    "merge",
    MergeOptions,
    about="Write a plain transformers model with an adapter merged into it. The adapter is added "
    "to the decoded 4-bit weights that it was trained on, so the result computes what was trained.",
    example="halfbyte merge model.gguf out merged",
    positional=("model", "adapter", "out"),
)


def main(argv: list[str]) -> None:
    """Run the verb."""
    options, notes, as_json = VERB.read(argv)
    require_free(options.out, overwrite=options.overwrite)

    import torch

    from halfbyte.checkpoint.merged import write_merged
    from halfbyte.report import open_report, show
    from halfbyte.report.live import size
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
            device="cpu",
            revision=options.revision,
            report=report,
        )
        with report.task(f"writing {options.out}", None) as progress:
            out = write_merged(
                model,
                tokenizer,
                model.config,
                options.out,
                getattr(torch, options.dtype),
                replace=options.overwrite,
                progress=progress,
            )
        written = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
        packed = recipe["quant"] != "none"
        base = f"decoded {recipe['quant']} weights" if packed else "weights"
        show.paragraph(
            f"{out}: {size(written)} in {options.dtype}. The adapter was added to the {base} that "
            "it was trained on, so this model computes what was trained; packed in 4 bits again, "
            "it would lose small updates to rounding."
        )
        result |= {"directory": str(out), "bytes": written, "base": recipe, "dtype": options.dtype}
