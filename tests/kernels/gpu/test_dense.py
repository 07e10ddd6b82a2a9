"""Dense projections by measured algorithms: the tables that are shipped, what serves without one, and on the GPU for
which a table is there that each algorithm is right and always gives the same bits."""

from pathlib import Path

import pytest
import torch
from loraplex_kernels.gpu import dense
from loraplex_kernels.gpu.cublaslt import ALGORITHM_BYTES, library_version
from loraplex_kernels.gpu.dense import DenseProjections, GemmTable, find_table

from tests.kernels.gpu.check import assert_close

SHIPPED = sorted((Path(dense.__file__).parent / "gemms").glob("*.json"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_tables_hold_algorithms(path: Path) -> None:
    table = GemmTable.load(path)
    assert table.algorithms
    assert all(len(algorithm) == ALGORITHM_BYTES for algorithm in table.algorithms.values())
    assert all(min(size) >= 1 for size in table.algorithms)
    assert find_table(path.parent, table.gpu, table.cublaslt) == table


def test_tables_are_read_as_they_were_written(tmp_path: Path) -> None:
    table = GemmTable(gpu="some GPU", cublaslt=130100, algorithms={(8, 64, 96): bytes(range(ALGORITHM_BYTES))})
    table.save(tmp_path / "table.json")
    assert find_table(tmp_path, "some GPU", 130100) == table
    assert find_table(tmp_path, "some GPU", 130101) is None
    assert find_table(tmp_path, "another GPU", 130100) is None


def test_without_a_table_torch_multiplies() -> None:
    x, weight, out = torch.randn(3, 16), torch.randn(8, 16), torch.full((3, 8), torch.nan)
    assert DenseProjections(torch.device("cpu")).into(x, weight, out) is out
    torch.testing.assert_close(out, x @ weight.t())


@pytest.mark.gpu
def test_every_shipped_algorithm_of_this_gpu(device: torch.device) -> None:
    table = find_table(SHIPPED[0].parent, torch.cuda.get_device_name(device), library_version())
    if table is None:
        pytest.skip("no table for this GPU and version of cuBLASLt")
    projections = DenseProjections(device)
    for tokens, in_features, out_features in table.algorithms:
        x = torch.randn(tokens, in_features, device=device).to(torch.bfloat16)
        weight = torch.randn(out_features, in_features, device=device).to(torch.bfloat16)
        first, again = (x.new_full((tokens, out_features), torch.nan) for _ in range(2))
        projections.into(x, weight, first)
        projections.into(x, weight, again)
        assert_close(first, x @ weight.t())
        assert torch.equal(first, again)
