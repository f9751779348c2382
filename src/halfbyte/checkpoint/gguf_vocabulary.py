"""A tokenizer as the keys of a GGUF file, with which llama.cpp tokenises like transformers.

llama.cpp does not read a tokenizer's rules: it has the rules of each family by name
(``tokenizer.ggml.pre``). So a name is written only if the tokenizer's own rules, from its
``tokenizer.json``, are those of that name; any other tokenizer is rejected.

The inverse is ``byte_level``: a tokenizer with a known name, from the keys of a file.
"""

import json
from typing import Any, NamedTuple

from gguf import GGUFValueType, GGUFWriter, Keys, TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from halfbyte.checkpoint.gguf_file import ARRAY, STRING, GGUFFile
from halfbyte.errors import CheckpointError

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_MARKS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
    r"|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"


class _Cut(NamedTuple):
    """How llama.cpp cuts text, by a name: at matches of a pattern; whether whole pieces are tokens.

    Where a piece is a token although its merges do not lead to it, the second makes a difference.
    """

    pattern: str
    whole: bool


_CUTS = {
    "qwen2": _Cut(_WORDS % "", whole=False),
    "qwen35": _Cut(_MARKS, whole=False),
    "llama-bpe": _Cut(_WORDS % "{1,3}", whole=True),
    "dbrx": _Cut(_WORDS % "{1,3}", whole=False),
    "gpt-4o": _Cut(_CASED % (_ENDINGS, _ENDINGS, "{1,3}"), whole=False),
    "tekken": _Cut(_CASED % ("", "", ""), whole=True),
}
# Names with the rules of another one, in the files of other converters.
_ALIASES = {"refact": "smollm", "smaug-bpe": "dbrx"}
_UNSPLIT = "an exported GGUF file would tokenise text differently"


