//! Branches, divergence, scopes, special registers, parameters and statistics; and what the parser
//! refuses.

mod common;

use common::{HEADER, bytes32, kernel_with, launch, module, one_block, store, u32s, warp};
use ptx_emulator::{FaultKind, LaunchConfig, Memory, Module};

#[test]
fn lanes_leave_a_loop_at_different_times() {
    // Each lane counts the Collatz steps of its number plus one. Lanes loop different numbers of
    // times, and take different arms of a branch inside.
    let body = format!(
        "add.u32 %r2, %r1, 1; mov.u32 %r3, 0;
         LOOP: setp.eq.u32 %p1, %r2, 1; @%p1 bra DONE;
         and.b32 %r4, %r2, 1; setp.eq.u32 %p2, %r4, 0; @%p2 bra EVEN;
         mad.lo.u32 %r2, %r2, 3, 1; bra.uni NEXT;
         EVEN: shr.u32 %r2, %r2, 1;
         NEXT: add.u32 %r3, %r3, 1; bra LOOP;
         DONE: vote.sync.ballot.b32 %r5, true_, 0xffffffff; {}",
        store("%r3")
    )
    .replace("true_", "%p1");
    let steps = |mut n: u32| {
        let mut steps = 0;
        while n != 1 {
            n = if n.is_multiple_of(2) { n / 2 } else { 3 * n + 1 };
            steps += 1;
        }
        steps
    };
    // The ballot behind the loop needs all lanes, and would fault if they had not met again.
    assert_eq!(warp(&body, &[]), (1..=32).map(steps).collect::<Vec<u32>>());
}

#[test]
fn lanes_meet_again_behind_blocks_placed_out_of_order() {
    // The `else` arm stands behind the common tail. So it is not enough to run the lowest program
    // counter.
    let body = format!(
        "setp.lt.u32 %p1, %r1, 16; @%p1 bra LOW; bra HIGH;
         LOW: mov.u32 %r2, 100;
         TAIL: bar.warp.sync 0xffffffff; shfl.sync.bfly.b32 %r3, %r2, 16, 31, 0xffffffff; {} ret;
         HIGH: mov.u32 %r2, 200; bra TAIL;",
        store("%r3")
    );
    let expected: Vec<u32> = (0..32).map(|lane| if lane < 16 { 200 } else { 100 }).collect();
    assert_eq!(warp(&body, &[]), expected);
}

#[test]
fn predicated_instructions_and_negated_guards() {
    let body = format!(
        "and.b32 %r2, %r1, 1; setp.eq.u32 %p1, %r2, 1; mov.u32 %r3, 7;
         @%p1 add.u32 %r3, %r3, %r1; @!%p1 mov.u32 %r3, 1000;
         @%p1 setp.gt.and.u32 %p1, %r1, 15, %p1; selp.u32 %r4, 1, 0, %p1; mad.lo.u32 %r3, %r4, 10000, %r3; {}",
        store("%r3")
    );
    let expected = |lane: u32| match (lane % 2, lane > 15) {
        (0, _) => 1000,
        (_, false) => 7 + lane,
        (_, true) => 10007 + lane,
    };
    assert_eq!(warp(&body, &[]), (0..32).map(expected).collect::<Vec<u32>>());
}

#[test]
fn scopes_shadow_registers_and_labels() {
    // Inline assembly has the same names again and again.
    let block = "{ .reg .pred p; .reg .b32 %r2; setp.lt.u32 p, %r1, 4; mov.u32 %r2, 5; @p bra SKIP; add.u32 %r3, %r3, %r2; SKIP: }";
    let body = format!("mov.u32 %r2, 1; mov.u32 %r3, 0; {block} {block} add.u32 %r3, %r3, %r2; {}", store("%r3"));
    let expected: Vec<u32> = (0..32).map(|lane| if lane < 4 { 1 } else { 11 }).collect();
    assert_eq!(warp(&body, &[]), expected);
}

#[test]
fn indexed_branches() {
    let body = format!(
        "and.b32 %r2, %r1, 3; TABLE: .branchtargets A, B, C, A; brx.idx %r2, TABLE;
         A: mov.u32 %r3, 1; bra END; B: mov.u32 %r3, 2; bra END; C: mov.u32 %r3, 3; END: bar.warp.sync -1; {}",
        store("%r3")
    );
    let expected: Vec<u32> = (0..32).map(|lane| [1, 2, 3, 1][lane % 4]).collect();
    assert_eq!(warp(&body, &[]), expected);
}

