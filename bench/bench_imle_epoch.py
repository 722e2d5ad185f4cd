"""One epoch of IMLE, from the author's loop to ours, side by side on the same latents and noise.

    python bench/bench_imle_epoch.py [--n 50000] [--preset paper] [--rounds 7] [--run RUN]
    pytest bench/bench_imle_epoch.py --benchmark-only

Two rows a machine: `author`, the epoch as the author's code runs it (blocks of noise in turn, FAISS's flat
index on the CPU, a loss read from the device after each step), and `ours`. Without FAISS the author's search
is our reference on the device, and "author_search" says so. Both start from the same parameters; their mean losses
are compared before the times are taken. Without a GPU the default size is small.
"""

import argparse
import json
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from vglann_kernels import nearest_rows

from vglann_fast.mapping.imle import IMLE
from vglann_fast.options.mapping import ImleOptions
from vglann_fast.options.presets import PRESETS

LATENT_DIM = 100
WARM_UP = 2
Epoch = Callable[[list[Tensor], Tensor, int], float]  # blocks of noise, order, epoch -> mean loss
Search = Callable[[Tensor, Tensor], Tensor]  # queries, rows -> index of the nearest row


def author_search() -> tuple[str, Search]:
    """Return the search of the author's epoch and its name: FAISS on the CPU, or our reference without FAISS."""
    try:
        import faiss
    except ImportError:
        return "reference, no FAISS here", lambda queries, rows: nearest_rows(
            queries, rows, impl="reference"
        )[0]

    def search(queries: Tensor, rows: Tensor) -> Tensor:
        index = faiss.IndexFlatL2(LATENT_DIM)
        index.add(rows.cpu().numpy())
        return torch.from_numpy(index.search(queries.cpu().numpy(), 1)[1][:, 0]).to(queries.device)

    return "FAISS IndexFlatL2", search


def author_epoch(mapping: IMLE, latents: Tensor, search: Search) -> Epoch:
    """The author's epoch on the network of `mapping`."""
    network, options = mapping.network, mapping.options
    optimizers: list[torch.optim.Adam] = []

    def epoch(blocks: list[Tensor], order: Tensor, number: int) -> float:
        if options.adam_state == "per-epoch" or not optimizers:
            optimizers[:] = [
                torch.optim.Adam(
                    network.parameters(), options.lr, (0.5, 0.999), weight_decay=options.weight_decay
                )
            ]
        network.train()
        with torch.no_grad():
            mapped = torch.cat([mapping(block) for block in blocks])
        noise = torch.cat(blocks)[search(latents, mapped)]
        losses = []
        for step in range(len(latents) // options.batch_size):
            rows = order[step * options.batch_size : (step + 1) * options.batch_size]
            optimizers[0].zero_grad()
            loss = F.mse_loss(mapping(noise[rows]), latents[rows])
            loss.backward()
            optimizers[0].step()
            losses.append(loss.item())
        return sum(losses) / len(losses)

    return epoch


def our_epoch(mapping: IMLE, latents: Tensor) -> Epoch:
    return lambda blocks, order, number: mapping.train_epoch(latents, blocks, order, number)["loss"]


def compare(latents: Tensor, options: ImleOptions, rounds: int) -> dict[str, Any]:
    """Median ms of an epoch by each, in turns; raises where the losses of the first epochs differ."""
    device = latents.device
    options = replace(options, schedule="halve-every-50", epochs=WARM_UP + rounds)
    ours = IMLE(LATENT_DIM, options, device)
    theirs = deepcopy(ours)
    searches, search = author_search()
    epochs = {"author": author_epoch(theirs, latents, search), "ours": our_epoch(ours, latents)}
    times: dict[str, list[float]] = {name: [] for name in epochs}
    losses: dict[str, list[float]] = {name: [] for name in epochs}
    for number in range(WARM_UP + rounds):
        generator = torch.Generator(device).manual_seed(number)
        order = torch.randperm(len(latents), generator=generator, device=device)
        blocks = ours.draw_pool(len(latents), generator)
        for name, epoch in epochs.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            started = time.perf_counter()
            losses[name].append(epoch(blocks, order, number))  # a number: the device has finished
            if number >= WARM_UP:
                times[name].append(time.perf_counter() - started)
    first = losses["author"][0], losses["ours"][0]
    if abs(first[1] / first[0] - 1) > 1e-3:
        raise AssertionError(f"the first epoch's mean loss is {first[1]}, the author's {first[0]}")
    medians = {name: 1e3 * median(values) for name, values in times.items()}
    return {
        "latents": len(latents),
        "pool": sum(map(len, blocks)),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "author_search": searches,
        "first_loss": first,
        "last_loss": (losses["author"][-1], losses["ours"][-1]),
        "ms": medians,
        "times_faster": medians["author"] / medians["ours"],
    }


def unit_latents(n: int, device: torch.device) -> Tensor:
    """n unit latents in clusters, seeded."""
    generator = torch.Generator(device).manual_seed(0)
    centers = torch.randn(50, LATENT_DIM, generator=generator, device=device)
    rows = torch.randint(50, (n,), generator=generator, device=device)
    return F.normalize(centers[rows] + torch.randn(n, LATENT_DIM, generator=generator, device=device), dim=1)


def test_an_epoch_against_the_author(benchmark):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    n = 50_000 if device.type == "cuda" else 2_000
    found = compare(unit_latents(n, device), PRESETS["paper"].map["imle"], rounds=3)
    benchmark.extra_info |= found
    mapping = IMLE(LATENT_DIM, PRESETS["paper"].map["imle"], device)
    generator = torch.Generator(device).manual_seed(0)
    pool, order = mapping.draw_pool(n, generator), torch.arange(n, device=device)
    benchmark.pedantic(lambda: mapping.train_epoch(unit_latents(n, device), pool, order, 0), rounds=1)


def main() -> None:
    """Print the comparison as JSON."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=50_000 if on_gpu else 5_000)
    parser.add_argument("--preset", choices=PRESETS, default="paper")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--run", help="use the latents of this run instead of made-up ones")
    a = parser.parse_args()
    device = torch.device(a.device)
    latents = unit_latents(a.n, device)
    if a.run:
        from vglann_fast.glo.checkpoint import load_trained
        from vglann_fast.run.folder import RunDir

        latents = load_trained(RunDir.open(a.run), device).latents.detach()
    print(json.dumps(compare(latents, PRESETS[a.preset].map["imle"], a.rounds), indent=1))


if __name__ == "__main__":
    main()
