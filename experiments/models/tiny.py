"""A random BERT small enough for tests, and a tokenizer made on the spot: needs no file."""

import string

import tokenizers
from flax import nnx
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from experiments.models import bert

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
# Frequent words are one token each; other words are spelled out, so no ASCII text is unknown.
WORDS = """
    the of a to and is in that it for as with be are this by an or not if from on can which may
    have has no all any one two at but only other such same these than then will must when where
    was were object value name type class function method module string list file number code
    argument expression statement attribute default used called returns python
"""


def _vocabulary() -> dict[str, int]:
    letters = string.ascii_lowercase + string.digits
    pieces = [
        *_SPECIAL,
        *string.punctuation,
        *letters,
        *(f"##{c}" for c in letters),
        *WORDS.split(),
    ]
    return {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}


CONFIG = bert.BertConfig(
    vocab_size=len(_vocabulary()),
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=128,
    initializer_range=0.1,  # 0.02 is for wide layers: 32 inputs would hardly move the residual
)


def tokenizer() -> tokenizers.Tokenizer:
    """Lower-cased WordPiece over a fixed vocabulary, with BERT's [CLS] and [SEP]."""
    made = tokenizers.Tokenizer(models.WordPiece(_vocabulary(), unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = [(name, made.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=special
    )
    made.decoder = decoders.WordPiece()
    return made


def load(num_labels: int, *, rngs: nnx.Rngs, **options) -> bert.BertClassifier:
    """A random two-layer encoder, 32 wide, under a head of `num_labels` classes."""
    return bert.BertClassifier(CONFIG, num_labels, rngs=rngs, **options)
