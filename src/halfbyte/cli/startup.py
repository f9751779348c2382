"""Fast start: imports the modelling code of transformers without unused dependencies.

Importing one model of transformers imports torch._dynamo (with sympy), torch.distributed with
DTensor and FSDP, and whichever of accelerate, scipy, scikit-learn, torchvision and torchao are
installed: for compiled, sharded and quantised models, for vision, and for assisted generation. No
halfbyte command uses any of it, and importing it takes longer than importing torch (LAB.md).

`import_transformers` must run before any other import of halfbyte. It acts only in a process that
runs a halfbyte command (`claim_process`): programs that use halfbyte as a library, and our tests,
may need those parts of transformers.
"""

import ctypes
import gc
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

logger = logging.getLogger("halfbyte")

# Reported to transformers as not installed: it checks them on import, but does not need them.
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
# Imported by every family's modelling file, which itself is imported when its model is built.
_COMMON = (
    "transformers.modeling_utils",
    "transformers.modeling_layers",
    "transformers.masking_utils",
    "transformers.generation.utils",
    "transformers.models.auto.modeling_auto",
)

_DYNAMO = "torch._dynamo"
# A small module of that package that is imported by name, and needs nothing of the package.
_STANDS_ALONE = "torch._dynamo._trace_wrapped_higher_order_op"

_DECORATORS = ("allow_in_graph", "assume_constant_result", "disable", "disallow_in_graph")

_ours = False


def claim_process() -> None:
    """Declare that this process runs only halfbyte commands."""
    global _ours
    _ours = True


def import_transformers(*, gpu: bool = False) -> None:
    """Import torch, and the modules that every model of transformers needs.

    No effect in processes of other programs, or if a model was imported before.

    Args:
        gpu: Whether to create the CUDA context at the same time, if there is a GPU: it takes about
            a second, during which Python is free to import.
    """
    if not _ours or _COMMON[0] in sys.modules:
        return
    context = None
    if gpu:
        context = threading.Thread(target=_make_context, name="make-context", daemon=True)
        context.start()
    # Imports create no garbage, and garbage collection would take a fifth of the time.
    gc.disable()
    try:
        _import_all(context)
    finally:
        gc.enable()
        gc.freeze()


def _import_all(context: threading.Thread | None) -> None:
    import torch  # noqa: F401 (some versions import torch._dynamo here)

    if context is not None:
        _wake_torch(context)
    if _DYNAMO not in sys.modules:
        _postpone_dynamo()
    with _distributions_by_name():
        import transformers  # noqa: F401 (itself it asks what is installed, imports no model)
    from transformers import utils
    from transformers.utils import import_utils

    for name in _UNUSED:
        for module in (utils, import_utils):
            if hasattr(module, name):
                setattr(module, name, _absent)
    with _one_survey_of_models(import_utils):
        for name in _COMMON:
            importlib.import_module(name)


def _make_context() -> None:
    """Create the CUDA context for torch, through the driver API.

    ctypes releases the GIL during the call; torch's own calls hold it.
    """
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")  # as torch does
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:  # no driver, no GPU
        return
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), 0) == 0:
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)


def _wake_torch(context: threading.Thread) -> None:
    """Start a thread that initialises torch's CUDA once the context exists."""
    import torch

    from halfbyte.runtime.precision import configure_allocators

    configure_allocators()  # read when torch initialises CUDA

    def wake() -> None:
        context.join()
        # No matrix product: the first of a process fixes whether cuBLAS is deterministic, which is
        # not known yet.
        if torch.cuda.is_available():
            torch.zeros(1, device="cuda")

    threading.Thread(target=wake, name="wake-gpu", daemon=True).start()


def _absent(*_: Any, **__: Any) -> bool:
    return False


class _Distributions(Mapping[str, list[str]]):
    """The result of importlib.metadata.packages_distributions(), looked up on demand.

    Listing all reads files of every installed package, which takes a second if there are many.
    Older versions of transformers (5.21 and before) list all to look up a few.
    """

    def __init__(self, every: Callable[[], Mapping[str, list[str]]]) -> None:
        self._every = every

    def __getitem__(self, name: str) -> list[str]:
        try:
            return [importlib.metadata.distribution(name).name]
        except importlib.metadata.PackageNotFoundError:
            return self._all[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    @cached_property
    def _all(self) -> Mapping[str, list[str]]:
        return self._every()


@contextmanager
def _distributions_by_name() -> Iterator[None]:
    """Have packages_distributions() return `_Distributions`."""
    metadata: Any = importlib.metadata
    every = metadata.packages_distributions
    metadata.packages_distributions = lambda: _Distributions(every)
    try:
        yield
    finally:
        metadata.packages_distributions = every


@contextmanager
def _one_survey_of_models(import_utils: ModuleType) -> Iterator[None]:
    """Let the package transformers.models reuse the list of models built by transformers.

    Each would build it by reading 2000 files, which takes 0.4 s.
    """
    survey = import_utils.define_import_structure
    models = Path(sys.modules["transformers"].__path__[0]) / "models"

    def known(path: str, prefix: str | None = None) -> dict[Any, dict[str, Any]]:
        if Path(path) != models / "__init__.py" or prefix is not None:
            found: dict[Any, dict[str, Any]] = survey(path, prefix)
            return found
        return {
            needs: {
                module.removeprefix("models."): names
                for module, names in modules.items()
                if module.startswith("models.")
            }
            for needs, modules in survey(models, prefix="models").items()
        }

    import_utils.define_import_structure = known  # type: ignore[attr-defined]
    try:
        yield
    finally:
        import_utils.define_import_structure = survey  # type: ignore[attr-defined]


# --- torch._dynamo, when it is used ---------------------------------------------------------------


def _postpone_dynamo() -> None:
    """Replace torch._dynamo by a placeholder that imports it on first use.

    Until then its decorators, which exclude functions from torch.compile, return functions
    unchanged, as nothing is compiled. torch and transformers apply them on import, and torch
    imports all of it to call a function of its own on the meta device.
    """
    spec = importlib.util.find_spec(_DYNAMO)
    if spec is None:
        return
    module = _Postponed(_DYNAMO)
    module.__spec__, module.__path__ = spec, list(spec.submodule_search_locations or ())
    vars(module).update(dict.fromkeys(_DECORATORS, _undecorated))
    sys.modules[_DYNAMO] = module
    sys.meta_path.insert(0, _Parts())


def _undecorated(function: Any = None, *_: Any, **__: Any) -> Any:
    """Decorate nothing: as ``@decorator`` or as ``@decorator(…)``."""
    return (lambda decorated: decorated) if function is None else function


def _dynamo() -> ModuleType:
    """Return torch._dynamo, imported now if it was not."""
    if isinstance(sys.modules.get(_DYNAMO), _Postponed):
        del sys.modules[_DYNAMO]
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Parts)]
    return importlib.import_module(_DYNAMO)


class _Postponed(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python's own introspection
            raise AttributeError(name)
        return getattr(_dynamo(), name)


class _Parts(MetaPathFinder):
    """Imports torch._dynamo before its submodules; one it has imported is not loaded again."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not name.startswith(f"{_DYNAMO}.") or name == _STANDS_ALONE:
            return None
        _dynamo()
        found = sys.modules.get(name)
        if found is None:
            return None
        # importlib uses the spec of a module that importing the package has imported.
        found.__spec__ = ModuleSpec(name, _Found(found))
        return found.__spec__


class _Found(Loader):
    """Loads a module that is already imported."""

    def __init__(self, module: ModuleType) -> None:
        self._module, self._spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec
