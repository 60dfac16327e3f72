"""What the paper published, and which run of ours stands beside each number.

Sources: [H21] Tables 1, 2, 4, 5, 6 and 7 and appendix figures. Accuracies are in percent, as printed there. None: the
paper has no such value, or we do not know it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

Value = float | None
ACCURACIES = ("clean", "PGD", "certified")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run: a config, a method and what differs from the config.

    Attributes:
        config: stem of a file of configs/.
        method: of the config.
        overrides: entries of the config by dotted name.
    """

    config: str
    method: str
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """For folders: the same for the same run."""
        parts = [f"{key.split('.')[-1]}={value}" for key, value in self.overrides.items()]
        return "-".join([self.config, self.method, *parts])


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        setting: what was trained, for the reader.
        method: how, for the reader.
        paper: the published values, one per quantity of the table.
        cell: our run, or None where lipjax does not have the method.
        deviation: the published deviations over seeds.
        seconds: published, of one epoch.
    """

    setting: str
    method: str
    paper: tuple[Value, ...]
    cell: Cell | None = None
    deviation: tuple[Value, ...] | None = None
    seconds: Value = None


@dataclasses.dataclass(frozen=True)
class Asked:
    """How runs are certified.

    Attributes:
        sample: level of the norms that means over images are of, if there are any.
        stages: of the certification; those of the paper, unless more is shown.
    """

    sample: str | None = None
    stages: tuple[str, ...] = ("global", "attack", "local")


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of the paper.

    Attributes:
        title: of the table.
        quantities: what each row gives.
        rows: its lines.
        seeds: runs per cell.
        asked: how its runs are certified.
    """

    title: str
    quantities: tuple[str, ...]
    rows: tuple[Row, ...]
    seeds: int = 1
    asked: Asked = Asked()


NETWORKS = {
    "mnist_4c3f": "MNIST 4C3F, eps 1.58",
    "cifar10_4c3f": "CIFAR-10 4C3F, eps 36/255",
    "cifar10_6c2f": "CIFAR-10 6C2F, eps 36/255",
    "cifar10_6c2f_maxmin": "CIFAR-10 6C2F MaxMin, eps 36/255",
    "tiny_imagenet_8c2f": "Tiny-ImageNet 8C2F, eps 36/255",
    "tiny_imagenet_8c2f_maxmin": "Tiny-ImageNet 8C2F MaxMin, eps 36/255",
    "tiny_imagenet_7c1f": "Tiny-ImageNet 7C1F, eps 36/255",
}
METHODS = {
    "local_gloro": "Local-Lip-G",
    "local_bcp": "Local-Lip-B",
    "bcp": "BCP",
    "gloro": "GloRo",
    "lmt": "LMT",
    "ibp": "IBP",
    "standard": "Standard",
    "at": "AT",
    "trades": "TRADES",
    "crown_ibp": "CROWN-IBP",
    "relu_stability": "ReLU-Stability (paper: with a complete verifier)",
    "cayley": "Cayley (loss of GloRo, all norms 1)",
}
OF_LAYERS = {"cayley": Cell("cayley_6c2f", "gloro")}  # rows that differ in their layers, not in how they are trained
# Table 2: best of three seeds.
_TABLE_2: dict[str, dict[str, tuple[Value, ...]]] = {
    "mnist_4c3f": {
        "local_gloro": (96.3, 78.2, 55.8),
        "local_bcp": (93.0, 66.7, 48.7),
        "bcp": (92.4, 65.8, 47.9),
        "gloro": (92.9, 68.9, 50.1),
        "lmt": (86.5, 53.6, 40.5),
        "CAP": (88.1, 67.9, 44.5),
        "crown_ibp": (82.3, 80.4, 41.3),
        "standard": (99.0, 45.4, 0.0),
    },
    "cifar10_4c3f": {
        "local_gloro": (75.7, 68.6, 49.7),
        "local_bcp": (70.1, 64.2, 53.5),
        "bcp": (64.4, 59.4, 50.0),
        "gloro": (73.2, 66.3, 49.0),
        "lmt": (56.5, 49.8, 37.2),
        "ibp": (34.5, 31.8, 24.4),
        "CAP": (60.1, 55.7, 50.3),
        "crown_ibp": (54.2, 52.7, 41.9),
        "relu_stability": (57.4, 52.4, 51.1),
        "standard": (85.3, 41.2, 0.0),
    },
    "cifar10_6c2f": {
        "local_gloro": (76.4, 69.2, 51.3),
        "local_bcp": (70.7, 64.8, 54.3),
        "bcp": (65.7, 60.8, 51.3),
        "gloro": (70.7, 63.8, 49.3),
        "lmt": (63.1, 58.3, 38.1),
        "ibp": (33.0, 31.1, 23.4),
        "CAP": (60.1, 56.2, 50.9),
        "crown_ibp": (53.7, 52.2, 41.9),
        "standard": (87.5, 32.5, 0.0),
    },
    "cifar10_6c2f_maxmin": {
        "local_bcp": (77.4, 70.4, 60.7),
        "gloro": (77.0, 69.2, 58.4),
        "cayley": (75.3, 67.7, 59.2),
    },
    "tiny_imagenet_8c2f": {
        "local_gloro": (37.4, 34.2, 13.2),
        "local_bcp": (30.8, 28.4, 20.7),
        "bcp": (28.7, 26.6, 20.0),
    },
    "tiny_imagenet_8c2f_maxmin": {"local_bcp": (36.9, 33.3, 23.4), "gloro": (35.5, 32.3, 22.4)},
    "tiny_imagenet_7c1f": {"gloro": (31.3, 28.2, 13.2), "standard": (35.9, 19.4, 0.0)},
}


