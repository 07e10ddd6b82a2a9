"""Whether a model can be cut into a shape. Pure. Called by executors, the cost model and the controller's check of
plans."""

from loraplex.core.errors import BadConfig
from loraplex.core.model import ModelSpec
from loraplex.core.plan import Shape


def check_shape(model: ModelSpec, shape: Shape) -> None:
    """Raises BadConfig with one line when the model cannot be cut so."""
    tp, pp = shape.tp, shape.pp
    what = f"{model.base_model_id} in shape (tp {tp}, pp {pp})"
    if tp < 1 or pp < 1:
        raise BadConfig(f"{what}: tp and pp are 1 or more", param="tp" if tp < 1 else "pp")
    for name, size in (("heads", model.num_heads), ("intermediate columns", model.intermediate_size)):
        if size % tp:
            raise BadConfig(f"{what}: {size} {name} do not divide by {tp}", param="tp")
    if model.num_kv_heads % tp and tp % model.num_kv_heads:
        raise BadConfig(f"{what}: {model.num_kv_heads} KV heads and {tp} shards do not divide", param="tp")
    if pp > model.num_layers:
        raise BadConfig(f"{what}: {model.num_layers} layers are too few", param="pp")
