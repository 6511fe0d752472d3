"""python -m experiments.pod: see `experiments.pod.command`."""

from experiments.pod.command import main

raise SystemExit(main())
