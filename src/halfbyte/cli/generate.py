"""``halfbyte generate``: answer one prompt."""

import sys
from typing import Any, ClassVar

from pydantic import Field, PositiveInt

from halfbyte.cli.opening import ReadModelOptions, open_model, open_side_by_side
from halfbyte.cli.startup import import_transformers
from halfbyte.config.command_line import Command, results
from halfbyte.errors import ConfigError
from halfbyte.foreign_text import printable

_LONGEST_PROMPT = 10**7  # characters; no context is as long


class SamplingOptions(ReadModelOptions):
    """How answers are generated."""

    system: str | None = Field(None, description="system message of the conversation")
    max_new_tokens: PositiveInt = Field(256, description="longest answer, in tokens")
    temperature: float = Field(0.0, ge=0, description="sampling temperature; 0: greedy decoding")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the sampling")

    sections: ClassVar[dict[str, str]] = {"model": "the model", "system": "the answer"}


class GenerateOptions(SamplingOptions):
    """One prompt."""

    prompt: str | None = Field(None, description="the prompt (default: standard input)")


COMMAND = Command(
    "generate",
    GenerateOptions,
    about="Answer one prompt, streamed to standard output.",
    example='halfbyte generate --model model.gguf --adapter out --prompt "Hello"',
)


def main(argv: list[str]) -> None:
    """Run the command."""
    options, notes, as_json = COMMAND.read(argv)
    prompt = options.prompt
    if prompt is None:
        if sys.stdin.isatty():
            raise ConfigError("`prompt` is missing: give --prompt TEXT, or pipe the text in")
        prompt = sys.stdin.read(_LONGEST_PROMPT + 1).strip()
        if len(prompt) > _LONGEST_PROMPT:
            raise ConfigError(
                f"the prompt on standard input is longer than {_LONGEST_PROMPT:,} characters: "
                "expected one prompt; `halfbyte eval` answers a file of them"
            )
    if not prompt:
        raise ConfigError("`prompt`: expected some text, got none")

    import_transformers(gpu=options.device != "cpu")
    from halfbyte.models.generate import generate
    from halfbyte.report import open_report, show

    messages = [{"role": "user", "content": prompt}]
    if options.system is not None:
        messages.insert(0, {"role": "system", "content": options.system})
    with results(as_json=as_json) as result:
        with open_report() as report:
            for note in notes:
                report.note(note)
            several = len(options.adapter) > 1
            if several:
                sides = open_side_by_side(options, report)
            else:
                model, tokenizer = open_model(options, report)

        def answered(model: Any, tokenizer: Any) -> str:
            [answer] = generate(
                model,
                tokenizer,
                [messages],
                max_new_tokens=options.max_new_tokens,
                temperature=options.temperature,
                seed=options.seed,
                on_text=write,
            )
            print()
            return answer

        result["prompt"] = prompt
        if not several:
            result["answer"] = answered(model, tokenizer)
            return
        result["answers"] = {}
        for name in sides.names:
            show.heading(name)
            with sides.using(name) as opened:
                result["answers"][name] = answered(*opened)


def write(text: str) -> None:
    """Print a piece of an answer as it is generated.

    A model may generate any character. On a terminal, controls are shown as escapes. A file or a
    pipe gets the answer as it is.
    """
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()
