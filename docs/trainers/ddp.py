"""MetaRM under DistributedDataParallel: each process takes its share of D and of S.

    torchrun --nproc_per_node 2 docs/trainers/ddp.py

DDP averages grad J over the processes, so all climb to the same theta', and then grad L there.
The trap: S's last backward must not be under `no_sync()`, or each process climbs its own way.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

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
ddp = torch.nn.parallel.DistributedDataParallel(model.to(device))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)


def L(X_t):  # Eq. 1: n pairs (chosen, rejected) of 6 features -> scalar
    chosen, rejected = ddp(X_t)[..., 0].unbind(dim=1)
    return -torch.nn.functional.logsigmoid(chosen - rejected).mean()


def J(X_s):  # Eq. 2: m prompts, k responses each -> scalar
    return metarm.difference_loss(ddp(X_s)[..., 0])


for step in range(3):
    X_t, X_s = torch.randn(8, 2, 6), torch.randn(4, 5, 6)  # the same everywhere: same seed
    X_t, X_s = X_t[rank::world].to(device), X_s[rank::world].to(device)  # shares of EQUAL size
    optimizer.zero_grad()
    J(X_s).backward()
    with metarm.lookahead(ddp, eta=0.02, normalize=True):  # at theta', the same everywhere
        loss = L(X_t)
        loss.backward()
    optimizer.step()
    if rank == 0:
        print(f"step {step}: L at theta', on this process's share: {loss.item():.4f}")
dist.destroy_process_group()
