"""What holds for every test on a GPU: the first product of a process has been made."""

import warnings

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _first_product():
    """Torch warns if a process makes its first product in a backward pass, whose thread is new."""
    if torch.cuda.is_available():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            x = torch.ones(2, 2, device="cuda", requires_grad=True)
            (x @ x).sum().backward()
