"""python -m experiments.pod: see `experiments.pod.command`."""

import sys

from experiments.pod.command import main

sys.exit(main())
