"""lipjax: training and certifying robust classifiers with local Lipschitz bounds, in JAX.

The pure functions below ``jit``, ``vmap`` and ``grad``. Those that take a network take batches; layer methods take one
example. The scripts ``train.py`` and ``certify.py`` are built from them.
"""

from importlib.metadata import version as _version

from lipjax.bounds.ascent import ascend
from lipjax.bounds.dual import Multipliers, dual_margins
from lipjax.bounds.margins import box_and_ball, lipschitz_margin, pairwise_lipschitz, worst_logits, worst_margin
from lipjax.bounds.propagation import (
    Bounds,
    Estimate,
    Given,
    RandomStarted,
    WarmStarted,
    full_row_norms,
    global_norms,
    masked_row_norms,
    propagate,
)
from lipjax.bounds.rule import Rule
from lipjax.certification.attacks import attack, pgd
from lipjax.certification.certificates import Certificate
from lipjax.certification.certifier import Certifier
from lipjax.certification.records import load_certificates
from lipjax.certification.robustness import certified_radius, certify, global_lipschitz, local_lipschitz
from lipjax.networks.activations import ClippedMaxMin, ClippedReLU, Identity, MaxMin, ReLU
from lipjax.networks.graph import Block, Fork, Join, Network
from lipjax.networks.layers import Conv, Dense, Scale, convolution, dense
from lipjax.networks.linear_maps import LinearMap
from lipjax.networks.pooling import MaxPool
from lipjax.networks.regions import (
    Region,
    l2_ball,
)
from lipjax.norms.spectral import (
    converged_norm,
    power_iteration,
)
from lipjax.reading.flax import from_flax
from lipjax.reading.modules import Residual
from lipjax.training.losses import cross_entropy, gloro, mixed, sparsity, trades

__version__ = _version("lipjax")

__all__ = [
    "Block",
    "Bounds",
    "Certificate",
    "Certifier",
    "ClippedMaxMin",
    "ClippedReLU",
    "Conv",
    "Dense",
    "Estimate",
    "Fork",
    "Given",
    "Identity",
    "Join",
    "LinearMap",
    "MaxMin",
    "MaxPool",
    "Multipliers",
    "Network",
    "RandomStarted",
    "ReLU",
    "Region",
    "Residual",
    "Rule",
    "Scale",
    "WarmStarted",
    "__version__",
    "ascend",
    "attack",
    "box_and_ball",
    "certified_radius",
    "certify",
    "converged_norm",
    "convolution",
    "cross_entropy",
    "dense",
    "dual_margins",
    "from_flax",
    "full_row_norms",
    "global_lipschitz",
    "global_norms",
    "gloro",
    "l2_ball",
    "lipschitz_margin",
    "load_certificates",
    "local_lipschitz",
    "masked_row_norms",
    "mixed",
    "pairwise_lipschitz",
    "pgd",
    "power_iteration",
    "propagate",
    "sparsity",
    "trades",
    "worst_logits",
    "worst_margin",
]
