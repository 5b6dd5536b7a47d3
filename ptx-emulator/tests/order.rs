//! Orders of warps, and what barriers must order. Each mistake is a fault in every order. Each
//! right program runs in all orders without a fault, and gives the same bytes.

mod common;

use common::{bytes32, kernel_with, module, one_block, u32s};
use ptx_emulator::{Fault, FaultKind, Memory, Module, Options};
use std::collections::BTreeSet;

const SEEDS: u64 = 100;
const BUFFER: &str = ".extern .shared .align 1024 .b8 smem[];";

/// A module around a body for 8 KiB of dynamic shared memory. `%r2` is where that starts, `%r10`
/// the lane and `%r11` the warp. `%p20` holds for the first lane of each warp, and `%p21` for that
/// of the block.
fn block(body: &str) -> Module {
    let prepare = "mov.u32 %r2, smem; and.b32 %r10, %r1, 31; shr.u32 %r11, %r1, 5; setp.eq.u32 %p20, %r10, 0;
        setp.eq.u32 %p21, %r1, 0;\n";
    module(&kernel_with(BUFFER, "", &format!("{prepare}{body}")))
}

fn input() -> Vec<u8> {
    bytes32((0..1024u32).map(|i| i.wrapping_mul(0x9e37_79b1)))
}

/// Runs in the order of a seed, with [`input`]. Gives 4 KiB of output.
fn run(module: &Module, threads: u32, seed: u64) -> Result<Vec<u8>, Fault> {
    let mut memory = Memory::new();
    let (out, source) = (memory.alloc(4096, 1024).unwrap(), memory.alloc(4096, 1024).unwrap());
    memory.fill(out, 4096, 0).unwrap();
    memory.write(source, &input()).unwrap();
    let params = [out.to_le_bytes(), source.to_le_bytes()].concat();
    let options = Options { seed, ..Options::default() };
    module.launch_with(&memory, "test", one_block(threads, 8192), &params, options)?;
    Ok(memory.read(out, 4096).unwrap())
}

/// The output of a body, which must be the same in all orders.
#[track_caller]
fn silent(body: &str, threads: u32) -> Vec<u8> {
    let module = block(body);
    let first = run(&module, threads, 0).unwrap_or_else(|fault| panic!("{fault}"));
    for seed in 1..SEEDS {
        let out = run(&module, threads, seed).unwrap_or_else(|fault| panic!("{fault}"));
        assert!(out == first, "seed {seed} gives other bytes");
    }
    first
}

/// Runs a body that must fault in every order, with one of some kinds. The messages of faults of
/// the first kind must have all words.
#[track_caller]
fn seen(body: &str, threads: u32, kinds: &[FaultKind], words: &[&str]) {
    let module = block(body);
    let mut first = 0;
    for seed in 0..SEEDS {
        let fault = match run(&module, threads, seed) {
            Ok(_) => panic!("nothing was seen in the order of seed {seed}"),
            Err(fault) => fault,
        };
        assert!(kinds.contains(&fault.kind), "{fault}");
        assert_eq!(fault.seed, seed);
        if fault.kind == kinds[0] {
            first += 1;
            let message = fault.to_string();
            words.iter().for_each(|word| assert!(message.contains(word), "{word:?} is not in: {message}"));
        }
    }
    assert!(first > 0, "no order gives {:?}", kinds[0]);
}

const UNORDERED: &str = "no barrier orders it after";

#[test]
fn a_barrier_between_store_and_load() {
    let body = |barrier: &str| {
        format!(
            "mad.lo.u32 %r3, %r10, 4, %r2; setp.eq.u32 %p1, %r11, 1; mov.u32 %r4, 0; @%p1 st.shared.u32 [%r3], %r4; bar.sync 0;
             @!%p1 st.shared.u32 [%r3], %r1;
             {barrier}
             mad.wide.u32 %rd3, %r10, 4, %rd1; @%p1 ld.shared.u32 %r4, [%r3]; @%p1 st.global.u32 [%rd3], %r4;"
        )
    };
    for barrier in ["bar.sync 0;", "barrier.sync 3, 64;", "@%p1 bar.sync 1, 64; @!%p1 bar.arrive 1, 64;"] {
        assert_eq!(u32s(&silent(&body(barrier), 64))[..32], (0..32).collect::<Vec<u32>>());
    }
    let missing = ["", "membar.cta;", "bar.warp.sync -1;", "@%p1 bar.arrive 1, 64; @!%p1 bar.sync 1, 64;"];
    for missing in missing {
        seen(&body(missing), 64, &[FaultKind::Race], &[UNORDERED, "of 4 bytes at shared 0x4", "by warp ", ", line "]);
    }
}

