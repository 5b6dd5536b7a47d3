//! Mbarriers and asynchronous copies: phases, byte counts, groups, pipelines of producers and
//! consumers.

mod common;

use common::{bytes32, kernel_with, launch, one_block, store, u32s};

const BUFFER: &str = ".extern .shared .align 1024 .b8 smem[];";

#[test]
fn phases_by_parity_and_by_state() {
    // One warp makes the 32 arrivals of a phase. The state of an arrival names the phase it belongs
    // to.
    let body = format!(
        "mov.u32 %r2, smem; setp.eq.u32 %p1, %r1, 0; @%p1 mbarrier.init.shared::cta.b64 [%r2], 32; bar.sync 0; mov.u32 %r3, 0;
         mbarrier.test_wait.parity.shared::cta.b64 %p2, [%r2], 1; selp.u32 %r4, 1, 0, %p2; add.u32 %r3, %r3, %r4;
         mbarrier.test_wait.parity.shared::cta.b64 %p2, [%r2], 0; selp.u32 %r4, 2, 0, %p2; add.u32 %r3, %r3, %r4;
         bar.warp.sync -1;
         mbarrier.arrive.shared::cta.b64 %rd3, [%r2];
         mbarrier.test_wait.shared::cta.b64 %p2, [%r2], %rd3; selp.u32 %r4, 4, 0, %p2; add.u32 %r3, %r3, %r4;
         mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2], 0; selp.u32 %r4, 8, 0, %p2; add.u32 %r3, %r3, %r4;
         bar.warp.sync -1;
         mbarrier.arrive.release.cta.shared::cta.b64 _, [%r2], 1;
         mbarrier.try_wait.acquire.cta.shared::cta.b64 %p2, [%r2], %rd3, 1000; selp.u32 %r4, 16, 0, %p2; add.u32 %r3, %r3, %r4;
         mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2], 1; selp.u32 %r4, 32, 0, %p2; add.u32 %r3, %r3, %r4; {}",
        store("%r3")
    );
    let (out, _) = launch(&kernel_with(BUFFER, "", &body), one_block(32, 16), &[], 128).unwrap();
    assert_eq!(u32s(&out), [1 + 4 + 8 + 16 + 32; 32]);
}

#[test]
fn barriers_through_generic_addresses_drop_and_reuse() {
    let body = format!(
        "mov.u64 %rd3, smem; cvta.shared.u64 %rd3, %rd3; setp.eq.u32 %p1, %r1, 0;
         @%p1 mbarrier.init.b64 [%rd3], 33; bar.sync 0;
         mbarrier.arrive_drop.b64 %rd4, [%rd3]; setp.eq.u32 %p1, %r1, 5; @%p1 mbarrier.arrive.b64 %rd4, [%rd3];
         WAIT: mbarrier.try_wait.parity.b64 %p2, [%rd3], 0; @!%p2 bra WAIT;
         bar.sync 0; setp.eq.u32 %p1, %r1, 9; @%p1 mbarrier.arrive.b64 %rd4, [%rd3];
         WAIT2: mbarrier.try_wait.parity.b64 %p2, [%rd3], 1; @!%p2 bra WAIT2;
         bar.sync 0; @%p1 mbarrier.inval.b64 [%rd3]; bar.sync 0; @%p1 st.shared.u64 [smem], 77; bar.sync 0;
         ld.shared.u32 %r3, [smem]; {}",
        store("%r3")
    );
    let (out, _) = launch(&kernel_with(BUFFER, "", &body), one_block(32, 16), &[], 128).unwrap();
    assert_eq!(u32s(&out), [77; 32], "after 32 drops one arrival is a phase; memory is free after inval");
}

