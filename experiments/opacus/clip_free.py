# SPDX-License-Identifier: Apache-2.0
"""A private, certified digit classifier; ``with_opacus.py`` and ``clip_free.py`` differ in the lines about the engine.

``python experiments/opacus/NAME.py [--data-dir DATA] [--epochs N] [--seed N] [--json FILE]``: embedded digits, or
MNIST from DATA.
"""

import argparse
import json

import torch
from torch.utils.data import DataLoader, TensorDataset

import dplip
from dplip import data
from dplip.certify import certify
from dplip.layers import BallClip, Flatten, MaxMin, NormalizedLinear, Shift

parser = argparse.ArgumentParser()
parser.add_argument("--data-dir", help="train on MNIST from this folder")
parser.add_argument("--epochs", type=int)
parser.add_argument("--seed", type=int, default=0, help="of the initial weights; noise is always fresh")
parser.add_argument("--json", help="write the results to this file")
args = parser.parse_args()

torch.manual_seed(args.seed)
torch.set_num_threads(1)
digits = data.load("mnist" if args.data_dir else "digits", args.data_dir)
population, batch_size, epochs, delta = (60_000, 1_000, 2, 1e-5) if args.data_dir else (1_437, 400, 25, 1e-4)
epochs = args.epochs or epochs
shape = digits.train[0].shape[1:]

model = torch.nn.Sequential(
    Flatten(),
    Shift(0.3),
    BallClip(9.0 if args.data_dir else 3.0),
    NormalizedLinear(shape.numel(), 64, bias=False, orthogonalize=2),
    MaxMin(),
    NormalizedLinear(64, 10, bias=False),
)
loss = dplip.CrossEntropy(temperature=4.0)  # returns the sum over the batch
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
loader = DataLoader(TensorDataset(*digits.train), batch_size=batch_size)

engine = dplip.ClipFreeEngine()
arguments = {"module": model, "loss": loss, "population": population, "domain": dplip.InputDomain(shape, 0, 1, 0.3)}
private, optimizer, loader = engine.make_private_with_epsilon(
    optimizer=optimizer,
    data_loader=loader,
    target_epsilon=3.0,
    target_delta=delta,
    epochs=epochs,
    **arguments,
)
for _ in range(epochs):
    for x, y in loader:
        optimizer.zero_grad()
        loss(private(x), y).backward()
        optimizer.step()

model.eval()
x, y = digits.test
certificate = certify(model, x, norm="l2")
result = {
    "epsilon": engine.get_epsilon(delta),
    "clean": float((certificate.predicted == y).double().mean()),
    "certified_l2_0.25": certificate.certified_accuracy(y, eps=0.25),
}
print(result)
if args.json:
    with open(args.json, "w") as file:
        json.dump(result, file)
