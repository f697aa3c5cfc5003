"""Points and reductions -> the arrays that are stored, with their names and shapes. Reads no weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from featcli.backbones.model_spec import ModelSpec
from featcli.backbones.stages import Points, Stage
from featcli.dump.plan import Output
from featcli.errors import UsageError, did_you_mean, nearest, shown
from featcli.run.pooling import Pooling, pooling
from featcli.spec.commands import ExtractSpec
from featcli.spec.words import NATIVE, VECTORS


def outputs_of(asked: ExtractSpec, model: ModelSpec, points: Points) -> tuple[Output, ...]:
    """The outputs of the chosen points: stages in network order, each with its reductions, then vectors.

    Raises UsageError for reductions that the model or its maps do not have, and for those that no stage takes.
    """
    stages = [model.stages[position] for position in points.positions]
    own = asked.pools_of_stages
    if unknown := own.keys() - {stage.name for stage in stages}:
        _refuse_unknown(min(unknown), [stage.name for stage in stages], [name for name, _ in model.stage_names])
    if asked.is_pool_for_all and all(stage.name in own for stage in stages):
        raise UsageError(
            f"--pool {','.join(asked.pools)}: "
            + ("every chosen stage has a --pool of its own" if stages else "it reduces maps, and no stage is chosen"),
            "leave it out",
        )
    reductions = {stage.name: [pooling(name) for name in own.get(stage.name, asked.pools)] for stage in stages}
    registers = _registers_of(model, points, [one for several in reductions.values() for one in several])
    outputs = [
        output for stage in stages for output in _outputs_of_stage(asked, stage, reductions[stage.name], registers)
    ]
    vectors = {vector.name: vector for vector in model.vectors} if points.vectors else {}
    outputs += [
        Output(
            name=name,
            point=name,
            reduction="none",
            axes=("C",),
            shape=vectors[name].shape,
            dtype=asked.dtype,
            module=vectors[name].module,
        )
        for name in points.vectors
    ]
    return tuple(outputs)


def _refuse_unknown(name: str, names: Sequence[str], known: Sequence[str]) -> None:
    near = nearest(name, names)
    if name in VECTORS:
        raise UsageError(f"--pool {name}=...: {name} is a vector, and --pool reduces maps", "leave it out")
    way = f"add {name} to --out-features; chosen are {', '.join(names) or 'no stages'}"
    hint = way if name in known or not near else did_you_mean(near)
    raise UsageError(f"--pool {name}=...: stage {shown(name)} is not chosen", hint)


def _registers_of(model: ModelSpec, points: Points, reductions: Sequence[Pooling]) -> int:
    """Return how many registers the model has, 0 if no reduction needs tokens beside the map.

    Raises UsageError for a reduction whose tokens the model does not have.
    """
    needing = next((one for one in reductions if one.needs_prefix), None)
    if needing is None:
        return 0
    network = model.build(points, "meta")
    for one in reductions:
        if one.needs_class_token and not network.has_class_token:
            raise UsageError(
                f"--pool {one.name}: {model.name} gives no class token", "use --pool avg for one vector per image"
            )
        if one.needs_registers and not network.num_registers:
            raise UsageError(f"--pool {one.name}: {model.name} has no registers", "leave it out")
    return network.num_registers


def _outputs_of_stage(
    asked: ExtractSpec, stage: Stage, reductions: Sequence[Pooling], registers: int
) -> Iterator[Output]:
    is_native = asked.fit == NATIVE
    map_shape = (stage.channels, None, None) if is_native else stage.shape
    for one in reductions:
        if not is_native and one.is_finer_than(stage.shape):
            raise UsageError(
                f"--pool {one.name}: the maps of {stage.name} have {stage.shape[1]}x{stage.shape[2]} cells only",
                "use a smaller grid, or --pool none",
            )
        is_plain = len(reductions) == 1 or one.name == "none"
        yield Output(
            name=stage.name if is_plain else f"{stage.name}@{one.name}",
            point=stage.name,
            reduction=one.name,
            axes=one.axes,
            shape=one.shape(map_shape, registers),
            dtype=asked.dtype,
            module=stage.module,
            index=stage.index,
            stride=stage.stride,
            map_shape=map_shape,
        )
