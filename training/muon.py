"""Muon for the matrices of a model, AdamW (torch's) for everything else, behind one optimizer's face.

Muon (Keller Jordan, 2024) orthogonalises the update of each matrix; scaled as here (Liu et al., 2025, arXiv
2502.16982) its updates are as large as AdamW's at the same rate. torch.optim.Muon does the same in bfloat16, which a
CPU without such instructions multiplies thirty times slower than float32; here the precision is the matrix's own.
"""

import torch
from torch import nn

# Quintic iteration that takes singular values towards one; its author's coefficients.
_COEFFICIENTS, _ITERATIONS = (3.4445, -4.7750, 2.0315), 5


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """Matrices with the same singular vectors and singular values near one. [..., m, n] -> the same."""
    a, b, c = _COEFFICIENTS
    wide = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT
    wide = wide / wide.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = wide @ wide.mT
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide if matrices.shape[-2] <= matrices.shape[-1] else wide.mT


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for matrices.

    Args:
        groups: Parameter groups with `lr` and `weight_decay`.
        momentum: Nesterov's.
    """

    def __init__(self, groups, lr: float = 1e-3, weight_decay: float = 0.0, momentum: float = 0.95):
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        """One step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                average = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                # A convolution is the matrix that it multiplies a patch with.
                update = orthogonalise(parameter.grad.lerp(average, group["momentum"]).flatten(1))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.view_as(parameter), alpha=-0.2 * group["lr"] * max(update.shape) ** 0.5)


class MuonWithAdamW(torch.optim.Optimizer):
    """Steps `Muon` and `torch.optim.AdamW` together.

    Args:
        groups: Parameter groups with `lr`, `weight_decay` and `muon` (bool): those of Muon hold matrices only.
        betas, eps: AdamW's.
    """

    def __init__(self, groups: list[dict], betas=(0.9, 0.999), eps: float = 1e-8):
        matrices = [group for group in groups if group["muon"]]
        rest = [group for group in groups if not group["muon"]]
        self.parts = []
        if matrices:
            self.parts.append(Muon(matrices))
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


def make_optimizer(trainer, groups: list[dict]) -> torch.optim.Optimizer:
    """The optimizer of a trainer's arguments; with groups that say `muon`, Muon beside AdamW with its settings."""
    optimizer_class, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    if "muon" in groups[0]:
        return MuonWithAdamW(groups, betas=options["betas"], eps=options["eps"])
    return optimizer_class(groups, **options)


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon updates a parameter: weights of linear layers and convolutions, not embeddings or output heads."""
    return parameter.ndim >= 2 and not any(part in name for part in ("embed", "encoding", "lm_head"))