/// A pipeline of `stages` buffers of 2 KiB. Warp 0 copies 16 chunks in, and warps 1 and 2 sum words
/// of each.
fn pipeline(stages: u32, producer_first: &str) -> String {
    let body = format!(
        "mov.u32 %r2, smem; setp.ne.u32 %p1, %r1, 0; @%p1 bra READY; mov.u32 %r3, 0;
         INIT: mad.lo.u32 %r4, %r3, 16, %r2; mbarrier.init.shared::cta.b64 [%r4], 1; mbarrier.init.shared::cta.b64 [%r4+8], 2;
         add.u32 %r3, %r3, 1; setp.lt.u32 %p2, %r3, {stages}; @%p2 bra INIT; fence.mbarrier_init.release.cluster;
         READY: bar.sync 0; mov.u32 %r5, 0; mov.u32 %r6, 0; mov.u32 %r7, 0; mov.u32 %r20, 0; mov.u64 %rd3, %rd2;
         setp.ge.u32 %p1, %r1, 32; @%p1 bra CONSUME; @!%p3 elect.sync _|%p4, -1; @!%p4 bra END; {producer_first}
         PRODUCE: mad.lo.u32 %r8, %r6, 16, %r2; xor.b32 %r9, %r7, 1;
         FREE: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r8+8], %r9; @!%p2 bra FREE;
         mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r8], 2048;
         mad.lo.u32 %r10, %r6, 2048, %r2; add.u32 %r10, %r10, 1024; add.u32 %r11, %r10, 512; add.s64 %rd4, %rd3, 512;
         cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r10], [%rd3], 512, [%r8];
         cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%r11], [%rd4], 1536, [%r8], %rd5;
         add.s64 %rd3, %rd3, 2048; add.u32 %r6, %r6, 1; setp.eq.u32 %p2, %r6, {stages};
         @%p2 mov.u32 %r6, 0; @%p2 xor.b32 %r7, %r7, 1;
         add.u32 %r5, %r5, 1; setp.lt.u32 %p2, %r5, 16; @%p2 bra PRODUCE; bra END;
         CONSUME: mad.lo.u32 %r8, %r6, 16, %r2;
         FULL: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r8], %r7; @!%p2 bra FULL;
         mad.lo.u32 %r10, %r6, 2048, %r2; mad.lo.u32 %r10, %r1, 32, %r10;
         ld.shared.v4.u32 {{%r11, %r12, %r13, %r14}}, [%r10]; add.u32 %r20, %r20, %r11; add.u32 %r20, %r20, %r14;
         ld.shared.v4.u32 {{%r11, %r12, %r13, %r14}}, [%r10+16]; add.u32 %r20, %r20, %r12; add.u32 %r20, %r20, %r13;
         bar.warp.sync -1; and.b32 %r15, %r1, 31; setp.eq.u32 %p2, %r15, 0;
         @%p2 mbarrier.arrive.shared::cta.b64 _, [%r8+8];
         add.u32 %r6, %r6, 1; setp.eq.u32 %p2, %r6, {stages}; @%p2 mov.u32 %r6, 0; @%p2 xor.b32 %r7, %r7, 1;
         add.u32 %r5, %r5, 1; setp.lt.u32 %p2, %r5, 16; @%p2 bra CONSUME; {}
         END: ",
        store("%r20")
    );
    kernel_with(BUFFER, "", &body)
}

#[test]
fn pipelines_of_any_depth() {
    let words: Vec<u32> = (0..16 * 512).map(|i| i * i + 7).collect();
    for stages in [1, 2, 3, 7] {
        let shared = 1024 + stages * 2048;
        let (out, stats) = launch(&pipeline(stages, ""), one_block(96, shared), &bytes32(words.clone()), 384).unwrap();
        let out = u32s(&out);
        for (thread, found) in out.iter().enumerate().skip(32) {
            let expected = (0..16).fold(0u32, |sum, chunk| {
                let at = chunk * 512 + (thread - 32) * 8;
                [0, 3, 5, 6].iter().fold(sum, |sum, i| sum.wrapping_add(words[at + i]))
            });
            assert_eq!(*found, expected, "{stages} stages, thread {thread}");
        }
        assert_eq!(stats.bulk_bytes_to_shared, 16 * 2048);
        assert_eq!(stats.count("cp.async.bulk"), 32);
    }
}

