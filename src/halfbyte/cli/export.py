"""``halfbyte export M [ADAPTER] OUT``: writes a GGUF file and a Modelfile for llama.cpp and Ollama.

An adapter is added to the decoded weights that it was trained on, as in ``merge``, and the sum is
rounded once. The file is read back and compared before it gets its name, so a wrong one is never
left.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from halfbyte.cli.next_commands import after_export, show_next
from halfbyte.cli.opening import RECIPE_FIELDS, as_trained, claim_directory
from halfbyte.cli.startup import import_transformers
from halfbyte.config.command_line import Command, results
from halfbyte.config.schema import BaseOptions
from halfbyte.errors import HalfbyteError

if TYPE_CHECKING:
    from halfbyte.checkpoint.source import BaseSource
    from halfbyte.report import RunReport


class ExportOptions(BaseOptions):
    """The model to export, the format and the output."""

    adapter: str | None = Field(
        None,
        min_length=1,
        description="directory of an adapter; the base model is quantised as in its training, "
        "unless set otherwise. Without one, the weights of the files are written",
    )
    out: Path = Field(description="directory to write: model.gguf or adapter.gguf, and Modelfile")
    format: Literal["gguf", "gguf-lora"] = Field(
        "gguf", description="the model with the adapter merged into it, or only the adapter"
    )
    type: Literal[
        "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "q3_k_m", "mxfp4"
    ] = Field(
        "f16",
        description="type of the matrices; the K-quants are llama.cpp's mixtures, with q4_0 "
        "embedding and head are in q8_0, with mxfp4 all that is no expert",
    )
    overwrite: bool = Field(False, description="replace the directory if it contains an export")
    verify: bool = Field(
        True, description="read the file back, compare it, and exit with 1 if it is wrong"
    )
    min_agreement: float | None = Field(
        None,
        ge=0,
        le=1,
        description="smallest top-1 agreement with the adapter that verify accepts (default: 0.95 "
        "for f32, f16 and bf16, 0.8 for q8_0, none for smaller types, whose rounding alone may "
        "cost more)",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where to compute")
    allow_mismatch: bool = Field(
        False, description="use an adapter with a base model, tokenizer or template not its own"
    )

    sections: ClassVar[dict[str, str]] = {"model": "the base model", "adapter": "the export"}

    @model_validator(mode="before")
    @classmethod
    def _adapter_may_be_left_out(cls, values: Any) -> Any:
        if isinstance(values, dict) and "adapter" in values and "out" not in values:
            values = dict(values)
            values["out"] = values.pop("adapter")
        return values

    @model_validator(mode="after")
    def _an_adapter_alone(self) -> Self:
        if self.format == "gguf-lora":
            if self.adapter is None:
                raise ValueError("`format` gguf-lora needs an adapter: MODEL ADAPTER OUT")
            if self.type not in ("f32", "f16", "bf16"):
                raise ValueError("`type` of a gguf-lora must be f32, f16 or bf16")
        return self


# What rounding may cost a small model: SmolLM2-135M keeps 100 % in f16, 96 % in q8_0, 39 % in q4_0.
_LEAST_AGREEMENT = {"f32": 0.95, "f16": 0.95, "bf16": 0.95, "q8_0": 0.8}

COMMAND = Command(
    "export",
    ExportOptions,
    about="Write a GGUF file for llama.cpp and Ollama: a model, a model with an adapter merged "
    "into it, or only the adapter.",
    example="halfbyte export model out exported --type q8_0",
    positional=("model", "adapter", "out"),
)


def main(argv: list[str]) -> None:
    """Run the command.

    Raises:
        HalfbyteError: Verification failed.
    """
    options, notes, as_json = COMMAND.read(argv)
    inputs = options.model, options.adapter
    with claim_directory(options.out, *inputs, overwrite=options.overwrite, kind="export"):
        _export(options, notes, as_json=as_json)


def _export(options: ExportOptions, notes: list[str], *, as_json: bool) -> None:
    import_transformers(gpu=options.device != "cpu")
    from halfbyte.checkpoint.base_model import open_base
    from halfbyte.checkpoint.gguf_export import require_expressible
    from halfbyte.checkpoint.peft import recorded_rope_scaling, recorded_template
    from halfbyte.report import open_report

    with results(as_json=as_json) as result, open_report() as report:
        for note in notes:
            report.note(note)
        base = open_base(options.model, revision=options.revision)
        base.chat_template = recorded_template(options.adapter)
        base.scale_rope(recorded_rope_scaling(options.adapter))
        require_expressible(base, vocabulary=options.format == "gguf")
        if base.encoders and options.format == "gguf":
            report.note(
                "the file has the text decoder only; llama.cpp reads encoders of other inputs from "
                "a file of their own (mmproj)"
            )
        if options.format == "gguf-lora":
            found = _export_adapter(options, base, report)
        else:
            found = _export_model(options, base, report)
        result |= {"directory": str(options.out), "type": options.type} | found
        problem = _too_far(options, result)
        if not problem:
            base_name = options.model if options.format == "gguf-lora" else None
            show_next("To use it:", after_export(options.out, base=base_name))
    if problem:
        raise HalfbyteError(f"{options.out} was written, but {problem}")


def _too_far(options: ExportOptions, result: dict[str, Any]) -> str:
    """Say why the written model is not the one that was wanted, or return an empty string."""
    least, agreement = options.min_agreement, result.get("distance", {}).get("top1_agreement", 1.0)
    if agreement < (_LEAST_AGREEMENT.get(options.type, 0.0) if least is None else least):
        return (
            "its outputs differ from the adapter's: the most likely token is the same in "
            f"{100 * agreement:.2f} % of the positions (--min-agreement). --type f16 loses less"
        )
    return ""


def _opened(options: ExportOptions, report: "RunReport") -> tuple[Any, dict[str, Any]]:
    """Return the model with its adapter, if there is one, and how the base model is quantised.

    Raises:
        UserError: One of them is missing or damaged, or the adapter belongs to another base.
    """
    from halfbyte.train.loading import open_model

    recipe = as_trained(options, options.adapter)
    model, _, _ = open_model(
        options.model,
        adapter=options.adapter,
        **recipe,
        compute_dtype="float32",
        device=options.device,
        revision=options.revision,
        allow_mismatch=options.allow_mismatch,
        report=report,
    )
    return model, recipe


def _export_adapter(
    options: ExportOptions, base: "BaseSource", report: "RunReport"
) -> dict[str, Any]:
    from halfbyte.atomic import new_directory
    from halfbyte.checkpoint.gguf_export import write_gguf_lora
    from halfbyte.checkpoint.gguf_verify import verify_gguf_lora
    from halfbyte.checkpoint.modelfile import modelfile
    from halfbyte.checkpoint.peft import load_adapter
    from halfbyte.report import show

    assert options.adapter is not None
    adapter = load_adapter(options.adapter)
    adapter.require_layers_of(base.skeleton)
    if adapter.info.get("base", {}).get("fingerprint", base.fingerprint) != base.fingerprint:
        _opened(options, report)  # other files may contain the same weights, so these are read
    where = Path(options.model)
    origin = str(where.resolve()) if where.exists() else options.model
    found: dict[str, Any] = {}
    with new_directory(options.out, replace=options.overwrite) as directory:
        written = directory / "adapter.gguf"
        write_gguf_lora(base, adapter, written, options.type)
        if options.verify:
            found["verified"] = _told(verify_gguf_lora(base, adapter, written), options.type)
        text = modelfile(origin, base.tokenizer(), _ends(base), adapter="./adapter.gguf")
        (directory / "Modelfile").write_text(text, encoding="utf-8")
    path = options.out / "adapter.gguf"
    begun = adapter.info.get("recipe", {}).get("init_lora_weights") == "qera"
    show.paragraph(
        f"{path}: only the adapter, for llama.cpp's --lora. It was trained on the dequantised "
        "4-bit base model; on another quantisation of the base its outputs differ"
        + (
            ", since it compensates for the quantisation error of that base (qera). Export the "
            "merged model instead."
            if begun
            else " slightly."
        )
    )
    return {"file": str(path), "bytes": path.stat().st_size} | found


def _export_model(
    options: ExportOptions, base: "BaseSource", report: "RunReport"
) -> dict[str, Any]:
    import torch

    from halfbyte.atomic import new_directory
    from halfbyte.checkpoint.base_model import open_base
    from halfbyte.checkpoint.gguf_export import write_gguf
    from halfbyte.checkpoint.gguf_verify import verify_gguf
    from halfbyte.checkpoint.merged import Merged
    from halfbyte.checkpoint.modelfile import modelfile
    from halfbyte.report import show
    from halfbyte.report.live import size

    source, model = base, None
    recipe: dict[str, Any] = {"quant": "none"}
    if options.adapter is not None or set(RECIPE_FIELDS) & options.model_fields_set:
        model, recipe = _opened(options, report)
        source = Merged(base, model, "decoded", torch.float32)
    tokenizer = base.tokenizer()
    path = options.out / "model.gguf"
    found: dict[str, Any] = {}
    with new_directory(options.out, replace=options.overwrite) as directory:
        with report.task(f"writing {path}", None) as progress:
            write_gguf(
                source,
                directory / path.name,
                options.type,
                base=base,
                progress=progress,
            )
        text = modelfile(f"./{path.name}", tokenizer, _ends(source))
        (directory / "Modelfile").write_text(text, encoding="utf-8")
        if options.verify:
            with report.task(f"reading {path}", None):
                file = directory / path.name
                written = open_base(str(file))
                found["verified"] = _told(verify_gguf(source, written, file), options.type)
                if model is not None:
                    found["distance"] = _distance(model, tokenizer, written, options.type)
    show.paragraph(f"{path}: {size(path.stat().st_size)}, and a Modelfile for Ollama.")
    return {"file": str(path), "bytes": path.stat().st_size, "base": recipe} | found


def _ends(source: "BaseSource") -> list[int]:
    """The tokens that end an answer, as the model's generation configuration says."""
    defaults = source.generation_config()
    stops = defaults.eos_token_id if defaults is not None else None
    return stops if isinstance(stops, list) else [] if stops is None else [stops]


