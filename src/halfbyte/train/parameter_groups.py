"""The learning rate and the weight decay of each trained parameter.

    B of an adapter, DoRA's magnitudes    learning rate times ``loraplus_lr_ratio`` (LoRA+, Hayou et
                                          al. 2024)
    embedding and head trained in full    ``embedding_learning_rate``, if given
    all matrices: A, B, embedding, head   ``weight_decay``
    all vectors: biases, norms, DoRA's    no decay, as in transformers (which would decay DoRA's
    magnitudes                            magnitudes, since it goes by names)

Decay pulls a weight towards zero. A norm or a magnitude at zero is no simpler a layer, but none.
"""

from collections.abc import Mapping
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from halfbyte.config.schema import TrainConfig
from halfbyte.errors import ConfigError
from halfbyte.linear.modules_to_save import trained_whole


class ParameterGroup(NamedTuple):
    """Parameters that are updated alike.

    Attributes:
        ratio: Their learning rate, relative to that of the schedule.
        weight_decay: Their decoupled weight decay.
        names: Their names.
    """

    ratio: float
    weight_decay: float
    names: list[str]


def parameter_groups(
    model: PreTrainedModel, parameters: Mapping[str, nn.Parameter], config: TrainConfig
) -> list[ParameterGroup]:
    """Return the groups of the trained parameters of ``model``, each in the order of the model.

    Raises:
        ConfigError: ``embedding_learning_rate`` is given, and neither embedding nor head is trained
            in full.
    """
    vocabulary = {
        id(parameter)
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
        if module is not None
        for parameter in trained_whole(module).values()
    }
    rate = config.embedding_learning_rate
    if rate is not None and not vocabulary:
        raise ConfigError(
            "`embedding_learning_rate` needs an embedding or a head that is trained in full; name "
            "it in `modules_to_save`, such as embed_tokens,lm_head"
        )
    groups: dict[tuple[float, float], ParameterGroup] = {}
    for name, parameter in parameters.items():
        ratio = 1.0
        if rate is not None and id(parameter) in vocabulary:
            ratio = rate / config.learning_rate
        elif name.endswith(("lora_B.weight", "lora_magnitude_vector")):
            ratio = config.loraplus_lr_ratio
        key = ratio, config.weight_decay if parameter.dim() > 1 else 0.0
        groups.setdefault(key, ParameterGroup(*key, [])).names.append(name)
    return list(groups.values())