#[test]
fn special_registers_of_a_three_dimensional_launch() {
    let names = [
        "%tid.x",
        "%tid.y",
        "%tid.z",
        "%ntid.x",
        "%ntid.y",
        "%ntid.z",
        "%ctaid.x",
        "%ctaid.y",
        "%ctaid.z",
        "%nctaid.x",
        "%nctaid.y",
        "%nctaid.z",
        "%laneid",
        "%warpid",
        "%lanemask_eq",
        "%lanemask_lt",
        "%lanemask_le",
        "%lanemask_gt",
        "%lanemask_ge",
        "%dynamic_smem_size",
        "%cluster_nctarank",
    ];
    // The output's address is computed from these registers by hand.
    let mut body = String::from(
        "mov.u32 %r10, %ntid.x; mov.u32 %r11, %ntid.y; mov.u32 %r12, %tid.z; mov.u32 %r13, %tid.y;
         mad.lo.u32 %r14, %r12, %r11, %r13; mad.lo.u32 %r14, %r14, %r10, %r1;
         mov.u32 %r15, %ctaid.z; mov.u32 %r16, %nctaid.y; mov.u32 %r17, %ctaid.y; mad.lo.u32 %r18, %r15, %r16, %r17;
         mov.u32 %r16, %nctaid.x; mov.u32 %r17, %ctaid.x; mad.lo.u32 %r18, %r18, %r16, %r17;
         mad.lo.u32 %r18, %r18, 60, %r14; mad.wide.u32 %rd3, %r18, 84, %rd1;",
    );
    for (i, name) in names.iter().enumerate() {
        body += &format!("mov.u32 %r20, {name}; st.global.u32 [%rd3+{}], %r20;", 4 * i);
    }
    let grid = LaunchConfig { grid: [2, 3, 2], block: [5, 4, 3], shared_bytes: 48 };
    let (out, _) = launch(&kernel_with("", "", &body), grid, &[], 12 * 60 * 84).unwrap();
    for (block, threads) in u32s(&out).chunks(60 * 21).enumerate() {
        for (thread, found) in threads.chunks(21).enumerate() {
            let (b, t, lane) = (block as u32, thread as u32, thread as u32 % 32);
            let expected = [
                t % 5,
                t / 5 % 4,
                t / 20,
                5,
                4,
                3,
                b % 2,
                b / 2 % 3,
                b / 6,
                2,
                3,
                2,
                lane,
                t / 32,
                1 << lane,
                (1u64 << lane) as u32 - 1,
                ((2u64 << lane) - 1) as u32,
                !((2u64 << lane) - 1) as u32,
                !((1u64 << lane) - 1) as u32,
                48,
                1,
            ];
            assert_eq!(found, expected, "block {block} thread {thread}");
        }
    }
}

#[test]
fn clocks_move() {
    let body = format!(
        "mov.u64 %rd3, %clock64; mov.u32 %r2, %clock; mov.u64 %rd4, %globaltimer; sub.u64 %rd5, %rd4, %rd3;
         setp.gt.s64 %p1, %rd5, 0; selp.u32 %r3, 1, 0, %p1; {}",
        store("%r3")
    );
    assert_eq!(warp(&body, &[]), [1; 32]);
}

#[test]
fn parameters_by_value_and_by_address() {
    let ptx = format!(
        "{HEADER}.visible .entry test(.param .u32 small, .param .align 8 .b8 block[40]) {{
            .reg .b32 %r<9>; .reg .b64 %rd<9>; .reg .b16 %h<3>;
            ld.param.u32 %r1, [small];
            ld.param.v2.u32 {{%r2, %r3}}, [block+8];
            ld.param.u16 %h1, [block+18];
            mov.u64 %rd2, block; add.s64 %rd2, %rd2, 24; ld.param.u32 %r5, [%rd2];
            ld.param.u64 %rd1, [block+32];
            cvt.u32.u16 %r4, %h1;
            st.global.v4.u32 [%rd1], {{%r1, %r2, %r3, %r4}}; st.global.u32 [%rd1+16], %r5; ret; }}"
    );
    let module = Module::parse("params", &ptx).unwrap();
    let mut memory = Memory::new();
    let out = memory.alloc(32, 16).unwrap();
    // The parameter `block` starts at offset 8, because of its alignment.
    let mut params = vec![0u8; 48];
    params[0..4].copy_from_slice(&5u32.to_le_bytes());
    params[16..20].copy_from_slice(&6u32.to_le_bytes());
    params[20..24].copy_from_slice(&7u32.to_le_bytes());
    params[26..28].copy_from_slice(&8u16.to_le_bytes());
    params[32..36].copy_from_slice(&9u32.to_le_bytes());
    params[40..48].copy_from_slice(&out.to_le_bytes());
    module.launch(&memory, "test", one_block(1, 0), &params).unwrap();
    assert_eq!(u32s(&memory.read(out, 20).unwrap()), [5, 6, 7, 8, 9]);
}