#[test]
fn a_barrier_between_load_and_store() {
    let body = |barrier: &str| {
        format!(
            "mad.lo.u32 %r3, %r10, 4, %r2; setp.eq.u32 %p1, %r11, 1; @%p1 st.shared.u32 [%r3], %r1; bar.sync 0;
             mad.wide.u32 %rd3, %r10, 4, %rd1; @%p1 ld.shared.u32 %r4, [%r3]; @%p1 st.global.u32 [%rd3], %r4;
             {barrier}
             @!%p1 st.shared.u32 [%r3], %r1;"
        )
    };
    assert_eq!(u32s(&silent(&body("bar.sync 0;"), 64))[..32], (32..64).collect::<Vec<u32>>());
    seen(&body(""), 64, &[FaultKind::Race], &[UNORDERED]);
}

#[test]
fn bytes_of_one_chunk_are_told_apart() {
    // Four warps write and read 4, 2, 1 and 1 bytes of the same 16. No barrier orders these
    // accesses.
    let body = |offset: u32| {
        format!(
            "mov.u32 %r4, 0; st.shared.u32 [%r2+16], %r4; mov.b16 %h1, 7; bar.sync 0; @!%p20 bra END;
             setp.eq.u32 %p1, %r11, 0; setp.eq.u32 %p2, %r11, 1; setp.eq.u32 %p3, %r11, 2; setp.eq.u32 %p4, %r11, 3;
             @%p1 st.shared.u32 [%r2], %r1; @%p2 st.shared.u16 [%r2+4], %h1; @%p3 st.shared.u8 [%r2+6], %r1;
             @%p4 st.shared.u8 [%r2+{offset}], %r1;
             @%p1 ld.shared.u32 %r5, [%r2]; @%p2 ld.shared.u16 %h2, [%r2+4]; @%p3 ld.shared.u8 %r5, [%r2+6];
             @%p4 ld.shared.u8 %r5, [%r2+{offset}]; END:"
        )
        .replace("st.shared.u32 [%r2+16], %r4;", "@%p21 st.shared.u32 [%r2+16], %r4;")
    };
    silent(&body(7), 128);
    for overlapping in [0, 3, 4, 5, 6] {
        seen(&body(overlapping), 128, &[FaultKind::Race], &[UNORDERED]);
    }
}

#[test]
fn a_barrier_after_the_initialisation_of_mbarriers() {
    let body = |barrier: &str| {
        format!(
            "@%p21 mbarrier.init.shared.b64 [%r2], 2; {barrier} @%p20 mbarrier.arrive.shared.b64 _, [%r2];
             W: mbarrier.try_wait.parity.shared.b64 %p3, [%r2], 0; @!%p3 bra W;"
        )
    };
    silent(&body("bar.sync 0;"), 64);
    seen(&body(""), 64, &[FaultKind::Race, FaultKind::Barrier], &["not ordered after its initialisation by warp 0"]);
}

#[test]
fn mbarriers_order_what_is_before_arrivals_and_behind_waits() {
    let body = |stores: &str, parity: u32| {
        let (early, late) =
            if stores == "early" { ("st.shared.u32 [%r3], %r1;", "") } else { ("", "st.shared.u32 [%r3], %r1;") };
        format!(
            "@%p21 mbarrier.init.shared.b64 [%r2], 1; mad.lo.u32 %r3, %r10, 4, %r2; setp.eq.u32 %p1, %r11, 1;
             mov.u32 %r4, 0; @%p1 st.shared.u32 [%r3+64], %r4; add.u32 %r3, %r3, 64; bar.sync 0; @%p1 bra CONSUME;
             {early} bar.warp.sync -1; @%p20 mbarrier.arrive.release.cta.shared::cta.b64 _, [%r2]; {late} bra END;
             CONSUME: mbarrier.try_wait.parity.shared.b64 %p3, [%r2], {parity}; @!%p3 bra CONSUME;
             ld.shared.u32 %r4, [%r3]; mad.wide.u32 %rd3, %r10, 4, %rd1; st.global.u32 [%rd3], %r4; END:"
        )
    };
    assert_eq!(u32s(&silent(&body("early", 0), 64))[..32], (0..32).collect::<Vec<u32>>());
    seen(&body("late", 0), 64, &[FaultKind::Race], &[UNORDERED]);
    // A wait for the other parity is over before any arrival.
    seen(&body("early", 1), 64, &[FaultKind::Race, FaultKind::Deadlock], &[UNORDERED]);
}

