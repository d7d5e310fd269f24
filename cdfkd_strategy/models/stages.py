"""Find a backbone's resolution stages by one probe pass; cut the backbone to what computes them, or let it give them beside its output."""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torchvision.ops import StochasticDepth

from cdfkd_strategy.errors import ArchitectureError
from cdfkd_strategy.models.modes import copy_modes, evaluating, modes_kept
from cdfkd_strategy.types import ImageSpec

_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
_CONVOLUTIONS = (F.conv2d, torch.conv2d)
_ACTIVATIONS = (F.relu, F.leaky_relu, F.silu, F.gelu, torch.relu, "relu", "relu_")
_ACTIVATION_MODULES = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Hardswish)
_GLOBAL_POOLS = (F.adaptive_avg_pool2d, torch.mean, "mean")
_AVERAGE_POOLS = (F.avg_pool2d,)

MAX_STAGES = 4
"""Of the deepest resolutions: ResNet's stem at large images is not a stage of the paper."""


class Trunk(nn.Module):
    """A backbone without its classifier: one map per resolution stage.

    Args:
        net: images -> the stages' maps, in order.
        channels: of every stage.
        sizes: ``(H, W)`` of every stage.
    """

    def __init__(self, net: nn.Module, channels: tuple[int, ...], sizes: tuple[tuple[int, int], ...]) -> None:
        super().__init__()
        self.net = net
        self.channels = channels
        self.sizes = sizes

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images ``[B, channels, H, W]`` to the ``S`` maps ``u_s [B, channels_s, H_s, W_s]``, finest first."""
        return list(self.net(x))

    def __deepcopy__(self, memo: dict[int, Any]) -> Trunk:
        trunk = Trunk(copy.deepcopy(self.net, memo), self.channels, self.sizes)
        copy_modes(self, trunk)
        return trunk


class StagedClassifier(nn.Module):
    """A classifier that gives the maps of its stages along with its output. It shares the classifier's modules: hooks on them still work.

    Args:
        net: images -> output and the stages' maps.
        shapes: ``(channels, H, W)`` of every stage.
    """

    def __init__(self, net: fx.GraphModule, shapes: tuple[tuple[int, ...], ...]) -> None:
        super().__init__()
        self.net = net
        self.shapes = shapes

    def let_go(self) -> None:
        """Undo the circle of the network and its graph, so that the classifier's modules do not wait for the garbage collector; it is not used any more."""
        self.net.graph.owning_module = None

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Images ``[B, channels, H, W]`` to logits ``[B, C]`` and the ``S`` maps ``[B, channels_s, H_s, W_s]``, finest first."""
        output, *maps = self.net(x)
        return output, tuple(maps)


class _Tracer(fx.Tracer):
    """Keeps stochastic depth as a module, so that the graph does not depend on the mode it was traced in."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, StochasticDepth) or super().is_leaf_module(m, module_qualified_name)


