"""Pictures of a needle-in-a-haystack result: heat maps (depth x frames), and which chunks questions reloaded.

What is surprising:
* Frames are drawn as evenly spaced columns, as in the published figures, not to scale.
* The chunk picture shows single questions (one a depth, at the longest length): what the choice looks like. How often
  it is right over all questions is the second heat map.

    python evaluation/plots.py RESULT.json
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")  # no window, also where there is a display

import matplotlib.pyplot as plt  # noqa: E402  (the backend comes first)
from matplotlib.lines import Line2D  # noqa: E402
from matplotlib.patches import Patch  # noqa: E402

TITLES = {"single": "Single-hop", "multi_hop": "Multi-hop (two cards)", "published_single": "Published, single-hop"}
DPI = 150
GRID = {"edgecolors": "white", "linewidth": 1.5}
# Below this lightness of the cell's colour its number is written in white.
DARK = 0.45
# Scores below this share of the largest are drawn as this share.
SCORE_RANGE = 1e-6
DENSE_COLOR, POOLED_COLOR, NEEDLE_COLOR = "#1a9850", "#b8bcc2", "#d62728"


def draw(result: dict, path: Path) -> list[Path]:
    """Draws all pictures of a result.

    Args:
        result: What `niah.py` wrote.
        path: Of the result file; the pictures get its name with `_KIND.png` or `_chunks.png`.

    Returns:
        The pictures' paths.
    """
    written = []
    # Kinds that ask for the whole video have one number a length: the table says it better.
    for kind in dict.fromkeys(cell["kind"] for cell in result["cells"] if cell["depth"] is not None):
        figure = heat_map(result, kind)
        written.append(_save(figure, path.with_name(f"{path.stem}_{kind}.png")))
    scored = [record for record in result["questions"] if "scores" in record and record["depth"] is not None]
    if scored:
        written.append(_save(chunk_plot(result, scored), path.with_name(f"{path.stem}_chunks.png")))
    return written


def heat_map(result: dict, kind: str):
    """Accuracy by depth and length; beside it, for bi-level decoding, how often the needle's chunks were reloaded."""
    cells = [cell for cell in result["cells"] if cell["kind"] == kind]
    panels = [("accuracy", "answers right")]
    if any(cell.get("needle_reloaded") is not None for cell in cells):
        panels.append(("needle_reloaded", "needle's chunks dense"))
    lengths = sorted({cell["length"] for cell in cells})
    depths = sorted({cell["depth"] for cell in cells})
    width, height = 1.7 + 0.62 * len(lengths), 1.5 + 0.5 * len(depths)
    figure, axes = plt.subplots(1, len(panels), figsize=(width * len(panels), height), squeeze=False)
    mesh = None
    for axis, (field, label) in zip(axes[0], panels, strict=True):
        values = [[float("nan")] * len(lengths) for _ in depths]
        for cell in cells:
            if cell.get(field) is not None:
                values[depths.index(cell["depth"])][lengths.index(cell["length"])] = 100 * cell[field]
        mesh = axis.pcolormesh(values, cmap="RdYlGn", vmin=0, vmax=100, **GRID)
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                if value == value:
                    red, green, blue, _ = mesh.cmap(mesh.norm(value))
                    ink = "white" if 0.3 * red + 0.59 * green + 0.11 * blue < DARK else "#222222"
                    text = f"{value:.0f}"
                    axis.text(column + 0.5, row + 0.5, text, ha="center", va="center", color=ink, fontsize=8)
        axis.invert_yaxis()
        axis.set_xticks([column + 0.5 for column in range(len(lengths))], [f"{length:,}" for length in lengths])
        axis.tick_params(axis="x", rotation=45)
        axis.set_yticks([row + 0.5 for row in range(len(depths))], [f"{depth:g}" for depth in depths])
        axis.tick_params(length=0)
        axis.set_xlabel("frames")
        axis.set_ylabel("depth of the needle (%)")
        means = [entry for entry in result["lengths"] if entry["kind"] == kind and entry.get(field) is not None]
        total = sum(entry["total"] for entry in means)
        mean = sum(entry[field] * entry["total"] for entry in means) / total
        axis.set_title(f"{label}: {100 * mean:.1f} %", fontsize=10)
        axis.spines[:].set_visible(False)
    figure.suptitle(f"{TITLES[kind]} needle in a haystack, {_how(result)}", fontsize=11)
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    bar = figure.colorbar(mesh, ax=list(axes[0]), fraction=0.04 / len(panels), pad=0.02)
    bar.set_label("%")
    bar.outline.set_visible(False)
    return figure


