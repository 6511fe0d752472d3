"""Pretraining a T5: spans that restore the row, text that nothing validates, runs that go on."""

import dataclasses
import functools
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import checkpoint, config, pretrain, pretrain_loop, small_t5
from experiments.config import RunConfig
from experiments.data import corpus, glue, pydoc, spans
from experiments.data.prompts import PROMPTS
from experiments.models import t5_classifier, t5_files, t5_vocabulary
from experiments.models.t5 import T5

TFDS = pathlib.Path(__file__).parents[2] / "shared" / "tfds"
END, SENTINEL, COUNT = 1, 999, 100

needs_tfds = pytest.mark.skipif(not TFDS.is_dir(), reason=f"no prepared GLUE in {TFDS}")


@pytest.fixture(autouse=True, scope="module")
def _corpora_are_made_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "load", functools.cache(corpus.load))
        yield


def spans_of(length: int, **how) -> spans.Spans:
    return spans.Spans(length, sentinel=SENTINEL, end=END, sentinels=COUNT, **how)


def restored(inputs, targets) -> list[int]:
    """The row, put together by reading: every sentinel is replaced by what follows it."""
    hidden, current = {}, None
    for token in targets:
        if token > SENTINEL - COUNT:
            current = hidden.setdefault(token, [])
        else:
            current.append(token)
    return [t for token in inputs[:-1] for t in hidden.get(token, [token])]


def test_the_example_of_the_file():
    row = np.array([11, 12, 13, 14, 15, 16, 17, 18, 19, 20], np.int32)
    mask = np.zeros(10, bool)
    mask[[2, 3, 8, 9]] = True
    how = spans_of(10, density=0.4, mean_span=2.0)
    inputs, targets = how.corrupt(row, mask)
    assert inputs.tolist() == [11, 12, 999, 15, 16, 17, 18, 998, 1]
    assert targets.tolist() == [999, 13, 14, 998, 19, 20, 997, 1]
    assert inputs.dtype == targets.dtype == np.int32


@given(st.integers(2, 300), st.floats(0.01, 0.9), st.floats(1.0, 10.0), st.integers(0, 2**32 - 1))
@settings(max_examples=150, deadline=None)
def test_inputs_and_targets_restore_the_row(length, density, mean_span, seed):
    try:
        how = spans_of(length, density=density, mean_span=mean_span)
    except ValueError as error:
        assert "sentinels" in str(error)  # noqa: PT017 (nothing more to claim)
        return
    rng = np.random.default_rng(seed)
    row = rng.integers(2, SENTINEL - COUNT, length).astype(np.int32)
    mask = how.mask(rng)
    inputs, targets = how.corrupt(row, mask)
    assert restored(inputs.tolist(), targets.tolist()[:-1]) == row.tolist()
    expected = min(max(round(length * density), 1), length - 1)
    assert mask.sum() == how.noise == expected
    marks = [SENTINEL - i for i in range(how.count + 1)]
    assert [t for t in inputs.tolist() if t > SENTINEL - COUNT] == marks[:-1]
    assert [t for t in targets.tolist() if t > SENTINEL - COUNT] == marks
    assert inputs[-1] == targets[-1] == END
    assert len(inputs) + len(targets) == length + 2 * how.count + 3


def test_t5s_numbers_for_rows_of_512():
    how = spans_of(512)
    assert (how.noise, how.count) == (77, 26)


def test_every_composition_is_equally_likely():
    rng = np.random.default_rng(0)
    drawn = [tuple(spans.composition(5, 3, rng).tolist()) for _ in range(6000)]
    found, counts = np.unique(drawn, axis=0, return_counts=True)
    assert len(found) == 6  # 4 choose 2
    assert (np.abs(counts - 1000) < 5 * np.sqrt(1000)).all()


def test_too_many_spans_for_the_sentinels():
    with pytest.raises(ValueError, match="need 206 sentinels; there are 100"):
        spans_of(4096)


def texts_of(*rows: list[int]) -> spans.Texts:
    return spans.Texts(np.concatenate(rows).astype(np.int32), np.array([len(r) for r in rows]))


