"""FP8 quantization and a fake-quantized (w8a8) forward pass in torch: the oracle behind
`tests/goldens/`.

With codes q = e4m3(clamp(v * (1/s), -448, 448)), where 1/s is rounded to float32 once:

    scheme           weight scale s                                  activation scale s
    fp8_per_tensor   max(amax / 448, 2^-126)    max(amax / 448, 1/(448*512))
                     one a matrix               one a token
    fp8_per_channel  the same                   the same
                     one a row                  one a token
    fp8_per_block    max(amax, 1e-4) / 448      the same
                     one a 128 x 128 block      one a token and 128 channels

Partial blocks and groups take their scale from the elements they have. q, k, v are quantized as one
matrix (rows concatenated) and so are gate and up. An expert is quantized like a linear, per tensor
over gate and up together; per block its gate rows and its up rows have separate blocks. Codes times
scales and their products are float64 (exact up to its last bit), rounded to float32 once; bias,
silu and the routing weight are float32. Embeddings, lm_head, norms and routers are never quantized.

The two activation floors and the two weight floors are those of vLLM's online quantization;
everything here is written from the formulas above and shares no code with fp8jax.
"""

# pyright: reportMissingImports=false
# (torch is not a dependency of fp8jax; these scripts have an environment of their own)

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

SCHEMES = ("fp8_per_tensor", "fp8_per_block")
LAYER_KINDS = ("qkv", "o", "gate_up", "down")
FP8_MAX = 448.0
ACTIVATION_FLOOR = 1.0 / (448.0 * 512.0)
BLOCK = 128


def encode(values: Tensor, scale: Tensor) -> Tensor:
    """float8_e4m3fn codes of float32 values; `scale` broadcasts against them."""
    return (values * (1.0 / scale)).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def decode(codes: Tensor, scale: Tensor) -> Tensor:
    """codes * scale in float64, which holds the product exactly."""
    return codes.double() * scale.double()


def spread(scale: Tensor, rows: int, columns: int, block_rows: int = BLOCK) -> Tensor:
    """One scale an element from one scale a block: [⌈n/block_rows⌉, ⌈k/128⌉] -> [n, k]."""
    return scale.repeat_interleave(block_rows, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]


def block_amax(values: Tensor, block_rows: int) -> Tensor:
    """Largest magnitude of each block_rows x 128 block; the zero padding of the last blocks changes
    no maximum."""
    n, k = values.shape
    padded = nn.functional.pad(values.abs(), (0, -k % BLOCK, 0, -n % block_rows))
    return padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, block_rows)).amax((1, 3))


def quantize_weight(weight: Tensor, scheme: str) -> tuple[Tensor, Tensor, Tensor]:
    """[n, k] float32 -> codes [n, k], scale as stored, scale as it broadcasts."""
    if scheme == "fp8_per_tensor":
        scale = (weight.abs().amax() / FP8_MAX).clamp(min=2.0**-126).reshape(1)
        wide = scale
    elif scheme == "fp8_per_channel":
        scale = wide = (weight.abs().amax(1, keepdim=True) / FP8_MAX).clamp(min=2.0**-126)
    else:
        scale = block_amax(weight, BLOCK).clamp(min=1e-4) / FP8_MAX
        wide = spread(scale, *weight.shape)
    return encode(weight, wide), scale, wide


def quantize_activation(x: Tensor, granularity: str) -> tuple[Tensor, Tensor, Tensor]:
    """[m, k] float32 -> codes [m, k], scale as stored, scale as it broadcasts. Granularity: tensor,
    token, group."""
    if granularity == "group":
        scale = (block_amax(x, 1) / FP8_MAX).clamp(min=ACTIVATION_FLOOR)
        wide = spread(scale, *x.shape, block_rows=1)
    else:
        amax = (
            x.abs().amax(1, keepdim=True)
            if granularity == "token"
            else x.abs().amax().reshape(1, 1)
        )
        scale = wide = (amax / FP8_MAX).clamp(min=ACTIVATION_FLOOR)
    return encode(x, wide), scale, wide


