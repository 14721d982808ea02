"""The text of HTML pages, without their markup."""

from collections.abc import Iterator
from html.parser import HTMLParser

from pydantic import Field

from moe_testbed.data.readers.base import WholeFile, reader_kinds

HIDDEN = frozenset({"script", "style", "template", "title"})
BLOCKS = frozenset({"blockquote", "dd", "div", "dt", "h1", "h2", "h3", "h4", "h5", "h6", "li", "p", "pre", "td", "th"})


@reader_kinds.register("html_text")
class HtmlText(WholeFile):
    """Reads what a browser would show; a block (heading, paragraph, list item) is a paragraph.

    With `document_tags` every outermost element of these kinds is a document and the rest of the page is left out;
    without, the page is one document. UTF-8 only.
    """

    kind: str = "html_text"
    document_tags: tuple[str, ...] = Field(default=(), description="for example [article]")

    def texts(self, content: bytes) -> Iterator[str]:
        collector = Collector(frozenset(self.document_tags))
        collector.feed(content.decode("utf-8-sig"))
        collector.close()
        found = False
        for paragraphs in collector.documents:
            words = [" ".join(paragraph.split()) for paragraph in paragraphs]
            if any(words):
                found = True
                yield "\n\n".join(filter(None, words))
        if not found:
            tags = " or ".join(f"<{tag}>" for tag in self.document_tags)
            raise ValueError(f"the page has no text{f' in {tags}' if tags else ''}")


class Collector(HTMLParser):
    """Gathers `documents`: the paragraphs of each, white space as in the file."""

    def __init__(self, document_tags: frozenset[str]) -> None:
        super().__init__()
        self.document_tags = document_tags
        self.documents: list[list[str]] = [] if document_tags else [[""]]
        self.open_documents = 0
        self.open_hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.document_tags:
            self.open_documents += 1
            if self.open_documents == 1:
                self.documents.append([""])
        self.open_hidden += tag in HIDDEN
        self._end_paragraph(tag)
        if tag == "br":
            self.handle_data("\n")

    def handle_endtag(self, tag: str) -> None:
        self._end_paragraph(tag)
        if tag in self.document_tags:
            self.open_documents = max(0, self.open_documents - 1)
        if tag in HIDDEN:
            self.open_hidden = max(0, self.open_hidden - 1)

    def handle_data(self, data: str) -> None:
        if not self.open_hidden and (self.open_documents or not self.document_tags):
            self.documents[-1][-1] += data

    def _end_paragraph(self, tag: str) -> None:
        if tag in BLOCKS and self.documents:
            self.documents[-1].append("")
