"""Where the weights of layers wait: a run that streams them makes the same adapter."""

import json

import pytest
import torch
from safetensors.torch import load_file

from halfbyte.config.schema import TrainConfig
from halfbyte.errors import ConfigError
from halfbyte.linear.layer_store import DiskLayers, HostLayers
from halfbyte.linear.sharded_layers import ShardedLayers
from halfbyte.models.build import BaseRecipe
from halfbyte.plan.model_shape import shape_of_known
from halfbyte.report import open_report
from halfbyte.runtime.device import DeviceSpec
from halfbyte.train import weight_location
from halfbyte.train.run import train
from halfbyte.train.weight_location import Processes, locate
from tests.tiny import write_tiny_model


def test_a_run_whose_weights_are_on_the_disk_makes_the_same_adapter(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = write_tiny_model(tmp_path / "model")
    data = tmp_path / "train.jsonl"
    rows = [{"prompt": f"Count to {i}.", "completion": "one two three " * i} for i in range(1, 9)]
    data.write_text("\n".join(json.dumps(row) for row in rows))
    found, notes = {}, {}
    for weights in ("auto", "disk"):
        made = TrainConfig(
            model=str(model),
            data=str(data),
            output=tmp_path / weights,
            weights=weights,
            device="cpu",
            compute_dtype="float32",
            activations="recompute",
            lora_r=4,
            max_steps=3,
            samples=1,
            eval_data=str(data),
            memory_budget=None,
        )
        with open_report(made.output, quiet=True) as report:
            train(made, report)
        found[weights] = load_file(made.output / "adapter_model.safetensors")
        events = [json.loads(x) for x in (made.output / "journal.jsonl").read_text().splitlines()]
        notes[weights] = [event for event in events if event["event"] in ("step", "evaluation")]
    assert found["auto"].keys() == found["disk"].keys()
    assert all(torch.equal(found["disk"][name], value) for name, value in found["auto"].items())
    losses = [[event["loss"] for event in notes[weights]] for weights in ("auto", "disk")]
    assert losses[0] == losses[1]
    assert not list((tmp_path / "cache" / "halfbyte" / "weights").iterdir())


def on_a_gpu(monkeypatch, gpu, host):
    free = {"cuda": gpu, "cpu": host}
    monkeypatch.setattr(weight_location, "free_memory", free.__getitem__)
    spec = DeviceSpec("H200", (9, 0), 132, 150 * 10**9)
    monkeypatch.setattr(weight_location.devices, "spec_of", lambda device: spec)


def located(shape, processes=Processes(), **options):  # noqa: B008
    config = TrainConfig(model="m", data="d", output="o", **options)
    recipe = BaseRecipe(compute_dtype=torch.bfloat16, device="cuda")
    return locate(config, lambda: shape_of_known(shape), recipe, processes)


@pytest.mark.parametrize(
    ("shape", "gpu", "host", "expected"),
    [
        ("llama2-7b", 24e9, 64e9, "gpu"),
        ("llama2-70b", 139e9, 64e9, "gpu"),
        ("llama2-70b", 24e9, 64e9, "host"),
        ("llama2-70b", 24e9, 32e9, "disk"),
        ("llama2-7b", 4e9, 8e9, "host"),
        ("llama3-8b", 6e9, 16e9, "host"),
    ],
)
def test_weights_wait_where_there_is_room(tmp_path, monkeypatch, shape, gpu, host, expected):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    on_a_gpu(monkeypatch, gpu, host)
    found = located(shape)
    assert found.location == expected
    assert bool(found.message) == (expected != "gpu")
    store = {"gpu": None, "host": HostLayers, "disk": DiskLayers}[expected]
    assert getattr(found.store, "func", found.store) is store


def test_what_is_asked_for_is_done(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    on_a_gpu(monkeypatch, 24e9, 64e9)
    assert located("llama2-70b", weights="gpu").location == "gpu"
    assert located("llama2-7b", weights="host").location == "host"
    assert located("llama2-7b", weights="disk").location == "disk"
    assert located("llama2-7b", memory_budget="4GB").location == "host"


@pytest.mark.parametrize(
    ("gpu", "weights", "expected"),
    [(24e9, "auto", "host"), (40e9, "auto", "gpus"), (40e9, "host", "host"), (24e9, "gpu", "gpus")],
)
def test_weights_are_divided_among_gpus_or_in_host_memory(monkeypatch, gpu, weights, expected):
    on_a_gpu(monkeypatch, gpu, 64e9)
    found = located("llama2-70b", Processes(2, 1), shard=True, weights=weights)
    assert found.location == expected
    assert found.store.func is ShardedLayers
    place = {"gpus": "gpu", "host": "host"}[expected]
    assert found.store.keywords == {"rank": 1, "size": 2, "place": place}


def test_dividing_needs_processes(monkeypatch):
    with pytest.raises(ConfigError, match="there is one: start several with --gpus 2"):
        located("llama2-70b", shard=True)
    with pytest.raises(ValueError, match="`shard` divides weights in memory"):
        TrainConfig(model="m", data="d", output="o", shard=True, weights="disk")