def _told(verified: Any, file_type: str) -> dict[str, Any]:
    """Say what was read back.

    Raises:
        HalfbyteError: If it is not what was written.
    """
    from halfbyte.report import show

    share = verified.worst_share
    if not share <= 1:
        raise HalfbyteError(
            f"the file is wrong, so it is removed: the error of a value is {share:.3g} times the "
            f"largest that rounding to {file_type} can cause. This is a bug in halfbyte"
        )
    show.paragraph(
        f"Read back: {verified.tensors} tensors, largest error {verified.largest_error:.2g}, at "
        f"most {100 * verified.worst_share:.0f} % of the largest possible rounding error."
    )
    return dict(verified._asdict())


_FAR = 0.9  # top-1 agreement below which a better type is suggested


def _distance(model: Any, tokenizer: Any, written: "BaseSource", file_type: str) -> dict[str, Any]:
    """Compare the written file's outputs with the live model's, on a few prompts."""
    from halfbyte.data import load_dataset
    from halfbyte.report import show
    from halfbyte.tools.merge_evaluation import HELD_OUT, distance, reference

    text = load_dataset(HELD_OUT, tokenizer, max_length=256, train_on="all")
    live = reference(model, text.examples[:4])
    found = distance(model, written, live)
    show.paragraph(
        f"Its most likely token is the live model's in {100 * found.top1_agreement:.2f} % of "
        f"{live.positions:,} positions (KL {found.kl:.2g}, largest gap {found.largest_gap:.3g})."
    )
    if found.top1_agreement < _FAR and file_type not in ("f32", "f16", "bf16", "q8_0"):
        show.paragraph(
            "That is a large difference: weights that were decoded from 4 bits have been rounded "
            "to few bits again. --type q8_0 or f16 stays close."
        )
    return dataclasses.asdict(found) | {"positions": live.positions}
