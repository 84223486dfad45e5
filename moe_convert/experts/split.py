"""Experts that are parts of the dense FFN, one class for each way to choose them.

F FFN neurons · E routed experts · N neurons per expert
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from moe_convert.edits import EditNode, Refit, Tune
from moe_convert.errors import UsageError
from moe_convert.experts.base import Method, outside_config
from moe_convert.ffn import Assignment, FfnSample, Grouping, Neurons
from moe_convert.training.settings import Optimizer, Schedule

if TYPE_CHECKING:
    import torch

    from moe_convert.targets import MoeShape, MoeTarget


Needs = Literal["nothing", "weights", "states", "gradients", "logits"]
"""What must be known before a layer can be cut; `logits` are trained against beforehand."""


class Split(Method):
    """Carve the FFN: each neuron goes to one expert, or is shared.

    The sum over all experts is the dense FFN, so with every expert chosen and a neutral router the
    function is exact; with fewer it is not. `router` is the initialiser that `auto` stands for.
    """

    method: Literal["split"] = "split"

    needs: ClassVar[Needs] = "states"
    router: ClassVar[str] = "distill"
    default_edits: ClassVar[tuple[EditNode, ...]] = ()

    def expert_size(self, ffn_size: int, num_units: int) -> int:
        """All units are equally wide.

        Raises:
            UsageError: the FFN does not divide evenly.
        """
        if ffn_size % num_units:
            raise UsageError(
                f"An FFN of {ffn_size} neurons cannot be cut into {num_units} equal experts.",
                f"Choose a divisor of {ffn_size} as routed + shared experts.",
            )
        return ffn_size // num_units

    def preserves(self, target: MoeTarget, shape: MoeShape, neutral_router: bool) -> bool:
        """Exact when every expert is chosen with the same weight."""
        equal = neutral_router or target.fixed_top_k is not None
        return equal and shape.top_k == shape.num_experts

    def routed_scale(self, target: MoeTarget, shape: MoeShape) -> float:
        """Make every chosen expert count once."""
        return 1.0 / target.neutral(replace(shape, routed_scale=1.0))

    def group(
        self, shape: MoeShape, layer: int, neurons: Neurons | None, sample: FfnSample | None
    ) -> Grouping:
        """Return which neurons go together, of a layer's FFN and what it receives.

        Each is there if `needs` says so.
        """
        raise NotImplementedError

    def assign(self, ffn_size: int, target: MoeTarget, shape: MoeShape, layer: int) -> Assignment:
        """Return the neurons of every expert of a layer that nothing need be known of."""
        return self.assigned(self.group(shape, layer, None, None), target, shape)

    def assigned(self, grouping: Grouping, target: MoeTarget, shape: MoeShape) -> Assignment:
        """Return a grouping with the factors that make every chosen expert count once.

        Neurons move in memory, wherever they were grouped.
        """
        return Assignment(
            routed_EN=grouping.routed_EN.cpu(),
            shared_N=grouping.shared_N.cpu(),
            source_E=(0,) * shape.num_experts,
            routed_scale=outside_config(self.routed_scale(target, shape), target),
            shared_scale=1.0 / target.shared_weight,
        )

    def resolved(self, *, gpu: bool) -> Split:
        """Return the same with the numbers of steps that depend on the device."""
        edits = tuple(e.resolved(gpu=gpu) if isinstance(e, Tune) else e for e in self.edits)
        return self.model_copy(update={"edits": edits})

    def layer_seed(self, layer: int) -> int:
        """Return a seed of its own for every layer."""
        return self.seed * 1_009 + layer


class Contiguous(Split):
    """Neurons in their order, the first ones shared (MLPMoE, arXiv 2511.21089, slices like this).

    Needs no data: with every expert chosen it is exact, and good for nothing else without training.
    """

    strategy: Literal["contiguous"] = "contiguous"
    needs: ClassVar[Needs] = "nothing"
    router: ClassVar[str] = "normal"
    paper: ClassVar[str] = "arXiv 2511.21089"
    summary: ClassVar[str] = "cut the FFN in the order of its neurons"

    def group(
        self, shape: MoeShape, layer: int, neurons: Neurons | None, sample: FfnSample | None
    ) -> Grouping:
        """Deal out the neurons: the first ones are shared."""
        import torch

        return _dealt(torch.arange(shape.dense_size), shape)


class Random(Split):
    """Neurons in random order (LLaMA-MoE, Zhu et al. 2024, arXiv 2406.16554).

    Of its ways to split that paper found this one best before long continued pre-training.
    """

    strategy: Literal["random"] = "random"
    needs: ClassVar[Needs] = "nothing"
    router: ClassVar[str] = "normal"
    paper: ClassVar[str] = "arXiv 2406.16554"
    summary: ClassVar[str] = "cut the FFN into random groups of neurons"

    def group(
        self, shape: MoeShape, layer: int, neurons: Neurons | None, sample: FfnSample | None
    ) -> Grouping:
        """Deal out the neurons in an order of the layer's own."""
        import torch

        generator = torch.Generator().manual_seed(self.layer_seed(layer))
        return _dealt(torch.randperm(shape.dense_size, generator=generator), shape)