def add_vocabulary(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Add a tokenizer's keys to a file being written.

    Args:
        writer: The file.
        tokenizer: A fast tokenizer: byte-level BPE of a known family, or SentencePiece's BPE.
        rows: Rows of the embedding; those beyond the tokens become unused tokens.

    Raises:
        CheckpointError: If llama.cpp has no name for the tokenizer's rules, or it has more tokens
            than there are rows.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise CheckpointError(
            f"{type(tokenizer).__name__} has no tokenizer.json; a GGUF file is made from that"
        )
    rules: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    model = rules["model"]
    if model["type"] != "BPE":
        raise CheckpointError(
            f"tokenizers of type {model['type']} cannot be exported; BPE can: {_UNSPLIT}"
        )
    ids: dict[str, int] = tokenizer.get_vocab()
    if max(ids.values()) >= rows:
        raise CheckpointError(
            f"the tokenizer has tokens up to number {max(ids.values())}, the embedding {rows} rows"
        )
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    tokens = [f"[PAD{number}]" for number in range(rows)]
    types = [TokenType.UNUSED] * rows
    for token, number in ids.items():
        tokens[number], types[number] = token, TokenType.NORMAL
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        scores = _scores(model["merges"], ids, rows)
        for number, token in enumerate(tokens):
            if len(token) == 6 and token.startswith("<0x"):
                types[number] = TokenType.BYTE
        writer.add_token_scores(scores)
        writer.add_add_space_prefix(_adds_space(rules))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer(rules))
        writer.add_token_merges(merges)
    for added in rules["added_tokens"]:
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    if model.get("unk_token") in ids:
        types[ids[model["unk_token"]]] = TokenType.UNKNOWN
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for key, number in (
        (Keys.Tokenizer.BOS_ID, tokenizer.bos_token_id),
        (Keys.Tokenizer.EOS_ID, tokenizer.eos_token_id),
        (Keys.Tokenizer.UNK_ID, tokenizer.unk_token_id),
        (Keys.Tokenizer.PAD_ID, tokenizer.pad_token_id),
    ):
        if number is not None:
            writer.add_uint32(key, number)
    sample = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(len(sample) > 1 and sample[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(len(sample) > 1 and sample[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def copy_vocabulary(writer: GGUFWriter, file: GGUFFile, chat_template: str | None = None) -> None:
    """Copy the tokenizer's keys of a file unchanged, except for a ``chat_template`` that is given.

    The tokenizer that transformers builds from them has lost the rules for splitting text.

    Raises:
        CheckpointError: If there are none.
    """
    found = False
    for name, key in file.keys.items():
        if name.startswith("tokenizer.chat_template") and chat_template is not None:
            continue
        if name.startswith("tokenizer."):
            if key.kind == ARRAY:
                kind, values = file.array(name)
                writer.add_key_value(name, values, GGUFValueType.ARRAY, GGUFValueType(kind))
            else:
                writer.add_key_value(name, key.value, GGUFValueType(key.kind))
            found = True
    if not found:
        raise CheckpointError(f"{file.path} contains no tokenizer")
    if chat_template is not None:
        writer.add_chat_template(chat_template)


def pre_tokenizer(rules: dict[str, Any]) -> str:
    """Return llama.cpp's name for the pre-tokenizer of a byte-level BPE tokenizer.

    Args:
        rules: The content of ``tokenizer.json``.

    Raises:
        CheckpointError: If it has none.
    """
    # llama.cpp omits NFC, which Qwen's tokenizers apply, for every family.
    normalizer = (rules.get("normalizer") or {}).get("type", "NFC")
    pre = rules.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    *cuts, last = steps
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        # GPT-2's splitting is part of its ByteLevel.
        own = bool(last.get("use_regex", True))
        whole = bool(rules["model"].get("ignore_merges"))
        names: list[tuple[str, bool]] = []
        if not cuts and own:
            names = [("gpt-2", False)]
        elif len(cuts) == 1 and cuts[0].get("type") == "Digits" and own:
            names = [("smollm", False)] if cuts[0].get("individual_digits") else []
        elif len(cuts) == 1 and cuts[0].get("type") == "Split" and not own:
            cut = cuts[0]
            if cut.get("behavior") == "Isolated" and not cut.get("invert"):
                regex = cut["pattern"].get("Regex", "")
                names = [(name, cut.whole) for name, cut in _CUTS.items() if cut.pattern == regex]
        names.sort(key=lambda name: name[1] != whole)
        for name, as_whole in names if normalizer == "NFC" else []:
            if as_whole == whole or _merges_find_all(rules):
                return name
    raise CheckpointError(
        "the tokenizer's rules are not among those known to halfbyte and llama.cpp "
        f"(gpt-2, smollm, {', '.join(_CUTS)}, SentencePiece's BPE): {_UNSPLIT}"
    )


def _merges_find_all(rules: dict[str, Any]) -> bool:
    """Return whether merging leads to every token, so that looking up whole pieces is the same."""
    model, added = rules["model"], {token["content"] for token in rules["added_tokens"]}
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    merging = BPE(model["vocab"], [(first, second) for first, second in pairs])
    return all(len(merging.tokenize(token)) == 1 for token in model["vocab"].keys() - added)


def byte_level(file: GGUFFile) -> Tokenizer | None:
    """Return the byte-level BPE tokenizer of a file, if the name of its rules is known.

    Tokens marked as control or user-defined are matched as a whole, unless they are not spelled in
    the byte alphabet, which is a mistake of the converter, as in transformers.

    Raises:
        CheckpointError: If an array of the file has the wrong type.
    """
    named = {name: key.value for name, key in file.keys.items() if key.kind == STRING}
    name, arrays = named.get(Keys.Tokenizer.PRE), (Keys.Tokenizer.LIST, Keys.Tokenizer.MERGES)
    if named.get(Keys.Tokenizer.MODEL) != "gpt2" or not {*arrays} <= file.keys.keys():
        return None
    name = _ALIASES.get(str(name), name)
    if name not in ("gpt-2", "smollm", *_CUTS):
        return None
    tokens, merges = (_texts(file, key) for key in arrays)
    alphabet = _alphabet()
    letters = set(alphabet)
    spelled = [
        token if letters.issuperset(token) else "".join(alphabet[byte] for byte in token.encode())
        for token in tokens
    ]
    tokenizer = Tokenizer(
        BPE(
            {token: number for number, token in enumerate(spelled)},
            [(first, second) for first, _, second in (merge.partition(" ") for merge in merges)],
            continuing_subword_prefix="",
            end_of_word_suffix="",
            fuse_unk=False,
            ignore_merges=name in _CUTS and _CUTS[name].whole,
        )
    )
    cuts: list[PreTokenizer] = [Digits(individual_digits=True)] if name == "smollm" else []
    own = name not in _CUTS
    cuts += [] if own else [Split(Regex(_CUTS[name].pattern), "isolated")]
    tokenizer.pre_tokenizer = Sequence([*cuts, ByteLevel(add_prefix_space=False, use_regex=own)])
    tokenizer.decoder = decoders.ByteLevel()
    has_types = Keys.Tokenizer.TOKEN_TYPE in file.keys
    types = file.array(Keys.Tokenizer.TOKEN_TYPE)[1] if has_types else []
    control, defined = (
        [
            AddedToken(token, normalized=False, special=kind == TokenType.CONTROL)
            for token, as_spelled, of in zip(tokens, spelled, types, strict=False)
            if of == kind and token == as_spelled
        ]
        for kind in (TokenType.CONTROL, TokenType.USER_DEFINED)
    )
    tokenizer.add_special_tokens(control)
    tokenizer.add_tokens(defined)
    return tokenizer


def _texts(file: GGUFFile, name: str) -> list[str]:
    kind, values = file.array(name)
    if kind != STRING:
        raise CheckpointError(f"{file.path}: the values of {name} are of type {kind}, not {STRING}")
    return values


def _alphabet() -> list[str]:
    """Return the character that byte-level BPE uses for each byte: itself if printable."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = dict(zip(printable, printable, strict=True))
    letters |= {byte: 256 + place for place, byte in enumerate(others)}
    return [chr(letters[byte]) for byte in range(256)]


def _scores(merges: list[Any], ids: dict[str, int], rows: int) -> list[float]:
    """Return SentencePiece's scores: the pair whose result has the higher score is merged first.

    Raises:
        CheckpointError: If no scores give the order of the merges.
    """
    scores = [0.0] * rows
    last, rank = "", 0
    seen = set()
    for merge in merges:
        result = "".join(merge.split(" ") if isinstance(merge, str) else merge)
        if result != last:
            if result in seen:
                raise CheckpointError(f"the order of its merges follows no scores: {_UNSPLIT}")
            seen.add(result)
            last, rank = result, rank + 1
        scores[ids[result]] = -float(rank)
    return scores


def _adds_space(rules: dict[str, Any]) -> bool:
    """Return whether a space is prepended to text, the only rule of SentencePiece that may differ.

    Raises:
        CheckpointError: If other rules differ.
    """
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    normalizer, pre = rules.get("normalizer") or {}, rules.get("pre_tokenizer")
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    if pre is None and steps in ([{"type": "Prepend", "prepend": "▁"}, replace], [replace]):
        return len(steps) == 2
    # Gemma's: it would cut at spaces, of which the normalizer has left none.
    at_spaces = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"}
    if steps == [replace] and pre and at_spaces.items() <= pre.items():
        return False
    metaspace = {"type": "Metaspace", "replacement": "▁", "split": False}
    if not steps and pre and metaspace.items() <= pre.items():
        return bool(pre.get("prepend_scheme") != "never")
    raise CheckpointError(f"the tokenizer's spaces are not treated as SentencePiece's: {_UNSPLIT}")
