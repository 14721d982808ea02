"""Loads an export as anybody would, and compares it with the run that it was made of.

Shape legend: B sequences, L positions, V token ids.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_testbed.data.objectives import SpecialIds
from moe_testbed.data.splits import SPLITS
from moe_testbed.data.tokens.store import Store
from moe_testbed.data.tokens.tokenizer import load_tokenizer
from moe_testbed.launcher.errors import CheckpointError
from moe_testbed.launcher.export.card import auto_class
from moe_testbed.model.config import DECODER, ENCODER
from moe_testbed.model.decoding.greedy import unlabelled
from moe_testbed.model.language_model import LanguageModel
from moe_testbed.routing.records import RoutingContext

TOLERANCE = 1e-5
"""Of the largest logit, or of 1: that much float32 may differ by another order of the same sums."""

# A token whose router is all but undecided may get another expert by rounding, and its sequence another output.
_AGREEING = {True: 0.75, False: 1.0}
_SEQUENCES = 8
_DOCUMENTS, _CHARACTERS = 8, 4_000
_HARD_TEXTS = ("", " ", "  a   b ", "\n\n\t\r\n", "\0\x7f", "日本語 🙂 e\u0301 \u00a0\u200b", "</s><s><unk> aaaaaaaaa")


def refuse_unlike(folder: Path, model: LanguageModel, ids: SpecialIds, lengths: dict[str, int], is_own: bool) -> None:
    """Raises CheckpointError if the model in a folder computes other logits than the run's.

    Args:
        ids: the special ids of the run's model.
        lengths: stack -> tokens of the longest text that it has seen.
        is_own: the class lies beside the weights.
    """
    import transformers

    load = getattr(transformers, auto_class(model.config.architecture)).from_pretrained
    # Nothing is downloaded: the code beside the weights was written here, a moment ago.
    loaded, info = load(folder, trust_remote_code=is_own, dtype=torch.float32, output_loading_info=True)
    if is_own:
        # transformers has copied the code under the folder's name, which is not the last one.
        copied = type(loaded).__module__.split(".")[1]
        shutil.rmtree(Path(transformers.utils.HF_MODULES_CACHE) / "transformers_modules" / copied, ignore_errors=True)
    wrong = [f"{len(info[key])} {key.replace('_', ' ')}, such as {min(info[key])}" for key in info if info[key]]
    if wrong:
        raise CheckpointError(f"the export would load wrong: transformers finds {'; '.join(wrong)}; nothing is written")
    context = random_texts(model, ids, lengths)
    with torch.no_grad():
        ours_BLV = model.logits(context)
        theirs_BLV = loaded.eval()(**arguments(context)).logits[..., : ours_BLV.shape[-1]]
    valid_BL = torch.ones_like(context.token_ids_BL) if context.valid_BL is None else context.valid_BL
    difference_B = ((ours_BLV - theirs_BLV).abs().amax(-1) * valid_BL).amax(-1)
    largest = float(ours_BLV.abs().max())
    agreeing = (difference_B <= TOLERANCE * max(1.0, largest)).double().mean()
    if float(agreeing) < _AGREEING[model.config.num_moe_layers > 0]:
        raise CheckpointError(
            f"the export would load wrong: its logits differ from the run's by up to {float(difference_B.max()):.3g}, "
            f"of up to {largest:.3g}; nothing is written"
        )


def random_texts(model: LanguageModel, ids: SpecialIds, lengths: dict[str, int]) -> RoutingContext:
    """Returns texts of pieces at random, the same each time, of all lengths up to the longest with padding behind."""
    generator = torch.Generator().manual_seed(1)
    context: RoutingContext | None = None
    for name in model.config.stacks:
        length = lengths[name]
        tokens_BL = torch.randint(0, ids.pieces, (_SEQUENCES, length), generator=generator)
        if name == ENCODER and model.config.architecture == "encoder":
            tokens_BL[:, ::3] = ids.mask
        if name == DECODER and context is not None:
            tokens_BL[:, 0] = ids.start
        texts_B = torch.linspace(length, 1, _SEQUENCES).long()
        context = unlabelled(tokens_BL, torch.arange(length) < texts_B[:, None], context)
    assert context is not None, "a model has a stack"
    return context


def arguments(context: RoutingContext) -> dict[str, Tensor]:
    """Returns the same texts as a model of transformers is given them."""
    if context.encoder is None:
        return _named(context, "")
    return _named(context.encoder, "") | _named(context, "decoder_")


def _named(context: RoutingContext, prefix: str) -> dict[str, Tensor]:
    named = {f"{prefix}input_ids": context.token_ids_BL}
    return named if context.valid_BL is None else named | {f"{prefix}attention_mask": context.valid_BL.long()}


def refuse_other_tokens(folder: Path, store: Store, is_own: bool) -> None:
    """Raises CheckpointError if the tokenizer in a folder gives texts of the mix other ids than the mix's own."""
    import transformers

    # It reads the model's config too, and would ask whether it may.
    theirs: Any = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=is_own)
    ours = load_tokenizer(store.tokenizer_path)
    for text in (*_HARD_TEXTS, *_texts(store)):
        if theirs(text, add_special_tokens=False).input_ids != ours.encode(text):
            raise CheckpointError(
                f"the export would load wrong: transformers' tokenizer gives other ids to {text[:60]!r} than "
                f"{store.tokenizer_path}; nothing is written"
            )


def _texts(store: Store) -> Iterator[str]:
    """Yields the beginnings of some documents of every domain."""
    tokenizer = load_tokenizer(store.tokenizer_path)
    for split in SPLITS:
        for region in store.regions[split]:
            for document in range(region.first_document, min(region.end_document, region.first_document + _DOCUMENTS)):
                first, end = store.document_starts[document : document + 2]
                yield tokenizer.decode(store.tokens[first : min(end - 1, first + _CHARACTERS)].tolist())
