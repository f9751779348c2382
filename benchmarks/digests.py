"""SHA-256 digests of everything that a refactoring must not change.

    python benchmarks/digests.py --output before.json --gguf SmolLM2-135M-Instruct.Q4_1.gguf
    python benchmarks/digests.py --output after.json --gguf … --compare before.json

Commands are run as typed, on tiny models of several families and, if its file is given, on
SmolLM2-135M: adapters after 20 steps under many options, the losses of these steps, a run that is
stopped and resumed, the output of `merge`, `export` and `quantize`, and what `plan` prints. Only
the command line is used, so the script does not depend on the layout of the code. On a GPU
(``--device cuda``) runs are deterministic, with and without CUDA graphs.

A file's digest is that of its bytes; a run's, those of its adapter and of its losses. The digests
are valid for one machine and one version of torch.
"""

import argparse
import contextlib
import hashlib
import io
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from measuring import write
from transformers.utils.logging import disable_progress_bar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.tiny import write_tiny_model

STEPS = 20
SIZES: dict[str, Any] = dict(vocab_size=400, hidden_size=64, intermediate_size=128)
SIZES |= dict(num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
SIZES |= dict(max_position_embeddings=256, pad_token_id=2, bos_token_id=1, eos_token_id=2)
FAMILIES = {
    "llama": "LlamaConfig",
    "mistral": "MistralConfig",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "phi3": "Phi3Config",
    "gemma3": "Gemma3TextConfig",
    "gptj": "GPTJConfig",  # layer by layer is not possible: plain autograd
}
# Options that change what is computed, or how; for one family each unless named otherwise.
RUNS = {
    "float32": "--compute-dtype float32",
    "bfloat16": "--compute-dtype bfloat16",
    "saved": "--activations save",
    "recomputed": "--activations recompute",
    "plain base": "--quant none",
    "fp4": "--quant fp4 --no-double-quant --block-size 128",
    "packed vocabulary": "--quantize-head --quantize-embeddings",
    "8-bit state": "--optim adamw_8bit --lora-r 64",
    "DoRA": "--use-dora",
    "rsLoRA": "--use-rslora --lora-alpha 8 --lora-r 8",
    "QERA": "--init-lora-weights qera",
    "dropout": "--lora-dropout 0.1",
    "searched": "--quant-search",
    "trained whole": "--modules-to-save lm_head,norm",
    "LoRA+": "--loraplus-lr-ratio 4 --weight-decay 0.1 --lr-scheduler-type linear",
}
ON_GPU = {
    "graphs": "",
    "no graphs": "--no-cuda-graphs",
    "offloaded": "--activations offload",
    "saved": "--activations save",
    "recomputed": "--activations recompute",
    "8-bit state": "--optim adamw_8bit",
    "DoRA": "--use-dora",
    "float16": "--compute-dtype float16",
}
PLANS = {
    "llama2-7b on an H100": "--shape llama2-7b --card h100 --json",
    "qwen3-8b on a T4": "--shape qwen3-8b --card t4 --json",
    "llama3-8b in 24 GB": "--shape llama3-8b --card 4090 --batch-size 4 --max-length 4096 --json",
}


def digest(*paths: Path) -> str:
    """The SHA-256 of files, one after the other."""
    found = hashlib.sha256()
    for path in paths:
        found.update(path.read_bytes())
    return found.hexdigest()


def command(*words: str) -> str:
    """Run a command in this process and return what it prints.

    Raises:
        SystemExit: If it fails, with what it said.
    """
    from halfbyte.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(words))
    if code:
        raise SystemExit(f"halfbyte {' '.join(words)}: exit code {code}\n{err.getvalue()}")
    return out.getvalue()


