"""Edits: what changes the values of experts.

Each edit is one recipe node, applied in the order of the list. Some are pure functions of an
expert, its place and the seed, applied after its neurons were gathered; others fit the neurons of a
carved FFN to data before they are.

D hidden size · N neurons per expert · T tokens
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from moe_convert.carving import Carved, refit, tune, with_down
from moe_convert.ffn import Experts, Ffn, FfnSample, Weight

if TYPE_CHECKING:
    import torch

PARTS = ("gate_FD", "up_FD", "down_DF")


@dataclass(frozen=True)
class Place:
    """Which expert of which layer an edit works on; decides its random numbers."""

    seed: int
    layer: int
    expert: int

    def generator(self, purpose: int) -> torch.Generator:
        """Return a generator of its own for each purpose (0 indices, 1 to 3 the matrices)."""
        import torch

        number = ((self.seed * 1_009 + self.layer) * 100_003 + self.expert) * 7 + purpose
        return torch.Generator().manual_seed(number % (1 << 63))


class Edit(BaseModel):
    """What every edit says about itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    paper: ClassVar[str]
    summary: ClassVar[str]

    @property
    def neutral(self) -> bool:
        """Whether the edit changes nothing."""
        raise NotImplementedError

    def apply(self, ffn: Ffn, place: Place) -> Ffn:
        """Return the changed expert, lazily computed."""
        raise NotImplementedError