# Table 7: seconds per epoch on one V100, Tiny-ImageNet on four.
SECONDS: dict[str, dict[str, float]] = {
    "mnist_4c3f": {"gloro": 9.0, "bcp": 17.3, "local_gloro": 45.5},
    "cifar10_4c3f": {"bcp": 23.5, "local_bcp": 38.2},
    "cifar10_6c2f": {"gloro": 6.5, "bcp": 26.0, "local_bcp": 69.8},
    "tiny_imagenet_8c2f": {"bcp": 343.5, "local_bcp": 398.8},
}


def _table_2() -> tuple[Row, ...]:
    return tuple(
        Row(
            NETWORKS[config],
            METHODS.get(method, method),
            (*paper, None),
            OF_LAYERS.get(method, Cell(config, method)) if method in METHODS else None,
            seconds=SECONDS.get(config, {}).get(method),
        )
        for config, methods in _TABLE_2.items()
        for method, paper in methods.items()
    )


def _table_1() -> tuple[Row, ...]:
    starts = {
        ("random", 2): (76.7, 69.0, 0.5),
        ("random", 5): (73.7, 66.8, 46.0),
        ("random", 10): (72.0, 65.8, 51.6),
        ("saved", 2): (70.7, 64.8, 54.3),
    }
    rows = []
    for (start, iterations), paper in starts.items():
        changes = {"power_iteration.start": start, "power_iteration.num_iters": iterations}
        cell = Cell("cifar10_6c2f", "local_bcp", {} if start == "saved" else changes)
        rows.append(Row(f"{start} start, {iterations} iterations", "Local-Lip-B", paper, cell))
    return tuple(rows)


def _sparsity() -> tuple[Row, ...]:
    published = {0.0: (30.6, 28.3, 19.9), 0.01: (30.8, 28.4, 20.7), 0.03: (29.7, 27.3, 20.2), 0.1: (28.9, 26.7, 19.8)}
    return tuple(
        Row(
            f"sparsity weight {weight:g}",
            "Local-Lip-B",
            paper,
            Cell("tiny_imagenet_8c2f", "local_bcp", {} if weight == 0.01 else {"sparsity.weight": weight}),
        )
        for weight, paper in published.items()
    )


def _seconds() -> tuple[Row, ...]:
    return tuple(
        Row(NETWORKS[config], METHODS[method], (seconds,), Cell(config, method), seconds=seconds)
        for config, methods in SECONDS.items()
        for method, seconds in methods.items()
    )


