"""``halfbyte completion SHELL``: a script that completes commands and options in a shell.

The script is written from the options of the commands, and starts no Python when a key is pressed.
"""

import importlib
import shlex
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from halfbyte.cli import COMMANDS, module_of
from halfbyte.config.command_line import Command, choices_of, is_flag, results
from halfbyte.config.options import Options


class CompletionOptions(Options):
    """The shell."""

    shell: Literal["bash", "zsh", "fish"] = Field(description="bash, zsh or fish")

    sections: ClassVar[dict[str, str]] = {"shell": "the shell"}


COMMAND = Command(
    "completion",
    CompletionOptions,
    about="Print a script that completes commands, options and their values. For bash, add "
    '`eval "$(halfbyte completion bash)"` to ~/.bashrc; for zsh, write it to a file _halfbyte in a '
    "directory of $fpath; for fish, to ~/.config/fish/completions/halfbyte.fish.",
    example='eval "$(halfbyte completion bash)"',
    positional=("shell",),
    has_json=False,
)


class _Word(NamedTuple):
    """An option on the command line: ``--name``, its values if there are few, and its help."""

    name: str
    values: tuple[str, ...]
    takes_value: bool
    help: str


def main(argv: list[str]) -> None:
    """Run the command."""
    options, _, _ = COMMAND.read(argv)
    known = {name: _words_of(name) for name in COMMANDS}
    script = {"bash": _bash, "zsh": _zsh, "fish": _fish}[options.shell]
    with results(as_json=False):
        print(script(COMMANDS, known))


def _words_of(command: str) -> list[_Word]:
    found: Command[Any] = importlib.import_module(module_of(command)).COMMAND
    words = []
    for name, field in found.options.model_fields.items():
        negated = is_flag(field) and field.default is True
        dashed = f"--{'no-' * negated}{name.replace('_', '-')}"
        text = (field.description or "").partition(";")[0]
        words.append(_Word(dashed, choices_of(field), not is_flag(field), text))
    if found.has_json:
        words.append(_Word("--json", (), False, "print only the result, as one JSON object"))
    return [*words, _Word("--help", (), False, "print the options")]


def _bash(commands: dict[str, str], known: dict[str, list[_Word]]) -> str:
    lines = [
        "_halfbyte() {",
        '    local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" words=""',
        "    if ((COMP_CWORD == 1)); then",
        f'        words="{" ".join(commands)} --help --version"',
        '    elif [[ "$word" == -* ]]; then case "${COMP_WORDS[1]}" in',
    ]
    for name, words in known.items():
        options = " ".join(word.name for word in words)
        lines.append(f'        {name}) words="{options}" ;;')
    lines += ["        esac", '    else case "${COMP_WORDS[1]} $before" in']
    for name, words in known.items():
        for word in words:
            if word.values:
                values = " ".join(word.values)
                lines.append(f'        "{name} {word.name}") words="{values}" ;;')
    lines += [
        "        esac",
        "    fi",
        '    COMPREPLY=($(compgen -W "$words" -- "$word"))',
        "}",
        "complete -o bashdefault -o default -F _halfbyte halfbyte",
    ]
    return "\n".join(lines)


def _zsh(commands: dict[str, str], known: dict[str, list[_Word]]) -> str:
    def plain(text: str) -> str:
        for mark in ("\\", "[", "]", ":"):
            text = text.replace(mark, f"\\{mark}")
        return text

    def spec(word: _Word) -> str:
        values = f"({' '.join(word.values)})" if word.values else "_files"
        value = f":value:{values}" if word.takes_value else ""
        return shlex.quote(f"{word.name}[{plain(word.help)}]{value}")

    lines = ["#compdef halfbyte", "_halfbyte() {", "    local -a commands=("]
    lines += [f"        {shlex.quote(f'{name}:{text}')}" for name, text in commands.items()]
    lines += [
        "    )",
        "    if ((CURRENT == 2)); then _describe command commands; return; fi",
        "    shift words; ((CURRENT--))",
        "    case $words[1] in",
    ]
    for name, words in known.items():
        lines.append(f"        {name}) _arguments {' '.join(map(spec, words))} '*:file:_files' ;;")
    return "\n".join(
        [*lines, "    esac", "}", 'compdef _halfbyte halfbyte 2>/dev/null; _halfbyte "$@"']
    )


def _fish(commands: dict[str, str], known: dict[str, list[_Word]]) -> str:
    start = "complete -c halfbyte"
    lines = [
        f"{start} -n __fish_use_subcommand -f -a {name} -d {shlex.quote(text)}"
        for name, text in commands.items()
    ]
    for name, words in known.items():
        within = f"{start} -n {shlex.quote(f'__fish_seen_subcommand_from {name}')}"
        for word in words:
            value = " -r" * word.takes_value
            if word.values:
                value = f" -x -a {shlex.quote(' '.join(word.values))}"
            long = word.name.removeprefix("--")
            lines.append(f"{within} -l {long}{value} -d {shlex.quote(word.help)}")
    return "\n".join(lines)
