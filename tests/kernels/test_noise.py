"""The keyed exponential numbers: independent of everything but their key, and exponential."""

import numpy as np
import pytest
import torch
from loraplex_kernels.noise import exponentials, row_keys


def keys_of(*pairs: tuple[int, int]) -> torch.Tensor:
    """Of (seed, index) each."""
    seeds, indices = torch.tensor(pairs, dtype=torch.int64).unbind(1)
    return row_keys(seeds, indices)


def test_a_row_is_a_function_of_its_key() -> None:
    keys = keys_of((5, 0), (5, 1), (6, 0))
    together = exponentials(keys, 1000)
    for row in range(3):
        assert torch.equal(together[row], exponentials(keys[row : row + 1], 1000)[0])
    assert torch.equal(exponentials(keys, 400), together[:, :400]), "the vocabulary's size does not matter"


def test_keys_are_64_bits_and_distinct() -> None:
    keys = keys_of(*((seed, index) for seed in (0, 1, 2, 2**63 - 1) for index in range(2000)))
    assert keys.dtype == torch.int32
    assert len({(low, high) for low, high in keys.tolist()}) == 8000
    assert all(len(set(words)) > 7900 for words in keys.T.tolist())


def test_moments_and_bounds() -> None:
    values = exponentials(keys_of(*((seed, 7) for seed in range(40))), 50_000).double().numpy()
    assert np.isfinite(values).all()
    assert values.min() > 0.0
    assert values.mean() == pytest.approx(1.0, abs=0.003)
    assert values.var() == pytest.approx(1.0, abs=0.01)
    quantiles = np.quantile(values, [0.001, 0.1, 0.5, 0.9, 0.999])
    assert quantiles == pytest.approx(-np.log1p(-np.array([0.001, 0.1, 0.5, 0.9, 0.999])), rel=0.1)


def test_neighbouring_seeds_indices_and_ids_are_uncorrelated() -> None:
    rows = exponentials(keys_of((1, 0), (1, 1), (2, 0)), 100_000).double().numpy()
    for other in (rows[1], rows[2], np.roll(rows[0], 1)):
        assert abs(np.corrcoef(rows[0], other)[0, 1]) < 0.015


def test_pinned() -> None:
    """A change of these numbers would change the text of every seeded request."""
    values = exponentials(keys_of((123, 0)), 3)[0].tolist()
    assert values == pytest.approx(PINNED, rel=1e-6)


PINNED = [1.15169084, 1.51490521, 1.81881285]
