//! Everything that the emulator must refuse, with words of each message.

mod common;

use common::{fault, kernel_with, launch, module, one_block};
use ptx_emulator::{FaultKind, LaunchConfig, Memory, Options};

const BUFFER: &str = ".extern .shared .align 1024 .b8 smem[];";

/// Runs one warp with 4 KiB of dynamic shared memory, which starts at `%r2`. It must fault.
fn one_warp(body: &str, kind: FaultKind, words: &[&str]) {
    fault(BUFFER, "", &format!("mov.u32 %r2, smem;\n{body}"), one_block(32, 4096), kind, words);
}

/// Runs one warpgroup with launch bounds and 8 KiB of shared memory, of which it has written and
/// fenced the first 4. It must fault.
///
/// `%rd10` describes 64 rows there, without swizzle. Groups of 8 rows lie 128 bytes apart, and the
/// halves of k 1024 bytes.
fn warpgroup(body: &str, kind: FaultKind, words: &[&str]) {
    let prepare = "mov.u32 %r2, smem; mad.lo.u32 %r3, %r1, 32, %r2; mov.u32 %r4, 0;
        st.shared.v4.u32 [%r3], {%r4, %r4, %r4, %r4}; st.shared.v4.u32 [%r3+16], {%r4, %r4, %r4, %r4};
        fence.proxy.async.shared::cta; bar.sync 0; mov.b64 %rd10, 0x0000000800400040;
        mov.f32 %f1, 0f00000000; mov.f32 %f2, %f1; mov.f32 %f3, %f1; mov.f32 %f4, %f1;
        mov.b32 %r11, 0; mov.b32 %r12, 0; mov.b32 %r13, 0; mov.b32 %r14, 0; setp.eq.u32 %p1, %r1, %r1;\n";
    fault(BUFFER, ".maxntid 256", &format!("{prepare}{body}"), one_block(128, 8192), kind, words);
}

const PRODUCT: &str =
    "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f1, %f2, %f3, %f4}, %rd10, %rd10, %p1, 1, 1, 0, 0;";
const REGISTER_PRODUCT: &str = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f1, %f2, %f3, %f4}, {%r11, %r12, %r13, %r14}, %rd10, %p1, 1, 1, 0;";
const FENCE: &str = "wgmma.fence.sync.aligned;";
const COMMIT: &str = "wgmma.commit_group.sync.aligned;";
const WAIT: &str = "wgmma.wait_group.sync.aligned 0;";

#[test]
fn place_of_a_fault() {
    let body = "setp.ne.u32 %p1, %r1, 37; @%p1 bra END;\n ld.global.u32 %r3, [%rd1+4096]; END:";
    let grid = LaunchConfig { grid: [2, 3, 1], block: [64, 1, 1], shared_bytes: 0 };
    let found = fault("", "", body, grid, FaultKind::OutOfBounds, &[]);
    assert_eq!((found.block, found.warp, found.lane), ([0, 0, 0], Some(1), Some(5)), "the lowest block's fault");
    assert_eq!((found.kernel.as_str(), found.instruction.as_str()), ("test", "ld.global.u32 %r3, [%rd1+4096]"));
    let text = kernel_with("", "", body);
    let line = text.lines().position(|line| line.contains("ld.global.u32 %r3")).unwrap() + 1;
    assert_eq!(found.line as usize, line);
    let shown = found.to_string();
    let start =
        format!("kernel test, block (0, 0, 0), warp 1, lane 5, line {line}: `ld.global.u32 %r3, [%rd1+4096]`: ");
    assert!(shown.starts_with(&start), "{shown}");
}

#[test]
fn out_of_bounds() {
    use FaultKind::OutOfBounds as Kind;
    one_warp("ld.global.u32 %r3, [%rd1+4094];", Kind, &["read of 4 bytes at global", "4094 bytes past the start"]);
    one_warp(
        "st.global.v4.u32 [%rd1+-16], {%r1, %r1, %r1, %r1};",
        Kind,
        &["store of 16 bytes", "below every allocation"],
    );
    one_warp("mov.u64 %rd3, 0; ld.u32 %r3, [%rd3];", Kind, &["at global 0x0"]);
    one_warp("atom.global.add.u32 %r3, [%rd1+8192], 1;", Kind, &["atomic of 4 bytes"]);
    one_warp(
        "mad.lo.u32 %r3, %r1, 256, %r2; st.shared.u32 [%r3], %r1;",
        Kind,
        &["lane 16", "4 bytes at shared address 0x1400"],
    );
    one_warp(
        "mov.u32 %r20, 0; ld.shared.u32 %r3, [%r20];",
        Kind,
        &["shared address 0x0, outside the block's [0x400, 0x1400)"],
    );
    one_warp("ld.param.u32 %r3, [in+8];", Kind, &["parameter offset 0x10 of 16 bytes"]);
    one_warp(
        ".local .align 8 .b8 mine[8]; mov.u64 %rd3, mine; st.local.u32 [%rd3+8], %r1;",
        Kind,
        &["local address 0x8 of 8"],
    );
    one_warp("prefetch.global.L2 [%rd1+9000];", Kind, &["prefetch"]);
}

