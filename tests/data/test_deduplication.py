from collections.abc import Iterable

import pytest

from moe_testbed.data.deduplication import Cuts, Deduplicator, Figures, Memory, normalise
from moe_testbed.data.documents import Document, beginning

LONG = "a paragraph that is long enough to be looked at"


def run(*texts: str, minimum_document: int = 1) -> tuple[list[str], Figures]:
    figures = Figures()
    return filtered(Memory(100), texts, minimum_document, figures=figures), figures


def filtered(
    memory: Memory,
    texts: Iterable[str],
    minimum_document: int = 1,
    most: int = 10**6,
    separator: str = "\n\n",
    figures: Figures | None = None,
    cuts: Cuts | None = None,
) -> list[str]:
    deduplicator = Deduplicator(memory, 20, minimum_document, most)
    documents = [Document(text, str(number), separator) for number, text in enumerate(texts)]
    found = deduplicator.filter(documents, figures or Figures(), cuts or Cuts())
    return [unique.document.text for unique in found]


def test_documents_that_differ_in_case_and_white_space_only_are_one():
    kept, figures = run("One  text\r\nhere", "one text here\n\n", "another text")
    assert kept == ["One  text\nhere", "another text"]
    assert figures.duplicate_documents == 1


def test_a_paragraph_stays_in_its_first_document_only():
    kept, figures = run(f"first\n\n{LONG}", f"{LONG.upper()}\n\n  second", LONG)
    assert kept == [f"first\n\n{LONG}", "  second"]
    assert (figures.duplicate_paragraphs, figures.short_documents) == (2, 1)


def test_short_paragraphs_may_recur():
    kept, _ = run("---\n\nx", "---\n\ny")
    assert kept == ["---\n\nx", "---\n\ny"]


def test_figures_add_up():
    _, figures = run("a" * 30, "a" * 30, "b", "é" * 30, minimum_document=10)
    assert figures == Figures(4, 121, 1, 0, 1, 2, 90)
    assert figures.documents_read == figures.duplicate_documents + figures.short_documents + figures.documents_kept


def test_what_earlier_domains_had_is_known():
    memory = Memory(100)
    first = filtered(memory, [LONG])
    second = filtered(Memory(100, earlier=memory.digests), [f"{LONG}\n\nmore", LONG])
    assert first + second == [LONG, "more"]


def test_text_that_is_not_kept_is_forgotten_in_its_order_and_kept_text_is_not():
    memory = Memory(most_unkept=2)
    unique = {}
    for name in "abcd":
        (unique[name],) = Deduplicator(memory, 20, 1, 10**6).filter([Document(name * 30, name)], Figures(), Cuts())
    for name in "cab":  # two digests of each: the document's, and the paragraph's
        memory.release(unique[name].digests)
    assert filtered(memory, ["a" * 30, "b" * 30, "c" * 30, "d" * 30]) == ["a" * 30, "c" * 30]


PARAGRAPHS = [f"{number} {letter * 40}" for number, letter in enumerate("abcdefghij")]


def cut(text: str, most: int, separator: str = "\n\n") -> tuple[str, Cuts]:
    cuts = Cuts()
    (kept,) = filtered(Memory(100), [text], most=most, separator=separator, cuts=cuts)
    return kept, cuts


@pytest.mark.parametrize("separator", ["\n\n", "\n"])
@pytest.mark.parametrize("most", [42, 85, 86, 200, 431, 10**6])
def test_a_long_document_ends_with_the_last_paragraph_for_which_there_is_room(most: int, separator: str):
    text = separator.join(PARAGRAPHS)
    kept, cuts = cut(text, most, separator)
    beginnings = [separator.join(PARAGRAPHS[:count]) for count in range(1, len(PARAGRAPHS) + 1)]
    assert kept == max((each for each in beginnings if len(each) <= most), key=len)
    left_out = text[len(kept) :].removeprefix(separator)
    assert cuts == (Cuts(1, len(left_out)) if left_out else Cuts())


@pytest.mark.parametrize(
    "text, most, expected",
    [
        ("one two three", 10, "one two"),
        ("a line\nand another one", 11, "a line"),
        ("a lineé", 7, "a line"),
        ("ééé", 5, "éé"),
        ("x" + "y" * 100, 50, "x" + "y" * 49),
        ("fits", 4, "fits"),
    ],
)
def test_a_paragraph_for_which_there_is_no_room_ends_with_a_line_a_word_or_a_character(
    text: str, most: int, expected: str
):
    assert beginning(text, most) == expected


def test_known_paragraphs_take_no_room():
    memory = Memory(100)
    filtered(memory, PARAGRAPHS[:5])
    assert filtered(memory, ["\n\n".join(PARAGRAPHS)], most=130) == ["\n\n".join(PARAGRAPHS[5:8])]


def test_a_paragraph_that_was_cut_off_may_stand_in_another_document():
    kept = filtered(Memory(100), ["\n\n".join(PARAGRAPHS), *PARAGRAPHS], most=90)
    assert kept == ["\n\n".join(PARAGRAPHS[:2]), *PARAGRAPHS[2:]]


def test_normalise_folds_compatible_forms():
    assert normalise("ﬁne\u00a0 ＡＢＣ\n") == "fine abc"