#[test]
fn an_mbarrier_is_invalidated_behind_its_uses() {
    let body = |barrier: &str| {
        format!(
            "@%p21 mbarrier.init.shared.b64 [%r2], 2; bar.sync 0; @%p20 mbarrier.arrive.shared.b64 _, [%r2];
             W: mbarrier.try_wait.parity.shared.b64 %p3, [%r2], 0; @!%p3 bra W; {barrier} @%p21 mbarrier.inval.shared.b64 [%r2];"
        )
    };
    silent(&body("bar.sync 0;"), 64);
    seen(&body(""), 64, &[FaultKind::Race, FaultKind::Barrier], &["invalidated, not ordered after its use by warp 1"]);
}

#[test]
fn arrivals_of_one_phase_do_not_count_in_another() {
    // Two of three warps complete a phase. In which phase the third one's arrival counts is a
    // matter of luck.
    let body = |count: u32| {
        format!(
            "@%p21 mbarrier.init.shared.b64 [%r2], {count}; bar.sync 0; @%p20 mbarrier.arrive.shared.b64 _, [%r2];
             W: mbarrier.try_wait.parity.shared.b64 %p3, [%r2], 0; @!%p3 bra W;"
        )
    };
    silent(&body(3), 96);
    seen(&body(2), 96, &[FaultKind::Barrier], &["could have come in the phase before", "by warp "]);
    seen(&body(4), 96, &[FaultKind::Deadlock], &["1 of 4 arrivals"]);
}

#[test]
fn votes_of_two_warpgroups_need_two_barriers() {
    let body = |second: u32| {
        format!(
            "setp.ge.u32 %p1, %r1, 128; selp.b32 %r3, {second}, 1, %p1; bar.red.or.pred %p2, %r3, 128, %p1;
             selp.b32 %r4, 1, 0, %p2; mad.wide.u32 %rd3, %r1, 4, %rd1; st.global.u32 [%rd3], %r4;"
        )
    };
    let votes = u32s(&silent(&body(2), 256));
    assert!(votes[..128].iter().all(|vote| *vote == 0) && votes[128..256].iter().all(|vote| *vote == 1));
    seen(&body(1), 256, &[FaultKind::Barrier], &["named barrier 1", "could have come in the round before", "by warp "]);
}

/// A producer warp copies 2 KiB to the same stage three times, which a warpgroup multiplies.
/// `early` and `late` stand before and after the wait for the product. `free_count` arrivals free
/// the stage, and the warpgroup waits for the phases from `parity` on.
fn multiplied(early: &str, late: &str, free_count: u32, parity: u32) -> String {
    let rounds = 3;
    let mut body = format!(
        "@!%p21 bra READY; mbarrier.init.shared.b64 [%r2], 1; mbarrier.init.shared.b64 [%r2+8], {free_count};
         fence.mbarrier_init.release.cluster; READY: bar.sync 0; add.u32 %r3, %r2, 1024;
         setp.ge.u32 %p1, %r1, 128; @!%p1 bra CONSUME; @!%p20 bra END;\n"
    );
    for round in 0..rounds {
        if round > 0 {
            body += &format!(
                "F{round}: mbarrier.try_wait.parity.shared.b64 %p3, [%r2+8], {}; @!%p3 bra F{round};\n",
                (round - 1) % 2
            );
        }
        body += "mbarrier.arrive.expect_tx.shared.b64 _, [%r2], 2048;
            cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r3], [%rd2], 2048, [%r2];\n";
    }
    body += "bra END; CONSUME: mov.b64 %rd10, 0x0000000800400080; setp.ne.u32 %p4, %r1, %r1;\n";
    for round in 0..rounds {
        body += &format!(
            "C{round}: mbarrier.try_wait.parity.shared.b64 %p3, [%r2], {}; @!%p3 bra C{round};
             wgmma.fence.sync.aligned;
             wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%f1, %f2, %f3, %f4}}, %rd10, %rd10, %p4, 1, 1, 0, 0;
             wgmma.commit_group.sync.aligned; {early} wgmma.wait_group.sync.aligned 0; {late}\n",
            (round + parity) % 2
        );
    }
    body + "mad.wide.u32 %rd3, %r1, 4, %rd1; st.global.f32 [%rd3], %f2; END:"
}

