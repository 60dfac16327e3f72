"""Write docs/api.md from the docstrings of what ``import lipjax`` gives: ``python docs/generate_api.py``."""

import dataclasses
import inspect
import operator
import pathlib
import re
from typing import Any

import lipjax

PAGE = pathlib.Path(__file__).parent / "api.md"
GROUPS = {
    "Questions about a network": ("certify", "certified_radius", "local_lipschitz", "global_lipschitz", "Certificate"),
    "Networks": ("from_flax", "from_function", "register", "chain", "Graph", "Network", "Node", "Sum", "Concatenation"),
    "Whole runs": ("load_config", "train", "load_run", "certify_run", "evaluate", "Dataset"),
    "Flax modules": (
        *("ClippedReLU", "MaxMin", "ClippedMaxMin", "Residual", "CayleyLinear", "CayleyConv"),
        *("AOLLinear", "AOLConv", "SLLLinear", "SLLConv"),
    ),
    "Certifying many examples": ("Certifier", "load_certificates"),
    "Regions and bounds": (
        *("l2_ball", "Region", "Preactivation", "propagate", "Bounds", "EXACT", "FLOAT32"),
        *("masked_row_norms", "full_row_norms"),
    ),
    "Norms in a pass": ("Estimate", "WarmStarted", "RandomStarted", "Given", "whole_norms"),
    "Spectral norms": ("LinearMap", "power_iteration", "converged_norm"),
    "Worst-case logits and losses": (
        *("box_and_ball", "pairwise_lipschitz", "lipschitz_margin", "worst_logits", "worst_margin"),
        *("cross_entropy", "gloro", "mixed", "trades", "sparsity"),
    ),
    "The dual": ("dual_margins", "ascend", "Multipliers", "Rule"),
    "Other bounds": ("crown_margins", "alpha_crown_margins", "sdp_crown_margins", "no_norms"),
    "Layers": (
        *("Affine", "Bilinear", "Dense", "Conv", "Scale", "Circular", "Known", "dense", "convolution"),
        *("circular", "known"),
    ),
    "Other constants of margins": (
        *("constants.product", "constants.lip_lt", "constants.merged", "constants.fast_lip"),
        *("constants.hein_andriushchenko", "constants.exact", "constants.svd_norms"),
    ),
    "Activations": (
        *("Activation", "Elementwise", "IdentityActivation", "ReLUActivation", "ClippedReLUActivation"),
        *("ClipActivation", "LeakyReLUActivation", "Smooth", "TanhActivation", "SigmoidActivation"),
        *("SoftplusActivation", "ELUActivation", "SiLUActivation", "GELUActivation", "TanhGELUActivation"),
        *("MaxMinActivation", "ClippedMaxMinActivation", "MaxPoolActivation"),
        *("ConvexPotentialActivation", "convex_potential"),
    ),
    "Attacks": ("pgd", "attack"),
    "Randomized smoothing": ("smoothing.smoothed_radius", "smoothing.lower_confidence", "smoothing.Smoothed"),
}


def page() -> str:
    """The page, as Markdown."""
    named = {name.split(".")[0] for names in GROUPS.values() for name in names} | {"__version__"}
    if named != set(lipjax.__all__):
        raise SystemExit(f"GROUPS and lipjax.__all__ differ in {sorted(named ^ set(lipjax.__all__))}")
    lines = ["# API", "", "Written by `python docs/generate_api.py` from the docstrings.", ""]
    for title, names in GROUPS.items():
        lines += [f"## {title}", ""]
        for name in names:
            lines += [f"### `{name}`", "", *_signature(name), inspect.cleandoc(_named(name).__doc__), ""]
    return "\n".join(lines)


def _named(name: str) -> Any:
    """What a name, with dots for modules, stands for."""
    return operator.attrgetter(name)(lipjax)


def _signature(name: str) -> list[str]:
    """The signature in a block of code; a pytree's fields are in its docstring."""
    value = _named(name)
    if dataclasses.is_dataclass(value):
        return []
    # Defaults and types that are objects print with addresses.
    signature = re.sub(r"<[^>]*>", "...", str(inspect.signature(value)))
    signature = re.sub(r"(: |-> )'([^']*)'", r"\1\2", signature)
    return ["```python", f"{name}{signature}", "```", ""]


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE}")
