"""One step of Algorithm 1 in numbers that can be checked with a pencil: python docs/by_hand.py

The reward is linear in three features of a response, r = theta . x; S is one prompt with three
responses; in S the better answers are the longer ones. D has two pairs, A and B. A prefers a SHORT
answer: climbing J raises L, and A gets more weight. A second D has one pair, C, which prefers a
longer answer: climbing J lowers its L, and C gets less weight. Both occur in training.
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
second_D = torch.tensor([[1.0, 1, 0]])  # C
eta, alpha = 5.0, 1.0


def J(forward):  # Eq. 2, one prompt
    return metarm.difference_loss(forward(S).view(1, 3))


def L(forward, pairs=D):  # Eq. 1; a pair's part in its gradient is -(1 - sigma(margin)) * x / n
    return -torch.nn.functional.logsigmoid(forward(pairs)).mean()


def second_L(forward):
    return L(forward, second_D)


def show(name, *values):
    print(f"{name:43}" + "".join(f"{float(value):8.3f}" for value in values))


grad_J = metarm.gradient(model, J)[0]["weight"][0]  # all of these: (3,)
plain = metarm.gradient(model, L)[0]["weight"][0]
second_plain = metarm.gradient(model, second_L)[0]["weight"][0]
theta_prime = metarm.adapted_parameters(model, J, eta)["weight"][0]
first = metarm.meta_gradient(model, L, J, eta)[0]["weight"][0]
exact = metarm.meta_gradient(model, L, J, eta, "exact")[0]["weight"][0]
new = theta - alpha * first  # after a step on A and B
second_new = theta - alpha * metarm.meta_gradient(model, second_L, J, eta)[0]["weight"][0]

for number, x in enumerate(S, 1):
    show(f"S, response {number}" + ": on topic, length, politeness" * (number == 1), *x)
for pair, x in zip("ABC", [*D, *second_D], strict=True):
    show(f"pair {pair}" + ": chosen minus rejected" * (pair == "A"), *x)
show("theta", *theta)
show("grad J", *grad_J)
show("theta' = theta + 5 grad J", *theta_prime)
for pair, x in zip("ABC", [*D, *second_D], strict=True):
    margins = [at @ x for at in (theta, theta_prime)]
    text = ": margin at theta, theta'; 1 - sigma" * (pair == "A")
    show(f"pair {pair}{text}", *margins, *[1 - margin.sigmoid() for margin in margins])
show("A, B: grad L . grad J", plain @ grad_J)  # > 0: the climb raises L
show("C: grad L . grad J", second_plain @ grad_J)  # < 0: it lowers L
for name, loss, end in (("L of A, B", L, new), ("L of C", second_L, second_new), ("J", J, new)):
    losses = [loss(lambda x, at=at: x @ at) for at in (theta, theta_prime, end)]
    show(f"{name} at theta, theta', new theta", *losses)
show("gradient of L of A, B: at theta", *plain)
show("    at theta' (first order)", *first)
show("    through theta' (exact order)", *exact)
show("new theta (alpha = 1) after A, B", *new)
