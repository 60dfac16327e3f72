"""Tiny-ImageNet-200, 8C2F with clipped ReLU, Local-Lip-B at eps 36/255: a row of the paper's Table 2.

Command:   python train.py --config configs/tiny_imagenet_8c2f.py
Hardware:  the paper took 398.8 seconds per epoch on four V100, 28 hours in all.
Expected:  clean / PGD / certified accuracy of the paper, in %: 30.8 / 28.4 / 20.7 (local_bcp),
           37.4 / 34.2 / 13.2 (local_gloro), 28.7 / 26.6 / 20.0 (bcp). Without the sparsity loss,
           --config.sparsity.weight=0: 30.6 / 28.3 / 19.9 (Table 6;
           .03: 29.7 / 27.3 / 20.2, .1: 28.9 / 26.7 / 19.8).

The data set is prepared from the original archive: see docs/running.md.

The numbers are those of the paper's Table 3. With norms of each example for every layer the stored vectors of 100,000
images take 116 GB, shared by the devices. The authors' code uses them for 5 of the 9 weight layers before the last
one and global norms for the others: --config.power_iteration.global_layers="(1,2,4,5)" does, and takes 22 GB.
"""

from lipjax.experiments import defaults


def get_config(method=None):
    config = defaults.tiny_imagenet(method)
    config.model.architecture = "8c2f"
    config.model.activation = "clipped_relu"
    config.model.theta = 1.0
    defaults.add_sparsity(config, weight=0.01, weight_theta=0.1)
    return config
