"""Self-supervised pretraining of image encoders on hard views.

The sub-packages are links to the folders at the top of the repository. Edit the files there, not through the links.
"""

import os

__version__ = "0.1.0"

# OpenMP threads spin while they wait for each other. Once anything else needs a core, such as a loader worker, this
# slows a step tenfold. OpenMP reads the variable once, when PyTorch is imported; a value the user has set stays.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
