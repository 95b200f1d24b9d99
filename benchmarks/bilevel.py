"""Which rule reloads chunks, and at which positions: bi-level decoding against decoding with all key-values.

What is surprising:
* The yardstick is the model itself: how far the distribution of the answer's first token moves from that of full
  decoding (Kullback-Leibler divergence in nats, mean over questions and videos). It needs no labels, so it also runs
  on random weights; but only a trained model's attention means something, so on random weights it compares mechanics
  and cost.
* Every rule reloads the same number of chunks, so that the kept share is equal; `random` is the yardstick of a rule.

    python benchmarks/bilevel.py --frames 256 --out bilevel_small
"""

import copy
import random
import statistics
from pathlib import Path

import numpy as np
import torch
from common import ROOT, clock, parse, parser, report, table
from transformers import AutoModel, AutoProcessor, AutoTokenizer

QUESTIONS = (
    "What moves?",
    "What colour is the background at the start?",
    "How many shapes are there?",
    "What comes first, the circle or the square?",
)
SCENE_FRAMES = 16


def made_up_video(frames: int, seed: int) -> np.ndarray:
    """[frames, 56, 56, 3]: scenes of `SCENE_FRAMES` frames, each a picture of coarse noise that drifts."""
    generator = np.random.default_rng(seed)
    video = []
    for frame in range(frames):
        if frame % SCENE_FRAMES == 0:
            scene = generator.integers(0, 255, (7, 7, 3), dtype=np.uint8).repeat(8, axis=0).repeat(8, axis=1)
        video.append(np.roll(scene, frame, axis=1))
    return np.stack(video)


def first_token(model, processor, video, question, **options) -> tuple[torch.Tensor, float, float]:
    """Log-probabilities of the answer's first token, seconds to get them, share of the video's tokens kept."""
    content = [{"type": "video", "video": video}, {"type": "text", "text": question}]
    suffix = processor.prompt_pieces(processor.render([{"role": "user", "content": content}]))[-1]
    input_ids = torch.cat([video.input_ids, torch.tensor(suffix)])[None].to(model.device)
    cache = copy.deepcopy(video).cache
    start = clock(model.device.type)
    settings = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}
    output = model.generate(input_ids=input_ids, past_key_values=cache, **settings, **options)
    seconds = clock(model.device.type) - start
    kept = (cache.layers[0].keys.shape[2] - len(suffix)) / len(video.input_ids)
    return output.logits[0][0].float().log_softmax(-1), seconds, kept


def main() -> None:
    arguments = parser(__doc__.splitlines()[0], "")
    arguments.add_argument("--model", default=str(ROOT), help="a folder with a checkpoint in this project's format")
    arguments.add_argument("--frames", type=int, default=256, help="frames of each video, one a second")
    arguments.add_argument("--videos", type=int, default=3, help="made-up videos")
    arguments.add_argument("--count", type=int, default=4, help="chunks that a rule may reload")
    arguments.add_argument("--pool-size", type=int, default=4, help="pooling over a group's visual key-values")
    args = parse(arguments)
    model = AutoModel.from_pretrained(args.model, trust_remote_code=True).to(args.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
    args.model = "bundled" if Path(args.model).resolve() == ROOT else Path(args.model).name
    times = [float(second) for second in range(args.frames)]
    videos = [
        model.encode_video(made_up_video(args.frames, seed), tokenizer, timestamps=times)
        for seed in range(args.videos)
    ]
    dice = random.Random(0)
    reference = {
        (number, question): first_token(model, processor, video, question)
        for number, video in enumerate(videos)
        for question in QUESTIONS
    }
    rows, results = [], []
    for positions in ("compact", "true"):
        for rule in ("none", "random", "probe"):
            reload = {"method": rule if rule != "random" else "none", "positions": positions}
            if rule == "probe":
                reload["count"] = args.count
            model.config.sparse_attention = {"decode": "bilevel", "pool_size": args.pool_size, "reload": reload}
            divergences, seconds, shares = [], [], []
            for (number, question), (expected, _, _) in reference.items():
                last = len(videos[number].chunks(model.config.sparse_attention.decode_chunk_groups)) - 1
                options = {"dense_chunks": dice.sample(range(1, last), args.count)} if rule == "random" else {}
                got, took, kept = first_token(model, processor, videos[number], question, **options)
                divergences.append((expected.exp() * (expected - got)).sum().item())
                seconds.append(took)
                shares.append(kept)
            result = {
                "positions": positions,
                "rule": rule,
                "kl": statistics.mean(divergences),
                "kv_kept": statistics.mean(shares),
                "seconds": statistics.median(seconds),
            }
            results.append(result)
            rows.append(list(result.values()))
    model.config.sparse_attention = {}
    full = statistics.median(seconds for _, seconds, _ in reference.values())
    rows.append(["true", "full decoding", 0.0, 1.0, full])
    table(["positions", "rule", "KL to full", "KV kept", "s to first token"], rows)
    report("bilevel", args, [*results, {"rule": "full decoding", "seconds": full}])


if __name__ == "__main__":
    main()
