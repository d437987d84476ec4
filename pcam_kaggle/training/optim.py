"""Creates the optimizer of a config: AdamW of torch, or Muon, which updates all weight matrices at once."""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from pcam_kaggle.core.config import Config
from pcam_kaggle.models.backbone import Backbone
from pcam_kaggle.models.weights import import_timm

WEIGHT_DECAY = 0.05
# Of Muon (Jordan et al. 2024), and of Adam for the other parameters.
MOMENTUM, BETAS, EPS = 0.95, (0.9, 0.95), 1e-7
# A step of Muon times this factor and the root of the longer side is as large as one of AdamW (Liu et al. 2025, equation 4).
MATCH_ADAMW = 0.2
# Coefficients a, b, c of X ← aX + b(XXᵀ)X + c(XXᵀ)²X, one row per iteration (Cesista et al. 2025); they bring singular values
# between 0.01 and 1 to within 0.7 to 1.2.
NEWTON_SCHULZ = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
# Sides of the Gram matrices that are computed together are rounded up to a power of two, at least this.
LEAST_BUCKET = 16
# Smaller or longer matrices are updated by Adam.
LEAST_ROWS, MOST_ELONGATED = 4, 128
Groups = list[dict[str, Any]]


def create_optimizer(net: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Return the optimizer of `config`, which a CUDA graph may capture; its groups have `lr` (a tensor) and `lr_scale`."""
    groups, device = parameter_groups(net, config.layer_decay), next(net.parameters()).device
    if config.optimizer == "muon":
        # Tables of positions, biases and tokens have other names, or do not decay.
        weights = {id(p) for name, p in net.named_parameters() if "weight" in name.rpartition(".")[2]}
        groups = [part for group in groups for part in _split_matrices(group, weights)]
    for group in groups:
        group["lr"] = torch.tensor(config.lr * group["lr_scale"], device=device)
    if config.optimizer == "muon":
        return Muon(groups)
    # The fused kernel checks for inf on the device.
    return torch.optim.AdamW(groups, fused=device.type != "mps", capturable=device.type == "cuda")


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the tensors of `state`, in the memory format of the parameters; `optimizer` keeps its options and tensors."""
    own = dict(optimizer.state)
    optimizer.load_state_dict({**state, "param_groups": optimizer.state_dict()["param_groups"]})
    for p, loaded in optimizer.state.items():
        for name, tensor in loaded.items():
            # A fused kernel takes for granted that a parameter and its state have the same layout.
            like = p if tensor.shape == p.shape else tensor
            loaded[name] = own.get(p, {}).get(name, torch.empty_like(like)).copy_(tensor)


def parameter_groups(net: nn.Module, layer_decay: float = 1.0) -> Groups:
    """Split the trained parameters of `net` into groups with `params`, `weight_decay` (0 for vectors) and `lr_scale`.

    In a model of timm, the learning rate of a layer is `layer_decay` times that of the layer above it.
    """
    if isinstance(net, Backbone):
        timm_net: Any = net.net
        import_timm()
        from timm.optim import param_groups_layer_decay

        # Positions and class tokens of transformers do not decay either.
        exempt = timm_net.no_weight_decay() if hasattr(timm_net, "no_weight_decay") else ()
        return param_groups_layer_decay(timm_net, WEIGHT_DECAY, exempt, layer_decay=layer_decay)
    parameters = list(net.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY, "lr_scale": 1.0},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0, "lr_scale": 1.0},
    ]


def is_matrix(parameter: Tensor) -> bool:
    """Return whether Muon can update `parameter`: no vector, position, depthwise filter or very narrow matrix."""
    if parameter.ndim < 2 or 1 in parameter.shape[:2]:
        return False
    short, long = sorted(_sides(parameter))
    return short >= LEAST_ROWS and long <= MOST_ELONGATED * short


def _split_matrices(group: dict[str, Any], weights: set[int]) -> Groups:
    split: dict[bool, list[Tensor]] = {True: [], False: []}
    for p in group["params"]:
        split[group["weight_decay"] > 0 and id(p) in weights and is_matrix(p)].append(p)
    return [{**group, "params": params, "is_muon": muon} for muon, params in split.items() if params]


