"""Every labelled reader on a small text written by hand."""

from __future__ import annotations

import json
import unicodedata

import pytest

from moe_testbed.data.documents import Document
from moe_testbed.data.probes.base import Example, LabelledReader
from moe_testbed.data.probes.readers import (
    BrownGenre,
    BrownTags,
    Conllu,
    CorrectedText,
    CorrectedTextErrors,
    LabelledLines,
    LicenceCategory,
    PythonTokens,
    StrippedMarks,
    TuneMetre,
    VersePairs,
)


def examples(reader: LabelledReader, text: str, origin: str = "p@1:folder/ca01") -> list[Example]:
    return list(reader.examples(Document(text, origin)))


def labelled_words(example: Example) -> list[tuple[str, str]]:
    """Each word as it stands in the text, with its label."""
    return [(example.text[start:end], label) for (start, end), label in zip(example.words, example.labels, strict=True)]


def sequence(found: list[Example]) -> list[tuple[str, str]]:
    return [(example.text, *example.labels) for example in found]


BROWN = (
    "\n\n\tThe/at Jury/nn-tl said/vbd ``/`` I'm/ppss+bem not/* sure/jj ''/'' (/( of/in it/ppo )/) ,/, "
    "isn't/bez* it/pps ?/."
)


def test_words_of_the_brown_corpus_carry_base_tags():
    (found,) = examples(BrownTags(), BROWN)
    assert found.text == "The Jury said \"I'm not sure\" (of it), isn't it ?".replace(" ?", "?")
    assert labelled_words(found) == [
        ("The", "at"),
        ("Jury", "nn"),
        ("said", "vbd"),
        ('"', "``"),
        ("I'm", "ppss"),
        ("not", "*"),
        ("sure", "jj"),
        ('"', "''"),
        ("(", "("),
        ("of", "in"),
        ("it", "ppo"),
        (")", ")"),
        (",", ","),
        ("isn't", "bez"),
        ("it", "pps"),
        ("?", "."),
    ]


@pytest.mark.parametrize(
    "tagged, tag",
    [("fw-in/fw-in", "in"), ("--/--", "--"), ("1/2/cd", "cd"), ("he's/pps+bez", "pps"), ("A/NN$-HL", "nn$")],
)
def test_tags_lose_what_marks_titles_foreign_words_and_contractions(tagged: str, tag: str):
    assert examples(BrownTags(), tagged)[0].labels == (tag,)


@pytest.mark.parametrize("text", ["word", "/nn", "word/"])
def test_words_without_a_tag_are_refused(text: str):
    with pytest.raises(ValueError, match=f"'{text}' is no word with a tag"):
        examples(BrownTags(), text)


def test_the_name_of_a_file_tells_its_genre():
    assert sequence(examples(BrownGenre(), "A/at b/nn", "corpus@1:cn07")) == [("A b", "adventure")]
    assert sequence(examples(BrownGenre(), "A/at b/nn", "corpus@1:cj80")) == [("A b", "learned")]
    with pytest.raises(ValueError, match="none of the Brown corpus"):
        examples(BrownGenre(), "A/at b/nn", "corpus@1:readme")


CONLLU = """# sent_id = 1
1-2\tdu\t_\t_\t_\t_\t_\t_\t_\t_
1\tde\tde\tADP\t_\t_\t3\tcase\t_\t_
2\tle\tle\tDET\t_\t_\t3\tdet\t_\t_
3\tpain\tpain\tNOUN\t_\t_\t0\troot\t_\tSpaceAfter=No
3.1\tx\tx\tVERB\t_\t_\t_\t_\t_\t_
4\t.\t.\tPUNCT\t_\t_\t3\tpunct\t_\t_

1\tOui\toui\tINTJ\t_\t_\t0\troot\t_\t_
"""


