"""Triage: the stage that attacks, so that nobody tries to certify what can be broken."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lipjax.certification.attacks import attack_round, attack_rounds, pgd
from lipjax.certification.certifier import Certifier
from lipjax.certification.evidence import Evidence, Examples
from lipjax.networks.graph import Network

PGD_STEPS, PGD_ROUNDS = 25, 4  # the paper's 100 steps; who is broken after a round leaves


@dataclasses.dataclass(frozen=True)
class Attack:
    """The paper's PGD, cut to [0, 1], then the stronger attack in the domain that is certified.

    Attributes:
        network: what is attacked.
        eps: l2 radius.
        domain: see :data:`lipjax.networks.regions.DOMAINS`.
        key: each example's starts are drawn from it and from its place.
        strong: whether the stronger attack follows.
    """

    network: Network
    eps: float
    domain: str
    key: Array
    strong: bool = True
    name = "attack"
    certifies = False

    @property
    def rounds(self) -> int:
        return PGD_ROUNDS + (attack_rounds() if self.strong else 0)

    def title(self, round_: int) -> str:
        kind = "PGD" if round_ < PGD_ROUNDS else "attack"
        return f"{kind}, round {round_ + 1} of {self.rounds}"

    def asks(self, evidence: Evidence, triage: bool) -> np.ndarray:
        return evidence.undecided if triage else ~evidence.attacked

    def __call__(
        self, certifier: Certifier, evidence: Evidence, places: np.ndarray, batch: Examples, round_: int
    ) -> None:
        keys = jax.vmap(functools.partial(jax.random.fold_in, self.key))(jnp.asarray(batch.index))
        count = len(places)
        if round_ < PGD_ROUNDS:
            start = jnp.asarray(evidence.points[batch.index]) if round_ else None
            points, wrong = _pgd(self.network, batch.x, batch.label, self.eps, keys, start)
            evidence.points[places] = np.asarray(points)[:count]
            evidence.broken_by_pgd[places] |= np.asarray(wrong)[:count]
        else:
            number = round_ - PGD_ROUNDS
            wrong = _attack(self.network, batch.x, batch.label, self.eps, keys, number, domain=self.domain)
        evidence.refute(self.name, places, np.asarray(wrong)[:count])


@jax.jit
def _pgd(network: Network, x: Array, label: Array, eps: float, keys: Array, start: Array | None) -> tuple[Array, Array]:
    """Some steps of PGD: the points, and whether their prediction is wrong."""
    points = pgd(network, x, label, eps, keys, num_steps=PGD_STEPS, step_size=eps / 4, start=start)
    return points, jnp.argmax(network(points), axis=1) != jnp.asarray(label, int)


@functools.partial(jax.jit, static_argnames="domain")
def _attack(network: Network, x: Array, label: Array, eps: float, keys: Array, number: int, *, domain: str) -> Array:
    """One round of the stronger attack: whether the prediction of its best point is wrong."""
    points, _ = attack_round(network, x, label, eps, keys, number, domain=domain)
    return jnp.argmax(network(points), axis=1) != jnp.asarray(label, int)
