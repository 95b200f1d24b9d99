"""Stage 1: reconstructive pre-training of dynamic token synthesis (DTS), before a language model sees its tokens.

Masked video modelling on the vision tower's features (Video-XL-Pro, "ReCoT"; stage 1 of Video-XL-2). The tower is
frozen; tokens of its features are masked, DTS merges each group of frames, and a decoder that exists only here
reconstructs the features of every frame from the merged ones. Published are the idea, the masked input and the scores
of semantic-guided masking; neither code nor decoder nor settings were released. What we chose is marked OURS:

* Score of token p in frame t, published: v[t,p] . TempQuery(v[t-1,p]) + v[t,p] . SpatialQuery(mean_p v[t]), with
  learned linear maps and v[-1] = 0. Low scores are masked, at random among them.
* OURS: features are normalised per token before they are scored, and scores are divided by sqrt(C). Candidates are
  the lowest `candidate_share` of each frame's tokens; among them `mask_ratio` of the frame's tokens are drawn
  uniformly. v[-1] = 0 holds for the first frame of each group, because groups never see each other.
* OURS: the queries learn through a straight-through estimate: forward the mask is 0 or 1, backward it is
  sigmoid(-(score - mean) / temperature). They learn which tokens the others can tell.
* OURS: one learned vector stands for a masked token; masking happens on the tower's grid.
* OURS: the decoder adds a learned vector per frame to the merged features (resized to the tower's grid), runs some
  transformer layers over all tokens of the group, and predicts layer-normalised features. Loss: mean squared error,
  masked tokens plus `visible_weight` times the others, because the merged features must keep the visible ones too.

G groups, T frames of a group, P patches, C tower channels, S side of the compressor's grid.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from videoxl.training.batches import videos_of
from videoxl.training.trainer import VideoXLTrainer

DTS_DEFAULTS = {
    "mask_ratio": 0.5,
    "candidate_share": 0.75,
    "visible_weight": 1.0,
    "decoder_layers": 2,
    "decoder_heads": 8,
    "sgm_temperature": 1.0,
}


class SemanticGuidedMasking(nn.Module):
    """Chooses the tokens to mask.

    Args:
        channels: C.
        mask_ratio: Share of each frame's tokens that is masked.
        candidate_share: Share of each frame's tokens, lowest scores first, that they are drawn from.
        temperature: Of the backward pass.

    Raises:
        ValueError: If the shares do not fit.
    """

    def __init__(self, channels: int, mask_ratio: float, candidate_share: float, temperature: float):
        super().__init__()
        if not 0 < mask_ratio <= candidate_share <= 1:
            raise ValueError(
                f"dts needs 0 < mask_ratio <= candidate_share <= 1, got {mask_ratio:g} and {candidate_share:g}"
            )
        self.temporal_query = nn.Linear(channels, channels, bias=False)
        self.spatial_query = nn.Linear(channels, channels, bias=False)
        self.mask_ratio, self.candidate_share, self.temperature = mask_ratio, candidate_share, temperature

    def score(self, features: torch.Tensor) -> torch.Tensor:
        """Scores of tokens: [G, T, P, C] -> [G, T, P]; high where a token says something of its own."""
        normed = F.layer_norm(features, features.shape[-1:])
        previous = F.pad(normed[:, :-1], (0, 0, 0, 0, 1, 0))
        temporal = (normed * self.temporal_query(previous)).sum(-1)
        spatial = (normed * self.spatial_query(normed.mean(dim=2, keepdim=True))).sum(-1)
        return (temporal + spatial) / math.sqrt(features.shape[-1])

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Mask [G, T, P]: 1 where a token is masked, with gradients for the queries."""
        scores = self.score(features)
        patches = scores.shape[-1]
        masked = max(round(self.mask_ratio * patches), 1)
        candidates = max(round(self.candidate_share * patches), masked)
        lowest = scores.detach().topk(candidates, dim=-1, largest=False).indices
        drawn = torch.rand(lowest.shape, device=scores.device).argsort(dim=-1)[..., :masked]
        hard = torch.zeros_like(scores).scatter_(-1, lowest.gather(-1, drawn), 1.0)
        soft = torch.sigmoid(-(scores - scores.mean(dim=-1, keepdim=True)) / self.temperature)
        return hard + soft - soft.detach()