#[test]
fn copies_to_global_memory() {
    // Each warp writes its part and fences, and one thread copies all in two groups. The second
    // group may still be in flight after the first wait.
    let body = "
        mov.u32 %r2, smem; mad.lo.u32 %r3, %r1, 16, %r2; add.u32 %r4, %r1, 1; add.u32 %r5, %r1, 2;
        st.shared.v4.u32 [%r3], {%r1, %r4, %r5, %r1}; fence.proxy.async.shared::cta; bar.sync 0;
        setp.ne.u32 %p1, %r1, 0; @%p1 bra END;
        cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r2], 512; cp.async.bulk.commit_group;
        add.s64 %rd3, %rd1, 512; add.u32 %r6, %r2, 512;
        cp.async.bulk.global.shared::cta.bulk_group [%rd3], [%r6], 512; cp.async.bulk.commit_group;
        cp.async.bulk.wait_group.read 1; st.shared.u32 [%r2], 5;
        cp.async.bulk.wait_group 0; ld.global.u32 %r7, [%rd1+1020]; st.global.u32 [%rd1+1024], %r7;
        END:";
    let (out, stats) = launch(&kernel_with(BUFFER, "", body), one_block(64, 1024), &[], 1040).unwrap();
    let expected: Vec<u32> = (0..64).flat_map(|t| [t, t + 1, t + 2, t]).chain([63]).collect();
    assert_eq!(u32s(&out)[..257], expected);
    assert_eq!(stats.bulk_bytes_to_global, 1024);
}

#[test]
fn copies_of_single_threads_in_groups() {
    // Each thread copies 16 and 8 bytes in one group and 4 in another, and waits for one after the
    // other. Then it copies 16 bytes that it does not commit.
    let body = "
        mov.u32 %r2, smem; mad.lo.u32 %r3, %r1, 48, %r2; mad.wide.u32 %rd3, %r1, 48, %rd2; mad.wide.u32 %rd4, %r1, 48, %rd1;
        cp.async.cg.shared.global.L2::128B [%r3], [%rd3], 16; cp.async.ca.shared::cta.global [%r3+16], [%rd3+16], 8;
        cp.async.commit_group; cp.async.ca.shared.global [%r3+24], [%rd3+24], 4; cp.async.commit_group;
        cp.async.wait_group 1;
        ld.shared.v4.u32 {%r4, %r5, %r6, %r7}, [%r3]; ld.shared.v2.u32 {%r8, %r9}, [%r3+16];
        st.global.v4.u32 [%rd4], {%r4, %r5, %r6, %r7}; st.global.v2.u32 [%rd4+16], {%r8, %r9};
        cp.async.wait_group 0; ld.shared.u32 %r4, [%r3+24]; st.global.u32 [%rd4+24], %r4; st.global.u32 [%rd4+28], %r1;
        cp.async.ca.shared.global [%r3], [%rd3+32], 16; cp.async.wait_all;
        ld.shared.v4.u32 {%r4, %r5, %r6, %r7}, [%r3]; st.global.v4.u32 [%rd4+32], {%r4, %r5, %r6, %r7};";
    let words: Vec<u32> = (0..64 * 12).map(|i| if i % 12 == 7 { i / 12 } else { i * i + 3 }).collect();
    let ptx = kernel_with(BUFFER, "", body);
    let (out, stats) = launch(&ptx, one_block(64, 48 * 64), &bytes32(words.clone()), 48 * 64).unwrap();
    assert_eq!(u32s(&out), words);
    assert_eq!(stats.count("cp.async"), 2 * 9);
}

