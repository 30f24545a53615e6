"""One process of a run over shards of a model, or of one that is whole: python sharded_run.py MODEL OUT."""

import os
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

import persona_vectors as pv
from persona_vectors.model.blocks import decoder_layers

folder, out, rank = sys.argv[1], Path(sys.argv[2]), os.environ.get("RANK")
out.mkdir(exist_ok=True)
model, tokenizer = pv.load_model(folder, device="cpu", tp_plan=rank and "auto")
weight = decoder_layers(model)[0].mlp.up_proj.weight
assert rank is None or (isinstance(weight, DTensor) and 2 * weight.to_local().shape[0] == weight.shape[0])
options = {"judge": None, "samples": 2, "first": 2, "max_new_tokens": 6, "min_pairs": 1}
vector = pv.extract(model, tokenizer, pv.Trait.from_personas("pirate", "banker"), rollouts=out / "r.jsonl", **options)
vector.save(out / "v.safetensors")
with pv.steer(model, vector, layer=1, coef=2.0):
    (out / f"steered-{rank or 0}").write_text(str(pv.generate(model, tokenizer, "Hi", max_new_tokens=5)))
if rank is not None:
    torch.distributed.destroy_process_group()
