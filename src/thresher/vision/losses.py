"""What a student learns from labels and from its teacher: the losses of the literature and mixtures of them.

Logits are [batch, classes]; feature maps [batch, channels, height, width], of the same layers in both. Every loss
is a mean over the batch and zero, with zero gradient, where student and teacher are equal.
"""

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

from thresher.errors import UsageError
from thresher.vision.layers import unwrap_logits

Tensors = list[torch.Tensor]


@dataclass(frozen=True)
class Objective:
    """The weight of each part. A part of weight 0 is not computed.

    labels: cross-entropy; logits, soft (at `temperature`), hint, attention, similarity, distance, angle: the functions
    below; soft_adversarial: soft targets of clean images for attacked ones, attacked to raise the cross-entropy
    (`inner` "labels") or the divergence from the teacher ("teacher"). Raises UsageError.
    """

    labels: float = 0.0
    logits: float = 0.0
    soft: float = 0.0
    temperature: float = 4.0
    hint: float = 0.0
    attention: float = 0.0
    similarity: float = 0.0
    distance: float = 0.0
    angle: float = 0.0
    soft_adversarial: float = 0.0
    inner: str = "labels"

    def __post_init__(self) -> None:
        weights = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("temperature", "inner")}
        if not all(0 <= w < math.inf for w in weights.values()) or not any(weights.values()):
            raise UsageError(f"weights of an objective are not negative, and not all are 0: {weights}")
        if not 0 < self.temperature < math.inf or self.inner not in ("labels", "teacher"):
            raise UsageError("a temperature is above 0, and `inner` is labels or teacher")

    @property
    def needs_teacher(self) -> bool:
        """Whether anything but labels is asked for."""
        return any((self.logits, self.soft, self.needs_features, self.soft_adversarial))

    @property
    def needs_features(self) -> bool:
        """Whether feature maps are compared."""
        return any((self.hint, self.attention, self.similarity, self.distance, self.angle))


OBJECTIVES = {
    "cross-entropy": Objective(labels=1.0),
    "logits": Objective(logits=1.0),  # Ba & Caruana 2013
    "soft": Objective(labels=0.1, soft=0.9),  # Hinton et al. 2015
    "hint": Objective(labels=1.0, hint=1.0),  # Romero et al. 2015 (FitNets)
    "attention": Objective(labels=1.0, attention=1000.0),  # Zagoruyko & Komodakis 2017
    "similarity": Objective(labels=1.0, similarity=3000.0),  # Tung & Mori 2019
    "relation": Objective(labels=1.0, distance=25.0, angle=50.0),  # Park et al. 2019
    "mixed": Objective(labels=0.1, soft=0.9, hint=1.0),
    "ard": Objective(labels=0.1, soft_adversarial=0.9),  # Goldblum et al. 2020
    "rslad": Objective(soft=1 / 6, soft_adversarial=5 / 6, temperature=1.0, inner="teacher"),  # Zi et al. 2021
}


