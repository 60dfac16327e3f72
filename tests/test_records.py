"""Certificates on disk: what certify.py writes is read back for the same network only, and says the same everywhere."""

import csv
import dataclasses
import json
import pathlib
import re

import jax
import numpy as np
import oracles
import pytest

import lipjax
from lipjax.certification import records
from lipjax.certification.certifier import Certifier
from lipjax.errors import InputError
from lipjax.experiments import certifying, data, evaluation

SHIPPED = pathlib.Path(__file__).parents[1] / "results" / "digits"
LIMIT = 12


@pytest.fixture(scope="module")
def network():
    return lipjax.load_run(SHIPPED).network


def certify(folder, **options):
    return certifying.certify_run(SHIPPED, limit=LIMIT, output=folder, **{"level": "estimate", **options})


@pytest.fixture(scope="module")
def with_radii(tmp_path_factory):
    folder = tmp_path_factory.mktemp("radii")
    certify(folder, radius=True)
    return folder


@pytest.fixture(scope="module")
def without_triage(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    for stale in ("report_accuracy.png", "curves.csv"):  # as a certification with radii leaves them
        (folder / stale).write_bytes(b"")
    certify(folder, triage=False)
    return folder


def columns_of(folder):
    with np.load(folder / "certificates.npz") as arrays:
        return {name: arrays[name] for name in arrays.files if name != "summary"}


def curve(folder, name):
    """Pairs (eps, fraction) of one curve, from the table."""
    with (folder / "curves.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["accuracy"] == name]
    return np.array([(float(row["eps"]), float(row["fraction"])) for row in rows]).T


# Reading back


def test_certificates_come_back_as_they_were_made_and_say_what_they_rest_on(network, tmp_path):
    made = certify(tmp_path, level="probabilistic", delta=1e-5, stages=("global", "attack", "local"))
    columns, summary = lipjax.load_certificates(tmp_path / "certificates.npz", network)
    assert summary == json.loads((tmp_path / "summary.json").read_text()) == json.loads(json.dumps(made))
    assert (summary["level"], summary["delta"], summary["dtype"]) == ("probabilistic", 1e-5, "float64")
    assert set(records.FIELDS) <= summary.keys()
    assert columns["certified"].sum() == summary["counts"]["certified"] > 0
    assert columns["label"].tolist() == data.load("digits", "test").labels[:LIMIT].tolist()
    with (tmp_path / "certificates.csv").open() as file:
        table = list(csv.DictReader(file))
    for name, column in columns.items():
        assert [row[name] for row in table] == [str(value) for value in column.tolist()]


def test_estimates_say_that_they_are_no_proof(network, with_radii):
    _, summary = lipjax.load_certificates(with_radii / "certificates.npz", network)
    assert (summary["level"], summary["delta"], summary["dtype"]) == ("estimate", None, "float32")


def test_files_of_older_versions_are_refused_with_the_reason(network):
    path = pathlib.Path(__file__).parents[1] / "results" / "digits" / "certificates.npz"
    with pytest.raises(InputError, match=r"written by lipjax 0\.4\.0, which described networks in another way.*again"):
        lipjax.load_certificates(path, network)


def changed(network, name):
    """The network with one entry of one layer moved by the least step of float32."""
    layer = network.head if name == "head" else network.layers[0]
    entry = (0,) * layer.kernel.ndim
    moved = np.nextafter(layer.kernel[entry], np.float32(np.inf))
    layer = dataclasses.replace(layer, kernel=layer.kernel.at[entry].set(moved))
    return dataclasses.replace(network, head=layer) if name == "head" else oracles.changed(network, 1, layer)


def other_stride(network):
    """The same arrays in a convolution that strides otherwise."""
    return oracles.changed(network, 1, dataclasses.replace(network.layers[0], stride=(2, 1)))


def other_inputs(network):
    """The same operations, the last of which takes another value."""
    last = dataclasses.replace(network.nodes[-1], inputs=(len(network.nodes) - 3,))
    return dataclasses.replace(network, nodes=(*network.nodes[:-1], last))


@pytest.mark.parametrize(
    "change",
    [
        lambda network: changed(network, "head"),
        lambda network: changed(network, "first"),
        other_stride,
        other_inputs,
        lambda network: dataclasses.replace(network, nodes=network.nodes[:-1]),
        lambda network: jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), network),
    ],
    ids=[
        *("a weight of the last layer", "a weight of the first layer", "a stride"),
        *("another graph", "a node less", "another type"),
    ],
)
def test_certificates_are_refused_for_another_network(change, network, with_radii):
    path = with_radii / "certificates.npz"
    assert lipjax.load_certificates(path, network)
    with pytest.raises(InputError, match="certificates.npz is about the network .*; certify this network itself"):
        lipjax.load_certificates(path, change(network))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(share, network, with_radii, tmp_path):
    whole = (with_radii / "certificates.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(InputError, match="cut.npz is not a whole file of certificates"):
        lipjax.load_certificates(tmp_path / "cut.npz", network)


@pytest.mark.parametrize("field", records.FIELDS)
def test_a_file_that_lacks_what_its_certificates_rest_on_is_refused(field, network, with_radii, tmp_path):
    columns, summary = lipjax.load_certificates(with_radii / "certificates.npz", network)
    del summary[field]
    records.save_certificates(tmp_path, columns, summary)
    with pytest.raises(InputError, match=f"does not state {field}; run certify.py again"):
        lipjax.load_certificates(tmp_path / "certificates.npz", network)


# What a certification says


@pytest.mark.parametrize("made", ["with_radii", "without_triage"])
def test_the_report_shows_figures_that_exist(made, request):
    folder = request.getfixturevalue(made)
    shown = re.findall(r"!\[.*\]\((.*)\)", (folder / "report.md").read_text())
    assert len(shown) == len(set(shown)) >= 4
    for name in shown:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in folder.glob("*.png")} == set(shown)
    assert ("report_accuracy.png" in shown) == (folder / "curves.csv").exists() == (made == "with_radii")


