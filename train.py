"""Train a certifiably robust classifier.

Examples:
  python train.py --config configs/digits.py
  python train.py --config configs/mnist_4c3f.py --config.schedule.epochs=12 --workdir runs/mnist
  python train.py --config configs/mnist_4c3f.py:local_bcp --config.data.dir ~/tensorflow_datasets
  python train.py --config configs/mnist_4c3f.py --config.schedule.epochs=12 --workdir runs/mnist --resume
"""

import pathlib

from lipjax.experiments import commands

if __name__ == "__main__":
    commands.run(commands.train_command, __doc__, pathlib.Path(__file__).name)
