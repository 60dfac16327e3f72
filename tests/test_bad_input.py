"""Bad input: an error that names the argument, says what it is, and what is expected."""

import json
import math
import pathlib
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracles import random_inputs
from oracles import random_network as network

import lipjax
from lipjax.certification import records
from lipjax.experiments import certifying, data

ROOT = pathlib.Path(__file__).parents[1]
KEY = jax.random.key(0)
NETWORK = network("dense clipped", 0)
X = random_inputs(NETWORK, 0, 3)
LABEL = np.zeros(3, np.int32)
PLACES = np.arange(3)


def certify(x=X, label=LABEL, eps=0.1, **options):
    return lipjax.certify(NETWORK, x, label, eps, **{"key": KEY, **options})


def radius(x=X, label=LABEL, **options):
    return lipjax.certified_radius(NETWORK, x, label, **{"key": KEY, "max_rounds": 1, **options})


def local(x=X, eps=0.1, **options):
    return lipjax.local_lipschitz(NETWORK, x, eps, **{"key": KEY, **options})


def with_local_norms(*calls, x=X, **options):
    """A certifier for three examples and one round, asked for certificates of some places."""
    certifier = lipjax.Certifier(NETWORK, 3, key=KEY, **options)
    for index, round_ in calls:
        certifier.with_local_norms(x, LABEL, 0.1, np.asarray(index), round_)


def holding(value):
    x = X.copy()
    x[1, 2] = value
    return x


def read_certificates(folder, about=NETWORK, drop=None, cut=False):
    """Written for NETWORK, then read."""
    summary = {name: name for name in records.FIELDS} | {"format": records.FORMAT}
    summary |= {"network_sha256": records.fingerprint(NETWORK)}
    summary.pop(drop, None)
    records.save_certificates(folder, {"radius": np.ones(3)}, summary)
    path = folder / "certificates.npz"
    path.write_bytes(path.read_bytes()[: 100 if cut else None])
    return lipjax.load_certificates(path, about)


def read_images(folder, **changes):
    """A file of own images, with entries replaced, or left out where the value is None."""
    arrays = {"images": np.zeros((3, 8, 8, 1), np.uint8), "labels": np.arange(3)} | changes
    np.savez(folder / "own.npz", **{name: array for name, array in arrays.items() if array is not None})
    return data.from_file(folder / "own.npz", "digits")


def read_run(folder, damage):
    """The shipped run, damaged, then certified."""
    run = folder / "run"
    shutil.copytree(ROOT / "results" / "digits", run)
    damage(run)
    return certifying.certify_run(run, limit=1, output=folder / "output", level="estimate")


def truncate_checkpoint(run):
    for path in run.glob("checkpoints/*/*/params/**/d/*"):
        path.write_bytes(path.read_bytes()[:100])


def drop_eps(run):
    config = json.loads((run / "config.json").read_text())
    config.pop("eps")
    (run / "config.json").write_text(json.dumps(config))


def with_images(folder, value, shape=(3, 8, 8, 1)):
    return read_images(folder, images=np.full(shape, value))


def model():
    return nnx.Sequential(nnx.Linear(5, 4, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(4, 3, rngs=nnx.Rngs(1)))


def linen_model():
    return nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(3)])


def case(name, call, *parts):
    """A kind of bad input: ``call(folder)``, and what its message says."""
    return pytest.param(call, parts, id=name.replace(" ", "-"))


SHAPED = "expected a batch (B, 5)"
PIXELS = "pixels in [0, 1]"
NO_NETWORK = ("network is of type Sequential", "lipjax.from_flax(model, input_shape=...)")
ONE_KEY = "expected a single key, such as jax.random.key(seed)"
ONE_LOGIT = lipjax.chain(lipjax.dense(jnp.ones((5, 1)), jnp.zeros(1), (5,)))
NO_TRACE = "outside of traced code"
ANOTHER = ("certificates.npz is about the network", "certify this network itself")

