"""Tiny-ImageNet-200, 8C2F with clipped MaxMin, Local-Lip-B at eps 36/255: a row of the paper's Table 2.

Command:   python train.py --config configs/tiny_imagenet_8c2f_maxmin.py
Hardware:  as configs/tiny_imagenet_8c2f.py.
Expected:  clean / PGD / certified accuracy of the paper, in %: 36.9 / 33.3 / 23.4 (local_bcp), 35.5 / 32.3 / 22.4
           (gloro).

Data set, stored vectors and the authors' code: see configs/tiny_imagenet_8c2f.py.
"""

from lipjax.experiments import defaults


def get_config(method=None):
    config = defaults.tiny_imagenet(method)
    config.model.architecture = "8c2f"
    config.model.activation = "clipped_maxmin"
    config.model.upper_clip = (0.8, 1.0, 1.4, 1.4, 1.4, 1.6, 2.0, 3.0, 1.6)
    config.model.lower_clip = (-0.8, -1.0, -1.4, -1.4, -1.4, -1.6, -2.0, -3.0, -1.6)
    config.schedule.learning_rate = 1e-4
    config.power_iteration.num_iters = 3
    defaults.add_sparsity(config, weight=0.01, weight_theta=1.0)
    return config
