"""The flat buffer: its size, its order, its alignment."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loramux.errors import InvalidAdapter
from loramux.lora.adapter import Adapter
from loramux.lora.layout import ALIGN_BYTES, Factors, aligned, lay_out
from loramux.lora.peft_files import all_finite, read_adapter
from loramux.lora.snapshot import measure
from loramux.ops.site import Site

from tests.lora.folders import BY_NAME, K0, LIMITS, Q0, SITES, V0, factors, write

CPU = torch.device("cpu")


def weight_of(site: Site) -> torch.Tensor:
    """A base for DoRA's norms."""
    return torch.randn(
        site.out_features, site.in_features, generator=torch.Generator().manual_seed(site.index), dtype=torch.float32
    )


def build(folder: Path, dtype: torch.dtype = torch.float32) -> Adapter:
    return Adapter.build(read_adapter(folder, SITES, limits=LIMITS), SITES, CPU, dtype, weight_of)


def test_it_is_one_buffer_of_exactly_its_size(tmp_path: Path) -> None:
    """A slot at the largest rank would take 7 times the memory for this adapter."""
    tensors = factors(Q0, rank=1) | factors(V0, rank=7)
    adapter = build(write(tmp_path, tensors, r=1, rank_pattern={"v_proj": 7}))
    sizes = [1 * 16, 16 * 1, 7 * 16, 8 * 7]  # elements: q's A and B, v's A and B
    assert adapter.nbytes == sum(aligned(4 * size) for size in sizes) == measure(tmp_path, 4, LIMITS)
    assert adapter.buffer.untyped_storage().nbytes() == adapter.nbytes
    for weights in adapter.weights.values():
        for tensor in (weights.a, weights.b):
            assert tensor.untyped_storage().data_ptr() == adapter.buffer.untyped_storage().data_ptr()
            assert tensor.is_contiguous()
            assert tensor.data_ptr() % ALIGN_BYTES == 0
    assert (adapter.max_rank, adapter.site_count, adapter.target_modules) == (7, 2, ("q_proj", "v_proj"))


def test_what_fills_the_gaps_is_zero(tmp_path: Path) -> None:
    """A kernel that reads whole lines must find finite numbers there."""
    adapter = build(write(tmp_path, factors(K0, rank=1), r=1))
    used = torch.zeros_like(adapter.buffer, dtype=torch.bool)
    for tensor in (adapter.weights[BY_NAME[K0].index].a, adapter.weights[BY_NAME[K0].index].b):
        used[tensor.storage_offset() : tensor.storage_offset() + tensor.numel()] = True
    assert not used.all()
    assert not adapter.buffer[~used].any()


def test_offsets_and_ranks_tell_what_the_views_show(tmp_path: Path) -> None:
    adapter = build(write(tmp_path, factors(Q0, V0, bias=True), lora_bias=True))
    assert adapter.offsets.shape == (len(SITES), 4)
    assert adapter.offsets.dtype == torch.int64
    assert adapter.ranks.dtype == torch.int32
    for site in SITES:
        offsets = adapter.offsets[site.index].tolist()
        weights = adapter.weights.get(site.index)
        if weights is None:
            assert offsets == [-1, -1, -1, -1]
            assert adapter.ranks[site.index] == 0
            continue
        assert weights.bias is not None
        assert offsets == [t.storage_offset() for t in (weights.a, weights.b, weights.bias)] + [-1]
        assert adapter.ranks[site.index] == weights.a.shape[0]


def test_the_a_matrices_of_a_fused_group_are_adjacent(tmp_path: Path) -> None:
    """q, k, v read the same input: one multiplication by [A_q; A_k; A_v] instead of three."""
    adapter = build(write(tmp_path, factors(Q0, K0, V0, rank=2)))
    q, k, v = (adapter.weights[BY_NAME[name].index] for name in (Q0, K0, V0))
    stacked = adapter.buffer[q.a.storage_offset() : q.a.storage_offset() + 3 * 2 * 16].view(6, 16)
    assert torch.equal(stacked, torch.cat([q.a, k.a, v.a]))


def test_groups_end_where_the_input_changes() -> None:
    layout = lay_out([Factors(site, 16) for site in SITES], 2)
    order = sorted(((at.a, f"A{i}") for i, at in layout.offsets.items()), key=lambda pair: pair[0])
    order += sorted((at.b, f"B{i}") for i, at in layout.offsets.items())
    names = [name for _, name in sorted(order)]
    # q k v o share a parent and a width here; gate up; down.
    assert names[:14] == ["A0", "A1", "A2", "A3", "B0", "B1", "B2", "B3", "A4", "A5", "B4", "B5", "A6", "B6"]


