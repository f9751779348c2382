"""llama.cpp itself as an oracle: its server on this machine, as xllamacpp's wheel brings it."""

import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

xllamacpp = pytest.importorskip("xllamacpp", reason="xllamacpp has no wheel for this machine")


class LlamaCpp:
    """A server that has loaded a file, asked through llama.cpp's HTTP interface."""

    def __init__(self, server: Any) -> None:
        self._server = server

    def _post(self, path: str, **body: Any) -> dict[str, Any]:
        request = urllib.request.Request(
            self._server.listening_address + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)  # type: ignore[no-any-return]

    def tokens(self, text: str) -> list[int]:
        body = {"content": text, "add_special": True, "parse_special": True}
        return self._post("/tokenize", **body)["tokens"]  # type: ignore[no-any-return]

    def render(self, messages: list[dict[str, str]]) -> str:
        return self._post("/apply-template", messages=messages)["prompt"]  # type: ignore[no-any-return]

    def _complete(self, prompt: list[int], count: int, **more: Any) -> dict[str, Any]:
        body = {"n_predict": count, "temperature": 0, "return_tokens": True, "cache_prompt": False}
        return self._post("/completion", prompt=prompt, **body, **more)

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        return self._complete(prompt, count)["tokens"]  # type: ignore[no-any-return]

    def log_probabilities(self, prompt: list[int], vocabulary: int) -> Tensor:
        """Return those of the token after ``prompt``, float32 [vocabulary]."""
        # The server tells none where the token it takes is a part of a character: it has to take
        # one that is whole. What it tells is from before the bias.
        [whole] = self.tokens("a")
        answer = self._complete(prompt, 1, n_probs=vocabulary, logit_bias=[[whole, 1000]])
        found = torch.full((vocabulary,), torch.nan)
        for token in answer["completion_probabilities"][0]["top_logprobs"]:
            found[token["id"]] = token["logprob"]
        return found


@contextmanager
def llama_cpp(path: Path, adapter: Path | None = None) -> Iterator[LlamaCpp]:
    """Load a file, keys and values of attention in float32; the server ends with the context."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.port = 256, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup, params.verbosity = False, 0
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    server = xllamacpp.Server(params)
    try:
        yield LlamaCpp(server)
    finally:
        del server