#[test]
fn statistics_count_warp_instructions() {
    let body = "setp.lt.u32 %p1, %r1, 8; @%p1 bra SKIP; add.u32 %r2, %r1, 1; add.u32 %r2, %r2, 1; SKIP: mul.lo.u32 %r3, %r1, 2;
                setp.lt.and.u32 %p2|%p3, %r1, 3, %p1;";
    let (_, stats) = launch(&kernel_with("", "", body), one_block(64, 0), &[], 8).unwrap();
    // Eight lanes of warp 0 take the branch, and none of warp 1. Each warp executes every
    // instruction once.
    assert_eq!(stats.count("add.u32"), 4);
    assert_eq!(stats.count("mul"), 2);
    assert_eq!(stats.count("setp"), 4);
    assert_eq!(stats.count("set"), 0, "a prefix ends at a dot");
    assert_eq!(stats.loaded_bytes, 64 * 16);
    assert_eq!(stats.total(), stats.instructions.values().sum());
}

#[test]
fn unknown_things_are_named_with_their_line() {
    for (text, words) in [
        ("frobnicate.b32 %r1, %r2;", ["test:5", "unknown instruction `frobnicate`"]),
        ("add.fancy.u32 %r1, %r2, %r2;", ["test:5", "unknown modifier `.fancy`"]),
        ("call.uni (r), f, (a);", ["test:5", "`call"]),
        ("add.u32 %r1, %r99, 1;", ["test:5", "%r99"]),
        ("add.u64 %r1, %r1, 1;", ["test:5", "32 bits"]),
        ("bra NOWHERE;", ["test:5", "no label `NOWHERE`"]),
        ("@%r1 bra X; X:", ["test:5", "not a declared predicate"]),
        ("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%r1}, {%r1}, {%r1}, {%r1};", ["test:5", "shape"]),
        (
            "wgmma.mma_async.sync.aligned.m64n12k16.f32.bf16.bf16 {%r1}, %rd1, %rd1, 1, 1, 1, 0, 0;",
            ["test:5", "multiple of 8"],
        ),
        ("cp.async.mbarrier.arrive.noinc.shared.b64 [%r1];", ["test:5", "only waits for groups"]),
        ("setmaxnreg.inc.sync.aligned.u32 100;", ["test:5", "multiple of 8"]),
        ("ld.global.v2.u32 %r1, [%rd1];", ["test:5", "1 registers for 2 elements"]),
        (".weird 3;", ["test:5", "unknown directive `.weird`"]),
        ("add.u32 %r1, %r1", ["test:", "expected"]),
        ("X: X: ret;", ["test:5", "declared twice"]),
    ] {
        let ptx = format!("{HEADER}.visible .entry e() {{ .reg .b32 %r<9>; .reg .b64 %rd<9>;\n{text}\n}}");
        let error = Module::parse("test", &ptx).expect_err(text).to_string();
        for word in words {
            assert!(error.contains(word), "{text}: {word:?} is not in: {error}");
        }
    }
    for (body, words) in [
        (".shared .b8 a[200000]; .shared .b8 b[200000]; ret;", "test:5: `b` ends at 400000 bytes of shared memory"),
        (".shared .b32 a = 1; ret;", "test:5: `a` has an initial value: only .global and .const may have one"),
        (".local .b8 a[1000000]; ret;", "test:5: `a` ends at 1000000 bytes of local memory"),
    ] {
        let error = Module::parse("test", &format!("{HEADER}.visible .entry e() {{\n{body}\n}}")).expect_err(body);
        assert!(error.to_string().starts_with(words), "{error}");
    }
    let error = Module::parse("test", "/* two\nlines */ .wrong").unwrap_err();
    assert_eq!(error.to_string(), "test:2: unknown directive `.wrong`");
    assert!(Module::parse("test", ".version 8.3\n.target sm_90a\n\u{1}").unwrap_err().what.contains("unexpected"));
}

