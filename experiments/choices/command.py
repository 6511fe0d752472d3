"""Trains forms of LoRA-Pro's Muon: python -m experiments.choices --methods muon-carried,muon-plain

The flags and the folders are those of `experiments.finetune`; `experiments.choices.muon` has the
names of the methods.
"""

from experiments.choices.muon import VARIANTS
from experiments.finetune import command
from experiments.finetune.config import RATES
from experiments.finetune.methods import METHODS
from experiments.report.plots import STYLES

_MARKERS = "<>hHdp*8x"


def main(argv: list[str] | None = None) -> int:
    """Runs the command line of `experiments.finetune` with the variants beside its methods."""
    METHODS.update(VARIANTS)
    for i, name in enumerate(VARIANTS):
        RATES[name] = RATES["lorapro-muon"]
        STYLES[name] = {"color": f"C{i}", "ls": (0, (1, 1 + i)), "marker": _MARKERS[i]}
    return command.main(argv)
