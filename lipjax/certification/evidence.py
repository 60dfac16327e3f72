"""Evidence: what is known about the examples of an evaluation; stages write it, reports read it."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from jax import Array

from lipjax.certification.certificates import Certificate
from lipjax.certification.certifier import Certification, Certifier
from lipjax.certification.packing import all_rows, pack

NAME_LENGTH = 32  # of a stage, at most


@dataclasses.dataclass(frozen=True)
class Examples:
    """Some examples: inputs (B, ...) in [0, 1], labels (B,) and their places (B,). Places may repeat at the end."""

    x: Array
    label: Array
    index: np.ndarray


@dataclasses.dataclass
class Evidence:
    """What is known about N examples, in arrays of the host.

    Attributes:
        label: integers (N,).
        prediction: of the network (N,), -1 where it is not known yet.
        worst_margin: the largest lower bound of the worst margin that was found (N,).
        lipschitz: the smallest constant of the feature map that was computed (N,).
        certified: (N,).
        broken_by_pgd: the paper's PGD found a wrong prediction (N,).
        attacked: it or the stronger attack did (N,).
        stage: what decided each example (N,): "prediction" (it is wrong), the name of a stage, or "undecided".
        products: products with layers or their transposes that its norms took (N,).
        dual_steps: steps of ascent of its dual margins, of all rivals (N,).
        seconds: of all stages that saw it (N,).
        local: it was bounded with norms of its own (N,).
        sigmas: the least norms that are known (N, layers).
        rows: the rows that these are norms of, or their weights, packed (N, bytes).
        live: share of varying neurons behind each activation (N, activations).
        norm_products: products that each norm took (N, layers).
        radius: certified radii (N,), where they were asked for.
        points: where PGD is (N, ...).
    """

    label: np.ndarray
    prediction: np.ndarray
    worst_margin: np.ndarray
    lipschitz: np.ndarray
    certified: np.ndarray
    broken_by_pgd: np.ndarray
    attacked: np.ndarray
    stage: np.ndarray
    products: np.ndarray
    dual_steps: np.ndarray
    seconds: np.ndarray
    local: np.ndarray
    sigmas: np.ndarray
    rows: np.ndarray
    live: np.ndarray
    norm_products: np.ndarray
    radius: np.ndarray
    points: np.ndarray

    @property
    def undecided(self) -> np.ndarray:
        """Which examples no stage has decided yet (N,)."""
        return self.stage == "undecided"

    @property
    def correct(self) -> np.ndarray:
        """Which predictions are known to be right (N,)."""
        return self.prediction == self.label

    def learn(self, name: str, places: np.ndarray, found: Certification) -> None:
        """Enter what a stage has found for the examples at some places, the first of the batch."""
        new = found.certificate
        prediction, margin, constant, certified = (
            np.asarray(column)[: len(places)]
            for column in (new.prediction, new.worst_margin, new.lipschitz, new.certified)
        )
        self.prediction[places] = prediction
        # Where something overflowed, what was found is no bound of anything.
        finite = found.finite[: len(places)] & np.isfinite(margin) & np.isfinite(constant)
        self.worst_margin[places] = np.fmax(self.worst_margin[places], np.where(finite, margin, -np.inf))
        self.lipschitz[places] = np.fmin(self.lipschitz[places], np.where(finite, constant, np.inf))
        self.certified[places] |= certified
        self.dual_steps[places] += found.dual_steps[: len(places)]
        self._decide(places, ~self.correct[places], "prediction")
        self._decide(places, certified, name)

    def refute(self, name: str, places: np.ndarray, broken: np.ndarray) -> None:
        """Enter for which examples at some places a stage that attacks has found a wrong prediction."""
        self.attacked[places] |= broken
        self._decide(places, broken, name)

    def certificate(self, level: str, domain: str) -> Certificate:
        """What is known as a certificate of all examples."""
        return Certificate(self.prediction, self.worst_margin, self.lipschitz, self.certified, level, domain)

    def _decide(self, places: np.ndarray, decided: np.ndarray, name: str) -> None:
        self.stage[places] = np.where(decided & self.undecided[places], name, self.stage[places])


def no_evidence(certifier: Certifier, label: np.ndarray, image_shape: tuple[int, ...] | None = None) -> Evidence:
    """The evidence about examples with these labels before the first stage.

    Args:
        certifier: gives the norms of the whole layers.
        label: integers (N,).
        image_shape: of one example, where there will be attacks.
    """
    count, network = len(label), certifier.network
    zeros, false = (functools.partial(np.zeros, dtype=kind) for kind in (np.float64, bool))
    return Evidence(
        label=np.asarray(label),
        prediction=np.full(count, -1, np.int32),
        worst_margin=np.full(count, -np.inf),
        lipschitz=np.full(count, np.inf),
        certified=false(count),
        broken_by_pgd=false(count),
        attacked=false(count),
        stage=np.full(count, "undecided", f"U{NAME_LENGTH}"),
        products=zeros(count),
        dual_steps=np.zeros(count, np.int64),
        seconds=zeros(count),
        local=false(count),
        sigmas=np.tile(certifier.sigmas, (count, 1)),
        rows=np.tile(pack(all_rows(network, 1)), (count, 1)),
        live=zeros((count, len(network.activations))),
        norm_products=zeros((count, len(network.layers))),
        radius=zeros(count),
        points=np.zeros((count, *(image_shape or (0,))), np.float32),
    )
