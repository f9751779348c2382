"""halfbyte fine-tunes large language models in half a byte per weight.

Everything public is here and imported when first used, so that ``import halfbyte`` costs
milliseconds and no torch::

    import halfbyte

    config = halfbyte.TrainConfig(model="model.gguf", data="train.jsonl", output="out")
    with halfbyte.open_report(config.output) as report:
        result = halfbyte.fine_tune(config, report)

    model, tokenizer, _ = halfbyte.load("model.gguf", adapter="out")
    conversation = [{"role": "user", "content": "Hello"}]
    print(halfbyte.generate(model, tokenizer, [conversation])[0])
"""

import importlib
from typing import TYPE_CHECKING, Any

from halfbyte.version import __version__

if TYPE_CHECKING:
    from halfbyte import optim
    from halfbyte import quant as nf4
    from halfbyte.config.reading import load_config
    from halfbyte.config.schema import TrainConfig
    from halfbyte.errors import HalfbyteError, UserError
    from halfbyte.linear.lora import LoRAConfig
    from halfbyte.models.generate import generate
    from halfbyte.report import open_report
    from halfbyte.train.callbacks import Callbacks
    from halfbyte.train.evaluate import evaluate
    from halfbyte.train.loading import open_model as load
    from halfbyte.train.run import train as fine_tune
    from halfbyte.train.stopping import StopRequest

__all__ = [
    "Callbacks",
    "HalfbyteError",
    "LoRAConfig",
    "StopRequest",
    "TrainConfig",
    "UserError",
    "__version__",
    "evaluate",
    "fine_tune",
    "generate",
    "load",
    "load_config",
    "nf4",
    "open_report",
    "optim",
    "quant",
]

_PACKAGES = {"nf4": "quant", "optim": "optim", "quant": "quant"}  # nf4 is quant's former name
_HOMES = {
    "Callbacks": "train.callbacks:Callbacks",
    "HalfbyteError": "errors:HalfbyteError",
    "LoRAConfig": "linear.lora:LoRAConfig",
    "StopRequest": "train.stopping:StopRequest",
    "TrainConfig": "config.schema:TrainConfig",
    "UserError": "errors:UserError",
    "evaluate": "train.evaluate:evaluate",
    "fine_tune": "train.run:train",
    "generate": "models.generate:generate",
    "load": "train.loading:open_model",
    "load_config": "config.reading:load_config",
    "open_report": "report:open_report",
}


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"halfbyte.{_PACKAGES[name]}")
    if name not in _HOMES:
        raise AttributeError(f"module 'halfbyte' has no attribute {name!r}")
    module, attribute = _HOMES[name].split(":")
    return getattr(importlib.import_module(f"halfbyte.{module}"), attribute)


def __dir__() -> list[str]:
    return __all__
