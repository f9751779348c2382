"""Parameters with gradients to follow: what the tests of the optimizer share."""

import torch

SHAPES = [(64, 100), (17,), (5000,), (3, 1400), (4096,), (1, 4095), ()]


def parameters(shapes=tuple(SHAPES), dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def gradients(tensors, steps, seed=1):
    """Of sizes that differ a thousandfold from element to element, with a trend over the steps."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [10 ** (-3 * torch.rand(p.shape, generator=generator)) for p in tensors]
    trends = [torch.randn(p.shape, generator=generator) for p in tensors]
    return [
        [
            (size * (0.3 * trend + torch.randn(p.shape, generator=generator))).to(p.dtype)
            for p, size, trend in zip(tensors, sizes, trends, strict=True)
        ]
        for _ in range(steps)
    ]


def follow(make, start, grads, **options):
    """Steps from `start` along `grads`; returns the parameters and the optimizer."""
    made = [torch.nn.Parameter(p.clone()) for p in start]
    optimizer = make(made, **options)
    for step in grads:
        for parameter, grad in zip(made, step, strict=True):
            parameter.grad = grad.clone()
        optimizer.step()
    return [p.detach() for p in made], optimizer


def in_groups(make):
    """Make an optimizer with weight decay for matrices and none for the rest, as runs do."""

    def made(parameters, **options):
        matrices = [p for p in parameters if p.dim() > 1]
        rest = {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0, "lr": 0.02}
        return make([{"params": matrices}, rest], **options)

    return made
