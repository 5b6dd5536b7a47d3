"""Attention in 8 bits of others, from bf16 Q, K and V, contiguous [B, H, S, D] with D = 128.

cuDNN's `sdpa_fp8` through cudnn-frontend's graphs, dense, and cudnn-frontend's block-sparse FP8 (SageAttention's way of rounding, and K's
mean taken out), whose blocks are of 128 rows. Both need `pip install nvidia-cudnn-frontend`, the second nvidia-cutlass-dsl[cu13] 4.6.1 or
later too.
"""

import math

import torch

LARGEST = 448.0
BLOCK = 128


class CudnnFp8:
    """One plan of cuDNN. Rounding is done here, with one scale for each tensor, and is not in the time of a call.

    On a Hopper the output is in e4m3 too; its scale is taken from the largest output of a first call.
    """

    def __init__(self, q, k, v):
        import cudnn

        rounded, descales = zip(*map(self.rounded, (q, k, v)))
        graph = cudnn.pygraph(
            io_data_type=cudnn.data_type.FP8_E4M3,
            intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT,
        )

        def tensor(name, values, kind):
            return graph.tensor(name=name, dim=list(values.shape), stride=list(values.stride()), data_type=kind)

        number = lambda value: torch.full((1, 1, 1, 1), value, device=q.device)
        self.scale_o = number(1.0)
        # Weights are at most 1.
        numbers = [*map(number, descales), number(1 / LARGEST), number(LARGEST), self.scale_o]
        names = ["descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o"]
        inputs = {name: tensor(name, x, cudnn.data_type.FP8_E4M3) for name, x in zip("qkv", rounded)}
        inputs |= {name: tensor(name, x, cudnn.data_type.FLOAT) for name, x in zip(names, numbers)}
        out, _, amax_s, amax_o = graph.sdpa_fp8(**inputs, attn_scale=1 / math.sqrt(q.shape[-1]), generate_stats=False, name="sdpa")
        self.out = torch.empty_like(rounded[0])
        out.set_output(True).set_dim(list(q.shape)).set_stride(list(self.out.stride())).set_data_type(cudnn.data_type.FP8_E4M3)
        found = [number(0.0), number(0.0)]
        for amax in (amax_s, amax_o):
            amax.set_output(True).set_dim([1, 1, 1, 1]).set_stride([1, 1, 1, 1]).set_data_type(cudnn.data_type.FLOAT)
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        graph.check_support()
        graph.build_plans()
        self.graph = graph
        self.tensors = dict(zip(inputs.values(), [*rounded, *numbers])) | {out: self.out, amax_s: found[0], amax_o: found[1]}
        self.workspace = torch.empty(graph.get_workspace_size(), device=q.device, dtype=torch.uint8)
        self()
        self.scale_o.fill_(LARGEST / found[1].item())

    @staticmethod
    def rounded(x):
        """`x` in e4m3, and what its values are to be multiplied with."""
        scale = LARGEST / (x.abs().amax().float().item() or 1.0)
        return (x.float() * scale).to(torch.float8_e4m3fn), 1 / scale

    def __call__(self):
        self.graph.execute(self.tensors, self.workspace)

    def output(self):
        """What a call gives, in f32."""
        self()
        return self.out.float() / self.scale_o


class BlockSparseFp8:
    """Each query block sees so many key blocks: a share of them, the nearest ones. Rows after the last whole block are left out."""

    def __init__(self, q, k, v, density):
        count = q.shape[2] // BLOCK
        self.q, self.k, self.v = (x[:, :, : count * BLOCK].contiguous() for x in (q, k, v))
        seen = max(1, min(count, round(density * count)))
        first = (torch.arange(count, device=q.device) - seen // 2).clamp(0, count - seen)
        blocks = first[:, None] + torch.arange(seen, device=q.device)
        self.blocks = blocks.int().expand(*q.shape[:2], count, seen).contiguous()
        self.seen, self.pairs = seen, count * seen * BLOCK * BLOCK
        self.ready = None

    def __call__(self):
        """As its users call it, with rounding."""
        from cudnn.block_sparse_attention.api import block_sparse_attention_fp8_forward

        found = block_sparse_attention_fp8_forward(self.q, self.k, self.v, self.blocks, self.seen, sparse_block_size=BLOCK)
        return found["o_tensor"]

    def attend(self):
        """The kernel alone, on values that were rounded at the first call."""
        from cudnn.block_sparse_attention import _fp8_quant, _interface

        if self.ready is None:
            self.ready = _fp8_quant._quantize_sage_bhsd(self.q, self.k, self.v, v_layout="bhds")
        return _interface._bsa_attn_fwd_sm90_fp8_blk128(*self.ready, self.blocks, self.seen)[0]
