"""A run that goes on from an adapter starts as PEFT loads it, and keeps what it is."""

import json
import shutil

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from halfbyte.config.reading import load_config
from halfbyte.errors import CheckpointError, ConfigError
from halfbyte.train.loading import open_model
from halfbyte.train.run import _Run
from tests.tiny import write_tiny_model
from tests.train import test_run
from tests.train.interrupting import break_off
from tests.train.test_run import config, journal, run

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning"),
]
data = test_run.data  # a fixture
CASES = {
    "lora": {"r": 3, "lora_alpha": 6, "target_modules": "all-linear"},
    "rslora": {"r": 8, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
    "dora": {"r": 2, "use_dora": True, "target_modules": ["q_proj", "up_proj"]},
    "patterns": {
        "r": 4,
        "target_modules": r".*layers\.1\..*(q|k|down)_proj",
        "rank_pattern": {"k_proj": 2},
        "alpha_pattern": {"down_proj": 3},
    },
    "whole": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    "embedding": {"r": 4, "target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"]},
}
# Steps that Adam takes with it change no bit.
STANDING_STILL = {"learning_rate": 1e-30, "max_steps": 2, "lora_r": None, "quant": "none"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model"), tied=False)


@pytest.fixture(scope="module")
def theirs(model, tmp_path_factory):
    """Adapters of PEFT with random weights, by case, and the models with them."""
    made = {}
    for name, options in CASES.items():
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(model)
        kind = peft.LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **options)
        wrapped = peft.get_peft_model(base, kind).eval()
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        directory = tmp_path_factory.mktemp(name)
        wrapped.save_pretrained(directory)
        made[name] = (
            directory,
            peft.PeftModel.from_pretrained(
                AutoModelForCausalLM.from_pretrained(model), directory
            ).eval(),
        )
    return made


def going_on(model, data, output, adapter, **options):
    """The configuration of a run, with the options that are not None."""
    made = config(model, data, output, lora_r=1).model_dump(exclude_unset=True)
    made |= {"init_adapter": adapter} | options
    return load_config(None, {key: value for key, value in made.items() if value is not None})[0]


@torch.no_grad()
def logits(model):
    return model(input_ids=torch.arange(3, 43).view(2, 20)).logits


@torch.no_grad()
def loss_of_first_step(wrapped, batches):
    total = terms = 0.0
    for batch in batches:
        ids, labels = (torch.from_numpy(one) for one in (batch.input_ids, batch.labels))
        total += float(
            F.cross_entropy(
                wrapped(input_ids=ids).logits.flatten(0, 1), labels.flatten(), reduction="sum"
            )
        )
        terms += float((labels != -100).sum())
    return total / terms


@pytest.mark.parametrize("case", CASES)
def test_the_first_step_is_that_of_peft_s_model_and_what_it_is_is_kept(
    model,
    data,
    tmp_path,
    theirs,
    case,
    monkeypatch,
):
    directory, wrapped = theirs[case]
    first = []
    made = going_on(model, data, tmp_path / "out", directory, **STANDING_STILL)

    def watch(self, step):
        batches = self.data.plan[step]
        first.extend(batches if step == 0 else ())
        return given(self, step)

    given = _Run.batches_of
    monkeypatch.setattr(_Run, "batches_of", watch)
    run(made)
    events = journal(tmp_path / "out")
    losses = [event["loss"] for event in events if event["event"] == "step"]
    assert losses[0] == pytest.approx(loss_of_first_step(wrapped, first), rel=1e-5)

    mine, _, _ = open_model(
        str(model), adapter=str(tmp_path / "out"), quant="none", compute_dtype="float32"
    )
    assert (logits(mine) - logits(wrapped)).abs().max() < 1e-5
    before = load_file(directory / "adapter_model.safetensors")
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].float(), after[name]) for name in before)
    kept = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    for name in ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"):
        assert kept[name] == peft.PeftConfig.from_pretrained(directory).to_dict()[name]
    [begin] = [event for event in events if event["event"] == "begin"]
    card = json.loads((tmp_path / "out" / "halfbyte.json").read_text())
    assert begin["init_adapter"] == card["init_adapter"]
    assert len(begin["init_adapter"]["digest"]) == 64
    # PEFT goes on from ours in turn.
    again = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model), tmp_path / "out"
    ).eval()
    assert (logits(again) - logits(wrapped)).abs().max() < 1e-5


def test_a_run_that_goes_on_resumes_without_the_adapter(model, data, tmp_path):
    one = config(model, data, tmp_path / "one", max_steps=1, use_dora=True)
    run(one)
    short = {"lora_r": None, "save_steps": 2, "max_steps": 5}
    whole = going_on(model, data, tmp_path / "whole", tmp_path / "one", **short)
    run(whole)
    broken = whole.model_copy(update={"output": tmp_path / "broken"})
    break_off(broken, 3)
    shutil.rmtree(tmp_path / "one")
    for again in (
        load_config(tmp_path / "broken" / "config.yaml", {"resume": True})[0],
        broken.model_copy(update={"resume": True}),
    ):
        run(again)
        for name in ("adapter_model.safetensors", "adapter_config.json", "halfbyte.json"):
            one, other = (tmp_path / run / name for run in ("whole", "broken"))
            assert one.read_bytes() == other.read_bytes()
    begins = [event for event in journal(tmp_path / "broken") if event["event"] == "begin"]
    assert len({begin["init_adapter"]["digest"] for begin in begins}) == 1


