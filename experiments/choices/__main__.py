"""python -m experiments.choices: see `experiments.choices.command`."""

from experiments.choices.command import main

raise SystemExit(main())
