"""Channels that stand or fall together, masked for a trial or removed for good (through torch-pruning's graph)."""

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from thresher.errors import ModelError, UsageError
from thresher.vision.layers import evaluating, replace_module, unwrap_logits

Kept = Mapping[str, torch.Tensor]  # of each group, by name, the indices of the channels that stay, int64


@dataclass(frozen=True)
class ChannelGroup:
    """Output channels of one convolution, or of several that residual additions tie to each other.

    name: of the first of them to run; root: the one that torch-pruning starts from; makers: all of them; readers:
    layers that read them, each with the group's channel of every input of its (-1: none of this group).
    """

    name: str
    root: str
    channels: int
    makers: tuple[str, ...]
    readers: tuple[tuple[str, torch.Tensor], ...]


def run_order(model: nn.Module, example: torch.Tensor) -> dict[str, int]:
    """Convolutions and linear layers, by name, numbered as they run."""
    order: dict[str, int] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            order.setdefault(name, len(order))

        return hook

    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    handles = [m.register_forward_hook(note(name)) for name, m in layers]
    try:
        with evaluating(model), torch.no_grad():
            unwrap_logits(model(example))
    finally:
        for handle in handles:
            handle.remove()
    return order


def find_head(model: nn.Module, example: torch.Tensor, classes: int) -> str:
    """The layer whose outputs are the logits, one row for each class. Raises ModelError."""
    order = run_order(model, example)
    name = max(order, key=lambda n: order[n], default="")
    if not name or rows_of(model.get_submodule(name)) != classes:
        raise ModelError(f"the last layer ({name or 'none'}) does not give one number for each of {classes} classes")
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, i, o: seen.append(o))
    try:
        with evaluating(model), torch.no_grad():
            logits = unwrap_logits(model(example))
    finally:
        handle.remove()
    if not torch.equal(seen[-1].flatten(1), logits):
        raise ModelError(f"the model changes what its last layer ({name}) gives: its classes cannot be taken apart")
    return name


def rows_of(head: nn.Module) -> int:
    """Outputs of a linear layer or a convolution; 0 of anything else."""
    if isinstance(head, nn.Linear):
        return head.out_features
    return head.out_channels if isinstance(head, nn.Conv2d) and head.groups == 1 else 0


@torch.no_grad()
def restrict_head(model: nn.Module, name: str, classes: torch.Tensor) -> None:
    """Leave only the logits of these classes, in this order, in place."""
    old = model.get_submodule(name)
    if isinstance(old, nn.Linear):
        new: nn.Linear | nn.Conv2d = nn.Linear(old.in_features, len(classes), old.bias is not None)
    elif isinstance(old, nn.Conv2d):
        new = copy.deepcopy(old)
        new.out_channels = len(classes)
    else:
        raise UsageError(f"{name} is no layer that gives logits")
    new.weight = nn.Parameter(old.weight[classes].clone())
    new.bias = None if old.bias is None else nn.Parameter(old.bias[classes].clone())
    replace_module(model, name, new.train(old.training))


def _graph(model: nn.Module, example: torch.Tensor) -> Any:
    try:
        import torch_pruning
    except ImportError as error:
        raise UsageError("torch-pruning is not installed: pip install --no-deps torch-pruning") from error
    parameters = [(p, p.requires_grad) for p in model.parameters()]
    try:
        with evaluating(model), warnings.catch_warnings(), torch.enable_grad():
            model.requires_grad_(True)  # it follows gradients
            warnings.simplefilter("ignore")
            return torch_pruning.DependencyGraph().build_dependency(
                model, example, forward_fn=lambda m, x: unwrap_logits(m(x)), verbose=False
            )
    except Exception as error:
        raise ModelError(f"the model's graph cannot be traced: {_first_line(error)}") from error
    finally:
        for parameter, needed in parameters:
            parameter.requires_grad_(needed)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def channel_groups(model: nn.Module, example: torch.Tensor, head: str) -> tuple[list[ChannelGroup], dict[str, str]]:
    """All groups in the order they run, and those left alone with the reason, by name.

    Left alone: channels behind a norm over channels (LayerNorm, GroupNorm), in convolutions of several groups that are
    not depth-wise, and in layers that run twice: removing them is not the same as setting them to 0. Raises ModelError
    for a model that cannot be traced.
    """
    graph, order = _graph(model, example), run_order(model, example)
    last = model.get_submodule(head)
    names = {m: n for n, m in model.named_modules()}
    found: list[ChannelGroup] = []
    left: dict[str, str] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        everything = list(graph.get_all_groups(ignored_layers=[last], root_module_types=[nn.Conv2d, nn.Linear]))
    for group in everything:
        makers, readers, reason = [], [], ""
        channels = len(group[0].idxs)
        for item in group:
            module, function = item.dep.target.module, item.dep.handler
            if module not in names:
                if type(module).__name__ == "UnwrappedParameter":
                    reason = "a parameter of its own goes through them"
                continue
            name = names[module]
            depthwise = isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1
            if isinstance(module, nn.Conv2d) and module.groups > 1 and not depthwise:
                reason = f"{name} has {module.groups} groups"
            elif isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.LocalResponseNorm):
                reason = f"{name} normalises over channels"
            elif isinstance(module, nn.Conv2d | nn.Linear):
                if name not in order:
                    reason = f"{name} does not run"
                elif graph.is_out_channel_pruning_fn(function):
                    makers.append(name)
                elif not depthwise:
                    inputs = module.in_channels if isinstance(module, nn.Conv2d) else module.in_features
                    of = torch.full((inputs,), -1)
                    of[torch.tensor(item.idxs)] = torch.tensor(item.root_idxs)
                    readers.append((name, of))
        if not makers:
            continue
        first = min(makers, key=lambda n: order.get(n, len(order)))
        if not readers:
            reason = reason or "nothing that can be cut reads them"
        if reason:
            left[first] = reason
        else:
            found.append(
                ChannelGroup(first, names[group[0].dep.target.module], channels, tuple(makers), tuple(readers))
            )
    found.sort(key=lambda g: order[g.name])
    reached = {names[m] for m in graph.module2node if m in names}
    missed = [n for n in order if n not in reached]
    if missed:
        raise ModelError(f"the model's graph cannot be traced: no gradient reaches {missed[0]} from the logits")
    return found, left


