"""Certify a classifier, of a run of train.py or one of your own: accuracies, and a certificate per image.

Examples:
  python certify.py --workdir runs/mnist
  python certify.py --workdir runs/mnist --eps 0.79 --limit 1000 --output runs/mnist/half
  python certify.py --workdir runs/mnist --split train --limit 500 --batch-size 100 --checkpoint last
  python certify.py --model my_package.module:build --weights weights.npz --data images.npz --eps 0.5 --output certified
"""

import pathlib

from lipjax.experiments import commands

if __name__ == "__main__":
    commands.run(commands.certify_command, __doc__, pathlib.Path(__file__).name)
