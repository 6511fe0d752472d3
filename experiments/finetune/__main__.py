"""python -m experiments.finetune: see `experiments.finetune.command`."""

from experiments.finetune.command import main

raise SystemExit(main())
