"""Attacks that others wrote: none of foolbox finds a wrong prediction inside of a certified radius.

They are in the extra ``attacks``: ``pip install "lipjax[attacks]"``.
"""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import lipjax

pytestmark = pytest.mark.slow

with warnings.catch_warnings():  # its imports are older than the SciPy that they are from
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    foolbox = pytest.importorskip("foolbox", reason="foolbox is not installed; it is in the extra attacks")


@pytest.fixture(scope="module", params=["dense relu", "dense clipped", "dense pairs"])
def subject(request):
    """A network, inputs that it certifies to be its own prediction, and their radii."""
    network = oracles.random_network(request.param, 3)
    x = jnp.asarray(oracles.random_inputs(network, 4, 12))
    head = dataclasses.replace(network.head, bias=network.head.bias - network(x).mean(axis=0))  # no class wins always
    network = dataclasses.replace(network, head=head)
    label = jnp.argmax(network(x), axis=1)
    radius = np.concatenate(
        [  # four at once: each size that a search comes down to is compiled
            lipjax.certified_radius(network, x[part], label[part], level="deterministic", dual_steps=30)
            for part in (slice(0, 4), slice(4, 8), slice(8, 12))
        ]
    )
    assert (radius > 0).all()
    model = foolbox.JAXModel(jax.jit(lambda x: network(x)), bounds=(-100, 100))
    return model, x, label, radius


# DeepFool, which works operation by operation, is there after a few steps.
@pytest.mark.parametrize(("attack", "steps"), [("L2DeepFoolAttack", 10), ("L2CarliniWagnerAttack", 50)])
def test_the_nearest_adversarial_example_is_no_nearer_than_the_radius(subject, attack, steps):
    model, x, label, radius = subject
    with jax.numpy_dtype_promotion("standard"):  # its one-hot vectors are products of booleans and floats
        points, _, found = getattr(foolbox.attacks, attack)(steps=steps)(model, x, label, epsilons=None)
    found, points = np.asarray(found), np.asarray(points, np.float64)
    distance = np.linalg.norm((points - np.asarray(x, np.float64)).reshape(len(x), -1), axis=1)
    assert found.any()  # it is an attack
    assert (distance[found] >= radius[found]).all()


@pytest.mark.parametrize("attack", ["L2ProjectedGradientDescentAttack", "L2FastGradientAttack"])
def test_no_attack_succeeds_inside_of_the_radius_and_far_outside_some_do(subject, attack):
    model, x, label, radius = subject
    run = getattr(foolbox.attacks, attack)()
    for example in range(0, len(x), 3):
        one, chosen, eps = x[example : example + 1], label[example : example + 1], float(radius[example])
        _, _, found = run(model, one, chosen, epsilons=[0.999 * eps])
        assert not np.asarray(found).any()
    _, _, found = run(model, x, label, epsilons=[100.0])
    assert np.asarray(found).any()
