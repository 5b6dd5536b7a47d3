//! What lanes and warps do together: shuffles, votes, elections, named barriers, and registers that
//! are handed on.

mod common;

use common::{kernel_with, launch, one_block, store, u32s, warp};
use ptx_emulator::LaunchConfig;

#[test]
fn shuffles() {
    // This is the pseudo-code of the ISA, with the value 100 + lane and the predicate in bit 16.
    let expected = |mode: &str, b: i32, c: u32| -> Vec<u32> {
        (0..32u32)
            .map(|lane| {
                let (clamp, segment) = (c & 31, c >> 8 & 31);
                let (max, min) = (lane & segment | clamp & !segment, lane & segment);
                let (j, p) = match mode {
                    "up" => (lane as i32 - b, lane as i32 - b >= max as i32),
                    "down" => (lane as i32 + b, lane as i32 + b <= max as i32),
                    "bfly" => (lane as i32 ^ b, (lane as i32 ^ b) <= max as i32),
                    _ => ((min | b as u32 & !segment) as i32, (min | b as u32 & !segment) <= max),
                };
                100 + if p { j as u32 } else { lane } + if p { 1 << 16 } else { 0 }
            })
            .collect()
    };
    for (mode, b, c) in [
        ("bfly", 1, 31),
        ("bfly", 16, 31),
        ("bfly", 3, 0x1c03),
        ("down", 4, 31),
        ("down", 1, 0x1807),
        ("up", 2, 0),
        ("up", 3, 0x1000),
        ("idx", 5, 31),
        ("idx", 2, 0x1c03),
        ("idx", 9, 7),
    ] {
        let body = format!(
            "add.u32 %r2, %r1, 100; shfl.sync.{mode}.b32 %r3|%p1, %r2, {b}, {c}, 0xffffffff; selp.u32 %r4, 0x10000, 0, %p1;
             add.u32 %r3, %r3, %r4; {}",
            store("%r3")
        );
        assert_eq!(warp(&body, &[]), expected(mode, b, c), "shfl.{mode} {b} {c:#x}");
    }
}

#[test]
fn shuffle_within_a_part_of_the_warp() {
    let body = format!(
        "mov.u32 %r3, 7; setp.ge.u32 %p1, %r1, 16; @%p1 bra OUT; shfl.sync.bfly.b32 %r3, %r1, 8, 31, 0xffff; OUT: {}",
        store("%r3")
    );
    let expected: Vec<u32> = (0..32).map(|lane| if lane < 16 { lane ^ 8 } else { 7 }).collect();
    assert_eq!(warp(&body, &[]), expected);
}

#[test]
fn votes_matches_reductions_elections() {
    let test = |text: &str, register: &str, expected: &dyn Fn(u32) -> u32| {
        let body = format!(
            "setp.lt.u32 %p1, %r1, 5; and.b32 %r2, %r1, 3; setp.ge.u32 %p5, %r1, 0; {text}; {}",
            store(register)
        );
        assert_eq!(warp(&body, &[]), (0..32).map(expected).collect::<Vec<u32>>(), "{text}");
    };
    let p = |text: &str| format!("{text}; selp.u32 %r9, 1, 0, %p9");
    test("vote.sync.ballot.b32 %r9, %p1, -1", "%r9", &|_| 31);
    test("vote.sync.ballot.b32 %r9, !%p1, -1", "%r9", &|_| !31);
    test(&p("vote.sync.any.pred %p9, %p1, -1"), "%r9", &|_| 1);
    test(&p("vote.sync.all.pred %p9, %p1, -1"), "%r9", &|_| 0);
    test(&p("vote.sync.all.pred %p9, %p5, -1"), "%r9", &|_| 1);
    test(&p("vote.sync.uni.pred %p9, %p1, -1"), "%r9", &|_| 0);
    test(&p("vote.sync.uni.pred %p9, !%p5, -1"), "%r9", &|_| 1);
    test("match.any.sync.b32 %r9, %r2, -1", "%r9", &|lane| 0x1111_1111 << (lane % 4));
    test(&p("match.all.sync.b32 %r8|%p9, %r2, -1"), "%r9", &|_| 0);
    test("redux.sync.add.s32 %r9, %r1, -1", "%r9", &|_| 496);
    test("redux.sync.max.u32 %r9, %r1, -1", "%r9", &|_| 31);
    test("sub.s32 %r3, 3, %r1; redux.sync.min.s32 %r9, %r3, -1", "%r9", &|_| -28i32 as u32);
    test("redux.sync.xor.b32 %r9, %r1, -1", "%r9", &|_| 0);
    test(&p("elect.sync %r8|%p9, -1"), "%r9", &|lane| u32::from(lane == 0));
    test("elect.sync %r9|%p9, -1", "%r9", &|_| 0);
    test("activemask.b32 %r9", "%r9", &|_| u32::MAX);
    test("mov.u32 %r9, 0; @%p1 activemask.b32 %r9", "%r9", &|lane| if lane < 5 { 31 } else { 0 });
}

