"""python -m experiments.sweep: see `experiments.sweep.command`."""

import sys

from experiments.sweep.command import main

sys.exit(main())
