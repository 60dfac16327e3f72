"""Defaults: what configs share, every key with its value, and the methods by name."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict, config_dict

from lipjax.experiments import references

# A method is the norms it trains with, the worst-case margins over the region, and the loss on the worst logits.
METHODS = {
    "local_gloro": {"norms": "local", "margins": "pairwise_lipschitz", "loss": "gloro"},
    "local_bcp": {"norms": "local", "margins": "box_and_ball", "loss": "cross_entropy"},
    "local_lmt": {"norms": "local", "margins": "lipschitz_margin", "loss": "cross_entropy"},
    "local_dual": {"norms": "local", "margins": "dual", "loss": "gloro"},
    "local_dual_b": {"norms": "local", "margins": "dual", "loss": "cross_entropy"},
    "gloro": {"norms": "global", "margins": "pairwise_lipschitz", "loss": "gloro"},
    "bcp": {"norms": "global", "margins": "box_and_ball", "loss": "cross_entropy"},
    "lmt": {"norms": "global", "margins": "lipschitz_margin", "loss": "cross_entropy"},
    "dual": {"norms": "global", "margins": "dual", "loss": "gloro"},
    "dual_b": {"norms": "global", "margins": "dual", "loss": "cross_entropy"},
    "ibp": {"norms": "none", "margins": "box_and_ball", "loss": "cross_entropy"},
    "crown_ibp": {"norms": "none", "margins": "crown", "loss": "cross_entropy"},
    "standard": {"norms": "none", "margins": "none", "loss": "clean"},
    "at": {"norms": "none", "margins": "none", "loss": "adversarial"},  # l2 PGD, 10 steps of eps / 4: our choice
    "trades": {"norms": "none", "margins": "none", "loss": "trades"},  # the same attack, beta 6: our choice
    "relu_stability": {"norms": "none", "margins": "none", "loss": "stability"},  # the same attack
    "gaussian": {"norms": "none", "margins": "none", "loss": "gaussian"},  # for randomized smoothing
}

# Numbers of single losses, and of CROWN-IBP's margins, by their name: sections of every config. Those of crm and cll
# are as published for CIFAR-10 with 6C2F.
NUMBERS = {
    "crm": {"weight": 15.0, "temperature": 5.0, "radius": 0.2},  # radius: that it looks after
    "cll": {"radius": 0.15, "violation": 0.3, "weight": 1e-6},  # violation: its probability at the radius
    "crown": {"start": 1.0, "end": 1.0},  # share of CROWN over the ramp; published for l-infinity is an end of 0
    "stability": {"weight": 0.1},  # our choice, for a mean over the neurons of each activation
    "gaussian": {"noise": 0.25},  # standard deviation, in [0, 1] pixels
}

OWN = {"norms": "own", "margins": "own", "loss": "own"}  # of a user's method, which says all of them itself


def base(method: str | None, default: str = "local_gloro", loss: str | None = None) -> Any:
    """A config with every key: a method, or the default one, and values that a config overrides.

    Args:
        method: a name of :data:`METHODS`, or ``package.module:name`` of a user's own: from
            :class:`lipjax.training.objectives.Iterations` to an objective.
        default: the method where none is given.
        loss: and its loss in place of its own.

    Raises:
        ValueError: an unknown name.
    """
    name = method or default
    if name not in METHODS and not references.is_reference(name):
        raise ValueError(f"unknown method {name!r}; known are {', '.join(METHODS)}, or package.module:name of your own")
    config: Any = ConfigDict()  # its entries are known at run time only
    config.seed = 0
    config.eps = 0.0  # radius that is certified, in [0, 1] pixels
    config.eps_train = 0.0  # radius at the end of the ramp
    config.method = ConfigDict({"name": name, **METHODS.get(name, OWN)})
    if method is None and loss is not None:
        config.method.loss = loss
    config.init = config_dict.placeholder(str)  # folder of a run whose weights are the initial ones
    config.data = ConfigDict({"name": "", "validation": 5000})
    config.data.crop_padding = 0  # random crops of images padded by so many zeros, and random flips; 0: neither
    config.data.dir = config_dict.placeholder(str)  # prepared data sets; default TFDS_DATA_DIR
    config.data.cache = config_dict.placeholder(str)  # decoded arrays; default LIPJAX_CACHE
    config.model = ConfigDict({"architecture": "", "activation": "clipped_relu", "theta": 1.0})
    config.model.layers = "plain"  # what convolutions and dense layers are made of: "plain", "cayley" or "aol"
    # Initial clips of clipped_maxmin: one for all hidden layers, or one for each.
    config.model.upper_clip = (1.0,)
    config.model.lower_clip = (-1.0,)
    config.schedule = ConfigDict(
        {
            "epochs": 1,
            "batch_size": 256,
            "warmup": 0.0,  # fraction of the run with the clean loss only
            "ramp": 0.5,  # fraction at which eps and kappa have reached their end
            "kappa": 1.0,  # weight of the clean loss, from this ...
            "kappa_end": 0.0,  # ... to this
            "constant": 0.5,  # fraction at which the learning rate begins to decay
            "learning_rate": 1e-3,
            "learning_rate_end": 1e-6,
        }
    )
    config.power_iteration = ConfigDict({"num_iters": 2, "global_iters": 10, "noise": 0.01})
    config.power_iteration.start = "saved"  # each example's own vector, or "random" in every step
    config.power_iteration.global_layers = ()  # places of weight layers that use their global norm
    config.sparsity = ConfigDict({"weight": 0.0, "weight_theta": 1.0})  # of the sparsity loss, and of clips in it
    config.update({name: ConfigDict(numbers) for name, numbers in NUMBERS.items()})
    config.dual = ConfigDict({"num_rivals": 1})  # rivals whose margins the dual methods bound, the strongest ones
    config.probe = ConfigDict({"size": 16, "max_iters": 2000})  # examples whose converged norms every epoch logs
    config.checkpoint = ConfigDict({"every": 1})  # epochs
    config.certify = ConfigDict({"limit": 1000, "batch_size": 250})  # test images certified at the end; 0: none
    return config


def add_sparsity(config: Any, weight: float, weight_theta: float) -> None:
    """The sparsity loss: of the methods with local norms, whose bounds it tightens; the others are as published."""
    if config.method.norms == "local":
        config.sparsity.weight = weight
        config.sparsity.weight_theta = weight_theta


def cifar10(method: str | None, default: str = "local_bcp", loss: str | None = None) -> Any:
    """What the runs on CIFAR-10 share."""
    config = base(method, default, loss)
    config.data.name = "cifar10"
    config.data.crop_padding = 4
    config.eps = 36 / 255
    config.eps_train = 0.1551
    config.schedule.epochs = 800
    config.schedule.batch_size = 256
    config.schedule.warmup = 20 / 800
    config.schedule.ramp = 400 / 800
    config.schedule.constant = 400 / 800
    config.schedule.learning_rate = 1e-3
    config.schedule.learning_rate_end = 1e-6
    config.power_iteration.num_iters = 2
    return config


def tiny_imagenet(method: str | None, default: str = "local_bcp") -> Any:
    """What the runs on Tiny-ImageNet share."""
    config = base(method, default)
    config.data.name = "tiny_imagenet"
    config.data.crop_padding = 4
    config.eps = 36 / 255
    config.eps_train = 0.16
    config.schedule.epochs = 250
    config.schedule.batch_size = 128
    config.schedule.warmup = 0.0
    config.schedule.ramp = 125 / 250
    config.schedule.constant = 150 / 250
    config.schedule.learning_rate = 2.5e-4
    config.schedule.learning_rate_end = 5e-7
    config.power_iteration.num_iters = 1
    config.crm.update(weight=150.0, temperature=12.0)  # as published, and those of cll
    config.cll.update(radius=1.0, violation=0.025, weight=1e-3)
    config.probe.size = 4
    config.certify.batch_size = 50
    return config


def cifar10_emma(method: str | None) -> Any:
    """What the runs on CIFAR-10 with the EMMA loss share: its radius grows to 3 times eps over the first half."""
    config = cifar10(method, default="gloro", loss="emma")
    config.eps_train = 3 * config.eps
    config.schedule.warmup = 0.0
    config.schedule.ramp = 0.5
    return config
