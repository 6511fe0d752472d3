"""Language tasks: who says what, which rows validate, what a bad line is told, scores by hand."""

import ast
import json
import math
import os
import pathlib
import subprocess
import sys
import sysconfig
from decimal import Decimal

import numpy as np
import pytest

from experiments.data import docstrings, e2e, gsm8k, jsonl, scores
from experiments.data.language import LanguageTask, held_out
from experiments.data.tasks import LANGUAGE, TASKS, load_task, task_named

SHARED = pathlib.Path(__file__).parents[2] / "shared"

needs_data = pytest.mark.skipif(
    not (SHARED / "nlg").is_dir(), reason=f"no E2E and GSM8K in {SHARED}/nlg"
)


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def pair(prompt, completion="x", **more):
    return {"prompt": prompt, "completion": completion} | more


def chat(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def said(split):
    return [[(m["role"], m["content"]) for m in exchange.messages] for exchange in split]


def test_both_kinds_of_tasks_are_found_by_name():
    assert not TASKS.keys() & LANGUAGE.keys()
    assert task_named("sst2") is TASKS["sst2"]
    assert task_named("e2e") is LANGUAGE["e2e"]
    with pytest.raises(ValueError, match="unknown task 'gsm8'; did you mean 'gsm8k'"):
        task_named("gsm8")


def test_the_tasks_alone_import_no_scorer():
    code = "import sys, experiments.data.tasks; sys.exit('sacrebleu' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("task", LANGUAGE.values(), ids=LANGUAGE)
def test_empty_answers_score_nothing_and_right_ones_all(task: LanguageTask):
    references = [["It is 7 of them."], ["#### 12,000", "It took 12,000 of the days."]]
    assert set(task.score(["", " "], references).values()) == {0.0}
    most = 1 if task.name == "gsm8k" else 100
    found = task.score([known[-1] for known in references], references)
    assert list(found.values()) == pytest.approx([most])


@pytest.mark.parametrize("score", [scores.bleu, scores.chrf, scores.exact_match])
@pytest.mark.parametrize("references", [[], [["x"], ["y"]], [[]]])
def test_answers_without_references_are_refused(score, references):
    with pytest.raises(ValueError, match="expected at least one answer and at least one reference"):
        score(["x"] if references else [], references)


def test_bleu_counts_an_ngram_of_any_reference_and_pads_none():
    """By hand: all n-grams are right; 9 words against references of 10, the second has one only."""
    answers, references = ["a b c d e", "p q r s"], [["a b c d x", "y b c d e"], ["p q r s t"]]
    assert scores.bleu(answers, references)["bleu"] == pytest.approx(100 * math.exp(-1 / 9))
    precisions = 8 / 9 * 6 / 7 * 4 / 5 * 2 / 3
    one = scores.bleu(answers, [references[0][:1], references[1]])["bleu"]
    assert one == pytest.approx(100 * math.exp(-1 / 9) * precisions**0.25)


def test_bleu_and_chrf_of_the_example_in_sacrebleus_readme():
    answers = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
    references = [
        ["The dog bit the man.", "The dog had bit the man."],
        ["It was not unexpected.", "No one was surprised."],
        ["The man bit him first.", "The man had bitten the dog."],
    ]
    assert scores.bleu(answers, references)["bleu"] == pytest.approx(48.53, abs=0.005)
    assert scores.chrf(answers, references)["chrf"] == pytest.approx(59.73, abs=0.005)


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("She has 3 + 4 = <<3+4=7>>7.\n#### 7", "7"),
        ("#### 7\nAnother question has #### 8 or 9", "7"),
        ("#### $1,234,567.50 in all", "1234567.5"),
        ("#### -3", "-3"),
        ("so -$3.", "-3"),
        ("it is 10-3", "3"),
        ("#### none of the 5", "5"),
        ("####18", "18"),
        ("6, 300", "300"),
        (".5 of it", "0.5"),
        ("18.00", "18"),
        ("2e3", "2000"),
        ("12eggs", "12"),
        ("1e99999999999999999999", "99999999999999999999"),
        ("no number", None),
        ("", None),
    ],
)
def test_the_number_of_an_answer(answer, number):
    assert scores.number(answer) == (None if number is None else Decimal(number))


def test_an_exact_match_is_a_share_of_the_answers():
    answers = ["so it is 18.0", "#### 17", "1,000", ""]
    assert scores.exact_match(answers, [["#### 18"]] * 2 + [["#### 1000"], ["no number"]]) == {
        "exact_match": 0.5
    }


