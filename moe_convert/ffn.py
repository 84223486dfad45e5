"""Feed-forward networks and experts as lazily loaded weights: no file is opened here.

D hidden size · F FFN neurons · E routed experts · N neurons per expert · T tokens
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

ITEM_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip
"""Bits per element of every dtype that safetensors names and this package understands."""

TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Floating dtypes as safetensors and as torch name them: those that a weight can be stored in."""


def torch_dtype(name: str) -> torch.dtype:
    """Return torch's dtype for a safetensors name such as `BF16`."""
    import torch

    dtype: torch.dtype = getattr(torch, TORCH_NAMES[name])
    return dtype


class Stored(Protocol):
    """Bytes that lie in a file exactly as they would be written."""

    def rows(self, start: int, stop: int) -> Stored:
        """Return the part that holds these rows of the first axis."""


@dataclass(frozen=True)
class Weight:
    """A tensor that is not read until `load` is called.

    `stored` is set while the value still equals bytes in a file, so that a writer may copy them
    without decoding anything. `rounds` is set once arithmetic has made values that `dtype` may not
    be able to hold.
    """

    shape: tuple[int, ...]
    dtype: str
    load: Callable[[], torch.Tensor]
    stored: Stored | None = None
    rounds: bool = False

    @property
    def num_params(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Size in bytes as stored."""
        return self.num_params * ITEM_BITS[self.dtype] // 8

    @classmethod
    def of(cls, tensor: torch.Tensor, dtype: str) -> Weight:
        """Wrap a tensor in memory, to be stored as `dtype`."""
        return cls(tuple(tensor.shape), dtype, lambda: tensor)

    @classmethod
    def filled(cls, shape: tuple[int, ...], value: float, dtype: str) -> Weight:
        """Return a constant tensor."""

        def load() -> torch.Tensor:
            import torch

            return torch.full(shape, value)

        return cls(shape, dtype, load)

    def map(
        self,
        function: Callable[[torch.Tensor], torch.Tensor],
        shape: tuple[int, ...] | None = None,
        rounds: bool = True,
    ) -> Weight:
        """Return the weight with `function` applied in fp32 when it is loaded."""
        base, rounds = self.load, rounds or self.rounds
        return Weight(
            shape or self.shape, self.dtype, lambda: function(base().float()), rounds=rounds
        )

    def cast(self, dtype: str) -> Weight:
        """Return the weight stored as another dtype."""
        return self if dtype == self.dtype else replace(self, dtype=dtype, stored=None)

    def rows(self, neurons: range | torch.Tensor) -> Weight:
        """Return these rows of a matrix or entries of a vector; a range keeps the stored bytes."""
        shape = (len(neurons), *self.shape[1:])
        if isinstance(neurons, range):
            start, stop = neurons.start, neurons.stop
            if shape == self.shape:
                return self
            stored = self.stored.rows(start, stop) if self.stored else None
            return Weight(
                shape, self.dtype, lambda: self.load()[start:stop], stored, rounds=self.rounds
            )
        return Weight(shape, self.dtype, lambda: self.load()[neurons], rounds=self.rounds)

    def columns(self, neurons: range | torch.Tensor) -> Weight:
        """Return these columns of a matrix."""
        shape = (self.shape[0], len(neurons))
        if isinstance(neurons, range):
            start, stop = neurons.start, neurons.stop
            if shape == self.shape:
                return self
            return Weight(shape, self.dtype, lambda: self.load()[:, start:stop], rounds=self.rounds)
        return Weight(shape, self.dtype, lambda: self.load()[:, neurons], rounds=self.rounds)

    def scaled(self, factor: float) -> Weight:
        """Return the weight times a constant."""
        if factor == 1.0:
            return self
        power_of_two = abs(math.frexp(factor)[0]) == 0.5
        return self.map(lambda tensor: tensor * factor, rounds=not power_of_two)


def as_range(neurons: range | torch.Tensor) -> range | torch.Tensor:
    """Return a range when the indices are consecutive, else the indices themselves."""
    if isinstance(neurons, range):
        return neurons
    import torch

    start = int(neurons[0]) if len(neurons) else 0
    consecutive = torch.arange(start, start + len(neurons))
    return range(start, start + len(neurons)) if torch.equal(neurons, consecutive) else neurons


def concatenated(parts: list[Weight], axis: int) -> Weight:
    """Return the parts joined along an axis."""
    if len(parts) == 1:
        return parts[0]
    shape = list(parts[0].shape)
    shape[axis] = sum(part.shape[axis] for part in parts)

    def load() -> torch.Tensor:
        import torch

        return torch.cat([part.load() for part in parts], dim=axis)

    rounds = any(part.rounds for part in parts)
    return Weight(tuple(shape), parts[0].dtype, load, rounds=rounds)


def stack(parts: list[Weight]) -> Weight:
    """Return equally shaped parts along a new first axis."""

    def load() -> torch.Tensor:
        import torch

        return torch.stack([part.load() for part in parts])

    rounds = any(part.rounds for part in parts)
    return Weight((len(parts), *parts[0].shape), parts[0].dtype, load, rounds=rounds)


@dataclass(frozen=True)
class Ffn:
    """One feed-forward network: `down(act(gate x) * up x)`."""

    gate_FD: Weight
    up_FD: Weight
    down_DF: Weight
    act: str = "silu"

    @property
    def num_neurons(self) -> int:
        """Intermediate size F."""
        return self.up_FD.shape[0]

    @property
    def num_params(self) -> int:
        """Number of elements of the three matrices."""
        return self.gate_FD.num_params + self.up_FD.num_params + self.down_DF.num_params

    def select(
        self, neurons_N: range | torch.Tensor, scale: float = 1.0, up_scale: float = 1.0
    ) -> Ffn:
        """Return the network of these neurons (int64, may repeat), down and up times a scale."""
        neurons = as_range(neurons_N)
        return replace(
            self,
            gate_FD=self.gate_FD.rows(neurons),
            up_FD=self.up_FD.rows(neurons).scaled(up_scale),
            down_DF=self.down_DF.columns(neurons).scaled(scale),
        )

    def cast(self, dtype: str) -> Ffn:
        """Return the network stored as another dtype."""
        return replace(
            self,
            gate_FD=self.gate_FD.cast(dtype),
            up_FD=self.up_FD.cast(dtype),
            down_DF=self.down_DF.cast(dtype),
        )


@dataclass(frozen=True)
class Assignment:
    """Which neurons of which source every expert takes; indices are int64 and may overlap.

    `routed_EN` are neurons per routed expert, `shared_N` those of the shared expert (may be none),
    both as ranges where that suffices, which need no torch; `source_E` is the checkpoint of each
    row. The scales multiply `down` of the routed and the shared experts, `up_scale` multiplies `up`
    of the routed ones.
    """

    routed_EN: torch.Tensor | tuple[range, ...]
    shared_N: torch.Tensor | range
    source_E: tuple[int, ...]
    routed_scale: float = 1.0
    shared_scale: float = 1.0
    up_scale: float = 1.0


@dataclass(frozen=True)
class Experts:
    """The experts of one layer; `bias_E` is what steers which of them are chosen, fp32."""

    routed: tuple[Ffn, ...]
    shared: Ffn
    bias_E: torch.Tensor | None = None


def gather(sources: tuple[Ffn, ...], assignment: Assignment) -> Experts:
    """Collect every expert's weights from the sources: the one place where neurons move."""
    routed = tuple(
        sources[source].select(neurons_N, assignment.routed_scale, assignment.up_scale)
        for source, neurons_N in zip(assignment.source_E, assignment.routed_EN, strict=True)
    )
    return Experts(routed, sources[0].select(assignment.shared_N, assignment.shared_scale))


@dataclass(frozen=True)
class Neurons:
    """A dense FFN in memory, fp32, for measurements: `down(act(gate x) * up x)`."""

    gate_FD: torch.Tensor
    up_FD: torch.Tensor
    down_DF: torch.Tensor
    act: str = "silu"

    @classmethod
    def of(cls, ffn: Ffn, device: str = "cpu") -> Neurons:
        """Load a network."""
        parts = (ffn.gate_FD, ffn.up_FD, ffn.down_DF)
        gate_FD, up_FD, down_DF = (part.load().to(device).float() for part in parts)
        return cls(gate_FD, up_FD, down_DF, ffn.act)

    def gate(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Return the activation of the gate, fp32 [T, F]."""
        from transformers.activations import ACT2FN

        gate_TF: torch.Tensor = ACT2FN[self.act](x_TD.float() @ self.gate_FD.T)
        return gate_TF.float()

    def hidden(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Return what every neuron sends to `down`, fp32 [T, F]."""
        return (self.gate(x_TD) * (x_TD.float() @ self.up_FD.T)).float()


@dataclass(frozen=True)
class FfnSample:
    """What one FFN receives and should give on the calibration tokens.

    `x_TD` is its input in the converted model as far as it is built, `dense_TD` that in the dense
    model, and `target_TD` what it should add to the converted model's stream so that this equals
    the dense one. `row_length` tokens in a row are one text. `given_TD` computes what the dense FFN
    gives in the dense model. `gradient_TD` loads the gradient of the dense model's mean token loss
    with respect to the FFN's output, and `learned` are groups that were learned on the whole model,
    where they were asked for.
    """

    x_TD: torch.Tensor
    dense_TD: torch.Tensor
    target_TD: torch.Tensor
    row_length: int
    gradient_TD: Callable[[], torch.Tensor] | None = None
    given_TD: Callable[[], torch.Tensor] | None = None
    learned: Grouping | None = None


@dataclass(frozen=True)
class Grouping:
    """Which neurons (int64) go together: every neuron of the FFN once.

    `shared_N` are always on, `routed_EN` form the routed experts. `representative_E` is one neuron
    of every expert that stands for it, and `router_ED` router rows that came out with the groups,
    where a strategy makes them.
    """

    shared_N: torch.Tensor
    routed_EN: torch.Tensor
    representative_E: torch.Tensor | None = None
    router_ED: torch.Tensor | None = None