def find_objective(name: str) -> Objective:
    """An objective by name. Raises UsageError."""
    if name not in OBJECTIVES:
        raise UsageError(f"unknown loss {name}: choose one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]


def logit_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Half of the squared distance of the logits (Ba & Caruana 2013)."""
    return (student - teacher).square().sum(1).mean() / 2


def soft_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 KL(softmax(t / T) || softmax(s / T)): gradients of the size of cross-entropy's at every T (Hinton 2015,
    2.1)."""
    expected = F.log_softmax(teacher / temperature, 1)
    given = F.log_softmax(student / temperature, 1)
    return temperature**2 * F.kl_div(given, expected, reduction="batchmean", log_target=True)


def hint_loss(student: Tensors, teacher: Tensors) -> torch.Tensor:
    """Mean squared difference of feature maps, mean over layers. A decomposed layer keeps its shape: no regressor."""
    return torch.stack([F.mse_loss(s, t) for s, t in zip(student, teacher, strict=True)]).mean()


def attention_loss(student: Tensors, teacher: Tensors) -> torch.Tensor:
    """Mean squared difference of attention maps, sums over channels of squares brought to length 1; mean over
    layers."""

    def maps(x: torch.Tensor) -> torch.Tensor:
        return F.normalize(x.square().sum(1).flatten(1), dim=1)

    return torch.stack([F.mse_loss(maps(s), maps(t)) for s, t in zip(student, teacher, strict=True)]).mean()


def similarity_loss(student: Tensors, teacher: Tensors) -> torch.Tensor:
    """|S_s - S_t|^2 / batch^2, S the products of the batch's features with each other, rows of length 1; mean over
    layers."""

    def products(x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(1)
        return F.normalize(flat @ flat.T, dim=1)

    return torch.stack([F.mse_loss(products(s), products(t)) for s, t in zip(student, teacher, strict=True)]).mean()


def distance_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Huber loss of the distances between images of the batch, in units of their mean (Park 2019, 3.2.1)."""
    return F.smooth_l1_loss(_distances(student.flatten(1)), _distances(teacher.flatten(1)))


def _distances(x: torch.Tensor) -> torch.Tensor:
    square = (x[:, None] - x[None]).square().sum(2) if x.shape[1] <= 64 else _squares(x)
    apart = ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    distances = torch.where(apart, square, 1.0).clamp(min=1e-12).sqrt() * apart  # no gradient of a root at 0
    return distances / distances.sum().clamp(min=1e-12) * apart.sum()


def _squares(x: torch.Tensor) -> torch.Tensor:
    norms = x.square().sum(1)
    return norms[:, None] + norms[None] - 2 * x @ x.T


def angle_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Huber loss of the cosines of the angles that images of the batch span, three by three (Park 2019, 3.2.2)."""
    return F.smooth_l1_loss(_angles(student.flatten(1)), _angles(teacher.flatten(1)))


def _angles(x: torch.Tensor) -> torch.Tensor:
    """[batch, batch, batch]: at image i, between the ways to j and to k; from products of the batch alone."""
    products = x @ x.T
    # (x_j - x_i)(x_k - x_i) = P_jk - P_ji - P_ik + P_ii
    at = torch.diagonal(products)
    crossed = products[None] - products[:, :, None] - products[:, None, :] + at[:, None, None]
    lengths = torch.diagonal(crossed, dim1=1, dim2=2).clamp(min=1e-12).sqrt()
    apart = ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    return crossed / (lengths[:, :, None] * lengths[:, None, :]) * apart[:, :, None] * apart[:, None, :]


def objective_loss(
    objective: Objective,
    logits: torch.Tensor,
    labels: torch.Tensor,
    teacher: torch.Tensor | None = None,
    features: tuple[Tensors, Tensors] | None = None,
    attacked: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weighted sum. teacher: its logits; features: the student's and the teacher's; attacked: the student's logits
    of attacked images. Relations are those of the last layer's features, averaged over positions."""
    o = objective
    total = o.labels * F.cross_entropy(logits, labels) if o.labels else logits.new_zeros(())
    if teacher is not None:
        if o.logits:
            total = total + o.logits * logit_loss(logits, teacher)
        if o.soft:
            total = total + o.soft * soft_loss(logits, teacher, o.temperature)
        if o.soft_adversarial and attacked is not None:
            total = total + o.soft_adversarial * soft_loss(attacked, teacher, o.temperature)
    if features is not None and o.needs_features:
        ours, theirs = features
        for weight, compare in ((o.hint, hint_loss), (o.attention, attention_loss), (o.similarity, similarity_loss)):
            if weight:
                total = total + weight * compare(ours, theirs)
        last = ours[-1].mean((2, 3)), theirs[-1].mean((2, 3))
        if o.distance:
            total = total + o.distance * distance_loss(*last)
        if o.angle:
            total = total + o.angle * angle_loss(*last)
    return total


def attack_for_training(
    objective: Objective,
    student: torch.nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    teacher: torch.Tensor,
    epsilon: float,
    steps: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """Images [N, C, H, W] in [0, 1] moved by PGD from a random start within `epsilon` (Linf), against the student."""
    noise = torch.rand(images.shape, generator=generator).to(images) * 2 - 1
    moved = (images + epsilon * noise).clamp(0, 1)
    for _ in range(steps):
        moved.requires_grad_(True)
        logits = unwrap_logits(student(moved))
        labelled = objective.inner == "labels"
        loss = F.cross_entropy(logits, labels) if labelled else soft_loss(logits, teacher, 1.0)
        (slope,) = torch.autograd.grad(loss, moved)
        moved = (moved.detach() + 2.5 * epsilon / steps * slope.sign()).clamp(0, 1)
        moved = torch.minimum(torch.maximum(moved, images - epsilon), images + epsilon)
    return moved.detach()
