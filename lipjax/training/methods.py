"""Methods: what a training step minimises, each for the same arguments.

Those with bounds are one pass of a region with parts absent: IBP is the box alone, GloRo and LMT the ball alone, BCP
both, Local-Lip both with the norms of each example's masked layers. The others need no region.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import optax
from jax import Array

from lipjax.bounds import crown, margins, propagation
from lipjax.bounds.propagation import Ask, Bounds
from lipjax.bounds.rule import Rule, initial_rule
from lipjax.networks.graph import Network
from lipjax.networks.layers import Affine
from lipjax.networks.regions import l2_ball
from lipjax.norms import estimates
from lipjax.training import losses, worst_case
from lipjax.training.objectives import Iterations, Objective, Vectors, warm_whole_norms


class Margins(Protocol):
    """How a method bounds the margins of one example."""

    def __call__(self, network: Network, bounds: Bounds, label: Array, rule: Rule | None, *head_norm: Array) -> Array:
        """Margins (classes,): lower bounds as good as the norms are, infinite for classes that are not asked."""
        ...


def forward(margins: Callable[..., Array]) -> Margins:
    """Margins of the features' region: a function of the last layer, the region, the label and what is left."""

    def of_features(network: Network, bounds: Bounds, label: Array, rule: Rule | None, *rest: Array) -> Array:
        return margins(network.head, bounds.features, label, *rest)

    return of_features


@dataclasses.dataclass(frozen=True)
class DualMargins:
    """The larger of the dual and of the Lipschitz margin, against the strongest rivals; the others are left out.

    Would the others keep their Lipschitz margin in the loss, it would be the worst, and train Lipschitz again. So what
    counts as certified in a training step is so against the rivals that were asked; validation asks all of them.

    Attributes:
        num_rivals: how many are asked, those with the least Lipschitz margins; None: all.
    """

    num_rivals: int | None

    def __call__(self, network, bounds, label, rule, *rest):
        lipschitz = margins.pairwise_lipschitz(network.head, bounds.features, label)
        own = jnp.arange(len(lipschitz)) == jnp.asarray(label, int)
        others = len(lipschitz) - 1
        count = others if self.num_rivals is None else min(self.num_rivals, others)
        _, rivals = jax.lax.top_k(-jnp.where(own, jnp.inf, lipschitz), count)
        found = rule.margins(network, bounds, label, rivals)
        asked = jnp.zeros_like(own).at[rivals].set(True) | own
        return jnp.where(asked, lipschitz.at[rivals].max(found), jnp.inf)


@dataclasses.dataclass(frozen=True)
class CrownMargins:
    """``(1 - mix) m_box + mix m_CROWN``, with a mix that goes from one value to another as the radius goes to its end.

    Both margins are about the same boxes, so that any mix is a lower bound too.

    Attributes:
        eps: radius at the end of the ramp.
        start: mix at a radius of 0.
        end: mix at the end.
    """

    eps: float
    start: float
    end: float

    def __call__(self, network, bounds, label, rule, *rest):
        of_box = margins.box_and_ball(network.head, bounds.features, label)
        of_crown = crown.margins_of_one(network, bounds, label)
        mix = self.start + (self.end - self.start) * jnp.clip(bounds.input.ball / self.eps, 0, 1)
        return (1 - mix) * of_box + mix * of_crown


