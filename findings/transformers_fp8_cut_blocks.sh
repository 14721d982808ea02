#!/usr/bin/env bash
# transformers takes fp8 weights for blocks of another size where the last block is cut off: some are read wrongly, others not at all.
#
# Seen with    transformers 5.23.0, accelerate 1.15.0, torch 2.13.0, Python 3.11, Linux, 2026-11-30
# Input        a small Llama in float8 with a scale for each block of 128 x 128 (weight_block_size in config.json), as
#              DeepSeek-V3 is published; gate_proj has 256, 192 or 576 rows, hence 2, 2 or 5 rows of scales. DeepSeek-V3's own
#              kv_a_proj_with_mqa has 576 rows. It is loaded with dequantize=True
# Expected     each weight times the scale of its block
# Seen         256 rows: so. 192 rows: without a word, rows 96 to 127 get the scale of the next block, since a block is taken to
#              have 192 / 2 rows. 576 rows: an error, since 5 does not divide 576
# Status       0 this is still so; 1 it has changed; 2 it could not be tried
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT && cd "$folder"
"${PYTHON:-python3}" -m venv venv && venv/bin/pip install --quiet torch==2.13.0 numpy==2.2.6 || exit 2
venv/bin/pip install --quiet transformers==5.23.0 accelerate==1.15.0 safetensors==0.8.0 || exit 2

cat > try.py <<'PY'
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

logging.set_verbosity(logging.CRITICAL)
logging.disable_progress_bar()
BLOCK = 128
NAME = "model.layers.0.mlp.gate_proj.weight"


def write(folder, rows):
    """A Llama whose gate_proj has so many rows, quantised in blocks of 128 x 128 as DeepSeek publishes its models."""
    sizes = dict(vocab_size=64, hidden_size=128, intermediate_size=rows, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, head_dim=64, num_key_value_heads=2)).to(torch.bfloat16).save_pretrained(folder)
    weights, plain = load_file(f"{folder}/model.safetensors"), {}
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        weight = weights[name].float()
        counts = [-(-size // BLOCK) for size in weight.shape]
        # A scale for each block, the last of which may be cut off.
        scales = torch.arange(1.0, 1 + counts[0] * counts[1]).reshape(counts)
        each = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[: weight.shape[0], : weight.shape[1]]
        weights[name] = (weight / each).to(torch.float8_e4m3fn)
        weights[name.replace(".weight", ".weight_scale_inv")] = scales
        plain[name] = weights[name].float() * each
    save_file(weights, f"{folder}/model.safetensors", {"format": "pt"})
    path = Path(folder, "config.json")
    quantised = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantised}))
    return plain


for rows in (256, 192, 576):
    plain = write(f"model{rows}", rows)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            f"model{rows}", dtype=torch.float32, quantization_config=FineGrainedFP8Config(dequantize=True)
        )
    except Exception as error:
        print(f"{rows} rows: not loaded, {type(error).__name__}")
        continue
    differs = (model.state_dict()[NAME] - plain[NAME]).abs().amax(1) > 1e-2 * plain[NAME].abs().amax()
    wrong = differs.nonzero().flatten().tolist()
    print(f"{rows} rows: loaded,", f"rows {wrong[0]} to {wrong[-1]} are wrong" if wrong else "all are right")
PY
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 venv/bin/python try.py > seen 2> log || { cat log >&2; exit 1; }

diff -u - seen <<'SEEN'
256 rows: loaded, all are right
192 rows: loaded, rows 96 to 127 are wrong
576 rows: not loaded, RuntimeError
SEEN