def test_radii_agree_with_the_certificates_at_eps_and_stay_below_what_pgd_has_broken(with_radii):
    columns, summary = columns_of(with_radii), json.loads((with_radii / "summary.json").read_text())
    radii, eps = columns["radius"], summary["eps"]
    np.testing.assert_array_equal(radii >= eps, columns["certified"])
    assert summary["median_radius"] == np.median(radii) > 0
    assert np.all(radii[columns["prediction"] != columns["label"]] == 0)
    assert np.all(radii[columns["attacked"]] < eps)
    assert len(np.unique(radii)) > LIMIT / 2


def test_the_certified_curve_falls_and_stays_below_that_of_pgd(with_radii):
    radii, (eps, certified) = columns_of(with_radii)["radius"], curve(with_radii, "certified")
    assert np.all(np.diff(eps) > 0)
    assert np.all(np.diff(certified) <= 0)
    assert certified[0] > certified[-1] > 0
    np.testing.assert_allclose(certified[1:], [np.mean(radii >= one) for one in eps[1:]])
    pgd_eps, pgd = curve(with_radii, "pgd")
    assert np.all(np.diff(pgd) <= 0)
    for one, accuracy in zip(pgd_eps, pgd, strict=True):
        assert np.all(certified[eps >= one] <= accuracy)


def test_triage_changes_the_stages_and_not_who_is_certified(with_radii, without_triage):
    some, whole = columns_of(with_radii), columns_of(without_triage)
    np.testing.assert_array_equal(some["certified"], whole["certified"])
    np.testing.assert_array_equal(some["stage"], whole["stage"])
    counts = [json.loads((folder / "summary.json").read_text())["counts"] for folder in (with_radii, without_triage)]
    assert counts[0]["bounded_locally"] < counts[1]["bounded_locally"] == LIMIT
    assert np.all(whole["lipschitz"] <= some["lipschitz"] * (1 + 1e-5))  # local constants are the smaller ones
    assert np.any(whole["lipschitz"] < some["lipschitz"] * (1 - 1e-3))


class Credulous(Certifier):
    """Certifies every right prediction."""

    def with_global_norms(self, x, label, *rest):
        return self.believed(super().with_global_norms(x, label, *rest), label)

    def with_local_norms(self, x, label, *rest):
        return self.believed(super().with_local_norms(x, label, *rest), label)

    def believed(self, found, label):
        certified = found.certificate.prediction == label
        return dataclasses.replace(found, certificate=dataclasses.replace(found.certificate, certified=certified))


def test_certificates_that_pgd_refutes_are_counted_and_named(with_radii, without_triage, monkeypatch, tmp_path, capsys):
    whole = columns_of(without_triage)
    broken = int((whole["attacked"] & (whole["prediction"] == whole["label"])).sum())
    assert broken > 0
    honest = [json.loads((folder / "summary.json").read_text()) for folder in (with_radii, without_triage)]
    # With triage nobody who is certified is attacked at eps.
    assert [summary["counts"]["certified_but_attacked"] for summary in honest] == [None, 0]
    assert honest[0]["radii_but_attacked"] == 0
    monkeypatch.setattr(evaluation, "Certifier", Credulous)
    assert certify(tmp_path, triage=False)["counts"]["certified_but_attacked"] == broken
    assert f"WARNING: {broken} examples count as certified, but an attack broke them" in capsys.readouterr().out
    assert certify(tmp_path, radius=True)["radii_but_attacked"] >= broken
    assert "WARNING" in capsys.readouterr().out


# Own images


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_own_images_are_certified_like_those_of_the_data_set(dtype, with_radii, tmp_path):
    test = data.load("digits", "test").take(slice(LIMIT))
    images = test.images.astype(np.float64) / test.scale
    pixels = np.round(255 * images).astype(np.uint8) if dtype is np.uint8 else images.astype(dtype)
    np.savez(tmp_path / "own.npz", images=pixels, labels=test.labels)
    summary = certify(tmp_path / "out", file=tmp_path / "own.npz")
    assert (summary["dataset"], summary["split"]) == ("own.npz", "file")
    ours, theirs = columns_of(tmp_path / "out"), columns_of(with_radii)
    for name in ("label", "prediction", "certified", "attacked"):
        np.testing.assert_array_equal(ours[name], theirs[name])
    tolerance = 0.1 if dtype is np.uint8 else 1e-5  # sixteenths are rounded to 255ths
    np.testing.assert_allclose(ours["worst_margin"], theirs["worst_margin"], atol=tolerance)
    assert np.ptp(theirs["worst_margin"]) > 1