const FREE: &str = "@%p20 mbarrier.arrive.shared.b64 _, [%r2+8];";

#[test]
fn a_stage_is_free_when_all_four_warps_have_waited() {
    silent(&multiplied("", FREE, 4, 0), 160);
    seen(&multiplied(FREE, "", 4, 0), 160, &[FaultKind::Race], &["bulk copy of 2048 bytes", "which a product"]);
    // Three of four warps free the stage, which the fourth may still need.
    seen(&multiplied("", FREE, 3, 0), 160, &[FaultKind::Race, FaultKind::Barrier], &["which a product"]);
    seen(&multiplied("", FREE, 5, 0), 160, &[FaultKind::Deadlock], &["1 of 5 arrivals"]);
    // A wait for the parity of the round before is over at once.
    seen(
        &multiplied("", FREE, 4, 1),
        160,
        &[FaultKind::Race, FaultKind::Uninitialised, FaultKind::BulkCopy, FaultKind::Deadlock],
        &["wgmma read of matrix B"],
    );
}

#[test]
fn one_warp_waits_for_itself_alone() {
    // The first warp stores to an operand after its own wait. The others wait before the barrier or
    // after.
    let body = |barrier: &str| {
        format!(
            "mad.lo.u32 %r3, %r1, 16, %r2; mov.u32 %r4, 0; st.shared.v4.u32 [%r3], {{%r4, %r4, %r4, %r4}}; fence.proxy.async;
             bar.sync 0; mov.b64 %rd10, 0x0000000800400040; setp.ne.u32 %p4, %r1, %r1; wgmma.fence.sync.aligned;
             wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%f1, %f2, %f3, %f4}}, %rd10, %rd10, %p4, 1, 1, 0, 0;
             wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; {barrier}
             setp.lt.u32 %p1, %r1, 32; @%p1 st.shared.u32 [%r3], %r1;"
        )
    };
    silent(&body("bar.sync 0;"), 128);
    seen(&body(""), 128, &[FaultKind::Race], &["store of 4 bytes", "which a product"]);
    let early = body("")
        .replace(
            "wgmma.wait_group.sync.aligned 0;",
            "@%p1 bra SKIP; bar.sync 0; SKIP: wgmma.wait_group.sync.aligned 0; @!%p1 bra GO; bar.sync 0; GO:",
        )
        .replace("bar.sync 0; mov.b64", "bar.sync 0; setp.lt.u32 %p1, %r1, 32; mov.b64");
    seen(&early, 128, &[FaultKind::Race], &["store of 4 bytes", "which a product"]);
}

#[test]
fn warpgroups_that_merge() {
    // The second warpgroup stores its results where the operands of the first were. The first reads
    // them.
    let body = |before: &str, after: &str| {
        format!(
            "mad.lo.u32 %r3, %r1, 16, %r2; mov.u32 %r4, 0; st.shared.v4.u32 [%r3], {{%r4, %r4, %r4, %r4}}; fence.proxy.async;
             bar.sync 0; setp.ge.u32 %p1, %r1, 128; and.b32 %r5, %r1, 127; mad.lo.u32 %r3, %r5, 4, %r2; @%p1 bra SECOND;
             mov.b64 %rd10, 0x0000000800400040; setp.ne.u32 %p4, %r1, %r1; wgmma.fence.sync.aligned;
             wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%f1, %f2, %f3, %f4}}, %rd10, %rd10, %p4, 1, 1, 0, 0;
             wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
             {before} {after} ld.shared.u32 %r6, [%r3]; mad.wide.u32 %rd3, %r1, 4, %rd1; st.global.u32 [%rd3], %r6; bra END;
             SECOND: {before} st.shared.u32 [%r3], %r1; {after} END:"
        )
    };
    let barrier = "bar.sync 7, 256;";
    assert_eq!(u32s(&silent(&body(barrier, barrier), 256))[..128], (128..256).collect::<Vec<u32>>());
    seen(&body("", barrier), 256, &[FaultKind::Race], &["at shared 0x"]);
    seen(&body(barrier, ""), 256, &[FaultKind::Race], &[UNORDERED]);
}

