"""Tiny models and tokenizers, made on the spot: nothing in the tests is downloaded.

``tiny_tokenizer()`` is a byte-level BPE tokenizer of 400 entries, trained on the lines below so
that characters merge as they do in a real one, with ChatML's template by default. Like SmolLM2's,
its padding token *is* its end-of-turn token. ``tiny_llama`` is a random Llama.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML as most models have it: prefixes of a conversation render to prefixes of its text."""

LLAMA2 = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('roles must be user and assistant') }}{% endif %}"
    "{% endfor %}"
)
"""The Llama 2 and Mistral way: the template writes BOS itself, and refuses other roles."""

GENERATION = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>' + '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML that marks what the assistant wrote with ``{% generation %}``."""

_CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "system\nYou are a helpful assistant.",
    "user\nWhat is the capital of France?",
    "assistant\nThe capital of France is Paris.",
    '{"item": "nails", "quantity": 3, "unit": "boxes"}',
    "Please send three boxes of nails to Priya in Leeds by Friday, and two more by Monday.",
    "[INST] Say it again, please. [/INST]",
]


def tiny_tokenizer(
    chat_template: str | None = CHATML, *, adds_bos: bool = False, adds_eos: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer whose padding token is its end-of-turn token.

    ``adds_bos`` and ``adds_eos`` make it one that puts these round every text, as Llama's does,
    which is how templates that write BOS themselves come to have it twice.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        _CORPUS,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    before, after = ["<|im_start|>"] * adds_bos, ["<|im_end|>"] * adds_eos
    if before or after:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=chat_template,
        model_max_length=2048,
    )


def tiny_llama(
    tokenizer: PreTrainedTokenizerFast, layers: int = 2, hidden: int = 64, *, tied: bool = True
) -> LlamaForCausalLM:
    """A random Llama in float32 with grouped-query attention, the same on every call."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def write_tiny_model(
    directory: Path,
    *,
    layers: int = 2,
    hidden: int = 64,
    tied: bool = True,
    max_shard_size: str = "50GB",
) -> Path:
    """Writes model (safetensors), configuration and tokenizer to ``directory``, and returns it."""
    tokenizer = tiny_tokenizer()
    model = tiny_llama(tokenizer, layers, hidden, tied=tied)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(directory)
    return directory
