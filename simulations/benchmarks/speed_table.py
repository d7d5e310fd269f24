"""The tables of speed in simulations/README.md, from the result files: python simulations/benchmarks/speed_table.py"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SIMULATIONS = Path(__file__).resolve().parents[1]
MARKED = re.compile(r"(<!-- speed: (?P<machine>[\w.-]+) -->\n).*?(<!-- end of speed -->)", re.DOTALL)


def table(result: Mapping[str, Any]) -> str:
    """One machine's result as Markdown."""
    head = ["case", "plain", "product", "**ratio**", "product in float32", "GFLOP", "of the peak", "plain, MB", "product, MB"]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for case in result["cases"]:
        full = case.get("engine_float32_s")
        cells = [
            case["name"],
            f"{case['plain_s']:.2f} s",
            f"{case['engine_s']:.2f} s",
            f"**{case['ratio']:.1f}**",
            "-" if full is None else f"{full:.2f} s",
            f"{case['gflop']:.0f}",
            f"{case['peak_fraction']:.0%}",
            f"{case['plain_mb']:.0f}",
            f"{case['engine_mb']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    hardware, runtime = result["hardware"], result["runtime"]
    where = hardware["gpu"] if runtime["device"].startswith("cuda") else f"{hardware['cpu']}, {runtime['threads']} threads"
    note = (
        f"Seconds per iteration (five student steps and one generator step), medians of {result['repeats']}; {where}; the product computes in "
        f"{runtime['precision']}, in which a convolution is {result['bfloat16_gain']:.1f} times as fast there as in float32 (one thread); "
        f"peak {result['peak_gflops']:.0f} GFLOP/s. Commit {result['commit'][:10]}."
    )
    return "\n".join([*lines, "", note, ""])


def with_tables(text: str, results: Path) -> str:
    """Markdown with the tables between its markers replaced; a machine without a result file keeps what is there."""

    def replaced(match: re.Match[str]) -> str:
        path = results / f"{match['machine']}.json"
        return f"{match[1]}{table(json.loads(path.read_text(encoding='utf-8')))}{match[3]}" if path.exists() else match[0]

    return MARKED.sub(replaced, text)


if __name__ == "__main__":
    readme = SIMULATIONS / "README.md"
    readme.write_text(with_tables(readme.read_text(encoding="utf-8"), SIMULATIONS / "results" / "speed"), encoding="utf-8")