@contextmanager
def gated(model: nn.Module, group: ChannelGroup, gates: torch.Tensor) -> Iterator[None]:
    """Within, the group's channels are multiplied by `gates` [channels] or [images, channels] wherever they are
    read."""

    def hook(of: torch.Tensor) -> Any:
        def multiply(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            full = torch.where(of >= 0, gates[..., of.clamp(min=0)], 1.0)
            if isinstance(module, nn.Conv2d):
                full = full[..., None, None]
            return (inputs[0] * full, *inputs[1:])

        return multiply

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(of)) for name, of in group.readers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def masked(model: nn.Module, groups: list[ChannelGroup], kept: Kept) -> Iterator[None]:
    """Within, only the kept channels are read; groups without an entry stay whole."""
    with ExitStack() as stack:
        for group in groups:
            if group.name in kept:
                gates = torch.zeros(group.channels)
                gates[kept[group.name]] = 1
                stack.enter_context(gated(model, group, gates))
        yield


def remove_channels(model: nn.Module, example: torch.Tensor, groups: list[ChannelGroup], kept: Kept) -> None:
    """Leave only the kept channels, in place: what masking computes, in smaller layers. Groups without an entry stay.
    Raises UsageError for a group that would be empty or an index it does not have."""
    import torch_pruning

    known = {g.name for g in groups}
    unknown = [name for name in kept if name not in known]
    if unknown:
        raise UsageError(f"the model has no channels {unknown[0]} to keep")
    graph = _graph(model, example)
    for group in groups:
        if group.name not in kept:
            continue
        stays = set(kept[group.name].tolist())
        if not stays or not stays <= set(range(group.channels)):
            raise UsageError(f"{group.name} has channels 0 to {group.channels - 1}, and at least one must stay")
        gone = [i for i in range(group.channels) if i not in stays]
        if gone:
            root = model.get_submodule(group.root)
            make = (
                torch_pruning.prune_conv_out_channels
                if isinstance(root, nn.Conv2d)
                else torch_pruning.prune_linear_out_channels
            )
            graph.get_pruning_group(root, make, gone).prune()


def shape_pruned(model: nn.Module, example: torch.Tensor, classes: int, counts: Mapping[str, int]) -> None:
    """Give a fresh model the shapes of a pruned one, in place, for its weights to be loaded: so many logits, and
    channels in each group. Raises UsageError, ModelError."""
    try:
        with torch.no_grad():
            rows = unwrap_logits(model.eval()(example)).shape[1]
    except RuntimeError as error:
        raise ModelError(f"the model does not run on images {list(example.shape[1:])}: {_first_line(error)}") from error
    if not 1 <= classes <= rows:
        raise UsageError(f"the model gives {rows} logits, and {classes} are asked for")
    head = find_head(model, example, rows)
    if classes < rows:
        restrict_head(model, head, torch.arange(classes))
    groups, _ = channel_groups(model, example, head)
    sizes = {g.name: g.channels for g in groups}
    wrong = [name for name, count in counts.items() if not 1 <= count <= sizes.get(name, 0)]
    if wrong:
        raise UsageError(f"{wrong[0]} cannot have {counts[wrong[0]]} of {sizes.get(wrong[0], 0)} channels")
    remove_channels(model, example, groups, {name: torch.arange(count) for name, count in counts.items()})
