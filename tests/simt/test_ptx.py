# SPDX-License-Identifier: BSD-3-Clause
"""The PTX that nvcc generates for each wrapper in csrc/cuda/ptx.cuh and hopper.cuh, which no CPU test executes.

Registers are written as their contents: p0 is the kernel's first parameter, p1[8] the value 8 bytes after the second
parameter's address, and a result is written as the place it is stored to. So a swapped operand shows.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")

# ---- reading PTX ----------------------------------------------------------------------------------------------------

ASM = re.compile(r"// begin inline asm\n(.*?)// end inline asm", re.DOTALL)
REGISTER = r"%(?:rd|rs|r|f|fd|p)\d+"


class Kernel:
    """One kernel's PTX: its inline asm, and the contents of its registers."""

    def __init__(self, name: str, text: str):
        self.name = name
        self.asm = [" ".join(block.split()) for block in ASM.findall(text)]
        self.definitions = {}
        self.stores = {}
        for line in (line.strip().rstrip(";") for line in ASM.sub("", text).splitlines()):
            if match := re.fullmatch(r"st\.global\S*\s+\[(%rd\d+)(?:\+(\d+))?\], (%\w+)", line):
                self.stores[match[3]] = (match[1], int(match[2] or 0))
            elif match := re.fullmatch(rf"(\S+)\s+({REGISTER}), (.*)", line):
                self.definitions[match[2]] = (match[1], match[3])

    def value(self, register: str) -> str:
        if register in self.definitions:
            return self.computed(*self.definitions[register])
        stored = self.stored(register)
        return register if stored is None else f"{self.value(stored[0])}[{stored[1]}]"

    def stored(self, register: str) -> tuple[str, int] | None:
        """Where a result is stored: directly, or through instructions that compute another register from it."""
        if register in self.stores:
            return self.stores[register]
        for result, (_, operands) in self.definitions.items():
            if register in operands.split(", ") and (stored := self.stored(result)):
                return stored
        return None

    def computed(self, operation: str, operands: str) -> str:
        if match := re.fullmatch(r"\[kernel_\w+_param_(\d+)\]", operands):
            return f"p{match[1]}"
        if match := re.fullmatch(r"kernel_\w+_param_(\d+)", operands):
            return f"p{match[1]}"
        if match := re.fullmatch(r"\[(%rd\d+)(?:\+(\d+))?\]", operands):
            return f"{self.value(match[1])}[{match[2] or 0}]"
        if operands == "switchgear_dynamic_shared":
            return "shared"
        values = [self.value(word) if word.startswith("%") else word for word in operands.split(", ")]
        if operation.startswith(("cvta", "mov")):
            return values[0]
        if operation.startswith("add"):
            return "+".join(values)
        if operation.startswith("shl"):
            return f"{1 << int(values[1])}*{values[0]}"
        if operation.startswith("xor"):
            return "^".join(values)
        if operation.startswith("setp.eq"):
            return f"not {values[0]}"
        if operation.startswith("selp"):
            return f"({values[2]} ? {values[0]} : {values[1]})"
        return f"{operation}({', '.join(values)})"

    def readable(self) -> str:
        return "\n".join(re.sub(REGISTER, lambda match: self.value(match[0]), asm) for asm in self.asm)


def compile_all(output: Path, *flags: str) -> None:
    source = ROOT / "tests/simt/ptx_all.cu"
    subprocess.run(["nvcc", "-std=c++20", *flags, f"-I{ROOT / 'csrc/cuda'}", source, "-o", output], check=True)


def compile_kernels(tmp: Path, *flags: str) -> dict[str, Kernel]:
    output = tmp / "all.ptx"
    compile_all(output, "-ptx", *flags)
    parts = re.split(r"\.visible \.entry kernel_(\w+)\(", output.read_text())
    return {name: Kernel(name, body) for name, body in zip(parts[1::2], parts[2::2], strict=True)}


# ---- what is expected -----------------------------------------------------------------------------------------------

