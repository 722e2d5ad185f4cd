"""Ask cuDNN's graph API which fusions of the generator's 3-D layers it can run: `python bench/cudnn_probe.py`.

A transposed convolution is the gradient by the input of a convolution, "dgrad". For each, in bfloat16 and
channels-last, prints a line for dgrad and one for dgrad with the sums that BatchNorm needs ("genstats") in the same
graph: the time of one run, or why it is not supported. Needs nvidia-cudnn-frontend and a GPU, else says so. It has
not run on a GPU yet.
"""

import sys
from typing import Any

import torch

from vglann_fast.experiments.convolutions import LAYERS
from vglann_fast.experiments.timing import DEVICE, between_events, in_one_line

BATCHES = (15, 256)


def described(graph: Any, x: torch.Tensor, name: str) -> Any:
    """Return the graph's tensor for `x`."""
    import cudnn

    return graph.tensor(
        name=name, dim=list(x.shape), stride=list(x.stride()), data_type=cudnn.data_type.BFLOAT16
    )


def milliseconds(layer: str, batch: int, with_statistics: bool) -> float:
    """Return the time of one run; raises what cuDNN raises where it has no plan."""
    import cudnn

    channels, out, grid = LAYERS[layer]

    def values(*shape: int) -> torch.Tensor:
        x = torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)
        return x.contiguous(memory_format=torch.channels_last_3d)

    x, weight = values(batch, channels, *grid), values(channels, out, 4, 4, 4)
    y = torch.empty_like(values(batch, out, *(2 * size for size in grid)))
    graph = cudnn.pygraph(
        io_data_type=cudnn.data_type.BFLOAT16,
        intermediate_data_type=cudnn.data_type.FLOAT,
        compute_data_type=cudnn.data_type.FLOAT,
    )
    x_node, weight_node = described(graph, x, "x"), described(graph, weight, "weight")
    y_node = graph.conv_dgrad(
        loss=x_node, filter=weight_node, padding=[1, 1, 1], stride=[2, 2, 2], dilation=[1, 1, 1]
    )
    y_node.set_output(True).set_dim(list(y.shape)).set_stride(list(y.stride()))
    pointers = {x_node: x, weight_node: weight, y_node: y}
    if with_statistics:
        for node in graph.genstats(input=y_node, compute_data_type=cudnn.data_type.FLOAT):
            node.set_output(True).set_data_type(cudnn.data_type.FLOAT)
            pointers[node] = torch.empty(1, out, 1, 1, 1, device=DEVICE)
    graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    workspace = torch.empty(graph.get_workspace_size(), device=DEVICE, dtype=torch.uint8)
    for _ in range(3):
        graph.execute(pointers, workspace)
    return between_events(lambda: graph.execute(pointers, workspace))


def main() -> int:
    """Print a line for each layer; a graph without a plan is an answer, not a failure."""
    try:
        import cudnn
    except ImportError as error:
        print(f"nothing was asked: {error}; pip install nvidia-cudnn-frontend")
        return 0
    if DEVICE == "cpu":
        print("nothing was asked: no GPU")
        return 0
    print(f"cuDNN {cudnn.backend_version()}, frontend {cudnn.__version__}, {torch.cuda.get_device_name()}")
    for batch in BATCHES:
        for layer in (name for name, (_, _, grid) in LAYERS.items() if len(grid) == 3):
            for with_statistics in (False, True):
                what = f"{layer} {batch}: dgrad{' with statistics' if with_statistics else ''}"
                try:
                    print(f"{what}: {milliseconds(layer, batch, with_statistics):.4f} ms", flush=True)
                except Exception as error:  # cuDNN raises types of its own
                    print(f"{what}: not supported: {in_one_line(error)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