@dataclasses.dataclass(frozen=True)
class Bounded:
    """The loss on the worst case that bounds of the region allow ([H21] Eq 25), with a sparsity loss (Eq 12, 26).

    Attributes:
        iterations: how norms are estimated.
        local: norms of each example's masked layers; else those of the whole layers.
        box: the region has a box.
        ball: the region has a ball.
        margins: gives the worst-case margins; with ``head_norm``, the norm of the last layer comes last.
        head_norm: the margins need the norm of the last layer (LMT).
        loss: what a pass came to, of a batch, to losses (B,); see :class:`lipjax.training.worst_case.Outcome`.
        sparsity: weight of the sparsity loss.
        sparsity_theta: weight in it of the term about the clips.
    """

    iterations: Iterations
    local: bool
    box: bool
    ball: bool
    margins: Margins
    loss: Callable[[worst_case.Outcome], Array]
    head_norm: bool = False
    sparsity: float = 0.0
    sparsity_theta: float = 1.0

    def layers(self, network: Network) -> tuple[Affine, ...]:
        return (*network.layers, network.head) if self.head_norm else network.layers

    def kept(self, network: Network) -> tuple[int, ...]:
        own = self.local and self.iterations.saved
        places = range(len(self.layers(network))) if own else ()
        return tuple(place for place in places if place not in self.iterations.global_layers)

    def rule(self, network: Network) -> Rule | None:
        return initial_rule(network) if isinstance(self.margins, DualMargins) else None

    def __call__(self, network, x, label, eps, kappa, own_vectors, global_vectors, key, rule=None):
        global_norms, global_vectors = warm_whole_norms(self.layers(network), global_vectors, self.iterations, key)
        constant = jnp.asarray(network.lipschitz(global_norms[: len(network.layers)]), global_norms.dtype)
        own_key = jax.random.fold_in(key, len(global_norms))
        ask = self.ask(network, own_vectors, global_vectors, global_norms, key, jax.random.split(own_key, len(x)))
        found = self.propagate(network, x, eps, ask)
        handed_back, of_head = list(found.handed_back), ()
        if self.head_norm:
            every = jnp.ones((len(x), *network.head.out_shape), bool)
            sigma, new = ask(len(handed_back), network.head, every, found.features.live)
            of_head, handed_back = (sigma,), [*handed_back, new]

        def one(bounds: Bounds, label: Array, *of_head: Array) -> tuple[Array, Array, Array, Array]:
            worst = self.margins(network, bounds, label, rule, *of_head)
            pairs = zip(network.activations, bounds.before, strict=True) if self.sparsity else ()
            sparse = [losses.sparsity(activation, before, self.sparsity_theta) for activation, before in pairs]
            live = jnp.stack([jnp.mean(live) for live in bounds.live])
            return network.head(bounds.features.center).ravel(), worst, jnp.asarray(sum(sparse), worst.dtype), live

        per_example = jax.vmap(one)(dataclasses.replace(found, handed_back=()), label, *of_head)
        logits, least, sparse, live = per_example
        outcome = worst_case.Outcome(logits, least, found.lipschitz, eps, label, network.head)
        clean, worst = losses.cross_entropy(logits, label), self.loss(outcome)
        loss, correct = losses.mixed(clean, worst, kappa), jnp.argmax(logits, axis=1) == jnp.asarray(label, int)
        if self.sparsity:
            loss = loss + self.sparsity * sparse
        metrics = {
            "clean_loss": clean,
            "worst_loss": worst,
            "clean_accuracy": correct,
            "certified_accuracy": correct & (margins.worst_margin(least, label) > 0),
            "global_lipschitz": jnp.broadcast_to(constant, correct.shape),
            "live": live,
        }
        if self.ball:
            metrics |= {"local_lipschitz": found.lipschitz, "sigma": found.sigmas}
        return loss, metrics, tuple(handed_back[place] for place in self.kept(network)), global_vectors

    def ask(
        self,
        network: Network,
        own_vectors: Vectors,
        global_vectors: Vectors,
        global_norms: Array,
        key: Array,
        own_keys: Array,
    ) -> Ask:
        """How a pass of a batch gets its norms.

        Args:
            network: the classifier.
            own_vectors: each example's own (B, ...), one array per place of :meth:`kept`.
            global_vectors: of the whole layers.
            global_norms: of the whole layers.
            key: of the step.
            own_keys: one per example (B,).
        """
        options, given = self.iterations, estimates.Given(global_norms)
        own = dict(zip(self.kept(network), own_vectors, strict=True))
        warm = estimates.WarmStarted(own, global_vectors, key, options.num_iters, options.noise)
        fresh = estimates.RandomStarted(own_keys, options.num_iters)

        def ask(place: int, layer: Affine, rows: Array, columns: Array) -> tuple[Array, Array | None]:
            if not self.local or place in options.global_layers:
                return given(place, layer, rows, columns)
            return (warm if options.saved else fresh)(place, layer, rows, columns)

        return ask

    def propagate(self, network: Network, x: Array, eps: Array | float, ask: Ask) -> Bounds:
        """The pass of a batch."""
        region = l2_ball(x, eps)
        region = region if self.box else region.without_box()
        region = region if self.ball else region.without_ball()
        return propagation.propagate(network, region, ask, row_norms=propagation.full_row_norms)


@dataclasses.dataclass(frozen=True)
class CrownIBP(Bounded):
    """CROWN-IBP: one backward pass of CROWN through boxes of interval bounds, of the l2 ball of inputs.

    Reference:
        Zhang, Chen, Xiao, Gowal, Stanforth, Li, Boning, Hsieh, ICLR 2020.
    """

    def propagate(self, network, x, eps, ask):
        return propagation.propagate(network, l2_ball(x, eps), crown.no_norms, row_norms=propagation.full_row_norms)


@dataclasses.dataclass(frozen=True)
class Method:
    """What a run minimises, and with which numbers.

    Attributes:
        objective: what a step minimises.
        validation: what the validation split is judged by; it keeps the same vectors.
        eps: schedule of the radius.
        kappa: schedule of the weight of the clean loss.
        learning_rate: schedule of the optimiser, for the log.
        optimizer: Optax transformation.
        crop_padding: images are cropped at random from ones padded by so many zeros, and flipped; 0: neither.
    """

    objective: Objective
    validation: Objective
    eps: optax.Schedule
    kappa: optax.Schedule
    learning_rate: optax.Schedule
    optimizer: optax.GradientTransformation
    crop_padding: int = 0
