"""How much memory does `moe-testbed analyze` take for n and 4 n tokens of a tiny random Mixtral?

    python benchmarks/checkpoint_memory.py [N]

N passages of 512 tokens a domain, 64 unless said otherwise. The text is made here; nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

LETTERS = "abcdefghijklmnopqrstuvwxyz"
DOMAINS = 4
LENGTH = 512


def write_checkpoint(folder: Path) -> None:
    """Writes a Mixtral of 2 layers with 32 experts, and a tokenizer of single letters."""
    import torch
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, **{letter: 1 + n for n, letter in enumerate(LETTERS)}}, "<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder)
    torch.manual_seed(1)
    config = MixtralConfig(
        vocab_size=1 + len(LETTERS),
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=32,
    )
    MixtralForCausalLM(config).save_pretrained(folder)


def write_mix(folder: Path, passages: int) -> Path:
    """Writes random letters for so many passages a domain, the same text whatever part is read; returns the mix."""
    generator = random.Random(1)
    domains = {}
    for number in range(DOMAINS):
        text = "".join(generator.choices(LETTERS, k=passages * LENGTH * 4))
        (folder / f"{number}.txt").write_text(text)
        domains[f"domain{number}"] = {"sources": [{"kind": "files", "glob": str(folder / f"{number}.txt")}]}
    mix = folder / "mix.yaml"
    mix.write_text(json.dumps({"name": "letters", "evaluation_only": True, "domains": domains}))
    return mix


def measure(folder: Path, mix: Path, passages: int) -> dict[str, int]:
    """Returns the tokens, and the largest resident size of the process in bytes."""
    out = folder / f"report{passages}"
    command = [sys.executable, "-m", "moe_testbed.launcher", "analyze", "--checkpoint", str(folder / "model")]
    command += ["--mix", str(mix), "--out", str(out), "--sequences-per-domain", str(passages), "--device", "cpu"]
    command += ["--cache-dir", str(folder / "cache")]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    summary = json.loads((out / "model-seed1" / "summary.json").read_text())
    return {"tokens": summary["evaluated_tokens"], "bytes": summary["peak_memory_bytes"]}


def main() -> None:
    passages = int(sys.argv[1]) if len(sys.argv) > 1 else 64
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(folder / "model")
        mix = write_mix(folder, 4 * passages)
        measure(folder, mix, 1)  # fills the cache of the text
        few, many = measure(folder, mix, passages), measure(folder, mix, 4 * passages)
    for found in (few, many):
        print(f"{found['tokens']:>9,} tokens  {found['bytes'] / 1e6:8.1f} MB")
    print(f"{many['bytes'] / few['bytes']:.3f} x the memory for {many['tokens'] / few['tokens']:.2f} x the tokens")
    told = " and ".join(f"{found['bytes'] / 1e6:.1f} MB for {found['tokens']:,} tokens" for found in (few, many))
    print(json.dumps({"figures": {"checkpoint_memory": told}}))


if __name__ == "__main__":
    main()
