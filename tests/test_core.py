"""The core needs JAX, Flax, Optax and NumPy alone; what trains whole runs says what it needs."""

import subprocess
import sys

WITHOUT = """
import sys
import warnings

warnings.simplefilter("error")
BLOCKED = ("ml_collections", "tqdm", "sklearn", "matplotlib", "tensorflow_datasets", "array_record", "PIL")


class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Block())
import importlib.util

found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in BLOCKED else found(name, *rest)
"""
CERTIFY = """
import jax, jax.numpy as jnp, lipjax

network = lipjax.chain(lipjax.dense(jnp.eye(2), jnp.zeros(2), (2,)))
x, label = jnp.array([[1.0, 0.0]]), jnp.array([0])
assert lipjax.certify(network, x, label, 0.1, level="deterministic").certified[0]
"""


def run(program):
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)


def test_the_core_certifies_without_the_packages_of_training():
    done = run(WITHOUT + CERTIFY)
    assert done.returncode == 0, done.stderr


def test_training_without_its_packages_says_what_to_install():
    for call in ("lipjax.train", "import lipjax.experiments.commands"):
        done = run(f"{WITHOUT}\nimport lipjax\n{call}")
        assert done.returncode
        assert 'needs ml_collections, tqdm, matplotlib: pip install "lipjax[train]"' in done.stderr
