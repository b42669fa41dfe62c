"""Kernels of the codec and of selection against their plain versions, on any device that they run on."""

import numpy as np
import torch

from megatron_m3.ops import cached_attention
from megatron_m3.ops.codec import trellis, triton_trellis
from megatron_m3.ops.select_tokens import reference, select_tokens
from megatron_m3.ops.select_tokens.triton_backend import token_weights


def check_search(bits, count, scale, device):
    """The states are those of the plain search; small scales make ties, and 0 nothing else."""
    generator = torch.Generator().manual_seed(len(bits))
    tables = (scale * trellis.start_tables()[torch.tensor(bits)]).round()
    numbers = (scale * torch.randn(len(bits), count, generator=generator)).round()
    truth = trellis.search(numbers, tables, bits)
    found = triton_trellis.search(numbers.to(device), tables.to(device), bits)
    assert (found.dtype, found.device.type) == (torch.int64, torch.device(device).type)
    assert torch.equal(found.cpu(), truth)


def trained_code(held, size, code_bytes):
    """A code for keys and values of ``held`` lists, and the codec around it."""
    from megatron_m3.memory.joint_codec import JointCodec
    from megatron_m3.ops.codec.transform import TransformCode

    count, generator = int(held.sum()), torch.Generator().manual_seed(0)
    vectors = torch.randn(count, 150, 2 * size, generator=generator) * torch.linspace(0, 2, 2 * size).exp() + 1
    even = torch.eye(2 * size).expand(count, -1, -1)
    code = TransformCode.train(vectors, even, held.nonzero()[:, 1], code_bytes)
    frequency = 1e4 ** (-torch.arange(0, size, 2).double() / size)
    return JointCodec(name=f"KLT{code_bytes}", head_size=size, held_LG=held, num_heads=held.shape[1], code=code,
                      frequency=frequency)


class Records:
    """Random records of some heads of a bank, and the codec that decodes them."""

    def __init__(self, codec, kept, heads=slice(None), positions=50):
        from megatron_m3.memory.record import RecordLayout

        generator, N, K = torch.Generator().manual_seed(1), len(kept), 3
        L, G = codec.held_LG.shape
        layout = RecordLayout(held_LG=codec.held_LG, num_kept_tokens=K, token_bytes=codec.token_bytes)
        size = (N, int(codec.held_LG.sum()), layout.list_bytes)
        codes = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8).numpy()
        places = torch.randint(0, positions, (N, L, G, K), generator=generator, dtype=torch.int16)
        records = layout.pack(codes, places, torch.tensor(kept, dtype=torch.int32))
        part, pieces = layout.part(heads)
        own = np.ascontiguousarray(np.concatenate([records[:, piece] for piece in pieces], 1))
        codes, places, *_ = part.fields(own)
        self.codes, self.num_kept = torch.from_numpy(codes), torch.tensor(kept)
        self.positions = torch.from_numpy(np.ascontiguousarray(places).view("<i2").astype("i2")).view(N, -1, K)
        self.unpacked = part.unpack(own)
        self.held, self.truth = part.held_LG, codec.decode(*self.unpacked, heads=heads)

    def decode(self, decoder, placements, out):
        """Decode into ``out`` [L, X, B, G, M, D], on its device."""
        decoder.decode(*(part.to(out.device) for part in (self.codes, self.positions, self.num_kept)),
                       torch.tensor(placements, device=out.device), out)
        return out


HELD = torch.tensor([[True, False, True], [True, True, True]])


