"""The convolutions of a model: where they are, what each costs, and which are left alone and why."""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from torch import nn

from thresher.errors import UsageError


def unwrap_logits(output: Any) -> torch.Tensor:
    """Logits [N, classes], also of a model of transformers. Raises UsageError for anything else."""
    logits = getattr(output, "logits", output)
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2:
        raise UsageError("the model gives no logits of the form [images, classes]")
    return logits


def channels_last(module: nn.Module) -> nn.Module:
    """The module, its weights laid out in place as convolutions on a CPU like them."""
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def contiguous(module: nn.Module) -> nn.Module:
    """The module, its weights laid out in place as other runtimes expect them."""
    return module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload,no-any-return]


@dataclass(frozen=True)
class Convolution:
    """A convolution of a model as one example runs it.

    outputs, inputs: channels; kernel; size, out_size: height and width of what it reads and writes. left: why it is not
    decomposed, or nothing.
    """

    name: str
    outputs: int
    inputs: int
    kernel: tuple[int, int]
    groups: int
    size: tuple[int, int]
    out_size: tuple[int, int]
    left: str = ""

    @property
    def grid(self) -> int:
        """Pixels that it reads, of one image."""
        return self.size[0] * self.size[1]

    @property
    def out_grid(self) -> int:
        """Pixels that it writes."""
        return self.out_size[0] * self.out_size[1]

    @property
    def pointwise(self) -> bool:
        """Whether it is 1x1: two layers by SVD instead of three by Tucker."""
        return self.kernel == (1, 1)

    @property
    def macs(self) -> int:
        """Multiply-adds of one image."""
        return self.out_grid * self.outputs * self.inputs // self.groups * self.kernel[0] * self.kernel[1]

    @property
    def parameters(self) -> int:
        """Of the weight, without the bias."""
        return self.outputs * self.inputs // self.groups * self.kernel[0] * self.kernel[1]

    def macs_at(self, outer: int, inner: int) -> int:
        """Multiply-adds of one image when decomposed; of 1x1 ones `outer` is the rank."""
        if self.pointwise:  # the first of the two has the stride
            return self.out_grid * outer * (self.inputs + self.outputs)
        core = self.out_grid * self.kernel[0] * self.kernel[1] * inner * outer
        return self.grid * self.inputs * inner + core + self.out_grid * outer * self.outputs

    def parameters_at(self, outer: int, inner: int) -> int:
        """Of the weights when decomposed."""
        if self.pointwise:
            return outer * (self.inputs + self.outputs)
        core = self.kernel[0] * self.kernel[1] * inner * outer
        return self.inputs * inner + core + outer * self.outputs


@dataclass(frozen=True)
class Survey:
    """All convolutions in the order they run, and what the whole model costs.

    macs: multiply-adds of one image in the layers that torch counts; parameters: all of them.
    """

    convolutions: list[Convolution]
    macs: int
    parameters: int

    @property
    def open(self) -> list[Convolution]:
        """Those that may be decomposed."""
        return [c for c in self.convolutions if not c.left]


