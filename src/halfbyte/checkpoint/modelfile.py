"""Ollama's Modelfile: the model file, the chat template, the stop tokens.

Ollama's templates are in Go, a model's in Jinja, and there is no translation. Two families are
available as Go templates, and used only if the model's own template renders the same text for the
same conversations; otherwise TEMPLATE is left out, and the Modelfile says so.
"""

import re
from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from halfbyte.data.dataset_report import RowRejected
from halfbyte.data.rendering import Renderer
from halfbyte.errors import DataError

_FAMILIES = {
    "ChatML": ("<|im_start|>{role}\n{content}<|im_end|>\n", "<|im_start|>assistant\n"),
    "Llama 3": (
        "<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
}
_ASKED = [{"role": "user", "content": "one"}]
_TALK = [*_ASKED, {"role": "assistant", "content": "two"}, {"role": "user", "content": "three"}]
_SYSTEM = [{"role": "system", "content": "zero"}]


def go_template(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str | None] | None:
    """Return the chat template in Go, and its default system message.

    None if the model has no template, or one of another family.
    """
    try:
        rendered = [_render(tokenizer, talk) for talk in (_SYSTEM + _TALK, _ASKED, _TALK)]
    except (RowRejected, DataError):
        return None
    for turn, opening in _FAMILIES.values():

        def expected(talk: list[dict[str, str]], turn: str = turn, opening: str = opening) -> str:
            return "".join(turn.format(**message) for message in talk) + opening

        before, after = re.escape(turn.format(role="system", content="\0")).split("\0")
        found = re.match(f"{before}(.*?){after}", rendered[1], re.DOTALL)
        default = [{"role": "system", "content": found[1]}] if found else []
        talks = (_SYSTEM + _TALK, default + _ASKED, default + _TALK)
        if rendered == [expected(talk) for talk in talks]:
            body = turn.format(role="{{ .Role }}", content="{{ .Content }}")
            template = "{{ range .Messages }}" + body + "{{ end }}" + opening
            return template, found[1] if found else None
    return None


def _render(tokenizer: PreTrainedTokenizerBase, talk: list[dict[str, str]]) -> str:
    text = Renderer(tokenizer).chat(talk).text(len(talk), prompt=True)
    # Ollama puts BOS before a text itself.
    return text.removeprefix(str(tokenizer.bos_token)) if _adds_bos(tokenizer) else text


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    ids = tokenizer("a")["input_ids"]
    return len(ids) > 1 and ids[0] == tokenizer.bos_token_id


def modelfile(
    base: str,
    tokenizer: PreTrainedTokenizerBase,
    stops: Iterable[int] = (),
    *,
    adapter: str | None = None,
) -> str:
    """Return the text of a Modelfile.

    Args:
        base: What stands after FROM.
        tokenizer: The model's.
        stops: Tokens that end an answer, in addition to the tokenizer's EOS.
        adapter: What stands after ADAPTER.
    """
    lines = [f"FROM {base}"]
    if adapter is not None:
        lines.append(f"ADAPTER {adapter}")
    found = go_template(tokenizer)
    if found is None or '"""' in (found[1] or ""):
        lines.append(
            "# No TEMPLATE: the model's chat template is none of those that halfbyte knows in Go\n"
            f"# ({', '.join(_FAMILIES)}). Ollama takes the one in the GGUF file if it knows it."
        )
    else:
        template, system = found
        lines.append(f'TEMPLATE """{template}"""')
        if system is not None:
            lines.append(f'SYSTEM """{system}"""')
    ends = dict.fromkeys([tokenizer.eos_token_id, *stops])
    lines += [
        f'PARAMETER stop "{tokenizer.convert_ids_to_tokens(end)}"'
        for end in ends
        if end is not None
    ]
    return "\n".join(lines) + "\n"