def check_decode(size, code_bytes, heads, dtype, device):
    """Keys and values of all records are the codec's to twice ``dtype``'s rounding; every run gives the same bits."""
    from megatron_m3.ops.codec.triton_decode import SlotDecoder

    codec = trained_code(HELD, size, code_bytes)
    records = Records(codec, [3, 0, 2, 1, 3], heads)
    decoder = SlotDecoder(codec.code, codec.frequency, HELD, heads, 50, device)

    def run():
        out = torch.full(records.truth.shape, torch.nan, dtype=dtype, device=device).permute(1, 2, 0, 3, 4, 5)
        return records.decode(decoder, [[row, row, 0] for row in range(5)], out).permute(0, 3, 2, 1, 4, 5).cpu()

    found, truth = run(), records.truth.permute(1, 3, 0, 2, 4, 5)[records.held]
    assert found[~records.held].isnan().all()
    error = {torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(found[records.held].float(), truth, rtol=error, atol=1e-5 * float(truth.abs().max()))
    assert torch.equal(found[records.held], run()[records.held])


def check_codec(size, code_bytes, heads, dtype, device):
    """The codec's kernel gives the memories that torch gives on the CPU: 0 where nothing is held."""
    codec = trained_code(HELD, size, code_bytes)
    records, there = Records(codec, [3, 0, 2, 1, 3], heads), codec.to(device)
    found = there.decode_at_once(*records.unpacked, heads, dtype)
    assert (found.dtype, found.device.type) == (dtype, torch.device(device).type)
    assert torch.equal(found.cpu() == 0, records.truth == 0)
    error = {torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(found.float().cpu(), records.truth, rtol=error,
                               atol=1e-5 * float(records.truth.abs().max()))
    nothing = there.decode_at_once(*(part[:0] for part in records.unpacked), heads, dtype)
    assert nothing.shape == (0, *found.shape[1:])


def check_slots_of_a_cache(device):
    """Two references of one sequence of three, one of another: only their slots change, and are what they are alone."""
    from megatron_m3.ops.codec.triton_decode import SlotDecoder

    codec = trained_code(HELD, 16, 4)
    records = Records(codec, [3, 2, 1])
    decoder = SlotDecoder(codec.code, codec.frequency, HELD, slice(None), 50, device)
    cache = torch.full((2, 2, 3, 3, 12, 16), torch.nan, device=device)
    out = records.decode(decoder, [[2, 0, 0], [1, 2, 3], [2, 2, 0]], cache[..., 4:10, :]).cpu()
    truth = torch.full_like(out, torch.nan)
    for record, sequence, slot in [(2, 0, 0), (1, 2, 3), (2, 2, 0)]:
        truth[:, :, sequence, :, slot : slot + 3] = records.truth[record]
    truth.transpose(1, 3)[~HELD] = torch.nan
    torch.testing.assert_close(out, truth, rtol=1e-5, atol=1e-4, equal_nan=True)
    assert torch.equal(out[0, 0, 0, 0, :3], out[0, 0, 2, 0, :3])
    assert cache[..., :4, :].isnan().all()
    assert cache[..., 10:, :].isnan().all()


def check_weights(size, dtype, rule, device):
    """Weights are as near to the truth as those of the plain version, and keep its tokens."""
    tokens, lengths, heads, groups, head_size = size
    generator, N = torch.Generator().manual_seed(0), len(lengths)
    drawn = [torch.randn(tokens, N, some, head_size, generator=generator) for some in (heads, groups, groups)]
    # rows of a reference lie apart, as in a sequence-first batch
    query, key, value = (some.to(device, dtype).transpose(0, 1) for some in drawn)
    lengths = torch.tensor(lengths, device=device)
    found = token_weights(query, key, lengths, rule, value)
    truth = reference.token_weights(query.double(), key.double(), lengths, rule, value.double())
    plain = reference.token_weights(query, key, lengths, rule, value)
    inside = ~truth.isneginf()
    assert torch.equal(found.isneginf(), ~inside)
    if inside.any():
        largest, limit = truth[inside].abs().max(), (plain - truth)[inside].abs().max()
        assert (found - truth)[inside].abs().max() <= 2 * limit + 1e-6 * largest
    assert torch.equal(found, token_weights(query, key, lengths, rule, value))
    choices = [select_tokens(query, key, lengths, 5, rule, None, value, backend) for backend in ("torch", "triton")]
    for one, other in zip(*choices, strict=True):
        assert torch.equal(one, other)


def check_rope(size, dtype, device):
    """Vectors that lie apart, and their gradients, have the bits of plain torch, wherever their sequences stand.

    Triton's interpreter cuts off what bf16 cannot hold, where a device and torch round.
    """
    from megatron_m3.model.rope import Rope
    from megatron_m3.ops.rope import rotate

    (S, B, H, D), generator = size, torch.Generator().manual_seed(0)
    fused = torch.randn(S, B, H, 2 * D + 2, generator=generator).to(device, dtype)
    grad = torch.randn(B, S, H, D, generator=generator).to(device, dtype).transpose(0, 1)
    for shape in ((S, 1), (1, B), (S, B)):
        positions = torch.randint(0, 5000, shape, generator=generator).to(device)
        table, results = Rope(D, 1e4).table(positions, dtype), []
        for backend in ("torch", "triton"):
            leaf = fused.clone().requires_grad_()
            turned = rotate(leaf[..., 1 : D + 1], table, backend)
            results.append([turned, *torch.autograd.grad(turned, leaf, grad)])
        error = 2**-7 if (dtype, device) == (torch.bfloat16, "cpu") else 0.0
        for plain, found in zip(*results, strict=True):
            torch.testing.assert_close(found, plain, rtol=error, atol=0.0)


def check_cached_attention(size, dtype, device):
    """Outputs, and what the cache holds afterwards, are as near to the truth as those of the plain version.

    What no token may read holds NaN; every run gives the same bits.
    """
    from megatron_m3.model.rope import Rope

    lengths, prefix, slots, heads, groups, D, hidden = size
    generator, B = torch.Generator().manual_seed(0), len(lengths)
    first, columns = prefix + slots, prefix + slots + max(lengths) + 3
    fused = torch.randn(B, heads + 2 * groups, D, generator=generator).to(device, dtype)
    query, key, value = fused.split([heads, groups, groups], 1)
    cache = torch.randn(2, B, groups, columns, D, generator=generator)
    mask = torch.zeros(B, slots).masked_fill_(torch.rand(B, slots, generator=generator) < 0.3, -torch.inf)
    for row, length in enumerate(lengths):
        cache[:, row, :, first + length :] = torch.nan
        cache[:, row, :, prefix:first][:, :, mask[row] != 0] = torch.nan
    reads = torch.tensor(hidden, dtype=torch.bool, device=device) if hidden else None
    lengths_B = torch.tensor(lengths, device=device)
    table = Rope(D, 1e4).table(lengths_B + 70, dtype)

    def run(function, kind):
        keys, values = cache.to(device, dtype).to(kind)
        given = (part.to(kind) for part in (query, key, value))
        out = function(*given, keys, values, table, lengths_B, prefix_length=prefix,
                       mask_BM=mask.to(device, kind) if slots else None, hidden_G=reads)
        assert out.dtype == kind
        return out, keys.nan_to_num(), values.nan_to_num()

    truth = run(cached_attention.reference.cached_attention, torch.float64)
    plain = run(cached_attention.reference.cached_attention, dtype)
    found, again = (run(cached_attention.triton_backend.cached_attention, dtype) for _ in range(2))
    # the interpreter cuts off what bf16 cannot hold
    slack = 2**-7 if (dtype, device) == (torch.bfloat16, "cpu") else 1e-6
    for one, other, exact, same in zip(found, plain, truth, again, strict=True):
        assert one.isfinite().all()
        assert (one - exact).abs().max() <= 2 * (other - exact).abs().max() + slack * exact.abs().max()
        assert torch.equal(one, same)


def check_equal_tokens(dtype, device):
    """Tokens that are equal have equal weights, so the earlier ones are kept; padding changes no bit."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(0, 9, (80,), generator=generator)
    query, key = (torch.randn(9, heads, 16, generator=generator).to(dtype)[words][None].to(device) for heads in (4, 2))
    length = torch.tensor([70], device=device)
    weights = token_weights(query, key, length)[..., :70]
    assert torch.equal(token_weights(query[:, :70], key[:, :70], length), weights)
    for word in range(9):
        assert (weights[..., (words == word)[:70]] == weights[..., (words == word)[:70]][..., :1]).all()
    indices, _ = select_tokens(query, key, length, 6, backend="triton")
    for group in range(2):
        best = sorted(range(70), key=lambda place, group=group: (-float(weights[0, group, place]), place))
        assert indices[0, group].tolist() == sorted(best[:6])
