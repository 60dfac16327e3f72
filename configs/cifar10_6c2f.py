"""CIFAR-10, 6C2F with clipped ReLU, Local-Lip-B at eps 36/255: the 6C2F column of the paper's Table 2.

Command:   python train.py --config configs/cifar10_6c2f.py                (Local-Lip-B)
           python train.py --config configs/cifar10_6c2f.py:local_gloro    (Local-Lip-G, and so on for each method)
Hardware:  any; the paper took 69.8 seconds per epoch on one V100, 15.5 hours in all. The stored vectors take 7.3 GB.
           Shorten it with --config.schedule.epochs=12, which scales the schedules with it.
Expected:  clean / PGD / certified accuracy of the paper, in %: 70.7 / 64.8 / 54.3 (local_bcp),
           76.4 / 69.2 / 51.3 (local_gloro), 65.7 / 60.8 / 51.3 (bcp), 70.7 / 63.8 / 49.3 (gloro),
           63.1 / 58.3 / 38.1 (lmt), 33.0 / 31.1 / 23.4 (ibp), 87.5 / 32.5 / 0 (standard), 80.7 / 70.8 / 0 (at),
           80.0 / 72.3 / 0 (trades).

The paper's Table 1 compares starts of the power iteration: --config.power_iteration.start=random with
--config.power_iteration.num_iters=2, 5 or 10.

The numbers are those of the paper's Table 3; the authors' code differs as configs/cifar10_4c3f.py says.
"""

from lipjax.experiments import defaults


def get_config(method=None):
    config = defaults.cifar10(method)
    config.model.architecture = "6c2f"
    config.model.activation = "clipped_relu"
    config.model.theta = 2.0
    return config