#[test]
fn a_fence_is_before_the_arrival_that_tells_of_it() {
    let body = |first: &str, second: &str| {
        format!(
            "@%p21 mbarrier.init.shared.b64 [%r2], 1; bar.sync 0; add.u32 %r3, %r2, 64; setp.eq.u32 %p1, %r11, 1; @%p1 bra CONSUME;
             @!%p20 bra END; st.shared.v2.u64 [%r3], {{%rd1, %rd1}}; {first} {second} bra END;
             CONSUME: mbarrier.try_wait.parity.shared.b64 %p3, [%r2], 0; @!%p3 bra CONSUME; @!%p20 bra END;
             cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r3], 16; cp.async.bulk.commit_group;
             cp.async.bulk.wait_group 0; END:"
        )
    };
    let (fence, arrive) = ("fence.proxy.async;", "mbarrier.arrive.shared.b64 _, [%r2];");
    silent(&body(fence, arrive), 64);
    silent(
        &body("", arrive).replace(
            "bra CONSUME; @!%p20 bra END;\n             cp",
            &format!("bra CONSUME; @!%p20 bra END; {fence}\n             cp"),
        ),
        64,
    );
    seen(
        &body(arrive, fence),
        64,
        &[FaultKind::MissingFence],
        &["no fence.proxy.async after the ordinary store by warp 0"],
    );
}

#[test]
fn a_copy_is_for_those_who_waited() {
    // Lane 0 waits. The other lanes know of the copy by a barrier of the warp.
    let body = |sync: &str| {
        format!(
            "@!%p21 bra READY; mbarrier.init.shared.b64 [%r2], 1; fence.mbarrier_init.release.cluster; READY: bar.sync 0;
             add.u32 %r3, %r2, 1024; setp.eq.u32 %p1, %r11, 1; @%p1 bra CONSUME; @!%p20 bra END;
             mbarrier.arrive.expect_tx.shared.b64 _, [%r2], 128;
             cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r3], [%rd2], 128, [%r2]; bra END;
             CONSUME: @!%p20 bra JOIN; W: mbarrier.try_wait.parity.shared.b64 %p3, [%r2], 0; @!%p3 bra W; JOIN: {sync}
             mad.lo.u32 %r4, %r10, 4, %r3; ld.shared.u32 %r5, [%r4]; mad.wide.u32 %rd3, %r10, 4, %rd1;
             st.global.u32 [%rd3], %r5; END:"
        )
    };
    for sync in ["bar.warp.sync -1;", "shfl.sync.idx.b32 %r6, %r10, 0, 31, -1;", "vote.sync.any.pred %p5, %p20, -1;"] {
        assert_eq!(silent(&body(sync), 64)[..128], input()[..128]);
    }
    seen(&body(""), 64, &[FaultKind::Race], &["warp 1", "lane 1", UNORDERED, "by warp 0"]);
    // A third warp reads without waiting for anything.
    let idle = body("bar.warp.sync -1;")
        .replace("CONSUME:", "CONSUME: ")
        .replace("setp.eq.u32 %p1, %r11, 1;", "setp.eq.u32 %p1, %r11, 2; @%p1 bra JOIN; setp.eq.u32 %p1, %r11, 1;");
    seen(&idle, 96, &[FaultKind::Race, FaultKind::Uninitialised], &["of 4 bytes at shared 0x800"]);
}

