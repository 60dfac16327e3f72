"""CIFAR-10, a small network of SLL blocks at eps 36/255: each block is 1-Lipschitz as a whole.

Command:   python train.py --config configs/sll_s.py
Hardware:  any; seconds and memory of one epoch on two CPU cores are in results/layers.
Expected:  clean / certified accuracy not published for this size; networks of 1 to 8M parameters, trained for 24 hours
           on an A100, have 61 to 62 % certified.

Six blocks of convolutions on 32 channels, sums over windows, two dense blocks, a plain last layer, whose rows count in
each margin. The loss is EMMA, whose radius grows to 3 times 36/255 over the first half.

Reference: Araujo, Havens, Delattre, Allauzen, Hu, A Unified Algebraic Perspective on Lipschitz Neural Networks,
           ICLR 2023.
"""

from lipjax.experiments import defaults


def get_config(method=None):
    config = defaults.cifar10_emma(method)
    config.model.architecture = "sll_s"
    config.schedule.epochs = 200
    return config
