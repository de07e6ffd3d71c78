"""A model with its convolutions decomposed: plain nn.Modules, and a report of each layer."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from thresher.errors import UsageError
from thresher.vision.factors import Bases, Factors, find_bases, svd, tucker2
from thresher.vision.layers import Convolution, Survey, evaluating, replace_module

# What models that pad by themselves ask of a convolution.
_ASKED = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")

Ranks = Mapping[str, tuple[int, int]]  # layer: outer, inner; of 1x1 layers both are the rank


@dataclass(frozen=True)
class LayerReport:
    """What became of a convolution. kind: tucker, svd or kept, with the reason; error: relative, of its weight."""

    name: str
    kind: str
    reason: str
    channels: tuple[int, int]
    ranks: tuple[int, int]
    error: float
    macs: tuple[int, int]
    parameters: tuple[int, int]


def make_layers(conv: nn.Conv2d, factors: Factors) -> nn.Sequential:
    """The convolutions that stand for `conv`: three (Tucker) or two (1x1). The kernel keeps stride, padding and
    dilation, the last one the bias. Padding with zeros, reflected or repeated values commutes with a 1x1 convolution
    without bias."""
    dtype, device = conv.weight.dtype, conv.weight.device

    def make(weight: torch.Tensor, bias: torch.Tensor | None = None, like: bool = False) -> nn.Conv2d:
        outputs, inputs, height, width = weight.shape
        layer = nn.Conv2d(inputs, outputs, (height, width), bias=bias is not None)
        if like:
            layer = nn.Conv2d(
                inputs,
                outputs,
                (height, width),
                conv.stride,  # type: ignore[arg-type]
                conv.padding,  # type: ignore[arg-type]
                conv.dilation,  # type: ignore[arg-type]
                bias=bias is not None,
                padding_mode=conv.padding_mode,
            )
        layer.weight = nn.Parameter(weight.to(dtype=dtype, device=device).contiguous())
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone())
        return layer

    inner, outer = factors.inner.T[:, :, None, None], factors.outer[:, :, None, None]
    if conv.kernel_size == (1, 1):
        layers = nn.Sequential(make(inner, like=True), make(outer, conv.bias))
    else:
        layers = nn.Sequential(make(inner), make(factors.core, like=True), make(outer, conv.bias))
    for name in _ASKED:
        setattr(layers, name, getattr(conv, name))
    return layers


def all_bases(
    model: nn.Module, surveyed: Survey, moments: Mapping[str, torch.Tensor] | None = None
) -> dict[str, Bases]:
    """The bases of every layer that may be decomposed. moments: of each layer's input channels, to weight errors by."""
    return {
        c.name: find_bases(model.get_submodule(c.name).weight, (moments or {}).get(c.name))  # type: ignore[arg-type]
        for c in surveyed.open
    }


@torch.no_grad()
def channel_moments(model: nn.Module, surveyed: Survey, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Second moments [I, I] of the input channels of each open layer over calibration images [N, C, H, W]."""
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def seen(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].transpose(0, 1).flatten(1)
            sums[name] = sums.get(name, 0) + (x @ x.T).double()
            counts[name] = counts.get(name, 0) + x.shape[1]

        return seen

    handles = [model.get_submodule(c.name).register_forward_pre_hook(hook(c.name)) for c in surveyed.open]
    try:
        with evaluating(model):
            for piece in torch.split(images, 64):
                model(piece)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / counts[name] for name, total in sums.items()}


def factor(convolution: Convolution, bases: Bases, ranks: tuple[int, int], rounds: int = 10) -> Factors:
    """Factors of one layer at these ranks. Raises UsageError."""
    try:
        return svd(bases, ranks[0]) if convolution.pointwise else tucker2(bases, *ranks, rounds=rounds)
    except UsageError as error:
        raise UsageError(f"{convolution.name}: {error}") from error


def decompose(
    model: nn.Module, surveyed: Survey, bases: Mapping[str, Bases], ranks: Ranks, rounds: int = 10
) -> tuple[nn.Module, list[LayerReport]]:
    """A copy of `model` whose layers named in `ranks` are decomposed, and a report of every convolution.

    Raises UsageError for a layer that does not exist or is left alone, and for ranks above its channels.
    """
    known = {c.name: c for c in surveyed.convolutions}
    for name in ranks:
        if name not in known:
            raise UsageError(f"ranks are given for {name}, and the model has no such convolution")
        if known[name].left:
            raise UsageError(f"ranks are given for {name}, which is left alone: {known[name].left}")
    result = copy.deepcopy(model)
    reports = []
    for c in surveyed.convolutions:
        macs, parameters = c.macs, c.parameters
        if c.name not in ranks:
            reason = c.left or "whole is best"
            reports.append(
                LayerReport(c.name, "kept", reason, (c.outputs, c.inputs), (0, 0), 0.0, (macs, macs), (parameters,) * 2)
            )
            continue
        outer, inner = ranks[c.name]
        factors = factor(c, bases[c.name], (outer, inner), rounds)
        conv = result.get_submodule(c.name)
        assert isinstance(conv, nn.Conv2d)
        layers = make_layers(conv, factors)
        layers.train(conv.training)
        replace_module(result, c.name, layers)
        weight = conv.weight.detach().double()
        error = float((factors.weight() - weight).norm() / weight.norm().clamp(min=1e-300))
        reports.append(
            LayerReport(
                *(c.name, "svd" if c.pointwise else "tucker", "", (c.outputs, c.inputs), (outer, inner), error),
                macs=(macs, c.macs_at(outer, inner)),
                parameters=(parameters, c.parameters_at(outer, inner)),
            )
        )
    return result, reports


def shape_layers(model: nn.Module, ranks: Ranks) -> None:
    """Give a fresh model the layers of a decomposed one, in place, for its weights to be loaded. Raises UsageError."""
    for name, (outer, inner) in ranks.items():
        try:
            conv = model.get_submodule(name)
        except AttributeError as error:
            raise UsageError(f"the model has no layer {name}: the folder belongs to another model") from error
        if not isinstance(conv, nn.Conv2d) or not (1 <= outer <= conv.out_channels and 1 <= inner <= conv.in_channels):
            raise UsageError(f"{name} cannot have ranks {outer}, {inner}: the folder belongs to another model")
        size = conv.weight.shape[2:] if conv.kernel_size != (1, 1) else (1, 1)
        core = torch.zeros(outer, inner, *size)
        empty = Factors(core, torch.zeros(conv.out_channels, outer), torch.zeros(conv.in_channels, inner), 0.0)
        replace_module(model, name, make_layers(conv, empty))
