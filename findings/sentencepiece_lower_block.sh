#!/usr/bin/env bash
# SentencePiece turns U+2581 in a text into a space, even with byte fallback and without normalisation.
#
# Seen with    sentencepiece 0.2.3, Python 3.11, Linux, 2026-11-30
# Input        a model with the identity normalisation, byte fallback, kept whitespace and no dummy prefix, so that
#              decode(encode(text)) returns every other text unchanged; the text holds U+2581 (LOWER ONE EIGHTH BLOCK),
#              which bars drawn with characters use
# Expected     the character comes back, by its bytes if need be
# Seen         it comes back as a space; all its neighbours from U+2580 to U+2588 come back as they are
# Status       0 this is still so; 1 it has changed; 2 it could not be tried
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT && cd "$folder"
"${PYTHON:-python3}" -m venv venv && venv/bin/pip install --quiet sentencepiece==0.2.3 || exit 2

cat > try.py <<'PY'
import io

import sentencepiece

model = io.BytesIO()
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["the quick brown fox jumps over the lazy dog"] * 50),
    model_writer=model,
    model_type="bpe",
    vocab_size=300,
    hard_vocab_limit=False,
    byte_fallback=True,
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    add_dummy_prefix=False,
    minloglevel=2,
)
tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
for code in range(0x2580, 0x2589):
    text = f"load {chr(code)}  end"
    decoded = tokenizer.decode(tokenizer.encode(text))
    print(f"U+{code:04X}", "unchanged" if decoded == text else ascii(decoded))
PY
venv/bin/python try.py > seen 2> log || { cat log >&2; exit 1; }

diff -u - seen <<'SEEN'
U+2580 unchanged
U+2581 'load    end'
U+2582 unchanged
U+2583 unchanged
U+2584 unchanged
U+2585 unchanged
U+2586 unchanged
U+2587 unchanged
U+2588 unchanged
SEEN