#[test]
fn lanes_meet_before_one_reads_what_another_wrote() {
    for stride in [4, 16] {
        let body = |sync: &str| {
            format!(
                "mad.lo.u32 %r3, %r10, {stride}, %r2; sub.u32 %r4, 31, %r10; mad.lo.u32 %r5, %r4, {stride}, %r2;
                 st.shared.u32 [%r3], %r1; {sync} ld.shared.u32 %r6, [%r5]; mad.wide.u32 %rd3, %r1, 4, %rd1;
                 st.global.u32 [%rd3], %r6;"
            )
        };
        for sync in ["bar.warp.sync -1;", "bar.sync 0;", "shfl.sync.idx.b32 %r7, %r10, 0, 31, -1;"] {
            assert_eq!(u32s(&silent(&body(sync), 32))[..32], (0..32).rev().collect::<Vec<u32>>());
        }
        seen(&body(""), 32, &[FaultKind::Race], &["lane 0", UNORDERED, "written by warp 0"]);
        // A lane's own bytes need no barrier.
        silent(&body("mov.u32 %r5, %r3;"), 32);
        // The arrival of a lane tells of its own stores, and of those of lanes that it has met.
        let body = |sync: &str| {
            format!(
                "@%p21 mbarrier.init.shared.b64 [%r2], 1; mad.lo.u32 %r3, %r10, {stride}, %r2; mov.u32 %r4, 0;
                 setp.eq.u32 %p1, %r11, 1; @%p1 st.shared.u32 [%r3+64], %r4; bar.sync 0; @%p1 bra CONSUME;
                 st.shared.u32 [%r3+64], %r1; {sync} @%p20 mbarrier.arrive.shared.b64 _, [%r2]; bra END;
                 CONSUME: mbarrier.try_wait.parity.shared.b64 %p3, [%r2], 0; @!%p3 bra CONSUME;
                 ld.shared.u32 %r4, [%r3+64]; END:"
            )
        };
        silent(&body("bar.warp.sync -1;"), 64);
        silent(
            &body("")
                .replace("st.shared.u32 [%r3+64], %r1;", "@%p20 st.shared.u32 [%r3+64], %r1;")
                .replace("ld.shared", "@%p20 ld.shared"),
            64,
        );
        seen(&body(""), 64, &[FaultKind::Race], &["warp 1, lane 1", UNORDERED]);
    }
}

#[test]
fn copies_of_threads_are_their_stores() {
    let body = |barrier: &str| {
        format!(
            "setp.eq.u32 %p1, %r11, 0; mad.lo.u32 %r3, %r10, 16, %r2; mad.wide.u32 %rd3, %r10, 16, %rd2; mov.u32 %r4, 0;
             @!%p1 st.shared.v4.u32 [%r3], {{%r4, %r4, %r4, %r4}}; bar.sync 0;
             @%p1 cp.async.cg.shared.global [%r3], [%rd3], 16; cp.async.wait_all; {barrier}
             @!%p1 ld.shared.u32 %r4, [%r3]; mad.wide.u32 %rd3, %r10, 4, %rd1; @!%p1 st.global.u32 [%rd3], %r4;"
        )
    };
    silent(&body("bar.sync 0;"), 64);
    seen(&body(""), 64, &[FaultKind::Race], &["warp "]);
}

#[test]
fn a_read_of_a_part_does_not_hide_that_of_the_rest() {
    // Warp 1 reads 16 bytes, meets, and reads 4 of them again. Warp 0 writes the 4 at an offset.
    let body = |offset: u32, barrier: &str| {
        format!(
            "setp.eq.u32 %p1, %r11, 1; @%p21 st.shared.v4.u32 [%r2], {{%r1, %r1, %r1, %r1}}; bar.sync 0; @%p1 bra READ;
             {barrier} @%p21 st.shared.u32 [%r2+{offset}], %r1; bra END;
             READ: ld.shared.v4.u32 {{%r4, %r5, %r6, %r7}}, [%r2]; bar.warp.sync -1; ld.shared.u32 %r4, [%r2+4];
             {barrier} END:"
        )
    };
    for offset in [0, 4, 12] {
        seen(&body(offset, ""), 64, &[FaultKind::Race], &[UNORDERED]);
        silent(&body(offset, "bar.sync 1, 64;"), 64);
    }
}

#[test]
fn strong_accesses_tell_what_their_threads_know() {
    let body = "@%p21 st.shared.u32 [%r2], 0; bar.sync 0; setp.eq.u32 %p1, %r11, 1; @%p1 bra CONSUME;
        @!%p20 bra END; st.shared.u32 [%r2+64], %r1; membar.cta; st.volatile.shared.u32 [%r2], 1; bra END;
        CONSUME: ld.volatile.shared.u32 %r4, [%r2]; setp.eq.u32 %p3, %r4, 0; @%p3 bra CONSUME;
        ld.shared.u32 %r5, [%r2+64]; END:"
        .replace("[%r2], 0;", "[%r2], %r10;")
        .replace("[%r2], 1;", "[%r2], %r9;")
        .replace("setp.eq.u32 %p1, %r11, 1;", "mov.u32 %r9, 1; setp.eq.u32 %p1, %r11, 1;");
    silent(&body, 64);
    // All threads add to one word, which they read after a barrier.
    let body = "@%p21 st.shared.u32 [%r2], %r10; bar.sync 0; red.shared.add.u32 [%r2], 1; bar.sync 0;
        ld.shared.u32 %r4, [%r2]; mad.wide.u32 %rd3, %r1, 4, %rd1; st.global.u32 [%rd3], %r4;";
    assert_eq!(u32s(&silent(body, 128))[..128], [128; 128]);
    seen(&body.replace("1; bar.sync 0;", "1;"), 128, &[FaultKind::Race], &[UNORDERED]);
}