class Muon(torch.optim.Optimizer):
    """Muon for weight matrices (Jordan et al. 2024), and AdamW with Nesterov momentum for other parameters.

    The Nesterov momentum of a matrix is replaced by the nearest semi-orthogonal matrix, approximately. With a gradient scaler a
    step whose gradients are not finite changes nothing. Groups have `params`, `lr` (a tensor), `weight_decay` and `is_muon`.
    """

    # torch's GradScaler then sets `found_inf` and does not read it.
    _step_supports_amp_scaling = True
    found_inf: Tensor | None = None

    def __init__(self, groups: Groups) -> None:
        super().__init__(groups, {})
        self._matrices, self._others = (
            [p for group in self.param_groups if group["is_muon"] == is_muon for p in group["params"]]
            for is_muon in (True, False)
        )
        self._orthogonalize = Orthogonalizer(self._matrices)
        self._momentum = self._flat("momentum", self._matrices)
        self._mean, self._square = (self._flat(name, self._others) for name in ("mean", "square"))
        self._steps = self._momentum.new_zeros(())
        for p in self._others:
            self.state[p]["step"] = self._steps

    def _flat(self, name: str, parameters: list[Tensor]) -> Tensor:
        # The state of each parameter has a view of it.
        flat = self.param_groups[0]["lr"].new_zeros(sum(p.numel() for p in parameters))
        for p, part in zip(parameters, _split(flat, parameters), strict=True):
            self.state[p][name] = part
        return flat

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update the parameters from their gradients."""
        keep = 1.0 - self.found_inf if self.found_inf is not None else torch.ones_like(self._steps)
        rates = [group["lr"] * keep for group in self.param_groups]
        for rate, group in zip(rates, self.param_groups, strict=True):
            if group["weight_decay"]:
                torch._foreach_mul_(group["params"], 1 - rate * group["weight_decay"])
        for parameters, direction in ((self._matrices, self._matrix_directions), (self._others, self._adam_directions)):
            if parameters:
                is_muon = parameters is self._matrices
                pairs = zip(rates, self.param_groups, strict=True)
                steps = [-rate for rate, group in pairs if group["is_muon"] == is_muon for _ in group["params"]]
                torch._foreach_add_(parameters, direction(_gradients(parameters, keep), keep, steps))

    def _matrix_directions(self, gradients: Tensor, keep: Tensor, steps: list[Tensor]) -> list[Tensor]:
        self._momentum.lerp_(gradients, (1 - MOMENTUM) * keep)
        return self._orthogonalize(gradients.lerp_(self._momentum, MOMENTUM), steps)

    def _adam_directions(self, gradients: Tensor, keep: Tensor, steps: list[Tensor]) -> list[Tensor]:
        first, second = BETAS
        self._steps.add_(keep)
        self._mean.lerp_(gradients, (1 - first) * keep)
        self._square.lerp_(gradients.square(), (1 - second) * keep)
        # Zero before the first step that is kept.
        root = (self._square / (1 - second**self._steps).clamp(min=EPS)).sqrt_().add_(EPS)
        # Nesterov momentum has the weights of the next step's mean, with this gradient in the place of the next.
        directions = self._mean.lerp(gradients, 1 - first).div_(root).div_(1 - first ** (self._steps + 1))
        return list(torch._foreach_mul(_split(directions, self._others), steps))


def _split(flat: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    parts = flat.split([p.numel() for p in parameters])
    return [part.view(p.shape) for part, p in zip(parts, parameters, strict=True)]


def _gradients(parameters: list[Tensor], keep: Tensor) -> Tensor:
    """Return all gradients as one vector, zeros where `keep` is 0; a parameter without one counts as zero."""
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    return torch.where(keep > 0, flat, 0.0)


class Orthogonalizer:
    """Replaces matrices by approximately the nearest semi-orthogonal ones, UVᵀ of the singular value decomposition USVᵀ.

    The Newton-Schulz iteration (Jordan et al. 2024) is computed for all matrices at once, and on the smaller of XXᵀ and XᵀX
    instead of X: with G = XXᵀ / ‖X‖², each iteration multiplies X by Q = aI + bG + cG² and G by Q². These Gram matrices are
    padded by zeros, which stay zeros, to the side of their bucket. The matrices have the shapes of `parameters`.
    """

    def __init__(self, parameters: list[Tensor]) -> None:
        self.parameters = parameters
        self.buckets: dict[int, list[int]] = {}
        for index, p in enumerate(parameters):
            side = max(LEAST_BUCKET, 1 << (min(_sides(p)) - 1).bit_length())
            self.buckets.setdefault(side, []).append(index)
        # Made here, because a CUDA graph cannot capture a copy from memory that is not pinned.
        self.factors = {
            side: parameters[0].new_tensor([MATCH_ADAMW * max(_sides(parameters[index])) ** 0.5 for index in members])
            for side, members in self.buckets.items()
        }

    def __call__(self, flat: Tensor, steps: list[Tensor]) -> list[Tensor]:
        """Return the matrices in `flat` (float32, concatenated) orthogonalised and scaled by `steps`, in their shapes."""
        directions = _split(flat, self.parameters)
        for side, members in self.buckets.items():
            chosen = [directions[index].flatten(1) for index in members]
            wide = [matrix.T if matrix.shape[0] > matrix.shape[1] else matrix for matrix in chosen]
            grams = flat.new_zeros(len(members), side, side)
            for gram, matrix in zip(grams, wide, strict=True):
                torch.mm(matrix, matrix.T, out=gram[: len(matrix), : len(matrix)])
            # The squared Frobenius norms.
            squares = grams.diagonal(dim1=1, dim2=2).sum(1).clamp(min=EPS**2)
            scale = torch.stack([steps[index] for index in members]) * self.factors[side] * squares.rsqrt()
            products = iterate(grams / squares[:, None, None]) * scale[:, None, None]
            for index, matrix, product in zip(members, chosen, products, strict=True):
                rows, columns = matrix.shape
                made = matrix @ product[:columns, :columns] if rows > columns else product[:rows, :rows] @ matrix
                directions[index] = made.view_as(self.parameters[index])
        return directions


def _sides(parameter: Tensor) -> tuple[int, int]:
    return parameter.shape[0], parameter.shape[1:].numel()


def iterate(grams: Tensor) -> Tensor:
    """Return the Newton-Schulz factors of matrices X, from their Gram matrices XXᵀ / ‖X‖², both float32 (n, side, side)."""
    factors: list[Tensor] = []
    for a, b, c in NEWTON_SCHULZ:
        if factors:
            grams = factors[-1] @ grams @ factors[-1]
        q = torch.baddbmm(grams, grams, grams, beta=b, alpha=c)
        q.diagonal(dim1=1, dim2=2).add_(a)
        factors.append(q)
    return functools.reduce(lambda product, q: q @ product, factors)