class Weights(Split):
    """Parameter clustering of MoEfication (Zhang et al. 2021, arXiv 2110.01786)."""

    strategy: Literal["weights"] = "weights"
    needs: ClassVar[Needs] = "weights"
    paper: ClassVar[str] = "arXiv 2110.01786"
    summary: ClassVar[str] = "balanced clusters of the gate's rows"

    def group(
        self, shape: MoeShape, layer: int, neurons: Neurons | None, sample: FfnSample | None
    ) -> Grouping:
        """Cluster the rows of the gate."""
        from moe_convert.grouping import moefication

        assert neurons is not None
        return moefication.weights(
            neurons, shape.num_experts, shape.shared_size, self.layer_seed(layer)
        )


class Coactivation(Split):
    """Co-activation graph of MoEfication (Zhang et al. 2021, arXiv 2110.01786)."""

    strategy: Literal["coactivation"] = "coactivation"
    paper: ClassVar[str] = "arXiv 2110.01786"
    summary: ClassVar[str] = "neurons that fire together, by cutting their graph"

    def group(
        self, shape: MoeShape, layer: int, neurons: Neurons | None, sample: FfnSample | None
    ) -> Grouping:
        """Cut the graph of neurons that fire together."""
        from moe_convert.grouping import moefication

        assert neurons is not None
        assert sample is not None
        return moefication.coactivation(
            neurons, sample, shape.num_experts, shape.shared_size, self.layer_seed(layer)
        )


class Cmoe(Split):
    """CMoE (Pei et al. 2025, arXiv 2502.04416), faithful to its released code."""

    strategy: Literal["cmoe"] = "cmoe"
    router: ClassVar[str] = "representative"
    paper: ClassVar[str] = "arXiv 2502.04416"
    summary: ClassVar[str] = (
        "share what fires most, cluster the rest by the tokens that it fires on"
    )

    def group(
        self, shape: MoeShape, layer: int, neurons: Neurons | None, sample: FfnSample | None
    ) -> Grouping:
        """Group by the tokens that mark each neuron."""
        from moe_convert.grouping import cmoe

        assert neurons is not None
        assert sample is not None
        return cmoe.group(
            neurons, sample, shape.num_experts, shape.shared_size, self.layer_seed(layer)
        )


class ExpertWeaver(Split):
    """ExpertWeaver (2026, arXiv 2602.15521), with one width of the shared expert in all layers."""

    strategy: Literal["expertweaver"] = "expertweaver"
    router: ClassVar[str] = "mean-gate"
    paper: ClassVar[str] = "arXiv 2602.15521"
    summary: ClassVar[str] = "balanced clusters of each gate's mean activation over texts"

    def group(
        self, shape: MoeShape, layer: int, neurons: Neurons | None, sample: FfnSample | None
    ) -> Grouping:
        """Group by profiles over the texts."""
        from moe_convert.grouping import expertweaver

        assert neurons is not None
        assert sample is not None
        return expertweaver.group(
            neurons, sample, shape.num_experts, shape.shared_size, self.layer_seed(layer)
        )


class Gradient(Split):
    """Residual split by first-order importance (LLaMA-MoE v2, Qu et al. 2024, arXiv 2411.15708)."""

    strategy: Literal["gradient"] = "gradient"
    needs: ClassVar[Needs] = "gradients"
    router: ClassVar[str] = "grouped"
    paper: ClassVar[str] = "arXiv 2411.15708"
    summary: ClassVar[str] = "neurons by their importance to clusters of tokens"

    def group(
        self, shape: MoeShape, layer: int, neurons: Neurons | None, sample: FfnSample | None
    ) -> Grouping:
        """Group by importance to each cluster of hidden states, whose centres are router rows."""
        from moe_convert.grouping import gradient

        assert neurons is not None
        assert sample is not None
        return gradient.group(
            neurons, sample, shape.num_experts, shape.shared_size, self.layer_seed(layer)
        )


