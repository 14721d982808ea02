from moe_testbed.data.deduplication import Deduplicator, Figures, normalise
from moe_testbed.data.documents import Document

LONG = "a paragraph that is long enough to be looked at"


def run(*texts: str, minimum_document: int = 1) -> tuple[list[str], Figures]:
    figures = Figures()
    deduplicator = Deduplicator(minimum_paragraph_characters=20, minimum_document_characters=minimum_document)
    documents = [Document(text, origin=str(number)) for number, text in enumerate(texts)]
    return [document.text for document in deduplicator.filter(documents, figures)], figures


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


def test_state_is_shared_by_domains():
    deduplicator = Deduplicator(20, 1)
    first = list(deduplicator.filter([Document(LONG, "a")], Figures()))
    second = list(deduplicator.filter([Document(f"{LONG}\n\nmore", "b")], Figures()))
    assert [document.text for document in first + second] == [LONG, "more"]


def test_normalise_folds_compatible_forms():
    assert normalise("ﬁne\u00a0 ＡＢＣ\n") == "fine abc"
