"""Which remote files a question crosses: the files that are entered, and the edges from a caller's file to another.

What is surprising:
* Files of the project alone count, by name; calls that pass through a library's frames (`generate` calling `forward`)
  are an edge from the last file of the project in front of them.
* Every frame counts, comprehensions, properties and resumed generators too; within one file they make no edge. The
  model is loaded before, so nothing that runs on import counts. Other threads than the main one are not seen.
* Two journeys, with the clip of `make demo` and the checkpoint's own settings: `chat` on the path, and a second
  question about the `EncodedVideo` in bi-level decoding.
"""

import argparse
import sys
from pathlib import Path

from common import ROOT, HelpFormatter, report, table
from transformers import AutoModel, AutoTokenizer

# transformers runs copies of the remote files, in a package of this name.
REMOTE_CODE = "transformers_modules"
QUESTIONS = ("What color is the star?", "Which way does the ring move?")
GENERATION = {"max_new_tokens": 16}
# The most files and edges that a journey should have.
TARGETS = {"first question": (16, 34), "second question, bi-level": (11, 24)}

EPILOG = """\
examples:
  python benchmarks/journey.py --edges
      The two journeys, and who calls whom.

  python benchmarks/journey.py --model ../earlier
      The journeys of another checkout or converted folder, with this one's clip.
"""


def trace(call) -> tuple[set[str], set[tuple[str, str]]]:
    """Runs `call` and returns the files entered, and the edges (caller's file, other file)."""
    files, edges = set(), set()

    def remote_file(frame):
        path = Path(frame.f_code.co_filename)
        return path.name if REMOTE_CODE in path.parts else None

    def note(frame, event, argument):
        if event != "call" or (entered := remote_file(frame)) is None:
            return
        files.add(entered)
        caller = frame.f_back
        while caller is not None and remote_file(caller) is None:
            caller = caller.f_back
        if caller is not None and (origin := remote_file(caller)) != entered:
            edges.add((origin, entered))

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return files, edges


def journeys(folder, clip) -> dict:
    """Traces both journeys of the checkpoint in a folder: name -> (files, edges)."""
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    options = {"return_history": False, "generation_config": GENERATION}
    video = model.encode_video(clip, tokenizer)
    first = trace(lambda: model.chat(clip, tokenizer, QUESTIONS[0], **options))
    model.config.sparse_attention.decode = "bilevel"
    model.chat(video, tokenizer, QUESTIONS[0], **options)
    second = trace(lambda: model.chat(video, tokenizer, QUESTIONS[1], **options))
    return dict(zip(TARGETS, (first, second), strict=True))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=HelpFormatter)
    arguments.add_argument("--model", default=str(ROOT), help="a folder with a checkpoint in this project's format")
    arguments.add_argument("--edges", action="store_true", help="list the files, and what each calls")
    arguments.add_argument("--out", metavar="NAME", help="also write the JSON to benchmarks/results/NAME.json")
    args = arguments.parse_args()
    found = journeys(args.model, str(ROOT / "assets" / "demo.mp4"))
    rows, results = [], []
    for name, (files, edges) in found.items():
        limits = TARGETS[name]
        if args.edges:
            print(f"{name}:")
            for file in sorted(files):
                called = sorted(to for origin, to in edges if origin == file)
                print(f"  {file}" + (f" -> {', '.join(called)}" if called else ""))
            print()
        rows.append([name, f"{len(files)} (<= {limits[0]})", f"{len(edges)} (<= {limits[1]})"])
        results.append({"journey": name, "files": sorted(files), "edges": sorted(map(list, edges))})
        results[-1] |= {"num_files": len(files), "num_edges": len(edges)}
    table(["journey", "files (target)", "edges (target)"], rows)
    args.model, args.device = "bundled" if Path(args.model).resolve() == ROOT else Path(args.model).name, "cpu"
    report("journey", args, results)


if __name__ == "__main__":
    main()