def chunk_plot(result: dict, records: Sequence[dict]):
    """Scores of all chunks for one question a depth, at the longest length: what stayed dense, where the needle is."""
    kind = next(kind for kind in ("single", "multi_hop") if any(record["kind"] == kind for record in records))
    records = [record for record in records if record["kind"] == kind]
    longest = max(record["length"] for record in records)
    records = [record for record in records if record["length"] == longest]
    records.sort(key=lambda record: record["depth"])
    figure, axes = plt.subplots(len(records), 1, figsize=(9, 1.1 + 1.25 * len(records)), sharex=True, squeeze=False)
    for axis, record in zip(axes[:, 0], records, strict=True):
        scores, dense = record["scores"], set(parse_ranges(record["reloaded"]))
        floor = max(min((score for score in scores if score > 0), default=1.0) / 2, max(scores) * SCORE_RANGE)
        heights = [max(score, floor) for score in scores]
        # The dense ones last and never hair-thin: they must not vanish between the others.
        others, width = [chunk for chunk in range(len(scores)) if chunk not in dense], _line_width(len(scores))
        axis.vlines(others, floor, [heights[chunk] for chunk in others], colors=POOLED_COLOR, linewidth=width)
        chosen = sorted(dense)
        axis.vlines(chosen, floor, [heights[chunk] for chunk in chosen], colors=DENSE_COLOR, linewidth=max(width, 1.5))
        # Dense chunks lie between many others: a strip below the axis shows them at a width that is seen.
        axis.plot(chosen, [-0.06] * len(chosen), "s", color=DENSE_COLOR, markersize=3, clip_on=False,
                  transform=axis.get_xaxis_transform())  # fmt: skip
        axis.set_yscale("log")
        axis.set_ylim(floor, max(heights) * 4)
        for chunk in record["needle_chunks"]:
            axis.plot(chunk, heights[chunk] * 1.9, "v", color=NEEDLE_COLOR, markersize=7, clip_on=False)
        verdict = "right" if record["correct"] else f"wrong, expected {record['expected']}"
        question = record["question"].splitlines()[0]
        axis.set_title(
            f"{record['depth']:g} %: {question}  “{record['answer']}” ({verdict})", fontsize=9, loc="left", pad=5
        )
        axis.spines[["top", "right"]].set_visible(False)
        axis.minorticks_off()
    axes[-1, 0].set_xlim(-1, len(records[0]["scores"]))
    axes[-1, 0].set_xlabel("chunk of the video", labelpad=8)
    figure.supylabel("score (log scale)", fontsize=10)
    handles = [
        Patch(color=DENSE_COLOR, label="dense"),
        Patch(color=POOLED_COLOR, label="pooled"),
        Line2D([], [], marker="v", linestyle="", color=NEEDLE_COLOR, label="chunk with the needle"),
    ]
    figure.legend(handles=handles, loc="upper right", ncols=3, frameon=False, fontsize=9)
    shares = [record["kept_share"] for record in records]
    figure.suptitle(
        f"Reloaded chunks, {longest:,} frames, {100 * sum(shares) / len(shares):.0f} % of the visual KV kept",
        x=0.01, ha="left", fontsize=11,
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0, 1, 0.99))
    return figure


def parse_ranges(text: str) -> list[int]:
    """The numbers of "0,5-7,12"."""
    numbers = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def _line_width(chunks: int) -> float:
    return min(max(500 / chunks, 0.8), 8)


def _how(result: dict) -> str:
    """Mode and options, in words."""
    configuration = result["configuration"]
    name = configuration["mode"]["name"]
    decode = {"bilevel": "bi-level", "oracle": "bi-level with the oracle's chunks", "pooled": "all pooled"}
    words = f"{configuration['mode']['prefill']} prefill"
    if name in decode:
        words += f" + {decode[name]}"
    return words + (", with options" if configuration["options"] else "")


def _save(figure, path: Path) -> Path:
    # Metadata without a date: the same result gives the same file.
    figure.savefig(path, dpi=DPI, metadata={"Software": None}, bbox_inches="tight", facecolor="white")
    plt.close(figure)
    return path


def main() -> None:
    """Draws the pictures of a result file again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, metavar="RESULT.json", help="written by niah.py")
    path = parser.parse_args().result
    print(*draw(json.loads(path.read_text(encoding="utf-8")), path), sep="\n")


if __name__ == "__main__":
    main()
