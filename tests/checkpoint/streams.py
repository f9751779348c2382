"""What a source yields, with the experts of each parameter together again."""

from typing import Any

import torch

from halfbyte.checkpoint.source import BaseSource, ExpertSlice


def streamed(source: BaseSource, device: str = "cpu") -> dict[str, Any]:
    """Return every value of ``source.tensors()``; of experts a tensor, or a list of packed ones."""
    found: dict[str, Any] = {}
    for name, value in source.tensors(device):
        if isinstance(value, ExpertSlice):
            assert value.expert == len(found.setdefault(name, []))
            found[name].append(value.value)
        else:
            assert name not in found
            found[name] = value
    for name, value in found.items():
        if isinstance(value, list):
            assert len(value) == source.experts[name]
            if isinstance(value[0], torch.Tensor):
                found[name] = torch.stack(value)
    return found
