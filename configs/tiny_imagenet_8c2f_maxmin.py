"""Tiny-ImageNet-200, 8C2F with clipped MaxMin, Local-Lip-B at eps 36/255: a row of the paper's Table 2.

Command:   python train.py --config configs/tiny_imagenet_8c2f_maxmin.py
Hardware:  as configs/tiny_imagenet_8c2f.py.
Expected:  clean / PGD / certified accuracy of the paper, in %: 36.9 / 33.3 / 23.4 (local_bcp), 35.5 / 32.3 / 22.4
           (gloro).

The data set is prepared from the original archive: see README.md.

The numbers are those of the paper's Table 3. With norms of each example for every layer the stored vectors of 100,000
images take 116 GB, shared by the devices. The authors' code uses them for 5 of the 9 weight layers before the last
one and global norms for the others: --config.power_iteration.global_layers="(1,2,4,5)" does, and takes 22 GB.
"""

from configs import common


def get_config(method=None):
    config = common.tiny_imagenet(method)
    config.model.architecture = "8c2f"
    config.model.activation = "clipped_maxmin"
    config.model.upper_clip = (0.8, 1.0, 1.4, 1.4, 1.4, 1.6, 2.0, 3.0, 1.6)
    config.model.lower_clip = (-0.8, -1.0, -1.4, -1.4, -1.4, -1.6, -2.0, -3.0, -1.6)
    config.schedule.learning_rate = 1e-4
    config.power_iteration.num_iters = 3
    config.sparsity.weight = 0.01
    config.sparsity.weight_theta = 1.0
    return config