#[test]
fn freed_memory_is_gone() {
    let module = module(&kernel_with("", "", "ld.global.u32 %r3, [%rd2];"));
    let mut memory = Memory::new();
    let (a, b) = (memory.alloc(64, 4).unwrap(), memory.alloc(64, 4).unwrap());
    let params = [a.to_le_bytes(), b.to_le_bytes()].concat();
    module.launch(&memory, "test", one_block(1, 0), &params).unwrap();
    memory.free(b).unwrap();
    let fault = module.launch(&memory, "test", one_block(1, 0), &params).unwrap_err();
    assert_eq!(fault.kind, FaultKind::OutOfBounds);
}

#[test]
fn misaligned() {
    use FaultKind::Misaligned as Kind;
    one_warp("ld.global.u32 %r3, [%rd1+2];", Kind, &["is not a multiple of 4"]);
    one_warp("ld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%rd1+8];", Kind, &["is not a multiple of 16"]);
    one_warp("st.shared.u64 [%r2+4], %rd1;", Kind, &["shared address 0x404 is not a multiple of 8"]);
    one_warp("ld.param.u64 %rd3, [out+4];", Kind, &["parameter address 0x4"]);
    one_warp("mbarrier.init.shared.b64 [%r2+4], 1;", Kind, &["0x404 is not a multiple of 8"]);
    one_warp("red.global.add.v2.f32 [%rd1+4], {%f1, %f2};", Kind, &["is not a multiple of 8"]);
}

#[test]
fn uninitialised_shared_memory() {
    use FaultKind::Uninitialised as Kind;
    one_warp("ld.shared.u32 %r3, [%r2];", Kind, &["read of 4 bytes at shared 0x400: byte 0x400 was never written"]);
    // 32 lanes write two bytes each. Lane 16 is the first that reads what nobody wrote.
    one_warp(
        "mad.lo.u32 %r3, %r1, 2, %r2; mov.b16 %h1, 3; st.shared.b16 [%r3], %h1; bar.warp.sync -1; mad.lo.u32 %r3, %r1, 4, %r2; ld.shared.u32 %r4, [%r3];",
        Kind,
        &["lane 16", "byte 0x440"],
    );
    one_warp("st.shared.u8 [%r2], %r1; ld.shared.u16 %h1, [%r2];", Kind, &["byte 0x401"]);
    one_warp("atom.shared.add.u32 %r3, [%r2], 1;", Kind, &["atomic"]);
    one_warp(
        "cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r2], 16;",
        Kind,
        &["bulk copy of 16 bytes", "never written"],
    );
    let product = format!("mov.b64 %rd10, 0x0000000800400140; {FENCE} {PRODUCT}");
    warpgroup(&product, Kind, &["wgmma read of matrix B", "never written"]);
    // The next block on the same multiprocessor must not read what a block wrote.
    let body = "mov.u32 %r2, smem; mov.u32 %r3, %ctaid.x; setp.eq.u32 %p1, %r3, 0; @%p1 st.shared.u32 [%r2], 1; ld.shared.u32 %r4, [%r2];";
    let grid = LaunchConfig { grid: [8, 1, 1], block: [1, 1, 1], shared_bytes: 16 };
    let found = fault(BUFFER, "", body, grid, Kind, &[]);
    assert_eq!(found.block, [1, 0, 0]);
}

