"""``halfbyte check DATA … --model M``: checks data before anything is trained on it."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

from pydantic import BeforeValidator, Field, NonNegativeInt

from halfbyte.cli.startup import import_transformers
from halfbyte.config.aliases import translate
from halfbyte.config.command_line import Command, Request, results
from halfbyte.config.options import parse_names
from halfbyte.config.reading import check, read_yaml
from halfbyte.config.schema import TrainConfig
from halfbyte.errors import ConfigError, HalfbyteError
from halfbyte.foreign_text import shorten

if TYPE_CHECKING:
    from halfbyte.data import Dataset
    from halfbyte.data.checks import DataCheck
    from halfbyte.data.token_view import ShownExample
    from halfbyte.report import RunReport

_SHOWN, _SHOWN_ON_PAGE = 1, 10
_RANGE = "codes such as HB503, which docs/check.md lists"
_WHOLE = 10**9  # tokens: nothing is truncated, so that it is known what would be


class CheckOptions(TrainConfig):
    """Every option of a run, so that its configuration can be checked; and what to show."""

    output: Path = Field(Path("out"), description="directory of the run; nothing is written there")
    show: NonNegativeInt | None = Field(
        None,
        description=f"examples to show token by token (default: {_SHOWN}; {_SHOWN_ON_PAGE} on a "
        "page)",
    )
    html: Path | None = Field(None, description="also write an HTML page to this file")
    ignore: Annotated[tuple[str, ...], BeforeValidator(parse_names)] = Field(
        (), description="codes that are not reported, such as HB503,HB710"
    )
    strict: bool = Field(False, description="end with exit code 1 for warnings, too")

    sections: ClassVar[dict[str, str]] = {
        "model": "the model, of which only tokenizer and configuration are read",
        "data": "the data",
        "batch_size": "steps",
        "show": "the result",
    }

    @property
    def fatal(self) -> tuple[str, ...]:
        """The severities that end the command with exit code 1."""
        return ("error", "warning") if self.strict else ("error",)


def _in_help() -> tuple[str, ...]:
    """The options that decide how data is read and batched, and ours; all others are accepted."""
    names = [*TrainConfig.model_fields]
    data = names[names.index("data") : names.index("lora_r")]
    ours = [name for name in CheckOptions.model_fields if name not in names]
    return ("model", "revision", *data, "batch_size", "gradient_accumulation_steps", *ours)


COMMAND = Command(
    "check",
    CheckOptions,
    about="Check data before training on it: what is supervised, cut off, duplicate, out of order "
    "or damaged, how long the examples are, and some of them token by token. No weight is read. "
    "DATA may be the YAML file of a run; options that do not concern the data are accepted, and "
    "change nothing. Exit code 1 if there are errors.",
    example="halfbyte check train.jsonl --model model.gguf --eval-data test.jsonl",
    positional=("data",),
    many="data",
    in_help=_in_help(),
)


def _read(argv: list[str]) -> Request[CheckOptions]:
    """The options of the command line, over those of a run's YAML file if it names one.

    Raises:
        ConfigError: All errors, in one message.
    """
    words = COMMAND.words(argv)
    given, problems = dict(words.given), list(words.problems)
    data = given.pop("data", [])
    data = data if isinstance(data, list) else [data]
    files = [one for one in data if Path(one).suffix.lower() in (".yaml", ".yml")]
    if len(files) > 1:
        problems.append(f"expected one configuration file, got {', '.join(map(shorten, files))}")
    if rest := [one for one in data if one not in files]:
        given["data"] = rest[0] if len(rest) == 1 else rest
    in_file = translate(read_yaml(files[0]) if files else {}, CheckOptions)
    on_top = translate(given, CheckOptions)
    options = check(
        CheckOptions,
        {**in_file.values, **on_top.values},
        problems=[*problems, *in_file.problems, *on_top.problems],
    )
    return Request(options, in_file.notes + on_top.notes, words.json)


def main(argv: list[str]) -> None:
    """Run the command.

    Raises:
        ConfigError: A code to ignore does not exist.
        HalfbyteError: Errors were found in the data.
    """
    options, notes, as_json = _read(argv)

    import_transformers()
    from halfbyte.data.check_codes import CODES
    from halfbyte.data.sources import require_source
    from halfbyte.report import open_report, show
    from halfbyte.report.check_page import write_check_page
    from halfbyte.report.check_text import (
        print_check,
        print_example,
        print_lengths,
        print_verdict,
    )
    from halfbyte.report.page import require_page

    ignored = tuple(code.upper() for code in options.ignore)
    if unknown := [code for code in ignored if code not in CODES]:
        raise ConfigError(f"`ignore`: no such code as {shorten(unknown[0])}; expected {_RANGE}")
    for source in (options.data, options.eval_data):
        if source is not None:
            require_source(source)
    if options.html is not None:
        require_page(options.html)
    with results(as_json=as_json) as result:
        with open_report() as report:
            for note in notes:
                report.note(note)
            found = _check(options, ignored, report)
        for lines in found.summaries.values():
            show.paragraph(lines[0])
        print_check(found.check)
        if found.check.lengths is not None:
            print_lengths(found.check.lengths, batch_size=options.batch_size)
        for example in found.examples[: options.show or _SHOWN]:
            print_example(example)
        if options.html is not None:
            title = f"{found.source}, for {options.model}"
            write_check_page(options.html, title, found.check, found.examples, options.batch_size)
        print_verdict(found.check)
        if options.html is not None:
            show.paragraph(str(options.html))
        result |= found.as_json()
    worst = [one for one in found.check.findings if one.severity in options.fatal]
    if worst:
        raise HalfbyteError(
            f"{', '.join(dict.fromkeys(one.code for one in worst))} found; docs/check.md explains "
            "each code, and --ignore leaves codes out"
        )


class _Checked(NamedTuple):
    """What is shown of a check: summaries of the data sets, and examples with their lines."""

    check: "DataCheck"
    source: str
    summaries: dict[str, list[str]]
    examples: list["ShownExample"]

    def as_json(self) -> dict[str, Any]:
        lengths = self.check.lengths
        return {
            **self.check.as_json(),
            "data": self.summaries,
            "lengths": None if lengths is None else asdict(lengths),
            "examples": [
                {"line": one.line, "tokens": [asdict(piece) for piece in one.pieces]}
                for one in self.examples
            ],
        }


def _check(options: CheckOptions, ignored: tuple[str, ...], report: "RunReport") -> _Checked:
    from halfbyte.checkpoint.base_model import open_vocabulary
    from halfbyte.data import NothingUsable
    from halfbyte.data.checks import check_data, check_unusable, evenly
    from halfbyte.data.named_templates import choose_template
    from halfbyte.data.token_view import show_example
    from halfbyte.train.growing_data import read_beginning
    from halfbyte.train.run_data import check_options, read_data

    tokenizer, positions = open_vocabulary(options.model, revision=options.revision)
    if options.chat_template is not None:
        tokenizer.chat_template, notes = choose_template(options.chat_template, tokenizer)
        for note in notes:
            report.note(note)
    whole = options.model_copy(update={"max_length": _WHOLE})
    sets: list[Dataset] = []
    for source in (options.data, options.eval_data):
        if source is None:
            continue
        try:
            if options.streaming and not sets:
                sets.append(read_beginning(whole, tokenizer, report))
            else:
                sets.append(read_data(source, tokenizer, whole, report))
        except NothingUsable as error:
            return _Checked(check_unusable(error, tokenizer), error.source, {}, [])
    how = check_options(options, positions, ignore=ignored)
    with report.task("checking") as progress:
        found = check_data(
            sets[0],
            tokenizer,
            how,
            held_out=sets[1] if len(sets) > 1 else None,
            progress=progress,
        )
    data, count = sets[0], options.show
    if count is None:
        count = _SHOWN if options.html is None else _SHOWN_ON_PAGE
    examples = [
        show_example(tokenizer, data.examples[index], data.rows[index].line, options.max_length)
        for index in evenly(len(data.examples), count).tolist()
    ]
    summaries = {one.report.source: one.report.lines() for one in sets}
    return _Checked(found, data.report.source, summaries, examples)
