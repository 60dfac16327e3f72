"""Losses of what a pass of a batch came to, per example and unreduced.

Each is a function of an :class:`Outcome`, whatever margins it has: of Lipschitz constants, of box and ball, or of the
dual. Published formulas speak of a Lipschitz constant m_j of each margin: here that is how far the margin may fall over
the region, divided by eps, which is the same for margins of Lipschitz constants.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import Array, lax

from lipjax.bounds.margins import own_class, worst_logits, worst_margin
from lipjax.networks.layers import Affine
from lipjax.networks.linear_maps import length
from lipjax.training.losses import cross_entropy, gloro

FAR = 1e4  # a certified radius of what cannot fall at all
LEAST_SHARE = 0.01  # of eps, which EMMA raises every rival by
OFFSET_TEMPERATURE = 0.25
LA_TEMPERATURE, LA_OFFSET, LA_POWER = 0.75, 2.0, 5


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a pass of a batch came to: what a worst-case loss is a function of.

    Attributes:
        logits: clean (B, classes).
        margins: lower bounds of the margins over the region (B, classes), infinite for classes that were not asked.
        lipschitz: constant of the feature map over the region (B,).
        eps: radius, scalar or (B,).
        label: integers (B,).
        head: the last layer.
    """

    logits: Array
    margins: Array
    lipschitz: Array
    eps: Array | float
    label: Array
    head: Affine

    @property
    def worst_logits(self) -> Array:
        """Logits (B, classes) with every rival raised to its worst case."""
        return worst_logits(self.logits, self.margins, self.label)

    @property
    def clean_margins(self) -> Array:
        """Clean margins (B, classes) of the label over each class."""
        return jnp.take_along_axis(self.logits, jnp.asarray(self.label, int)[:, None], axis=1) - self.logits

    @property
    def rivals(self) -> Array:
        """Boolean (B, classes): the classes other than the label that were asked."""
        return ~own_class(self.logits, self.label) & (self.margins < jnp.inf)

    @property
    def falls(self) -> Array:
        """How far each margin may fall over the region (B, classes): at least 0, and 0 where it was not asked."""
        asked = jnp.where(self.rivals, self.margins, 0)
        return jnp.where(self.rivals, jnp.maximum(self.clean_margins - asked, 0), 0)


def gloro_of(outcome: Outcome) -> Array:
    """:func:`lipjax.gloro` of an outcome (B,)."""
    return gloro(outcome.logits, outcome.worst_logits, outcome.label)


def worst_cross_entropy(outcome: Outcome) -> Array:
    """:func:`lipjax.cross_entropy` of the worst logits (B,)."""
    return cross_entropy(outcome.worst_logits, outcome.label)


def emma(outcome: Outcome) -> Array:
    """Cross entropy of logits whose rivals are raised only as far as each can be certified now (B,).

    ``z_j - z_y + e_j m_j`` with ``e_j = clip((z_y - z_j) / m_j, eps / 100, eps)``, a constant to the gradient.

    Reference:
        Hu, Zou, Wang, Leino, Fredrikson, NeurIPS 2023 (LiResNet), section 3 (efficient margin maximisation).
    """
    return cross_entropy(emma_logits(outcome), outcome.label)


def emma_logits(outcome: Outcome) -> Array:
    """The logits of :func:`emma` (B, classes), that of the label 0; minus infinity where a class was not asked."""
    margins, falls = outcome.clean_margins, outcome.falls
    share = margins / jnp.where(falls > 0, falls, 1)
    raised = lax.stop_gradient(jnp.clip(share, LEAST_SHARE, 1)) * falls
    own = own_class(outcome.logits, outcome.label)
    return jnp.where(own | outcome.rivals, raised - margins, -jnp.inf)