#[test]
fn deadlocks_say_where_each_warp_stands() {
    let body =
        "mov.u32 %r2, smem; setp.lt.u32 %p1, %r1, 32; @%p1 bra FIRST; setp.lt.u32 %p1, %r1, 64; @%p1 bra SECOND; ret;
        FIRST: setp.eq.u32 %p2, %r1, 0; @%p2 mbarrier.init.shared.b64 [%r2], 2; bar.warp.sync -1;
        @%p2 mbarrier.arrive.expect_tx.shared.b64 _, [%r2], 48;
        LOOP: mbarrier.try_wait.parity.shared.b64 %p3, [%r2], 0; @!%p3 bra LOOP; ret;
        SECOND: bar.sync 3, 64;";
    fault(
        BUFFER,
        "",
        body,
        one_block(96, 64),
        FaultKind::Deadlock,
        &[
            "no warp can ever go on",
            "warp 0 lanes 0xffffffff: line",
            "`mbarrier.try_wait.parity.shared.b64 %p3, [%r2], 0`: waits for a phase of parity 0 of the mbarrier at shared 0x400 \
         (phase 0, 1 of 2 arrivals and 48 bytes missing)",
            "warp 1 lanes 0xffffffff",
            "`bar.sync 3, 64`: waits at named barrier 3, where 32 of 64 threads are",
            "warp 2: exited",
        ],
    );
    // Some threads never reach the barrier of the block.
    fault(
        "",
        "",
        "setp.ge.u32 %p1, %r1, 32; @%p1 ret; bar.sync 0;",
        one_block(64, 0),
        FaultKind::Deadlock,
        &["waits at named barrier 0, where 32 of 64 threads are"],
    );
    // Nobody gives the registers back that a warp waits for.
    let body = "setmaxnreg.inc.sync.aligned.u32 240;";
    fault(
        "",
        ".maxntid 384, 1, 1 .minnctapersm 1",
        body,
        one_block(384, 0),
        FaultKind::Deadlock,
        &["waits for 72 more registers a thread; 0 are free"],
    );
    // Lanes wait for each other at different instructions.
    one_warp(
        "setp.lt.u32 %p1, %r1, 16; @%p1 bra A; bar.warp.sync -1; ret; A: bar.warp.sync -1;",
        FaultKind::Deadlock,
        &["waits for other lanes of 0xffff0000", "waits for other lanes of 0x0000ffff"],
    );
    // One warp does not issue the product.
    warpgroup(
        &format!("setp.ge.u32 %p2, %r1, 96; @%p2 bra END; {FENCE} {PRODUCT} {COMMIT} {WAIT} END:"),
        FaultKind::Deadlock,
        &["waits for products that warp 3 of its warpgroup has not issued"],
    );
}

#[test]
fn livelock() {
    let ptx = kernel_with("", "", "SPIN: ld.volatile.global.u32 %r3, [%rd1]; setp.eq.u32 %p1, %r3, 0; @%p1 bra SPIN;");
    let mut memory = Memory::new();
    let out = memory.alloc(16, 4).unwrap();
    memory.fill(out, 16, 0).unwrap();
    let params = [out.to_le_bytes(); 2].concat();
    let options = Options { idle_instructions: 1_000_000, ..Options::default() };
    let fault = module(&ptx).launch_with(&memory, "test", one_block(32, 0), &params, options).unwrap_err();
    assert_eq!(fault.kind, FaultKind::Livelock);
    assert!(fault.what.contains("without a store, barrier, copy or product"), "{fault}");
}

#[test]
fn divergence() {
    use FaultKind::Divergence as Kind;
    one_warp(
        "setp.lt.u32 %p1, %r1, 16; @%p1 bar.sync 0;",
        Kind,
        &["lanes 0xffffffff must execute it together, but only 0xffff do"],
    );
    one_warp(
        "setp.lt.u32 %p1, %r1, 16; @%p1 ret; shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1;",
        Kind,
        &["0xffff have exited"],
    );
    one_warp("setp.lt.u32 %p1, %r1, 16; @%p1 vote.sync.ballot.b32 %r3, %p1, -1;", Kind, &["predicated off"]);
    one_warp(
        "shfl.sync.bfly.b32 %r3, %r1, 16, 31, 0xffff;",
        Kind,
        &["lane 16", "does not name the lane that executes it"],
    );
    one_warp(
        "setp.lt.u32 %p1, %r1, 16; @!%p1 bra END; shfl.sync.idx.b32 %r3, %r1, 20, 31, 0xffff; END:",
        Kind,
        &["it reads lane 20, which the mask 0xffff does not name"],
    );
    one_warp("and.b32 %r3, %r1, 1; bar.sync %r3;", Kind, &["lane 1", "differs between lanes"]);
    one_warp("mov.u32 %r3, -1; setp.eq.u32 %p1, %r1, 7; @%p1 mov.u32 %r3, 0xff; bar.warp.sync %r3;", Kind, &["lane 7"]);
    warpgroup(&format!("setp.eq.u32 %p2, %r1, 0; @!%p2 {FENCE}"), Kind, &["0x1 go another way"]);
    let other = "mov.b64 %rd10, 0x0000000800400048;";
    warpgroup(
        &format!("setp.ge.u32 %p2, %r1, 64; @%p2 {other} {FENCE} {PRODUCT}"),
        Kind,
        &["warp 2", "as its product 0", "this warp issues another"],
    );
}

