"""Where a network can be parted: values that everything behind is computed from, found in its torch.fx graph."""

import operator
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from thresher.errors import ModelError
from thresher.vision.layers import evaluating


@dataclass(frozen=True)
class Cut:
    """A feature map [N, channels, height, width] that is all the rest of the network reads.

    name: of the graph's node that makes it; before: the convolutions and linear layers that have run.
    """

    name: str
    channels: int
    before: frozenset[str]


class _Tracer(fx.Tracer):
    """Layers are not looked into, those of a user's own subclasses neither."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Conv2d | nn.Linear | nn.BatchNorm2d) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> fx.GraphModule:
    """The graph of a model in eval mode, its layers the same objects. Raises ModelError that says where it fails."""
    try:
        with evaluating(model):
            graph = _Tracer().trace(model)
    except Exception as error:  # of the tracer, or of the model's code that meets its proxies
        own = [f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename]
        where = f" ({Path(own[-1].filename).name}, line {own[-1].lineno}: {own[-1].line})" if len(own) > 1 else ""
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"the model's graph cannot be traced: {said}{where}") from error
    traced = _piece(model, graph)
    _flatten(traced.graph)
    return traced


def _piece(model: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    piece = fx.GraphModule(model, graph)
    piece.training = model.training  # it would begin in training mode, whatever its layers are in
    return piece


def _flatten(graph: fx.Graph) -> None:
    """Write `x.view(images, -1)` as `x.flatten(1)`: how many images there are is often read at the network's input, a
    second value that all cuts would have to hand on."""
    for node in graph.nodes:
        if node.op == "call_method" and node.target in ("view", "reshape"):
            x, *shape = node.args
            if len(shape) == 2 and shape[1] == -1 and _counts_images(shape[0]):
                node.target, node.args = "flatten", (x, 1)
    graph.eliminate_dead_code()


def _counts_images(value: object) -> bool:
    """Whether it is the first of some tensor's sizes."""
    if not isinstance(value, fx.Node):
        return False
    if value.op == "call_method" and value.target == "size":
        return value.args[1:] == (0,)
    if value.target is not operator.getitem or value.args[1] != 0 or not isinstance(value.args[0], fx.Node):
        return False
    sizes = value.args[0]
    return (sizes.target, *sizes.args[1:]) in (("size",), (getattr, "shape"))


@torch.no_grad()
def cut_points(model: nn.Module, example: torch.Tensor) -> list[Cut]:
    """Where it can be parted, in order: before each convolution or block of them, cheap layers still before the cut.
    Raises ModelError."""
    traced = trace(model)
    with evaluating(model):  # the layers are shared: batch norms would learn of the example
        ShapeProp(traced).propagate(example)
    nodes = list(traced.graph.nodes)
    place = {node: i for i, node in enumerate(nodes)}
    last_use = [max((place[user] for user in node.users), default=place[node]) for node in nodes]
    found: list[Cut] = []
    before: set[str] = set()
    waiting: Cut | None = None
    open_until = 0  # how far the values before this node are needed
    for i, node in enumerate(nodes):
        if node.op == "call_module" and isinstance(model.get_submodule(str(node.target)), nn.Conv2d | nn.Linear):
            convolution = isinstance(model.get_submodule(str(node.target)), nn.Conv2d)
            if waiting is not None and convolution:
                found.append(waiting)
            waiting = None if convolution else waiting
            before.add(str(node.target))
        shape: tuple[int, ...] = getattr(node.meta.get("tensor_meta"), "shape", ())
        if node.op not in ("placeholder", "get_attr", "output") and open_until <= i and len(shape) == 4 and before:
            waiting = Cut(node.name, int(shape[1]), frozenset(before))
        if node.op != "get_attr":
            open_until = max(open_until, last_use[i])
    return found


def split_at(model: nn.Module, cuts: list[str]) -> list[fx.GraphModule]:
    """The pieces between these cuts, in order: one more than there are cuts. Layers are those of the model, by their
    names. Raises ModelError."""
    traced = trace(model)
    pieces: list[fx.GraphModule] = []
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    ends = list(cuts)

    def here(node: fx.Node) -> fx.Node:
        if node not in copied:
            if node.op != "get_attr":  # a parameter may be read in several pieces, a value only behind its cut
                at = cuts[len(pieces) - 1] if pieces else ""
                raise ModelError(f"the model cannot be parted at {at}: more than that is read behind it")
            copied[node] = graph.node_copy(node)
        return copied[node]

    for node in traced.graph.nodes:
        if node.op == "get_attr":
            continue
        copied[node] = graph.node_copy(node, here)
        if ends and node.name == ends[0] and node.op != "output":
            graph.output(copied[node])
            pieces.append(_piece(traced, graph))
            graph = fx.Graph()
            copied = {node: graph.placeholder("x")}
            ends.pop(0)
    if ends:
        raise ModelError(f"the model has no point {ends[0]} to be parted at")
    pieces.append(_piece(traced, graph))
    return pieces
