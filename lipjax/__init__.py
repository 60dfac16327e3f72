"""lipjax: training and certifying robust classifiers with local Lipschitz bounds, in JAX.

The pure functions below ``jit``, ``vmap`` and ``grad``. Those that take a network take batches; layer methods take one
example. What trains and evaluates whole runs needs more packages: ``pip install "lipjax[train]"``.
"""

from importlib import import_module as _import_module
from importlib.metadata import version as _version
from typing import Any as _Any

from lipjax.bounds import constants
from lipjax.bounds.arithmetic import EXACT, FLOAT32
from lipjax.bounds.ascent import ascend
from lipjax.bounds.crown import alpha_crown_margins, crown_margins, no_norms, sdp_crown_margins
from lipjax.bounds.dual import Multipliers, dual_margins
from lipjax.bounds.margins import box_and_ball, lipschitz_margin, pairwise_lipschitz, worst_logits, worst_margin
from lipjax.bounds.propagation import Bounds, full_row_norms, masked_row_norms, propagate
from lipjax.bounds.rule import Rule
from lipjax.certification import smoothing
from lipjax.certification.attacks import attack, pgd
from lipjax.certification.certificates import Certificate
from lipjax.certification.certifier import Certifier
from lipjax.certification.records import load_certificates
from lipjax.certification.robustness import certified_radius, certify, global_lipschitz, local_lipschitz
from lipjax.networks.activations import (
    Activation,
    ClipActivation,
    ClippedReLUActivation,
    Elementwise,
    IdentityActivation,
    ReLUActivation,
)
from lipjax.networks.circular import Circular, circular
from lipjax.networks.graph import Concatenation, Graph, Network, Node, Sum, chain
from lipjax.networks.known import Known, known
from lipjax.networks.layers import Affine, Bilinear, Conv, Dense, Scale, convolution, dense
from lipjax.networks.leaky import LeakyReLUActivation
from lipjax.networks.linear_maps import LinearMap
from lipjax.networks.maxmin import ClippedMaxMinActivation, MaxMinActivation
from lipjax.networks.pooling import MaxPoolActivation
from lipjax.networks.potential import ConvexPotentialActivation, convex_potential
from lipjax.networks.regions import Preactivation, Region, l2_ball
from lipjax.networks.smooth import (
    ELUActivation,
    GELUActivation,
    SigmoidActivation,
    SiLUActivation,
    Smooth,
    SoftplusActivation,
    TanhActivation,
    TanhGELUActivation,
)
from lipjax.norms.estimates import Estimate, Given, RandomStarted, WarmStarted, whole_norms
from lipjax.norms.power_iteration import (
    converged_norm,
    power_iteration,
)
from lipjax.reading.flax import from_flax, from_function
from lipjax.reading.modules import ClippedMaxMin, ClippedReLU, MaxMin, Residual
from lipjax.reading.nonexpansive import AOLConv, AOLLinear, CayleyConv, CayleyLinear, SLLConv, SLLLinear
from lipjax.reading.readers import register
from lipjax.training.losses import cross_entropy, gloro, mixed, sparsity, trades

# Of whole runs: loaded when they are asked for, because they need the packages of lipjax[train].
_OF_RUNS = {
    "Dataset": "data",
    "certify_run": "certifying",
    "evaluate": "evaluation",
    "load_config": "settings",
    "load_run": "trained",
    "train": "runs",
}


def __getattr__(name: str) -> _Any:
    if name not in _OF_RUNS:
        raise AttributeError(f"module 'lipjax' has no attribute {name!r}")
    return getattr(_import_module(f"lipjax.experiments.{_OF_RUNS[name]}"), name)


__version__ = _version("lipjax")

__all__ = [
    "EXACT",
    "FLOAT32",
    "AOLConv",
    "AOLLinear",
    "Activation",
    "Affine",
    "Bilinear",
    "Bounds",
    "CayleyConv",
    "CayleyLinear",
    "Certificate",
    "Certifier",
    "Circular",
    "ClipActivation",
    "ClippedMaxMin",
    "ClippedMaxMinActivation",
    "ClippedReLU",
    "ClippedReLUActivation",
    "Concatenation",
    "Conv",
    "ConvexPotentialActivation",
    "Dataset",
    "Dense",
    "ELUActivation",
    "Elementwise",
    "Estimate",
    "GELUActivation",
    "Given",
    "Graph",
    "IdentityActivation",
    "Known",
    "LeakyReLUActivation",
    "LinearMap",
    "MaxMin",
    "MaxMinActivation",
    "MaxPoolActivation",
    "Multipliers",
    "Network",
    "Node",
    "Preactivation",
    "RandomStarted",
    "ReLUActivation",
    "Region",
    "Residual",
    "Rule",
    "SLLConv",
    "SLLLinear",
    "Scale",
    "SiLUActivation",
    "SigmoidActivation",
    "Smooth",
    "SoftplusActivation",
    "Sum",
    "TanhActivation",
    "TanhGELUActivation",
    "WarmStarted",
    "__version__",
    "alpha_crown_margins",
    "ascend",
    "attack",
    "box_and_ball",
    "certified_radius",
    "certify",
    "certify_run",
    "chain",
    "circular",
    "constants",
    "converged_norm",
    "convex_potential",
    "convolution",
    "cross_entropy",
    "crown_margins",
    "dense",
    "dual_margins",
    "evaluate",
    "from_flax",
    "from_function",
    "full_row_norms",
    "global_lipschitz",
    "gloro",
    "known",
    "l2_ball",
    "lipschitz_margin",
    "load_certificates",
    "load_config",
    "load_run",
    "local_lipschitz",
    "masked_row_norms",
    "mixed",
    "no_norms",
    "pairwise_lipschitz",
    "pgd",
    "power_iteration",
    "propagate",
    "register",
    "sdp_crown_margins",
    "smoothing",
    "sparsity",
    "trades",
    "train",
    "whole_norms",
    "worst_logits",
    "worst_margin",
]