#[test]
fn fragments_in_flight() {
    use FaultKind::Fragment as Kind;
    let start = format!("{FENCE} {PRODUCT} {COMMIT}");
    warpgroup(
        &format!("{start} add.f32 %f9, %f2, %f2; {WAIT}"),
        Kind,
        &["an accumulator of a wgmma in flight is read"],
    );
    warpgroup(&format!("{start} mov.f32 %f3, %f9; {WAIT}"), Kind, &["an accumulator of a wgmma in flight is written"]);
    warpgroup(&format!("{start} st.global.f32 [%rd1], %f4; {WAIT}"), Kind, &["is read"]);
    // A copy may be made, but not used, because ptxas may keep it in the same register.
    warpgroup(
        &format!("{start} mov.f32 %f9, %f1; mul.f32 %f10, %f9, %f9; {WAIT}"),
        Kind,
        &["a copy of an accumulator"],
    );
    let start = format!("{FENCE} {REGISTER_PRODUCT} {COMMIT}");
    warpgroup(
        &format!("{start} add.u32 %r12, %r1, 1; {WAIT}"),
        Kind,
        &["a register of matrix A of a wgmma in flight is written"],
    );
    // A wait for all groups but the last releases only the earlier ones.
    let second =
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f5, %f6, %f7, %f8}, %rd10, %rd10, %p1, 1, 1, 0, 0;";
    let both = format!("{FENCE} {PRODUCT} {COMMIT} {second} {COMMIT} wgmma.wait_group.sync.aligned 1;");
    warpgroup(
        &format!("{both} add.f32 %f9, %f1, %f2; add.f32 %f9, %f5, %f5; {WAIT}"),
        Kind,
        &["`add.f32 %f9, %f5, %f5`"],
    );
}

#[test]
fn fragments_used_as_they_should_be() {
    // A copy is made before the wait, and a second product uses the same accumulators. Their
    // results are used after the wait.
    let body = format!(
        "mov.u32 %r2, smem; mad.lo.u32 %r3, %r1, 16, %r2; mov.b32 %r4, 0x3f803f80; st.shared.v4.u32 [%r3], {{%r4, %r4, %r4, %r4}};
         fence.proxy.async.shared::cta; bar.sync 0; mov.b64 %rd10, 0x0000000800080040; setp.ne.u32 %p1, %r1, %r1;
         {FENCE} {PRODUCT} setp.eq.u32 %p1, %r1, %r1; {PRODUCT} {COMMIT} mov.f32 %f9, %f3; {WAIT} add.f32 %f9, %f9, %f2;
         mad.wide.u32 %rd3, %r1, 4, %rd1; st.global.f32 [%rd3], %f9;"
    );
    let (out, _) = launch(&kernel_with(BUFFER, "", &body), one_block(128, 2048), &[], 512).unwrap();
    // Two products of ones over 16 of k give 32 in every element.
    assert!(out.chunks(4).all(|word| word == 64f32.to_le_bytes()));
}

#[test]
fn missing_fences() {
    use FaultKind::MissingFence as Kind;
    warpgroup(&format!("{PRODUCT} {COMMIT} {WAIT}"), Kind, &["no wgmma.fence was executed before the first"]);
    warpgroup(
        &format!("{FENCE} mov.f32 %f3, 0f00000000; {PRODUCT}"),
        Kind,
        &["accumulator 2 was touched after the last wgmma.fence"],
    );
    warpgroup(
        &format!("{FENCE} add.u32 %r13, %r1, 1; {REGISTER_PRODUCT}"),
        Kind,
        &["register 2 of matrix A was touched"],
    );
    warpgroup(
        &format!("{FENCE} {PRODUCT} {COMMIT} {WAIT} add.f32 %f1, %f1, %f1; {PRODUCT}"),
        Kind,
        &["accumulator 0 was touched"],
    );
    // A product and a copy read ordinary stores.
    warpgroup(
        &format!("st.shared.u32 [%r3], %r1; bar.sync 0; {FENCE} {PRODUCT}"),
        Kind,
        &["wgmma read of matrix B", "with no fence.proxy.async after the ordinary store by warp 0, line"],
    );
    one_warp(
        "mad.lo.u32 %r3, %r1, 4, %r2; st.shared.u32 [%r3], %r1; bar.sync 0; cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r2], 128;",
        Kind,
        &["bulk copy of 128 bytes at shared 0x400, with no fence.proxy.async after the ordinary store by warp 0"],
    );
    // The copy engine may not have seen the initialisation of the mbarrier.
    one_warp(
        "setp.ne.u32 %p1, %r1, 0; @%p1 ret; mbarrier.init.shared.b64 [%r2], 1; mbarrier.arrive.expect_tx.shared.b64 _, [%r2], 16;
         add.u32 %r3, %r2, 64; cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r3], [%rd2], 16, [%r2];",
        Kind,
        &["no fence.mbarrier_init or fence.proxy.async"],
    );
}

