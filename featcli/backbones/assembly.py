"""Make a Backbone from a ModelSpec and an Execution: load and check weights, fold norms, freeze and move it."""

from __future__ import annotations

from dataclasses import replace

import torch
import xxhash

from featcli.backbones.backbone import Backbone, Network
from featcli.backbones.execution import LAYOUTS, PRECISIONS, Execution
from featcli.backbones.folding import fold
from featcli.backbones.model_spec import ModelSpec
from featcli.backbones.stages import Points
from featcli.errors import CheckpointError, shown
from featcli.system.borrowed import own_random_numbers


def assemble_backbone(model: ModelSpec, points: Points, device: torch.device, execution: Execution) -> Backbone:
    """Load the weights for these points, and freeze the network on the device.

    `Backbone.execution` says how it is run, which may differ from what was asked: see `prepare_network`. Raises
    CheckpointError.
    """
    with own_random_numbers():  # loaded weights replace them
        network, weights = model.load(points)
    refuse_not_finite(model.name, network)
    digest = weights_digest(network)
    network, execution = prepare_network(model, network, device, execution)
    return Backbone(
        name=model.name,
        library=model.library,
        stages=model.stages,
        selected=tuple(model.stages[position] for position in points.positions),
        preprocessing=model.preprocessing(),
        weights=weights,
        settings=model.settings(),
        network=network,
        device=device,
        execution=execution,
        digest=digest,
        patch=model.patch,
        vectors=tuple(vector for vector in model.vectors if vector.name in points.vectors) if points.vectors else (),
    )


def prepare_network(
    model: ModelSpec, network: Network, device: torch.device, execution: Execution
) -> tuple[Network, Execution]:
    """Fold, freeze, move and compile a network that is on the CPU. The module is changed in place.

    Returns the network, and how it is run then. Norms are not folded if there are none, or if maps would change by more
    than rounding.
    """
    network.module.eval().requires_grad_(False)
    if execution.folded and not fold(network, model.channels, model.input_size):
        execution = replace(execution, folded=False)
    dtype, layout = getattr(torch, PRECISIONS[execution.precision]), getattr(torch, LAYOUTS[execution.layout])
    network.module.to(device=device, dtype=dtype)
    for tensor in (*network.module.parameters(), *network.module.buffers()):
        if tensor.ndim == 4:  # others have no channels to put last, and `Module.to` refuses those of five dimensions
            tensor.data = tensor.data.contiguous(memory_format=layout)
    if not execution.compiled:
        return network, execution
    return network.compiled(), execution


def refuse_not_finite(name: str, network: Network) -> None:
    """Raise CheckpointError for weights from a training that diverged: maps would be NaN for every image."""
    parameters = {key for key, _ in network.module.named_parameters()}  # a buffer may be infinite, such as a mask
    floats = {key: tensor for key, tensor in network.tensors().items() if tensor.is_floating_point()}
    broken = [
        key for key, tensor in floats.items() if not (tensor.isfinite() if key in parameters else ~tensor.isnan()).all()
    ]
    if broken:
        raise CheckpointError(
            f"checkpoint {shown(name)}: {len(broken)} of its weights are NaN or infinite,"
            f" first {', '.join(broken[:3])}",
            "did its training diverge? Take an earlier checkpoint",
        )


def weights_digest(network: Network) -> str:
    """Return one xxh3-128 of all parameters and buffers with their names, whatever files they came from."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(network.tensors().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