#[test]
fn elected_lane_of_a_part() {
    let body = format!(
        "mov.u32 %r3, 50; mov.u32 %r2, 0xf0; setp.lt.u32 %p1, %r1, 4; @%p1 bra OUT; setp.ge.u32 %p1, %r1, 8; @%p1 bra OUT;
         elect.sync %r3|%p2, %r2; @%p2 add.u32 %r3, %r3, 100; OUT: {}",
        store("%r3")
    );
    let expected: Vec<u32> = (0..32)
        .map(|lane| {
            if lane == 4 {
                104
            } else if (5..8).contains(&lane) {
                4
            } else {
                50
            }
        })
        .collect();
    assert_eq!(warp(&body, &[]), expected);
}

#[test]
fn named_barriers_order_producers_and_consumers() {
    // Warp 0 writes and arrives. Warps 1 and 2 wait for it, and then each tells warp 3 by a barrier
    // of its own.
    let body = "
        mov.u32 %r2, box; mov.u32 %r3, %warpid; mov.u32 %r4, %laneid;
        setp.eq.u32 %p1, %r3, 3; @%p1 bra LAST; setp.ne.u32 %p1, %r3, 0; @%p1 bra CONSUME;
        mad.lo.u32 %r5, %r4, 4, %r2; add.u32 %r6, %r4, 1000; st.shared.u32 [%r5], %r6; barrier.cta.arrive.aligned 1, 96; ret;
        CONSUME: bar.sync 1, 96;
        xor.b32 %r5, %r4, %r3; mad.lo.u32 %r5, %r5, 4, %r2; ld.shared.u32 %r6, [%r5];
        shl.b32 %r7, %r3, 7; add.u32 %r7, %r7, %r2; mad.lo.u32 %r7, %r4, 4, %r7; st.shared.u32 [%r7], %r6;
        add.u32 %r8, %r3, 1; barrier.sync %r8, 64; ret;
        LAST: barrier.sync 3, 64; barrier.sync 2, 64;
        mad.lo.u32 %r5, %r4, 4, %r2; ld.shared.u32 %r6, [%r5+128]; ld.shared.u32 %r7, [%r5+256]; sub.u32 %r6, %r6, 1000;
        mad.lo.u32 %r6, %r7, 100, %r6; mad.wide.u32 %rd3, %r4, 4, %rd1; st.global.u32 [%rd3], %r6;";
    let (out, stats) =
        launch(&kernel_with(".shared .align 16 .b8 box[512];", "", body), one_block(128, 0), &[], 128).unwrap();
    assert_eq!(u32s(&out), (0..32u32).map(|lane| ((lane ^ 2) + 1000) * 100 + (lane ^ 1)).collect::<Vec<u32>>());
    assert_eq!(stats.count("bar.sync"), 2, "waiting does not count twice");
}

#[test]
fn barrier_reductions() {
    let body = format!(
        "setp.lt.u32 %p1, %r1, 40; barrier.cta.red.popc.aligned.u32 %r2, 0, %p1; barrier.cta.red.or.aligned.pred %p2, 0, %p1;
         barrier.cta.red.and.aligned.pred %p3, 1, 96, %p1; barrier.cta.red.and.aligned.pred %p4, 1, 96, !%p5;
         selp.u32 %r3, 100, 0, %p2; selp.u32 %r4, 1000, 0, %p3; add.u32 %r2, %r2, %r3; add.u32 %r2, %r2, %r4; {}",
        store("%r2")
    );
    let body = format!("setp.lt.u32 %p5, %r1, 0; {body}");
    let (out, _) = launch(&kernel_with("", "", &body), one_block(96, 0), &[], 384).unwrap();
    assert_eq!(u32s(&out), [140; 96]);
}

#[test]
fn a_block_wide_barrier_is_used_many_times() {
    // In each round every thread passes its value to the next thread of the block.
    let body = format!(
        "mov.u32 %r2, ring; mad.lo.u32 %r3, %r1, 4, %r2; mov.u32 %r4, %r1; mov.u32 %r5, 0;
         add.u32 %r6, %r1, 1; setp.eq.u32 %p1, %r6, 256; selp.u32 %r6, 0, %r6, %p1; mad.lo.u32 %r6, %r6, 4, %r2;
         LOOP: st.shared.u32 [%r6], %r4; bar.sync 0; ld.shared.u32 %r4, [%r3]; bar.sync 0;
         add.u32 %r5, %r5, 1; setp.lt.u32 %p2, %r5, 100; @%p2 bra LOOP; {}",
        store("%r4")
    );
    let (out, _) =
        launch(&kernel_with(".shared .align 16 .b8 ring[1024];", "", &body), one_block(256, 0), &[], 1024).unwrap();
    assert_eq!(u32s(&out), (0..256).map(|thread| (thread + 256 - 100) % 256).collect::<Vec<u32>>());
}

#[test]
fn registers_change_hands() {
    // There are 168 registers at entry. A consumer warpgroup can grow to 240 only when the producer
    // has given registers back.
    let body = "setp.lt.u32 %p1, %r1, 256; @%p1 bra CONSUMER; setmaxnreg.dec.sync.aligned.u32 24; ret;
                CONSUMER: setmaxnreg.inc.sync.aligned.u32 240;";
    let directives = ".maxntid 384, 1, 1 .minnctapersm 1";
    let grid = LaunchConfig { grid: [2, 1, 1], block: [384, 1, 1], shared_bytes: 0 };
    let (_, stats) = launch(&kernel_with("", directives, body), grid, &[], 8).unwrap();
    assert_eq!(stats.count("setmaxnreg.inc"), 16);
    assert_eq!(stats.count("setmaxnreg.dec"), 8);
}