/// Runs a body in one lane, which must fault. It has a fenced mbarrier of one arrival at `%r2`, and
/// a target of copies at `%r3`.
fn copying(body: &str, kind: FaultKind, words: &[&str]) {
    let prepare =
        "setp.ne.u32 %p1, %r1, 0; @%p1 ret; mbarrier.init.shared.b64 [%r2], 1; fence.mbarrier_init.release.cluster;
        add.u32 %r3, %r2, 1024;";
    one_warp(&format!("{prepare}\n{body}"), kind, words);
}

const COPY: &str = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r3], [%rd2], 64, [%r2];";
const WAIT_COPY: &str = "W: mbarrier.try_wait.parity.shared.b64 %p2, [%r2], 0; @!%p2 bra W;";

#[test]
fn bulk_copies() {
    use FaultKind::{BulkCopy, Deadlock, Misaligned, OutOfBounds, Race};
    let expect = |bytes: u32| format!("mbarrier.arrive.expect_tx.shared.b64 _, [%r2], {bytes};");
    copying(
        &format!("mov.u32 %r20, 40; {}", COPY.replace("64", "%r20")),
        BulkCopy,
        &["a bulk copy of 40 bytes: it must be a multiple of 16"],
    );
    copying(&COPY.replace("[%r3]", "[%r3+8]"), Misaligned, &["0x808 is not a multiple of 16"]);
    copying(&COPY.replace("[%rd2]", "[%rd2+8]"), Misaligned, &["is not a multiple of 16"]);
    copying(&COPY.replace("64", "8192"), OutOfBounds, &["8192 bytes at shared address 0x800"]);
    copying(&COPY.replace("[%rd2]", "[%rd2+4064]"), OutOfBounds, &["bulk copy of 64 bytes at global"]);
    copying(&COPY.replace("[%r2]", "[%r2+8]"), FaultKind::Barrier, &["no mbarrier was initialised at shared 0x408"]);
    copying(&COPY.replace("[%r3]", "[%r2]"), FaultKind::Barrier, &["belongs to an mbarrier"]);
    // The mbarrier expects too many bytes, too few, or none.
    copying(&format!("{} {COPY} {WAIT_COPY}", expect(80)), Deadlock, &["0 of 1 arrivals and 16 bytes missing"]);
    copying(&format!("{} {COPY} {WAIT_COPY}", expect(48)), BulkCopy, &["copies brought 16 bytes more than it expects"]);
    let half = COPY.replace("64", "32");
    let rest = half.replace("[%r3]", "[%r3+32]");
    copying(
        &format!("{} {half} {rest} {WAIT_COPY}", expect(32)),
        BulkCopy,
        &["it expected fewer bytes than were copied"],
    );
    copying(
        &format!("{COPY} mbarrier.arrive.shared.b64 _, [%r2]; {WAIT_COPY}"),
        BulkCopy,
        &["64 bytes to it are in flight"],
    );
    // The lane reads before it has waited, writes under a copy, or exits without a wait.
    let started = format!("{} {COPY}", expect(64));
    copying(
        &format!("{started} ld.shared.u32 %r4, [%r3+16];"),
        Race,
        &["byte 0x810 is the target of an asynchronous copy that no wait has seen"],
    );
    copying(
        &format!("{started} st.shared.u32 [%r3], %r1;"),
        Race,
        &["store of 4 bytes at shared 0x800", "target of an asynchronous copy"],
    );
    copying(&format!("{started} {COPY}"), Race, &["bulk copy of 64 bytes", "target of an asynchronous copy"]);
    copying(
        &started,
        Race,
        &["the block ended while this bulk copy to shared memory was in flight", "cp.async.bulk.shared"],
    );
    // A wait for the parity that is over already tells nothing.
    let wrong = "V: mbarrier.try_wait.parity.shared.b64 %p2, [%r2], 1; @!%p2 bra V; ld.shared.u32 %r4, [%r3];";
    copying(&format!("{started} {wrong}"), Race, &["target of an asynchronous copy"]);
    // These are copies from shared memory.
    let out = "st.shared.v2.u64 [%r3], {%rd1, %rd1}; fence.proxy.async; cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r3], 16;";
    copying(
        &format!("{out} cp.async.bulk.commit_group; st.shared.u32 [%r3], %r1;"),
        Race,
        &["is the source of a bulk copy"],
    );
    copying(&format!("{out} cp.async.bulk.wait_group 0;"), Race, &["no wait_group completed it"]);
}