@pytest.mark.parametrize("seed", range(5))
def test_groups_are_held_out_whole(seed):
    groups = ["a", "b", "b", "c", "c", "c", "a", "d"]
    held = held_out(groups, 4, np.random.default_rng(seed))
    assert 0 < len(held) <= 4
    assert not {groups[i] for i in held} & {groups[i] for i in range(8) if i not in held}
    assert held_out(["a", "a", "b", "b", "b"], 1, np.random.default_rng(seed)) == {0, 1}


LIBRARY = {
    "one.py": '''
def plain(x):
    """Return  x as it is.

    More about it.
    """

    # a comment
    return x


class Kind:
    """A class is no function."""

    async def method(self):
        """Wait for the first result."""
        def inner():
            """Count what is there."""
            return 1
        return inner()

    @property
    def decorated(self):
        """
        Tell whether it is decorated
        """
        return True
''',
    "package/__init__.py": 'def again(x):\n    """Return x as it is."""\n    return -x\n',
    "package/other.py": (
        'def empty():\n    """Has nothing in it."""\n'
        'def one_line(): "Stands beside its code."; return 1\n'
        'def two():\n    """The first of two strings."""\n    """The second."""\n    return 2\n'
        'def short():\n    """Two words."""\n    return 3\n'
        'def goes_on():\n    """This line of text is\n    only half of it.\n    """\n    return 4\n'
        'def long_line():\n    """It is ' + "very " * 40 + 'long."""\n    return 5\n'
        'def long():\n    """Does too much at once."""\n' + "    work()\n" * 41 + "\n"
        'class K:\n    def left(self):\n        """Holds a text at the margin."""\n'
        '        return """\nmargin"""\n'
        'def café():\n    """Sérve the guests a coffee."""\n    return "é"\n'
    ),
    "package/test/made.py": 'def f():\n    """Belongs to a test of ours."""\n    return 1\n',
    "site-packages/x.py": 'def f():\n    """Belongs to somebody else entirely."""\n    return 1\n',
    "broken.py": "def f(:\n",
}


@pytest.fixture
def library(tmp_path, monkeypatch):
    for name, text in LIBRARY.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(tmp_path)}.__getitem__)
    return tmp_path


def test_docstrings_are_cut_out_and_their_first_lines_kept(library):
    assert sorted(docstrings.pairs(library)) == sorted(
        docstrings.Pair(*row)
        for row in [
            ("one", "def plain(x):\n    # a comment\n    return x", "Return x as it is."),
            (
                "one",
                "async def method(self):\n    def inner():\n        return 1\n    return inner()",
                "Wait for the first result.",
            ),
            ("one", "def inner():\n    return 1", "Count what is there."),
            (
                "one",
                "@property\ndef decorated(self):\n    return True",
                "Tell whether it is decorated",
            ),
            ("package", 'def café():\n    return "é"', "Sérve the guests a coffee."),
        ]
    )


def test_the_order_of_a_folder_does_not_matter(library, monkeypatch):
    before, walk = docstrings.load(3), os.walk

    def backwards(top):
        for folder, folders, files in walk(top):
            folders.reverse()
            files.reverse()
            yield folder, folders, files

    monkeypatch.setattr(os, "walk", backwards)
    assert docstrings.load(3) == before
    assert len(before.train) == 4
    assert said(before.validation)[0][1] == ("assistant", "Sérve the guests a coffee.")


def test_a_library_without_sources_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "python311.zip"))
    with pytest.raises(FileNotFoundError, match=r"python311.zip .* came without them"):
        docstrings.load()


def test_pythons_own_docstrings_are_thousands_of_rows_split_by_module(monkeypatch):
    found = docstrings.pairs(pathlib.Path(sysconfig.get_path("stdlib")))
    monkeypatch.setattr(docstrings, "pairs", lambda library: found)
    splits = load_task("docstrings")
    assert docstrings.load(0) == splits
    assert docstrings.load(1) != splits
    assert len(splits.train) > 2000
    assert len(splits.validation) == pytest.approx(len(found) / 10, rel=0.1)
    module = {row.source: row.module for row in found}
    modules, summaries = [], []
    for split in splits:
        assert [exchange.id for exchange in split] == list(range(len(split)))
        sources = []
        for (user, answer), references, _ in split:
            source = user["content"].removeprefix(f"{docstrings.INSTRUCTION}\n\n")
            (function,) = ast.parse(source).body
            nodes = (n for n in ast.walk(function) if isinstance(n, docstrings.DOCUMENTED))
            assert not any(ast.get_docstring(node) for node in nodes)
            assert references == (answer["content"],)
            assert "\n" not in answer["content"]
            sources.append(source)
            summaries.append(answer["content"])
        modules.append({module[source] for source in sources})
    assert not modules[0] & modules[1]
    assert len(set(summaries)) == len(summaries) == len(module)


