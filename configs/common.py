"""What all configs share."""

from ml_collections import ConfigDict, config_dict

# A method is the norms it trains with, the worst-case margins over the region, and the loss on the worst logits.
METHODS = {
    "local_gloro": {"norms": "local", "margins": "pairwise_lipschitz", "loss": "gloro"},
    "local_bcp": {"norms": "local", "margins": "box_and_ball", "loss": "cross_entropy"},
    "gloro": {"norms": "global", "margins": "pairwise_lipschitz", "loss": "gloro"},
}


def base(method: str | None) -> ConfigDict:
    """A config with every key: the name of a method, and values that a config overrides."""
    name = method or "local_gloro"
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; known are {', '.join(sorted(METHODS))}")
    config = ConfigDict()
    config.seed = 0
    config.eps = 0.0  # radius that is certified, in [0, 1] pixels
    config.eps_train = 0.0  # radius at the end of the ramp
    config.method = ConfigDict({"name": name, **METHODS[name]})
    config.data = ConfigDict({"name": "", "validation": 5000})
    config.data.dir = config_dict.placeholder(str)  # prepared data sets; default TFDS_DATA_DIR
    config.data.cache = config_dict.placeholder(str)  # decoded arrays; default LIPJAX_CACHE
    config.model = ConfigDict({"architecture": "", "activation": "clipped_relu", "theta": 1.0})
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
    config.probe = ConfigDict({"size": 16, "max_iters": 2000})  # examples whose converged norms every epoch logs
    config.checkpoint = ConfigDict({"every": 1})  # epochs
    config.certify = ConfigDict({"limit": 1000, "batch_size": 250})  # test images certified at the end; 0: none
    return config