#[test]
fn producer_and_consumers_give_the_same_bytes_in_every_order() {
    // A ring of two stages of 256 bytes goes 16 rounds. Two consumer warps each sum their half of a
    // stage.
    let body = "@!%p21 bra READY; mbarrier.init.shared.b64 [%r2], 1; mbarrier.init.shared.b64 [%r2+8], 1;
        mbarrier.init.shared.b64 [%r2+16], 2; mbarrier.init.shared.b64 [%r2+24], 2;
        fence.mbarrier_init.release.cluster; READY: bar.sync 0;
        mov.u32 %r20, 0; mov.u32 %r21, 0; mov.u32 %r22, 0; setp.eq.u32 %p1, %r11, 0; @%p1 bra PRODUCE;
        CONSUME: and.b32 %r3, %r20, 1; shr.u32 %r4, %r20, 1; and.b32 %r4, %r4, 1; mad.lo.u32 %r5, %r3, 8, %r2;
        C: mbarrier.try_wait.parity.shared.b64 %p3, [%r5], %r4; @!%p3 bra C;
        mad.lo.u32 %r6, %r3, 256, %r2; add.u32 %r7, %r1, -32; mad.lo.u32 %r6, %r7, 4, %r6; ld.shared.u32 %r8, [%r6+1024];
        mad.lo.u32 %r21, %r21, 31, %r8; bar.warp.sync -1; @%p20 mbarrier.arrive.shared.b64 _, [%r5+16];
        add.u32 %r20, %r20, 1; setp.lt.u32 %p2, %r20, 16; @%p2 bra CONSUME;
        mad.wide.u32 %rd3, %r7, 4, %rd1; st.global.u32 [%rd3], %r21; bra END;
        PRODUCE: @!%p20 bra END;
        P: and.b32 %r3, %r20, 1; shr.u32 %r4, %r20, 1; and.b32 %r4, %r4, 1; xor.b32 %r4, %r4, 1; mad.lo.u32 %r5, %r3, 8, %r2;
        F: mbarrier.try_wait.parity.shared.b64 %p3, [%r5+16], %r4; @!%p3 bra F;
        mbarrier.arrive.expect_tx.shared.b64 _, [%r5], 256; mad.lo.u32 %r6, %r3, 256, %r2; add.u32 %r6, %r6, 1024;
        mad.wide.u32 %rd3, %r20, 256, %rd2; cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r6], [%rd3], 256, [%r5];
        add.u32 %r20, %r20, 1; setp.lt.u32 %p2, %r20, 16; @%p2 bra P; END:";
    let words = u32s(&input());
    let expected: Vec<u32> = (0..64)
        .map(|i| (0..16).fold(0u32, |sum, round| sum.wrapping_mul(31).wrapping_add(words[64 * round + i])))
        .collect();
    assert_eq!(u32s(&silent(body, 96))[..64], expected);
    // Here consumers release the stage before they read it.
    let early = body.replace("mad.lo.u32 %r6, %r3, 256, %r2; add.u32 %r7", "bar.warp.sync -1; @%p20 mbarrier.arrive.shared.b64 _, [%r5+16]; mad.lo.u32 %r6, %r3, 256, %r2; add.u32 %r7")
        .replace("bar.warp.sync -1; @%p20 mbarrier.arrive.shared.b64 _, [%r5+16];\n        add", "add");
    assert_ne!(early, body);
    seen(&early, 96, &[FaultKind::Race], &["at shared 0x"]);
}