def weights_digest(model: nn.Module) -> str:
    """Names a model's weights, for a run that goes on to notice that they are others."""
    hashed = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        hashed.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        hashed.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()[:16]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, as long as the context lasts; then each of its modules is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def count_macs(model: nn.Module, example: torch.Tensor) -> int:
    """Multiply-adds of one image, as torch's FlopCounterMode counts convolutions and matrix products."""
    from torch.utils.flop_counter import FlopCounterMode

    with evaluating(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(example)
    return int(counter.get_total_flops()) // 2 // len(example)


def count_parameters(model: nn.Module) -> int:
    """Shared ones once."""
    return sum(p.numel() for p in model.parameters())


def survey(model: nn.Module, example: torch.Tensor, first: bool = False, leave: tuple[str, ...] = ()) -> Survey:
    """Run `example` [1, C, H, W] and note every convolution.

    Left alone: the first one and any with up to 3 inputs unless `first`; grouped ones; those that are, lie in, or match
    (as `*.shortcut.*`) one of `leave`; those that share a weight, run more than once, or compute something else than
    Conv2d. Raises UsageError for a model without convolutions, and for weights that are not finite.
    """
    modules = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    if not modules:
        raise UsageError("the model has no Conv2d layers to decompose")
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise UsageError(f"{name} of the model holds numbers that are not finite")
    ran: list[tuple[str, torch.Size, torch.Size]] = []

    def note(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            ran.append((name, inputs[0].shape, output.shape))

        return hook

    handles = [m.register_forward_hook(note(name)) for name, m in modules.items()]
    try:
        with evaluating(model), torch.no_grad():
            unwrap_logits(model(example))
    finally:
        for handle in handles:
            handle.remove()
    times = [name for name, _, _ in ran]
    owners = [m.weight for m in modules.values()]
    found: list[Convolution] = []
    for name, in_shape, out_shape in ran:
        if name in (c.name for c in found):
            continue
        m = modules[name]
        left = ""
        if m.groups > 1:
            left = "depth-wise" if m.groups == m.in_channels else f"{m.groups} groups"
        elif times.count(name) > 1:
            left = "runs more than once"
        elif sum(w is m.weight for w in owners) > 1:
            left = "shares its weight"
        elif not first and (m.in_channels <= 3 or name == ran[0][0]):
            left = "the first layer"
        elif any(name == part or name.startswith(part + ".") or fnmatch(name, part) for part in leave):
            left = "asked to be left"
        elif not _is_plain(m):
            left = f"{type(m).__name__} computes something of its own"
        elif m.weight.dim() != 4 or min(m.weight.shape[:2]) < 2:
            left = "one channel"
        kernel = (int(m.kernel_size[0]), int(m.kernel_size[1]))
        sizes = (in_shape[-2], in_shape[-1]), (out_shape[-2], out_shape[-1])
        found.append(Convolution(name, m.out_channels, m.in_channels, kernel, m.groups, *sizes, left))
    return Survey(found, count_macs(model, example), count_parameters(model))


def _is_plain(conv: nn.Conv2d) -> bool:
    """Whether a subclass computes what Conv2d would; told by numbers."""
    if type(conv) is nn.Conv2d:
        return not (conv._forward_hooks or conv._forward_pre_hooks) and not hasattr(conv, "parametrizations")
    # Odd and even sizes: padding to a size differs on one of them.
    try:
        for size in (13, 16):
            x = torch.randn(1, conv.in_channels, size, size, dtype=conv.weight.dtype, device=conv.weight.device)
            with torch.no_grad():
                if not torch.equal(conv(x), nn.Conv2d.forward(conv, x)):
                    return False
    except RuntimeError:
        return False
    return True


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` at a dotted name."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


@torch.no_grad()
def fold_batch_norms(model: nn.Module, example: torch.Tensor) -> list[tuple[str, str]]:
    """Fold each batch norm that follows a convolution into it, in place, in eval mode; returns the names of both.

    A pair is found by running `example`: the norm's input is the very output of the convolution (or of the last one of
    a decomposed layer). A fold that changes what the model gives by more than rounding (the output is also used
    elsewhere) is taken back.
    """
    model.eval()
    outputs: dict[int, tuple[str, torch.Tensor]] = {}
    pairs: list[tuple[str, str]] = []

    def hook(name: str) -> Any:
        def seen(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
            if isinstance(module, nn.Conv2d):
                outputs[id(output)] = name, output
            elif id(inputs[0]) in outputs:
                pairs.append((outputs[id(inputs[0])][0], name))

        return seen

    modules = dict(model.named_modules())
    handles = [
        m.register_forward_hook(hook(name)) for name, m in modules.items() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)
    ]
    try:
        probe = torch.rand(2, *example.shape[1:], generator=torch.Generator().manual_seed(0)).to(example)
        expected = unwrap_logits(model(probe))
    finally:
        for handle in handles:
            handle.remove()
    folded: list[tuple[str, str]] = []
    for conv_name, norm_name in pairs:
        conv, norm = modules[conv_name], modules[norm_name]
        once = [c for c, _ in pairs].count(conv_name) == 1 and [n for _, n in pairs].count(norm_name) == 1
        if (
            not once
            or not isinstance(conv, nn.Conv2d)
            or not isinstance(norm, nn.BatchNorm2d)
            or norm.running_mean is None
        ):
            continue
        weight, bias = conv.weight, conv.bias
        merged = nn.utils.fusion.fuse_conv_bn_weights(
            weight.double(), None if bias is None else bias.double(), norm.running_mean.double(),
            norm.running_var.double(), norm.eps,  # type: ignore[union-attr]
            None if norm.weight is None else norm.weight.double(), None if norm.bias is None else norm.bias.double(),
        )  # fmt: skip
        conv.weight, conv.bias = (nn.Parameter(p.to(weight.dtype), weight.requires_grad) for p in merged)
        replace_module(model, norm_name, nn.Identity())
        given = unwrap_logits(model(probe))
        if (given - expected).abs().max() > 1e-4 * expected.abs().max().clamp(min=1e-6):
            conv.weight = weight
            conv.bias = bias
            replace_module(model, norm_name, norm)
        else:
            folded.append((conv_name, norm_name))
    return folded


def shape_folded(model: nn.Module, pairs: Iterable[tuple[str, str]]) -> None:
    """Give a fresh model the layers of a folded one, in place, for its weights to be loaded. Raises UsageError."""
    for conv_name, norm_name in pairs:
        try:
            conv, norm = model.get_submodule(conv_name), model.get_submodule(norm_name)
        except AttributeError as error:
            raise UsageError(f"the model has no layers {conv_name} and {norm_name}") from error
        if not isinstance(conv, nn.Conv2d) or not isinstance(norm, nn.BatchNorm2d):
            raise UsageError(f"{conv_name} and {norm_name} are no convolution and batch norm")
        if conv.bias is None:
            conv.bias = nn.Parameter(conv.weight.new_zeros(conv.out_channels))
        replace_module(model, norm_name, nn.Identity())