def test_an_epoch_reads_every_text_whole_and_once():
    rows = [[10 * i + j for j in range(1 + i % 5)] for i in range(1, 80)]
    texts = texts_of(*rows)
    tokens = texts.shuffled(np.random.default_rng(1)).tolist()
    assert tokens != texts.tokens.tolist()
    found = []
    while tokens:
        row = rows[tokens[0] // 10 - 1]
        assert tokens[: len(row)] == row
        found.append(row)
        del tokens[: len(row)]
    assert sorted(found) == rows


def test_batches_are_functions_of_seed_and_step():
    texts = texts_of(np.arange(2, 800))

    def batches(seed):
        return spans.SpanBatches(texts, spans_of(32), 4, seed)

    one, again, other = batches(3), batches(3), batches(4)
    for step in (7, 0, 25):
        for name in ("inputs", "targets"):
            np.testing.assert_array_equal(one[step][name], again[step][name])
        assert not np.array_equal(one[step]["inputs"], other[step]["inputs"])
    assert one.per_epoch == 6
    # The texts are one, so its rows come again in the next epoch, with other spans.
    assert not np.array_equal(one[0]["inputs"], one[6]["inputs"])


def test_text_that_does_not_fill_a_batch_is_an_error():
    with pytest.raises(ValueError, match="do not fill one batch of 4 rows of 32"):
        spans.span_batches(texts_of(np.arange(2, 100)), spans_of(32), 4, seed=0)


@pytest.mark.slow
@needs_tfds
def test_no_text_of_a_validation_split_is_in_the_corpus(monkeypatch):
    monkeypatch.setattr(corpus, "GLUE", ("cola", "mrpc"))  # sst2 takes long and repeats nothing
    found = corpus.load.__wrapped__(TFDS)
    text = "\n".join(map(corpus.plain, [*found.train, *found.held_out]))
    lines = set(text.split("\n"))
    for task in glue.TASKS:
        if task.name in corpus.GLUE:
            for example in glue.load(task, TFDS).validation:
                for sentence in map(corpus.plain, example.texts):
                    assert sentence not in lines
                    # A short phrase may stand in another text; a whole sentence may not.
                    assert len(sentence.split()) < corpus.LONG or sentence not in text
    for example in pydoc.load().validation:
        assert corpus.plain(example.texts[0]) not in lines


def test_pydocs_part_is_the_training_split_undisturbed():
    prose, splits = pydoc.training_prose(), pydoc.load()
    assert len(prose) == len(splits.train)
    intact = [e.texts[0] for e in splits.train if e.label == 1]
    assert set(intact) <= set(prose)
    validation = {tuple(sorted(pydoc.content_words(e.texts[0]))) for e in splits.validation}
    assert validation.isdisjoint(tuple(sorted(pydoc.content_words(text))) for text in prose)


def test_what_is_held_out_shares_no_five_words_with_the_rest():
    found = corpus.load(None)
    assert list(found.sources) == ["pydoc"]
    assert len(found.held_out) > 100
    rest = "\n".join(f" {corpus.plain(text)} " for text in found.train)
    for text in found.held_out:
        words = corpus.plain(text).split()
        for i in range(len(words) - 4):
            assert f" {' '.join(words[i : i + 5])} " not in rest
    assert corpus.load.__wrapped__(None).digest == found.digest


FLAGS = (
    "--vocabulary 600 --width 16 --mlp-width 32 --heads 1 --encoder-layers 1 --decoder-layers 1 "
    "--row-length 32 --batch-size 4 --steps 8 --log-every 2 --evaluate-every 4 "
    "--checkpoint-every 3 --warmup-steps 2"
)
TINY = FLAGS.split()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The folder of a run of eight steps, never interrupted."""
    out = tmp_path_factory.mktemp("pretrain") / "model"
    assert pretrain.main([*TINY, "--out", str(out)]) == 0
    return out


def result_of(out):
    return checkpoint.read_result(out / pretrain.RUN)


@pytest.mark.slow
def test_the_folder_is_a_t5_that_fine_tunes(unbroken):
    model, tokenizer = t5_files.load(unbroken), t5_files.tokenizer(unbroken)
    assert tokenizer.get_vocab_size() == model.config.vocab_size <= 600
    assert [tokenizer.token_to_id(name) for name in t5_vocabulary.SPECIAL] == [0, 1, 2]
    size = tokenizer.get_vocab_size()
    ids = [tokenizer.token_to_id(f"<extra_id_{i}>") for i in range(t5_files.SENTINELS)]
    assert ids == [size - 1 - i for i in range(t5_files.SENTINELS)]
    for prompt in PROMPTS.values():
        answers = t5_classifier.answers_of(prompt.words, tokenizer)
        t5_classifier.branchings(answers)
        assert tokenizer.decode(tokenizer.encode(prompt.words[0]).ids) == prompt.words[0]
    text = "A list's items (all of them) are 3/4 new & 100% checked."
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    result = result_of(unbroken)
    assert result["parameters"] == sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert result["tokens"] == 8 * 4 * 32
    assert str(unbroken) not in json.dumps(result)


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(unbroken, tmp_path, monkeypatch):
    save, out = checkpoint.Checkpoints.save, tmp_path / "model"
    (out / pretrain.RUN).mkdir(parents=True)
    # Training a tokenizer is not exact: a run has one, from its first start on.
    shutil.copy(unbroken / "tokenizer.json", out / pretrain.RUN)

    def killed(self, step, *args):
        save(self, step, *args)
        if step == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.Checkpoints, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        pretrain.main([*TINY, "--out", str(out)])
    assert not (out / "config.json").exists()
    monkeypatch.setattr(checkpoint.Checkpoints, "save", save)
    assert pretrain.main([*TINY, "--out", str(out)]) == 0
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (unbroken / name).read_bytes()
    one, other = result_of(out), result_of(unbroken)
    assert one["evaluations"] == other["evaluations"]
    assert [line["loss"] for line in one["log"]] == [line["loss"] for line in other["log"]]


@pytest.mark.slow
def test_a_complete_run_is_only_reported(unbroken, capsys):
    before = (unbroken / "model.safetensors").stat().st_mtime_ns
    assert pretrain.main([*TINY, "--out", str(unbroken)]) == 0
    assert "complete, nothing to do" in capsys.readouterr().out
    assert (unbroken / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_folder_of_another_configuration_is_refused(unbroken, capsys):
    assert pretrain.main([*TINY, "--seed", "1", "--out", str(unbroken)]) == 2
    assert "seed: 0 there, 1 asked for" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--minutes", "0"], "--minutes must be a finite number above 0, not 0"),
        (["--minutes", "nan"], "--minutes must be a finite number above 0, not nan"),
        (["--batch-size", "-1"], "--batch-size must be"),
        (["--b2", "1.0"], "--b2 must be less than 1"),
        (["--data-dir", "no/such"], "no cola in no/such"),
        (["--vocabulary", "100"], "no room for ASCII"),
        (["--row-length", "4096"], "need 206 sentinels"),
        (["--batch-size", "4000"], "do not fill one batch"),
    ],
)
def test_bad_input_is_refused_at_the_door(flags, message, tmp_path, capsys):
    assert pretrain.main([*flags, "--out", str(tmp_path / "model")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "model" / "config.json").exists()


@pytest.mark.parametrize("flag", ["--minuts", "--rank"])
def test_unknown_flags_are_usage_errors(flag, capsys):
    with pytest.raises(SystemExit):
        pretrain.main([flag, "3"])
    assert flag in capsys.readouterr().err


def test_the_clock_decides_once_and_leaves_a_fifth():
    training = pretrain_loop.Training(minutes=1.0)
    history = pretrain_loop.History(losses=[1.0] * 400, seconds=47.9)
    setup = pretrain_loop.Setup(training, *[None] * 4)
    loop = object.__new__(pretrain_loop._Loop)
    loop.setup, loop.history = setup, history
    assert not loop.decide()
    history.seconds = 48.1
    assert loop.decide()
    assert history.last == 500
    history.losses.append(1.0)
    assert not loop.decide()
    assert history.last == 500


def test_the_rate_rises_falls_and_ends_near_zero():
    training = dataclasses.replace(pretrain_loop.Training(), learning_rate=1.0, warmup_steps=100)
    rates = [pretrain_loop.rate(training, step, None) for step in (1, 50, 100, 400)]
    np.testing.assert_allclose(rates, [0.01, 0.5, 1.0, 0.5])
    # Before the last fifth, the last step makes no difference.
    assert pretrain_loop.rate(training, 400, 500) == 0.5
    assert pretrain_loop.rate(training, 500, 500) == pytest.approx(0.01 * np.sqrt(0.2))


def fine_tuned(weights, rate, seed, accuracy):
    run = RunConfig(
        task="cola", model="t5", weights=weights, method="lora", learning_rate=rate, seed=seed,
        epochs=1,
    )  # fmt: skip
    return {
        "kind": "finetune",
        "config": dataclasses.asdict(run),
        "metric": "matthews",
        "final": {"accuracy": accuracy, "f1": 0.5, "matthews": accuracy - 0.7, "loss": 0.6},
        "train_examples": 640,
        "train_examples_available": 8551,
        "eval_examples": 200,
        "steps": 20,
        "examples_per_second": 10.0,
        "wall_seconds": 64.0,
    }


@pytest.mark.slow
def test_the_report_says_what_the_model_is(unbroken, tmp_path):
    assert small_t5.section(tmp_path) is None
    folder = tmp_path / small_t5.FOLDER
    folder.mkdir()
    shutil.copy(unbroken / pretrain.RUN / checkpoint.RESULT, folder / small_t5.PRETRAINING)
    runs = [fine_tuned("runs/t5-small-local", 1e-3, seed, 0.7 + seed / 10) for seed in (0, 1)]
    runs += [
        fine_tuned("runs/t5-small-local", 3e-3, 0, 0.71),
        fine_tuned("runs/t5-small-random", 1e-3, 0, 0.69),
    ]
    (folder / "finetune.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
    text = small_t5.section(tmp_path)
    result = result_of(unbroken)
    assert "no T5-base" in text
    assert f"Held-out loss {result['final']['loss']:.3f} nats" in text
    assert "8 steps, 1,024 tokens" in text
    assert (
        "`python -m experiments.pretrain --data-dir ../shared/tfds --batch-size 4 "
        "--warmup-steps 2 --minutes 50.0 --steps 8 --vocabulary 600" in text
    )
    lines = [line for line in text.splitlines() if line.startswith("| cola")]
    assert [line.split(" | ")[1:5] for line in lines] == [
        ["t5-small-local", "lora", "0.001", "2"],
        ["t5-small-local", "lora", "0.003", "1"],
        ["t5-small-random", "lora", "0.001", "1"],
    ]
    assert "**0.050 ± 0.071**" in lines[0]
    assert "640 of 8,551 training examples, 20 steps of 32, validated on 200" in text


def test_a_runs_command_is_read_as_the_run():
    run = RunConfig(
        task="sst2", model="t5", weights="runs/t5", method="lora", learning_rate=1e-3, seed=0,
        epochs=1, train_examples=640, max_length=64, batch_size=16,
    )  # fmt: skip
    line = small_t5.finetune_command(dataclasses.asdict(run))
    flags = [*line.split()[3:], "--methods", "lora", "--learning-rates", "1e-3"]
    assert config.runs(config.read(flags, "finetune")) == [run]


@pytest.mark.slow
def test_no_step_at_all_saves_the_random_model(tmp_path):
    flags = [*TINY, "--steps", "0", "--out", str(tmp_path)]
    assert pretrain.main(flags) == 0
    command = pretrain.Command(**vars(pretrain.Settings(width=16, mlp_width=32, heads=1)))
    sizes = dataclasses.replace(command, encoder_layers=1, decoder_layers=1)
    saved = t5_files.load(tmp_path)
    random = T5(pretrain.config_of(sizes, saved.config.vocab_size), rngs=nnx.Rngs(0))
    jax.tree.map(np.testing.assert_array_equal, *(nnx.state(m, nnx.Param) for m in (saved, random)))
    assert result_of(tmp_path)["evaluations"][0]["step"] == 0