#[test]
fn launches_that_do_not_fit_are_refused() {
    let ptx = format!(
        "{HEADER}.visible .entry e(.param .u32 a) .maxntid 64, 1, 1 {{ .shared .align 4 .b8 s[1024]; ret; }}
        .visible .entry fixed() .reqntid 32, 2 {{ ret; }}"
    );
    let module = Module::parse("m", &ptx).unwrap();
    let memory = Memory::new();
    let launch = |entry: &str, grid, block, shared_bytes, params: &[u8]| {
        let fault = module.launch(&memory, entry, LaunchConfig { grid, block, shared_bytes }, params).unwrap_err();
        assert_eq!(fault.kind, FaultKind::Launch);
        fault.to_string()
    };
    assert!(launch("f", [1; 3], [1; 3], 0, &[]).contains("no entry of this name; it has e, fixed"));
    assert!(launch("e", [1; 3], [32, 1, 1], 0, &[0; 3]).contains("3 bytes of parameters; the entry takes 4"));
    assert!(launch("e", [1; 3], [65, 1, 1], 0, &[0; 4]).contains("65 threads a block; the entry allows 64"));
    assert!(launch("e", [1, 0, 1], [1, 1, 1], 0, &[0; 4]).contains("grid 1 x 0 x 1"));
    assert!(launch("e", [1; 3], [64, 64, 1], 0, &[0; 4]).contains("block 64 x 64 x 1"));
    assert!(launch("e", [1; 3], [32, 1, 1], 232_000, &[0; 4]).contains("a block has 232448"));
    assert!(launch("fixed", [1; 3], [64, 1, 1], 0, &[]).contains("requires [32, 2, 1]"));
    module.launch(&memory, "fixed", LaunchConfig { grid: [3, 1, 1], block: [32, 2, 1], shared_bytes: 0 }, &[]).unwrap();
}

#[test]
fn a_warp_with_missing_lanes_runs() {
    let (out, _) = launch(&kernel_with("", "", &store("%r1")), one_block(40, 0), &[], 256).unwrap();
    let mut expected: Vec<u32> = (0..40).collect();
    expected.resize(64, 0);
    assert_eq!(u32s(&out), expected);
}

#[test]
fn functions_and_debug_sections_are_passed_over() {
    let ptx = format!(
        "{HEADER}.func (.param .b32 r) helper(.param .b32 a);
        .func unused() {{ call whatever; {{ ret; }} }}
        .visible .entry e() .pragma \"something\"; .noreturn {{ .reg .b32 %r<2>; .loc 1 2 3\n .pragma \"nounroll\"; exit; }}
        .section .debug_str {{ .b8 1, 2 }}"
    );
    let module = Module::parse("m", &ptx).unwrap();
    assert_eq!(module.entries().collect::<Vec<_>>(), ["e"]);
    module.launch(&Memory::new(), "e", one_block(1, 0), &[]).unwrap();
}

#[test]
fn a_spinning_group_of_lanes_does_not_starve_the_others() {
    // Lane 0 spins at the lower address until other lanes of its warp have written.
    let body = format!(
        "setp.ne.u32 %p1, %r1, 0; @%p1 bra WRITER;
         SPIN: ld.volatile.global.u32 %r2, [%rd1+256]; setp.eq.u32 %p2, %r2, 0; @%p2 bra SPIN; bra END;
         WRITER: mov.u32 %r2, 9; st.volatile.global.u32 [%rd1+256], %r2;
         END: bar.warp.sync -1; {}",
        store("%r2")
    );
    let (out, _) = launch(&kernel_with("", "", &body), one_block(32, 0), &bytes32([0]), 512).unwrap();
    assert_eq!(u32s(&out)[..32], [9; 32]);
}

#[test]
fn module_parse_accepts_every_number_form() {
    let body = |value: &str| format!("mov.b32 %r2, {value}; {}", store("%r2"));
    for (text, value) in [
        ("17", 17),
        ("0x1F", 31),
        ("0b101", 5),
        ("017", 15),
        ("42U", 42),
        ("-1", u32::MAX),
        ("0f3F800000", 0x3f80_0000),
        ("0x80000000", 1 << 31),
    ] {
        assert_eq!(warp(&body(text), &[])[3], value, "{text}");
    }
    let _ = module(&kernel_with("", "", "mov.f32 %f1, 1.5; mov.f64 %fd1, -2.5e3; mov.f64 %fd2, 0d3FF0000000000000;"));
}
