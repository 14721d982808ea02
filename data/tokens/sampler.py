"""Batches as a pure function of (mix, seed, step).

Draws are numbered through the whole run: step s uses draws [s * Q, (s + 1) * Q), with Q pieces in the batch of a step.
Draw n is from the domain that a periodic pattern gives (pattern.py). The j-th draw from a domain of n chunks takes
chunk permutation(j mod n) of epoch j // n, so that each epoch visits every chunk once. Chunk c of a domain covers its
tokens [c * p, c * p + p] with p the length of a piece: p inputs, and as many targets one further. The draws of a step
are shuffled over its rows. Nothing depends on ranks, workers or restarts: a rank takes its slice of the rows.

Shape legend: B sequences of a batch or of a part of it, L positions, Q pieces of sequences, X positions of a piece, D
domains.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from moe_testbed.data.errors import DataError
from moe_testbed.data.tokens.pattern import make_pattern, weights_of
from moe_testbed.data.tokens.permutation import key_of, permute, shuffled
from moe_testbed.data.tokens.store import Store

Int64 = npt.NDArray[np.int64]
Packing = Literal["single_domain", "packed"]


@dataclass(frozen=True)
class Batch:
    """Rows of a batch.

    token_ids_BL, targets_BL: piece numbers; the target is the next token of the text.
    domain_BL: domain number, -1 where the domain is unlabelled.
    document_BL: store-wide document number.
    position_BL: place in the sequence, 0 to L - 1.
    sequence_B: number of the sample, the same whichever rank reads it: step * global batch size + row.
    """

    token_ids_BL: Int64
    targets_BL: Int64
    domain_BL: Int64
    document_BL: Int64
    position_BL: Int64
    sequence_B: Int64


class Sampler:
    """Draws the training batches of one split of a store.

    packing: "single_domain": a sequence is one chunk of one domain; "packed": it is `pieces_per_sequence` chunks, each
    of any domain. domain_weights: domain -> share of the draws, relative; without it all are drawn equally often.
    Raises DataError if the arguments do not fit each other or the store.
    """

    def __init__(
        self,
        store: Store,
        split: str = "train",
        *,
        sequence_length: int,
        batch_size: int,
        seed: int,
        packing: Packing = "single_domain",
        pieces_per_sequence: int = 4,
        domain_weights: Mapping[str, float] | None = None,
    ) -> None:
        if min(sequence_length, batch_size, pieces_per_sequence) < 1 or seed < 0:
            raise DataError(
                f"sequence_length ({sequence_length}), batch_size ({batch_size}) and pieces_per_sequence "
                f"({pieces_per_sequence}) must be at least 1, seed ({seed}) at least 0"
            )
        self.pieces = pieces_per_sequence if packing == "packed" else 1
        if sequence_length % self.pieces:
            raise DataError(
                f"sequence_length {sequence_length} cannot be cut into {self.pieces} equal pieces: "
                "make it a multiple of pieces_per_sequence"
            )
        self.store = store
        self.batch_size = batch_size
        self.seed = seed
        self.sequence_length = sequence_length
        self.pattern = make_pattern(weights_of(store.domains, domain_weights, store.manifest["dropped"]))
        piece_length = sequence_length // self.pieces
        self.starts_D = np.array([region.first_token for region in store.regions[split]], dtype=np.int64)
        self.chunks_D = np.array([chunk_count(store, split, d, piece_length) for d in range(len(store.domains))])
        self.labels_D = np.array(store.labels, dtype=np.int64)

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> Batch:
        """Returns rows [start, stop) of the batch of a step; all rows if stop is None. O(batch) whatever the step."""
        return self.rows(step, np.arange(start, self.batch_size if stop is None else stop, dtype=np.int64))

    def rows(self, step: int, rows_B: Int64) -> Batch:
        """Returns the rows of these numbers of the batch of a step. Few calls for many rows take less time than many
        for few."""
        pieces_of_step = self.batch_size * self.pieces
        place_Q = (rows_B[:, None] * self.pieces + np.arange(self.pieces)).reshape(-1)
        order_Q = shuffled(pieces_of_step, key_of(self.seed, step))[place_Q]
        domain_Q, draw_Q = self.pattern.draw(step * pieces_of_step + order_Q)
        epoch_Q, index_Q = np.divmod(draw_Q, self.chunks_D[domain_Q])
        chunk_Q = permute(index_Q, self.chunks_D[domain_Q], key_of(self.seed, domain_Q, epoch_Q))
        sequence_B = step * self.batch_size + rows_B
        return gather(self.store, self.starts_D, self.labels_D, domain_Q, chunk_Q, sequence_B, self.sequence_length)


def chunk_count(store: Store, split: str, domain: int, length: int) -> int:
    """Counts the chunks of `length` tokens and one further in a region. Raises DataError if there is none."""
    tokens = len(store.tokens_of(split, domain))
    if tokens <= length:
        raise DataError(
            f"domain '{store.domains[domain]}' has {tokens:,} tokens in the split '{split}', too few for a sequence of "
            f"{length}: shorten the sequences or enlarge the split"
        )
    return (tokens - 1) // length


def gather(
    store: Store,
    starts_D: Int64,
    labels_D: Int64,
    domain_Q: Int64,
    chunk_Q: Int64,
    sequence_B: Int64,
    sequence_length: int,
) -> Batch:
    """Reads the pieces, and lays those of a sequence side by side."""
    rows = len(sequence_B)
    piece_length = sequence_length * rows // max(len(domain_Q), 1)
    first_Q = starts_D[domain_Q] + chunk_Q * piece_length
    place_QX = first_Q[:, None] + np.arange(piece_length, dtype=np.int64)
    shape = (rows, sequence_length)
    return Batch(
        token_ids_BL=store.tokens[place_QX].astype(np.int64).reshape(shape),
        targets_BL=store.tokens[place_QX + 1].astype(np.int64).reshape(shape),
        domain_BL=np.repeat(labels_D[domain_Q], piece_length).reshape(shape),
        document_BL=store.document_of(place_QX).reshape(shape),
        position_BL=np.tile(np.arange(sequence_length, dtype=np.int64), (rows, 1)),
        sequence_B=sequence_B,
    )