AMPERE = {
    "smem_u32": "",
    "cp_async16": "cp.async.cg.shared.global [shared+16*%tid.x], [p0], 16, (not p1 ? 0 : 16);",
    "cp_async16_zeros": "cp.async.cg.shared.global [shared], [p0], 16, p1;",
    "cp_async8": "cp.async.ca.shared.global [shared+16*%tid.x], [p0], 8, (not p1 ? 0 : 8);",
    "cp_async4": "cp.async.ca.shared.global [shared+16*%tid.x], [p0], 4, (not p1 ? 0 : 4);",
    "cp_async_commit": "cp.async.commit_group;",
    "cp_async_wait": "cp.async.wait_group 2;",
    "ldmatrix_x4": "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {p0[0], p0[4], p0[8], p0[12]}, [shared+16*%tid.x];",
    "ldmatrix_x4_trans": "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {p0[0], p0[4], p0[8], p0[12]}, "
    "[shared+16*%tid.x];",
    "ldmatrix_x2": "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {p0[0], p0[4]}, [shared+16*%tid.x];",
    "ldmatrix_x2_trans": "ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {p0[0], p0[4]}, [shared+16*%tid.x];",
    **{
        f"mma_{name}": f"mma.sync.aligned.{shape}.row.col.f32.{name}.{name}.f32 {{p0[0], p0[4], p0[8], p0[12]}}, "
        "{p1[0], p1[4], p1[8], p1[12]}, {p1[16], p1[20]}, {p0[0], p0[4], p0[8], p0[12]};"
        for name, shape in {"bf16": "m16n8k16", "f16": "m16n8k16", "tf32": "m16n8k8"}.items()
    },
    "cvt_tf32": "cvt.rna.tf32.f32 p0[0], p1;",
    "fma_bf16x2": "fma.rn.bf16x2 p0[0], p1, p2, p3;",
    "fma_f16x2": "fma.rn.f16x2 p0[0], p1, p2, p3;",
    **{f"ld_{kind}": f"ld.{kind.replace('_', '.')}.global.u32 p0[0], [p1];"
       for kind in ("acquire_cta", "acquire_gpu", "acquire_sys", "relaxed_gpu", "relaxed_sys")},
    **{f"st_{kind}": f"st.{kind.replace('_', '.')}.global.u32 [p0], p1;"
       for kind in ("release_cta", "release_gpu", "release_sys", "relaxed_gpu", "relaxed_sys")},
    "atom_add_relaxed_gpu": "atom.relaxed.gpu.global.add.u32 p0[0], [p1], p2;",
    "atom_add_release_gpu": "atom.release.gpu.global.add.u32 p0[0], [p1], p2;",
    "atom_add_acq_rel_gpu": "atom.acq_rel.gpu.global.add.u32 p0[0], [p1], p2;",
    "atom_add_acq_rel_sys": "atom.acq_rel.sys.global.add.u32 p0[0], [p1], p2;",
    "bar_sync": "bar.sync p0, p1;",
    "bar_arrive": "bar.arrive p0, p1;",
}  # fmt: skip

WAIT = "{{ .reg .pred p; again: mbarrier.try_wait.parity.shared::cta.b64 p, [shared], {}; @!p bra again; }}"
FROM_SHARED = "cp.async.bulk.tensor.{}d.global.shared::cta.tile.bulk_group [p0, {{{}}}], [shared];"
TO_SHARED = (
    "cp.async.bulk.tensor.{}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
    "[shared+1024], [p0, {{{}}}], [shared];"
)
WAIT_CLUSTER = WAIT.replace(".parity.shared", ".parity.acquire.cluster.shared")
THERE = "{{ .reg .b32 there; mapa.shared::cluster.u32 there, shared, {0}; "
ARRIVE_CLUSTER = THERE + "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there]; }}"
ARRIVE_REMOTE = ARRIVE_CLUSTER.replace(".release.cluster", "")
STORE_CLUSTER = THERE + "st.shared::cluster.b64 [there], p1; }}"