def locally_annealed(outcome: Outcome) -> Array:
    """``T (1 - p)^5 CE`` (B,), with CE the cross entropy of ``(z - 2 onehot) / T`` and p = exp(-CE), of EMMA's logits.

    Examples that are already far from the boundary count little, so that capacity goes to the others. T is 0.75.

    Reference:
        Lai, Huang, Chen, Wang, Su, Hsu, Hsu, ICML 2025 (BRONet), the logit annealing loss.
    """
    own = own_class(outcome.logits, outcome.label)
    logits = (emma_logits(outcome) - jnp.where(own, LA_OFFSET, 0)) / LA_TEMPERATURE
    entropy = cross_entropy(logits, outcome.label)
    return LA_TEMPERATURE * (1 - jnp.exp(-entropy)) ** LA_POWER * entropy


def offset_cross_entropy(outcome: Outcome) -> Array:
    """``T CE((z - xi onehot) / T)`` (B,) with T = 1 / 4 and xi = 2 sqrt(2) eps L.

    Published for networks whose constant L is 1; with L the same holds for others, and scaling them up wins nothing.

    Reference:
        Prach, Lampert, ECCV 2022 (AOL), section 4.
    """
    offset = 2 * math.sqrt(2) * jnp.asarray(outcome.eps) * outcome.lipschitz
    own = own_class(outcome.logits, outcome.label)
    logits = outcome.logits - jnp.where(own, jnp.broadcast_to(offset, outcome.lipschitz.shape)[:, None], 0)
    return OFFSET_TEMPERATURE * cross_entropy(logits / OFFSET_TEMPERATURE, outcome.label)


def certified_radius_maximising(outcome: Outcome, weight: float, temperature: float, radius: float) -> Array:
    """Cross entropy, and for examples that are right with a small certified radius a soft minimum of radii (B,).

    ``CE + weight [min_j R_j < radius] logsumexp_j(-t R_j) / t`` with ``R_j = (z_y - z_j) / m_j``.

    Args:
        outcome: of a pass.
        weight: of the second term, mu.
        temperature: t.
        radius: above which an example is left alone.

    Reference:
        Fazlyab, Entesari, Roy, Chellappa, NeurIPS 2023 (CRM).
    """
    falls, clean = outcome.falls, cross_entropy(outcome.logits, outcome.label)
    moves = outcome.rivals & (falls > 0)
    radii = jnp.where(moves, jnp.asarray(outcome.eps) * outcome.clean_margins / jnp.where(moves, falls, 1), FAR)
    right = worst_margin(outcome.clean_margins, outcome.label) > 0
    soft = jax.nn.logsumexp(-temperature * jnp.minimum(radii, FAR), axis=1) / temperature
    return clean + jnp.where(right & (jnp.min(radii, axis=1) < radius), weight * soft, 0)


def calibrated(outcome: Outcome, radius: float, violation: float, weight: float) -> Array:
    """Cross entropy of logits in units of their own Lipschitz constants, with a slack for the radius (B,).

    ``z_i / (s K ||w_i||)``, less ``radius / s`` at the label and plus it elsewhere, ``s = radius / logit(1 - violation
    / 2)``; and ``weight K^2``. K is the constant of the feature map, without gradient in the logits.

    Args:
        outcome: of a pass with a ball.
        radius: that the slack is for.
        violation: probability p of a violation at that radius, in (0, 1).
        weight: of the penalty.

    Reference:
        Losch, Stutz, Schiele, Fritz, 2023 (Certified robust models with slack control, CLL).
    """
    sharpness = math.log((1 - violation / 2) / (violation / 2)) / radius
    rows = jax.vmap(length)(outcome.head.matrix())
    scale = lax.stop_gradient(outcome.lipschitz)[:, None] * rows[None]
    own, slack = own_class(outcome.logits, outcome.label), radius * sharpness
    logits = outcome.logits * sharpness / jnp.where(scale > 0, scale, 1) + jnp.where(own, -slack, slack)
    return cross_entropy(logits, outcome.label) + weight * outcome.lipschitz**2


# By the name of the loss in a config; those with numbers of their own have a section of theirs in it, whose entries are
# their arguments. A new one is a function of an outcome and a line here.
WORST_CASE = {
    "gloro": gloro_of,
    "cross_entropy": worst_cross_entropy,
    "emma": emma,
    "la": locally_annealed,
    "offset": offset_cross_entropy,
    "crm": certified_radius_maximising,
    "cll": calibrated,
}
