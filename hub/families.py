"""Name tables of the published checkpoints: what tells a family from the others, and how its tensors are called here.

What is surprising:
* A family is one entry of `FAMILIES`: its marks, its rows of names, its preset. The rows read in both directions, so
  the same table tells what a published checkpoint must contain.
* `model_type` does not decide: it changed between releases, several families share `llava_qwen`, and some say `qwen2`,
  as a plain language model does. That config.json has `mm_*` keys does, and what the tensors are called. Under the one
  name Video-XL-Pro-3B two architectures were published: in March 2025 with beacon memory, in April with timestamps.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """What tells one family's checkpoints from the others, and how its tensors are called here.

    Args:
        title: Name for messages.
        has, lacks: Prefixes that some tensor name starts with, and that none starts with.
        presets: Files in `presets/`, without suffix, of the family's checkpoints; the first is the default. Empty
            while the family is recognised but not yet supported.
        names: Rows (published name, our name); `*` stands for the same text on both sides. The first that fits counts.
        ignored: Published names that our model has no use for; `*` stands for any text.
        extra_rows: Rows that embedding and head may have beyond the vocabulary: the published code appends one for a
            marker when it loads, and some checkpoints were saved with it.
    """

    title: str
    has: tuple[str, ...]
    lacks: tuple[str, ...] = ()
    presets: tuple[str, ...] = ()
    names: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    extra_rows: int = 0

    def fits(self, names) -> bool:
        """Whether a checkpoint with these tensor names carries the family's marks."""

        def some_start(prefix):
            return any(name.startswith(prefix) for name in names)

        return all(map(some_start, self.has)) and not any(map(some_start, self.lacks))

    def ignores(self, name: str) -> bool:
        """Whether the published tensor `name` is known and has no place in our model."""
        return any(_fit(pattern, name) is not None for pattern in self.ignored)

    def to_ours(self, name: str) -> str | None:
        """Our name of the published tensor `name`; None if no row fits."""
        return _rename(name, self.names)

    def to_published(self, name: str) -> str | None:
        """The published name of our tensor `name`; None if no row fits."""
        return _rename(name, [(ours, published) for published, ours in self.names])


def _fit(pattern, name):
    match = re.fullmatch("(.+)".join(map(re.escape, pattern.split("*"))), name)
    return match and match.groups()


def _rename(name, rows):
    for pattern, replacement in rows:
        if (texts := _fit(pattern, name)) is not None:
            return replacement.replace("*", "{}").format(*texts)
    return None


# All families carry Qwen2 under the names of Qwen2ForCausalLM; beacons' projections are further names of its layers.
_LANGUAGE_MODEL = (
    ("model.embed_tokens.*", "model.language_model.embed_tokens.*"),
    ("model.layers.*", "model.language_model.layers.*"),
    ("model.norm.*", "model.language_model.norm.*"),
    ("lm_head.*", "lm_head.*"),
)
# SigLIP and CLIP, whose parts transformers names alike, and a two-layer projector.
_TOWER_AND_PROJECTOR = (
    ("model.vision_tower.vision_tower.vision_model.*", "model.vision_tower.*"),
    ("model.mm_projector.0.*", "model.multi_modal_projector.linear_1.*"),
    ("model.mm_projector.2.*", "model.multi_modal_projector.linear_2.*"),
)
_DTS = (("model.sae.*", "model.compressor.*"),)
_BEACONS = (("model.beacon_embed_tokens.*", "model.beacon_embed_tokens.*"),)
_SELECTOR_TEXT = (("model.text_mlp.0.*", "model.token_selector.text_projection.*"),)
_CLIP_PROJECTOR = (
    ("model.mm_projector.mlp.0.*", "model.multi_modal_projector.linear_1.*"),
    ("model.mm_projector.mlp.2.*", "model.multi_modal_projector.linear_2.*"),
)


def _clip_tower(published, *own):
    """Rows of a tower over clips, behind the prefix `published`; `own` are those that only one of them has."""
    ours, block = "model.vision_tower.", "encoder.layers.*."
    rows = [
        *own,
        ("patch_embed.proj.*", "embeddings.patch_embedding.*"),
        ("blocks.*.norm1.*", block + "layer_norm1.*"),
        ("blocks.*.norm2.*", block + "layer_norm2.*"),
        ("blocks.*.attn.*", block + "self_attn.*"),
        ("blocks.*.mlp.*", block + "mlp.*"),
    ]
    return tuple((published + theirs, ours + name) for theirs, name in rows)


_UMT = _clip_tower(
    "model.vision_tower.vision_tower.encoder.",
    ("vision_layernorm.*", "final_norm.*"),
)
_INTERNVIDEO2 = _clip_tower(
    "model.vision_tower.vision_tower.",
    ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.clip_position_embedding"),
    ("img_pos_embed", "embeddings.image_position_embedding"),
    ("blocks.*.ls1.*", "encoder.layers.*.scale1.*"),
    ("blocks.*.ls2.*", "encoder.layers.*.scale2.*"),
)
# Buffers that older versions of transformers stored, and every version computes anew.
_OLD_BUFFERS = (
    "model.vision_tower.vision_tower.vision_model.embeddings.position_ids",
    "model.layers.*.self_attn.rotary_emb.inv_freq",
)