#[test]
fn copies_of_single_threads_filled_with_zeros() {
    // Thread t copies t / 2 bytes of 16. The source of a copy of nothing lies nowhere.
    let body = "
        mov.u32 %r2, smem; mad.lo.u32 %r3, %r1, 16, %r2; mad.wide.u32 %rd3, %r1, 16, %rd2; mad.wide.u32 %rd4, %r1, 16, %rd1;
        shr.u32 %r4, %r1, 1; setp.eq.u32 %p1, %r4, 0; selp.b64 %rd3, 64, %rd3, %p1;
        createpolicy.fractional.L2::evict_first.b64 %rd9, 1.0;
        cp.async.cg.shared.global.L2::cache_hint [%r3], [%rd3], 16, %r4, %rd9;
        cp.async.ca.shared.global [%r3+512], [%rd2], 4, 3; cp.async.wait_all;
        ld.shared.v4.u32 {%r4, %r5, %r6, %r7}, [%r3]; ld.shared.u32 %r8, [%r3+512];
        st.global.v4.u32 [%rd4], {%r4, %r5, %r6, %r7}; st.global.u32 [%rd4+512], %r8;";
    let input: Vec<u8> = (0..512).map(|i| (i * 7 + 1) as u8).collect();
    let (out, _) = launch(&kernel_with(BUFFER, "", body), one_block(32, 1024), &input, 1024).unwrap();
    for thread in 0..32 {
        let expected: Vec<u8> = (0..16).map(|i| if i < thread / 2 { input[16 * thread + i] } else { 0 }).collect();
        assert_eq!(out[16 * thread..][..16], expected, "thread {thread}");
        assert_eq!(out[512 + 16 * thread..][..4], [1, 8, 15, 0], "thread {thread}");
    }
}

#[test]
fn expect_and_complete_by_hand() {
    let body = format!(
        "mov.u32 %r2, smem; setp.eq.u32 %p1, %r1, 0; @%p1 mbarrier.init.shared.b64 [%r2], 1; bar.sync 0;
         @%p1 mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%r2], 64;
         @%p1 mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r2], 32; @%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r2], 32;
         WAIT: mbarrier.test_wait.parity.shared.b64 %p2, [%r2], 0; @!%p2 bra WAIT; {}",
        store("%r1")
    );
    let (out, _) = launch(&kernel_with(BUFFER, "", &body), one_block(32, 16), &[], 128).unwrap();
    assert_eq!(u32s(&out), (0..32).collect::<Vec<u32>>());
}

#[test]
fn copies_land_for_a_warp_that_polls() {
    let body = format!(
        "mov.u32 %r2, smem; setp.ne.u32 %p1, %r1, 0; @%p1 bra READY; mbarrier.init.shared.b64 [%r2], 1; fence.proxy.async;
         mbarrier.arrive.expect_tx.shared.b64 _, [%r2], 128;
         add.u32 %r3, %r2, 128; cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r3], [%rd2], 128, [%r2];
         READY: bar.sync 0;
         POLL: mbarrier.test_wait.parity.shared.b64 %p2, [%r2], 0; @!%p2 bra POLL;
         mad.lo.u32 %r3, %r1, 4, %r2; ld.shared.u32 %r4, [%r3+128]; {}",
        store("%r4")
    );
    let input: Vec<u32> = (0..32).map(|i| i * 3).collect();
    let (out, _) = launch(&kernel_with(BUFFER, "", &body), one_block(32, 256), &bytes32(input.clone()), 128).unwrap();
    assert_eq!(u32s(&out), input);
}

#[test]
fn a_wait_may_time_out_and_the_kernel_do_something_else() {
    // try_wait gives up when nothing else can happen. The kernel then completes the phase itself.
    let body = format!(
        "mov.u32 %r2, smem; setp.eq.u32 %p1, %r1, 0; @%p1 mbarrier.init.shared.b64 [%r2], 1; bar.sync 0;
         mbarrier.try_wait.parity.shared.b64 %p2, [%r2], 0; @%p2 trap; bar.warp.sync -1;
         @%p1 mbarrier.arrive.shared.b64 _, [%r2]; mbarrier.try_wait.parity.shared.b64 %p2, [%r2], 0; selp.u32 %r3, 1, 0, %p2; {}",
        store("%r3")
    );
    let (out, _) = launch(&kernel_with(BUFFER, "", &body), one_block(32, 16), &[], 128).unwrap();
    assert_eq!(u32s(&out), [1; 32]);
}
