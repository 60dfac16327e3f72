"""scikit-learn's digits (1,797 images of 8x8, bundled), a small CNN with clipped ReLU, through the dual at eps 0.5.

Command:   python train.py --config configs/digits.py
           python train.py --config configs/digits.py:local_gloro     (the paper's method, and so on for each method)
Hardware:  two CPU cores, two minutes.
Expected:  see the table in README.md; results/methods has all methods and losses.

The default is what certified the most of them, over three seeds: margins of the dual, norms of the whole layers, and
the loss that looks after small certified radii (CRM).
"""

from lipjax.experiments import defaults


def get_config(method=None):
    config = defaults.base(method, default="dual", loss="crm")
    config.data.name = "digits"
    config.data.validation = 0  # too few images to choose an epoch by: the last one is kept
    config.model.architecture = "small_cnn"
    config.eps = 0.5
    config.eps_train = 0.5
    config.schedule.epochs = 100
    config.schedule.batch_size = 100
    config.schedule.learning_rate = 2e-3
    config.schedule.learning_rate_end = 2e-5
    config.power_iteration.num_iters = 2
    config.crm.update(weight=30.0, radius=0.7)  # as for MNIST, where the radius is 1.4 times eps
    config.cll.update(radius=0.5, weight=1e-2)  # with the published 1e-6, for 800 epochs, constants grow without end
    config.probe.size = 8
    config.checkpoint.every = 10
    config.certify.batch_size = 120
    return config