@given(
    st.lists(
        st.tuples(st.integers(0, len(SITES) - 1), st.integers(1, 70), st.booleans(), st.booleans()),
        min_size=1,
        unique_by=lambda t: t[0],
    ),
    st.sampled_from([2, 4]),
)
def test_layout_has_no_overlap_and_no_waste(chosen: list[tuple[int, int, bool, bool]], item_bytes: int) -> None:
    factors_ = [Factors(SITES[index], rank, bias, scale) for index, rank, bias, scale in sorted(chosen)]
    layout = lay_out(factors_, item_bytes)
    spans = []
    for f in factors_:
        at = layout.offsets[f.site.index]
        spans += [(at.a, f.rank * f.site.in_features * item_bytes), (at.b, f.rank * f.site.out_features * item_bytes)]
        assert (at.bias >= 0) is f.bias
        if f.bias:
            spans.append((at.bias, f.site.out_features * item_bytes))
        assert (at.scale >= 0) is f.scale
        if f.scale:
            spans.append((at.scale, f.site.out_features * 4))  # float32, whatever the elements are
    end = 0
    for start, size in sorted(spans):
        assert start == end
        end = start + aligned(size) // item_bytes
    assert end == layout.elements


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dora_has_a_float32_scale_in_the_buffer(tmp_path: Path, dtype: torch.dtype) -> None:
    """magnitude / ‖W + s·B·A‖, from the factors as the file has them; read by address it is the same."""
    tensors = factors(Q0, K0, rank=3, dora=True)
    adapter = build(write(tmp_path, tensors, r=3, use_dora=True), dtype)
    sizes = [3 * 16, 16 * 3, 3 * 16, 8 * 3]  # elements: q's A and B, k's A and B
    expected = sum(aligned(dtype.itemsize * size) for size in sizes) + aligned(4 * 16) + aligned(4 * 8)
    assert adapter.nbytes == expected == measure(tmp_path, dtype.itemsize, LIMITS)
    assert not adapter.mixable
    for name in (Q0, K0):
        site, key = BY_NAME[name], f"base_model.model.{name}"
        a, b, magnitude = (tensors[f"{key}.lora_{p}"] for p in ("A.weight", "B.weight", "magnitude_vector"))
        scale = adapter.weights[site.index].scale
        assert scale is not None
        assert scale.dtype == torch.float32
        assert scale.data_ptr() % ALIGN_BYTES == 0
        at = int(adapter.offsets[site.index, 3])
        assert scale.data_ptr() == adapter.buffer.data_ptr() + at * dtype.itemsize
        norm = (weight_of(site).double() + 4 / 3 * b.double() @ a.double()).norm(dim=1)
        torch.testing.assert_close(scale.double(), magnitude / norm, rtol=1e-6, atol=0)


def test_a_scale_that_is_no_number_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, factors(Q0, dora=True), use_dora=True, lora_alpha=0)
    files = read_adapter(folder, SITES, limits=LIMITS)
    with pytest.raises(InvalidAdapter, match=r"q_proj.lora_magnitude_vector: cannot be divided by the norm"):
        Adapter.build(files, SITES, CPU, torch.float32, lambda site: weight_of(site).index_fill_(0, torch.tensor(3), 0))


