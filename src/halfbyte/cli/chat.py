"""``halfbyte chat``: chat with a model in the terminal.

``/reset`` starts a new conversation, ``/exit`` or the end of input quits. Ctrl-C stops an answer,
which stays in the conversation as far as it was generated; at the prompt it prints these commands.
"""

import contextlib

from halfbyte.cli.generate import SamplingOptions, write
from halfbyte.cli.opening import open_model
from halfbyte.cli.startup import import_transformers
from halfbyte.config.command_line import Command
from halfbyte.errors import Interrupted

COMMAND = Command(
    "chat",
    SamplingOptions,
    about="Chat with a model. /reset starts a new conversation, /exit or Ctrl-D quits, and Ctrl-C "
    "stops an answer.",
    example="halfbyte chat --model model.gguf --adapter out",
    has_json=False,
)
_COMMANDS = "/reset starts a new conversation, /exit quits"


def main(argv: list[str]) -> None:
    """Run the command."""
    options, notes, _ = COMMAND.read(argv)

    import_transformers(gpu=options.device != "cpu")
    from halfbyte.models.generate import generate
    from halfbyte.report import open_report
    from halfbyte.runtime.signals import repeat_ctrl_c

    with open_report() as report:
        for note in notes:
            report.note(note)
        model, tokenizer = open_model(options, report)
        report.note(_COMMANDS)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (its import gives input() a history and line editing)

    repeat_ctrl_c()  # it ends an answer, not the conversation
    start = [] if options.system is None else [{"role": "system", "content": options.system}]
    conversation = list(start)
    while True:
        try:
            line = input("\n› ").strip()
        except Interrupted:  # another signal
            raise
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
            print("new conversation")
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
            except Interrupted:
                raise
            except KeyboardInterrupt:
                write(" …")
            print()
            conversation.append({"role": "assistant", "content": "".join(pieces).strip()})
