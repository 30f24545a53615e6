"""One process of a distributed run: python ddp_run.py FOLDER BATCH, under torchrun or alone."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
import zoo
from helpers import make_trainer, random_direction

from persona_vectors.steering.add import steer

folder, size = Path(sys.argv[1]), int(sys.argv[2])
model = zoo.build("llama")
options = {"ddp_backend": "gloo"} if "RANK" in os.environ else {}
trainer = make_trainer(model, folder, per_device_train_batch_size=size, optim="sgd", **options)
with steer(model, random_direction(model), layer=1, coef=3.0, positions="labels"):
    trainer.train()
if int(os.environ.get("RANK", 0)) == 0:
    torch.save({"processes": trainer.args.world_size, "weights": model.state_dict()}, folder / "end.pt")
