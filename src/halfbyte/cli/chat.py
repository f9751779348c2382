"""``halfbyte chat``: chat with a model in the terminal.

``/reset`` starts a new conversation, ``/exit`` or the end of input quits. Ctrl-C stops an answer,
which stays in the conversation as far as it was generated; at the prompt it prints these commands.
``/adapter NAME`` goes on with another of the adapters that were given, or with the base model, and
``/again`` answers the last message anew, so that answers can be compared.
"""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from halfbyte.cli.generate import SamplingOptions, write
from halfbyte.cli.opening import open_model, open_side_by_side
from halfbyte.cli.startup import import_transformers
from halfbyte.config.command_line import Command
from halfbyte.errors import Interrupted
from halfbyte.foreign_text import printable

if TYPE_CHECKING:
    from halfbyte.report import RunReport
    from halfbyte.train.side_by_side import SideBySide

COMMAND = Command(
    "chat",
    SamplingOptions,
    about="Chat with a model. /reset starts a new conversation, /again answers the last message "
    "anew, /adapter NAME goes on with another adapter, /exit or Ctrl-D quits, and Ctrl-C stops an "
    "answer.",
    example="halfbyte chat --model model.gguf --adapter out",
    has_json=False,
)
_COMMANDS = "/reset starts a new conversation, /again answers anew, /exit quits"


class _Adapters:
    """The adapter that answers, and those that it may be changed for.

    Attributes:
        current: Its name.
        names: All names; none if no adapter was given.
        opened: The model with it, and the tokenizer.
    """

    def __init__(self, options: SamplingOptions, report: "RunReport") -> None:
        self._sides: SideBySide | None = None
        self._on = contextlib.ExitStack()
        self.current, self.names = "", tuple[str, ...]()
        if options.adapter:
            self._sides = open_side_by_side(options, report)
            self.names = self._sides.names
            self.use(self.names[1])
        else:
            self.opened: tuple[Any, Any] = open_model(options, report)

    def use(self, name: str) -> None:
        """Answer with this adapter from now on."""
        assert self._sides is not None
        self._on.close()
        self.opened = self._on.enter_context(self._sides.using(name))
        self.current = name

    @property
    def help(self) -> str:
        """The commands there are."""
        if not self.names:
            return _COMMANDS
        others = ", ".join(name for name in self.names if name != self.current)
        return f"{_COMMANDS}, /adapter NAME goes on with another: {printable(others)}"


def main(argv: list[str]) -> None:
    """Run the command."""
    options, notes, _ = COMMAND.read(argv)

    import_transformers(gpu=options.device != "cpu")
    from halfbyte.report import open_report
    from halfbyte.runtime.signals import repeat_ctrl_c

    with open_report() as report:
        for note in notes:
            report.note(note)
        adapters = _Adapters(options, report)
        report.note(adapters.help)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (its import gives input() a history and line editing)

    repeat_ctrl_c()  # it ends an answer, not the conversation
    start = [] if options.system is None else [{"role": "system", "content": options.system}]
    conversation = list(start)
    for line in _typed(adapters):
        word, _, name = line.partition(" ")
        if line == "/reset":
            conversation = list(start)
            print("new conversation")
        elif word == "/adapter" and name.strip() in adapters.names:
            adapters.use(name.strip())
            print(f"{printable(adapters.current)} answers")
        elif line == "/again" and len(conversation) > len(start):
            del conversation[-1]  # the answer
            _answer(options, adapters, conversation)
        elif line.startswith("/"):
            print(adapters.help)
        elif line:
            conversation.append({"role": "user", "content": line})
            _answer(options, adapters, conversation)


def _typed(adapters: _Adapters) -> Iterator[str]:
    """Yield the lines that are typed, until the conversation is to end."""
    while True:
        try:
            line = input("\n› ").strip()
        except Interrupted:  # another signal
            raise
        except KeyboardInterrupt:
            print(f"\n{adapters.help}")
            continue
        except EOFError:
            print()
            return
        if line == "/exit":
            return
        yield line


def _answer(
    options: SamplingOptions, adapters: _Adapters, conversation: list[dict[str, str]]
) -> None:
    """Answer the last message, and add the answer to the conversation."""
    from halfbyte.models.generate import generate

    pieces: list[str] = []

    def hear(text: str) -> None:
        pieces.append(text)
        write(text)

    try:
        generate(
            *adapters.opened,
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
