"""Reproduce a table or figure of the paper: train what is missing, certify it, and write it beside the paper's numbers.

A killed command goes on where it was, and finished runs are not made again.

Examples:
  python paper.py table2 --workdir runs/paper
  python paper.py table2 --workdir runs/paper --scale 0.02 --only 'mnist_4c3f-*'
  python paper.py table4 --workdir runs/paper --seeds 3
  python paper.py figure2 --workdir runs/paper --scale 0.01 --limit 500
"""

import pathlib

from lipjax.experiments import commands
from reproduction.command import paper

if __name__ == "__main__":
    commands.run(paper, __doc__, pathlib.Path(__file__).name)