def test_sentences_of_a_treebank_are_documents():
    first, second = examples(Conllu(), CONLLU)
    assert (first.text, second.text) == ("du pain.", "Oui")
    assert labelled_words(first) == [("pain", "NOUN"), (".", "PUNCT")], "a word of several carries no label"
    assert (first.document, second.document) == ("1", "2")
    assert examples(Conllu(column="deprel"), CONLLU)[0].labels == ("root", "punct")


def test_the_last_part_of_a_word_names_it():
    rows = [
        ("1", "ev", "NOUN", "ig", "SpaceAfter=No"),
        ("2", "deki", "ADJ", "amod", "_"),
        ("3", "kedi", "NOUN", "root", "_"),
    ]
    text = "\n".join(
        "\t".join([i, form, "_", tag, "_", "_", "0", relation, "_", misc]) for i, form, tag, relation, misc in rows
    )
    (found,) = examples(Conllu(part_relation="ig"), text)
    assert labelled_words(found) == [("evdeki", "ADJ"), ("kedi", "NOUN")]


def test_a_line_with_other_columns_is_refused():
    with pytest.raises(ValueError, match="sentence 1 has a line of 2 columns"):
        examples(Conllu(), "1\tword")


ANNOTATED = (
    "Привіт{=>,:::error_type=Punctuation} {Настя=>Насте:::error_type=G/Case}! {так=>так:::error_type=Spelling} "
    "{а б=>в:::error_type=Spelling}{ зайве=>:::error_type=Fluency}.\nДобрий день тобі, друже мій."
)


def test_changed_words_are_errors_and_so_is_what_stands_behind_a_gap():
    (found,) = examples(CorrectedTextErrors(), ANNOTATED)
    assert found.text == "Привіт Настя! так а б зайве.\nДобрий день тобі, друже мій."
    errors = [word for word, label in labelled_words(found) if label == "error"]
    assert errors == ["Настя", "а", "б", "зайве"], "the comma is missing before Настя"
    assert found.origins == ("Привіт, Насте! так в.\nДобрий день тобі, друже мій.",)


def test_a_missing_sign_makes_the_word_behind_it_an_error():
    (found,) = examples(CorrectedTextErrors(), "Він{=>,:::error_type=Punctuation} каже{=>.:::error_type=Punctuation}")
    assert labelled_words(found) == [("Він", "correct"), ("каже", "error")]


def test_lines_are_corrected_one_by_one():
    found = examples(CorrectedText(minimum_characters=5), ANNOTATED)
    assert sequence(found) == [
        ("Привіт Настя! так а б зайве.", "Привіт, Насте! так в."),
        ("Добрий день тобі, друже мій.", "Добрий день тобі, друже мій."),
    ]
    assert len(examples(CorrectedText(minimum_characters=29), ANNOTATED)) == 0


@pytest.mark.parametrize("reader", [CorrectedText(), CorrectedTextErrors()])
def test_an_annotation_that_is_not_whole_is_refused(reader: LabelledReader):
    with pytest.raises(ValueError, match="an annotation is not whole"):
        examples(reader, "Він пішов{=>.\n– } А вона лишилася там.")


def test_lines_have_a_label_a_tab_and_a_text():
    found = examples(LabelledLines(), "good\tA text.\n\nbad\tAnother\ttext.\n")
    assert sequence(found) == [("A text.", "good"), ("Another\ttext.", "bad")]
    assert [example.document for example in found] == ["1", "3"]
    for line in ("no tab", "\ttext", "label\t "):
        with pytest.raises(ValueError, match="line 1 is not a label, a tab and a text"):
            examples(LabelledLines(), line)


def test_the_front_matter_of_a_licence_names_its_category():
    reader = LicenceCategory(minimum_characters=5)
    head = "---\nkey: mit\ncategory: Permissive\n{}---\n\n"
    assert sequence(examples(reader, head.format("") + "You may use it.")) == [("You may use it.", "Permissive")]
    assert examples(reader, head.format("language: fr\n") + "Vous pouvez.") == []
    assert examples(reader, head.format("") + "MIT") == []
    with pytest.raises(ValueError, match="no front matter"):
        examples(reader, "You may use it.")
    with pytest.raises(ValueError, match="names no category"):
        examples(reader, "---\nkey: mit\n---\nYou may use it.")


