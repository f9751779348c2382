"""Generation on one GPU: tokens per second of a 7B shape, and whole commands on a real model.

    python benchmarks/gpu_generate.py
    python benchmarks/gpu_generate.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf

Without a model: Llama-2-7B's shape with random weights, NF4 with double quantisation, bfloat16 for
the rest, and prompts of 128 tokens. Ours is ``halfbyte.models.generate.generate``, as used by
``halfbyte generate`` after loading, with a word tokenizer and no end token; the peer is
transformers' own ``generate`` with bitsandbytes' linears. Both decode greedily. ``-lora`` has an
adapter of rank 16 on all linears, the peer's is PEFT's.

``tokens_per_s`` is of a whole call: prompts, preparation of weights, capture of a CUDA graph, and
answers. ``steady_tokens_per_s`` is of the steps alone: the difference between a long and a short
call. The first call, which compiles, is excluded. *limit* is memory bandwidth: weights read once
per step at the speed of a copy, packed and decoded. Each contestant has its own process.

With a model: ``halfbyte generate`` of 100 tokens, and ``halfbyte eval`` of 100 held-out chats of
``chats.py``, as typed, in wall seconds. *first* has an empty Triton cache, *again* a full one.
*imports* is the time of any program that imports torch and transformers and starts CUDA.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import chats
import gpu_run

SHAPES = {
    "llama2-7b": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)
    | dict(vocab_size=32000, num_attention_heads=32, num_key_value_heads=32),
    # For the tests, on a CPU.
    "tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    | dict(vocab_size=400, num_attention_heads=4, num_key_value_heads=2),
}
CONTESTANTS = ("halfbyte", "halfbyte-lora", "bitsandbytes", "bitsandbytes-lora")
PROMPT, RANK = 128, 16
COMMANDS = {
    "generate": "generate --model {model} --max-new-tokens 100 --prompt {prompt} {device} --json",
    "eval": "eval --model {model} --data {data} {device} --json",
}
ASKED = "Write a long story about the Queen of Hearts and the White Rabbit."

Row = dict[str, Any]
Answer = Callable[[Sequence[list[int]], int], int]


def config_of(shape: str) -> Any:
    from transformers import LlamaConfig

    # Nothing ends an answer.
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=4096, tie_word_embeddings=False)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    return config


def word_tokenizer(vocabulary: int) -> Any:
    """A token a word, and a template that adds nothing."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="w0", chat_template=template
    )


# --- contestants, each in a process of its own ----------------------------------------------------


def dtype_of(device: str) -> Any:
    import torch

    return torch.bfloat16 if device == "cuda" else torch.float32


def random_tensor(shape: tuple[int, ...], device: str) -> Any:
    import torch

    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype_of(device), device=device)
    return torch.randn(shape, dtype=dtype_of(device), device=device).mul_(0.02)


def halfbyte(config: Any, device: str, *, lora: bool) -> tuple[Answer, Row]:
    """What answers, and the bytes that a step reads."""
    import torch
    from transformers import AutoModelForCausalLM

    from halfbyte.linear.lora import LoRAConfig, attach
    from halfbyte.models.build import BaseRecipe, build, finalize, load_tensor
    from halfbyte.models.decoding import why_not
    from halfbyte.models.generate import generate

    model = build(config, BaseRecipe(compute_dtype=dtype_of(device), device=device))
    with torch.device("meta"):
        names = AutoModelForCausalLM.from_config(config).state_dict()
    for name, tensor in names.items():
        load_tensor(model, name, random_tensor(tuple(tensor.shape), device))
    finalize(model)
    if lora:
        attach(model, LoRAConfig(r=RANK, alpha=RANK), seed=0)
    if (why := why_not(model)) is not None:
        raise SystemExit(f"transformers would answer: {why}")
    tokenizer = word_tokenizer(config.vocab_size)

    def answer(prompts: Sequence[list[int]], count: int) -> int:
        asked = [[{"role": "user", "content": " ".join(f"w{i}" for i in ids)}] for ids in prompts]
        answers = generate(model, tokenizer, asked, max_new_tokens=count)
        return sum(len(text.split()) for text in answers)

    head = names["lm_head.weight"].numel() * dtype_of(device).itemsize
    packed = [m.quantized for m in model.modules() if getattr(m, "quantized", None) is not None]
    decoded = sum(q.numel for q in packed) * dtype_of(device).itemsize
    tensors = [tensor for q in packed for tensor in q.tensors().values()]
    read = {"packed_bytes": head + sum(tensor.nbytes for tensor in tensors)}
    return answer, read | {"decoded_bytes": head + decoded}


