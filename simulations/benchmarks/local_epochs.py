"""Seconds per local epoch of a client, and of all clients of a cell, beside a bare PyTorch loop.

    python simulations/benchmarks/local_epochs.py [--cell fashion_mnist/dir0.5] [--epochs 3] [--repeats N]

The bare loop is what a tutorial shows: a shuffling DataLoader over the client's images, default memory layout, SGD with the same
settings, cross-entropy; with one thread, and with all of torch's. The product trains one client on one thread, and several clients in as
many processes as there are cores. All clients: one after the other in the bare loop with all threads, `train_all` in the product, the
start of its processes counted. Result: simulations/results/speed/<machine>-local-epochs.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from speed import RESULTS, machine_name
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from cdfkd_strategy import seeding
from cdfkd_strategy.data.client_share import ClientShare, client_share
from cdfkd_strategy.data.datasets import load_data
from cdfkd_strategy.local_training import initial_model, train_all, train_teacher
from cdfkd_strategy.provenance import commit, hardware, usable_cores, versions
from cdfkd_strategy.run_config import RunConfig, resolve
from cdfkd_strategy.types import ImageSpec


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cell", default="fashion_mnist/dir0.5")
    parser.add_argument("--epochs", type=int, default=3, help="local epochs of a measurement")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each path, which take turns")
    args = parser.parse_args()
    config = resolve(args.cell, [f"clients.epochs={args.epochs}"])
    data = load_data(config.data, config.seed)
    shares = [client_share(data, config.data, config.clients.count, k, config.seed) for k in range(config.clients.count)]
    largest = max(shares, key=lambda share: len(share.x_train))
    cores = usable_cores()
    paths: dict[str, Callable[[], object]] = {
        "client_bare_one_thread": lambda: bare(config, data.image, largest, threads=1),
        "client_bare_all_threads": lambda: bare(config, data.image, largest, threads=cores),
        "client_product": lambda: product(config, data.image, largest),
        "all_bare_all_threads": lambda: [bare(config, data.image, share, threads=cores) for share in shares],
        "all_product": lambda: train_all(config.clients, data, config.data, data.image, config.seed, workers=cores),
    }
    taken: dict[str, list[float]] = {name: [] for name in paths}
    for _ in range(args.repeats):
        for name, path in paths.items():
            started = time.perf_counter()
            path()
            taken[name].append((time.perf_counter() - started) / args.epochs)
    seconds = {name: round(statistics.median(values), 3) for name, values in taken.items()}
    result: dict[str, Any] = {
        "cell": args.cell,
        "architecture": config.clients.architecture(0),
        "images_of_the_client": len(largest.x_train),
        "images_of_all": sum(len(share.x_train) for share in shares),
        "epochs": args.epochs,
        "repeats": args.repeats,
        "seconds_per_epoch": seconds,
        "client_ratio": round(min(seconds["client_bare_one_thread"], seconds["client_bare_all_threads"]) / seconds["client_product"], 2),
        "all_ratio": round(seconds["all_bare_all_threads"] / seconds["all_product"], 2),
        "cores": cores,
        "commit": commit(),
        "hardware": hardware(),
        "versions": versions(),
    }
    path = RESULTS / f"{machine_name(config.engine.runtime())}-local-epochs.json"
    RESULTS.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def product(config: RunConfig, image: ImageSpec, share: ClientShare) -> None:
    """A client's round, as Flower runs it."""
    model = initial_model(config.clients.architecture(0), image, config.seed)
    train_teacher(model, share, image=image, config=config.clients, seed=config.seed, partition_id=0, round=1)


def bare(config: RunConfig, image: ImageSpec, share: ClientShare, *, threads: int) -> None:
    """The loop of a tutorial."""
    clients = config.clients
    model = initial_model(clients.architecture(0), image, config.seed).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=clients.lr, momentum=clients.momentum, weight_decay=clients.weight_decay)
    images = image.normalise(share.x_train.float() / 255)
    with seeding.threads(threads), seeding.seeded_scope("bare loop"):
        loader = DataLoader(TensorDataset(images, share.y_train), batch_size=clients.batch_size, shuffle=True, drop_last=True)
        for _ in range(clients.epochs):
            running = 0.0
            for batch, labels in loader:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(batch), labels)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                running += loss.item()


if __name__ == "__main__":
    main()
