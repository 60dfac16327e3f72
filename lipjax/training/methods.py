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

from lipjax.bounds import margins, propagation
from lipjax.bounds.rule import Rule, initial_rule
from lipjax.certification.attacks import pgd
from lipjax.networks.graph import Network
from lipjax.networks.layers import Affine
from lipjax.networks.regions import l2_ball
from lipjax.training import losses

Metrics = dict[str, Array]
Vectors = tuple[Array, ...]
ATTACK_STEPS = 10  # of adversarial training and TRADES, of eps / 4 each
TRADES_BETA = 6.0


class Objective(Protocol):
    """What a step minimises."""

    def layers(self, network: Network) -> tuple[Affine, ...]:
        """The layers whose norms are iterated, in the order of their vectors."""
        ...

    def kept(self, network: Network) -> tuple[int, ...]:
        """The places among them for which every example keeps a vector of its own."""
        ...

    def rule(self, network: Network) -> Rule | None:
        """The slopes of the dual before training, where the method trains through it."""
        ...

    def __call__(
        self,
        network: Network,
        x: Array,
        label: Array,
        eps: Array | float,
        kappa: Array | float,
        stored: Vectors,
        whole: Vectors,
        key: Array,
        rule: Rule | None,
    ) -> tuple[Array, Metrics, Vectors, Vectors]:
        """The losses of a batch, and the vectors for the next time.

        Args:
            network: the classifier.
            x: inputs (B, ...).
            label: integers (B,).
            eps: radius of this step.
            kappa: weight of the clean loss.
            stored: each example's vectors (B, ...), one array per place of :meth:`kept`.
            whole: the vectors of the whole layers, one per layer of :meth:`layers`.
            key: of this step.
            rule: trained slopes of the dual, where the method has them.

        Returns:
            Losses (B,), metrics with a leading axis (B,), and ``stored`` and ``whole`` after the iterations.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Iterations:
    """How training estimates norms.

    Attributes:
        num_iters: power iterations per step and example.
        global_iters: power iterations per step for the whole layers; they cost next to nothing.
        noise: length of the noise added to the unit vectors in every step.
        saved: examples start from their own vectors; else each time from random ones (the paper's Table 1).
        global_layers: places whose norms are those of the whole layers also in a local method.
    """

    num_iters: int = 2
    global_iters: int = 10
    noise: float = 0.01
    saved: bool = True
    global_layers: tuple[int, ...] = ()


class Margins(Protocol):
    """How a method bounds the margins of one example."""

    def __call__(
        self, network: Network, bounds: propagation.Bounds, label: Array, rule: Rule | None, *head_norm: Array
    ) -> Array:
        """Margins (classes,): lower bounds as good as the norms are, infinite for classes that are not asked."""
        ...


def forward(margins: Callable[..., Array]) -> Margins:
    """Margins of the features' region: a function of the last layer, the region, the label and what is left."""

    def of_features(
        network: Network, bounds: propagation.Bounds, label: Array, rule: Rule | None, *rest: Array
    ) -> Array:
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
        own = jnp.arange(len(lipschitz)) == label
        others = len(lipschitz) - 1
        count = others if self.num_rivals is None else min(self.num_rivals, others)
        _, rivals = jax.lax.top_k(-jnp.where(own, jnp.inf, lipschitz), count)
        found = rule.margins(network, bounds, label, rivals)
        asked = jnp.zeros_like(own).at[rivals].set(True) | own
        return jnp.where(asked, lipschitz.at[rivals].max(found), jnp.inf)


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
        loss: ``(logits, worst_logits, label) -> loss`` of one example.
        sparsity: weight of the sparsity loss.
        sparsity_theta: weight in it of the term about the clips.
    """

    iterations: Iterations
    local: bool
    box: bool
    ball: bool
    margins: Margins
    loss: Callable[[Array, Array, Array], Array]
    head_norm: bool = False
    sparsity: float = 0.0
    sparsity_theta: float = 1.0

    def layers(self, network: Network) -> tuple[Affine, ...]:
        affine = tuple(block.affine for block in network.blocks)
        return (*affine, network.head) if self.head_norm else affine

    def kept(self, network: Network) -> tuple[int, ...]:
        own = self.local and self.iterations.saved
        places = range(len(self.layers(network))) if own else ()
        return tuple(place for place in places if place not in self.iterations.global_layers)

    def rule(self, network: Network) -> Rule | None:
        return initial_rule(network) if isinstance(self.margins, DualMargins) else None

    def __call__(self, network, x, label, eps, kappa, stored, whole, key, rule=None):
        shared, whole = whole_norms(self.layers(network), whole, self.iterations, key)
        keys = jax.random.split(jax.random.fold_in(key, len(shared)), len(x))
        kept, constant = self.kept(network), jnp.asarray(network.lipschitz(shared), shared.dtype)

        def one(x: Array, label: Array, vectors: Vectors, own_key: Array) -> tuple[Array, Metrics, Vectors]:
            norm = self.norm(network, vectors, whole, shared, key, own_key)
            found = self.propagate(network, x, eps, norm)
            results, last = dict(enumerate(found.norm_results)), ()
            if self.head_norm:
                live = found.features.live.reshape(network.head.in_shape)
                rows = jnp.ones(network.head.out_shape, bool)
                sigma, results[len(results)] = norm(len(results), network.head.linear_map().masked(rows, live))
                last = (sigma,)
            logits = network.head(found.features.center)
            worst = self.margins(network, found, label, rule, *last)
            clean = losses.cross_entropy(logits, label)
            worst_case = self.loss(logits, margins.worst_logits(logits, worst, label), label)
            loss, correct = losses.mixed(clean, worst_case, kappa), jnp.argmax(logits) == label
            if self.sparsity:
                pairs = zip(network.blocks, found.preactivations, strict=True)
                sparse = [losses.sparsity(block.activation, region, self.sparsity_theta) for block, region in pairs]
                loss = loss + self.sparsity * sum(sparse)
            metrics = {
                "clean_loss": clean,
                "worst_loss": worst_case,
                "clean_accuracy": correct,
                "certified_accuracy": correct & (margins.worst_margin(worst, label) > 0),
                "global_lipschitz": constant,
                "live": jnp.stack([jnp.mean(live) for live in found.live]),
            }
            if self.ball:
                metrics |= {"local_lipschitz": found.lipschitz, "sigma": found.sigmas}
            return loss, metrics, tuple(results[place] for place in kept)

        loss, metrics, vectors = jax.vmap(one)(x, label, stored, keys)
        return loss, metrics, vectors, whole

    def norm(
        self, network: Network, stored: Vectors, whole: Vectors, shared: Array, key: Array, own_key: Array
    ) -> propagation.Norm:
        """How the pass of one example gets its norms: see :class:`lipjax.bounds.propagation.Norm`."""
        options, given = self.iterations, propagation.Given(shared)
        own = dict(zip(self.kept(network), stored, strict=True))
        warm = propagation.WarmStarted(own, whole, key, options.num_iters, options.noise)
        fresh = propagation.RandomStarted(own_key, options.num_iters)

        def norm(place: int, linear_map: propagation.LinearMap) -> tuple[Array, Array | None]:
            if not self.local or place in options.global_layers:
                return given(place, linear_map)
            return (warm if options.saved else fresh)(place, linear_map)

        return norm

    def propagate(self, network: Network, x: Array, eps: Array | float, norm: propagation.Norm) -> propagation.Bounds:
        """The pass of one example."""
        region = l2_ball(x, eps)
        region = region if self.box else region.without_box()
        region = region if self.ball else region.without_ball()
        return propagation.propagate(network, region, norm, propagation.full_row_norms)


@dataclasses.dataclass(frozen=True)
class Unbounded:
    """Training without bounds; the norms of the whole layers are iterated for the log.

    Attributes:
        iterations: how norms are estimated.
    """

    iterations: Iterations

    def layers(self, network: Network) -> tuple[Affine, ...]:
        return tuple(block.affine for block in network.blocks)

    def kept(self, network: Network) -> tuple[int, ...]:
        return ()

    def rule(self, network: Network) -> Rule | None:
        return None

    def __call__(self, network, x, label, eps, kappa, stored, whole, key, rule=None):
        shared, whole = whole_norms(self.layers(network), whole, self.iterations, key)
        loss, metrics = self.losses(network, x, label, eps, jax.random.fold_in(key, len(shared)))
        constant = jnp.asarray(network.lipschitz(shared), shared.dtype)
        return loss, metrics | {"global_lipschitz": jnp.broadcast_to(constant, loss.shape)}, (), whole

    def losses(self, network: Network, x: Array, label: Array, eps: Array | float, key: Array) -> tuple[Array, Metrics]:
        """Losses (B,) and metrics."""
        raise NotImplementedError


class Standard(Unbounded):
    """Cross entropy of the clean logits."""

    def losses(self, network, x, label, eps, key):
        logits = network(x)
        return losses.cross_entropy(logits, label), {"clean_accuracy": jnp.argmax(logits, axis=1) == label}


class Adversarial(Unbounded):
    """Adversarial training: cross entropy after l2 PGD, 10 steps of eps / 4 (the number of steps is our choice).

    Reference:
        Madry, Makelov, Schmidt, Tsipras, Vladu, ICLR 2018.
    """

    def losses(self, network, x, label, eps, key):
        points = jax.lax.stop_gradient(pgd(network, x, label, eps, key, num_steps=ATTACK_STEPS))
        attacked = network(points)
        return losses.cross_entropy(attacked, label), _accuracies(network(x), attacked, label)


class Trades(Unbounded):
    """TRADES: cross entropy of the clean logits, and beta times the divergence of the attacked ones from them.

    The attack ascends the divergence, 10 l2 steps of eps / 4; beta is 6. Both are our choices.

    Reference:
        Zhang, Yu, Jiao, Xing, El Ghaoui, Jordan, ICML 2019.
    """

    def losses(self, network, x, label, eps, key):
        clean = network(x)
        fixed = jax.lax.stop_gradient(clean)
        points = pgd(
            network,
            x,
            label,
            eps,
            key,
            num_steps=ATTACK_STEPS,
            objective=lambda logits: losses.divergence(fixed, logits),
        )
        attacked = network(jax.lax.stop_gradient(points))
        return losses.trades(clean, attacked, label, TRADES_BETA), _accuracies(clean, attacked, label)


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


def whole_norms(layers: tuple[Affine, ...], vectors: Vectors, options: Iterations, key: Array) -> tuple[Array, Vectors]:
    """The norms of whole layers, warm-started, and their vectors after the iterations."""
    return propagation.layer_norms(
        layers, propagation.WarmStarted(vectors, None, key, options.global_iters, options.noise)
    )


def _accuracies(clean: Array, attacked: Array, label: Array) -> Metrics:
    correct = {"clean_accuracy": clean, "pgd_accuracy": attacked}
    return {name: jnp.argmax(logits, axis=1) == label for name, logits in correct.items()}
