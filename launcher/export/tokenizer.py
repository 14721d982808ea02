"""A mix's tokenizer as one of transformers': the same merges, bytes for what is no piece, nothing normalised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_testbed.data.objectives import SpecialIds
from moe_testbed.data.tokens.tokenizer import END_OF_DOCUMENT, load_tokenizer

PADDING, END, START, MASK = "<|padding|>", "<|end|>", "<|start|>", "<|mask|>"
"""How special tokens are written. They are split off wherever they stand in a text, and so are unlike what stands in
one; the pieces 0 and 1 are called otherwise in the mix's tokenizer, where no text can have them."""

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""How the mix's tokenizer writes a space in its pieces."""


def make_tokenizer(path: Path, architecture: str, ids: SpecialIds, length: int) -> Any:
    """Returns transformers' tokenizer with the ids of a sentencepiece model, and with special tokens after them.

    Args:
        path: the sentencepiece model.
        architecture: that of the model: a causal one has no special tokens of its own.
        ids: numbers of the special tokens.
        length: tokens of the longest text.
    """
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    sentencepiece = load_tokenizer(path)
    count = sentencepiece.get_piece_size()
    pieces = [sentencepiece.id_to_piece(number) for number in range(count)]
    pieces[0], pieces[END_OF_DOCUMENT] = PADDING, END
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    mergeable = {
        pieces[number]
        for number in range(END_OF_DOCUMENT + 1, count)
        if not (sentencepiece.is_byte(number) or sentencepiece.is_control(number))
    }
    # sentencepiece joins two neighbours wherever a piece comes of it, the piece of the highest score first.
    by_score = sorted(mergeable, key=lambda piece: -sentencepiece.get_score(vocabulary[piece]))
    merges = [
        (piece[:place], piece[place:])
        for piece in by_score
        for place in range(1, len(piece))
        if piece[:place] in mergeable and piece[place:] in mergeable
    ]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token=PADDING, fuse_unk=False)
    )
    tokenizer.normalizer = tokenizers.normalizers.Replace(" ", SPACE)
    decoders = tokenizers.decoders
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    special = {"unk_token": PADDING, "pad_token": PADDING, "eos_token": END, "bos_token": END}
    if architecture != "causal":
        sentinels = [f"<|gap_{number}|>" for number in range(ids.sentinels)]
        tokenizer.add_special_tokens([*sentinels, START, MASK])
        assert [tokenizer.token_to_id(token) for token in (START, MASK)] == [ids.start, ids.mask]
        special |= {"mask_token": MASK}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=length,
        clean_up_tokenization_spaces=False,
        padding_side="left" if architecture == "causal" else "right",
        model_input_names=["input_ids", "attention_mask"],
        **special,
    )
