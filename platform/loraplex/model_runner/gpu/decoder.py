"""The decoder body on Triton kernels: one rank's forward pass over a step's tokens, eager or inside a graph capture.

The same order of operations as ``model_runner.decoder``; a projection leaves what its LoRA adds to the operation that
reads the GEMM's output. Batch-invariant steps take the operations of which no row depends on the others, the same in
every step: GEMMs of our own, one number of parts of a context, expands apart. Owns scratch; weights, pages and routes
are handed in. Called by the executor under ``torch.inference_mode``.
Legend, sizes of the rank's part: T tokens, D hidden, B sampled rows, V vocabulary, C = q + k + v columns, J gate + up
columns, I = J / 2.
"""

from collections.abc import Sequence

import loraplex_kernels
import torch
from loraplex_kernels.gpu.activation import silu_mul
from loraplex_kernels.gpu.attention import (
    decode_attention,
    decode_scratch,
    prefill_attention,
    prefill_block_tokens,
)
from loraplex_kernels.gpu.dense import DenseProjections
from loraplex_kernels.gpu.linear import linear
from loraplex_kernels.gpu.lora import LoraTable, PendingExpand, Site
from loraplex_kernels.gpu.lora_project import LoraProjections
from loraplex_kernels.gpu.norm import add_rms_norm, embed, rms_norm
from loraplex_kernels.gpu.peers import add_peers_rms_norm
from loraplex_kernels.gpu.rotary_kv import rotary_write_kv

from loraplex.model_runner.arena import Arena
from loraplex.model_runner.gpu.adapters import Arrival
from loraplex.model_runner.gpu.buckets import MAX_SEVERAL
from loraplex.model_runner.gpu.inputs import DeviceStep
from loraplex.model_runner.peers import Peers
from loraplex.model_runner.shard import Shard
from loraplex.model_runner.weights import DecoderWeights, LayerWeights


