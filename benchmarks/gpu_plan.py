"""Compares the plan's predictions with the measurements of ``gpu_step.py``; needs no GPU.

    python benchmarks/gpu_plan.py benchmarks/results/*_gpu_step*.json

For each step of ours in these files: the peak predicted by `plan.ledger`, the time predicted by
`plan.roofline` for the GPU, and their errors in percent. Steps of more than one part are planned as
they are made now, part by part; in older files all micro-batches were kept together.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from halfbyte.plan.holding import Holding
from halfbyte.plan.ledger import Run, ledger
from halfbyte.plan.model_shape import config_of, shape_of_config
from halfbyte.plan.policy import ActivationPolicy
from halfbyte.plan.roofline import GpuSpec, gpu_of_driver, step_seconds

RANK = 16


def run_of(
    options: dict[str, Any], row: dict[str, Any], contestant: str, config: str, card: GpuSpec
) -> Run:
    """The run that a row of gpu_step.py was made by."""
    micro, _, rest = config.rpartition("*")
    batch, length = rest.split("x")
    layers, keep = options["layers"], options["keep"]
    asked = ActivationPolicy(layers if keep == "save" else 0)
    if keep == "offload":
        asked = ActivationPolicy.offloading(layers)
    noted = row.get("attention_checkpoint", row.get("notes", False))  # of older rows
    offloaded = row.get("offloaded_layers", asked.offloaded)
    policy = ActivationPolicy(
        row.get("saved_layers", asked.saved),
        offloaded,
        row.get("attention_checkpoints", offloaded if noted else 0),
        row.get("decoded_layers", 0),
    )
    return Run(
        Holding("none" if "bf16" in contestant else "nf4"),
        RANK,
        batch=int(batch),
        length=int(length),
        micro_batches=int(micro or 1),
        optimizer="adamw_8bit" if options.get("state_bits", 32) == 8 else "adamw",
        policy=policy,
        gpu=card.gpu,
        embedding_on_host=True,
        fp8="fp8" in contestant,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path)
    args = parser.parse_args()
    print(f"{'':44s} {'peak GB':>8s} {'plan':>7s} {'off':>7s} {'ms':>8s} {'plan':>7s} {'off':>7s}")
    for path in args.results:
        found = json.loads(path.read_text())
        card = gpu_of_driver(found["device"])
        if card is None:
            raise SystemExit(f"{path}: {found['device']} is not in the table of plan/roofline.py")
        name = f"{found['shape']},num_hidden_layers={found['layers']}"
        shape = shape_of_config(config_of(name), name)
        for contestant, rows in found["rows"].items():
            for config, row in rows.items():
                if not contestant.startswith("halfbyte") or "peak_gb" not in row:
                    continue
                run = run_of(found, row, contestant, config, card)
                peak = ledger(shape, run).peak / 1e9
                ms = step_seconds(shape, run, card).total * 1e3
                print(
                    f"{found['shape']} {contestant} {config} {found['keep']:<9s}".ljust(44),
                    f"{row['peak_gb']:8.2f} {peak:7.2f} {100 * (peak / row['peak_gb'] - 1):+6.1f}%"
                    f" {row['ms']:8.1f} {ms:7.1f} {100 * (ms / row['ms'] - 1):+6.1f}%",
                )


if __name__ == "__main__":
    main()
