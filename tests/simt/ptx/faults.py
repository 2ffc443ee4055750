# SPDX-License-Identifier: BSD-3-Clause
"""Mistakes in inline asm, which only nvcc reads: the C++ models do not change with them."""

from __future__ import annotations

from dataclasses import dataclass

CONFORMANCE_80 = ("conformance_80", "ptx_conformance_80", "")
CONFORMANCE_90 = ("conformance_90a", "ptx_conformance_90a", "")
GEMM_80 = ("gemm_bf16", "simt_test_grouped_gemm", "grouped_gemm_matches_reference")
GEMM_90 = ("gemm_sm90", "simt_test_gemm_sm90", "")
MOE_90 = ("gemm_sm90", "simt_test_moe", "moe_forward_on_sm90")
BACKWARD_90 = ("gemm_sm90", "simt_test_moe", "moe_backward_on_sm90")


@dataclass(frozen=True)
class Fault:
    name: str
    header: str
    function: str  # the wrapper, or macro, that is edited
    before: str  # once or more in it; the first is replaced
    after: str
    where: tuple[str, str, str]  # the object compiled again, the program that must fail, and its tests (all if empty)


def _sm80(name: str, function: str, before: str, after: str, where: tuple[str, str, str] = CONFORMANCE_80) -> Fault:
    return Fault(name, "ptx.cuh", function, before, after, where)


def _sm90(name: str, function: str, before: str, after: str, where: tuple[str, str, str] = CONFORMANCE_90) -> Fault:
    return Fault(name, "hopper.cuh", function, before, after, where)


SUMS_IN_OUT = '"+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])'

