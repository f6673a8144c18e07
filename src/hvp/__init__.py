"""Self-supervised pretraining of image encoders on hard views.

The top of the import package: pyproject.toml maps this folder to `hvp`, and those at the top of the repository to
`hvp.cli`, `hvp.common`, `hvp.methods` and `hvp.patches`.
"""

import os

__version__ = "0.1.0"

# OpenMP's threads spin while they wait for each other, which slows a step tenfold as soon as anything else needs a
# core, be it the loader's workers. OpenMP reads this once, when PyTorch is imported. What the user has set stays.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
