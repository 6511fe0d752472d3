"""A vocabulary of one's own for a T5: a Unigram trained on texts, in the form of T5's tokenizer."""

import json
import string
from collections.abc import Iterable

import tokenizers
from tokenizers import normalizers, pre_tokenizers, trainers

from experiments.models import t5_files

SPECIAL = ("<pad>", "</s>", "<unk>")  # T5's first three tokens, in its order
_UNK = SPECIAL.index("<unk>")
# All of it is in the vocabulary, so that any prompt and answer in English can be written.
_ASCII = [*string.ascii_letters, *string.digits, *string.punctuation]
LEAST = len(SPECIAL) + len(_ASCII) + 1 + t5_files.SENTINELS  # and "▁"


def trained(texts: Iterable[str], size: int) -> tokenizers.Tokenizer:
    """A tokenizer of at most `size` tokens: the special ones, pieces of the texts, the sentinels.

    Two trainings on the same texts differ in the last digits of the pieces' scores: keep the file.

    Raises:
        ValueError: `size` has no room for ASCII, the special tokens and the sentinels.
    """
    if size < LEAST:
        raise ValueError(f"a vocabulary of {size} tokens has no room for ASCII; at least {LEAST}")
    made = tokenizers.Tokenizer(tokenizers.models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    trainer = trainers.UnigramTrainer(
        vocab_size=size - t5_files.SENTINELS,
        special_tokens=list(SPECIAL),
        unk_token=SPECIAL[_UNK],
        initial_alphabet=_ASCII,
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    # The trained pieces in a tokenizer that also has the sentinels, and ends a text with </s>.
    pieces = [tuple(piece) for piece in json.loads(made.to_str())["model"]["vocab"]]
    t5s = t5_files.unigram(pieces, _UNK)
    t5s.normalizer = made.normalizer
    return t5s
