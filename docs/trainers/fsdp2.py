"""MetaRM under FSDP2: weights, gradients, AdamW's moments and the copy of theta are sharded.

    torchrun --nproc_per_node 2 docs/trainers/fsdp2.py

|grad J| is taken over all shards. The trap: after a forward without a backward (an evaluation, say)
FSDP2's modules hold gathered weights; `lookahead` reshards them on entry and on exit. FSDP1 cannot
tell |grad J|, so normalize=True is refused there.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import metarm

gpu = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
if gpu:  # before all else: what names no device of its own would go to cuda:0, in every process
    torch.cuda.set_device(device)
dist.init_process_group("nccl" if gpu else "gloo")
rank, world = dist.get_rank(), dist.get_world_size()

torch.manual_seed(0)  # the same weights everywhere; a toy network stands for the reward model
model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
model.to(device)
mesh = init_device_mesh(device.type, (world,))
for layer in model:  # of a transformers model: model.model.layers
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)  # after fully_shard: of the shards


def L(X_t):  # Eq. 1: n pairs (chosen, rejected) of 6 features -> scalar
    chosen, rejected = model(X_t.flatten(0, 1)).view(-1, 2).unbind(dim=1)
    return -torch.nn.functional.logsigmoid(chosen - rejected).mean()


def J(X_s):  # Eq. 2: m prompts, k responses each -> scalar
    return metarm.difference_loss(model(X_s.flatten(0, 1)).view(len(X_s), -1))


for step in range(3):
    X_t, X_s = torch.randn(8, 2, 6), torch.randn(4, 5, 6)  # the same everywhere: same seed
    X_t, X_s = X_t[rank::world].to(device), X_s[rank::world].to(device)  # shares of EQUAL size
    optimizer.zero_grad()
    J(X_s).backward()
    with metarm.lookahead(model, eta=0.02, normalize=True):  # at theta', every process its shards
        loss = L(X_t)
        loss.backward()
    optimizer.step()
    if rank == 0:
        print(f"step {step}: L at theta', on this process's share: {loss.item():.4f}")
dist.destroy_process_group()
