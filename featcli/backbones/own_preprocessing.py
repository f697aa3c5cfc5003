"""Follow --mean, --std, --interpolation and --crop-pct, which say the preprocessing instead of the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from featcli.errors import UsageError
from featcli.spec.groups import CheckpointSpec

if TYPE_CHECKING:
    from featcli.backbones.preprocessing import Preprocessing

OF_PREPROCESSING: Final = ("mean", "std", "interpolation", "crop_pct")
OVERRIDES: Final = "overrides"  # the plan's name for options that differ from the checkpoint


def asked_of_preprocessing(asked: CheckpointSpec, channels: int) -> dict[str, Any]:
    """Return the options that were given, by name, with means and deviations as one number for each channel.

    Raises UsageError if they are for another number of channels.
    """
    given = {name: getattr(asked, name) for name in OF_PREPROCESSING if getattr(asked, name) is not None}
    return {
        name: _for_channels(f"--{name}", value, channels) if name in ("mean", "std") else value
        for name, value in given.items()
    }


def normalisation_in(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return the means and deviations among such options: overrides in any case where a checkpoint says nothing."""
    return {name: value for name, value in asked.items() if name in ("mean", "std")}


def of_bands(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Return means or deviations of bands as the checkpoint has them, one for all as one for each."""
    return tuple(values) * (channels if len(values) == 1 else 1)


def numbers_of_bands(own: Mapping[str, Sequence[float]], channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the means and deviations, one of each for each band. Raises UsageError if they are for colours."""
    for name in ("mean", "std"):
        if len(of_bands(own[name], channels)) != channels:
            raise UsageError(
                f"the checkpoint says the {name} of {len(own[name])} channels, and the input has {channels}",
                "give --mean and --std: a number for each channel, or one for all",
            )
    return of_bands(own["mean"], channels), of_bands(own["std"], channels)


def is_normalisation_said(asked: CheckpointSpec) -> bool:
    """Return whether the user gave everything that cannot be guessed if a checkpoint says nothing."""
    return asked.mean is not None and asked.std is not None


def on_record(
    preprocessing: Preprocessing, overrides: Mapping[str, Any], guess: str = "", is_random: bool = False
) -> Preprocessing:
    """Return the preprocessing with these overrides in its settings and its origin.

    `guess` says what everything else is, if nobody said it. With random weights (`is_random`) no preprocessing is
    wrong, so the origin names no way out.
    """
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in overrides.items()}
    settings = {**preprocessing.settings, **({OVERRIDES: plain} if plain else {})}
    origin = guess or preprocessing.origin
    if overrides:
        origin += f"; {_options(overrides)} as asked"
    left = [name for name in OF_PREPROCESSING if name not in overrides]
    if guess and left and not is_random:
        origin += f"; {_options(left)} say{'s' * (len(left) == 1)} otherwise"
    return replace(preprocessing, settings=settings, origin=origin)


def _options(names: Sequence[str] | Mapping[str, Any]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def _for_channels(option: str, values: Sequence[float], channels: int) -> tuple[float, ...]:
    if len(values) not in (1, channels):
        raise UsageError(
            f"{option} has {len(values)} numbers, and the input has {channels} channel{'s' * (channels > 1)}",
            "give one number for each channel, or one for all",
        )
    return of_bands(values, channels)