#[test]
fn one_lane_fills_a_ring_for_which_its_whole_warp_waits() {
    // A ring of two stages goes 16 rounds. All lanes of the first warp wait for a free stage, and
    // lane 0 alone fills it. The code that fills stands behind the loop, as compilers place it, so
    // that the other lanes come to the next wait before lane 0. There all must go on together. Else
    // the turn of lane 0 may end in the work before a later wait. It then runs again before the
    // others, and they miss two phases.
    //
    // The mbarriers at 0 and 8 tell that a stage is full, those at 16 and 24 that it is free.
    let work = "add.u32 %r22, %r22, 1; ".repeat(64);
    let body = "@!%p21 bra READY; mbarrier.init.shared.b64 [%r2], 1; mbarrier.init.shared.b64 [%r2+8], 1;
        mbarrier.init.shared.b64 [%r2+16], 2; mbarrier.init.shared.b64 [%r2+24], 2;
        fence.mbarrier_init.release.cluster; READY: bar.sync 0;
        mov.u32 %r20, 0; mov.u32 %r21, 0; mov.u32 %r22, 0; setp.eq.u32 %p1, %r11, 0; @%p1 bra PRODUCE;
        CONSUME: and.b32 %r3, %r20, 1; shr.u32 %r4, %r20, 1; and.b32 %r4, %r4, 1; mad.lo.u32 %r5, %r3, 8, %r2;
        FULL: mbarrier.try_wait.parity.shared.b64 %p3, [%r5], %r4; @!%p3 bra FULL;
        mad.lo.u32 %r6, %r3, 256, %r2; add.u32 %r7, %r1, -32; mad.lo.u32 %r6, %r7, 4, %r6; ld.shared.u32 %r8, [%r6+1024];
        mad.lo.u32 %r21, %r21, 31, %r8; bar.warp.sync -1; @%p20 mbarrier.arrive.shared.b64 _, [%r5+16];
        add.u32 %r20, %r20, 1; setp.lt.u32 %p2, %r20, 16; @%p2 bra CONSUME;
        mad.wide.u32 %rd3, %r7, 4, %rd1; st.global.u32 [%rd3], %r21; bra END;
        PRODUCE: and.b32 %r3, %r20, 1; shr.u32 %r4, %r20, 1; and.b32 %r4, %r4, 1; xor.b32 %r4, %r4, 1;
        mad.lo.u32 %r5, %r3, 8, %r2; WORK
        FREE: mbarrier.try_wait.parity.shared.b64 %p3, [%r5+16], %r4; @!%p3 bra FREE;
        @%p20 bra FILL;
        NEXT: add.u32 %r20, %r20, 1; setp.lt.u32 %p2, %r20, 16; @%p2 bra PRODUCE; bra END;
        FILL: mbarrier.arrive.expect_tx.shared.b64 _, [%r5], 256; mad.lo.u32 %r6, %r3, 256, %r2; add.u32 %r6, %r6, 1024;
        mad.wide.u32 %rd3, %r20, 256, %rd2;
        cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r6], [%rd3], 256, [%r5]; bra NEXT;
        END:";
    let module = block(&body.replace("WORK", &work));
    let words = u32s(&input());
    let expected: Vec<u32> = (0..64)
        .map(|i| (0..16).fold(0u32, |sum, round| sum.wrapping_mul(31).wrapping_add(words[64 * round + i])))
        .collect();
    for seed in 0..200 {
        let out = run(&module, 96, seed).unwrap_or_else(|fault| panic!("{fault}"));
        assert_eq!(u32s(&out)[..64], expected, "seed {seed}");
    }
}

/// The tickets that four warps draw, 24 each.
fn tickets(seed: u64) -> Vec<u8> {
    let body = "@!%p20 bra END; mov.u32 %r20, 0; L: atom.global.add.u32 %r3, [%rd1], 1; mad.lo.u32 %r4, %r11, 24, %r20;
        mad.wide.u32 %rd3, %r4, 4, %rd1; st.global.u32 [%rd3+64], %r3; add.u32 %r20, %r20, 1; setp.lt.u32 %p2, %r20, 24;
        @%p2 bra L; END:";
    run(&block(body), 128, seed).unwrap_or_else(|fault| panic!("{fault}"))
}

#[test]
fn a_seed_is_an_order() {
    let orders: Vec<Vec<u8>> = (0..SEEDS).map(tickets).collect();
    assert!((0..SEEDS).all(|seed| tickets(seed) == orders[seed as usize]));
    // Some seeds draw the unkind order, and others also let each warp run to its end.
    let different = orders.iter().collect::<BTreeSet<_>>().len();
    assert!(different > SEEDS as usize / 3, "{different} orders");
    let fault = run(&block("@%p21 trap;"), 64, 17).unwrap_err();
    assert!(fault.to_string().ends_with("(seen in the order of seed 17)"), "{fault}");
    assert_eq!(run(&block("@%p21 trap;"), 64, 17).unwrap_err(), fault);
}
