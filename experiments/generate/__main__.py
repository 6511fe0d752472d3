"""python -m experiments.generate: see `experiments.generate.command`."""

from experiments.generate.command import main

raise SystemExit(main())
