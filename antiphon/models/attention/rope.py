"""Rotary embeddings: plain and yarn angles.

Source of yarn: Peng et al., "YaRN: Efficient Context Window Extension of Large Language Models", as DeepSeek uses it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from antiphon.core.errors import is_number
from antiphon.models.config import LARGEST_POSITION, USE_ANOTHER_MODEL, ConfigFile

DEFAULT_THETA = 10_000.0
"""Base of the rotary angles that most architectures use if the file has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Yarn:
    """How yarn stretches the rotary angles to a longer context."""

    factor: float
    original_positions: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float
    attention_factor: float | None
    truncate: bool  # round the ends of the ramp to whole pairs


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """`size` rotary dimensions of a head, base `theta`."""

    size: int
    theta: float
    interleaved: bool
    yarn: Yarn | None

    @property
    def stretched_positions(self) -> int:
        """Number of positions that yarn extends the context to; 0 without yarn."""
        return 0 if self.yarn is None else int(self.yarn.factor * self.yarn.original_positions)

    @staticmethod
    def read(file: ConfigFile, *, size: int, interleaved: bool, default_theta: float = DEFAULT_THETA) -> RopeConfig:
        """Read `rope_parameters`, or `rope_theta` and `rope_scaling` of older checkpoints."""
        parameters = _parameters(file)
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if kind not in ("default", "yarn"):
            raise file.fault(
                "rope_type", kind, limit="only 'default' and 'yarn' are supported", remedy=USE_ANOTHER_MODEL
            )
        theta = parameters.get("rope_theta", file.get("rope_theta", default_theta))
        if not is_number(theta) or theta <= 1:
            raise file.fault("rope_theta", theta, remedy="use a number above 1")
        yarn = None if kind == "default" else _read_yarn(file, parameters)
        return RopeConfig(size=size, theta=float(theta), interleaved=interleaved, yarn=yarn)


def rotary_size(file: ConfigFile, head_size: int, *, default_share: float) -> int:
    """Number of rotary dimensions of a head, from `partial_rotary_factor`. Raises `ModelError` if that is invalid.

    default_share: the factor if the file has none.
    """
    share = _parameters(file).get("partial_rotary_factor", file.get("partial_rotary_factor", default_share))
    if not is_number(share) or not 0 < share <= 1:
        raise file.fault("partial_rotary_factor", share, remedy="use a number above 0 and at most 1")
    size = int(head_size * share)
    if size < 2 or size % 2:
        limit = f"that makes {size} rotary dimensions of head_dim={head_size}"
        remedy = "use a factor that makes an even number, because dimensions rotate in pairs"
        raise file.fault("partial_rotary_factor", share, limit=limit, remedy=remedy)
    return size


def _parameters(file: ConfigFile) -> dict[str, Any]:
    parameters = file.get("rope_scaling") or file.get("rope_parameters") or {}  # in this order in transformers too
    if not isinstance(parameters, dict):
        raise file.fault("rope_parameters", parameters, remedy="use an object")
    for key, value in parameters.items():
        if isinstance(value, dict):
            limit = f"{key!r} has its own, but only one rotary embedding for all layers is supported"
            raise file.fault("rope_parameters", value, limit=limit, remedy=USE_ANOTHER_MODEL)
    return parameters


def _read_yarn(file: ConfigFile, parameters: dict[str, Any]) -> Yarn:
    attention_factor = parameters.get("attention_factor")
    try:
        yarn = Yarn(
            factor=float(parameters["factor"]),
            original_positions=int(parameters.get("original_max_position_embeddings") or file.positions()),
            beta_fast=float(parameters.get("beta_fast") or 32),
            beta_slow=float(parameters.get("beta_slow") or 1),
            mscale=float(parameters.get("mscale") or 0),
            mscale_all_dim=float(parameters.get("mscale_all_dim") or 0),
            attention_factor=None if attention_factor is None else float(attention_factor),
            truncate=bool(parameters.get("truncate", True)),
        )
    except (KeyError, TypeError, ValueError) as error:
        limit, remedy = f"its yarn parameters cannot be read ({error!r})", "use the model's own file"
        raise file.fault("rope_parameters", parameters, limit=limit, remedy=remedy) from error
    if not 1 <= yarn.factor < math.inf or yarn.original_positions < 1:
        limit = f"yarn has factor={yarn.factor} and {yarn.original_positions} original positions"
        raise file.fault("rope_parameters", parameters, limit=limit, remedy="use at least 1 for both")
    if yarn.original_positions > LARGEST_POSITION / yarn.factor:
        limit = f"factor={yarn.factor} times {yarn.original_positions} positions exceeds {LARGEST_POSITION}"
        raise file.fault("rope_parameters", parameters, limit=limit, remedy="use the model's own file")
    return yarn


def rope_angles(config: RopeConfig) -> torch.Tensor:
    """The angle of every pair per position: float32 [size / 2]."""
    exponents = torch.arange(0, config.size, 2, dtype=torch.float32) / config.size
    plain = 1.0 / config.theta**exponents
    yarn = config.yarn
    if yarn is None:
        return plain
    low = _pair_of_rotations(config, yarn, yarn.beta_fast)
    high = _pair_of_rotations(config, yarn, yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.size - 1)
    ramp = (torch.arange(config.size // 2, dtype=torch.float32) - low) / (0.001 if low == high else high - low)
    keep = 1 - ramp.clamp(0, 1)
    return plain / yarn.factor * (1 - keep) + plain * keep


def rope_tables(
    angles_P: torch.Tensor, positions_T: torch.Tensor, config: RopeConfig, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine [T, P] at every position, computed in float32."""
    angles_TP = positions_T.unsqueeze(1).to(torch.float32) * angles_P
    scale = 1.0 if config.yarn is None else _table_scale(config.yarn)
    return (angles_TP.cos() * scale).to(dtype), (angles_TP.sin() * scale).to(dtype)


def _table_scale(yarn: Yarn) -> float:
    if yarn.attention_factor is not None:
        return yarn.attention_factor
    if yarn.mscale and yarn.mscale_all_dim:
        return _magnitude(yarn.factor, yarn.mscale) / _magnitude(yarn.factor, yarn.mscale_all_dim)
    return _magnitude(yarn.factor, 1.0)


def score_scale(config: RopeConfig, head_size: int) -> float:
    """The scale of attention scores: 1 / sqrt(head size), with yarn's correction."""
    scale = 1 / math.sqrt(head_size)
    if config.yarn is not None and config.yarn.mscale_all_dim:
        scale *= _magnitude(config.yarn.factor, config.yarn.mscale_all_dim) ** 2
    return scale


def _pair_of_rotations(config: RopeConfig, yarn: Yarn, rotations: float) -> float:
    positions = yarn.original_positions
    return config.size * math.log(positions / (rotations * 2 * math.pi)) / (2 * math.log(config.theta))


def _magnitude(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