#[test]
fn copies_of_single_threads() {
    use FaultKind::{Misaligned, MissingFence, Operand, OutOfBounds, Race, Uninitialised};
    let copy =
        "mad.lo.u32 %r3, %r1, 16, %r2; mad.wide.u32 %rd3, %r1, 16, %rd2; cp.async.cg.shared.global [%r3], [%rd3], 16;";
    let copying = |rest: &str, kind, words: &[&str]| one_warp(&format!("{copy} {rest}"), kind, words);
    one_warp(&copy.replace("[%r3]", "[%r3+8]"), Misaligned, &["0x408 is not a multiple of 16"]);
    one_warp(&copy.replace("[%rd3]", "[%rd3+8]"), Misaligned, &["is not a multiple of 16"]);
    one_warp(&copy.replace("[%r3]", "[%r3+16384]"), OutOfBounds, &["16 bytes at shared address"]);
    one_warp(&copy.replace("[%rd3]", "[%rd3+4096]"), OutOfBounds, &["asynchronous copy of 16 bytes at global"]);
    // The whole of a copy must lie in shared memory, but in global memory only what is copied.
    one_warp(&copy.replace("16;", "16, 8;").replace("[%rd3]", "[%rd3+4096]"), OutOfBounds, &["copy of 8 bytes"]);
    one_warp(&copy.replace("16;", "16, 0;").replace("[%r3]", "[%r3+16384]"), OutOfBounds, &["16 bytes at shared"]);
    one_warp(&copy.replace("16;", "16, 0;").replace("[%rd3]", "[%rd3+8]"), Misaligned, &["is not a multiple of 16"]);
    one_warp(
        &copy.replace("cp.async", "mov.u32 %r4, 17; cp.async").replace("16;", "16, %r4;"),
        Operand,
        &["17 bytes of the source for a copy of 16"],
    );
    let target = "is the target of an asynchronous copy that no wait has seen";
    // Lanes read with no wait, with one for older groups only, or with one for copies not yet
    // committed.
    copying("ld.shared.u32 %r4, [%r3];", Race, &["lane 0", "byte 0x400", target]);
    copying("cp.async.commit_group; cp.async.wait_group 1; ld.shared.u32 %r4, [%r3];", Race, &[target]);
    copying("cp.async.wait_group 0; ld.shared.u32 %r4, [%r3];", Race, &[target]);
    // Lanes write under a copy, start another copy to the same place, or exit without a wait.
    copying("st.shared.u32 [%r3], %r1;", Race, &["store of 4 bytes", target]);
    copying(&format!("cp.async.commit_group; {copy}"), Race, &["asynchronous copy of 16 bytes", target]);
    copying("cp.async.commit_group;", Race, &["the block ended while this asynchronous copy was in flight"]);
    // A thread waits for its own copies only.
    copying(
        "setp.eq.u32 %p1, %r1, 0; @%p1 cp.async.wait_all; @%p1 ld.shared.u32 %r4, [%r3]; @%p1 ld.shared.u32 %r4, [%r3+16];",
        Race,
        &["lane 0", "byte 0x410", target],
    );
    copying("cp.async.wait_all; ld.shared.u32 %r4, [%r3+512];", Uninitialised, &["was never written"]);
    // What has landed counts as a store of the thread. A bulk copy reads it after a proxy fence
    // only.
    copying(
        "cp.async.wait_all; cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r2], 16;",
        MissingFence,
        &["no fence.proxy.async"],
    );
}

