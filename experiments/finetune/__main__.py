"""python -m experiments.finetune: see `experiments.finetune.command`."""

import sys

from experiments.finetune.command import main

sys.exit(main())
