"""What a run of `gpu_run.sh` found: the targets, what was measured, and published figures to set beside them.

python benchmarks/gpu_summary.py
"""

import json
import os

from common import RESULTS, table

# Published figures: what, seconds, memory, on what.
ANCHORS = (
    ("VideoChat3-4B, 2,048 frames", "20.4 s", "80.8 GB", "one H200"),
    ("Qwen3-VL, beside it", "44.5 s", "-", "one H200"),
    ("Video-XL-2, 2,048 frames", "12 s", "-", "hardware unstated"),
)


def end_to_end(name, value):
    """Looks a value up in the first row of an end-to-end result."""
    return f"end_to_end_{name}_gpu", lambda results: value(results[0])


# What, unit, the most that it may be, where it is.
TARGETS = (
    ("LLM prefill, 2,048 frames", "s", 3, end_to_end("2048", lambda row: row["seconds"]["prefill"])),
    ("tower, DTS and LLM, 2,048 frames", "s", 7, end_to_end("2048", lambda row: row["seconds"]["first"])),
    ("the same, 10,000 frames", "s", 45, end_to_end("10000", lambda row: row["seconds"]["first"])),
    ("peak memory, 10,000 frames", "GB", 48, end_to_end("10000", lambda row: row["peak_bytes"] / 1e9)),
    ("second question, 10,000 frames", "ms", 60, end_to_end("10000", lambda row: 1e3 * row["seconds"]["second"])),
    ("the same, from the host", "s", 1.5, end_to_end("10000", lambda row: row["seconds"]["second_from_host"])),
    ("decode step, 10,000 frames", "ms", None, end_to_end("10000", lambda row: 1e3 * row["seconds"]["token"])),
    (
        "peak against the plan, 10,000 frames",
        "x",
        None,
        end_to_end("10000", lambda row: row["peak_bytes"] / row["planned_peak_bytes"]),
    ),
    *(
        (f"{part}, share of a matrix product", "", None, (f"{name}_gpu", share))
        for part, name in (("tower", "tower"), ("DTS", "tower"), ("DTS channels-last", "tower_channels_last"))
        for share in [
            lambda results, part=part: (
                results["tower"][0]["tflop_per_second"]["tower" if part == "tower" else "compressor"]
                / results["tower"][0]["matrix_product_tflop_per_second"]
            )
        ]
    ),
)


def prefill_rows() -> list[list]:
    """All prefill results."""
    rows = []
    for name in ("prefill_2048", "prefill_10000", "flash", "flex", "full_10000"):
        if (line := read(f"{name}_gpu")) is not None:
            attention = line["configuration"]["attention"]
            for row in line["results"]:
                seconds = row.get("failed") or f"{row['seconds']:.3f}"
                rows.append([f"{row['tokens']:,}", row["mode"], attention, seconds])
    return rows


def read(name: str) -> dict | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def main() -> None:
    rows = []
    for what, unit, most, (name, value) in TARGETS:
        line = read(name)
        row = [what, "-" if most is None else f"<= {most} {unit}"]
        failed = line is not None and isinstance(line["results"], list) and "failed" in line["results"][0]
        if line is None or failed:
            rows.append([*row, line["results"][0]["failed"] if failed else "not measured", "-"])
            continue
        found = value(line["results"])
        said = "-" if most is None else "reached" if found <= most else "missed"
        rows.append([*row, f"{found:,.3g} {unit}".strip(), said])
    if "BENCHMARK_RESULTS" in os.environ:
        print("a rehearsal at toy size: the figures say nothing")
    table(["streaming, true size", "target", "measured", ""], rows)
    print()
    if found := prefill_rows():
        table(["prefill: tokens", "mode", "attention", "seconds"], found)
        print()
    table(["published", "seconds", "memory", "on"], [list(anchor) for anchor in ANCHORS])


if __name__ == "__main__":
    main()
