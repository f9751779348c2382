"""Time and memory of loading a model in 4 bits on a GPU, compared with the peers.

    python benchmarks/gpu_load.py

A checkpoint of Llama-2-7B's shape with random weights, bfloat16 in files of 2 GB, is created once
in a temporary directory (13.5 GB of disk). Every contestant loads it in its own process, so that
the allocator's figures are its own: NF4, double quantisation, bfloat16 for the rest. The files are
read once before, so that all find them in the page cache. The clock starts when everything is
imported, the CUDA context exists and one small weight has been quantised (which compiles, and loads
the device's code; `first_s`); it stops when the device is done. *limit* is the time for the bytes
alone: reading the files into one buffer, and copying as many from page-locked memory to the GPU.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import Row, require_cuda, write

MODEL = dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, vocab_size=32000)
MODEL |= dict(num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=4096)
Loader = Callable[[], Any]


def make(directory: Path, sizes: dict[str, int], device: str) -> None:
    """Write a checkpoint of random weights, and a tokenizer of a few words."""
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    ids = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    config = LlamaConfig(**sizes, **ids, tie_word_embeddings=False, dtype="bfloat16")
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory, max_shard_size="2GB")
    special = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"word{i}" for i in range(100))]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(directory)


def halfbyte_loader(directory: Path, device: str) -> Loader:
    from halfbyte.checkpoint.base_model import load_base
    from halfbyte.models.build import BaseRecipe
    from halfbyte.quant import quantize

    quantize(torch.randn(64, 64, device=device, dtype=torch.bfloat16))
    recipe = BaseRecipe(quant="nf4", compute_dtype=torch.bfloat16, device=device)
    return lambda: load_base(str(directory), recipe)


def small_weight_of_bitsandbytes(device: str) -> None:
    from bitsandbytes.functional import quantize_4bit

    weight = torch.randn(64, 64, device=device, dtype=torch.bfloat16)
    quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")


def unsloth_loader(directory: Path, device: str) -> Loader:
    from unsloth import FastLanguageModel  # first, as it asks

    small_weight_of_bitsandbytes(device)
    return lambda: FastLanguageModel.from_pretrained(
        str(directory),
        max_seq_length=4096,
        dtype=torch.bfloat16,
        load_in_4bit=True,
        local_files_only=True,
    )


def transformers_loader(directory: Path, device: str) -> Loader:
    import transformers.integrations.bitsandbytes  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    small_weight_of_bitsandbytes(device)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )

    def load() -> Any:
        model = AutoModelForCausalLM.from_pretrained(
            directory,
            quantization_config=config,
            dtype=torch.bfloat16,
            device_map={"": 0 if device == "cuda" else device},
        )
        return model, AutoTokenizer.from_pretrained(directory)

    return load


LOADERS: dict[str, Callable[[Path, str], Loader]] = {
    "halfbyte": halfbyte_loader,
    "unsloth": unsloth_loader,
    "transformers-bitsandbytes": transformers_loader,
}


def timed_load(contestant: str, directory: Path) -> Row:
    """Load once, in this process, which should have done nothing else."""
    start = time.perf_counter()
    load = LOADERS[contestant](directory, "cuda")
    import transformers.models.llama.modeling_llama  # noqa: F401  # otherwise read when asked for

    torch.cuda.synchronize()
    first = time.perf_counter() - start
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    model = load()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    row = {"seconds": seconds, "first_s": first, "before_bytes": before}
    row["peak_bytes"] = torch.cuda.max_memory_allocated()
    row["reserved_peak_bytes"] = torch.cuda.max_memory_reserved()
    row["final_bytes"] = torch.cuda.memory_allocated()
    del model
    return row


def read(files: list[Path]) -> float:
    """Seconds to read the files into one buffer."""
    buffer = memoryview(bytearray(64_000_000))
    start = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def copying(nbytes: int) -> float:
    """Seconds to copy so many bytes from pinned memory to the card, at the rate of 1 GB."""
    source = torch.ones(1_000_000_000, dtype=torch.uint8).pin_memory()
    target = torch.empty_like(source, device="cuda")
    target.copy_(source)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(4):
        target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / 4 * nbytes / source.nbytes


def in_a_process(work: str, directory: Path, scratch: Path) -> Row:
    """Run this file for one piece of work, and return what it found, or why it did not."""
    result = scratch / "result.json"
    result.unlink(missing_ok=True)
    call = [sys.executable, str(Path(__file__).resolve()), "--worker", work]
    call += ["--directory", str(directory), "--output", str(result)]
    paths = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    settings = {"UNSLOTH_DISABLE_STATISTICS": "1", "HF_HUB_OFFLINE": "1"}
    settings["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, paths))
    if work == "unsloth":  # it sets this itself where it is imported before torch
        settings["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    done = subprocess.run(
        call, cwd=scratch, env=os.environ | settings, capture_output=True, text=True
    )
    if done.returncode or not result.exists():
        lines = done.stderr.strip().splitlines()
        print("\n".join(lines[-8:]), file=sys.stderr)
        return {"failed": lines[-1][:300] if lines else f"exit code {done.returncode}"}
    return dict(json.loads(result.read_text()))


def work_of(args: argparse.Namespace) -> None:
    """What a process of `in_a_process` does."""
    if args.worker == "make":
        make(args.directory, MODEL, "cuda")
        row: Row = {}
    elif args.worker == "limit":
        files = sorted(args.directory.glob("*.safetensors"))
        total = sum(path.stat().st_size for path in files)
        read(files)  # brings them into the page cache
        row = {"bytes": total, "read_s": read(files), "copy_to_device_s": copying(total)}
    else:
        row = timed_load(args.worker, args.directory)
    args.output.write_text(json.dumps(row))


def report(rows: dict[str, Row]) -> None:
    """Print the table: seconds, and GB beyond the finished model."""
    print(
        f"\n{'':28s}{'seconds':>9s}{'peak - final':>14s}{'reserved - final':>18s}{'final GB':>10s}"
    )
    for name, row in rows.items():
        if name == "limit" or "failed" in row:
            print(f"{name:28s} {row}")
            continue
        peak, reserved = (
            (row[key] - row["final_bytes"]) / 1e9 for key in ("peak_bytes", "reserved_peak_bytes")
        )
        row |= {"peak_over_final_gb": round(peak, 3), "reserved_over_final_gb": round(reserved, 3)}
        final = row["final_bytes"] / 1e9
        print(f"{name:28s}{row['seconds']:9.2f}{peak:14.3f}{reserved:18.3f}{final:10.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(LOADERS), default=list(LOADERS))
    parser.add_argument("--rounds", type=int, default=1, help="the fastest of each is told")
    parser.add_argument("--directory", type=Path, help="a checkpoint made before, or to be kept")
    parser.add_argument("--output", type=Path, help="file; a dated one in benchmarks/results")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    require_cuda()
    if args.worker:
        work_of(args)
        return
    rows: dict[str, Row] = {}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        directory = (args.directory or scratch / "model").resolve()
        start = time.perf_counter()
        if not (directory / "config.json").exists():
            if failed := in_a_process("make", directory, scratch).get("failed"):
                raise SystemExit(f"no checkpoint could be made: {failed}")
            print(f"checkpoint made in {time.perf_counter() - start:.0f} s", flush=True)
        rows["limit"] = in_a_process("limit", directory, scratch)
        print(f"limit: {rows['limit']}", flush=True)
        for _ in range(args.rounds):
            for contestant in args.only:
                row = in_a_process(contestant, directory, scratch)
                print(f"{contestant}: {row}", flush=True)
                held = rows.setdefault(contestant, row)
                if row.get("seconds", float("inf")) < held.get("seconds", float("inf")):
                    rows[contestant] = row
    report(rows)
    write("gpu_load", args.output, model=MODEL, rounds=args.rounds, rows=rows)


if __name__ == "__main__":
    main()
