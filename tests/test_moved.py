"""Names of older versions: what moved warns, what is gone says what took its place."""

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