def dequantized_weight(weight: Tensor, scheme: str) -> Tensor:
    codes, _, wide = quantize_weight(weight, scheme)
    return decode(codes, wide)


class StraightThrough(torch.autograd.Function):
    """The decoded activations, with the gradient of those that were quantized."""

    @staticmethod
    def forward(_context, decoded: Tensor, _x: Tensor) -> Tensor:  # pyright: ignore
        return decoded

    @staticmethod
    def backward(_context, gradient: Tensor) -> tuple[None, Tensor]:  # pyright: ignore
        return None, gradient.float()


class FakeQuantLinear(nn.Module):
    """y = dequantize(quantize(x)) @ weight.T + bias, with `weight` [n, k] already dequantized to
    float64."""

    def __init__(self, weight: Tensor, bias: Tensor | None, granularity: str):
        super().__init__()
        self.weight, self.bias, self.granularity = weight, bias, granularity

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        codes, _, wide = quantize_activation(rows.detach(), self.granularity)
        out = (StraightThrough.apply(decode(codes, wide), rows) @ self.weight.T).float()
        out = out if self.bias is None else out + self.bias
        return out.reshape(*x.shape[:-1], -1)


class FakeQuantExperts(nn.Module):
    """Routed experts with quantized weights and quantized inputs of both products, silu(gate) * up
    between them."""

    def __init__(self, experts: nn.Module, scheme: str):
        super().__init__()
        granularity = activation_granularity(scheme)
        self.gate_up, self.down = nn.ModuleList(), nn.ModuleList()
        for gate_up, down in zip(experts.gate_up_proj, experts.down_proj, strict=True):
            parts = (
                (gate_up,) if scheme == "fp8_per_tensor" else gate_up.chunk(2)
            )  # gate and up share no block
            rows = torch.cat([dequantized_weight(part, scheme) for part in parts])
            self.gate_up.append(FakeQuantLinear(rows, None, granularity))
            self.down.append(FakeQuantLinear(dequantized_weight(down, scheme), None, granularity))

    def forward(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in range(len(self.gate_up)):
            token, slot = torch.where(top_k_index == expert)
            if token.numel():
                gate, up = self.gate_up[expert](x[token]).chunk(2, -1)
                y = self.down[expert](nn.functional.silu(gate) * up)
                out.index_add_(0, token, y * top_k_weights[token, slot, None])
        return out


def activation_granularity(scheme: str) -> str:
    return "group" if scheme == "fp8_per_block" else "token"


def fake_quantized(
    model: PreTrainedModel,
    *,
    linear: str | None = None,
    moe: str | None = None,
    kinds: tuple[str, ...] = LAYER_KINDS,
    granularity: str | None = None,
) -> PreTrainedModel:
    """A copy of `model` whose layers of these kinds compute in fake FP8."""
    model = copy.deepcopy(model)
    fused = {"qkv": ("q_proj", "k_proj", "v_proj"), "o": ("o_proj",)}
    fused |= {"gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}
    for module in list(model.modules()):
        children = dict(module.named_children())
        if linear:
            for names in map(fused.__getitem__, kinds):
                shards = [
                    children[name] for name in names if isinstance(children.get(name), nn.Linear)
                ]
                if len(shards) == len(names):
                    recipe = granularity or activation_granularity(linear)
                    weight = dequantized_weight(
                        torch.cat([shard.weight for shard in shards]), linear
                    )
                    rows = weight.split([shard.out_features for shard in shards])
                    for name, shard, part in zip(names, shards, rows, strict=True):
                        setattr(module, name, FakeQuantLinear(part, shard.bias, recipe))
        if moe and hasattr(children.get("experts"), "gate_up_proj"):
            module.experts = FakeQuantExperts(children["experts"], moe)
    return model
