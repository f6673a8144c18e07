"""python tests/faults: the campaign."""

import sys

from tests.faults.campaign import main

sys.exit(main())
