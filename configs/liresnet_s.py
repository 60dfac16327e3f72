"""CIFAR-10, a small LiResNet with MaxMin and the EMMA loss at eps 36/255: linear residual blocks, norms by iteration.

Command:   python train.py --config configs/liresnet_s.py
Hardware:  any; seconds and memory of one epoch on two CPU cores are in results/layers.
Expected:  an outside run of 30 epochs of such a network (0.8M parameters, no extra data) has 62.8 clean and 53.5
           certified, in %, by norms of power iteration.

A block x + conv(x) is one convolution between two activations, so that its norm is that of the sum, not 1 more than
that of conv. The radius of EMMA grows to 3 times 36/255 over the first half.

Reference: Hu, Zou, Wang, Leino, Fredrikson, Unlocking Deterministic Robustness Certification on ImageNet, NeurIPS 2023.
"""

from lipjax.experiments import defaults


def get_config(method=None):
    config = defaults.cifar10_emma(method)
    config.model.architecture = "liresnet_s"
    config.model.activation = "maxmin"
    config.schedule.epochs = 30
    return config
