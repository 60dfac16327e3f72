"""Training without bounds: standard, adversarial, and TRADES."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from lipjax.bounds.rule import Rule
from lipjax.certification.attacks import pgd
from lipjax.networks.graph import Network
from lipjax.networks.layers import Affine
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


def _accuracies(clean: Array, attacked: Array, label: Array) -> Metrics:
    correct = {"clean_accuracy": clean, "pgd_accuracy": attacked}
    return {name: jnp.argmax(logits, axis=1) == jnp.asarray(label, int) for name, logits in correct.items()}


# By the name of the loss in a config.
UNBOUNDED = {"clean": Standard, "adversarial": Adversarial, "trades": Trades}
