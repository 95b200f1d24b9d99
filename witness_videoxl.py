"""Which model made something: what tells its weights and active adapters from others, at three costs.

* A `Witness` looks at a few values of each parameter, in about a millisecond: has this model changed meanwhile?
* `model_fingerprint` looks at more values, and at the config, and is the same in every process and on every device.
* `Witness.digest` reads every byte, on the weights' devices.

Adapters are peft's, known by what its layers have in common. Of those that are not active nothing is looked at.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

SAMPLED_VALUES = 64  # of each weight for the model's fingerprint
WITNESS_VALUES = 4  # of each weight for a witness
SUMMED_AT_ONCE = 2**19  # bytes of a weight for its digest: they stay in a processor's cache

# Where peft's layers keep what they are put around.
_BASES = ("base_layer", "original_module")
# Config entries that do not say what the model computes from given weights: private ones, the library's own, ...
_LIBRARY_KEYS = (
    "_.*|architectures|attention_dropout|auto_map|bos_token_id|chunk_size_feed_forward|dtype|eos_token_id|id2label"
    "|initializer_range|is_encoder_decoder|label2id|output_attentions|output_hidden_states|pad_token_id|problem_type"
    "|quantization_config|return_dict|tie_word_embeddings|torch_dtype|transformers_version|use_cache"
)
# ... and those that users set between calls. What of them changes an encoded video belongs into its facts.
_CALL_TIME_KEYS = (
    "sparse_attention|enable_sparse|sparse_mode|sparse_config|enable_chunk_prefill|prefill_config|vision_chunk_frames"
    "|beacon_ratio|keep_ratio|keep_seed|mm_llm_compress|llm_compress_.*|llm_image_token_ratio_list"
    "|tokenizer_model_max_length|max_source_bytes"
)
_VOLATILE_KEY = re.compile(f"{_LIBRARY_KEYS}|{_CALL_TIME_KEYS}")


class Glance(NamedTuple):
    """What is seen of a parameter: dtype and a few values, address, and version (which writes in place raise)."""

    look: tuple[torch.dtype, bytes]
    address: int
    version: int | None

    def still(self, now: "Glance") -> bool:
        """Whether `now` is the same parameter unchanged, or the same values moved elsewhere."""
        return self.look == now.look and (self.address != now.address or self.version == now.version)


class Witness:
    """The weights and active adapters of a model at one moment.

    What escapes it are writes through `.data` (which raise no version) that miss all values that it looks at.
    """

    @torch.no_grad()
    def __init__(self, model):
        self.adapters, idle = _adapters(model)
        weights = {_plain(name): weight for name, weight in model.named_parameters() if name not in idle}
        self.names, self._digest = weights.keys(), None
        self.glances = _glances(dict(part for name, weight in weights.items() for part in _parts(name, weight)))

    def require(self, model) -> None:
        """Compares with a model, and takes note of where its weights are now.

        Raises:
            ValueError: If weights, their dtype or active adapters have changed.
        """
        now = Witness(model)
        if now.adapters != self.adapters:
            then, active = (_listed(witness.adapters) for witness in (self, now))
            raise ValueError(
                f"the model's adapters have changed since the video was encoded (active then: {then}; now: {active}): "
                "switch them back, or encode the video again"
            )
        both = self.glances.keys() & now.glances.keys()  # nothing is seen of weights that are offloaded
        changed = (self.names ^ now.names) | {name for name in both if not self.glances[name].still(now.glances[name])}
        if changed:
            raise ValueError(
                f"the model's weights have changed since the video was encoded ({min(changed)} is one of "
                f"{len(changed)}): encode the video again"
            )
        self.glances |= now.glances

    def digest(self, model) -> str:
        """A sha256 of all weights and active adapters of the model, which must be unchanged; computed once."""
        if self._digest is None:
            digest, factors = hashlib.sha256(canonical(sorted(self.adapters)).encode()), {}
            for name, weight in _weights(model):
                sums = [_checksums(part, factors) for _, part in _parts(name, weight)]
                digest.update(canonical([name, str(weight.dtype), list(weight.shape), sums]).encode())
            self._digest = digest.hexdigest()
        return self._digest


def model_fingerprint(model) -> str:
    """Tells one model from another by its config and a sample of its weights, without reading them all.

    The dtype enters as the weights' own; `config.dtype`, which a model built from a config leaves unset, does not, nor
    do settings that users change between calls.

    Args:
        model: A transformers model on any device.

    Returns:
        A sha256, the same in every process and on every device.

    Raises:
        ValueError: If weights are offloaded to the meta device: nothing would tell such models apart.
    """
    config = model.config.to_dict()
    config = {**config.pop("frames_config"), **config}  # flat, as in the files of earlier versions
    digest = hashlib.sha256(canonical(_architecture(config)).encode())
    for name, tensor in _weights(model):
        digest.update(canonical([name, str(tensor.dtype), list(tensor.shape)]).encode())
        values = tensor.reshape(-1)
        # An odd step, so that a matrix with an even number of columns is not sampled in one column only.
        sample = values[:: values.numel() // SAMPLED_VALUES | 1][:SAMPLED_VALUES]
        digest.update(sample.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _architecture(config: dict) -> dict:
    """A config's dict without what is volatile or unset, at every depth."""
    return {
        key: _architecture(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if value is not None and not _VOLATILE_KEY.fullmatch(str(key))
    }


def canonical(value) -> str:
    """JSON that is the same for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


def _adapters(model) -> tuple[set[tuple[str, str]], set[str]]:
    """Layers with active or merged adapters of peft, and which; and the names of all other adapters' parameters."""
    found, idle = set(), set()
    for place, layer in model.named_modules():
        # A property in peft's layers; transformers' models have a method of this name.
        if not isinstance(getattr(type(layer), "disable_adapters", None), property):
            continue
        active = () if layer.disable_adapters else layer.active_adapters
        active = (active,) if isinstance(active, str) else active
        merged, scales = getattr(layer, "merged_adapters", ()), getattr(layer, "scaling", None)
        scales = scales if isinstance(scales, dict) else {}  # some layers pass on what they are put around has
        for name, _ in layer.named_parameters():
            part, _, rest = name.partition(".")
            adapter = rest.partition(".")[0]
            if part not in _BASES and (adapter in active or adapter in merged):
                found.add((place, f"{adapter} x {scales.get(adapter, 1)}{' (merged)' * (adapter in merged)}"))
            elif part not in _BASES:
                idle.add(f"{place}.{name}")
    return found, idle


def _listed(adapters) -> str:
    return ", ".join(sorted({what for _, what in adapters})) or "none"


def _plain(name: str) -> str:
    """A parameter's name as it is without adapters."""
    return ".".join(part for part in name.split(".") if part not in _BASES)


def _weights(model) -> Iterator[tuple[str, torch.Tensor]]:
    """All weights but those of adapters that are not active, by name; ValueError if some are offloaded."""
    idle = _adapters(model)[1]
    weights = {_plain(name): weight for name, weight in model.state_dict().items() if name not in idle}
    for name, weight in sorted(weights.items()):
        if weight.is_meta:
            raise ValueError(f"the weight {name} is on the meta device: load the model without offloading it")
        yield name, weight.detach()


def _parts(name, weight) -> Iterator[tuple[str, torch.Tensor]]:
    """A tensor by its name, or the tensors that one of a quantised kind is made of."""
    if hasattr(weight, "__tensor_flatten__"):
        for inner in weight.__tensor_flatten__()[0]:
            yield from _parts(f"{name}.{inner}", getattr(weight, inner))
    else:
        yield name, weight


def _few(weight) -> torch.Tensor:
    """[WITNESS_VALUES] values spread over a tensor."""
    weight = weight if weight.is_contiguous() else weight.reshape(-1)
    return weight.as_strided((WITNESS_VALUES,), ((weight.numel() - 1) // (WITNESS_VALUES - 1),))


def _glances(weights: dict[str, torch.Tensor]) -> dict[str, Glance]:
    """One look at each weight that has values here; they are gathered at once for each device and dtype."""
    alike, found = {}, {}
    for name, weight in weights.items():
        if weight.numel() and not weight.is_meta:
            alike.setdefault((weight.device, weight.dtype), []).append((name, weight))
    for (device, dtype), group in alike.items():
        with torch.autocast(device.type, enabled=False):  # which refuses to join some dtypes
            values = torch.cat([_few(weight) for _, weight in group]).cpu().view(torch.uint8).numpy().tobytes()
        size = len(values) // len(group)
        for begin, (name, weight) in zip(range(0, len(values), size), group, strict=True):
            version = None if weight.is_inference() else weight._version
            found[name] = Glance((dtype, values[begin : begin + size]), weight.data_ptr(), version)
    return found


def _checksums(weight: torch.Tensor, factors: dict) -> list[int]:
    """Sums over the bytes of a tensor that depend on their order, one a piece of it, made on its device.

    Every word of 4 bytes counts with an odd factor of its own, in 8 bytes; `factors` holds these by device.
    """
    if weight.device not in factors:
        factors[weight.device] = torch.arange(1, SUMMED_AT_ONCE // 2, 2, device=weight.device)
    sums = []
    for piece in weight.reshape(-1).view(torch.uint8).split(SUMMED_AT_ONCE):
        words = F.pad(piece, (0, -len(piece) % 4)).view(torch.int32)
        sums.append((words * factors[weight.device][: len(words)]).sum())
    return torch.stack(sums).tolist()