#[test]
fn matrices() {
    use FaultKind::{Divergence, Misaligned, OutOfBounds, Race, Uninitialised};
    let fill = "mad.lo.u32 %r3, %r1, 16, %r2; st.shared.v4.u32 [%r3], {%r1, %r1, %r1, %r1};";
    let load = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r4, %r5, %r6, %r7}, [%r3];";
    let loading = |between: &str, kind, words: &[&str]| one_warp(&format!("{fill} {between} {load}"), kind, words);
    let lane = "setp.eq.u32 %p1, %r1, 9;";
    loading(&format!("{lane} @%p1 add.u32 %r3, %r3, 8;"), Misaligned, &["lane 9", "is not a multiple of 16"]);
    loading(&format!("{lane} @%p1 add.u32 %r3, %r3, 16384;"), OutOfBounds, &["lane 9", "16 bytes at shared address"]);
    loading(&format!("{lane} @%p1 add.u32 %r3, %r3, 1024;"), Uninitialised, &["lane 9", "matrix read of 16 bytes"]);
    loading(&format!("{lane} @%p1 ret;"), Divergence, &["lane 9", "have exited"]);
    one_warp(&format!("{fill} {lane} @!%p1 {load}"), Divergence, &["lane 9", "predicated off"]);
    // A warp reads rows that another has written, or is about to write.
    let race = |body: &str| {
        fault(BUFFER, "", &format!("mov.u32 %r2, smem; {body}"), one_block(64, 4096), Race, &["no barrier orders it"]);
    };
    let other = "xor.b32 %r3, %r3, 512;";
    race(&format!("{fill} bar.sync 0; {fill} {other} {load}"));
    race(&format!("{fill} bar.sync 0; {load} {other} st.shared.u32 [%r3], %r1;"));
    let store = "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r3], {%r4, %r5, %r6, %r7};";
    race(&format!("{fill} bar.sync 0; {load} {other} {store}"));
    // Rows that a copy has not brought yet.
    one_warp(
        &format!(
            "mad.lo.u32 %r3, %r1, 16, %r2; mad.wide.u32 %rd3, %r1, 16, %rd2; cp.async.cg.shared.global [%r3], [%rd3], 16; {load}"
        ),
        Race,
        &["matrix read of 16 bytes", "is the target of an asynchronous copy"],
    );
    // Each lane waits for its own copies, and reads rows of others. They must meet in between.
    let copy = "mad.lo.u32 %r3, %r1, 16, %r2; mad.wide.u32 %rd3, %r1, 16, %rd2; xor.b32 %r4, %r3, 16;
                cp.async.cg.shared.global [%r3], [%rd3], 16; cp.async.wait_all;";
    one_warp(&format!("{copy} ld.shared.u32 %r5, [%r4];"), Race, &["no barrier orders it"]);
    // Lanes execute a matrix instruction together, but it does not order their stores and loads.
    loading("xor.b32 %r3, %r3, 16;", Race, &["matrix read of 16 bytes", "no barrier orders it"]);
    let product = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%f1, %f2, %f3, %f4}, {%r1, %r1, %r1, %r1},
                   {%r1, %r1}, {%f1, %f2, %f3, %f4};";
    one_warp(&format!("{fill} xor.b32 %r3, %r3, 16; {product} ld.shared.u32 %r5, [%r3];"), Race, &["read of 4 bytes"]);
    let body = format!(
        "mov.u32 %r2, smem; {fill} xor.b32 %r3, %r3, 16; bar.warp.sync -1; {load} {store} bar.warp.sync -1; {fill}"
    );
    launch(&kernel_with(BUFFER, "", &body), one_block(32, 4096), &[], 8).expect("no fault");
}

#[test]
fn mbarriers() {
    use FaultKind::Barrier as Kind;
    one_warp("mbarrier.arrive.shared.b64 _, [%r2];", Kind, &["no mbarrier was initialised at shared 0x400"]);
    one_warp("mbarrier.try_wait.parity.shared.b64 %p1, [%r2], 0;", Kind, &["no mbarrier was initialised"]);
    one_warp("mbarrier.init.shared.b64 [%r2], 0;", Kind, &["an mbarrier of 0 arrivals"]);
    one_warp("mbarrier.init.shared.b64 [%r2], 1;", Kind, &["lane 1", "lives at shared 0x400 already"]);
    copying("mbarrier.arrive.shared.b64 _, [%r2], 2;", Kind, &["2 arrivals", "lacks 1 of 1"]);
    copying("st.shared.u32 [%r2+4], %r1;", Kind, &["byte 0x404 belongs to an mbarrier"]);
    copying("ld.shared.u64 %rd3, [%r2];", Kind, &["only mbarrier instructions may touch"]);
    copying("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r2], 2000000;", Kind, &["counts 2000000 pending bytes"]);
    copying(
        &format!("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r2], 64; {COPY} mbarrier.inval.shared.b64 [%r2];"),
        Kind,
        &["copies in flight"],
    );
    copying(
        "mov.u32 %r20, 2; mbarrier.try_wait.parity.shared.b64 %p1, [%r2], %r20;",
        FaultKind::Operand,
        &["parity 2"],
    );
    one_warp("mbarrier.init.b64 [%rd1], 1;", FaultKind::OutOfBounds, &["which is not in shared memory"]);
}

#[test]
fn named_barriers() {
    use FaultKind::Barrier as Kind;
    one_warp("mov.u32 %r3, 16; bar.sync %r3;", Kind, &["named barrier 16: a block has 0 to 15"]);
    one_warp("mov.u32 %r3, 33; bar.sync 1, %r3;", Kind, &["for 33 threads: a multiple of 32"]);
    one_warp("bar.sync 1, 64;", Kind, &["for 64 threads: a multiple of 32 up to 32"]);
    let body = "setp.lt.u32 %p1, %r1, 32; @%p1 bra A; bar.sync 1, 96; ret; A: bar.sync 1, 64;";
    fault("", "", body, one_block(96, 0), Kind, &["is for 96 threads here, and for 64 elsewhere"]);
}

