"""Whether a model can be trained: decided from its architecture, before a weight is read.

``plan`` and ``train`` ask the same question of a model of transformers on the meta device, so they
refuse the same models.
"""

from transformers import PreTrainedModel

from halfbyte.errors import CheckpointError
from halfbyte.layers.experts import expert_parameters
from halfbyte.layers.targets import linears_to_freeze, parameters_in_peft, why_no_adapter
from halfbyte.linear.lora import LoRAConfig
from halfbyte.linear.lora_targets import choose_parameters, choose_targets
from halfbyte.linear.parameter_lora import is_plain_matrix
from halfbyte.models.buffers import compute_buffers

_CANNOT_ANSWER = "transformers' own generate, which answers prompts, fails with it"

# What is not trained, by the class of the model, and why.
_REFUSED = {
    "BltForCausalLM": _CANNOT_ANSWER,
    "CpmAntForCausalLM": "its logits depend on later tokens, which it should predict",
    "ProphetNetForCausalLM": _CANNOT_ANSWER,
    "ReformerModelWithLMHead": "its reversible layers have no gradient if the embedding has none",
    "RwkvForCausalLM": "transformers divides its weights in place when it is called",
    "XLNetLMHeadModel": "its logits depend on later tokens, which it should predict",
}


def require_trainable(model: PreTrainedModel, config: LoRAConfig) -> None:
    """Check that adapters of a model can be trained.

    Args:
        model: The model of transformers, on the meta device.
        config: The adapters.

    Raises:
        CheckpointError: If they cannot; the message says why.
        ConfigError: If the targets are no linear layers of the model, or cannot get an adapter.
    """
    name = type(model).__name__
    if name in _REFUSED:
        raise CheckpointError(f"{name} cannot be trained: {_REFUSED[name]}")
    # A field of that name is in other configurations too, of models that do not read it (GPT-NeoX).
    if any(getattr(module, "is_decoder", True) is False for module in model.modules()):
        raise CheckpointError(
            f"{name} cannot be trained: its config.json makes it an encoder (is_decoder is false), "
            "which sees the tokens it should predict"
        )
    head, refused = model.get_output_embeddings(), why_no_adapter(model)
    frozen = [path for path, linear in linears_to_freeze(model).items() if linear is not head]
    linears = list(dict.fromkeys((*frozen, *refused)))
    if config.why_no_parameters is not None:
        refused = dict.fromkeys(parameters_in_peft(model), config.why_no_parameters) | refused
    parameters = dict.fromkeys(expert_parameters(model), True)
    matrices = [path for path, module in model.named_modules() if is_plain_matrix(module)]
    parameters |= dict.fromkeys((f"{path}.weight" for path in (*frozen, *matrices)), False)
    chosen = choose_parameters(parameters, config.target_parameters)
    if len(refused) == len(linears) and not chosen and not config.modules_to_save:
        raise CheckpointError(
            f"{name} has no linear layer (torch.nn.Linear) that could get an adapter; a model made "
            "of others, such as GPT-2's Conv1D, cannot be trained"
        )
    if config.target_modules or not chosen:
        choose_targets(linears, refused, config.target_modules)
    stored = model.state_dict().keys()
    computed = [path for path, _ in model.named_buffers() if path not in stored]
    compute_buffers(model, "cpu", stored=stored)
    for path in computed:  # only to see that they can be
        owner, _, leaf = path.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = model.get_buffer(path).to("meta")
