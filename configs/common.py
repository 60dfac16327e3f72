"""The old place of lipjax.experiments.defaults; it goes in 0.6."""

import warnings

from lipjax.experiments.defaults import *  # noqa: F403

warnings.warn("configs.common is lipjax.experiments.defaults now", DeprecationWarning, stacklevel=2)