HOPPER = {
    "mbar_init": "mbarrier.init.shared::cta.b64 [shared], p0;",
    "mbar_inval": "mbarrier.inval.shared::cta.b64 [shared];",
    "mbar_arrive": "mbarrier.arrive.shared::cta.b64 _, [shared];",
    "mbar_expect_tx": "mbarrier.arrive.expect_tx.shared::cta.b64 _, [shared], p0;",
    "cp_async_mbar_arrive": "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [shared];",
    "mbar_test_wait": "{ .reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [shared], p1; "
    "selp.u32 p0[0], 1, 0, p; }",
    "mbar_wait": WAIT.format("p0") + "\n" + WAIT.format("p0^1"),
    "mbar_wait_cluster": WAIT_CLUSTER.format("p0") + "\n" + WAIT_CLUSTER.format("p0^1"),
    "cluster_rank": "mov.u32 p0[0], %cluster_ctarank;",
    "cluster_arrive": "barrier.cluster.arrive.release;",
    "cluster_wait": "barrier.cluster.wait.acquire;",
    "mbar_arrive_cluster": "\n".join(ARRIVE_CLUSTER.format(rank) for rank in ("p0", "p0^1")),
    "mbar_arrive_remote": "\n".join(ARRIVE_REMOTE.format(rank) for rank in ("p0", "p0^1")),
    "st_cluster": "\n".join(STORE_CLUSTER.format(rank) for rank in ("p0", "p0^1")),
    "fence_barrier_init": "fence.mbarrier_init.release.cluster;",
    "fence_proxy_async": "fence.proxy.async.shared::cta;",
    "fence_proxy_async_global": "fence.proxy.async.global;",
    "tma_load_2d": TO_SHARED.format(2, "p1, p2"),
    "tma_load_3d": TO_SHARED.format(3, "p1, p2, p3"),
    "tma_load_3d_multicast": TO_SHARED.format(3, "p1, p2, p3").replace("bytes", "bytes.multicast::cluster")[:-1]
    + ", p4;",
    "bulk_load": "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [shared+1024], [p0], p1, [shared];",
    "tma_store_2d": FROM_SHARED.format(2, "p1, p2"),
    "tma_store_3d": FROM_SHARED.format(3, "p1, p2, p3"),
    "tma_store_commit": "cp.async.bulk.commit_group;",
    "tma_store_wait_read": "cp.async.bulk.wait_group.read 1;",
    "tma_store_wait": "cp.async.bulk.wait_group 0;",
    "prefetch_tensor_map": "prefetch.tensormap [p0];",
    "tensor_map_replace_address": "tensormap.replace.tile.global_address.global.b1024.b64 [p0], p1;",
    "tensor_map_replace_size": "tensormap.replace.tile.global_dim.global.b1024.b32 [p0], 1, p1;",
    "fence_tensor_map_release": "fence.proxy.tensormap::generic.release.gpu;",
    "fence_tensor_map_acquire": "fence.proxy.tensormap::generic.acquire.gpu [p0], 128;",
    "desc_k128": "",
    "wgmma_fence": "wgmma.fence.sync.aligned;",
    "wgmma_commit": "wgmma.commit_group.sync.aligned;",
    "wgmma_wait": "wgmma.wait_group.sync.aligned 1;",
    "stmatrix_x4": "stmatrix.sync.aligned.m8n8.x4.shared.b16 [shared+16*%tid.x], {p0[0], p0[4], p0[8], p0[12]};",
    "stmatrix_x4_trans": "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [shared+16*%tid.x], "
    "{p0[0], p0[4], p0[8], p0[12]};",
    "elect_one": "{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 p0[0], 1, 0, p; }",
    "reciprocal": "rcp.approx.ftz.f32 p0[0], p1;",
    "wait_for_kernel_before": "griddepcontrol.wait;",
    "start_kernel_after": "griddepcontrol.launch_dependents;",
    "setmaxnreg_dec": "setmaxnreg.dec.sync.aligned.u32 40;",
    "setmaxnreg_inc": "setmaxnreg.inc.sync.aligned.u32 232;",
}


def expected_wgmma(name: str) -> str:
    registers, kind, width = re.fullmatch(r"wgmma_(rs_)?(bf16|f16)_(\d+)", name).groups()
    d = ", ".join(f"p0[{4 * i}]" for i in range(int(width) // 2))
    even = int(int(width) % 16 == 0)
    transposed = [int(kind == "f16" and even), int(kind == "bf16" and even)]
    a = "{p1[0], p1[4], p1[8], p1[12]}" if registers else "p1"
    flags = transposed[1:] if registers else transposed
    return "\n".join(
        [
            "wgmma.fence.sync.aligned;",
            "{ .reg .pred p; setp.ne.b32 p, p3, 0; "
            f"wgmma.mma_async.sync.aligned.m64n{width}k16.f32.{kind}.{kind} {{{d}}}, {a}, p2, "
            f"p, 1, 1, {', '.join(map(str, flags))}; }}",
            "wgmma.commit_group.sync.aligned;",
            "wgmma.wait_group.sync.aligned 0;",
        ]
    )


@pytest.fixture(scope="module")
def ampere(tmp_path_factory) -> dict[str, Kernel]:
    return compile_kernels(tmp_path_factory.mktemp("ampere"), "-arch=sm_80")


@pytest.fixture(scope="module")
def hopper(tmp_path_factory) -> dict[str, Kernel]:
    return compile_kernels(tmp_path_factory.mktemp("hopper"), "-arch=sm_90a", "-DHOPPER")


@pytest.mark.parametrize("name", AMPERE)
def test_sm_80(ampere, name):
    assert ampere[name].readable() == AMPERE[name]


@pytest.mark.parametrize("name", HOPPER)
def test_sm_90a(hopper, name):
    assert hopper[name].readable() == HOPPER[name]


@pytest.mark.parametrize("width", [16, 64, 128, 192, 256])
def test_wgmma(hopper, width):
    for name in (f"wgmma_bf16_{width}", f"wgmma_f16_{width}", f"wgmma_rs_bf16_{width}", f"wgmma_rs_f16_{width}"):
        assert hopper[name].readable() == expected_wgmma(name)


def test_every_wrapper_is_here(ampere, hopper):
    assert set(ampere) == set(AMPERE)
    assert {name for name in hopper if not name.startswith("wgmma_") or name in HOPPER} == set(AMPERE) | set(HOPPER)


@pytest.mark.parametrize("flags", [["-arch=sm_80"], ["-arch=sm_90a", "-DHOPPER"]], ids=["sm_80", "sm_90a"])
def test_ptxas_takes_it(tmp_path, flags):
    compile_all(tmp_path / "all.cubin", "-cubin", *flags)
