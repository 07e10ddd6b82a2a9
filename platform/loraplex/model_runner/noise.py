"""Random numbers as a pure function of (seed, index of the generated token, token id): no state, any device, any batch.

Used by ``sampler`` for the exponential race: with E_v independent Exp(1), the token that maximises p_v / E_v is
distributed as p (the Gumbel-max trick without the logarithm of p). Unlike the inverse of a cumulative distribution,
whose every boundary moves with the rounding of every probability before it, the winner changes only where two tokens
are all but tied; so a seed gives the same text whatever else is in the batch and after a resume.

The hash is a 32-bit multiply-xorshift mixer (the constants are Chris Wellons' lowbias32), keyed with 64 bits per row.
"""

import torch

_MASK_64 = (1 << 64) - 1
_MULTIPLIER_1 = 0x7FEB352D
_MULTIPLIER_2 = 0x846CA68B - (1 << 32)
_LARGEST_UNIFORM = 1.0 - 2.0**-24


def row_key(seed: int, index: int) -> tuple[int, int]:
    """Two signed 32-bit words for token ``index`` of a request; 0 <= seed < 2**63, index >= 0."""
    mixed = _splitmix_64(_splitmix_64(seed) + index)
    return _signed(mixed & 0xFFFFFFFF), _signed(mixed >> 32)


def exponentials(keys: list[tuple[int, int]], vocab_size: int, device: torch.device) -> torch.Tensor:
    """Exp(1) numbers, (len(keys), vocab_size) fp32, all positive and finite; row r is a function of keys[r] alone."""
    key_R2 = torch.tensor(keys, dtype=torch.int32).to(device, non_blocking=True)
    bits_RV = torch.arange(vocab_size, dtype=torch.int32, device=device).mul_(_MULTIPLIER_1) ^ key_R2[:, :1]
    _mix_(bits_RV)
    bits_RV += key_R2[:, 1:]
    _mix_(bits_RV)
    # 31 bits: small integers convert exactly, so that small exponentials keep their resolution.
    uniform_RV = bits_RV.bitwise_and_(0x7FFFFFFF).to(torch.float32).add_(0.5).mul_(2.0**-31)
    return uniform_RV.clamp_(max=_LARGEST_UNIFORM).neg_().log1p_().neg_()


def _mix_(bits: torch.Tensor) -> None:
    """In place; shifts are logical although the type is signed."""
    bits ^= (bits >> 16).bitwise_and_(0xFFFF)
    bits *= _MULTIPLIER_1
    bits ^= (bits >> 15).bitwise_and_(0x1FFFF)
    bits *= _MULTIPLIER_2
    bits ^= (bits >> 16).bitwise_and_(0xFFFF)


def _splitmix_64(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK_64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return value ^ (value >> 31)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word
