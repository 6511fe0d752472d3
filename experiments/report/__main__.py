"""python -m experiments.report: see `experiments.report.page`."""

import sys

from experiments.report.page import main

sys.exit(main())
