"""``halfbyte chat``: talk to a model in the terminal.

``/reset`` forgets the conversation, ``/exit`` or the end of input leaves. Ctrl-C stops an
answer, which stays in the conversation as far as it came; at the prompt it only says how to leave.
"""

import contextlib

from halfbyte.cli.generate import SamplingOptions, write
from halfbyte.cli.opening import open_model
from halfbyte.cli.startup import import_transformers
from halfbyte.config.command_line import Command

COMMAND = Command(
    "chat",
    SamplingOptions,
    about="Talk to a model. /reset forgets the conversation, /exit or Ctrl-D leaves, and Ctrl-C "
    "stops an answer.",
    example="halfbyte chat --model model.gguf --adapter out",
    has_json=False,
)
_COMMANDS = "/reset forgets the conversation, /exit leaves"


def main(argv: list[str]) -> None:
    """Run the command."""
    options, notes, _ = COMMAND.read(argv)

    import_transformers(gpu=options.device != "cpu")
    from halfbyte.models.generate import generate
    from halfbyte.report import open_report

    with open_report() as report:
        for note in notes:
            report.note(note)
        model, tokenizer = open_model(options, report)
        report.note(_COMMANDS)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (its import is what gives input() a history and editing)

    start = [] if options.system is None else [{"role": "system", "content": options.system}]
    conversation = list(start)
    while True:
        try:
            line = input("\n› ").strip()
        except KeyboardInterrupt:
            print(f"\n{_COMMANDS}")
            continue
        except EOFError:
            print()
            return
        if line == "/exit":
            return
        if line == "/reset":
            conversation = list(start)
            print("forgotten")
        elif line.startswith("/"):
            print(_COMMANDS)
        elif line:
            conversation.append({"role": "user", "content": line})
            pieces: list[str] = []

            def hear(text: str, pieces: list[str] = pieces) -> None:
                pieces.append(text)
                write(text)

            try:
                generate(
                    model,
                    tokenizer,
                    [conversation],
                    max_new_tokens=options.max_new_tokens,
                    temperature=options.temperature,
                    seed=options.seed,
                    on_text=hear,
                )
            except KeyboardInterrupt:
                write(" …")
            print()
            conversation.append({"role": "assistant", "content": "".join(pieces).strip()})
