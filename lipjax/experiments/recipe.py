"""Recipes: the model and the method that a config describes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

from flax import nnx
from jax import Array

from lipjax.bounds import margins
from lipjax.errors import InputError
from lipjax.experiments import architectures, references, settings
from lipjax.experiments.settings import Config
from lipjax.training import methods, objectives, schedules, training_step, unbounded, worst_case
from lipjax.training.methods import Method

FORWARD = {
    "pairwise_lipschitz": margins.pairwise_lipschitz,
    "box_and_ball": margins.box_and_ball,
    "lipschitz_margin": margins.lipschitz_margin,
}


def model_of(config: Config, input_shape: tuple[int, ...], num_classes: int) -> nnx.Module:
    """The Flax model of a config for its data, freshly initialised from its seed.

    An architecture of the user's own, ``package.module:name``, is called with the shape of an input, the number of
    classes and ``rngs``.
    """
    if references.is_reference(config.model.architecture):
        make = references.find(config.model.architecture, "--config.model.architecture")
        return make(input_shape, num_classes, rngs=nnx.Rngs(config.seed))
    try:
        return architectures.classifier(
            config.model.architecture,
            config.model.activation,
            input_shape,
            num_classes,
            layers=config.model.layers,
            theta=config.model.theta,
            upper_clip=tuple(config.model.upper_clip),
            lower_clip=tuple(config.model.lower_clip),
            rngs=nnx.Rngs(config.seed),
        )
    except ValueError as error:
        raise InputError(f"--config.model: {error}") from error


def method_of(config: Config, num_steps: int) -> Method:
    """What a config trains through, over the given number of steps.

    Without bounds there is nothing to ramp up: the radius of attacks is the full one from the start.
    """
    schedule = config.schedule
    bounded = config.method.loss not in unbounded.UNBOUNDED
    learning_rate = schedules.constant_then_exponential(
        num_steps, schedule.constant, schedule.learning_rate, schedule.learning_rate_end
    )
    start, kappa, kappa_end = (0.0, schedule.kappa, schedule.kappa_end) if bounded else (config.eps_train, 0.0, 0.0)
    return Method(
        objective=objective_of(config),
        validation=validation_of(config),
        eps=schedules.ramp(num_steps, schedule.warmup, schedule.ramp, start, config.eps_train),
        kappa=schedules.ramp(num_steps, schedule.warmup, schedule.ramp, kappa, kappa_end),
        learning_rate=learning_rate,
        optimizer=training_step.adam(learning_rate),
        crop_padding=config.data.crop_padding,
    )


def objective_of(config: Config) -> objectives.Objective:
    """What a step of a config minimises."""
    method, options = config.method, config.power_iteration
    iterations = objectives.Iterations(
        num_iters=options.num_iters,
        global_iters=options.global_iters,
        noise=options.noise,
        saved=options.start == "saved",
        global_layers=tuple(options.global_layers),
    )
    if references.is_reference(method.name):
        return references.find(method.name, "--config.method.name")(iterations)
    if method.loss in unbounded.UNBOUNDED:
        return unbounded.UNBOUNDED[method.loss](iterations, **numbers_of(config))
    kind = methods.CrownIBP if method.margins == "crown" else methods.Bounded
    return kind(
        iterations,
        local=method.norms == "local",
        box=settings.has_box(method),
        ball=method.norms != "none",
        margins=margins_of(config),
        head_norm=method.margins == "lipschitz_margin",
        loss=loss_of(config),
        sparsity=config.sparsity.weight,
        sparsity_theta=config.sparsity.weight_theta,
    )


def validation_of(config: Config) -> objectives.Objective:
    """What the validation split of a config is judged by: the same, against all rivals."""
    objective = objective_of(config)
    if isinstance(objective, methods.Bounded) and isinstance(objective.margins, methods.DualMargins):
        thorough = dataclasses.replace(objective.margins, num_rivals=None)
        return dataclasses.replace(objective, margins=thorough)
    return objective


def loss_of(config: Config) -> Callable[[worst_case.Outcome], Array]:
    """The worst-case loss of a config, with the numbers of its own section where it has one."""
    name = config.method.loss
    if name not in worst_case.WORST_CASE:
        return references.find(name, "--config.method.loss")
    loss, numbers = worst_case.WORST_CASE[name], numbers_of(config)
    return functools.partial(loss, **numbers) if numbers else loss


def numbers_of(config: Config) -> dict[str, float]:
    """The section of the loss of a config, where it has one: numbers that it takes as arguments."""
    name = config.method.loss
    return config[name].to_dict() if name in config else {}


def margins_of(config: Config) -> methods.Margins:
    """How a config bounds margins in training."""
    if config.method.margins == "dual":
        return methods.DualMargins(config.dual.num_rivals)
    if config.method.margins == "crown":
        return methods.CrownMargins(config.eps_train, **config.crown.to_dict())
    return methods.forward(FORWARD[config.method.margins])