def test_a_resumed_run_without_the_option_is_told_to_give_it(model, data, tmp_path):
    run(config(model, data, tmp_path / "one", max_steps=1))
    begun = going_on(model, data, tmp_path / "two", tmp_path / "one", lora_r=None, max_steps=2)
    run(begun)
    again = begun.model_copy(update={"init_adapter": None, "resume": True, "lora_r": 64})
    with pytest.raises(
        ConfigError, match=r"(?s)lora_r was .*\nIt started from '.*one': give --init-"
    ):
        run(again)


def test_an_adapter_that_is_given_later_is_refused(model, data, tmp_path):
    run(config(model, data, tmp_path / "one", max_steps=1))
    again = config(model, data, tmp_path / "one", max_steps=1, resume=True)
    with pytest.raises(ConfigError, match="did not start from an adapter"):
        run(again.model_copy(update={"init_adapter": tmp_path / "one"}))


@pytest.mark.parametrize(
    ("case", "given", "message"),
    [
        ("lora", {"lora_r": 16}, "`lora_r` is 3 there, and 16 is given"),
        ("lora", {"lora_alpha": 16.0}, "`lora_alpha` is 6.0 there, and 16.0 is given"),
        ("rslora", {"use_rslora": False}, "`use_rslora` is True there, and False is given"),
        ("dora", {"use_dora": False}, "`use_dora` is True there"),
        ("lora", {"target_modules": "q_proj,v_proj"}, "`target_modules` is .* there"),
        ("patterns", {"rank_pattern": "k_proj=3"}, "`rank_pattern` is {'k_proj': 2} there"),
        ("whole", {"modules_to_save": "norm"}, "`modules_to_save` is"),
    ],
)
def test_an_option_that_contradicts_it_is_named(
    model,
    data,
    tmp_path,
    theirs,
    case,
    given,
    message,
):
    made = going_on(model, data, tmp_path / "out", theirs[case][0], **{"lora_r": None} | given)
    with pytest.raises(ConfigError, match=message):
        run(made)
    assert not (tmp_path / "out").exists()


def test_options_that_say_the_same_are_no_contradiction(model, data, tmp_path, theirs):
    same = {"lora_r": 3, "lora_alpha": 6, "target_modules": "all-linear"}
    for count, (case, given) in enumerate(
        [
            ("lora", same | {"lora_dropout": 0.1}),
            ("whole", {"lora_r": 4, "modules_to_save": "norm,lm_head"}),
            ("patterns", {"lora_r": 4, "target_modules": r".*\.1\..*\.(q|k|down)_proj"}),
        ]
    ):
        options = {"max_steps": 1, "quant": "none"} | given
        run(going_on(model, data, tmp_path / str(count), theirs[case][0], **options))


def damage(adapter, directory, change):
    shutil.copytree(adapter, directory)
    tensors = load_file(directory / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("dora", lambda t: t.pop(next(k for k in t if "magnitude" in k)), "magnitude.* is missing"),
        ("lora", lambda t: t.update({"base_model.model.x.bias": torch.ones(2)}), "x.bias"),
        ("whole", lambda t: t.pop("base_model.model.lm_head.weight"), "holds no lm_head"),
        (
            "lora",
            lambda t: t.update({"base_model.model.q.lora_A.weight": torch.ones(3, 4)}),
            "q.lora_B",
        ),
    ],
)
def test_nothing_of_it_is_left_out_silently(
    model,
    data,
    tmp_path,
    theirs,
    case,
    change,
    message,
):
    adapter = damage(theirs[case][0], tmp_path / "damaged", change)
    made = going_on(model, data, tmp_path / "out", adapter, lora_r=None, max_steps=1, quant="none")
    with pytest.raises(CheckpointError, match=message):
        run(made)
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_base_is_refused_unless_allowed(
    model,
    data,
    tmp_path,
    caplog,
):
    run(config(model, data, tmp_path / "one", max_steps=1, quant="fp4"))
    # As in eval: the quantisation is that of its training unless another one is given.
    same = going_on(model, data, tmp_path / "same", tmp_path / "one", lora_r=None, max_steps=1)
    run(same)
    card = json.loads((tmp_path / "same" / "halfbyte.json").read_text())
    assert card["recipe"]["quant"] == "fp4"
    other = {"lora_r": None, "max_steps": 1, "quant": "none"}
    made = going_on(model, data, tmp_path / "other", tmp_path / "one", **other)
    with pytest.raises(CheckpointError, match="quant was 'fp4', now it is 'none'"):
        run(made)
    run(made.model_copy(update={"allow_mismatch": True}))
    assert "used anyway" in caplog.text


def test_qera_is_remembered_and_not_combined(model, data, tmp_path):
    run(config(model, data, tmp_path / "one", max_steps=1, init_lora_weights="qera"))
    run(going_on(model, data, tmp_path / "two", tmp_path / "one", lora_r=None, max_steps=1))
    card = json.loads((tmp_path / "two" / "halfbyte.json").read_text())
    assert card["recipe"]["init_lora_weights"] == "qera"
    with pytest.raises(ConfigError, match="each is where the adapters start; remove one"):
        going_on(model, data, tmp_path / "x", tmp_path / "one", init_lora_weights="qera")
