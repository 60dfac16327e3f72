"""Names of older versions: what moved warns, what is gone says what took its place."""

import jax.numpy as jnp
import pytest

import lipjax
from lipjax import moved


@pytest.mark.parametrize("name", moved.NAMES)
def test_a_name_that_moved_warns_and_works(name):
    with pytest.warns(DeprecationWarning, match=rf"lipjax\.{name} is {moved.NAMES[name]} now"):
        found = getattr(lipjax, name)
    assert found is getattr(lipjax, moved.NAMES[name].removeprefix("lipjax."))


def test_modules_and_architectures_are_found_where_they_were():
    from lipjax import models

    with pytest.warns(
        DeprecationWarning, match=r"lipjax\.models\.ClippedReLU is lipjax\.reading\.modules\.ClippedReLU now"
    ):
        assert models.ClippedReLU is lipjax.ClippedReLU
    with pytest.warns(DeprecationWarning, match="architectures"):
        assert "mlp" in models.ARCHITECTURES
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = models.nothing


@pytest.mark.parametrize("name", moved.GONE)
def test_a_name_that_is_gone_says_what_took_its_place(name):
    with pytest.raises(AttributeError, match=rf"lipjax\.{name} is gone since 0\.5: .*lipjax\."):
        getattr(lipjax, name)


def test_a_name_that_never_was_is_an_ordinary_error():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = lipjax.nothing


@pytest.mark.parametrize(("old", "new"), moved.METHODS.items())
def test_methods_of_a_certifier_warn(old, new):
    network = lipjax.chain(lipjax.dense(jnp.eye(2), jnp.zeros(2), (2,)))
    certifier = lipjax.Certifier(network, 1, level="deterministic")
    with pytest.warns(DeprecationWarning, match=rf"Certifier\.{old} is Certifier\.{new} now"):
        assert getattr(certifier, old) == getattr(certifier, new)
    with pytest.raises(AttributeError, match="'Certifier' object has no attribute 'universally'"):
        certifier.universally  # noqa: B018
