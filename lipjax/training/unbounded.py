"""Training without bounds: standard, adversarial, and TRADES."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from lipjax.bounds import propagation
from lipjax.bounds.crown import no_norms
from lipjax.bounds.rule import Rule
from lipjax.certification.attacks import pgd
from lipjax.networks.graph import Network
from lipjax.networks.layers import Affine
from lipjax.networks.regions import l2_ball
from lipjax.training import losses
from lipjax.training.objectives import Iterations, Metrics, warm_whole_norms

ATTACK_STEPS = 10  # of adversarial training and TRADES, of eps / 4 each
TRADES_BETA = 6.0


@dataclasses.dataclass(frozen=True)
class Unbounded:
    """Training without bounds; the norms of the whole layers are iterated for the log.

    Attributes:
        iterations: how norms are estimated.
    """

    iterations: Iterations

    def layers(self, network: Network) -> tuple[Affine, ...]:
        return network.layers

    def kept(self, network: Network) -> tuple[int, ...]:
        return ()

    def rule(self, network: Network) -> Rule | None:
        return None

    def __call__(self, network, x, label, eps, kappa, own_vectors, global_vectors, key, rule=None):
        norms, global_vectors = warm_whole_norms(self.layers(network), global_vectors, self.iterations, key)
        loss, metrics = self.losses(network, x, label, eps, jax.random.fold_in(key, len(norms)))
        constant = jnp.asarray(network.lipschitz(norms), norms.dtype)
        return loss, metrics | {"global_lipschitz": jnp.broadcast_to(constant, loss.shape)}, (), global_vectors

    def losses(self, network: Network, x: Array, label: Array, eps: Array | float, key: Array) -> tuple[Array, Metrics]:
        """Losses (B,) and metrics."""
        raise NotImplementedError


class Standard(Unbounded):
    """Cross entropy of the clean logits."""

    def losses(self, network, x, label, eps, key):
        logits = network(x)
        correct = jnp.argmax(logits, axis=1) == jnp.asarray(label, int)
        return losses.cross_entropy(logits, label), {"clean_accuracy": correct}


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
class ReLUStability(Adversarial):
    """Adversarial training, and a loss that is least where no neuron changes sides: ``-mean tanh(1 + lower upper)``.

    The boxes are interval bounds of the l2 ball. The mean is over the neurons of each activation, and summed.

    Attributes:
        weight: of the second loss.

    Reference:
        Xiao, Tjeng, Shafiullah, Madry, ICLR 2019.
    """

    weight: float = 0.0

    def losses(self, network, x, label, eps, key):
        loss, metrics = super().losses(network, x, label, eps, key)
        bounds = propagation.propagate(network, l2_ball(x, eps), no_norms, row_norms=propagation.full_row_norms)
        stable = jnp.zeros_like(loss)
        for before in bounds.before:
            lower, upper = before.box
            axes = tuple(range(1, lower.ndim))
            stable = stable - jnp.mean(jnp.tanh(1 + lower * upper), axis=axes)
        return loss + self.weight * stable, metrics | {"stability_loss": stable}


@dataclasses.dataclass(frozen=True)
class Gaussian(Unbounded):
    """Cross entropy of inputs with Gaussian noise: what randomized smoothing takes a majority of.

    Attributes:
        noise: standard deviation, in [0, 1] pixels.

    Reference:
        Cohen, Rosenfeld, Kolter, ICML 2019.
    """

    noise: float = 0.0

    def losses(self, network, x, label, eps, key):
        logits = network(x + self.noise * jax.random.normal(key, x.shape, x.dtype))
        correct = jnp.argmax(network(x), axis=1) == jnp.asarray(label, int)
        return losses.cross_entropy(logits, label), {"clean_accuracy": correct}


def _accuracies(clean: Array, attacked: Array, label: Array) -> Metrics:
    correct = {"clean_accuracy": clean, "pgd_accuracy": attacked}
    return {name: jnp.argmax(logits, axis=1) == jnp.asarray(label, int) for name, logits in correct.items()}


# By the name of the loss in a config; those with numbers of their own have a section of theirs in it.
UNBOUNDED = {
    "clean": Standard,
    "adversarial": Adversarial,
    "trades": Trades,
    "stability": ReLUStability,
    "gaussian": Gaussian,
}
