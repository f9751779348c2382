"""Reads a directory's tensors in steps: what is read together, and what becomes of it.

Most steps read one tensor. Where transformers stacks experts, a step reads what one expert needs,
and where the files hold experts stacked, the bytes of one. On a GPU, all that the steps will need
is read ahead (staging.py); on a CPU, each tensor is read when its step comes.
"""

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from halfbyte.checkpoint.reading import read_into
from halfbyte.checkpoint.safetensors_file import memory
from halfbyte.checkpoint.source import ExpertSlice
from halfbyte.checkpoint.staging import Request, read_to_device
from halfbyte.quant import PackedWeight

Value = Tensor | PackedWeight | ExpertSlice


class Step(NamedTuple):
    """One step.

    Attributes:
        requests: The tensors to read. What is read otherwise, ``make`` reads.
        make: Returns the parameters' names and values, from the tensors.
    """

    requests: Sequence[Request]
    make: Callable[[list[Tensor]], list[tuple[str, Value]]]


def one_expert(name: str, expert: int, tensors: list[Tensor]) -> list[tuple[str, Value]]:
    """Return the only tensor of a step as an expert's part of ``name``."""
    (matrix,) = tensors
    return [(name, ExpertSlice(expert, matrix))]


def values(steps: Sequence[Step], device: torch.device) -> Iterator[tuple[str, Value]]:
    """Yield what the steps make, one at a time. Nothing is kept: what the caller drops is freed.

    Args:
        steps: The steps, in order.
        device: Device of the tensors that they request.

    Raises:
        CheckpointError: If a file cannot be read or ends early.
    """
    requests = [request for step in steps for request in step.requests]
    stream = _read(requests) if device.type == "cpu" else read_to_device(requests, device)
    with contextlib.closing(stream):
        for step in steps:
            tensors = [next(stream) for _ in step.requests]
            made = step.make(tensors)
            del tensors
            made.reverse()
            while made:
                yield made.pop()


def _read(requests: Sequence[Request]) -> Generator[Tensor, None, None]:
    for request in requests:
        tensor = torch.empty(request.shape, dtype=request.dtype)
        read_into(request.path, request.start, memory(tensor))
        yield tensor
        del tensor
