"""python -m experiments.sweep: see `experiments.sweep.command`."""

from experiments.sweep.command import main

raise SystemExit(main())
