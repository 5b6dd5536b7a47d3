//! Measures how fast the emulator is on one core: arithmetic in a loop, and matrix products.

use ptx_emulator::{LaunchConfig, Memory, Module};
use std::time::Instant;

const ARITHMETIC: &str = "
.version 8.3 .target sm_90a
.address_size 64
.visible .entry run() {
    .reg .pred %p<2>; .reg .b32 %r<6>; .reg .f32 %f<6>; .reg .b64 %rd<3>;
    mov.u32 %r1, 0; mov.u32 %r2, %tid.x; cvt.rn.f32.u32 %f1, %r2; mov.f32 %f2, 0f3F7FFFFF; mov.u64 %rd1, 1;
LOOP:
    fma.rn.f32 %f1, %f1, %f2, %f2; max.f32 %f3, %f1, %f2; sub.f32 %f4, %f1, %f3; ex2.approx.ftz.f32 %f5, %f4;
    add.f32 %f1, %f1, %f5; cvt.rn.bf16x2.f32 %r3, %f1, %f5; xor.b32 %r2, %r2, %r3; shl.b32 %r4, %r2, 3;
    mad.wide.u32 %rd1, %r4, 3, %rd1; selp.b32 %r2, %r2, %r4, %p1;
    add.u32 %r1, %r1, 1; setp.lt.u32 %p1, %r1, 1000000; @%p1 bra LOOP;
    ret;
}";

const PRODUCTS: &str = "
.version 8.3 .target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 smem[];
.visible .entry run() .maxntid 128 {
    .reg .pred %p<4>; .reg .b32 %r<9>; .reg .b64 %rd<3>; .reg .f32 %d<88>;
    mov.u32 %r1, %tid.x; mov.u32 %r2, smem; mad.lo.u32 %r3, %r1, 16, %r2; add.u32 %r4, %r2, 32768; mov.u32 %r5, 0;
FILL: st.shared.v4.b32 [%r3], {%r5, %r5, %r5, %r5}; add.u32 %r3, %r3, 2048; setp.lt.u32 %p1, %r3, %r4; @%p1 bra FILL;
    fence.proxy.async; bar.sync 0; mov.b64 %rd1, 0x4000004000010040; mov.u32 %r6, 0;
LOOP: setp.ne.u32 %p2, %r6, 0;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n176TYPES {ACCUMULATORS}, %rd1, %rd1, %p2, 1, 1TRANSPOSES;
    wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
    add.u32 %r6, %r6, 1; setp.lt.u32 %p3, %r6, 5000; @%p3 bra LOOP;
    ret;
}";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let memory = Memory::new();
    let launch = LaunchConfig { grid: [1, 1, 1], block: [32, 1, 1], shared_bytes: 0 };
    let module = Module::parse("arithmetic", ARITHMETIC)?;
    let start = Instant::now();
    let stats = module.launch(&memory, "run", launch, &[])?;
    let seconds = start.elapsed().as_secs_f64();
    println!("arithmetic: {:.1} million warp instructions a second", stats.total() as f64 / seconds / 1e6);

    let accumulators: Vec<String> = (0..88).map(|i| format!("%d{i}")).collect();
    for (name, types, transposes) in [("bf16", "k16.f32.bf16.bf16", ", 0, 0"), ("e4m3", "k32.f32.e4m3.e4m3", "")] {
        let ptx = PRODUCTS.replace("ACCUMULATORS", &accumulators.join(", "));
        let module = Module::parse("products", &ptx.replace("TYPES", types).replace("TRANSPOSES", transposes))?;
        let launch = LaunchConfig { grid: [1, 1, 1], block: [128, 1, 1], shared_bytes: 32768 };
        let start = Instant::now();
        let stats = module.launch(&memory, "run", launch, &[])?;
        let seconds = start.elapsed().as_secs_f64();
        println!("wgmma, {name}: {:.1} billion multiply-adds a second", stats.multiply_adds as f64 / seconds / 1e9);
    }
    Ok(())
}
