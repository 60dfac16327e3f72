"""The breaker of certificates: it breaks none, but does break radii that are three times too large."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import lipjax
from benchmarks import breaker
from lipjax.experiments import data

SHIPPED = pathlib.Path(__file__).parents[1] / "results" / "digits"
POINTS, IMAGES, EPOCHS = 30_000, 150, 10  # of the shipped report: a million, 540 and 20
PGD = ("pgd", "pgd_one_rival")


def report_of(folder):
    return json.loads((folder / "breaker.json").read_text())


@pytest.mark.slow
def test_thirty_thousand_attacks_break_no_certificate(tmp_path, monkeypatch):
    monkeypatch.setattr(breaker, "EXAMPLES", IMAGES)
    monkeypatch.setattr(breaker, "EPOCHS", EPOCHS)
    breaker.main(["--points", str(POINTS), "--output", str(tmp_path)])
    report = report_of(tmp_path)
    kinds = {name: one["kinds"] for name, one in report["networks"].items()}
    counts = [count for one in kinds.values() for count in one.values()]
    assert report["violations"] == sum(count["violations"] for count in counts) == 0
    assert report["points"] == sum(count["points"] for count in counts) >= POINTS
    assert sum(one[kind]["points"] for one in kinds.values() for kind in PGD) >= report["points"] / 2
    assert kinds.keys() == set(breaker.ACTIVATIONS)
    for name, one in report["networks"].items():
        assert one["images"] >= IMAGES - 10
        assert one["layers"] >= 4
        assert one["radius"]["median"] > 0.1  # there is room for attacks
        assert kinds[name].keys() == breaker.SHARES.keys()
        for count in kinds[name].values():
            assert count["points"] >= one["images"]
            assert count["smallest_margin"] > 0
    assert not (tmp_path / "violations.npz").exists()
    for count in counts:
        assert f"{count['points']:,} | {count['smallest_margin']:.4g} | 0 |" in (tmp_path / "breaker.md").read_text()


@pytest.fixture(scope="module")
def subject():
    """Images of the shipped run within radii by the oracle: margin / (norms of all layers * ||w_y - w_j||)."""
    dataset, network = data.load("digits", "test").take(slice(40)), lipjax.load_run(SHIPPED).network
    x, label = breaker.pixels(dataset)
    exact = oracles.DenseNetwork(network)
    logits, rows = exact.logits(x.reshape(len(x), -1).astype(np.float64)), exact.head[0]
    lipschitz = np.prod([oracles.spectral_norm(matrix) for matrix, _ in exact.layers])
    distances = lipschitz * np.linalg.norm(rows[label][:, None] - rows, axis=-1)
    margins = logits[np.arange(len(x)), label][:, None] - logits
    margins, distances = (
        np.where(np.eye(10, dtype=bool)[label], one, a) for one, a in ((np.inf, margins), (1, distances))
    )
    radius = np.min(margins / distances, axis=1).astype(np.float32)
    kept = radius > 0.01
    return breaker.Subject("sound", network, x[kept], label[kept], radius[kept])


def inflated(subject, factor):
    return dataclasses.replace(subject, radius=np.float32(factor) * subject.radius)


def test_it_breaks_radii_that_are_three_times_too_large_and_saves_the_points(subject, tmp_path, monkeypatch):
    monkeypatch.setattr(breaker, "subjects", lambda: [subject, inflated(dataclasses.replace(subject, name="three"), 3)])
    with pytest.raises(SystemExit) as caught:
        breaker.main(["--points", "1000", "--output", str(tmp_path)])
    assert caught.value.code == 1
    report = report_of(tmp_path)
    sound, unsound = (
        {kind: count["violations"] for kind, count in report["networks"][name]["kinds"].items()}
        for name in ("sound", "three")
    )
    assert not any(sound.values())
    assert all(unsound[kind] > 0 for kind in (*PGD, "single_step"))
    assert report["violations"] == sum(unsound.values())
    assert report["networks"]["three"]["kinds"]["pgd"]["smallest_margin"] < 0
    with np.load(tmp_path / "violations.npz") as saved:
        point, x, label, radius = (saved[f"three_{name}"] for name in ("point", "x", "label", "radius"))
        assert len(saved["sound_point"]) == 0
    assert len(point) == report["violations"]
    assert np.all(np.asarray(jnp.argmax(subject.network(x), axis=1)) == label)
    assert np.all(np.asarray(jnp.argmax(subject.network(point), axis=1)) != label)
    distance = np.linalg.norm((point.astype(np.float64) - x).reshape(len(x), -1), axis=1)
    assert np.all(distance <= radius)
    assert np.all(distance > radius / 3)  # a wrong prediction within the certified radius would be a bug


@pytest.mark.parametrize("kind", breaker.SHARES)
def test_points_are_on_the_sphere_and_from_their_own_starts(kind, subject):
    points = [np.asarray(breaker.points_of(kind, subject, jax.random.key(seed), 0)[0], np.float64) for seed in (0, 1)]
    for found in points:
        shares = np.linalg.norm((found - subject.x).reshape(len(found), -1), axis=1) / subject.radius
        assert np.all(shares <= 1)
        np.testing.assert_allclose(shares, breaker.INSIDE, rtol=1e-3)
    apart = np.linalg.norm((points[0] - points[1]).reshape(len(subject.x), -1), axis=1)
    assert np.mean(apart > 1e-3 * subject.radius) > 0.5
    assert min(points[0].min(), points[1].min()) < 0  # outside of the pixel range as well


def test_points_outside_of_the_certified_ball_are_never_counted(subject):
    outside = subject.x + np.float32(1.001) * subject.radius[:, None, None, None] / 8
    with pytest.raises(AssertionError, match="outside of the certified ball"):
        breaker.check_inside(subject, outside)
    breaker.check_inside(subject, subject.x + np.float32(0.999) * subject.radius[:, None, None, None] / 8)
