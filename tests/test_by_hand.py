"""docs/by_hand.py: its numbers are those of the closed forms, and README quotes them."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent


def sigmoid(x):
    return 1 / (1 + np.exp(-np.array(x)))


def test_numbers():
    command = [sys.executable, str(ROOT / "docs" / "by_hand.py")]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = [re.findall(r"(?<!\S)-?\d\.\d{3}", line) for line in output.splitlines()]
    theta, D = np.array([1.0, 0, 0]), np.array([[1, -2, 0], [1, 0, 1]])
    C = np.array([[1, 1, 0]])
    S = np.array([[0, 0, 0], [1, 1, 0], [2, 3, 0]])
    differences = np.array([S[1] - S[0], S[2] - S[1], S[2] - S[0]])  # rewards differ by 1, 1, 2
    s = sigmoid(differences @ theta)
    grad_J = 2 / 9 * (s * (1 - s)) @ differences
    hessian_J = 2 / 9 * np.einsum("p,pi,pj", s * (1 - s) * (1 - 2 * s), differences, differences)
    theta_prime = theta + 5 * grad_J
    plain, plain_C = (-(1 - sigmoid(x @ theta)) @ x / len(x) for x in (D, C))
    first, first_C = (-(1 - sigmoid(x @ theta_prime)) @ x / len(x) for x in (D, C))
    exact = first + 5 * hessian_J @ first
    new = theta - first

    def L(at, pairs=D):
        return np.log(1 + np.exp(-pairs @ at)).mean()

    def J(at):
        return 2 / 9 * sigmoid(np.abs(differences @ at)).sum()

    three, three_of_C = ((theta, theta_prime, end) for end in (new, theta - first_C))
    expected = [*S, *D, *C, theta, grad_J, theta_prime]
    for x in (*D, *C):
        margins = [x @ theta, x @ theta_prime]
        expected.append([*margins, *[1 - sigmoid(margin) for margin in margins]])
    expected += [[plain @ grad_J], [plain_C @ grad_J]]
    expected += [[L(at) for at in three], [L(at, C) for at in three_of_C], [J(at) for at in three]]
    expected += [plain, first, exact, new]
    assert lines == [[f"{x:.3f}" for x in row] for row in expected]
    # The story: the climb raises L, and the pair that it hurts gains weight. Of C's the reverse.
    hurt, helped = (1 - sigmoid(D @ theta_prime)) / (1 - sigmoid(D @ theta))
    assert plain @ grad_J > 0 and L(theta_prime) > L(theta) > L(new) and hurt > 2 > 1 > helped
    assert plain_C @ grad_J < 0 and L(theta_prime, C) < L(theta, C) and len(lines) <= 25
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.search(r"<!-- by hand -->\n+```\w*\n(.*?)```", readme, re.DOTALL)[1] == output
