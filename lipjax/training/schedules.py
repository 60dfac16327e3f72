"""Schedules of a run, all functions of the step, built from Optax.

The points of change are given as fractions of the run, so that a shorter run scales them with it.
"""

from __future__ import annotations

import optax


def ramp(num_steps: int, start: float, end: float, init_value: float, end_value: float) -> optax.Schedule:
    """Constant, then linear between two fractions of the run, then constant ([H21] Eq 27 for eps, Eq 28 for kappa).

    Args:
        num_steps: steps in the whole run.
        start: fraction at which the ramp begins (the end of the warm-up).
        end: fraction at which it ends.
        init_value: before.
        end_value: after; never passed.

    Returns:
        Step to value.
    """
    begin, finish = round(start * num_steps), round(end * num_steps)
    return optax.schedules.linear_schedule(init_value, end_value, max(finish - begin, 1), transition_begin=begin)


def constant_then_exponential(num_steps: int, constant: float, init_value: float, end_value: float) -> optax.Schedule:
    """Constant, then exponential decay that reaches the end value as the run ends, at step ``num_steps`` ([H21] Eq 29).

    Args:
        num_steps: steps in the whole run.
        constant: fraction of the run before the decay.
        init_value: first learning rate.
        end_value: learning rate at the end.

    Returns:
        Step to learning rate.
    """
    begin = round(constant * num_steps)
    decay_steps = max(num_steps - begin, 1)
    return optax.schedules.exponential_decay(
        init_value, decay_steps, end_value / init_value, transition_begin=begin, end_value=end_value
    )
