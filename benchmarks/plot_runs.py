"""Bar chart of whole runs on a GPU: steady speed and peak memory, as docs/benchmarks.svg.

    python benchmarks/plot_runs.py

Reads one result of ``gpu_run.py``. The same rows always give the same file, and the chart has its
own background, so it is readable on light and dark pages.
"""

import argparse
import json
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "2026-11-29_gpu_run_peers.json"
CHART = ROOT / "docs" / "benchmarks.svg"

BARS = {  # row of the result: its label
    "halfbyte": "halfbyte, default options",
    "halfbyte-24GB": "halfbyte, --memory-budget 24GB",
    "halfbyte-offload": "halfbyte, --activations offload",
    "unsloth-packed": "Unsloth + TRL, packing=True",
    "unsloth": "Unsloth + TRL",
    "trl-liger": "TRL + bitsandbytes + Liger",
}
PANELS = (  # field of a row, heading, format of a value, left edge in pixels
    ("steady_tokens_per_s", "tokens/s, steady (more is better)", ",.0f", 262),
    ("peak_gb", "peak allocated, GB (less is better)", ".2f", 580),
)
WIDTH, BAR, PITCH, TOP, LONGEST = 880, 20, 30, 84, 230  # pixels
OURS, PEERS, INK, MUTED = "#0969da", "#8c959f", "#1f2328", "#57606a"


def text(x: float, y: float, content: str, attributes: str = "") -> str:
    """A line of text as SVG, with its left end at ``x`` and its baseline at ``y``."""
    place = f'<text x="{x:g}" y="{y:g}" {attributes}'
    return f"{place.rstrip()}>{escape(content)}</text>"


def chart(result: dict[str, Any]) -> str:
    """The chart of a result as SVG; raises ``KeyError`` where a row or a field is missing."""
    rows = {name: result["rows"][name] for name in BARS}
    height = TOP + PITCH * len(rows) + 10
    versions = result["versions"]
    title = f"QLoRA of Llama-2-7B's shape, {result['layers']} layers, on one {result['device']}"
    subtitle = (
        f"{result['steps']} steps of {result['batch'] * result['accumulation']} chats of up to "
        f"{result['longest']} tokens · {result['date'][:10]} · torch {versions['torch']}, "
        f"TRL {versions['trl']}, Unsloth {versions['unsloth']}"
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" role="img" font-family="system-ui, sans-serif" font-size="13" '
        f'fill="{INK}">',
        f"<title>{escape(title)}</title>",
        f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="6" fill="#ffffff" '
        'stroke="#d0d7de"/>',
        text(16, 26, title, 'font-size="15" font-weight="600"'),
        text(16, 46, subtitle, f'font-size="12" fill="{MUTED}"'),
    ]
    for field, heading, form, left in PANELS:
        parts.append(text(left, TOP - 10, heading, f'font-size="12" fill="{MUTED}"'))
        largest = max(row[field] for row in rows.values())
        for index, (name, row) in enumerate(rows.items()):
            y, width = TOP + PITCH * index, LONGEST * row[field] / largest
            colour = OURS if name.startswith("halfbyte") else PEERS
            parts.append(
                f'<rect x="{left}" y="{y}" width="{width:.1f}" height="{BAR}" rx="2" '
                f'fill="{colour}"/>'
            )
            parts.append(text(round(left + width + 6, 1), y + 15, format(row[field], form)))
    for index, label in enumerate(BARS.values()):
        parts.append(text(16, TOP + PITCH * index + 15, label))
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--output", type=Path, default=CHART)
    args = parser.parse_args()
    args.output.write_text(chart(json.loads(args.result.read_text())), encoding="utf-8")
    print(args.output)


if __name__ == "__main__":
    main()
