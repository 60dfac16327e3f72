"""Tiny-ImageNet-200, 7C1F with ReLU, GloRo at eps 36/255: baselines of the paper's Table 2.

Command:   python train.py --config configs/tiny_imagenet_7c1f.py            (GloRo)
           python train.py --config configs/tiny_imagenet_7c1f.py:standard
Hardware:  any GPU; the paper gives no time.
Expected:  clean / PGD / certified accuracy of the paper, in %: 31.3 / 28.2 / 13.2 (gloro), 35.9 / 19.4 / 0 (standard).

The paper does not give the layers of this network nor how it was trained; layers and activation are ours, and the
schedule
is that of configs/tiny_imagenet_8c2f.py. The data set is prepared from the original archive: see docs/running.md.
"""

from lipjax.experiments import defaults


def get_config(method=None):
    config = defaults.tiny_imagenet(method, default="gloro")
    config.model.architecture = "7c1f"
    config.model.activation = "relu"
    return config
