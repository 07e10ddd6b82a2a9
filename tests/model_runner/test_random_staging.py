"""Random adapters lie in host memory as staged files do."""

import torch
from loraplex.core.adapter import AdapterBlock, AdapterManifest
from loraplex.core.ids import BaseModelId, Digest
from loraplex.model_runner.adapter_layout import SITES
from loraplex.model_runner.host_adapters import HostAdapters
from loraplex.model_runner.random_models import random_spec
from loraplex.model_runner.shard import Shard

SPEC = random_spec("tiny-llama", BaseModelId("base"))
PAGE_BYTES = 16 * SPEC.kv_elements_per_token * 4


def _manifest(name: str, lora_rank: int) -> AdapterManifest:
    blocks = tuple(
        AdapterBlock(layer=layer, module=module, lora_rank=lora_rank, scale=1.0)
        for layer in range(SPEC.num_layers)
        for module in SITES[0]
    )
    return AdapterManifest(digest=Digest(name), base_model_id=SPEC.base_model_id, blocks=blocks, num_bytes=0)


def _blob(host: HostAdapters, name: str) -> torch.Tensor:
    with host.lend(Digest(name)) as staged:
        return staged.blob


def test_seeds_decide_the_bytes() -> None:
    host = HostAdapters(Shard.whole(SPEC), page_bytes=PAGE_BYTES, dtype=torch.float32, pin=False)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        host.stage_random(_manifest(name, 16), seed)
    a, b, c = (_blob(host, name) for name in "abc")
    assert a.shape == (host.layout(_manifest("a", 16)).num_pages, PAGE_BYTES)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    values = a.view(torch.float32)
    assert values.isfinite().all()
    assert 0.008 < float(values.std()) < 0.012


def test_padding_adds_nothing() -> None:
    """Rank 5 is stored as 8: the last three ranks of every B are zero and the others are not."""
    host = HostAdapters(Shard.whole(SPEC), page_bytes=PAGE_BYTES, dtype=torch.float32, pin=False)
    host.stage_random(_manifest("a", 5), 0)
    blob, layout = _blob(host, "a"), host.layout(_manifest("a", 5))
    checked = 0
    for part in layout.parts:
        if part.placed is not None:
            num_bytes = (part.rank_end - part.rank_start) * part.num_columns * 4
            flat = blob[part.page, part.offset_bytes : part.offset_bytes + num_bytes].view(torch.float32)
            b_RO = flat.view(-1, part.num_columns)
            first = part.rank_start - part.placed.rank_start
            for row in range(b_RO.shape[0]):
                assert bool(b_RO[row].any()) == (first + row < 5)
                checked += 1
    assert checked == 8 * 3 * SPEC.num_layers
