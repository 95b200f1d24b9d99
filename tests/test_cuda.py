"""Prefill, decoding and vision on a GPU give what they give on a CPU: the bundled checkpoint, two dtypes."""

import pytest
import torch
from transformers import AutoModel

QUESTION = "What color is the star?"
MODES = [
    {"prefill": "full"},
    {"prefill": "streaming", "chunk_groups": 1, "window_chunks": 1},
    {"prefill": "mask", "chunk_groups": 1, "window_chunks": 1},
    {"prefill": "streaming", "chunk_groups": 1, "window_chunks": 1, "decode": "bilevel", "decode_chunk_groups": 1},
]
NAMES = ["full", "streaming", "mask", "bilevel"]


def last_logits(model, processor, root, sparse) -> torch.Tensor:
    """Log-probabilities of the answer's first token."""
    model.config.sparse_attention = sparse
    content = [{"type": "video", "video": f"{root}/assets/demo.mp4"}, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    ).to(model.device)
    with torch.no_grad():
        return model(**inputs, logits_to_keep=1).logits[0, -1].float().log_softmax(-1).cpu()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float32, 2e-3), (torch.bfloat16, 0.5)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("sparse", MODES, ids=NAMES)
def test_modes_agree_with_float32_on_a_cpu(root, bundle, sparse, dtype, most, device):
    if (device, dtype) == ("cpu", torch.float32):
        pytest.skip("that is what the others are compared with")
    model, _, processor = bundle
    before = model.config.sparse_attention
    try:
        expected = last_logits(model, processor, root, sparse)
    finally:
        model.config.sparse_attention = before
    moved = AutoModel.from_pretrained(root, trust_remote_code=True, dtype=dtype, device_map=device).eval()
    found = last_logits(moved, processor, root, sparse)
    likely = expected.exp() > 1e-3
    assert (found - expected)[likely].abs().max() < most


@pytest.mark.cuda
def test_a_video_on_the_host_answers_as_on_the_gpu(root, bundle):
    _, tokenizer, _ = bundle
    model = AutoModel.from_pretrained(root, trust_remote_code=True, device_map="cuda").eval()
    video = model.encode_video(f"{root}/assets/demo.mp4", tokenizer, max_num_frames=16)
    settings = {"return_history": False, "generation_config": {"max_new_tokens": 8}}
    answer = model.chat(video, tokenizer, QUESTION, **settings)
    assert model.chat(video.to("cpu"), tokenizer, QUESTION, **settings) == answer