class ReconstructionDecoder(nn.Module):
    """Predicts every frame's features from a group's merged ones: [G, S * S, C] -> [G, T, P, C]."""

    def __init__(self, channels: int, frames: int, patches: int, layers: int, heads: int):
        super().__init__()
        self.side = math.isqrt(patches)
        self.frame_embedding = nn.Parameter(0.02 * torch.randn(frames, 1, channels))
        self.patch_embedding = nn.Parameter(0.02 * torch.randn(patches, channels))
        layer = nn.TransformerEncoderLayer(
            channels, heads, 4 * channels, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(channels)
        self.head = nn.Linear(channels, channels)

    def forward(self, merged: torch.Tensor) -> torch.Tensor:
        groups, cells, channels = merged.shape
        side = math.isqrt(cells)
        grid = merged.transpose(1, 2).reshape(groups, channels, side, side)
        grid = F.interpolate(grid, size=(self.side, self.side), mode="bilinear", align_corners=False, antialias=True)
        tokens = grid.flatten(2).transpose(1, 2)[:, None] + self.frame_embedding + self.patch_embedding
        frames, patches = tokens.shape[1:3]
        hidden = self.blocks(tokens.flatten(1, 2))
        return self.head(self.norm(hidden)).unflatten(1, (frames, patches))


class DTSPretraining(nn.Module):
    """The parts of a Video-XL model that stage 1 needs, with its decoder.

    Args:
        model: A Video-XL model; its tower and compressor are used, not copied.
        settings: Some of `DTS_DEFAULTS`.
    """

    def __init__(self, model, settings: dict | None = None):
        super().__init__()
        settings = DTS_DEFAULTS | (settings or {})
        config = model.config
        if config.compressor_config.compressor_type != "dts":
            raise ValueError(f"stage dts trains a DTS compressor, not {config.compressor_config.compressor_type!r}")
        vision, channels = config.vision_config, config.compressor_config.hidden_size
        self.chunk_frames = config.resolve_vision_chunk_frames()
        self.frames = config.frames_per_group
        self.patches = (vision.image_size // vision.patch_size) ** 2
        self.visible_weight = settings["visible_weight"]
        self.vision_tower = model.model.vision_tower
        self.compressor = model.model.compressor
        self.masking = SemanticGuidedMasking(
            channels, settings["mask_ratio"], settings["candidate_share"], settings["sgm_temperature"]
        )
        self.mask_token = nn.Parameter(torch.zeros(channels))
        self.decoder = ReconstructionDecoder(
            channels, self.frames, self.patches, settings["decoder_layers"], settings["decoder_heads"]
        )

    @torch.no_grad()
    def tower_features(self, pixel_values_videos) -> torch.Tensor:
        """The frozen tower's features of all videos in whole groups: [G, T, P, C].

        Args:
            pixel_values_videos: Videos [F, 3, H, W], a partial last group is filled with the last frame; and images
                [T, 1, 3, H, W], each tile a group of equal frames.
        """
        weight = self.vision_tower.embeddings.patch_embedding.weight
        features = []
        for pixels in pixel_values_videos:
            if pixels.ndim == 5:
                pixels = pixels.flatten(0, 1).repeat_interleave(self.frames, dim=0)
            missing = -len(pixels) % self.frames
            if missing:
                pixels = torch.cat([pixels, pixels[-1:].expand(missing, *pixels.shape[1:])])
            for chunk in pixels.split(self.chunk_frames):
                embedded = self.vision_tower.embeddings(chunk.to(device=weight.device, dtype=weight.dtype))
                features.append(self.vision_tower.encoder(inputs_embeds=embedded).last_hidden_state)
        return torch.cat(features).unflatten(0, (-1, self.frames))

    def forward(self, pixel_values_videos) -> dict[str, torch.Tensor]:
        """Reconstruction losses of a batch of videos (see the module docstring).

        Args:
            pixel_values_videos: List of [F, 3, H, W] or [T, 1, 3, H, W].

        Returns:
            `loss`, and its parts `masked_loss` and `visible_loss`; 1.0 is what predicting zero gives.
        """
        features = self.tower_features(pixel_values_videos)
        features = features.to(self.mask_token.dtype)
        mask = self.masking(features)
        masked = torch.lerp(features, self.mask_token.expand_as(features), mask[..., None])
        merged = self.compressor(masked.flatten(0, 1))
        predicted = self.decoder(merged).float()
        target = F.layer_norm(features.float(), features.shape[-1:])
        errors = (predicted - target).pow(2).mean(dim=-1)
        hidden = mask.detach()
        masked_loss = (errors * hidden).sum() / hidden.sum()
        visible_loss = (errors * (1 - hidden)).sum() / (1 - hidden).sum().clamp(min=1)
        return {
            "loss": masked_loss + self.visible_weight * visible_loss,
            "masked_loss": masked_loss.detach(),
            "visible_loss": visible_loss.detach(),
        }


class DTSTrainer(VideoXLTrainer):
    """Trains a `DTSPretraining` on the videos of a mixture; its log has both parts of the loss."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.model_accepts_loss_kwargs = False  # a mean per batch: the library divides it by the accumulation
        self._parts: list[dict] = []

    # override: there are no answers here
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.broken.take(inputs["broken"], inputs["samples"], self.state.global_step)
        outputs = model(pixel_values_videos=videos_of(inputs))
        self._parts.append(outputs)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    # override: reconstruction of held-out videos, always under the same masks
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Mean losses over the held-out videos: `eval_loss`, `eval_masked_loss`, `eval_visible_loss`."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        loader = DataLoader(dataset, self.args.per_device_eval_batch_size, collate_fn=self.eval_collator)
        parts = []
        with torch.no_grad(), torch.random.fork_rng(), self.compute_loss_context_manager():
            torch.manual_seed(self.args.seed)
            parts += (self.model(videos_of(self._prepare_inputs(batch))) for batch in loader)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in _means(parts).items()}
        self.log(metrics)
        return metrics

    # override: the parts of the loss
    def log(self, logs, start_time=None):
        if "loss" in logs and self._parts:
            logs |= {name: value for name, value in _means(self._parts).items() if name != "loss"}
            self._parts.clear()
        super().log(logs, start_time)


def _means(parts):
    return {name: torch.stack([part[name].detach() for part in parts]).mean().item() for name in parts[0]}