FAMILIES = {
    "videoxl2": Family(
        title="Video-XL-2",
        has=("model.sae.",),
        lacks=("model.WindowTimeToTokenAttention.", "model.beacon_embed_tokens."),
        presets=("video-xl-2-8b",),
        names=(*_TOWER_AND_PROJECTOR, *_DTS, *_LANGUAGE_MODEL),
        # The first is declared by the published model class, called by nobody.
        ignored=("model.text_mlp.*", *_OLD_BUFFERS),
    ),
    "videoxlpro": Family(
        title="Video-XL-Pro (April 2025)",
        has=("model.sae.", "model.WindowTimeToTokenAttention."),
        lacks=("model.beacon_embed_tokens.",),
        presets=("video-xl-pro-3b",),
        names=(
            *_TOWER_AND_PROJECTOR,
            *_DTS,
            *_SELECTOR_TEXT,
            ("model.WindowTimeToTokenAttention.*", "model.token_selector.time_attention.*"),
            *_LANGUAGE_MODEL,
        ),
        # Stored, and used by nobody: the values of this attention are its queries.
        ignored=("model.WindowTimeToTokenAttention.v_proj.*", *_OLD_BUFFERS),
    ),
    "videoxlpro_march": Family(
        title="Video-XL-Pro (March 2025)",
        has=("model.sae.", "model.beacon_embed_tokens.", "model.text_mlp."),
        lacks=("model.WindowTimeToTokenAttention.",),
        presets=("video-xl-pro-3b-march",),
        names=(*_TOWER_AND_PROJECTOR, *_DTS, *_SELECTOR_TEXT, *_BEACONS, *_LANGUAGE_MODEL),
        ignored=_OLD_BUFFERS,
        extra_rows=1,
    ),
    "videoxl1": Family(
        title="Video-XL",
        has=("model.beacon_embed_tokens.",),
        lacks=("model.sae.",),
        presets=("video-xl-7b",),
        names=(*_TOWER_AND_PROJECTOR, *_BEACONS, *_LANGUAGE_MODEL),
        ignored=_OLD_BUFFERS,
        extra_rows=1,
    ),
    "videochatflash": Family(
        title="VideoChat-Flash",
        has=("model.mm_projector.mlp.",),
        lacks=("model.sae.", "model.vision_tower.vision_tower.cls_token"),
        presets=(
            "videochat-flash-7b-224",
            "videochat-flash-7b-448",
            "videochat-flash-2b-448",
            "videochat-flash-7b-1m-224",
        ),
        names=(*_UMT, *_CLIP_PROJECTOR, *_LANGUAGE_MODEL),
        ignored=_OLD_BUFFERS,
    ),
    "videochatflash_internvideo2": Family(
        title="VideoChat-Flash (InternVideo2)",
        has=("model.mm_projector.mlp.", "model.vision_tower.vision_tower.cls_token"),
        lacks=("model.sae.",),
        presets=("videochat-flash-7b-internvideo2",),
        names=(*_INTERNVIDEO2, *_CLIP_PROJECTOR, *_LANGUAGE_MODEL),
        ignored=_OLD_BUFFERS,
    ),
}


def name_table(family: str) -> Family:
    """The names of a supported family (a key of `FAMILIES`).

    Raises:
        ValueError: If there is no such family, or it is not supported yet.
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; known are {', '.join(FAMILIES)}")
    if not FAMILIES[family].presets:
        raise ValueError(f"this is a {FAMILIES[family].title} checkpoint: that family is not supported yet")
    return FAMILIES[family]


def recognise_family(config: dict, names) -> str:
    """Which family a published checkpoint belongs to, from its config.json and its tensor names.

    Raises:
        ValueError: If it is none of them.
    """
    if config.get("model_type") == "videoxl":
        raise ValueError("SOURCE is already in our format (model_type videoxl): load it as it is")
    titles, kind = ", ".join(family.title for family in FAMILIES.values()), config.get("model_type")
    if not any(key.startswith("mm_") for key in config):
        raise ValueError(
            f"config.json (model_type {kind!r}) has no mm_* keys, so it is a plain language model's or another "
            f"project's. Expected is the folder of {titles} as published, whose config.json has mm_vision_tower and "
            "others"
        )
    found = [key for key, family in FAMILIES.items() if family.fits(names)]
    if not found:
        raise ValueError(
            f"not a checkpoint of a known family ({titles}): config.json has mm_* keys and model_type {kind!r}, but "
            "the names of the tensors are none of theirs"
        )
    return found[0]
