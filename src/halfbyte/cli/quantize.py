"""``halfbyte quantize M OUT``: writes a 4-bit checkpoint for transformers, PEFT and vLLM."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from halfbyte.cli.next_commands import after_writing_model
from halfbyte.cli.opening import claim_directory
from halfbyte.cli.startup import import_transformers
from halfbyte.config.command_line import Command, results
from halfbyte.config.schema import BaseOptions


class QuantizeOptions(BaseOptions):
    """The model to quantise, how, and the output."""

    quant: Literal["nf4", "fp4"] = Field("nf4", description="4-bit type of the weights")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="where to quantise; CPU and GPU round differently in rare cases, so an adapter "
        "needs a base model quantised on the kind of device it was trained on",
    )
    out: Path = Field(description="directory to write")
    overwrite: bool = Field(False, description="replace the directory if it exists")

    sections: ClassVar[dict[str, str]] = {"model": "options"}


COMMAND = Command(
    "quantize",
    QuantizeOptions,
    about="Write a 4-bit checkpoint in bitsandbytes' format, which transformers, PEFT and vLLM "
    "load. Only one tensor is in memory at a time.",
    example="halfbyte quantize model.gguf model-nf4",
    positional=("model", "out"),
)


def main(argv: list[str]) -> None:
    """Run the command."""
    options, notes, as_json = COMMAND.read(argv)
    with claim_directory(options.out, options.model, overwrite=options.overwrite):
        _quantize(options, notes, as_json=as_json)


def _quantize(options: QuantizeOptions, notes: list[str], *, as_json: bool) -> None:
    import_transformers()
    from halfbyte.checkpoint.base_model import open_base
    from halfbyte.checkpoint.bitsandbytes import write_quantized
    from halfbyte.layers.experts import expert_parameters
    from halfbyte.models.build import BaseRecipe
    from halfbyte.report import open_report, show
    from halfbyte.report.live import size
    from halfbyte.runtime.precision import choose_device_and_dtype

    device, *_ = choose_device_and_dtype(options.device, "float32")
    recipe = BaseRecipe(
        options.quant,
        options.double_quant,
        options.block_size,
        device=device,
        quantize_head=options.quantize_head,
        quantize_embeddings=options.quantize_embeddings,
        quant_search=options.quant_search,
    )
    with results(as_json=as_json) as result, open_report() as report:
        for note in notes:
            report.note(note)
        report.note(f"quantising on {device}")
        source = open_base(options.model, revision=options.revision)
        with report.task(f"quantising {options.model}", None) as progress:
            out = write_quantized(
                source, options.out, recipe, replace=options.overwrite, progress=progress
            )
        written = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
        show.paragraph(f"{out}: {size(written)}, from {size(source.file_bytes)}. To use it:")
        ours_alone = options.quantize_embeddings or bool(expert_parameters(source.skeleton))
        for command in after_writing_model(out, vllm=not ours_alone):
            show.command(command)
        result |= {"directory": str(out), "bytes": written, "source_bytes": source.file_bytes}
