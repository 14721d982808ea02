"""What is in a store, for people: a table with samples, and how well the domains can be told apart."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_testbed.data.manifest import describe_texts, tokens_per_byte
from moe_testbed.data.splits import SPLITS, TRAIN, VALIDATION
from moe_testbed.data.texts import ALL, MixTexts, labelled_documents
from moe_testbed.data.tokens.store import Store
from moe_testbed.data.tokens.tokenizer import load_tokenizer

CHUNK_BYTES = 512
MOST_CONFUSED = 5
LEFT_OUT = "left out, about"


def describe_store(store: Store, sample_characters: int = 200) -> str:
    """Returns a table of domains (documents, size, tokens, licence), what was left out, and a sample of each domain.

    Text that was left out, beyond the domain's cap or of a document too long, was not tokenised; its tokens are counted
    by those that a byte of the domain makes.
    """
    manifest = store.manifest
    rows = [("domain", "family", "documents", "MB", *(f"{split} tokens" for split in SPLITS), LEFT_OUT, "licence")]
    for name, domain in manifest["domains"].items():
        splits = domain["splits"]
        documents, size = (sum(splits[split][key] for split in SPLITS) for key in ("documents", "bytes"))
        cut = domain.get("left_out", {}).get("cut_bytes", 0)
        beyond = domain["deduplication"]["bytes_kept"] - size
        counts = [splits[split]["tokens"] for split in SPLITS] + [round((beyond + cut) * tokens_per_byte(domain))]
        told = (f"{count:,}" for count in counts)
        rows.append((name, domain["family"] or "", f"{documents:,}", f"{size / 1e6:.1f}", *told, domain["licence"]))
    lines = [str(store.path), f"{store.vocab_size} pieces, {len(store.tokens):,} tokens", "", *format_table(rows)]
    lines += _notes(manifest)
    for name in store.domains:
        text = next(decoded_documents(store, VALIDATION, name), "")
        lines += ["", f"--- {name}", text[:sample_characters]]
    return "\n".join(lines)


def describe_documents(texts: MixTexts, sample_characters: int = 200) -> str:
    """Returns what `describe_store` does for texts that no store is made of, such as an evaluation-only mix."""
    described = describe_texts(texts)
    rows: list[tuple[str, ...]] = [("domain", "family", "documents", "kB", "licence")]
    for name, domain in described["domains"].items():
        documents, size = (sum(split[key] for split in domain["splits"].values()) for key in ("documents", "bytes"))
        rows.append((name, domain["family"] or "", f"{documents:,}", f"{size / 1e3:.1f}", domain["licence"]))
    lines = format_table(rows) + _notes(described)
    for name, documents in labelled_documents(texts, ALL).items():
        lines += ["", f"--- {name}", documents[0].text[:sample_characters]]
    return "\n".join(lines)


def _notes(described: dict[str, Any]) -> list[str]:
    """Returns a line for each domain that is not there, and for each of which records or parts of them are missing."""
    lines = [f"dropped: {name}: {reason}" for name, reason in described["dropped"].items()]
    for name, domain in described["domains"].items():
        about = domain.get("left_out", {})
        if "unreadable_records" in about:
            lines.append(
                f"left out of {name}: {about['unreadable_records']:,} of {about['records']:,} records, which cannot be "
                f"read, first {about['first_unreadable'][0]}"
            )
        if "cut_documents" in about:
            tokens = f", about {about['cut_tokens']:,} tokens" if "cut_tokens" in about else ""
            lines.append(
                f"left out of {name}: the ends of long documents (documents: {about['cut_documents']:,}, "
                f"{about['cut_bytes']:,} bytes{tokens})"
            )
        if "mended_documents" in about:
            lines.append(f"mended in {name}: halves of surrogate pairs (documents: {about['mended_documents']:,})")
    return lines


def format_table(rows: list[tuple[str, ...]]) -> list[str]:
    """Returns lines with aligned columns: numbers to the right, words to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = [cell.replace(",", "").replace(".", "").isdigit() for cell in rows[-1]]
    return [
        "  ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in rows
    ]