class GpuDecoder:
    def __init__(
        self,
        shard: Shard,
        weights: DecoderWeights,
        arena: Arena,
        peers: Peers,
        *,
        table: LoraTable,
        page_table: torch.Tensor,
        last_token: torch.Tensor,
        frequencies: torch.Tensor,
        max_rows: int,
        max_parts: int,
        max_step_tokens: int,
        batch_invariant: bool,
    ) -> None:
        """``page_table``: (slots, pages) int32; ``last_token``: (slots,) int32; ``frequencies``: (H / 2,) fp32.

        ``max_parts``: of the contexts of a step's rows of one token. ``batch_invariant``: steps must come from
        ``StepInputs`` of the same kind, and no weight may be packed.
        """
        device = arena.pages.device
        model = shard.local
        self._model = model
        self._peers = peers
        self._weights = weights
        self._arena = arena.elements
        self._layout = arena.kv.layout
        self._page_table = page_table
        self._last_token = last_token
        self._cos_sin = _cos_sin(frequencies, page_table.shape[1] * arena.spec.page_size)
        self._scale = float(model.head_dim) ** -0.5
        self._block_tokens = prefill_block_tokens(self._layout, model.num_heads, arena.dtype)
        self._lora = LoraProjections(
            table,
            {
                Site.QKV: model.hidden_size,
                Site.O: model.q_size,
                Site.GATE_UP: model.hidden_size,
                Site.DOWN: model.intermediate_size,
            },
            {
                Site.QKV: (model.q_size, model.kv_size, model.kv_size),
                Site.O: (model.hidden_size,),
                Site.GATE_UP: (model.intermediate_size, model.intermediate_size),
                Site.DOWN: (model.hidden_size,),
            },
            max_step_tokens,
            batch_invariant=batch_invariant,
            partial_sums=shard.shape.tp > 1,
        )
        self._dense = DenseProjections(device)
        self._is_sharded = shard.shape.tp > 1
        self._logits_BV: torch.Tensor | None = None
        """One for all steps: what graphs put out of their own stays allocated for each of them."""
        if shard.is_last:
            self._logits_BV = weights.layers[0].input_norm.new_empty((max_rows + MAX_SEVERAL, model.vocab_size))
        self._scratch = decode_scratch(max_parts, max_rows, model.num_heads, self._layout, device)
        self._batch_invariant = batch_invariant

    def run(self, step: DeviceStep, hidden_TD: torch.Tensor | None) -> torch.Tensor | None:
        """Runs the step and stores its keys and values. Returns (B, whole vocabulary) logits in the dtype of the
        weights, None when no row samples; before the last stage (T, D) residual. A step with ``arrivals`` waits for
        each before the layer that needs it.

        ``hidden_TD``: the residual of the stage before, which is overwritten; None on the first stage.
        """
        model, weights, eps = self._model, self._weights, self._model.rms_norm_eps
        num_tokens = step.token_ids.shape[0]
        first_norm = weights.layers[0].input_norm
        residual_TD = first_norm.new_empty((num_tokens, model.hidden_size)) if hidden_TD is None else hidden_TD
        normed_TD = torch.empty_like(residual_TD)
        attended_TC = first_norm.new_empty((num_tokens, model.q_size))
        gated_TI = first_norm.new_empty((num_tokens, model.intermediate_size))
        if hidden_TD is None:
            embedding = weights.embedding
            assert embedding is not None, "the first stage holds the embedding"
            embed(step.token_ids, step.token_slot, self._last_token, embedding, first_norm, eps, residual_TD, normed_TD)
        else:
            rms_norm(residual_TD, first_norm, eps, normed_TD)
        # Before the last stage any norm serves: the residual alone is handed on.
        last_norm = first_norm if weights.final_norm is None else weights.final_norm
        next_norms = [layer.input_norm for layer in weights.layers[1:]] + [last_norm]
        for index, (layer, next_norm) in enumerate(zip(weights.layers, next_norms, strict=True)):
            _wait(step.arrivals, index)
            qkv_TC, lora = self._project(normed_TD, layer.qkv, layer.qkv_bias, index, Site.QKV, step)
            self._rotate(qkv_TC, layer, index, step, lora)
            self._attend(qkv_TC, index, step, attended_TC)
            self._project_and_add(attended_TC, layer.o, index, Site.O, step, residual_TD, layer.post_norm, normed_TD)
            gate_up_TJ, lora = self._project(normed_TD, layer.gate_up, None, index, Site.GATE_UP, step)
            shrunk = None if step.lora is None else self._lora.ahead(num_tokens, index, step.lora)
            silu_mul(gate_up_TJ, gated_TI, lora=lora, shrink=shrunk)
            self._project_and_add(
                gated_TI, layer.down, index, Site.DOWN, step, residual_TD, next_norm, normed_TD, shrunk=shrunk
            )
        if weights.lm_head is None:
            return residual_TD
        if step.num_sampled == 0:
            return None
        rows_BD = normed_TD if step.sampled is None else normed_TD.index_select(0, step.sampled)
        assert self._logits_BV is not None, "the last stage has room for logits"
        logits_BV = self._logits_BV[: rows_BD.shape[0]]
        if self._is_sharded:
            return self._peers.gather_logits(self._linear(rows_BD, weights.lm_head), logits_BV)
        return self._linear(rows_BD, weights.lm_head, out=logits_BV)

    def run_captured(self, step: DeviceStep, hidden_TD: torch.Tensor | None) -> torch.Tensor:
        """``run`` of a step of a bucket, in which rows sample, were it only padding."""
        output = self.run(step, hidden_TD)
        assert output is not None, "no row samples"
        return output

    def _linear(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``out``: where to, without a bias; None: a new tensor."""
        if self._batch_invariant:
            out = x.new_empty((x.shape[0], weight.shape[0])) if out is None else out
            linear(x, weight, out, bias_N=bias)
            return out
        if out is None and (bias is not None or not x.is_cuda):
            return loraplex_kernels.linear(x, weight, bias)
        return self._dense.into(x, weight, x.new_empty((x.shape[0], weight.shape[0])) if out is None else out)

    def _project(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        layer: int,
        site: Site,
        step: DeviceStep,
        *,
        out: torch.Tensor | None = None,
        added: torch.Tensor | None = None,
        scratch: torch.Tensor | None = None,
        shrunk: PendingExpand | None = None,
    ) -> tuple[torch.Tensor, PendingExpand | torch.Tensor | None]:
        """The GEMM, and the LoRA that the next operation still has to add to its output. ``out``, ``added`` and
        ``scratch``: where they go, if given. ``shrunk``: what has been done of it."""
        if step.lora is None:
            return self._linear(x, weight, bias, out=out), None

        def gemm() -> torch.Tensor:
            return self._linear(x, weight, bias, out=out)

        return self._lora.project(gemm, x, layer, site, step.lora, added_TO=added, scratch=scratch, shrunk=shrunk)

    def _project_and_add(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        layer: int,
        site: Site,
        step: DeviceStep,
        residual_TD: torch.Tensor,
        norm_D: torch.Tensor,
        normed_TD: torch.Tensor,
        *,
        shrunk: PendingExpand | None = None,
    ) -> None:
        """o or down, summed over the shards, onto the residual; and its norm."""
        eps, rows, num_tokens = self._model.rms_norm_eps, self._peers.rows, x.shape[0]
        if rows is None or num_tokens > rows.num_rows:
            delta_TD, lora = self._project(x, weight, None, layer, site, step, shrunk=shrunk)
            add_rms_norm(residual_TD, self._peers.all_reduce(delta_TD), norm_D, eps, normed_TD, lora=lora)
            return
        turn = 0 if site is Site.O else 1
        own, added = rows.own[turn, :, :num_tokens]
        _, lora = self._project(
            x, weight, None, layer, site, step, out=own, added=added, scratch=rows.shrunk[turn], shrunk=shrunk
        )
        pending = lora if isinstance(lora, PendingExpand) else None
        add_peers_rms_norm(
            residual_TD,
            norm_D,
            eps,
            normed_TD,
            rows,
            turn,
            added=isinstance(lora, torch.Tensor),
            pending=pending,
            # What a second stream leaves makes it wait for two.
            overlap=lora is None or (pending is not None and pending.overlap),
        )

    def _rotate(
        self,
        qkv_TC: torch.Tensor,
        layer: LayerWeights,
        index: int,
        step: DeviceStep,
        lora: PendingExpand | torch.Tensor | None,
    ) -> None:
        rotary_write_kv(
            qkv_TC,
            step.position,
            step.token_slot,
            self._page_table,
            self._cos_sin,
            self._arena,
            self._layout,
            index,
            q_norm_H=layer.q_norm,
            k_norm_H=layer.k_norm,
            eps=self._model.rms_norm_eps,
            lora=lora,
        )

    def _attend(self, qkv_TC: torch.Tensor, index: int, step: DeviceStep, attended_TC: torch.Tensor) -> None:
        if step.decode is not None:
            decode_attention(
                qkv_TC,
                step.decode,
                self._page_table,
                self._arena,
                self._layout,
                index,
                attended_TC,
                self._scratch,
                scale=self._scale,
            )
        if step.prefill is not None:
            prefill_attention(
                qkv_TC,
                step.prefill,
                self._page_table,
                self._arena,
                self._layout,
                index,
                attended_TC,
                block_tokens=self._block_tokens,
                scale=self._scale,
                sliding_window=self._model.sliding_window,
            )


def _wait(arrivals: Sequence[Arrival], layer: int) -> None:
    for arrival in arrivals:
        if arrival.first_layer == layer:
            torch.cuda.current_stream().wait_event(arrival.event)


def _cos_sin(frequencies_F: torch.Tensor, num_positions: int) -> torch.Tensor:
    """(positions, H) fp32: cosines, then sines of position * frequency."""
    positions_P = torch.arange(num_positions, dtype=torch.float32, device=frequencies_F.device)
    angles_PF = positions_P[:, None] * frequencies_F
    return torch.cat((angles_PF.cos(), angles_PF.sin()), dim=-1)
