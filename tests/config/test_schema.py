"""One configuration: names, layers, checks, and what a person is told."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st

from halfbyte.config.aliases import ALIASES
from halfbyte.config.options import parse_bytes
from halfbyte.config.reading import load_config, to_yaml
from halfbyte.config.schema import TrainConfig
from halfbyte.errors import ConfigError

REQUIRED = {"model": "m", "data": "d", "output": "o"}


def configured(**values: Any) -> TrainConfig:
    return load_config(None, REQUIRED | values)[0]


def complaint(*, file: Path | None = None, **values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(file, values)
    return str(caught.value)


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_contract_s_defaults() -> None:
    config = configured()
    assert config.quant == "nf4"
    assert config.double_quant
    assert config.block_size == 64
    assert (config.lora_r, config.lora_alpha, config.target_modules) == (16, 16.0, "all-linear")
    assert (config.batch_size, config.gradient_accumulation_steps) == (1, 8)
    assert (config.learning_rate, config.max_length, config.epochs) == (2e-4, 1024, 1.0)
    assert config.max_steps is None
    assert config.output == Path("o")


def test_it_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        configured().seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("given_text", "field", "value"),
    [
        ("learning_rate: 1e-4", "learning_rate", 1e-4),  # PyYAML reads the text "1e-4"
        ("learning_rate: 0.0001", "learning_rate", 1e-4),
        ("memory_budget: 16GB", "memory_budget", 16 * 10**9),
        ("memory_budget: 12.5 GiB", "memory_budget", 12.5 * 2**30),
        ("memory_budget: 1500000000", "memory_budget", 1_500_000_000),
        ("double_quant: off", "double_quant", False),
        ("target_modules: [q_proj, v_proj]", "target_modules", ("q_proj", "v_proj")),
        ("target_modules: q_proj, v_proj", "target_modules", ("q_proj", "v_proj")),
        ("target_modules: '.*\\.(q|v)_proj{1,2}'", "target_modules", r".*\.(q|v)_proj{1,2}"),
        ("lora-r: 8", "lora_r", 8),
        (
            "rank_pattern: {q_proj: 8, '.*up{1,2}': 4}",
            "rank_pattern",
            {"q_proj": 8, ".*up{1,2}": 4},
        ),
        ("rank_pattern: 'q_proj=8, v_proj=4'", "rank_pattern", {"q_proj": 8, "v_proj": 4}),
        ("alpha_pattern: a=b=0.5", "alpha_pattern", {"a=b": 0.5}),
        ("max_steps: null", "max_steps", None),
    ],
)
def test_values_are_read_from_yaml(
    tmp_path: Path, given_text: str, field: str, value: object
) -> None:
    config, notes = load_config(written(tmp_path, given_text), REQUIRED)
    assert getattr(config, field) == value
    assert notes == []


@pytest.mark.parametrize("name", ["modules_to_save", "additional_target", "lora_modules_to_save"])
@pytest.mark.parametrize("given", ["lm_head, embed_tokens", ["lm_head", "embed_tokens"]])
def test_modules_to_save_under_all_their_names(name: str, given: object) -> None:
    config, _ = load_config(None, REQUIRED | {name: given})
    assert config.modules_to_save == ("lm_head", "embed_tokens")
    config, _ = load_config(None, REQUIRED | {name: "lm_head"})
    assert config.modules_to_save == ("lm_head",)


@pytest.mark.parametrize("given", ["q_proj", "q_proj=", "q_proj=0", "=3", "q_proj=x"])
def test_what_is_no_rank_pattern(given: str) -> None:
    assert "`rank_pattern`: expected" in complaint(**REQUIRED, rank_pattern=given)


def test_overrides_lie_on_top_of_the_file(tmp_path: Path) -> None:
    file = written(tmp_path, "model: m\ndata: d\noutput: o\nlora_r: 8\nseed: 3")
    config, _ = load_config(file, {"lora_r": "32", "double_quant": False})
    assert (config.lora_r, config.seed, config.double_quant) == (32, 3, False)


def test_an_override_under_a_foreign_name_wins_too(tmp_path: Path) -> None:
    file = written(tmp_path, "batch_size: 2")
    config, notes = load_config(file, REQUIRED | {"per_device_train_batch_size": "4"})
    assert config.batch_size == 4
    assert notes == ["`per_device_train_batch_size: 4` read as `batch_size: 4`"]


@pytest.mark.parametrize(
    ("foreign", "field", "value"),
    [
        ("base_model: x", "model", "x"),
        ("model_name_or_path: x", "model", "x"),
        ("datasets: [{path: x.jsonl, type: chat_template}]", "data", ("x.jsonl",)),
        ("columns: {messages: turns}", "column", {"messages": "turns"}),
        ("output_dir: x", "output", Path("x")),
        ("adapter: qlora", "quant", "nf4"),
        ("adapter: lora", "quant", "none"),
        ("load_in_4bit: true", "quant", "nf4"),
        ("load_in_4bit: false", "quant", "none"),
        ("quantization_bit: 4", "quant", "nf4"),
        ("bnb_4bit_quant_type: fp4", "quant", "fp4"),
        ("bnb_4bit_use_double_quant: false", "double_quant", False),
        ("bf16: true", "compute_dtype", "bfloat16"),
        ("bf16: auto", "compute_dtype", "auto"),
        ("fp16: true", "compute_dtype", "float16"),
        ("fp16: false", "compute_dtype", "float32"),
        ("r: 4", "lora_r", 4),
        ("lora_target: all", "target_modules", "all-linear"),
        ("lora_target: q_proj,v_proj", "target_modules", ("q_proj", "v_proj")),
        ("sequence_len: 512", "max_length", 512),
        ("cutoff_len: 512", "max_length", 512),
        ("max_seq_length: 512", "max_length", 512),
        ("micro_batch_size: 4", "batch_size", 4),
        ("num_train_epochs: 3", "epochs", 3.0),
        ("num_epochs: 3", "epochs", 3.0),
        ("train_on_inputs: false", "train_on", "assistant"),
        ("optim: adamw_torch", "optim", "adamw"),
        ("optim: paged_adamw", "optim", "paged_adamw_32bit"),
        ("optimizer: PagedAdamW8bit", "optim", "paged_adamw_8bit"),
        ("gradient_checkpointing: true", "activations", "recompute"),
        ("resume_from_checkpoint: true", "resume", True),
    ],
)
def test_names_of_other_trainers_are_read_and_named(
    tmp_path: Path, foreign: str, field: str, value: object
) -> None:
    given_here = {name: text for name, text in REQUIRED.items() if name != field}
    config, [note] = load_config(written(tmp_path, foreign), given_here)
    assert getattr(config, field) == value
    assert f"read as `{field}:" in note


@pytest.mark.parametrize(
    ("given", "value", "notes"),
    [
        ("bf16: true\nfp16: false", "bfloat16", ["bf16: True", "fp16: False"]),
        ("fp16: false\nbf16: auto", "auto", ["fp16: False", "bf16: auto"]),
        ("bf16: false\nfp16: true", "float16", ["bf16: False", "fp16: True"]),
        ("bf16: false\nfp16: false", "float32", ["bf16: False", "fp16: False"]),
        ("compute_dtype: float16\nbf16: false", "float16", ["bf16: False"]),
        ("bf16: auto\nfp16:", "auto", ["bf16: auto"]),
        ("fp16:\nbf16:", "auto", []),
    ],
)
def test_a_name_that_says_what_the_type_is_not_gives_way(
    tmp_path: Path, given: str, value: str, notes: list[str]
) -> None:
    config, messages = load_config(written(tmp_path, given), REQUIRED)
    assert config.compute_dtype == value
    assert len(messages) == len(notes)
    for one, name in zip(messages, notes, strict=True):
        assert one.startswith(f"`{name}` ")


def test_two_types_are_a_mistake() -> None:
    assert "`compute_dtype` is given twice, as `bf16` (bfloat16) and as `fp16` (float16)" in (
        complaint(**REQUIRED, bf16=True, fp16=True)
    )


def test_every_alias_leads_to_a_field() -> None:
    assert {alias.field for alias in ALIASES.values()} <= set(TrainConfig.model_fields)


def test_two_names_that_agree_are_fine_and_two_that_do_not_are_a_mistake() -> None:
    both = {"adapter": "qlora", "load_in_4bit": True}
    assert configured(**both).quant == "nf4"
    assert complaint(**REQUIRED, adapter="lora", load_in_4bit=True) == (
        "`quant` is given twice, as `adapter` (none) and as `load_in_4bit` (nf4); remove one"
    )


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"lerning_rate": "1e-4"}, "unknown option `lerning_rate`; did you mean `learning_rate`?"),
        ({"lora_rnk": 8}, "unknown option `lora_rnk`; did you mean `lora_rank`?"),
        ({"flux_capacitor": 1}, "unknown option `flux_capacitor`"),
        ({"lora_r": 0}, "`lora_r`: expected more than 0, got 0"),
        ({"lora_r": "x"}, "`lora_r`: expected a whole number, got 'x'"),
        ({"lora_r": 1.5}, "`lora_r`: expected a whole number, got 1.5"),
        ({"learning_rate": True}, "`learning_rate`: expected a value, got True"),
        ({"learning_rate": None}, "`learning_rate`: expected a number, got None"),
        ({"learning_rate": "nan"}, "`learning_rate`: expected a finite number, got 'nan'"),
        ({"lora_dropout": 1}, "`lora_dropout`: expected less than 1, got 1"),
        ({"quant": "int8"}, "`quant`: expected 'nf4', 'fp4' or 'none', got 'int8'"),
        ({"double_quant": "perhaps"}, "`double_quant`: expected true or false, got 'perhaps'"),
        ({"block_size": 65}, "`block_size`: expected a power of 2 from 32 to 4096, got 65"),
        ({"memory_budget": "12 parsecs"}, "expected a size such as 16GB or 12.5GiB"),
        ({"memory_budget": "24"}, "24 has no unit; write 24GB or 24GiB"),
        ({"memory_budget": 12.5}, "12.5 has no unit; write 12.5GB or 12.5GiB"),
        ({"memory_budget": 0}, "`memory_budget`: expected more than 0, got 0"),
        ({"target_modules": 3}, "`target_modules`: expected text, got 3"),
        ({"quant": "none", "quant_search": True}, "`quant_search` needs `quant` nf4 or fp4"),
        ({"eval_data": "e", "eval_split": 0.1}, "`eval_split` cannot be combined with `eval_data`"),
        ({"eval_split": 1}, "`eval_split`: expected a share between 0 and 1, or a number of rows"),
        ({"eval_split": "2.5"}, "expected a share between 0 and 1, or a number of rows from 2"),
        ({"eval_split": -0.1}, "`eval_split`: expected a share between 0 and 1"),
        ({"metric_for_best": "f1"}, "`metric_for_best` needs `load_best` or `early_stopping_pati"),
        ({"early_stopping_threshold": 0.1}, "needs `early_stopping_patience`"),
    ],
)
def test_a_mistake_is_named_with_what_was_expected(option: dict[str, Any], message: str) -> None:
    said = complaint(**REQUIRED, **option)
    assert message in said
    assert "\n" not in said


def test_all_mistakes_are_said_at_once(tmp_path: Path) -> None:
    file = written(tmp_path, "lerning_rate: 1\nquant: int8\ndata: d")
    said = complaint(file=file, model="m", lora_r="no", colour="red").splitlines()
    assert said[0] == "5 errors"
    assert [line.strip().split("`")[1] for line in said[1:]] == [
        "lerning_rate",
        "colour",
        "quant",
        "lora_r",
        "output",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b", "expected lines such as `learning_rate: 2e-4`, got a list"),
        ("lora_r: 8\nlora_r: 16", "line 1: `lora_r` is given twice"),
        ("lora_r: [8", "line 1"),
        ("model: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str, message: str) -> None:
    said = complaint(file=written(tmp_path, text))
    assert message in said
    assert "run.yaml" in said


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    missing = tmp_path / "none.yaml"
    assert complaint(file=missing) == (
        f"cannot read the configuration file {missing}: No such file or directory"
    )
    (tmp_path / "picture.yaml").write_bytes(b"\x89PNG\xff\xfe")
    assert "not text in UTF-8" in complaint(file=tmp_path / "picture.yaml")


def test_an_empty_file_gives_nothing(tmp_path: Path) -> None:
    assert load_config(written(tmp_path, "# nothing yet\n"), REQUIRED)[0] == configured()


@pytest.mark.parametrize(
    ("name", "high", "usual"),
    [("learning_rate", "1e9", "1e-2"), ("lora_r", "2048", "1024"), ("epochs", "1e6", "100")],
)
def test_values_that_cannot_be_meant_are_noted(name: str, high: str, usual: str) -> None:
    (note,) = load_config(None, REQUIRED | {name: high})[1]
    assert f"`{name}` {float(high):g} is very high" in note
    assert load_config(None, REQUIRED | {name: usual})[1] == []


def test_what_is_not_used_is_said() -> None:
    _, notes = load_config(None, REQUIRED | {"max_steps": 5, "epochs": 2})
    assert notes == ["`epochs` is ignored, since `max_steps` is given"]
    assert load_config(None, REQUIRED | {"max_steps": 5})[1] == []


@given(
    st.fixed_dictionaries(
        {
            "learning_rate": st.floats(1e-12, 10.0),
            "target_modules": st.one_of(
                st.text("abc_.*|", min_size=1), st.lists(st.text("abc_", min_size=1), min_size=1)
            ),
            "memory_budget": st.none() | st.integers(10_000, 2**50),
            "max_steps": st.none() | st.integers(1, 10**9),
            "resume": st.booleans(),
            "seed": st.integers(0, 2**63 - 1),
            "data": st.text(min_size=1).filter(lambda text: text.isprintable()),
        }
    )
)
def test_a_written_configuration_reads_back_equal(values: dict[str, Any]) -> None:
    config = configured(**values)
    again = yaml.safe_load(to_yaml(config))
    assert load_config(None, again)[0] == config


def test_every_field_has_a_help_text_of_its_own() -> None:
    texts = [field.description for field in TrainConfig.model_fields.values()]
    assert all(texts)
    assert len(set(texts)) == len(texts)


@given(st.floats(0.001, 1e6), st.sampled_from(["", "k", "M", "GB", "GiB", "Ti"]))
def test_sizes(number: float, unit: str) -> None:
    scale = {"": 1, "k": 1e3, "M": 1e6, "GB": 1e9, "GiB": 2**30, "Ti": 2**40}[unit]
    assume(unit or number >= 10_000)  # fewer bytes than that are no memory
    assert parse_bytes(f"{number:.3f}{unit}") == int(float(f"{number:.3f}") * scale)


@pytest.mark.parametrize("text", ["", "GB", "1.2.3GB", "-1GB", "1XB", "1i"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="such as 16GB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    "options",
    [
        {"eval_steps": 5},
        {"eval_max_samples": 5},
        {"load_best": True},
        {"early_stopping_patience": 2},
    ],
)
def test_an_option_about_evaluations_needs_data_for_them(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ConfigError, match=f"`{name}` needs data to evaluate on: give `eval_data`"):
        configured(**options).require_held_out()
    configured(**options).require_held_out(given=True)
    configured(**options, eval_split=0.1).require_held_out()
    configured(**options, eval_data="e").require_held_out()


@pytest.mark.parametrize(
    ("data", "eval_data"),
    [(["-", "-[:5]"], None), ("-", "-"), ("-:2", "-#9"), (["a", {"path": "-"}], "-")],
)
def test_a_stream_is_named_once(data: object, eval_data: object) -> None:
    stream = {"streaming": True, "max_steps": 1}
    given = {"data": data, "eval_data": eval_data}
    assert "name `-` only once" in complaint(**REQUIRED | given | stream)
    configured(**given)  # read as a whole, and then as often as it is named
    configured(data="-", eval_data="-x.jsonl", **stream)
