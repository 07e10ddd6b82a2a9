"""Random numbers as a pure function of (seed, index of the generated token, token id): no state, any device, any batch.

Used by ``sampling`` for the exponential race: with E_v independent Exp(1), the token that maximises p_v / E_v is
distributed as p (the Gumbel-max trick without the logarithm of p). Unlike the inverse of a cumulative distribution,
whose every boundary moves with the rounding of every probability before it, the winner changes only where two tokens
are all but tied; so a seed gives the same text whatever else is in the batch and after a resume.

The hash is a 32-bit multiply-xorshift mixer (the constants are Chris Wellons' lowbias32), keyed with 64 bits per row
by splitmix64 (Steele, Lea, Flood 2014). ``gpu.sampling`` computes the same bits in its kernel.

Shape legend: R rows, V vocabulary.
"""

import torch

MULTIPLIER_1 = 0x7FEB352D
MULTIPLIER_2 = 0x846CA68B
GOLDEN_64 = 0x9E3779B97F4A7C15
MULTIPLIER_64_1 = 0xBF58476D1CE4E5B9
MULTIPLIER_64_2 = 0x94D049BB133111EB
LARGEST_UNIFORM = 1.0 - 2.0**-24


def row_keys(seeds_R: torch.Tensor, indices_R: torch.Tensor) -> torch.Tensor:
    """(R, 2) int32: the key of token ``indices_R[r]`` of a request with seed ``seeds_R[r]``.

    Both int64; 0 <= seed < 2**63, index >= 0.
    """
    mixed_R = _splitmix_64(_splitmix_64(seeds_R) + indices_R)
    return mixed_R.unsqueeze(1).view(torch.int32)


def exponentials(key_R2: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Exp(1) numbers, (R, vocab_size) fp32, all positive and finite; row r is a function of key_R2[r] alone."""
    ids_V = torch.arange(vocab_size, dtype=torch.int32, device=key_R2.device)
    bits_RV = ids_V.mul_(MULTIPLIER_1) ^ key_R2[:, :1]
    _mix_(bits_RV)
    bits_RV += key_R2[:, 1:]
    _mix_(bits_RV)
    # 31 bits: small integers convert exactly, so that small exponentials keep their resolution.
    uniform_RV = bits_RV.bitwise_and_(0x7FFFFFFF).to(torch.float32).add_(0.5).mul_(2.0**-31)
    return uniform_RV.clamp_(max=LARGEST_UNIFORM).neg_().log1p_().neg_()


def _mix_(bits: torch.Tensor) -> None:
    """In place; shifts are logical although the type is signed."""
    bits ^= (bits >> 16).bitwise_and_(0xFFFF)
    bits *= MULTIPLIER_1
    bits ^= (bits >> 15).bitwise_and_(0x1FFFF)
    bits *= MULTIPLIER_2 - (1 << 32)
    bits ^= (bits >> 16).bitwise_and_(0xFFFF)


def _splitmix_64(value: torch.Tensor) -> torch.Tensor:
    """Of int64 that stand for unsigned words: products wrap, shifts are made logical by a mask."""
    value = value + _signed(GOLDEN_64)
    value = (value ^ ((value >> 30) & ((1 << 34) - 1))) * _signed(MULTIPLIER_64_1)
    value = (value ^ ((value >> 27) & ((1 << 37) - 1))) * _signed(MULTIPLIER_64_2)
    return value ^ ((value >> 31) & ((1 << 33) - 1))


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word
