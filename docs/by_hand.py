"""One step of Algorithm 1 in numbers that can be checked with a pencil: python docs/by_hand.py

The reward is linear in three features of a response, r = theta . x; S is one prompt with three
responses, D two pairs. In S the better answers are the longer ones. Pair A prefers a SHORT answer.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import metarm

torch.set_default_dtype(torch.float64)
theta = torch.tensor([1.0, 0, 0])  # features: on topic, length, politeness
model = torch.nn.Linear(3, 1, bias=False)
model.weight.data[0] = theta
S = torch.tensor([[0.0, 0, 0], [1, 1, 0], [2, 3, 0]])  # rewards 0, 1, 2
D = torch.tensor([[1.0, -2, 0], [1, 0, 1]])  # A and B: features of the chosen minus the rejected
eta, alpha = 5.0, 1.0


def J(forward):  # Eq. 2, one prompt
    return metarm.difference_loss(forward(S).view(1, 3))


def L(forward):  # Eq. 1; a pair's part in its gradient is -(1 - sigma(margin)) * features / 2
    return -torch.nn.functional.logsigmoid(forward(D)).mean()


def gradient(eta, order="first"):
    return metarm.meta_gradient(model, L, J, eta, order)[0]["weight"][0]


def show(name, *values):
    print(f"{name:43}" + "".join(f"{float(value):8.3f}" for value in values))


grad_J = metarm.meta_gradient(model, J, J, eta=0.0)[0]["weight"][0]  # at eta = 0, theta' is theta
theta_prime = metarm.adapted_parameters(model, J, eta)["weight"][0]
plain, first, exact = gradient(0.0), gradient(eta), gradient(eta, "exact")
new = theta - alpha * first

show("theta: on topic, length, politeness", *theta)
show("grad J", *grad_J)
show("theta' = theta + 5 grad J", *theta_prime)
for pair, x in zip("AB", D, strict=True):
    for name, at in (("theta:", theta), ("theta':", theta_prime)):
        show(f"pair {pair} at {name:7} margin, 1 - sigma(margin)", at @ x, 1 - (at @ x).sigmoid())
show("grad L . grad J (> 0: the climb raises L)", plain @ grad_J)
for name, loss in (("L", L), ("J", J)):
    losses = [loss(lambda x, at=at: x @ at) for at in (theta, theta_prime, new)]
    show(f"{name} at theta, theta', new theta", *losses)
show("gradient of L at theta", *plain)
show("    at theta' (first order)", *first)
show("    through theta' (exact)", *exact)
show("new theta = theta - 1 x first order", *new)