def test_the_bits_of_a_scale_are_not_taken_for_numbers_of_the_buffer(tmp_path: Path) -> None:
    """The lower half of a float32 may look like NaN in bfloat16."""
    scale = torch.full((16,), 0x3F80_7F81, dtype=torch.int32).view(torch.float32)
    tensors = factors(Q0) | {f"base_model.model.{Q0}.lora_magnitude_vector": scale}
    files = read_adapter(write(tmp_path, tensors, use_dora=True, lora_alpha=0), SITES, limits=LIMITS)
    adapter = Adapter.build(files, SITES, CPU, torch.bfloat16, lambda site: torch.eye(16))
    assert adapter.buffer.isnan().any()
    assert torch.equal(adapter.weights[BY_NAME[Q0].index].scale, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_qalora_is_a_plain_adapter_of_the_expanded_size(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = factors(Q0, rank=3, pooling=4)
    folder = write(tmp_path / "pooled", tensors, r=3, use_qalora=True, qalora_group_size=4)
    adapter = build(folder, dtype)
    plain = build(write(tmp_path / "plain", factors(Q0, rank=3), r=3), dtype)
    assert adapter.nbytes == plain.nbytes == measure(folder, dtype.itemsize, LIMITS)
    assert adapter.mixable
    mine = adapter.weights[BY_NAME[Q0].index]
    a, b = (tensors[f"base_model.model.{Q0}.lora_{p}.weight"] for p in "AB")
    assert torch.equal(mine.a, a.repeat_interleave(4, dim=1).to(dtype))
    x = torch.randn(5, 16)
    pooled = x.view(5, 4, 4).mean(dim=2) * 4
    if dtype == torch.float32:
        torch.testing.assert_close(x @ mine.a.T @ mine.b.T, pooled @ a.T @ b.T * (4 / 3), rtol=1e-5, atol=1e-5)


def test_scaled_numbers_that_do_not_fit_the_dtype_are_refused(tmp_path: Path) -> None:
    """fp16 ends at 65504: an Inf in one adapter's B would be NaN in its answers."""
    folder = write(tmp_path, factors(Q0), lora_alpha=1e6)
    assert build(folder, torch.bfloat16).site_count == 1
    with pytest.raises(InvalidAdapter, match=r"q_proj.lora_B: has numbers that do not fit into torch.float16"):
        build(folder, torch.float16)


def test_the_buffer_does_not_keep_the_file_alive(tmp_path: Path) -> None:
    """fp32 tensors on a CPU need no cast; a view into the file's bytes would double the memory of every adapter."""
    files = read_adapter(write(tmp_path), SITES, limits=LIMITS)
    adapter = Adapter.build(files, SITES, CPU, torch.float32)
    file_buffer = files.factors[0].a.untyped_storage().data_ptr()
    assert adapter.buffer.untyped_storage().data_ptr() != file_buffer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_number_anywhere_is_found(dtype: torch.dtype, value: float) -> None:
    """The check trusts that aminmax hands NaN on, in its vectorized part, in its tail, and over threads."""
    for size in (1, 7, 64, 1000, 100_003):
        numbers = torch.randn(size).to(dtype)
        assert all_finite(numbers)
        for place in {0, size // 2, size - 1}:
            bad = numbers.clone()
            bad[place] = value
            assert not all_finite(bad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dora", [True, False])
def test_placed_on_a_device_the_views_are_of_its_buffer(
    tmp_path: Path, dora: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a fake device whose memory is the host's; DoRA's scales are float32 in a buffer of another dtype."""
    monkeypatch.setattr("loramux.lora.adapter.to_device", lambda host, device: host.clone())
    tensors = factors(Q0, V0, rank=3, dora=dora, bias=not dora)
    folder = write(tmp_path, tensors, r=3, use_dora=dora, lora_bias=not dora)
    host = build(folder, dtype)
    placed = host.place(torch.device("cuda"), keep=True)
    assert placed.host is host
    assert placed.buffer.data_ptr() == placed.weights.buffer.data_ptr() != host.buffer.data_ptr()
    assert (placed.digest, placed.nbytes, list(placed.weights)) == (host.digest, host.nbytes, list(host.weights))
    for site, weights in placed.weights.items():
        for name in ("a", "b", "bias", "scale"):
            view, original = getattr(weights, name), getattr(host.weights[site], name)
            if original is None:
                assert view is None
                continue
            assert torch.equal(view, original)
            assert view.untyped_storage().data_ptr() == placed.buffer.data_ptr()
            assert view.data_ptr() - placed.buffer.data_ptr() == original.data_ptr() - host.buffer.data_ptr()


def test_what_is_kept_of_an_adapter_that_is_put_out(tmp_path: Path) -> None:
    host = build(write(tmp_path))
    assert host.on_host is host.place(CPU, keep=True) is host
    meta = torch.device("meta")
    assert host.place(meta, keep=True).on_host is host
    assert host.place(meta, keep=False).on_host is None
    files = read_adapter(tmp_path, SITES, limits=LIMITS)
    assert Adapter.build(files, SITES, meta, torch.float32).on_host is None
    kept = Adapter.build(files, SITES, meta, torch.float32, keep=True).on_host
    assert kept is not None
    assert torch.equal(kept.buffer, host.buffer)