def bitsandbytes(config: Any, device: str, *, lora: bool) -> Answer:
    import bitsandbytes as bnb
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    dtype = dtype_of(device)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.set_attn_implementation("sdpa")
    for path, module in list(model.named_modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = random_tensor(tuple(parameter.shape), device)
            setattr(module, name, torch.nn.Parameter(value, requires_grad=False))
        if isinstance(module, torch.nn.Linear) and path != "lm_head":
            sizes = module.in_features, module.out_features
            kind = {"compute_dtype": dtype, "quant_type": "nf4", "device": "meta"}
            four = bnb.nn.Linear4bit(*sizes, bias=False, **kind)
            four.weight = bnb.nn.Params4bit(
                module.weight.data, requires_grad=False, quant_type="nf4", module=four
            ).to(device)
            model.set_submodule(path, four)
            module.weight = None
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    if lora:
        from peft import LoraConfig, get_peft_model

        targets = gpu_run.TARGETS
        kind = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, task_type="CAUSAL_LM")
        model = get_peft_model(model, kind)
    model.eval()

    def answer(prompts: Sequence[list[int]], count: int) -> int:
        ids = torch.tensor(prompts, device=device)
        settings = GenerationConfig(max_new_tokens=count, do_sample=False, pad_token_id=0)
        with torch.no_grad():
            mask = torch.ones_like(ids)
            out = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
        return int(out[:, ids.shape[1] :].numel())

    return answer


def timed(answer: Answer, batch: int, vocabulary: int, counts: tuple[int, int], calls: int) -> Row:
    """Figures of answers to ``batch`` prompts, of as many tokens as ``counts`` says."""
    import torch

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (batch, PROMPT), generator=generator).tolist()

    def seconds(count: int) -> float:
        start = time.perf_counter()
        made = answer(ids, count)  # the tokens are on the host: nothing is left to wait for
        taken = time.perf_counter() - start
        if made != batch * count:
            raise SystemExit(f"{made} tokens came, and {batch * count} were asked for")
        return taken

    short, long = counts
    row = {"first_call_s": round(seconds(short), 2)}
    times = {n: statistics.median(seconds(n) for _ in range(calls)) for n in counts}
    steady = batch * (long - short) / (times[long] - times[short])
    row |= {f"seconds_for_{n}": round(times[n], 3) for n in counts}
    row |= {"tokens_per_s": round(batch * long / times[long], 1)}
    return row | {"steady_tokens_per_s": round(steady, 1)}


def copy_bytes_per_s(nbytes: int = 2 * 10**9) -> float:
    """Bytes that a copy on the device reads and writes in a second, the median of 11."""
    import torch
    from measuring import device_us

    a = torch.empty(nbytes, dtype=torch.uint8, device="cuda").random_()
    b = torch.empty_like(a)
    b.copy_(a)
    taken = statistics.median(device_us(lambda: b.copy_(a)) for _ in range(11))
    return 2e6 * nbytes / taken


def work(args: argparse.Namespace) -> None:
    """One contestant, in this process; rows so far are written after each."""
    import torch

    torch.manual_seed(0)
    config, lora = config_of(args.shape), args.worker.endswith("-lora")
    ours = args.worker.startswith("halfbyte")
    details: Row = {}
    started = time.perf_counter()
    if ours:
        answer, details = halfbyte(config, args.device, lora=lora)
    else:
        answer = bitsandbytes(config, args.device, lora=lora)
    details["made_in_s"] = round(time.perf_counter() - started, 1)
    on_gpu = args.device == "cuda"
    if ours and on_gpu:
        speed = copy_bytes_per_s()
        details["copy_gb_per_s"] = round(speed / 1e9)
        for name in ("packed", "decoded"):
            details[f"{name}_limit_steps_per_s"] = round(speed / details[f"{name}_bytes"], 1)
    for batch in args.batches:
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        counts = (args.short, args.tokens if ours else args.peer_tokens)
        row = timed(answer, batch, config.vocab_size, counts, args.calls if ours else 1)
        if on_gpu:
            row["peak_gb"] = gpu_run.gigabytes(torch.cuda.max_memory_allocated())
        details[f"batch {batch}"] = row
        args.output.write_text(json.dumps(details))


