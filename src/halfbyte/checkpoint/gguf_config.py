"""The configuration of a GGUF file of an architecture in ``gguf_architectures``, from its keys.

transformers reads some of these architectures too, but leaves out what its defaults happen to be
for the usual sizes: heads of another width, scaled rotary frequencies, multipliers, soft caps.
"""

from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from halfbyte.checkpoint.gguf_architectures import ARCHITECTURES, COMMON, Architecture, layer_types
from halfbyte.checkpoint.gguf_file import ARRAY, F32, U32, GGUFFile
from halfbyte.checkpoint.gguf_rope import read_rope
from halfbyte.checkpoint.source import foreign_reader
from halfbyte.errors import CheckpointError
from halfbyte.foreign_text import quote

_SIZES = {"hidden_size", "num_hidden_layers", "num_attention_heads"}
_PATTERN = "attention.sliding_window_pattern"


def row_of(file: GGUFFile) -> Architecture | None:
    """Return the row of a file's architecture, or None if the table has none."""
    rows = [row for row in ARCHITECTURES if row.name == file.architecture]
    marked = (row for row in rows if row.marker and file.architecture_key(row.marker, U32))
    return next(marked, next(iter(rows), None))


def read_known_config(file: GGUFFile, row: Architecture, vocabulary: int) -> PretrainedConfig:
    """Return a file's configuration.

    Args:
        file: The file.
        row: Its row.
        vocabulary: Rows of its embedding.

    Raises:
        CheckpointError: If a key is missing, has the wrong type or a value that cannot be.
    """
    kind = CONFIG_MAPPING[row.model_type]
    trouble = (
        f"{file.path}: a configuration of architecture {quote(file.architecture)} cannot be made "
        "from its keys"
    )
    with foreign_reader(trouble):
        options = _options(file, row, kind)
        return kind(**options, vocab_size=vocabulary, name_or_path=str(file.path))


def _options(file: GGUFFile, row: Architecture, kind: type[PretrainedConfig]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for key, option, of in (*COMMON, *row.keys):
        value = file.architecture_key(key, of)
        if value is not None:
            options[option] = value
        elif option in _SIZES:
            raise CheckpointError(f"{file.path} lacks the key {file.architecture}.{key}")
    _require_sizes(file, options)
    heads = options["num_attention_heads"]
    options.setdefault("num_key_value_heads", heads)
    wide = options["hidden_size"] // max(1, heads)
    head_dim = file.architecture_key("attention.key_length", U32) or wide
    context = file.architecture_key("context_length", U32)
    if context is not None:
        options["max_position_embeddings"] = context
    for name in ("bos", "eos", "padding"):
        token = file.keys.get(f"tokenizer.ggml.{name}_token_id")
        if token is not None and token.kind == U32:
            options[f"{name.removesuffix('ding')}_token_id"] = token.value
    options["tie_word_embeddings"] = "output.weight" not in file.tensors
    for option, tensor in row.found.items():
        options[option] = any(name.endswith(f".{tensor}") for name in file.tensors)
    implied = row.implied({**options, "head_dim": head_dim})
    options |= {option: value for option, value in implied.items() if option != "head_dim"}
    if head_dim != wide or hasattr(kind, "head_dim"):
        options["head_dim"] = head_dim
    rope = read_rope(file, head_dim, context or 0)
    if row.sliding:
        every = _every(file, row.sliding, options["num_hidden_layers"])
        options["layer_types"] = every
        local = file.architecture_key("rope.freq_base_swa", F32) or 10000.0
        if getattr(kind, "default_theta", None) and isinstance(kind.default_theta, dict):
            rope = {
                "full_attention": rope,
                "sliding_attention": {"rope_type": "default", "rope_theta": local},
            }
    if row.hybrid is not None:
        interval = file.architecture_key("full_attention_interval", U32) or 4
        layers = options["num_hidden_layers"]
        options["layer_types"] = layer_types(layers, interval, "linear_attention")
        name = f"{file.architecture}.rope.dimension_sections"
        if name in file.keys:
            rope |= {"mrope_section": file.array(name)[1][:3], "mrope_interleaved": True}
    usual = kind().rope_parameters or {}
    if usual.get("partial_rotary_factor", 1.0) != 1.0:
        rope.setdefault("partial_rotary_factor", 1.0)
    window = file.architecture_key("attention.sliding_window", U32)
    if window and hasattr(kind, "sliding_window"):
        options["sliding_window"] = window
    if row.model_type == "gpt_oss" and rope["rope_type"] == "yarn":
        rope["truncate"] = False  # as every model of the family; no key says it
    options["rope_parameters"] = rope
    return options


def _require_sizes(file: GGUFFile, options: dict[str, Any]) -> None:
    """Check numbers from which lists are made, before any is made.

    Raises:
        CheckpointError: If one is larger than the file could have.
    """
    layers, tensors = options["num_hidden_layers"], len(file.tensors)
    if layers > tensors:
        raise CheckpointError(f"{file.path} should have {layers} layers, and has {tensors} tensors")
    for heads in ("linear_num_key_heads", "linear_num_value_heads"):
        wide = options.get(heads, 0) * max(1, options.get("linear_key_head_dim", 0))
        if wide > file.size:
            raise CheckpointError(f"{file.path} has {file.size} bytes, too few for its {heads}")


def _every(file: GGUFFile, every: int, layers: int) -> list[str]:
    """Return the kinds of the layers, from a key that is a number or a list."""
    name = f"{file.architecture}.{_PATTERN}"
    if name in file.keys and file.keys[name].kind == ARRAY:
        _, windows = file.array(name)
        kinds = {True: "sliding_attention", False: "full_attention"}
        return [kinds[bool(window)] for window in windows[:layers]]
    return layer_types(layers, file.architecture_key(_PATTERN, U32) or every)
