"""Training steps of a 7B or 8B shape on one GPU: time and memory, compared with PEFT.

    python benchmarks/gpu_step.py --configs 1x512 1x2048 4x2048 16*1x512
    python benchmarks/gpu_step.py --configs 4x2048 --keep offload --only halfbyte-nf4 halfbyte-fp8

A config is batch x length, or micro-batches*batch x length for one optimizer step. Random weights,
NF4 with double quantisation (or 16-bit, for LoRA), r = 16 on all linears, no dropout, bfloat16,
every position supervised, AdamW. ``--keep recompute`` recomputes every layer in backward,
``offload`` does so with the layers' inputs in host memory, ``save`` recomputes none, and keeps
decoded weights in the remaining memory. Each has its own process and builds its model on the GPU
without a checkpoint. A figure is the median of the steps after the first ten (``--warm``; peers:
three); memory is torch's peak over all steps, including the first and the capture of graphs.
``first_s`` is the time from the finished model to the end of its first step: measuring memory,
compiling, capturing graphs and the step. *floor* is the bare matrix products of a step: forward,
recomputed forward and dx of every linear. *halfbyte-fp8* is *halfbyte-nf4* with ``compute: fp8``.
"""

import argparse
import gc
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_load
import torch
from measuring import Row, require_cuda, write

from halfbyte.runtime.precision import configure_allocators

SHAPES = {
    "llama2-7b": dict(hidden_size=4096, intermediate_size=11008, vocab_size=32000),
    "llama3-8b": dict(hidden_size=4096, intermediate_size=14336, vocab_size=128256),
}
SHAPES["llama2-7b"] |= dict(num_attention_heads=32, num_key_value_heads=32)
SHAPES["llama3-8b"] |= dict(num_attention_heads=32, num_key_value_heads=8)
CONTESTANTS = ("halfbyte-nf4", "halfbyte-fp8", "halfbyte-bf16", "peft-bitsandbytes", "unsloth")
RANK = 16


def config_of(shape: str, layers: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        **SHAPES[shape],
        num_hidden_layers=layers,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )


def random_tensor(shape: tuple[int, ...]) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16, device="cuda")
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda").mul_(0.02)


def ours(config: Any, quant: str, args: argparse.Namespace) -> Callable[..., Callable[..., Any]]:
    """Build the model once; each call returns a step of a new engine."""
    from halfbyte.config.schema import TrainConfig
    from halfbyte.engine.layerwise import LayerEngine
    from halfbyte.engine.packing import Batch
    from halfbyte.layers.vocabulary import embedding_to_host
    from halfbyte.linear.lora import LoRAConfig, adapter_parameters, attach
    from halfbyte.models.build import BaseRecipe, build, finalize, load_tensor
    from halfbyte.train.loading import choose_products
    from halfbyte.train.schedule import Schedule
    from halfbyte.train.trainer import Trainer

    recipe = BaseRecipe(quant=quant, compute_dtype=torch.bfloat16, device="cuda")
    model = build(config, recipe)
    with torch.device("meta"):
        from transformers import AutoModelForCausalLM

        names = AutoModelForCausalLM.from_config(config).state_dict()
    for name, tensor in names.items():
        load_tensor(model, name, random_tensor(tuple(tensor.shape)))
    finalize(model)
    attach(model, LoRAConfig(r=RANK, alpha=RANK), seed=0)
    embedding_to_host(model)
    options: Row = {"model": "m", "data": "d", "output": "o", "learning_rate": 1e-4}
    options["optim"] = "adamw_8bit" if args.state_bits == 8 else "adamw"
    options |= {"activations": args.keep, "memory_budget": args.memory_budget}
    options["compute"] = "fp8" if args.worker == "halfbyte-fp8" else "auto"
    settings = TrainConfig.model_validate(options)
    print(*choose_products(model, settings), file=sys.stderr)

    def fresh(micro: int, batch: int, length: int) -> Callable[..., Any]:
        engine = LayerEngine(model, fuse=True, graphs=not args.no_graphs)
        schedule = Schedule(1e-4, "constant", 0, 100)
        trainer = Trainer(engine, adapter_parameters(model), settings, schedule)
        plan = trainer.fit([[(batch, length)] * micro], [[length] * batch * micro])
        trainer.capture()

        def step(batches: list[torch.Tensor], _supervised: float) -> Any:
            result = trainer.step(0, [Batch(ids, ids) for ids in batches])
            for note in engine.messages:
                print(note, file=sys.stderr)
            engine.messages.clear()
            return result.loss

        step.plan = plan  # type: ignore[attr-defined]
        return step

    return fresh