CASES = [
    # x
    case("one input", lambda _: certify(x=X[0]), "x has shape (5,)", SHAPED),
    case("too many axes", lambda _: certify(x=X[None]), "x has shape (1, 3, 5)", SHAPED),
    case("another input shape", lambda _: local(x=X[:, :4]), "x has shape (3, 4)", SHAPED),
    case("no axes", lambda _: radius(x=np.float32(1)), "x has shape ()", SHAPED),
    case("integer pixels", lambda _: certify(x=X.astype(np.uint8)), "x has type uint8", PIXELS, "float32"),
    case("half precision", lambda _: radius(x=X.astype(np.float16)), "x has type float16", PIXELS, "float32"),
    case("NaN in an image", lambda _: certify(x=holding(math.nan)), "x[1]", "NaN", PIXELS),
    case("infinity in an image", lambda _: radius(x=holding(math.inf)), "x[1]", "infinity", PIXELS),
    case("an empty batch", lambda _: certify(x=X[:0], label=LABEL[:0]), "x is an empty batch", "at least one"),
    case("an empty batch of radii", lambda _: radius(x=X[:0], label=LABEL[:0]), "x is an empty batch", "at least one"),
    case("traced x", lambda _: jax.jit(lambda x: certify(x=x))(X), NO_TRACE, "lipjax.propagate"),
    case("traced x of a radius", lambda _: jax.jit(lambda x: radius(x=x))(X), NO_TRACE, "lipjax.propagate"),
    case(
        "a list of images",
        lambda _: certify(x=X.tolist()),
        *("x ", "list", SHAPED),
    ),
    # label
    case("a label out of range", lambda _: certify(label=LABEL + 3), "label[0] is 3", "from 0 to 2"),
    case("a negative label", lambda _: radius(label=LABEL - 1), "label[0] is -1", "from 0 to 2"),
    case("labels of float", lambda _: certify(label=np.zeros(3)), "label has shape (3,) and type float", "3 integers"),
    case("too few labels", lambda _: certify(label=LABEL[:2]), "label has shape (2,)", "expected 3 integers"),
    case("one-hot labels", lambda _: radius(label=np.eye(3, dtype=int)), "label has shape (3, 3)", "3 integers"),
    case("no labels", lambda _: certify(label=None), "label has shape ()", "expected 3 integers"),
    case(
        "a list of labels",
        lambda _: certify(label=[0, 0, "1"]),
        *("label", "expected 3 integers"),
    ),
    # eps
    case("a negative eps", lambda _: certify(eps=-0.1), "eps is -0.1", "at least 0"),
    case("eps NaN", lambda _: certify(eps=math.nan), "eps is nan", "at least 0"),
    case("an infinite eps", lambda _: local(eps=math.inf), "eps is inf", "finite"),
    case("too few eps", lambda _: certify(eps=np.full(2, 0.1)), "eps has shape (2,)", "one per input (3,)"),
    case("eps in a column", lambda _: local(eps=np.full((3, 1), 0.1)), "eps has shape (3, 1)", "one radius"),
    case("a negative eps among others", lambda _: certify(eps=np.array([0.1, -0.2, 0.1])), "eps is -0.2", "at least 0"),
    case("eps NaN among others", lambda _: local(eps=np.array([0.1, np.nan, 0.1])), "eps is nan", "at least 0"),
    case("an infinite eps among others", lambda _: certify(eps=np.array([0.1, np.inf, 0.1])), "inf", "finite"),
    case("traced eps", lambda _: jax.jit(lambda eps: certify(eps=eps))(0.1), NO_TRACE, "lipjax.propagate"),
    case("a negative eps of an estimate", lambda _: local(eps=-1.0, level="estimate"), "eps is -1.0", "at least 0"),
    case(
        "too few eps of balls",
        lambda _: lipjax.l2_ball(jnp.ones((5, 4)), jnp.ones(3)),
        *("eps has shape (3,)", "one radius, or one per input (5,)"),
    ),
    case(
        "eps NaN of an estimate",
        lambda _: local(eps=math.nan, level="estimate"),
        *("eps is nan", "at least 0"),
    ),
    case(
        "eps as text",
        lambda _: certify(eps="0.1"),
        *("eps", "0.1", "radius"),
    ),
    # options
    case("delta 0", lambda _: certify(delta=0.0), "delta=0.0", "between 0 and 1"),
    case("delta 1", lambda _: radius(delta=1.0), "delta=1.0", "between 0 and 1"),
    case("a negative delta", lambda _: local(delta=-1.0), "delta=-1.0", "between 0 and 1"),
    case("delta NaN", lambda _: certify(delta=math.nan), "delta=nan", "between 0 and 1"),
    case(
        "delta too small",
        lambda _: certify(delta=1e-20),
        *("delta leaves 1.25e-21", "float64 cannot", "times as large"),
    ),
    case("no key", lambda _: certify(key=None), "key=None", "give key=jax.random.key(seed)"),
    case(
        "a number for a key",
        lambda _: certify(key=3),
        *("key=3", "jax.random.key"),
    ),
    case(
        "several keys",
        lambda _: certify(key=jax.random.split(KEY, 3)),
        *("key", "(3,)", "jax.random.key"),
    ),
    case(
        "an unknown level",
        lambda _: certify(level="exact"),
        *("level='exact'", "probabilistic, deterministic, estimate"),
    ),
    case("no level", lambda _: lipjax.global_lipschitz(NETWORK, level=None), "level=None", "probabilistic"),
    case("rtol 0", lambda _: certify(rtol=0.0), "rtol=0.0", "more than 0"),
    case("rtol NaN", lambda _: radius(rtol=math.nan), "rtol=nan", "more than 0"),
    case("a negative max_eps", lambda _: radius(max_eps=-1.0), "max_eps=-1.0", "more than 0"),
    case("max_eps 0", lambda _: radius(max_eps=0.0), "max_eps=0.0", "more than 0"),
    case("tol 0", lambda _: radius(tol=0.0), "tol=0.0", "more than 0"),
    case("tol NaN", lambda _: radius(tol=math.nan), "tol=nan", "more than 0"),
    case("max_rounds 0", lambda _: radius(max_rounds=0), "max_rounds=0", "more than 0"),
    case(
        "a fraction of max_rounds",
        lambda _: radius(max_rounds=1.5),
        *("max_rounds=1.5", "integer"),
    ),
    case(
        "a misspelt option of an estimate",
        lambda _: local(level="estimate", dleta=0.1),
        *("dleta",),
    ),
    # certifiers
    case(
        "an example that was not planned",
        lambda _: with_local_norms(([1, 2, 3], 0)),
        *("example 3", "by 3 examples", "for more"),
    ),
    case("a round that was not planned", lambda _: with_local_norms((PLACES, 1)), "round 1", "1 rounds", "for more"),
    case(
        "an example twice in a round",
        lambda _: with_local_norms((PLACES, 0), (PLACES, 0)),
        *("example 0", "use the next round"),
    ),
    case(
        "an example twice in a batch",
        lambda _: with_local_norms(([0, 0, 1], 0)),
        *("example 0", "twice"),
    ),
    case(
        "a negative place",
        lambda _: with_local_norms(([-1, 0, 1], 0)),
        *("-1", "examples"),
    ),
    case(
        "a negative round",
        lambda _: with_local_norms((PLACES, -1)),
        *("round -1",),
    ),
    # files
    case("another network", lambda f: read_certificates(f, network("dense relu", 0)), *ANOTHER),
    case("parameters changed", lambda f: read_certificates(f, network("dense clipped", 1)), *ANOTHER),
    case(
        "truncated certificates",
        lambda f: read_certificates(f, cut=True),
        *("certificates.npz", "not a whole file", "again"),
    ),
    case("certificates without delta", lambda f: read_certificates(f, drop="delta"), "does not state delta", "again"),
    case("no certificates", lambda f: lipjax.load_certificates(f / "none.npz", NETWORK), "none.npz", "again"),
    case(
        "a truncated checkpoint",
        lambda f: read_run(f, truncate_checkpoint),
        *("no checkpoint in", "last", "train again"),
    ),
    case("a config without eps", lambda f: read_run(f, drop_eps), "is not a run", "eps", "made by train.py"),
    case("own images without labels", lambda f: read_images(f, labels=None), "--data=", "labels", "images and labels"),
    case(
        "own images of another shape",
        lambda f: with_images(f, 0.0, (3, 28, 28, 1)),
        *("(3, 28, 28, 1)", "takes at least one image of shape (8, 8, 1)"),
    ),
    case("own pixels of 0 to 255 as float", lambda f: with_images(f, 255.0), "float64", "255.0", "[0, 1]"),
    case("own pixels of NaN", lambda f: with_images(f, math.nan), "float64", "nan", "[0, 1]"),
    case("own pixels of int64", lambda f: with_images(f, 1), "int64", "expected uint8"),
    case(
        "own labels too large",
        lambda f: read_images(f, labels=np.arange(3) + 9),
        *("labels reach from 9 to 11", "0 to 9"),
    ),
    case("own labels of float", lambda f: read_images(f, labels=np.zeros(3)), "labels are float64 (3,)", "3 integers"),
    case("no own images", lambda f: with_images(f, 0.0, (0, 8, 8, 1)), "(0, 8, 8, 1)", "at least one image"),
    # networks
    case("a model to certify", lambda _: lipjax.certify(model(), X, LABEL, 0.1, key=KEY), *NO_NETWORK),
    case("a model for radii", lambda _: lipjax.certified_radius(model(), X, LABEL, key=KEY), *NO_NETWORK),
    case("a model for a constant", lambda _: lipjax.global_lipschitz(model(), key=KEY), *NO_NETWORK),
    case("a model for a certifier", lambda _: lipjax.Certifier(model(), 3, key=KEY), *NO_NETWORK),
    case("a model to bound", lambda _: lipjax.propagate(model(), lipjax.l2_ball(X, 0.1), None), *NO_NETWORK),
    case("one logit", lambda _: lipjax.certify(ONE_LOGIT, X, LABEL, 0.1, key=KEY), "has 1 logit", "two logits"),
    case("radii of one logit", lambda _: lipjax.certified_radius(ONE_LOGIT, X, LABEL, key=KEY), "has 1 logit"),
    # keys
    case("a seed", lambda _: certify(key=3), "key=3 is of type int", ONE_KEY),
    case("an old key", lambda _: radius(key=jax.random.PRNGKey(0)), "as jax.random.PRNGKey gives them", ONE_KEY),
    case("a seed for an attack", lambda _: lipjax.attack(NETWORK, X, LABEL, 0.1, 3), "key=3 is of type int", ONE_KEY),
    case(
        "keys of another batch",
        lambda _: lipjax.attack(NETWORK, X, LABEL, 0.1, jax.random.split(KEY, 2)),
        *("key has shape (2,)", ONE_KEY, "or keys of shape (3,)"),
    ),
    case("an old key for PGD", lambda _: lipjax.pgd(NETWORK, X, LABEL, 0.1, jax.random.PRNGKey(0)), "PRNGKey", ONE_KEY),
    # models
    case(
        "parameters alone",
        lambda _: lipjax.from_flax(linen_model(), linen_model().init(KEY, X)["params"], input_shape=(5,)),
        *("variables hold the parameters alone", "{'params': params}"),
    ),
    case("shapes alone", lambda _: lipjax.from_flax(nnx.eval_shape(model), (5,)), "shapes in place of", "initialise"),
    case(
        "no parameters",
        lambda _: lipjax.from_flax(linen_model(), {"params": {}}, input_shape=(5,)),
        *("layer 0, Dense, has no kernel", "initialise the model first"),
    ),
    case("no input_shape", lambda _: lipjax.from_flax(model()), "input_shape is missing", "input_shape=(28, 28, 1)"),
    case("another input_shape", lambda _: lipjax.from_flax(model(), (4,)), "(4,)", "takes 5 inputs"),
    case("an unknown layer", lambda _: lipjax.from_flax(nnx.Sequential(jnp.sin), (5,)), "sin", "supported are"),
    case(
        "no module",
        lambda _: lipjax.from_flax(jnp.tanh, (5,)),
        *("flax.nnx or flax.linen", "from_function"),
    ),
]  # fmt: skip


# Orbax leaves coroutines of the failed read behind, which complain when they are collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("call", "parts"), CASES)
def test_bad_input_is_an_error_that_names_it_and_what_is_expected(call, parts, tmp_path):
    with pytest.raises((ValueError, TypeError)) as caught:
        call(tmp_path)
    message = str(caught.value)
    for part in parts:
        assert part in message
    assert "\n" not in message


def test_without_the_fault_the_same_calls_pass(tmp_path):
    assert len(certify().certified) == len(radius()) == len(local()) == 3
    with_local_norms((PLACES, 0))
    assert set(read_certificates(tmp_path)[0]) == {"radius"}
    assert len(read_images(tmp_path)) == 3
    assert lipjax.from_flax(model(), (5,)).input_shape == (5,)