#[test]
fn products_and_stages() {
    use FaultKind::{Operand, OutOfBounds, Race};
    let start = format!("{FENCE} {PRODUCT} {COMMIT}");
    // A store or a copy overwrites a stage that was released too early, as a product may still read
    // it.
    warpgroup(
        &format!("{start} st.shared.u32 [%r2], %r1; {WAIT}"),
        Race,
        &["store of 4 bytes at shared 0x400 overwrites 0x400", "no wgmma.wait_group released it"],
    );
    let prepare = "setp.ne.u32 %p2, %r1, 0; @%p2 bra READY; mbarrier.init.shared.b64 [%r2+3072], 1; fence.proxy.async; READY: bar.sync 0;";
    let copy = "@!%p2 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%rd2], 64, [%r2+3072];";
    warpgroup(&format!("{prepare} {start} {copy} {WAIT}"), Race, &["bulk copy of 64 bytes at shared 0x400 overwrites"]);
    warpgroup(&start, Race, &["the block ended while this product was in flight"]);
    warpgroup(
        &format!("mov.b64 %rd10, 0x0000000800400300; {FENCE} {PRODUCT}"),
        OutOfBounds,
        &["matrix B (descriptor start 0x3000)"],
    );
    warpgroup(&format!("mov.b64 %rd10, 0x0002000800400040; {FENCE} {PRODUCT}"), Operand, &["base offset 1"]);
    warpgroup(
        &format!("cvt.u64.u32 %rd3, %r1; add.s64 %rd10, %rd10, %rd3; {FENCE} {PRODUCT}"),
        Operand,
        &["descriptor B is", "in lane 0"],
    );
    warpgroup(&format!("setp.lt.u32 %p1, %r1, 3; {FENCE} {PRODUCT}"), Operand, &["scale-d differs between lanes: 0x7"]);
    one_warp(&format!("mov.b64 %rd10, 0; {FENCE} {PRODUCT}"), Operand, &["not one of a warpgroup"]);
}

#[test]
fn a_stage_released_before_the_wait_is_seen() {
    // The consumers tell the producer that the stage is free before they have waited for their
    // products. The producer waits for that, runs as soon as it is told, and its next copy is
    // refused.
    let body = format!(
        "mov.u32 %r2, smem; setp.ne.u32 %p2, %r1, 0; @%p2 bra READY; mbarrier.init.shared.b64 [%r2], 1;
         mbarrier.init.shared.b64 [%r2+8], 4; fence.mbarrier_init.release.cluster; READY: bar.sync 0; add.u32 %r3, %r2, 1024;
         setp.ge.u32 %p1, %r1, 128; @!%p1 bra CONSUME; setp.ne.u32 %p2, %r1, 128; @%p2 bra END;
         mbarrier.arrive.expect_tx.shared.b64 _, [%r2], 2048;
         cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r3], [%rd2], 2048, [%r2];
         FREE: mbarrier.try_wait.parity.shared.b64 %p3, [%r2+8], 0; @!%p3 bra FREE;
         mbarrier.arrive.expect_tx.shared.b64 _, [%r2], 2048;
         cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r3], [%rd2], 2048, [%r2]; bra END;
         CONSUME: mbarrier.try_wait.parity.shared.b64 %p3, [%r2], 0; @!%p3 bra CONSUME;
         mov.b64 %rd10, 0x0000000800400080; setp.ne.u32 %p1, %r1, %r1; and.b32 %r4, %r1, 31; setp.eq.u32 %p4, %r4, 0;
         {FENCE} {PRODUCT} {COMMIT}
         @%p4 mbarrier.arrive.shared.b64 _, [%r2+8];
         {WAIT} END:"
    );
    fault(
        BUFFER,
        "",
        &body,
        one_block(160, 4096),
        FaultKind::Race,
        &["bulk copy of 2048 bytes", "no wgmma.wait_group released it"],
    );
}

#[test]
fn operands_and_traps() {
    use FaultKind::{Operand, Trap};
    one_warp("setp.eq.u32 %p1, %r1, 9; @%p1 trap;", Trap, &["lane 9", "the kernel trapped"]);
    one_warp("T: .branchtargets A, B; brx.idx %r1, T; A: B:", Operand, &["lane 2", "index 2 into 2 branch targets"]);
    one_warp("setmaxnreg.dec.sync.aligned.u32 24;", Operand, &["without .maxntid"]);
    fault(
        "",
        ".maxntid 128",
        "setmaxnreg.inc.sync.aligned.u32 24;",
        one_block(128, 0),
        Operand,
        &["24 registers, from 256"],
    );
}
