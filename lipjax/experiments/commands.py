"""The commands behind train.py and certify.py: arguments in, one line out where they are wrong."""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from lipjax.certification.stages import NAMES
from lipjax.errors import InputError
from lipjax.experiments import certifying, figures, references, runs, settings
from lipjax.networks.regions import DOMAINS

DATA = "an .npz with images (n, H, W, C), uint8 or floats in [0, 1], and integer labels (n,), in place of a split"
DOMAIN = "what is certified and attacked: the whole l2 ball (default), or what of it lies in the pixel range [0, 1]"
MODEL = "a function that builds a model of your own, in place of --workdir; needs --weights, --data, --eps and --output"
LEVEL = (
    "what the spectral norms are worth: probabilistic, bounds up to --delta (default); deterministic, bounds; "
    "estimate, the paper's, no proof; or package.module:solver of your own"
)
STAGES = f"some of {','.join(NAMES)}, in this order, and package.module:stage of your own anywhere; default: all"


class Parser(argparse.ArgumentParser):
    """Errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see --help")


def run(command: Callable[[Parser, list[str]], None], doc: str | None, name: str) -> None:
    """Run a command on the process's arguments; bad input is one line on stderr and exit status 2."""
    parser = Parser(
        prog=name, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    try:
        command(parser, sys.argv[1:])
    except InputError as error:
        print(f"{name}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def train_command(parser: Parser, arguments: list[str]) -> None:
    """``train.py``, and the installed command ``lipjax-train``."""
    parser.add_argument("--config", metavar="FILE[:METHOD]", required=True, help="a file of configs/, and a method")
    parser.add_argument("--config.KEY", metavar="VALUE", help="override an entry of the config")
    parser.add_argument("--workdir", type=pathlib.Path, help="folder of the run; default: a new one under runs/")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --workdir")
    options, overrides = parser.parse_known_args(arguments)
    if options.resume and options.workdir is None:
        raise InputError("--resume needs --workdir, the folder of the run to go on with")
    config = settings.parse([f"--config={options.config}", *overrides])
    name = pathlib.Path(options.config.split(":")[0]).stem
    workdir = options.workdir or runs.default_workdir(config, name)
    finished = options.resume and runs.is_finished(config, workdir)
    runs.train(config, workdir, resume=options.resume)
    figures.plot_learning_curves(workdir)
    if config.certify.limit:
        certifying.certify_run(workdir, limit=config.certify.limit, resume=finished)
    print(f"\nrun: {workdir}")


def certify_command(parser: Parser, arguments: list[str]) -> None:
    """``certify.py``, and the installed command ``lipjax-certify``."""
    parser.add_argument("--workdir", type=pathlib.Path, help="folder of a run of train.py")
    parser.add_argument("--model", metavar="PACKAGE.MODULE:BUILD", help=MODEL)
    parser.add_argument("--weights", type=pathlib.Path, help="of --model: an .npz of arrays, or a folder of Orbax")
    parser.add_argument("--eps", type=float, help="l2 radius in [0, 1] pixels; default: the config's")
    images = parser.add_mutually_exclusive_group()
    images.add_argument("--split", default="test", choices=("test", "train"), help="default: test")
    images.add_argument("--data", type=pathlib.Path, help=DATA)
    parser.add_argument("--limit", type=int, help="only the first so many images; default: all")
    parser.add_argument("--batch-size", type=int, help="images per call; default: the config's")
    parser.add_argument(
        "--checkpoint",
        default="best",
        choices=("best", "last"),
        help="default: best on validation, or last where there is none",
    )
    parser.add_argument("--output", type=pathlib.Path, help="folder of the files; default: --workdir")
    parser.add_argument("--level", default="probabilistic", help=LEVEL)
    parser.add_argument(
        "--delta", type=float, default=1e-6, help="probability that ANY certificate is wrong; default: 1e-6"
    )
    parser.add_argument(
        "--rtol", type=float, default=1e-3, help="relative gap at which a norm is tight enough; default: 1e-3"
    )
    parser.add_argument("--stages", metavar="A,B", help=STAGES)
    parser.add_argument("--dual-steps", type=int, default=60, help="steps of the dual for each rival; default: 60")
    parser.add_argument("--branch-seconds", type=float, default=10.0, help="of branch, for each image; default: 10")
    parser.add_argument("--domain", default="ball", choices=DOMAINS, help=DOMAIN)
    parser.add_argument("--resume", action="store_true", help="go on with a certification that was killed")
    parser.add_argument("--no-triage", action="store_true", help="attack and bound what is already decided as well")
    parser.add_argument("--seed", type=int, help="of the random starts of norms and attacks; default: the config's")
    parser.add_argument("--radius", action="store_true", help="find the certified radius of each image as well")
    options = parser.parse_args(arguments)
    if options.dual_steps < 0:
        raise InputError(f"--dual-steps={options.dual_steps} cannot be used; give at least 0")
    shared = {
        "limit": options.limit,
        "batch_size": options.batch_size,
        "level": _named(options.level, "--level"),
        "delta": options.delta,
        "rtol": options.rtol,
        "triage": not options.no_triage,
        "radius": options.radius,
        "stages": [_named(name, "--stages") for name in options.stages.split(",")] if options.stages else None,
        "dual_steps": options.dual_steps,
        "branch_seconds": options.branch_seconds,
        "domain": options.domain,
        "resume": options.resume,
    }
    if options.model is not None:
        _certify_model(options, shared)
    elif options.workdir is None:
        raise InputError("nothing to certify; give --workdir, the folder of a run, or --model, a model of your own")
    else:
        if options.weights is not None:
            raise InputError("--weights are of --model; a run of --workdir has its own checkpoints")
        certifying.certify_run(
            options.workdir,
            eps=options.eps,
            split=options.split,
            which=options.checkpoint,
            output=options.output,
            file=options.data,
            seed=options.seed,
            **shared,
        )
    files = "certificates.npz, certificates.csv, summary.json, report.md" + (", curves.csv" if options.radius else "")
    print(f"\nfiles: {options.output or options.workdir}/{files}")


def _certify_model(options: argparse.Namespace, shared: dict[str, Any]) -> None:
    """Certify a model of the user's own."""
    if options.workdir is not None:
        raise InputError("--workdir and --model are two models; give one of them")
    needed = {name: getattr(options, name) for name in ("weights", "data", "eps", "output")}
    missing = [f"--{name}" for name, value in needed.items() if value is None]
    if missing:
        raise InputError(f"--model needs {', '.join(missing)} as well; see --help")
    certifying.certify_model(
        *(options.model, options.weights, options.data),
        eps=options.eps,
        output=options.output,
        seed=options.seed or 0,
        **shared,
    )


def train_main() -> None:
    """The installed command ``lipjax-train``."""
    run(train_command, train_command.__doc__, "lipjax-train")


def certify_main() -> None:
    """The installed command ``lipjax-certify``."""
    run(certify_command, certify_command.__doc__, "lipjax-certify")


def _named(name: str, option: str) -> Any:
    """What a user's reference names; a name of lipjax as it is, which who uses it checks."""
    return references.find(name, option) if references.is_reference(name) else name