@dataclass(frozen=True)
class DomainCheck:
    """How well a linear classifier tells the domains apart, chunk by chunk.

    accuracy: share of held-out chunks put into their domain (mean over domains); accuracy_D: by domain.
    confusion_DD: chunks of domain (row) put into domain (column).
    """

    domains: tuple[str, ...]
    accuracy: float
    accuracy_D: npt.NDArray[np.float64]
    confusion_DD: npt.NDArray[np.int64]

    def most_confused(self, pairs: int = MOST_CONFUSED) -> list[tuple[str, str, float]]:
        """Returns (domain, taken for, share of the domain's chunks), largest shares first, without those of zero."""
        shares_DD = self.confusion_DD / np.maximum(self.confusion_DD.sum(axis=1, keepdims=True), 1)
        np.fill_diagonal(shares_DD, 0.0)
        largest = np.argsort(-shares_DD, axis=None, kind="stable")[:pairs]
        cells = [divmod(int(cell), len(self.domains)) for cell in largest]
        return [(self.domains[i], self.domains[j], float(shares_DD[i, j])) for i, j in cells if shares_DD[i, j] > 0]

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("domain", "accuracy", "chunks")]
        for name, accuracy, row in zip(self.domains, self.accuracy_D, self.confusion_DD, strict=True):
            rows.append((name, f"{accuracy:.3f}", f"{row.sum():,}"))
        lines = [f"accuracy {self.accuracy:.4f} on held-out chunks of {CHUNK_BYTES} bytes", "", *format_table(rows), ""]
        confused = [f"  {true} taken for {taken}: {share:.2%}" for true, taken, share in self.most_confused()]
        return "\n".join(lines + (["most confused:", *confused] if confused else ["no chunk is confused"]))


def check_domains(store: Store, bytes_per_domain: int = 500_000, seed: int = 0) -> DomainCheck:
    """Trains a linear classifier on character 1-, 2- and 3-grams of training documents, tests it on validation ones.

    A low accuracy means that a router cannot be expected to find the domains either.
    """
    from sklearn.feature_extraction.text import HashingVectorizer
    from sklearn.linear_model import SGDClassifier
    from sklearn.metrics import confusion_matrix

    vectorizer = HashingVectorizer(analyzer="char", ngram_range=(1, 3), n_features=1 << 18, lowercase=False)
    train_texts, train_labels = _chunks(store, TRAIN, bytes_per_domain)
    test_texts, test_labels = _chunks(store, VALIDATION, bytes_per_domain)
    classifier: Any = SGDClassifier(random_state=seed, class_weight="balanced")
    classifier.fit(vectorizer.transform(train_texts), train_labels)
    predicted = classifier.predict(vectorizer.transform(test_texts))
    confusion_DD = confusion_matrix(test_labels, predicted, labels=range(len(store.domains))).astype(np.int64)
    accuracy_D = np.diag(confusion_DD) / np.maximum(confusion_DD.sum(axis=1), 1)
    return DomainCheck(store.domains, float(accuracy_D.mean()), accuracy_D, confusion_DD)


def decoded_documents(store: Store, split: str, domain: str) -> Iterator[str]:
    """Yields the texts of one (split, domain), decoded from the store."""
    tokenizer = load_tokenizer(store.tokenizer_path)
    region = store.region(split, domain)
    for document in range(region.first_document, region.end_document):
        start, end = store.document_starts[document : document + 2]
        yield tokenizer.decode(store.tokens[start : end - 1].tolist())


def _chunks(store: Store, split: str, max_bytes: int) -> tuple[list[str], list[int]]:
    """Pieces of CHUNK_BYTES of the text of every domain of a split (shorter where it ends), and their domains."""
    texts: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(store.domains):
        content = bytearray()
        for text in decoded_documents(store, split, name):
            content += text.encode() + b"\n\n"
            if len(content) >= max_bytes:
                break
        for start in range(0, min(len(content), max_bytes), CHUNK_BYTES):
            texts.append(content[start : start + CHUNK_BYTES].decode(errors="ignore"))
            labels.append(label)
    return texts, labels
