"""CIFAR-10, 6C2F of Cayley layers with MaxMin at eps 36/255: norms are 1 by construction.

Command:   python train.py --config configs/cayley_6c2f.py
Hardware:  any; seconds and memory of one epoch on two CPU cores are in results/layers.
           Shorten it with --config.schedule.epochs=12, which scales the schedules with it.
Expected:  clean / PGD / certified accuracy of the paper's row Cayley, in %: 75.3 / 67.7 / 59.2.

Convolutions are circular; those of stride 2 move pixels to channels first. The last layer is a plain one: its rows
count in each margin. The schedules are those of the paper's runs on CIFAR-10, the loss is that of GloRo.
"""

from lipjax.experiments import defaults


def get_config(method=None):
    config = defaults.cifar10(method, default="gloro")
    config.model.architecture = "6c2f"
    config.model.activation = "maxmin"
    config.model.layers = "cayley"
    return config