FAULTS = [
    # constraints
    _sm80("mma: sums are outputs only", "mma_bf16", SUMS_IN_OUT, SUMS_IN_OUT.replace("+f", "=f"), GEMM_80),
    _sm80("mma f16: sums are outputs only", "mma_f16", SUMS_IN_OUT, SUMS_IN_OUT.replace("+f", "=f")),
    _sm80("mma tf32: sums are outputs only", "mma_tf32", SUMS_IN_OUT, SUMS_IN_OUT.replace("+f", "=f")),
    _sm90("opaque: an output only", "opaque", '"+r"(value)', '"=r"(value)', GEMM_90),
    # operands
    _sm80("mma: registers of b swapped", "mma_bf16", "{%8, %9}", "{%9, %8}"),
    _sm80("mma: registers of a swapped", "mma_f16", "{%4, %5, %6, %7}", "{%4, %6, %5, %7}"),
    _sm80(
        "mma: sums added elsewhere",
        "mma_tf32",
        '{%8, %9}, "\n      "{%0, %1, %2, %3}',
        '{%8, %9}, "\n      "{%1, %0, %2, %3}',
    ),
    _sm80("mma: types of another wrapper", "mma_bf16", "f32.bf16.bf16.f32", "f32.f16.f16.f32"),
    _sm80("mma: f16 read as bf16", "mma_f16", "f32.f16.f16.f32", "f32.bf16.bf16.f32"),
    _sm80("ldmatrix: results swapped", "ldmatrix_x4", "{%0, %1, %2, %3}", "{%0, %2, %1, %3}"),
    _sm80("ldmatrix: no .trans", "ldmatrix_x4_trans", "x4.trans", "x4"),
    _sm80("ldmatrix x2: .trans", "ldmatrix_x2", "x2.shared", "x2.trans.shared"),
    _sm80("ldmatrix x2: results swapped", "ldmatrix_x2_trans", "{%0, %1}", "{%1, %0}"),
    _sm80("cp.async: all bytes valid", "cp_async16", "16, %2;", "16, 16;"),
    _sm80("cp.async: valid is the size", "cp_async16_zeros", "16, %2;", "16, 16;"),
    _sm80("cp.async: addresses swapped", "cp_async16", "[%0], [%1]", "[%1], [%0]"),
    _sm80("cp.async: half of the bytes", "cp_async8", "[%1], 8, %2", "[%1], 4, %2"),
    _sm80("cp.async: valid inverted", "cp_async4", "valid ? 4 : 0)\n", "valid ? 0 : 4)\n"),
    _sm80(
        "cp.async: too large for its address",
        "cp_async4",
        "cp.async.ca.shared.global [%0], [%1], 4",
        "cp.async.ca.shared.global [%0], [%1], 8",
    ),
    _sm80("cp.async: waits for one group less", "cp_async_wait", '"n"(N)', '"n"(N + 1)', GEMM_80),
    _sm80(
        "cp.async: never committed",
        "cp_async_commit",
        'asm volatile("cp.async.commit_group;" ::: "memory");',
        "",
        GEMM_80,
    ),
    _sm80(
        "shared address: the generic one",
        "smem_u32",
        "__cvta_generic_to_shared(shared)",
        "reinterpret_cast<uintptr_t>(shared)",
    ),
    _sm80("atom: adds its result", "define PTX_ADD", "%0, [%1], %2;", "%0, [%1], %0;"),
    _sm80(
        "st: a result never stored", "define PTX_STORE", 'instruction " [%0], %1;"', '"// " instruction " [%0], %1;"'
    ),
    _sm80("bar.sync: operands swapped", "bar_sync", "bar.sync %0, %1", "bar.sync %1, %0"),
    _sm80("bar.arrive: another barrier", "bar_arrive", "bar.arrive %0, %1", "bar.arrive 2, %1"),
    # Hopper
    _sm90("mbarrier: parity is the address", "mbar_wait", "p, [%0], %1", "p, [%0], %0"),
    _sm90("mbarrier: waits for the other parity", "mbar_test_wait", "selp.u32 %0, 1, 0, p", "selp.u32 %0, 0, 1, p"),
    _sm90("mbarrier: try_wait once", "mbar_wait", '"@!p bra again;\\n"', '""', GEMM_90),
    _sm90(
        "mbarrier: expects no bytes",
        "mbar_expect_tx",
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;",
        "mbarrier.arrive.shared::cta.b64 _, [%0];",
    ),
    _sm90("mbarrier: one arrival", "mbar_init", "[%0], %1;", "[%0], 1;", GEMM_90),
    _sm90(
        "mbarrier: never arrives",
        "mbar_arrive",
        'asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_u32(bar)) : "memory");',
        "",
    ),
    _sm90(
        "mbarrier: initialisation without a fence",
        "fence_barrier_init",
        'asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");',
        "",
        GEMM_90,
    ),
    _sm90("TMA: coordinates swapped", "tma_load_3d", "{%3, %4, %5}", "{%4, %3, %5}"),
    _sm90("TMA: coordinates of a plane swapped", "tma_load_2d", "{%3, %4}", "{%4, %3}"),
    _sm90("TMA store: coordinates swapped", "tma_store_2d", "{%2, %3}", "{%3, %2}"),
    _sm90("TMA store: another plane", "tma_store_3d", "{%2, %3, %4}", "{%2, %3, %3}"),
    _sm90(
        "TMA store: never committed",
        "tma_store_commit",
        'asm volatile("cp.async.bulk.commit_group;" ::: "memory");',
        "",
    ),
    _sm90("bulk copy: addresses swapped", "bulk_load", "[%0], [%1], %2", "[%1], [%0], %2"),
    _sm90("stmatrix: registers swapped", "stmatrix_x4", "{%1, %2, %3, %4}", "{%2, %1, %3, %4}"),
    _sm90("stmatrix: no .trans", "stmatrix_x4_trans", "x4.trans", "x4"),
    _sm90(
        "wgmma: transposes exchanged",
        "define WGMMA_SHARED",
        '"n"(kTransposeA), "n"(kTransposeB)',
        '"n"(kTransposeB), "n"(kTransposeA)',
    ),
    _sm90("wgmma: never accumulates", "define WGMMA_SHARED", "p, 1, 1,", "0, 1, 1,"),
    _sm90("wgmma: accumulates when it must not", "define WGMMA_REGISTER", "setp.ne.b32", "setp.eq.b32"),
    _sm90("wgmma: registers of a swapped", "define WGMMA_REGISTER", '"r"(a[0]), "r"(a[1])', '"r"(a[1]), "r"(a[0])'),
    _sm90("wgmma: descriptors exchanged", "define WGMMA_SHARED", '"l"(a), "l"(b)', '"l"(b), "l"(a)'),
    _sm90("wgmma: no fence", "wgmma_fence", 'asm volatile("wgmma.fence.sync.aligned;" ::: "memory");', "", GEMM_90),
    _sm90(
        "wgmma: no wait",
        "wgmma_wait",
        'asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");',
        "",
        GEMM_90,
    ),
    _sm90(
        "dependent: no wait",
        "wait_for_kernel_before",
        'asm volatile("griddepcontrol.wait;" ::: "memory");',
        "",
        MOE_90,
    ),
    _sm90("reciprocal: of nothing", "reciprocal", "rcp.approx.ftz.f32", "mov.f32", MOE_90),
    _sm90("tensor map: the address of the map", "tensor_map_replace_address", "[%0], %1;", "[%0], %0;"),
    _sm90("tensor map: another dimension", "tensor_map_replace_size", '"n"(kDimension)', '"n"(0)'),
    _sm90(
        "tensor map: no release",
        "fence_tensor_map_release",
        'asm volatile("fence.proxy.tensormap::generic.release.gpu;" ::: "memory");',
        "",
    ),
    _sm90(
        "tensor map: no acquire",
        "fence_tensor_map_acquire",
        'asm volatile("fence.proxy.tensormap::generic.acquire.gpu [%0], 128;" ::"l"(map) : "memory");',
        "",
    ),
    _sm90("move: of itself", "move", "mov.f32 %0, %1;", "mov.f32 %0, %0;", BACKWARD_90),
]
