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

if TYPE_CHECKING:
    from halfbyte import nf4, optim
    from halfbyte.errors import HalfbyteError, UserError
    from halfbyte.lora import LoRAConfig
    from halfbyte.model.generate import generate
    from halfbyte.report import open_report
    from halfbyte.train.config import TrainConfig, load_config
    from halfbyte.train.evaluate import evaluate
    from halfbyte.train.loading import open_model as load
    from halfbyte.train.loop import train as fine_tune

__version__ = "0.1.0"

__all__ = [
    "HalfbyteError",
    "LoRAConfig",
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
]

_HOMES = {
    "HalfbyteError": "errors:HalfbyteError",
    "LoRAConfig": "lora:LoRAConfig",
    "TrainConfig": "train.config:TrainConfig",
    "UserError": "errors:UserError",
    "evaluate": "train.evaluate:evaluate",
    "fine_tune": "train.loop:train",
    "generate": "model.generate:generate",
    "load": "train.loading:open_model",
    "load_config": "train.config:load_config",
    "open_report": "report:open_report",
}


def __getattr__(name: str) -> Any:
    if name in ("nf4", "optim"):
        return importlib.import_module(f"halfbyte.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'halfbyte' has no attribute {name!r}")
    module, attribute = _HOMES[name].split(":")
    return getattr(importlib.import_module(f"halfbyte.{module}"), attribute)


def __dir__() -> list[str]:
    return __all__
