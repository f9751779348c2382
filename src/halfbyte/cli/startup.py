"""What is imported of transformers: the modelling code, and not what that imports for others.

Importing one model of transformers imports torch._dynamo (with sympy), torch.distributed with
DTensor and FSDP, and whichever of accelerate, scipy, scikit-learn, torchvision and torchao are
installed: for compiled, sharded and quantised models, for vision, and for assisted generation. No
command of ours uses any of it, and each would wait for it: `halfbyte generate` on a tiny model
takes 6.5 s with it and 3.9 s without, of which `import torch` is 1.9 s.

`import_transformers` does it once, before anything else of ours is imported. It acts only in a
process that is a command of ours (`claim_process`): a program that calls us as a library may use
transformers for all that, and so may our tests.
"""

import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

logger = logging.getLogger("halfbyte")

# What is said not to be there. Transformers asks these as it is imported, and runs without.
_UNUSED = (
    "is_accelerate_available",
    "is_kernels_available",
    "is_scipy_available",
    "is_sklearn_available",
    "is_torch_distributed_available",
    "is_torchao_available",
    "is_torchaudio_available",
    "is_torchvision_available",
)
# What every family's modelling file imports; the file itself is imported when its model is built.
_COMMON = (
    "transformers.modeling_utils",
    "transformers.modeling_layers",
    "transformers.masking_utils",
    "transformers.generation.utils",
    "transformers.models.auto.modeling_auto",
)

_DYNAMO = "torch._dynamo"
_TRACING = "torch._dynamo._trace_wrapped_higher_order_op"

_ours = False


def claim_process() -> None:
    """Say that this process runs commands of ours, and nothing else."""
    global _ours
    _ours = True


def import_transformers() -> None:
    """Import torch, and what every model of transformers needs.

    Does nothing in a process of others, or where a model was imported before.
    """
    if not _ours or _COMMON[0] in sys.modules:
        return
    import transformers  # noqa: F401 (its own start asks what is installed, and imports nothing)
    from transformers import utils
    from transformers.utils import import_utils

    for name in _UNUSED:
        for module in (utils, import_utils):
            if hasattr(module, name):
                setattr(module, name, _absent)
    with ExitStack() as stack:
        stack.enter_context(_one_survey_of_models(import_utils))
        stack.enter_context(_without_dynamo())
        try:
            for name in _COMMON:
                importlib.import_module(name)
        except ImportError as error:
            # A transformers that uses more of torch._dynamo as it is imported than we know of. It
            # is imported by whoever needs it, and works: this costs seconds and nothing else.
            logger.debug("transformers is imported whole: %s", error)


def _absent(*_: Any, **__: Any) -> bool:
    return False


@contextmanager
def _replaced(module: ModuleType, name: str, value: object) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


@contextmanager
def _one_survey_of_models(import_utils: ModuleType) -> Iterator[None]:
    """Let the package transformers.models have the list of models that transformers has made.

    Each is made by reading the text of 2000 files, which takes 0.4 s.
    """
    survey: Callable[..., dict[Any, dict[str, Any]]] = import_utils.define_import_structure
    models = Path(sys.modules["transformers"].__path__[0]) / "models"

    def known(path: str, prefix: str | None = None) -> dict[Any, dict[str, Any]]:
        if Path(path) != models / "__init__.py" or prefix is not None:
            return survey(path, prefix)
        return {
            needs: {
                module.removeprefix("models."): names
                for module, names in modules.items()
                if module.startswith("models.")
            }
            for needs, modules in survey(models, prefix="models").items()
        }

    with _replaced(import_utils, "define_import_structure", known):
        yield


class _Deferred(ModuleType):
    """A module of torch that is imported when something of it is used, and not before."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        _forget_deferred()
        return getattr(importlib.import_module(self.__name__), name)


def _forget_deferred() -> None:
    import torch

    for name in (_DYNAMO, _TRACING):
        if isinstance(sys.modules.get(name), _Deferred):
            del sys.modules[name]
    if isinstance(vars(torch).get("_dynamo"), _Deferred):
        del torch._dynamo  # what torch itself puts there, it imports when it is asked for


@contextmanager
def _without_dynamo() -> Iterator[None]:
    """Let decorators that say something to torch.compile say nothing, so that it is not imported.

    What else is asked of torch._dynamo imports it.
    """
    import torch

    if _DYNAMO in sys.modules:
        yield
        return
    dynamo, tracing = _Deferred(_DYNAMO), _Deferred(_TRACING)
    vars(dynamo).update(allow_in_graph=_unchanged, assume_constant_result=_unchanged)

    def item_to_index() -> Any:
        return importlib.import_module(_TRACING).TransformGetItemToIndex()

    vars(tracing)["TransformGetItemToIndex"] = item_to_index
    sys.modules |= {_DYNAMO: dynamo, _TRACING: tracing}
    vars(torch)["_dynamo"] = dynamo
    try:
        with _replaced(torch.compiler, "disable", _unchanged):
            yield
    finally:
        _forget_deferred()


def _unchanged(function: Any = None, *_: Any, **__: Any) -> Any:
    """Decorate a function with nothing; also as ``@decorator(…)``."""
    return (lambda decorated: decorated) if function is None else function