def test_e2e_is_one_row_for_every_description(tmp_path):
    facts = "name[The Café], eatType[pub], priceRange[£20-25], familyFriendly[no], near[A, B]"
    rows = {"mr": facts, "refs": ["The Café is  a pub. ", "A pub."]}, {"mr": "name[X]", "refs": "X"}
    write(tmp_path / "e2e" / "train.jsonl", rows[0], rows[0])
    write(tmp_path / "e2e" / "validation.jsonl", rows[0])
    splits = load_task("e2e", data_dir=tmp_path)
    prompt = (
        f"{e2e.INSTRUCTION}\n\n"
        "name : The Café | Type : pub | price : £20-25 | family friendly : no | near : A, B"
    )
    descriptions = "The Café is a pub.", "A pub."
    assert said(splits.train) == [[("user", prompt), ("assistant", d)] for d in descriptions * 2]
    assert [exchange.id for exchange in splits.train] == [0, 1, 2, 3]
    assert {exchange.references for split in splits for exchange in split} == {descriptions}
    assert e2e.load(tmp_path / "e2e") == splits
    write(tmp_path / "e2e" / "validation.jsonl", *rows)
    with pytest.raises(ValueError, match=r"e2e/validation.jsonl:2: no facts or no list of refs"):
        e2e.load(tmp_path)
    assert e2e.linearised("a sentence, with a comma") == ""


def test_a_gsm8k_answer_needs_a_number(tmp_path):
    write(tmp_path / "train.jsonl", {"question": "How many?", "answer": "2 * 2 = 4\n#### 4"})
    write(tmp_path / "test.jsonl", {"question": "How many?", "answer": "four\n#### four"})
    with pytest.raises(ValueError, match=r'test.jsonl:1: the answer has no "#### " and number'):
        gsm8k.load(tmp_path)


@pytest.mark.parametrize("task", ["e2e", "gsm8k"])
def test_a_missing_data_set_is_told_where_it_was_looked_for(task, tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"no {task} in .*/nlg/{task}, .*https://github"):
        load_task(task, data_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match="needs --data-dir"):
        load_task(task)


@needs_data
@pytest.mark.parametrize(("task", "counts"), [("e2e", (42_061, 4_672)), ("gsm8k", (7_473, 1_319))])
def test_the_real_data_sets_have_their_published_counts(task, counts):
    splits = load_task(task, data_dir=SHARED)
    assert tuple(map(len, splits)) == counts
    validation = splits.validation
    found = LANGUAGE[task].score(
        [x.references[0] for x in validation[:50]], [x.references for x in validation[:50]]
    )
    assert found == pytest.approx({"bleu": 100} if task == "e2e" else {"exact_match": 1})


def test_own_data_in_both_forms_with_a_validation_file(tmp_path):
    turns = ("system", "Be brief."), ("user", "1?"), ("assistant", "One."), ("user", "2?")
    file = tmp_path / "my.jsonl"
    file.write_bytes(
        b"\xef\xbb\xbf"
        + '{"prompt": "a\u2028b", "completion": " c\\n", "id": 7}\r\n'.encode()
        + json.dumps(chat(*turns, ("assistant", "Two. \U0001f600"))).encode()
        + b"\n \n\n"
    )
    held = write(tmp_path / "held.jsonl", pair("p", "c"))
    splits = jsonl.load(file, held)
    assert said(splits.train) == [
        [("user", "a\u2028b"), ("assistant", " c\n")],
        [*turns, ("assistant", "Two. \U0001f600")],
    ]
    assert [exchange.references for exchange in splits.train] == [(" c\n",), ("Two. \U0001f600",)]
    assert said(splits.validation) == [[("user", "p"), ("assistant", "c")]]


