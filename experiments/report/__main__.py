"""python -m experiments.report: see `experiments.report.page`."""

from experiments.report.page import main

raise SystemExit(main())