class Digests:
    """Runs commands in a directory, and keeps the digests of what they leave.

    Args:
        work: The directory.
        device: Where to train.
    """

    def __init__(self, work: Path, device: str) -> None:
        self.work, self.device = work, device
        self.found: dict[str, str] = {}
        self.data = work / "train.jsonl"
        self.data.write_text("\n".join(map(json.dumps, _rows())))

    def keep(self, name: str, value: str) -> None:
        """Keep a digest, and print it."""
        self.found[name] = value
        print(f"{value[:16]}  {name}", flush=True)

    def _run(self, model: Path, output: Path, *options: str) -> None:
        words = ["train", f"--model={model}", f"--data={self.data}", f"--output={output}"]
        words += [f"--max-steps={STEPS}", "--batch-size=4", "--gradient-accumulation-steps=2"]
        words += ["--learning-rate=1e-3", "--samples=0", f"--device={self.device}"]
        command(*words, *["--deterministic"] * (self.device == "cuda"), *options)

    def train(self, name: str, model: Path, options: str) -> Path:
        """Train for `STEPS` steps; the run's directory."""
        output = self.work / name.replace(" ", "-").replace(",", "")
        self._run(model, output, *options.split())
        self.keep(name, digest(output / "adapter_model.safetensors"))
        self.keep(f"{name}, losses", hashlib.sha256(repr(_losses(output)).encode()).hexdigest())
        return output

    def resume(self, model: Path) -> None:
        """Stop a run after half of its steps, and resume it: it must end as the whole one."""
        whole = self.train("whole", model, "--save-steps 10")
        half = self.work / "resumed"
        (half / f"checkpoint-{STEPS // 2}").mkdir(parents=True)
        for file in (whole / f"checkpoint-{STEPS // 2}").iterdir():
            (half / f"checkpoint-{STEPS // 2}" / file.name).write_bytes(file.read_bytes())
        self._run(model, half, "--save-steps=10", "--resume")
        self.keep("resumed", digest(half / "adapter_model.safetensors"))
        if self.found["resumed"] != self.found["whole"]:
            raise SystemExit("a resumed run is not the whole one")

    def written(self, name: str, model: Path, run: Path) -> None:
        """What `merge`, `export` and `quantize` write."""
        device = f"--device={self.device}"
        for into in ("decoded", "original", "nf4"):
            out = self.work / f"{name}-{into}"
            command("merge", str(model), str(run), str(out), "--into", into, device)
            self.keep(f"{name}, merged into {into}", digest(*sorted(out.glob("*.safetensors"))))
        out = self.work / f"{name}-export"
        command("export", str(model), str(run), str(out), device)
        self.keep(f"{name}, exported", digest(*sorted(out.rglob("*.gguf"))))
        out = self.work / f"{name}-packed"
        command("quantize", str(model), str(out))
        self.keep(f"{name}, quantized", digest(*sorted(out.glob("*.safetensors"))))


def _rows() -> Iterator[dict[str, Any]]:
    for i in range(160):
        said = "The capital of France is Paris." + " Again, please." * (i * 7 % 11)
        question = {"role": "user", "content": f"What is the capital of France? {i}"}
        yield {"messages": [question, {"role": "assistant", "content": said}]}


def _losses(output: Path) -> list[float]:
    lines = (output / "journal.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if record["event"] == "step"]


def tiny(family: str, directory: Path) -> Path:
    """A tiny model of a family, with a tokenizer, in a directory."""
    write_tiny_model(directory)
    torch.manual_seed(0)
    sizes = SIZES | ({"head_dim": 16} if family in ("qwen3", "gemma3") else {})
    if family == "gptj":
        sizes = dict(vocab_size=400, n_embd=64, n_layer=3, n_head=4, n_positions=256, rotary_dim=8)
        sizes |= dict(bos_token_id=1, eos_token_id=2)
    config = getattr(transformers, FAMILIES[family])(**sizes)
    for old in directory.glob("*.safetensors"):
        old.unlink()
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def of_everything(work: Path, device: str, gguf: Path | None) -> dict[str, str]:
    """The digests, by name."""
    digests = Digests(work, device)
    models = {family: tiny(family, work / f"model-{family}") for family in FAMILIES}
    for family, model in models.items():
        digests.train(family, model, "")
    runs = RUNS if device == "cpu" else ON_GPU
    for name, options in runs.items():
        digests.train(f"llama, {name}", models["llama"], options)
    digests.resume(models["llama"])
    digests.written("llama", models["llama"], work / "llama")
    if gguf is not None:
        run = digests.train("SmolLM2", gguf, "")
        for name in ("float32", "bfloat16", "recomputed", "8-bit state", "DoRA", "plain base"):
            if name in runs:
                digests.train(f"SmolLM2, {name}", gguf, runs[name])
        digests.written("SmolLM2", gguf, run)
    for name, options in PLANS.items():
        printed = command("plan", *options.split())
        digests.keep(f"plan, {name}", hashlib.sha256(printed.encode()).hexdigest())
    return digests.found


def main() -> None:
    """Parse the command line, make the digests, compare them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--output", type=Path, help="file; a dated one in benchmarks/results")
    parser.add_argument("--gguf", type=Path, help="SmolLM2's file")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--compare", type=Path, help="digests from before, which must be the same")
    args = parser.parse_args()
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        found = of_everything(Path(scratch), args.device, args.gguf)
    write("digests", args.output, digests=found)
    if args.compare is not None:
        before = json.loads(args.compare.read_text())["digests"]
        differ = sorted(n for n in before.keys() | found.keys() if before.get(n) != found.get(n))
        if differ:
            raise SystemExit(f"{len(differ)} of {len(before)} differ: {'; '.join(differ)}")
        print(f"all {len(before)} are the same")


if __name__ == "__main__":
    main()