def test_a_tenth_of_own_data_is_held_out_and_a_prompt_stays_on_one_side(tmp_path):
    file = write(tmp_path / "my.jsonl", *(pair(str(i // 2), str(i)) for i in range(60)))
    splits = load_task("data", files=[file], seed=1)
    prompts = [{conversation[0] for conversation in said(split)} for split in splits]
    assert tuple(map(len, splits)) == (54, 6)
    assert not prompts[0] & prompts[1]
    assert [int(x.references[0]) for x in splits.train] == sorted(
        int(x.references[0]) for x in splits.train
    )
    assert jsonl.load(file, seed=1) == splits != jsonl.load(file, seed=2)
    big = write(tmp_path / "big.jsonl", *(pair(str(i)) for i in range(6000)))
    assert tuple(map(len, jsonl.load(big))) == (5500, 500)
    assert tuple(map(len, jsonl.load(write(file, pair("a"), pair("b"))))) == (1, 1)


@pytest.mark.parametrize("rows", [[pair("a")], [pair("a", "x"), pair("a", "y")]])
def test_own_data_of_one_prompt_cannot_be_split(rows, tmp_path):
    file = write(tmp_path / "my.jsonl", *rows)
    with pytest.raises(ValueError, match=rf"{len(rows)} rows? with one prompt.*a validation file"):
        jsonl.load(file)
    assert len(jsonl.load(file, file).train) == len(rows)


USER, ANSWER, SYSTEM = ("user", "u"), ("assistant", "a"), ("system", "s")


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"prompt": "a"', "not JSON (Expecting ',' delimiter in column 15)"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "a JSON list, not an object"),
        ("", "a blank line"),
        ({}, "no prompt and no messages among its fields (none)"),
        ({"text": "a"}, "no prompt and no messages among its fields (text)"),
        ({"prompt": "a"}, "prompt alone"),
        ({"completion": "a"}, "completion alone"),
        (pair("a") | chat(USER, ANSWER), "prompt and completion and messages together"),
        (pair(1), "prompt is a JSON int, not a string"),
        (pair("a", None), "completion is a JSON NoneType, not a string"),
        (pair(" \n"), "prompt is empty"),
        (pair("a", ""), "completion is empty"),
        ('{"prompt": "\\ud800", "completion": "a"}', r"a lone surrogate, '\ud800'"),
        ({"messages": "a"}, "messages is a JSON str, not a list"),
        (chat(), "the roles are none; expected"),
        (chat(USER), "the roles are user; expected"),
        (chat(ANSWER), "the roles are assistant; expected"),
        (chat(USER, ANSWER, USER), "the assistant's last"),
        (chat(SYSTEM, USER, SYSTEM, SYSTEM, ANSWER), "expected a system message or none"),
        (chat(("tool", "t"), ANSWER), "message 1 has the role 'tool'; there are system, user"),
        (chat(USER, ("assistant", " ")), "message 2: content is empty"),
        (chat(USER, ("assistant", ["a"])), "message 2: content is a JSON list"),
        ({"messages": [{"role": "user"}, "a"]}, 'message 1 is {"role": "user"}; expected'),
        ({"messages": ["a"]}, 'message 1 is "a"; expected'),
        (
            {"messages": [{"role": "user", "content": "u", "weight": 0}]},
            '"weight": 0}; expected {"role": ROLE, "content": TEXT} and nothing else',
        ),
    ],
)
def test_a_bad_line_of_own_data_is_named(line, why, tmp_path):
    file = write(tmp_path / "my.jsonl", pair("good"), line, pair("good, too"))
    with pytest.raises(ValueError, match=r"my\.jsonl:2[:,] ") as caught:
        jsonl.load(file)
    assert why in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_file_that_is_none_is_named(tmp_path):
    with pytest.raises(ValueError, match="name it with --data FILE"):
        load_task("data")
    with pytest.raises(FileNotFoundError, match=r"no file .*/none\.jsonl"):
        jsonl.load(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="is a folder"):
        jsonl.load(tmp_path)
    empty = tmp_path / "empty.jsonl"
    for data in (b"", b"\xef\xbb\xbf\n \n"):
        empty.write_bytes(data)
        with pytest.raises(ValueError, match=r"empty\.jsonl is empty"):
            jsonl.load(empty)
    empty.write_bytes(b'{"prompt": "a", "completion": "b"}\n{"prompt": "\xe9"}\n')
    with pytest.raises(ValueError, match=r"empty\.jsonl:2: not UTF-8"):
        jsonl.load(empty)
