"""Decode steps as CUDA graphs: one launch a step instead of a thousand.

A graph reads and writes fixed addresses, so lanes are copied into static memory, which all shapes share, and a graph
is captured for each shape: rows and columns come from a ladder, so there are few.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from models.engine_lanes import FIELDS, Lanes
from models.language_model import Network

MOST_GRAPHS = 256
RUNGS = (8, 16, 32, 64, 128, 256, 512, 1024)  # own tokens looked at; what is not filled is masked

Capture = Callable[[Callable[[], None]], Callable[[], None]]


class Stepper(Protocol):
    """Makes the steps of a wave of lanes."""

    static: bool  # steps look at places of the cache that are not filled yet

    def room(self, number: int, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Memory for one of a cache's tensors."""
        ...

    def load(self, network: Network, lanes: Lanes) -> Lanes:
        """The lanes to look at from now on."""
        ...

    def step(self, filled: int) -> None:
        """One token more for each rollout; `filled` tokens of each are in its cache, with the one of this step."""
        ...


class Direct:
    """Steps run as they are: on a CPU, and for networks that cannot be captured."""

    static = False

    def room(self, number: int, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """See Stepper."""
        return like.new_empty(shape)

    def load(self, network: Network, lanes: Lanes) -> Lanes:
        """See Stepper."""
        self._network, self._lanes = network, lanes
        return lanes

    def step(self, filled: int) -> None:
        """See Stepper."""
        advance(self._network, self._lanes, filled, exact=True)


class Graphs:
    """Steps run as graphs of static shape. `capture` turns a function into one that replays it."""

    static = True

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self._memory: dict[tuple[int, torch.dtype], Tensor] = {}
        self._graphs: OrderedDict[tuple[object, ...], Callable[[], None]] = OrderedDict()

    def room(self, number: int, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """See Stepper: static memory at once, so that prompts are not copied twice."""
        return self._place(len(FIELDS) + number, shape, like)

    def load(self, network: Network, lanes: Lanes) -> Lanes:
        """See Stepper."""
        sources = lanes.tensors()
        self._key = (id(network), lanes.cache.prompt, tuple(tuple(source.shape) for source in sources))
        places = [self._place(number, tuple(source.shape), source) for number, source in enumerate(sources)]
        elsewhere = [pair for pair in zip(places, sources, strict=True) if pair[0].data_ptr() != pair[1].data_ptr()]
        self._network, self._lanes = network, lanes.placed(places)
        for reach in [rung for rung in RUNGS if rung < lanes.cache.slots] + [lanes.cache.slots]:
            if (*self._key, reach) not in self._graphs:
                for place, _ in elsewhere:  # the first run writes what is copied below, and a slot of the next step
                    place.zero_()
                self._capture_at(reach)
        for place, source in elsewhere:
            place.copy_(source)
        return self._lanes

    def step(self, filled: int) -> None:
        """See Stepper."""
        reach = min([rung for rung in RUNGS if rung >= filled] + [self._lanes.cache.slots])
        key = (*self._key, reach)
        self._graphs.move_to_end(key)
        self._graphs[key]()

    def _capture_at(self, reach: int) -> None:
        network, lanes = self._network, self._lanes
        self._graphs[(*self._key, reach)] = self._capture(lambda: advance(network, lanes, reach, exact=False))
        if len(self._graphs) > MOST_GRAPHS:
            self._graphs.popitem(last=False)

    def _place(self, number: int, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Static memory for the lanes' tensor of this number. Where it must grow, all graphs are void."""
        key, size = (number, like.dtype), math.prod(shape)
        if key not in self._memory or self._memory[key].numel() < size:
            self._memory[key] = like.new_empty(size)
            self._graphs.clear()
        return self._memory[key][:size].view(shape)


def advance(network: Network, lanes: Lanes, reach: int, exact: bool) -> None:
    """One step of a wave; `reach` own tokens are looked at (see RolloutCache.begin). In place, without a host sync."""
    lanes.cache.begin(reach, exact)
    lanes.advance(network.step(lanes.tokens, lanes.lengths + lanes.cache.step, lanes.cache))


class CudaGraphs:
    """Captures what a function launches. All graphs share one pool: none leaves anything in it for another."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        """Run the work once outside a graph, which loads kernels and workspaces, then capture it."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            work()

        def replay(_keeps: Callable[[], None] = work) -> None:  # the graph reads tensors that `work` owns
            graph.replay()

        return replay