def peft(config: Any, *, saved: bool) -> Callable[..., Callable[..., Any]]:
    import bitsandbytes as bnb
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.set_attn_implementation("sdpa")
    for path, module in list(model.named_modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = random_tensor(tuple(parameter.shape))
            setattr(module, name, torch.nn.Parameter(value, requires_grad=False))
        if isinstance(module, torch.nn.Linear) and path != "lm_head":
            four = bnb.nn.Linear4bit(
                module.in_features,
                module.out_features,
                bias=False,
                compute_dtype=torch.bfloat16,
                quant_type="nf4",
                device="meta",
            )
            four.weight = bnb.nn.Params4bit(
                module.weight.data.cpu(), requires_grad=False, quant_type="nf4", module=four
            ).to("cuda")
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, four)
            module.weight = None
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config, device="cuda")
    model.is_loaded_in_4bit = True
    model = prepare_model_for_kbit_training(
        model,
        use_gradient_checkpointing=not saved,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    return stepping(get_peft_model(model, lora).train())


def unsloth(directory: Path) -> tuple[Callable[..., Callable[..., Any]], float]:
    """Unsloth and the seconds it loads; it always runs layers again, inputs on the host."""
    from unsloth import FastLanguageModel  # first, as it asks

    start = time.perf_counter()
    model, _ = FastLanguageModel.from_pretrained(
        str(directory),
        max_seq_length=4096,
        dtype=torch.bfloat16,
        load_in_4bit=True,
        local_files_only=True,
    )
    loaded = time.perf_counter() - start
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = FastLanguageModel.get_peft_model(
        model,
        r=RANK,
        lora_alpha=RANK,
        target_modules=targets,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth",
        random_state=0,
    )
    FastLanguageModel.for_training(model)
    return stepping(model.train()), loaded


def stepping(model: Any) -> Callable[..., Callable[..., Any]]:
    """Steps of a peer's model under autocast, with torch's fused AdamW."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step(batches: list[torch.Tensor], supervised: float) -> Any:
        for host in batches:
            ids = host.cuda()
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss / len(batches)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return lambda *_: step


def floor_ms(config: Any, tokens: int) -> float:
    """Milliseconds of the bare products of a step, looped for a second."""
    h, f = config.hidden_size, config.intermediate_size
    kv = h // config.num_attention_heads * config.num_key_value_heads
    shapes = [(h, h), (kv, h), (kv, h), (h, h), (f, h), (f, h), (h, f)]
    plan = []
    for n, k in shapes:
        x, w, dy = (random_tensor(size) for size in ((tokens, k), (n, k), (tokens, n)))
        plan += [(x, w.t(), dy)] * 2 + [(dy, w, x)]

    def layer() -> None:
        for left, right, out in plan:
            torch.mm(left, right, out=torch.empty_like(out))

    for _ in range(20):
        layer()
    torch.cuda.synchronize()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < 1.0:
        for _ in range(10):
            layer()
        torch.cuda.synchronize()
        count += 10
    return (time.perf_counter() - start) / count * 1e3 * config.num_hidden_layers


def products(config: Any, tokens: int, length: int, row: Row) -> float:
    """Arithmetic of a step's products: linears forward and dx, attention, and what is run again."""
    h, f = config.hidden_size, config.intermediate_size
    kv = h // config.num_attention_heads * config.num_key_value_heads
    forward = 2 * (2 * h * h + 2 * h * kv + 3 * h * f)
    attention = 2 * length * h  # two products, causal: half of each
    again = config.num_hidden_layers - row["saved_layers"]
    kept = row["attention_checkpoints"]
    all_layers = config.num_hidden_layers * (2 * forward + 3.5 * attention)
    # The last product of a layer is not run again.
    all_layers += again * (forward - 2 * h * f + attention) - kept * (2 * h * h + attention)
    return float(tokens * (all_layers + 4 * h * config.vocab_size))


def shares(step: Callable[[], Any], most: int = 0) -> Row:
    """Of one step: which part of its time the card decodes, sees to adapters, and waits.

    With ``most``, also the milliseconds of that many kernels, and of copies to and from the host.

    Adapters are the kernels of triton_lora.py and what has a side of at most 32 in cuBLAS'
    tiles; from 2048 rows on, part of their arithmetic is in the base's products and not here.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    on_card = torch.autograd.DeviceType.CUDA
    events = [e for e in profiled.events() if e.device_type == on_card]
    kernels = [e for e in events if not e.name.startswith(("Memcpy", "Memset"))]
    spans = sorted((e.time_range.start, e.time_range.end) for e in kernels)
    whole, busy, end = max(stop for _, stop in spans) - spans[0][0], 0.0, spans[0][0]
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)

    def adapters(name: str) -> bool:
        if name.startswith(("_add_low_rank", "_adapter_pass", "_sum_parts", "_lay_out")):
            return True
        tile = re.match(r"nvjet_\w+?_(\d+)x(\d+)_", name)
        return "splitKreduce" in name or (tile is not None and min(map(int, tile.groups())) <= 32)

    def share(wanted: Callable[[str], bool]) -> float:
        return round(sum(e.device_time_total for e in kernels if wanted(e.name)) / whole, 3)

    slowest: dict[str, Row] = {}
    if most:
        total: dict[str, float] = {}
        for e in events:
            name = e.name[:60]
            total[name] = total.get(name, 0.0) + e.device_time_total / 1e3
        ranked = sorted(total.items(), key=lambda item: -item[1])[:most]
        slowest = {"kernels_ms": {name: round(ms, 1) for name, ms in ranked}}
    return slowest | {
        "decode_share": share(lambda name: name.startswith("_decode")),
        "adapter_share": share(adapters),
        "waiting_share": round(1 - busy / whole, 3),
        "kernels": len(kernels),
    }


def parsed(text: str) -> tuple[int, int, int]:
    """Micro-batches, batch and length of ``16*1x512``."""
    micro, _, rest = text.rpartition("*")
    batch, length = rest.split("x")
    return int(micro or 1), int(batch), int(length)


def work(args: argparse.Namespace) -> None:
    """One contestant, in this process."""
    config = config_of(args.shape, args.layers)
    rows: dict[str, Row] = {}
    if args.worker.startswith("halfbyte"):  # as a run does
        configure_allocators()
    if args.worker == "floor":
        for text in args.configs:
            micro, batch, length = parsed(text)
            rows[text] = {"ms": round(floor_ms(config, micro * batch * length), 1)}
        args.output.write_text(json.dumps(rows))
        return
    theirs, loaded = not args.worker.startswith("halfbyte"), None
    if args.worker == "unsloth":
        make, loaded = unsloth(args.checkpoint)
    elif theirs:
        make = peft(config, saved=args.keep == "save")
    else:
        make = ours(config, "none" if "bf16" in args.worker else "nf4", args)
    torch.cuda.empty_cache()
    resident = torch.cuda.memory_allocated()
    for text in args.configs + ([] if theirs else args.also):
        micro, batch, length = parsed(text)
        step = None
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        step, times = make(micro, batch, length), []
        first = 0.0
        warm, count = (3, 7) if theirs else (args.warm, args.warm + args.steps)
        generator = torch.Generator().manual_seed(0)
        for i in range(count):
            ids = torch.randint(3, config.vocab_size, (micro, batch, length), generator=generator)
            torch.cuda.synchronize()
            start = time.perf_counter()
            loss = float(step(list(ids), float(ids.numel())))
            torch.cuda.synchronize()
            first = first or time.perf_counter() - began
            if i >= warm:
                times.append(time.perf_counter() - start)
        seconds = statistics.median(times)
        rows[text] = {
            "ms": round(seconds * 1e3, 1),
            "first_s": round(first, 2),
            "tokens_per_s": round(micro * batch * length / seconds),
            "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
            "reserved_gb": round(torch.cuda.max_memory_reserved() / 1e9, 2),
            "resident_gb": round(resident / 1e9, 2),
            "loss": round(loss, 4),
        }
        if loaded is not None:
            rows[text]["load_s"] = round(loaded, 2)
        plan = getattr(step, "plan", None)
        if plan is not None:
            rows[text]["predicted_gb"] = round(plan.predicted_bytes / 1e9, 2)
            rows[text]["predicted_reserved_gb"] = round(plan.reserved_bytes / 1e9, 2)
            rows[text]["saved_layers"] = plan.policy.saved
            rows[text]["offloaded_layers"] = plan.policy.offloaded
            rows[text]["every_nth_input"] = plan.policy.every
            rows[text]["host_gb"] = round(plan.host_bytes / 1e9, 1)
            rows[text]["attention_checkpoints"] = plan.policy.attention_checkpoints
            rows[text]["decoded_layers"] = plan.policy.decoded
        if not theirs and not args.only_steps:
            rows[text] |= shares(lambda: step(list(ids), float(ids.numel())), args.kernels)  # noqa: B023
        if not theirs:
            flops = products(config, micro * batch * length, length, rows[text])
            rows[text]["tflops"] = round(flops / seconds / 1e12)
        print(args.worker, text, rows[text], file=sys.stderr, flush=True)
    args.output.write_text(json.dumps(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="llama2-7b")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--configs", nargs="+", default=["1x512", "1x2048", "4x2048"])
    known = ["floor", *CONTESTANTS]
    parser.add_argument("--also", nargs="+", default=[], help="configs that peers do not run")
    parser.add_argument("--only", nargs="+", choices=known, default=known)
    parser.add_argument("--steps", type=int, default=20, help="timed steps of ours")
    parser.add_argument("--warm", type=int, default=10, help="steps of ours before these")
    parser.add_argument("--only-steps", action="store_true", help="no step is profiled")
    parser.add_argument("--kernels", type=int, default=0, help="also time so many kernels")
    parser.add_argument(
        "--keep", choices=["recompute", "offload", "save", "auto"], default="recompute"
    )
    parser.add_argument("--memory-budget", type=int, help="bytes, with --keep auto")
    parser.add_argument("--state-bits", type=int, choices=[8, 32], default=8)
    parser.add_argument("--no-graphs", action="store_true")
    parser.add_argument("--output", type=Path, help="file; a dated one in benchmarks/results")
    about = "a directory for unsloth's checkpoint, made by gpu_load.py's make if empty"
    parser.add_argument("--checkpoint", type=Path, default=Path("/dev/shm/step"), help=about)
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    require_cuda()
    if args.worker:
        work(args)
        return
    if "unsloth" in args.only and not (args.checkpoint / "config.json").exists():
        sizes = {"num_hidden_layers": args.layers, "max_position_embeddings": 8192}
        gpu_load.make(args.checkpoint, SHAPES[args.shape] | sizes, "cuda")
        torch.cuda.empty_cache()
    found: dict[str, Any] = {}
    options = {"shape": args.shape, "layers": args.layers, "keep": args.keep}
    options |= {"state_bits": args.state_bits, "memory_budget": args.memory_budget}
    with tempfile.TemporaryDirectory() as name:
        result = Path(name) / "result.json"
        for contestant in args.only:
            result.unlink(missing_ok=True)
            call = [
                sys.executable,
                str(Path(__file__).resolve()),
                "--worker",
                contestant,
                "--output",
                str(result),
            ]
            call += ["--shape", args.shape, "--layers", str(args.layers), "--configs"]
            call += [*args.configs, "--steps", str(args.steps), "--keep", args.keep]
            call += ["--also", *args.also] if args.also else []
            call += ["--checkpoint", str(args.checkpoint)]
            call += ["--state-bits", str(args.state_bits)]
            call += ["--warm", str(args.warm), "--kernels", str(args.kernels)]
            call += ["--memory-budget", str(args.memory_budget)] * bool(args.memory_budget)
            call += ["--no-graphs"] * args.no_graphs + ["--only-steps"] * args.only_steps
            # Unsloth writes what it compiles where it is started, and wants expandable segments.
            settings = {"UNSLOTH_DISABLE_STATISTICS": "1", "HF_HUB_OFFLINE": "1"}
            paths = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
            settings["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, paths))
            if contestant == "unsloth":
                settings["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
            done = subprocess.run(
                call, cwd=name, env=os.environ | settings, stderr=subprocess.PIPE, text=True
            )
            if args.verbose or done.returncode:
                print("\n".join(done.stderr.strip().splitlines()[-12:]), file=sys.stderr)
            if done.returncode:
                found[contestant] = {"failed": done.stderr.strip().splitlines()[-1:]}
            else:
                found[contestant] = json.loads(result.read_text())
            print(f"{contestant:22s}", json.dumps(found[contestant]), flush=True)
            # After each: a run that is cut off has what it found.
            write("gpu_step", args.output, **options, rows=found)


if __name__ == "__main__":
    main()