TABLES = {
    "table1": Table("Table 1: start of the power iteration, CIFAR-10 6C2F", ACCURACIES, _table_1()),
    "table2": Table(
        "Table 2: accuracies (paper: best of 3 seeds), and what the dual certifies beyond",
        (*ACCURACIES, "certified by the dual"),
        _table_2(),
        asked=Asked(stages=("global", "attack", "local", "dual")),
    ),
    "table4": Table(
        "Table 4: mean and deviation over seeds",
        ACCURACIES,
        (
            Row(
                NETWORKS["mnist_4c3f"],
                "Local-Lip-G",
                (96.29, 78.31, 55.79),
                Cell("mnist_4c3f", "local_gloro"),
                (0.07, 0.08, 0.23),
            ),
            Row(
                NETWORKS["cifar10_4c3f"],
                "Local-Lip-B",
                (69.78, 63.95, 53.40),
                Cell("cifar10_4c3f", "local_bcp"),
                (0.30, 0.26, 0.08),
            ),
            Row(
                NETWORKS["cifar10_6c2f"],
                "Local-Lip-B",
                (70.64, 64.81, 53.96),
                Cell("cifar10_6c2f", "local_bcp"),
                (0.05, 0.05, 0.60),
            ),
            Row(
                NETWORKS["tiny_imagenet_8c2f"],
                "Local-Lip-B",
                (29.78, 27.7, 20.5),
                Cell("tiny_imagenet_8c2f", "local_bcp"),
                (0.08, 0.13, 0.13),
            ),
        ),
        seeds=3,
    ),
    "table5": Table(
        "Table 5: Lipschitz bounds, CIFAR-10 6C2F",
        ("global Lipschitz bound", "local Lipschitz bound", *ACCURACIES),
        (
            Row("", "Standard", (1.52e9, 4.81e8, 87.7, 35.9, 0.0), Cell("cifar10_6c2f", "standard")),
            Row("", "AT", (2.27e4, 1.85e4, 80.7, 70.76, 0.0), Cell("cifar10_6c2f", "at")),
            Row("", "TRADES", (1.82e4, 1.32e4, 80.0, 72.3, 0.0), Cell("cifar10_6c2f", "trades")),
            Row("", "BCP", (11.35, 11.08, 65.7, 60.8, 51.3), Cell("cifar10_6c2f", "bcp")),
            Row("", "Local-Lip-B", (7.89, 6.68, 70.7, 64.8, 54.3), Cell("cifar10_6c2f", "local_bcp")),
        ),
        asked=Asked("probabilistic"),
    ),
    "table6": Table("Table 6: sparsity loss, Tiny-ImageNet 8C2F", ACCURACIES, _sparsity()),
    "table7": Table("Table 7: seconds per epoch (paper: one V100, Tiny-ImageNet four)", ("seconds",), _seconds()),
}

# The runs of Figures 2, 6 and 7: 200 epochs, 10 of warm-up, the learning rate halved every 10 epochs from epoch 121
# (ours decays as fast, without steps).
_CURVES = {
    "eps_train": 36 / 255,
    "schedule.epochs": 200,
    "schedule.warmup": 0.05,
    "schedule.constant": 0.6,
    "schedule.learning_rate_end": 1e-3 * 2.0**-8,
}
FIGURE_CELLS = {
    "Local-Lip-B": Cell("cifar10_6c2f", "local_bcp", _CURVES),
    "BCP": Cell("cifar10_6c2f", "bcp", _CURVES),
}
FIGURES = {
    "figure2": "Lipschitz constants and losses during training, Local-Lip-B and BCP",
    "figure3": "Share of varying neurons of each layer, test images",
    "figure4": "Power iterations to convergence, mean of each layer",
    "figure5": "Power iterations to convergence, spread over images",
    "figure6": "Share of varying neurons during training",
    "figure7": "Norms of the layers during training",
}
# Levels of the norms of figures about single images.
FIGURE_SAMPLES = {"figure3": "probabilistic", "figure4": "estimate", "figure5": "estimate"}
# Power iterations to ||u_{t+1} - u_t|| <= 1e-3, 6C2F: means of the layers before the last one, in order.
ITERATIONS_TO_CONVERGENCE = (580, 355, 762, 928, 797, 788, 137)