CODE = '''import os.path as p
from a.b import (c,
    d as e)

class Größe(Base):
    """What it is."""
    def f(self, x=1, *args, **kw):
        return g(x, key=self.y.z) + f"{x + h(2)} and {'y'}"  # done
é = [os.é for i in range(3) if not i]
'''


def test_names_of_code_have_classes():
    (found,) = examples(PythonTokens(), CODE)
    keywords = {"import", "as", "from", "class", "def", "return", "for", "in", "if", "not"}
    words = labelled_words(found)
    assert {word for word, label in words if label == "keyword"} == keywords
    assert [word for word, label in words if label == "import"] == ["os", "path", "p", "a", "b", "c", "d", "e"]
    rest = [(word, label) for word, label in words if label not in ("keyword", "import")]
    assert rest == [
        ("Größe", "definition"),
        ("Base", "name"),
        ('"""What it is."""', "string"),
        ("f", "definition"),
        ("self", "parameter"),
        ("x", "parameter"),
        ("1", "number"),
        ("args", "parameter"),
        ("kw", "parameter"),
        ("g", "call"),
        ("x", "name"),
        ("key", "keyword_argument"),
        ("self", "name"),
        ("y", "attribute"),
        ("z", "attribute"),
        ("f\"{x + h(2)} and {'y'}\"", "string"),
        ("# done", "comment"),
        ("é", "name"),
        ("os", "name"),
        ("é", "attribute"),
        ("i", "name"),
        ("range", "call"),
        ("3", "number"),
        ("i", "name"),
    ]


@pytest.mark.parametrize("code", ["def f(:\n", "x = (1\n", "print 'x'\n"])
def test_code_that_cannot_be_parsed_is_left_out(code: str):
    assert examples(PythonTokens(), code) == []


def test_marks_are_stripped_from_the_beginning_of_a_text():
    text = "قَالَ رَسُولُ  اللَّهِ صَلَّى"
    (found,) = examples(StrippedMarks(max_characters=25), text)
    assert found.text == "قال رسول الله"
    assert found.labels == ("قَالَ رَسُولُ اللَّهِ",)
    assert (
        "".join(c for c in unicodedata.normalize("NFD", found.labels[0]) if not unicodedata.combining(c)) == found.text
    )
    (found,) = examples(StrippedMarks(max_characters=25, part="end"), text)
    assert (found.text, found.labels) == ("رسول الله صلى", ("رَسُولُ اللَّهِ صَلَّى",))
    assert found.origins == ("قَالَ رَسُولُ اللَّهِ صَلَّى",), "all of it must be new"
    assert examples(StrippedMarks(), "قال") == [], "there is nothing to restore"


TUNE = "X:1\nT:The Jig\nM:6/8\nL:1/8\nQ:120\nK:D\n% a jig\nABc [L:1/16]d2|\nw: la la\nGFE|]\n"


def test_notes_alone_tell_the_metre():
    (found,) = examples(TuneMetre(), TUNE)
    assert (found.text, found.labels) == ("ABc d2|\nGFE|]", ("6/8",))
    assert found.origins == (TUNE,)
    assert examples(TuneMetre(), TUNE.replace("M:6/8", "N:6/8")) == []
    assert examples(TuneMetre(), TUNE.replace("GFE", "[M:3/4]GFE")) == []
    assert examples(TuneMetre(), TUNE.replace("w: la la", "M:C|")) == []


def test_verses_are_translated_one_by_one():
    chapter = {"verses": [{"text": " a\nb", "translation": "c  d"}, {"text": "e", "translation": " "}]}
    (found,) = examples(VersePairs(), json.dumps(chapter))
    assert (found.text, found.labels, found.origins) == ("a b", ("c d",), ("c d",))
    with pytest.raises(KeyError):
        examples(VersePairs(wanted="english"), json.dumps(chapter))