class Noise(Edit):
    """Add Gaussian noise of `std` times each matrix's own standard deviation, or of `std` itself.

    Breaks the symmetry between clones, without which a router learns nothing from the language
    model loss (He et al. 2024, arXiv 2410.07524, discuss noisy starts). The relative error of an
    expert's output is about 1.25 times `std`.
    """

    edit: Literal["noise"] = "noise"
    std: float = Field(0.01, ge=0, le=10, description="relative to the matrix's own std")
    relative: bool = Field(True, description="false: std is the noise's own, as in mergekit-moe")

    paper: ClassVar[str] = "arXiv 2410.07524"
    summary: ClassVar[str] = "add noise relative to each matrix's spread"

    @property
    def neutral(self) -> bool:
        """No noise at std 0."""
        return self.std == 0

    def apply(self, ffn: Ffn, place: Place) -> Ffn:
        """Perturb all three matrices."""
        return _each(ffn, place, lambda tensor, generator: tensor + self._noise(tensor, generator))

    def _noise(self, tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        import torch

        std = self.std * (tensor.std() if self.relative else 1.0)
        return torch.randn(tensor.shape, generator=generator) * std


class Drop(Edit):
    """Drop-Upcycling (Nakamura et al. 2025, arXiv 2502.19261): re-initialise part of each expert.

    floor(ratio · N) neurons are drawn per expert, and their rows of gate and up and columns of down
    are replaced by Gaussian values with the mean and standard deviation of what they replace. The
    paper draws one set for all three matrices (`coupled`); its released code draws one for each
    (`independent`), which leaves about (1 - ratio)³ of the neurons intact.
    """

    edit: Literal["drop"] = "drop"
    ratio: float = Field(0.5, ge=0, le=1, description="share of neurons that start anew")
    indices: Literal["coupled", "independent"] = "coupled"

    paper: ClassVar[str] = "arXiv 2502.19261"
    summary: ClassVar[str] = "re-initialise a share of every expert's neurons"

    @property
    def neutral(self) -> bool:
        """Nothing is dropped at ratio 0."""
        return self.ratio == 0

    def apply(self, ffn: Ffn, place: Place) -> Ffn:
        """Replace the drawn neurons of all three matrices."""

        def change(part: int, axis: int) -> Callable[[torch.Tensor], torch.Tensor]:
            return lambda tensor: self._renew(tensor, part, axis, place)

        return replace(
            ffn,
            gate_FD=ffn.gate_FD.map(change(1, 0)),
            up_FD=ffn.up_FD.map(change(2, 0)),
            down_DF=ffn.down_DF.map(change(3, 1)),
        )

    def dropped(self, num_neurons: int, part: int, place: Place) -> torch.Tensor:
        """Return the neurons of matrix `part` (1 gate, 2 up, 3 down) that start anew, int64."""
        import torch

        purpose = 0 if self.indices == "coupled" else 3 + part
        order_N = torch.randperm(num_neurons, generator=place.generator(purpose))
        return order_N[: int(self.ratio * num_neurons)]

    def _renew(self, tensor: torch.Tensor, part: int, axis: int, place: Place) -> torch.Tensor:
        import torch

        index = self.dropped(tensor.shape[axis], part, place)
        if not len(index):
            return tensor
        old = tensor.index_select(axis, index)
        fresh = torch.randn(old.shape, generator=place.generator(part)) * old.std() + old.mean()
        return tensor.index_copy(axis, index, fresh)


def _each(
    ffn: Ffn, place: Place, change: Callable[[torch.Tensor, torch.Generator], torch.Tensor]
) -> Ffn:
    """Apply a change to the three matrices, each with a generator of its own."""

    def mapped(weight: Weight, part: int) -> Weight:
        return weight.map(lambda tensor: change(tensor, place.generator(part)))

    return replace(
        ffn,
        gate_FD=mapped(ffn.gate_FD, 1),
        up_FD=mapped(ffn.up_FD, 2),
        down_DF=mapped(ffn.down_DF, 3),
    )


class Fit(Edit):
    """An edit that needs to know what the FFN receives and should give; for splits."""

    @property
    def neutral(self) -> bool:
        """It changes values."""
        return False

    def fit(self, carved: Carved, sample: FfnSample, seed: int) -> Carved:
        """Return the FFN with better values."""
        raise NotImplementedError


class Refit(Fit):
    """Solve all of `down` again, given who fires: ridge least squares towards its old values.

    With two streams the inputs are those of the converted model and the target is what brings its
    stream to the dense one, so that errors made upstream are corrected; with one, both are the
    dense model's. The idea is old in pruning; SparseGPT and FLAP (arXiv 2312.11983) solve for
    weights in the same way.
    """

    edit: Literal["refit"] = "refit"
    ridge: float = Field(0.01, gt=0, description="relative to the Gram matrix's mean diagonal")
    streams: Literal["two", "local"] = Field("two", description="what it learns from")

    paper: ClassVar[str] = "arXiv 2312.11983"
    summary: ClassVar[str] = "split: least squares for down under the real router"

    def fit(self, carved: Carved, sample: FfnSample, seed: int) -> Carved:
        """Solve for `down`."""
        x_TD, target_TD = sample.x_TD, sample.target_TD
        if self.streams == "local":
            assert sample.given_TD is not None
            x_TD, target_TD = sample.dense_TD, sample.given_TD()
        return with_down(carved, refit(carved, x_TD, target_TD, self.ridge))


class Tune(Fit):
    """Improve gate, up and down by a few steps of Adam on the layer's own error.

    Nothing is propagated through other layers; who is chosen stays as it is. `rate` is relative to
    each matrix's root mean square.
    """

    edit: Literal["tune"] = "tune"
    steps: int | None = Field(None, ge=1, description="null: 128 on a GPU, 40 on a CPU")
    tokens: int | None = Field(
        None, ge=1, description="of each step; null: 2048 on a GPU, 1024 on a CPU"
    )
    rate: float = Field(0.02, gt=0)

    paper: ClassVar[str] = "this package"
    summary: ClassVar[str] = "split: descent on the layer's own error"

    def resolved(self, *, gpu: bool) -> Tune:
        """Return the same with as many steps as the device can take in reasonable time.

        On a CPU 40 steps of 1024 tokens do what 32 of 2048 do, in three quarters of the time.
        """
        steps, tokens = (128, 2048) if gpu else (40, 1024)
        return self.model_copy(
            update={"steps": self.steps or steps, "tokens": self.tokens or tokens}
        )

    def fit(self, carved: Carved, sample: FfnSample, seed: int) -> Carved:
        """Descend."""
        full = self.resolved(gpu=sample.x_TD.is_cuda)
        assert full.steps is not None
        assert full.tokens is not None
        found = tune(
            carved,
            sample.x_TD,
            sample.target_TD,
            steps=full.steps,
            tokens=min(full.tokens, len(sample.x_TD)),
            rate=self.rate,
            seed=seed,
        )
        return replace(carved, neurons=found)


EditNode = Annotated[Noise | Drop | Refit | Tune, Field(discriminator="edit")]
"""The union of all edits; an entry's `edit` picks one."""

EDITS: dict[str, type[Edit]] = {"noise": Noise, "drop": Drop, "refit": Refit, "tune": Tune}
"""Edits by name."""


def edited(experts: Experts, edits: tuple[EditNode, ...], seed: int, layer: int) -> Experts:
    """Return the experts of a layer with every edit applied to the routed ones.

    Edits that fit values to data come before, where the data is.
    """
    routed = list(experts.routed)
    for edit in edits:
        if not edit.neutral and not isinstance(edit, Fit):
            routed = [edit.apply(e, Place(seed, layer, n)) for n, e in enumerate(routed)]
    return Experts(tuple(routed), experts.shared)
