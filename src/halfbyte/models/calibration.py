"""The size of each linear's inputs on a short text, which determines the cost of a weight's error.

The error of a linear's output is Σⱼ error[j] · input[j]. If errors are independent, its square is
on average Σⱼ error[j]² · mean(input[j]²). A few inputs of a trained model are a hundred times
larger than others, whatever the text is about, so a page of mixed prose is enough.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halfbyte.layers.multimodal import text_decoder
from halfbyte.linear.lora import frozen_linears

TEXT = Path(__file__).with_name("calibration.txt")

_LENGTH = 512  # tokens that go through the model together


def _text(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The text in tokens; by paragraphs, as tokenizers warn of what is longer than the model."""
    paragraphs = TEXT.read_text(encoding="utf-8").split("\n\n")
    pieces = tokenizer([f"{text}\n\n" for text in paragraphs], add_special_tokens=False)
    return torch.tensor([token for piece in pieces["input_ids"] for token in piece])


@torch.no_grad()
def input_moments(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """Return the mean square of each input of every frozen linear and of the head, by weight.

    Args:
        model: A model of ``models.build``, its head not packed.
        tokenizer: Its tokenizer.

    Returns:
        float32 ``[in_features]`` each, by the weight's name, on the model's device; for a tied head
        by the embedding's, too. A linear that the text did not reach (an expert that was never
        chosen) is left out.
    """
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}

    def note(name: str, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1]).float()
        if len(x):
            sums[name] = sums.get(name, x.new_zeros(())) + x.square().sum(0)
            rows[name] = rows.get(name, 0) + len(x)

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, inputs: note(name, inputs[0])

    head = model.get_output_embeddings()
    named = model.named_parameters(remove_duplicate=False)
    of_head = [name for name, parameter in named if head is not None and parameter is head.weight]
    hooks = [
        linear.register_forward_pre_hook(watch(f"{path}.weight"))
        for path, linear in frozen_linears(model).items()
    ]
    try:
        for part in torch.split(_text(tokenizer), _LENGTH):
            ids = part[None].to(model.device)
            hidden = text_decoder(model)(input_ids=ids, use_cache=False).last_hidden_state
            for name in of_head:
                note(name, hidden)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: total / rows[name] for name, total in sums.items()}
