"""Chat templates by name: what ``--chat-template`` can be.

That is one of the published formats below, a named template of the tokenizer (``tool_use``), or a
file with a template in Jinja. The formats are written here from their descriptions, and as short as
they can be: without tools, dates and default system prompts.

A format is only of use if the tokenizer has its control tokens. One that it lacks would be cut into
pieces, and the model would hardly learn to stop, so that is an error. Of a file, only the token
that ends a turn must be one: others that are cut are noted, since in some formats (Zephyr's) they
are text.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.config.aliases import nearest
from halfbyte.data.dataset_report import RowRejected
from halfbyte.data.rendering import Renderer, tool
from halfbyte.errors import ConfigError, DataError
from halfbyte.foreign_text import quote, shorten
from halfbyte.input_files import read_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MOST_TEMPLATE = 10**6  # bytes; the longest published ones have 20,000

_ROLES = "{%- if message.role not in ['system', 'user', 'assistant'] -%}"
_ROLES += "{{- raise_exception('no ' ~ message.role ~ ' role') -}}{%- endif -%}"
_SYSTEM_FIRST = (
    "{%- set start = namespace(system='', rest=messages) -%}"
    "{%- if messages[0].role == 'system' -%}"
    "{%- set start.system = messages[0].content -%}{%- set start.rest = messages[1:] -%}"
    "{%- endif -%}"
)
"""Takes the system prompt out of the messages."""
_USER_OR_ASSISTANT = (
    "{%- if message.role not in ['user', 'assistant'] -%}"
    "{{- raise_exception('no ' ~ message.role ~ ' role here') -}}{%- endif -%}"
)

FORMATS = {
    # OpenAI's ChatML; Qwen, SmolLM, Yi and others
    "chatml": (
        "{%- for message in messages -%}"
        "{{- '<|im_start|>' ~ message.role ~ '\n' ~ message.content ~ '<|im_end|>\n' -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
    ),
    # Meta's llama-models, prompt format of Llama 3
    "llama3": (
        "{{- bos_token -}}"
        "{%- for message in messages -%}"
        "{{- '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\n\n' -}}"
        "{{- message.content | trim ~ '<|eot_id|>' -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}"
        "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}"
    ),
    # Meta's llama, generation.py: chat_completion
    "llama2": (
        _SYSTEM_FIRST
        + "{%- for message in start.rest -%}"
        + _USER_OR_ASSISTANT
        + "{%- if message.role == 'user' -%}"
        "{{- bos_token ~ '[INST] ' -}}"
        "{%- if loop.first and start.system -%}"
        "{{- '<<SYS>>\n' ~ start.system ~ '\n<</SYS>>\n\n' -}}{%- endif -%}"
        "{{- message.content | trim ~ ' [/INST]' -}}"
        "{%- else -%}{{- ' ' ~ message.content | trim ~ ' ' ~ eos_token -}}{%- endif -%}"
        "{%- endfor -%}"
    ),
    # mistral-common, tokenizer v3; the system prompt in the first question, as in v1
    "mistral": (
        _SYSTEM_FIRST + "{{- bos_token -}}"
        "{%- for message in start.rest -%}"
        + _USER_OR_ASSISTANT
        + "{%- if message.role == 'user' -%}"
        "{{- '[INST] ' ~ (start.system ~ '\n\n' if loop.first and start.system else '') -}}"
        "{{- message.content ~ '[/INST]' -}}"
        "{%- else -%}{{- ' ' ~ message.content ~ eos_token -}}{%- endif -%}"
        "{%- endfor -%}"
    ),
    # Google's gemma_pytorch, and the model cards of Gemma 2 and 3
    "gemma": (
        _SYSTEM_FIRST + "{{- bos_token -}}"
        "{%- for message in start.rest -%}"
        + _USER_OR_ASSISTANT
        + "{{- '<start_of_turn>' ~ ('model' if message.role == 'assistant' else 'user') ~ '\n' -}}"
        "{{- (start.system ~ '\n\n' if loop.first and start.system else '') -}}"
        "{{- message.content | trim ~ '<end_of_turn>\n' -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}"
    ),
    # The model card of Phi-3
    "phi3": (
        "{%- for message in messages -%}"
        + _ROLES
        + "{{- '<|' ~ message.role ~ '|>\n' ~ message.content ~ '<|end|>\n' -}}"
        "{%- endfor -%}"
        "{{- '<|assistant|>\n' if add_generation_prompt else eos_token -}}"
    ),
    # The model card of Phi-4-mini
    "phi4": (
        "{%- for message in messages -%}"
        + _ROLES
        + "{{- '<|' ~ message.role ~ '|>' ~ message.content ~ '<|end|>' -}}"
        "{%- endfor -%}"
        "{{- '<|assistant|>' if add_generation_prompt else eos_token -}}"
    ),
    # Hugging Face's alignment-handbook
    "zephyr": (
        "{%- for message in messages -%}"
        + _ROLES
        + "{{- '<|' ~ message.role ~ '|>\n' ~ message.content ~ eos_token ~ '\n' -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}{%- endif -%}"
    ),
    # Stanford Alpaca's prompt without input, with a line break before the response
    "alpaca": (
        _SYSTEM_FIRST + "BOS"
        "{{- start.system or 'Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.' -}}{{- '\n\n' -}}"
        "{%- for message in start.rest -%}"
        + _USER_OR_ASSISTANT
        + "{%- if message.role == 'user' -%}"
        "{{- '### Instruction:\n' ~ message.content ~ '\n\n### Response:\n' -}}"
        "{%- else -%}{{- message.content ~ eos_token ~ '\n\n' -}}{%- endif -%}"
        "{%- endfor -%}"
    ),
    # FastChat's vicuna_v1.1
    "vicuna": (
        _SYSTEM_FIRST + "BOS"
        "{{- start.system or 'A chat between a curious user and an artificial intelligence "
        "assistant. The assistant gives helpful, detailed, and polite answers to the user\\'s "
        "questions.' -}}{{- ' ' -}}"
        "{%- for message in start.rest -%}"
        + _USER_OR_ASSISTANT
        + "{%- if message.role == 'user' -%}{{- 'USER: ' ~ message.content ~ ' ASSISTANT:' -}}"
        "{%- else -%}{{- ' ' ~ message.content ~ eos_token -}}{%- endif -%}"
        "{%- endfor -%}"
    ),
}
"""Templates by name. ``BOS`` stands for the token that the tokenizer begins a text with, if any."""

_WRITTEN_OUT = "zephyr"
"""The format whose roles are written as text."""

_OTHER_NAMES = {"llama-3": "llama3", "gemma2": "gemma", "gemma3": "gemma", "phi": "phi3"}
_OTHER_NAMES |= {"phi_3": "phi3", "phi_4": "phi4"}

# What looks like a control token: <|im_end|>, <|eot_id|>, <end_of_turn>, DeepSeek's <｜User｜>.
_CONTROL = re.compile(r"<[|｜][^\s<>|｜]{1,40}[|｜]>|<(?:start|end)_of_\w{1,20}>")

_FIRST, _SECOND = "zqfirst", "zqsecond"
_PROBE = [
    {"role": "user", "content": _FIRST},
    {"role": "assistant", "content": _SECOND},
    {"role": "user", "content": _FIRST},
]


def choose_template(wanted: str, tokenizer: "PreTrainedTokenizerBase") -> tuple[str, list[str]]:
    """Return the text of a chat template for a tokenizer, and notes about it.

    Args:
        wanted: A name or a file; see above.
        tokenizer: The tokenizer; it does not change.

    Raises:
        ConfigError: There is no such template, it is not valid, or it needs a token that the
            tokenizer does not have.
    """
    text = _text_of(wanted, tokenizer)
    own = tokenizer.chat_template
    tokenizer.chat_template = text
    try:
        notes = _check(wanted, text, tokenizer)
    except (DataError, RowRejected) as error:
        raise ConfigError(f"`chat_template` {shorten(wanted)}: {error}") from error
    finally:
        tokenizer.chat_template = own
    instead = ", instead of the tokenizer's own" if own not in (None, text) else ""
    return text, [f"chat template: {shorten(wanted)}{instead}", *notes]


def _text_of(wanted: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    own = tokenizer.chat_template
    named: dict[str, str] = own if isinstance(own, dict) else {}
    if wanted in named:
        return named[wanted]
    if (name := _OTHER_NAMES.get(wanted, wanted)) in FORMATS:
        return FORMATS[name].replace("BOS", "{{- bos_token -}}" if _adds_bos(tokenizer) else "")
    if not (Path(wanted).suffix.startswith((".j", ".txt")) or "/" in wanted):
        known = [*named, *FORMATS]
        raise ConfigError(
            f"`chat_template`: expected {', '.join(known)} or a .jinja file, got {quote(wanted)}"
            f"{nearest(wanted, known)}"
        )
    try:
        return read_file(wanted, _MOST_TEMPLATE).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise ConfigError(f"`chat_template`: cannot read {wanted}: {reason}") from error


def _adds_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    first: list[int] = tokenizer("a").input_ids[:1]
    return first == [tokenizer.bos_token_id]


def _check(wanted: str, text: str, tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Return notes about the template, which is the tokenizer's for now.

    Raises:
        ConfigError: It needs a token that the tokenizer does not have.
        DataError: It is not valid.
        RowRejected: It does not render a short conversation.
    """
    if "eos_token" in text and tokenizer.eos_token is None:
        raise ConfigError(
            f"`chat_template` {shorten(wanted)} ends turns with EOS, which this tokenizer does not "
            "have: choose another template, or set `eos_token` in its tokenizer_config.json"
        )
    named, renderer = _OTHER_NAMES.get(wanted, wanted) in FORMATS, Renderer(tokenizer)
    try:
        rendered = renderer.chat(_PROBE).text()
    except RowRejected:  # some are for conversations with tools only
        rendered = renderer.chat(_PROBE, [tool("zqname")]).text()
    cut = {token: n for token in _CONTROL.findall(rendered) if (n := _pieces(token, tokenizer)) > 1}
    end = _CONTROL.match(rendered.partition(_SECOND)[2].lstrip())
    # The formats' own tokens; of a file, only the one without which a reply has no end.
    needed = [token for token in cut if named or (end and token == end[0])]
    if needed and wanted != _WRITTEN_OUT:
        raise ConfigError(
            f"`chat_template` {shorten(wanted)} needs the token {quote(needed[0])}, which this "
            f"model's tokenizer cuts into {cut[needed[0]]}: the model would not learn where turns "
            "end. Choose a template that needs EOS only (alpaca, vicuna, zephyr, mistral), or add "
            "the token to the model with transformers (add_special_tokens, "
            "resize_token_embeddings), and train with --modules-to-save embed_tokens,lm_head, "
            "since the rows of new tokens are random"
        )
    return [f"{token} is cut into {n} tokens by this model's tokenizer" for token, n in cut.items()]


def _pieces(token: str, tokenizer: "PreTrainedTokenizerBase") -> int:
    return len(tokenizer(token, add_special_tokens=False).input_ids)
