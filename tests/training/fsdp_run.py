"""One process that trains blocks sharded by FSDP2: python fsdp_run.py FOLDER, under torchrun."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
import torch.distributed as dist
import zoo
from helpers import random_direction, rows
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import default_collate

from persona_vectors.model.blocks import decoder_layers
from persona_vectors.steering.add import steer

dist.init_process_group("gloo")
rank, model = dist.get_rank(), zoo.build("llama")
vector = random_direction(model)
for block in decoder_layers(model):
    fully_shard(block)
fully_shard(model)
optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
batch = default_collate(rows(8)[rank::2])
with steer(model, vector, layer=1, coef=3.0, positions="labels"):
    for _ in range(4):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
sharded = any(isinstance(p, DTensor) and p.to_local().shape != p.shape for p in model.parameters())
weights = {name: value.full_tensor() for name, value in model.state_dict().items()}
if rank == 0:
    torch.save({"sharded": sharded, "weights": weights}, Path(sys.argv[1]) / "end.pt")
dist.destroy_process_group()