class _Probe(fx.Interpreter):
    """Runs a graph once and notes the shape of every tensor that depends on the input."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        super().__init__(module, graph=graph)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and n.op not in ("get_attr", "output"):
            self.shapes[n] = tuple(value.shape)
        return value


def find_stages(classifier: nn.Module, image: ImageSpec, max_stages: int = MAX_STAGES) -> Trunk:
    """The trunk of a classifier: for every resolution, the last map that everything after it is computed from.

    A resolution that only a pooling gives is not a stage.

    Such a map is a *cut* of the network, the output of a whole block, never a map inside a residual or
    squeeze-excite branch. A pre-activation net's BatchNorm and activation after the last addition belong to what
    follows (in CDFKD-MFS the addition feeds the encoders), so they are left out. A resolution without a cut gives its
    last map. Finding the stages changes neither the classifier, nor its statistics, nor the random state.

    Args:
        classifier: a network that `torch.fx` can trace; the trunk shares its modules, and leaves out those it does not need.
        image: what it takes.
        max_stages: the deepest ones are kept.

    Raises:
        ArchitectureError: the network cannot be traced, cannot take these images, or has no 4-D maps.
    """
    training_graph, graph = _trace(classifier, training=True), _trace(classifier, training=False)
    shapes = _probe(classifier, graph, image)
    nodes = _stage_nodes(classifier, graph, shapes)[-max_stages:]
    names = [node.name for node in nodes]
    if str(_cut(graph, names)) != str(_cut(training_graph, names)):
        raise ArchitectureError(
            f"the stages of {type(classifier).__name__} compute something else in train mode (self.training is read in forward); "
            "use modules such as nn.Dropout there, which know their mode"
        )
    net = fx.GraphModule(classifier, graph, class_name=f"{type(classifier).__name__}Trunk")
    copy_modes(classifier, net)  # a graph module makes its containers anew, in train mode
    sizes = tuple((shapes[node][2], shapes[node][3]) for node in nodes)
    return Trunk(net, tuple(shapes[node][1] for node in nodes), sizes)


def with_stages(classifier: nn.Module, image: ImageSpec, max_stages: int = MAX_STAGES) -> StagedClassifier:
    """A classifier with the maps of its stages, the same as those of `find_stages`, in one forward pass.

    It computes what the classifier computes in the mode that it is in now, functional dropout too: ask again after ``train()`` or ``eval()``.

    Args:
        classifier: a network that `torch.fx` can trace; it is not changed, and its modules are shared.
        image: what it takes.
        max_stages: the deepest ones are kept.

    Raises:
        ArchitectureError: as `find_stages`, or in train mode the network has no such maps.
    """
    graph = _trace(classifier, training=False)
    shapes = _probe(classifier, graph, image)
    nodes = _stage_nodes(classifier, graph, shapes)[-max_stages:]
    found = tuple(shapes[node][1:] for node in nodes)
    if classifier.training:
        graph = _trace(classifier, training=True)
        nodes = _named(graph, [node.name for node in nodes])
        if len(nodes) < len(found):
            raise ArchitectureError(f"{type(classifier).__name__} has other stages in train mode (self.training is read in forward)")
    (end,) = (node for node in graph.nodes if node.op == "output")
    end.args = ((end.args[0], *nodes),)
    net = fx.GraphModule(classifier, graph, class_name=f"Staged{type(classifier).__name__}")
    copy_modes(classifier, net)
    return StagedClassifier(net, found)


def _trace(classifier: nn.Module, *, training: bool) -> fx.Graph:
    """The graph in train or in eval mode; every module gets its own mode back."""
    try:
        tracer = _Tracer()
        with modes_kept(classifier):
            graph = tracer.trace(classifier.train(training))
        vars(tracer).clear()  # it is in a circle of its own, and would keep the classifier until the garbage collector comes
        return graph
    except Exception as error:  # tracing runs foreign code: whatever it raises, the answer is the same
        raise ArchitectureError(
            f"cannot find the stages of {type(classifier).__name__}: torch.fx cannot trace it ({type(error).__name__}: {error}); "
            "write its forward without control flow that depends on tensor values, or choose a backbone by name"
        ) from error


def _probe(classifier: nn.Module, graph: fx.Graph, image: ImageSpec) -> dict[fx.Node, tuple[int, ...]]:
    """Shapes of all tensors for two black images, in eval mode."""
    like = next(classifier.parameters(), torch.zeros(()))
    images = torch.zeros(2, *image.shape, dtype=like.dtype, device=like.device)
    probe = _Probe(classifier, graph)
    try:
        with torch.no_grad(), evaluating(classifier), torch.random.fork_rng(devices=[like.device] if like.device.type == "cuda" else []):
            probe.run(images)
    except Exception as error:  # foreign code again
        raise ArchitectureError(
            f"{type(classifier).__name__} cannot take images of {image.channels}x{image.height}x{image.width} ({type(error).__name__}: {error}); "
            "choose larger images or another backbone"
        ) from error
    return probe.shapes


def _stage_nodes(classifier: nn.Module, graph: fx.Graph, shapes: dict[fx.Node, tuple[int, ...]]) -> list[fx.Node]:
    """One node per resolution, finest first."""
    modules = dict(classifier.named_modules())
    cuts = _cut_nodes(graph, shapes)
    candidates: list[fx.Node] = []
    for node in graph.nodes:
        if node.op == "placeholder" or node not in shapes:
            continue
        if node in cuts and (len(shapes[node]) != 4 or _is_global_pool(node, modules, shapes)):
            break  # the classifier begins here
        if len(shapes[node]) == 4:
            candidates.append(node)
    convolved = {shapes[node][2:] for node in candidates if _is_call(node, modules, _CONVOLUTIONS, (nn.Conv2d,))}
    chosen: dict[tuple[int, ...], fx.Node] = {}
    largest = 0
    for node in reversed(candidates):
        size = shapes[node][2:]
        if size[0] * size[1] < largest or size not in convolved:
            continue  # a larger map comes later (the inside of a squeeze-excite branch), or nothing but pooling happens here
        largest = size[0] * size[1]
        if size not in chosen or (node in cuts and chosen[size] not in cuts):
            chosen[size] = node
    if not chosen:
        raise ArchitectureError(f"{type(classifier).__name__} has no feature maps before its classifier; accepted: convolutional backbones")
    ordered = sorted(chosen.values(), key=candidates.index)
    return [_before_pre_activation(node, modules) for node in ordered]


def _cut_nodes(graph: fx.Graph, shapes: dict[fx.Node, tuple[int, ...]]) -> set[fx.Node]:
    """Nodes whose value alone, of all tensors computed so far, is used later."""
    position = {node: index for index, node in enumerate(graph.nodes)}
    cuts: set[fx.Node] = set()
    busy_until = -1  # the latest use of any earlier tensor
    for node in graph.nodes:
        if node not in shapes:
            continue
        if busy_until <= position[node]:
            cuts.add(node)
        busy_until = max([busy_until, *(position[user] for user in node.users)])
    return cuts


def _is_call(node: fx.Node, modules: dict[str, nn.Module], functions: tuple[Any, ...], kinds: tuple[type[nn.Module], ...]) -> bool:
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], kinds)
    return node.op in ("call_function", "call_method") and node.target in functions


def _is_global_pool(node: fx.Node, modules: dict[str, nn.Module], shapes: dict[fx.Node, tuple[int, ...]]) -> bool:
    if _is_call(node, modules, _GLOBAL_POOLS, (nn.AdaptiveAvgPool2d,)):
        return True
    source = node.all_input_nodes[0] if node.all_input_nodes else node
    shrinks = shapes[node][2:] == (1, 1) and shapes.get(source, ())[2:] != (1, 1)
    return shrinks and _is_call(node, modules, _AVERAGE_POOLS, (nn.AvgPool2d,))


def _before_pre_activation(node: fx.Node, modules: dict[str, nn.Module]) -> fx.Node:
    """The addition behind addition -> BatchNorm (-> activation), or the node itself."""
    inner = node.all_input_nodes[0] if _is_call(node, modules, _ACTIVATIONS, _ACTIVATION_MODULES) else node
    if _is_call(inner, modules, (), (nn.BatchNorm2d,)) and _is_call(inner.all_input_nodes[0], modules, _ADDITIONS, ()):
        return inner.all_input_nodes[0]
    return node


def _cut(graph: fx.Graph, names: list[str]) -> fx.Graph:
    """Let the graph return the named nodes, and drop in place whatever they are not computed from."""
    outputs = _named(graph, names)
    needed, waiting = set(), list(outputs)
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting.extend(node.all_input_nodes)
    for node in reversed(graph.nodes):
        if node not in needed and node.op != "placeholder":
            graph.erase_node(node)
    graph.output(outputs)
    return graph


def _named(graph: fx.Graph, names: list[str]) -> list[fx.Node]:
    """The nodes of these names, in their order; those that the graph lacks are left out."""
    nodes = {node.name: node for node in graph.nodes}
    return [nodes[name] for name in names if name in nodes]
