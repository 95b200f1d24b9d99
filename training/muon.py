"""Muon for the matrices of a model, AdamW for everything else, behind one optimizer's face.

Both are torch's. Muon (Keller Jordan, 2024) orthogonalises the update of each matrix; with torch's `match_rms_adamw`
its updates are as large as AdamW's at the same rate.
"""

import torch
from torch import nn


class MuonWithAdamW(torch.optim.Optimizer):
    """Steps `torch.optim.Muon` and `torch.optim.AdamW` together.

    Args:
        groups: Parameter groups with `lr`, `weight_decay` and `muon` (bool): those of Muon hold matrices only.
        betas, eps: AdamW's.
    """

    def __init__(self, groups: list[dict], betas=(0.9, 0.999), eps: float = 1e-8):
        matrices = [group for group in groups if group["muon"]]
        rest = [group for group in groups if not group["muon"]]
        self.parts = []
        if matrices:
            self.parts.append(torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw"))
        if rest:
            self.parts.append(torch.optim.AdamW(rest, betas=betas, eps=eps))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        # Schedulers write rates into the groups: each is one dict, shared with its part.
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure=None):
        """One step of both; returns the closure's loss, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon updates a parameter: weights of linear layers, not embeddings or output heads."""
    return parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