class Learned(Split):
    """DOT-MoE (2026, arXiv 2606.01666): groups and routers against the dense model's own logits.

    Every neuron has an affinity to every expert. Sinkhorn's algorithm makes balanced shares of
    them, a greedy rule rounds these, and a linear router chooses experts; gradients pass through
    both choices as if they were soft. All layers are learned together on the whole model, whose
    weights do not change: 2 KL from the dense logits + cross-entropy + 0.001 squared log-sum-exp of
    router logits + 0.01 load balance, by AdamW with a fifth of warm-up and a cosine.

    Different from the paper: experts that are shared, which it has none of, have the neurons with
    the largest energy for good; a run is short and starts from the groups and routers of strategy
    `contribution` (`start: random` is the paper's); hard groups are made anew every `refresh`
    steps; and Sinkhorn's gradient is that of its limit. A step goes over `tokens` tokens of the
    data, whose rows come again when all had their turn. It keeps the dense model in fp32, the input
    of every layer and the logits of 2,048 tokens in memory. `layers: auto` tries the groups that
    learning would start from.
    """

    strategy: Literal["learned"] = "learned"
    steps: int | None = Field(None, ge=1, description="null: 300 on a GPU, 60 on a CPU")
    tokens: int = Field(4096, ge=1, description="of each step")
    lr: float = Field(5e-4, gt=0, description="of AdamW, for affinities and random routers")
    start: Literal["contribution", "random"] = Field(
        "contribution", description="strategy whose groups it starts from, or none"
    )
    temperature: float = Field(
        0.1, gt=0, description="of the shares, from 1 at the start to this after a fifth"
    )
    refresh: int = Field(10, ge=1, description="steps between roundings of the groups")

    needs: ClassVar[Needs] = "logits"
    router: ClassVar[str] = "grouped"
    paper: ClassVar[str] = "arXiv 2606.01666"
    summary: ClassVar[str] = "groups and routers trained together against the dense model's logits"
    schedule: ClassVar[Schedule] = Schedule(warmup=0.2)
    clip_norm: ClassVar[float] = 1.0

    @property
    def optimizer(self) -> Optimizer:
        """AdamW with the rate doubled for routers, whose random rows have half the usual spread."""
        return Optimizer(lr=self.lr, router_factor=2.0, betas=(0.9, 0.999), weight_decay=1e-4)

    def num_steps(self, *, gpu: bool) -> int:
        """Return how many steps are taken."""
        return self.steps or (300 if gpu else 60)

    def resolved(self, *, gpu: bool) -> Split:
        """Name the steps of learning too."""
        update = {"steps": self.num_steps(gpu=gpu)}
        return super().resolved(gpu=gpu).model_copy(update=update)

    def group(
        self, shape: MoeShape, layer: int, neurons: Neurons | None, sample: FfnSample | None
    ) -> Grouping:
        """Return what was learned before; where nothing was, from where learning starts."""
        from moe_convert.grouping import learned

        assert neurons is not None
        assert sample is not None
        return sample.learned or learned.start(
            neurons, sample, shape.num_experts, shape.shared_size, self.layer_seed(layer)
        )


class Contribution(Split):
    """Neurons by what they contribute, as far as a linear router can predict it.

    A neuron contributes |h|·‖w‖ to a token, w its column of `down`. The neurons with the largest
    mean square of that are shared; the others form balanced clusters by the direction in which
    least squares predicts their contribution from the FFN's input, so that a linear router can tell
    which cluster a token needs. Then the experts are tuned on the layer's own error and `down` is
    solved again for the inputs that the converted model really sends. Composed for this package out
    of the parts that did best; no paper has just this.
    """

    strategy: Literal["contribution"] = "contribution"
    default_edits: ClassVar[tuple[EditNode, ...]] = (Tune(), Refit())
    paper: ClassVar[str] = "this package"
    summary: ClassVar[str] = (
        "share the largest contributions, cluster the rest by what predicts them"
    )

    def group(
        self, shape: MoeShape, layer: int, neurons: Neurons | None, sample: FfnSample | None
    ) -> Grouping:
        """Group by predicted contributions."""
        from moe_convert.grouping import contribution

        assert neurons is not None
        assert sample is not None
        return contribution.group(
            neurons, sample, shape.num_experts, shape.shared_size, self.layer_seed(layer)
        )


def _dealt(order_F: torch.Tensor, shape: MoeShape) -> Grouping:
    shared, rest = order_F[: shape.shared_size], order_F[shape.shared_size :]
    return Grouping(shared, rest.view(shape.num_experts, -1))


STRATEGIES: dict[str, type[Split]] = {
    "contribution": Contribution,
    "coactivation": Coactivation,
    "cmoe": Cmoe,
    "expertweaver": ExpertWeaver,
    "gradient": Gradient,
    "learned": Learned,
    "weights": Weights,
    "random": Random,
    "contiguous": Contiguous,
}
"""Ways to choose the neurons of every expert, by name."""