# --- all of it ------------------------------------------------------------------------------------


def compete(args: argparse.Namespace, scratch: Path, keep: Callable[..., None]) -> dict[str, Row]:
    """Every contestant in turn; what is found is kept after each."""
    rows: dict[str, Row] = {}
    for name in args.only:
        place = scratch / name
        place.mkdir()
        call = [sys.executable, str(Path(__file__).resolve()), "--worker", name]
        call += ["--output", "found.json", "--shape", args.shape, "--device", args.device]
        for option in ("short", "tokens", "peer_tokens", "calls"):
            call += [f"--{option.replace('_', '-')}", str(getattr(args, option))]
        ended = gpu_run.run([*call, "--batches", *map(str, args.batches)], place, args.seconds)
        found = place / "found.json"
        rows[name] = json.loads(found.read_text()) if found.exists() else {}
        rows[name]["wall_s"] = round(ended.seconds, 1)
        if ended.problem:
            rows[name]["failed"] = ended.problem
        print(name, json.dumps(rows[name]), flush=True)
        keep(rows=rows)
    return rows


def commands(args: argparse.Namespace, scratch: Path, keep: Callable[..., None]) -> dict[str, Row]:
    """Every command, twice, as typed."""
    data = chats.write_chats(scratch / "held-out.jsonl", args.chats, held_out=True)
    device = f"--device={args.device}" if args.device != "cuda" else ""
    places = {"model": args.gguf, "data": data, "prompt": ASKED, "device": device}
    imports = "import torch, transformers"
    if args.device == "cuda":
        imports += '; torch.zeros(1, device="cuda")'
    ended = gpu_run.run([sys.executable, "-c", imports], scratch, args.seconds)
    rows: dict[str, Row] = {"imports": {"seconds": round(ended.seconds, 1)}}
    if ended.problem:
        rows["imports"]["failed"] = ended.problem
    for name, text in COMMANDS.items():
        rows[name] = {}
        words = filter(None, [word.format(**places) for word in text.split()])
        call = [sys.executable, "-m", "halfbyte", *words]
        # A cache of its own for each command: what one compiles another need not find.
        settings = {"TRITON_CACHE_DIR": str(scratch / f"triton-{name}")}
        for turn in ("first", "again"):
            ended = gpu_run.run(call, scratch, args.seconds, settings)
            rows[name][f"{turn}_s"] = round(ended.seconds, 1)
            if ended.problem:
                rows[name]["failed"] = ended.problem
        print(name, json.dumps(rows[name]), flush=True)
        keep(commands=rows)
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", type=Path, help="a model: time the commands on it, nothing else")
    parser.add_argument("--shape", choices=list(SHAPES), default="llama2-7b")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16], help="prompts at once")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--short", type=int, default=16, help="tokens of a short answer")
    parser.add_argument("--tokens", type=int, default=256, help="of a long one")
    parser.add_argument("--peer-tokens", type=int, default=64, help="of a long one of a peer")
    parser.add_argument("--calls", type=int, default=3, help="of ours for each length")
    parser.add_argument("--chats", type=int, default=100, help="held-out chats that `eval` reads")
    parser.add_argument("--seconds", type=float, default=180, help="limit of each process")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--output", type=Path, help="file; a dated one in benchmarks/results")
    parser.add_argument("--worker", choices=CONTESTANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.short < min(args.tokens, args.peer_tokens):
        parser.error("--short must be less than --tokens and --peer-tokens")
    args.gguf = args.gguf and args.gguf.resolve()
    return args


def main() -> None:
    args = parse()
    if args.worker:
        work(args)
        return
    from measuring import require_cuda, write

    if args.device == "cuda":
        require_cuda()
    script = "gpu_generate_commands" if args.gguf else "gpu_generate"
    options: Row = {"chats": args.chats, "host_cores": os.cpu_count()}
    if not args.gguf:
        asked = ("shape", "batches", "short", "tokens", "peer_tokens", "calls")
        options = {name: getattr(args, name) for name in asked} | {"prompt": PROMPT, "rank": RANK}

    def keep(**found: dict[str, Row]) -> None:
        write(script, args.output, **options, **found)

    with tempfile.TemporaryDirectory(prefix="gpu_generate") as name:
        rows = (commands if args.gguf else compete)(args, Path(name), keep)
    failed = [name for name, row in rows.items() if "failed" in row]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
