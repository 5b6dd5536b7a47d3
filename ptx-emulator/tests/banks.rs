//! How many bank conflicts are counted for patterns whose number is known.

mod common;

use common::{kernel_with, launch, one_block};
use ptx_emulator::{SharedAccesses, Stats};

/// Runs a body on one warp, which has filled 16 KiB of shared memory from `%r2` on.
fn run(body: &str) -> Stats {
    let fill = "mov.u32 %r2, smem; mad.lo.u32 %r3, %r1, 512, %r2; mov.u32 %r4, 0;
        FILL: add.u32 %r5, %r3, %r4; st.shared.v2.u64 [%r5], {%rd1, %rd1};
        add.u32 %r4, %r4, 16; setp.lt.u32 %p1, %r4, 512; @%p1 bra FILL; bar.sync 0;\n";
    let ptx = kernel_with(".extern .shared .align 1024 .b8 smem[];", "", &format!("{fill}{body}"));
    launch(&ptx, one_block(32, 16384), &[0; 16384], 128).unwrap_or_else(|fault| panic!("{fault}")).1
}

/// What was counted for the one instruction of an opcode, or of what it begins with.
fn of<'a>(stats: &'a Stats, opcode: &str) -> &'a SharedAccesses {
    let mut found =
        stats.shared_accesses.iter().filter(|((_, text), _)| text.trim_start_matches("@%p2 ").starts_with(opcode));
    let (_, accesses) = found.next().unwrap_or_else(|| panic!("no {opcode} in {:?}", stats.shared_accesses));
    assert!(found.next().is_none(), "several {opcode}");
    accesses
}

/// Checks accesses, wavefronts and conflicts of an instruction whose address is `%r3`, which
/// `address` computes from the thread.
fn check(address: &str, instruction: &str, [accesses, wavefronts, conflicts]: [u64; 3]) {
    let stats = run(&format!("{address}; add.u32 %r3, %r3, %r2; {instruction};"));
    let opcode = instruction.split(' ').find(|word| !word.starts_with('@')).expect("an opcode");
    let found = of(&stats, opcode);
    let found = [found.accesses, found.wavefronts, found.conflicts];
    assert_eq!(found, [accesses, wavefronts, conflicts], "{instruction} at {address}");
}

#[test]
fn words() {
    for (stride, wavefronts) in [(4, 1), (8, 2), (12, 1), (16, 4), (128, 32), (132, 1), (260, 1), (0, 1)] {
        let address = format!("mul.lo.u32 %r3, %r1, {stride}");
        check(&address, "ld.shared.u32 %r4, [%r3]", [1, wavefronts, wavefronts - 1]);
        if stride != 0 {
            check(&address, "st.shared.u32 [%r3], %r1", [1, wavefronts, wavefronts - 1]);
        }
    }
    // Lanes that need parts of the same words do not conflict.
    for (instruction, bytes) in [("ld.shared.u8 %r4, [%r3]", 1), ("ld.shared.u16 %h1, [%r3]", 2)] {
        check(&format!("mul.lo.u32 %r3, %r1, {bytes}"), instruction, [1, 1, 0]);
        check("mul.lo.u32 %r3, %r1, 256", instruction, [1, 32, 31]);
    }
    // Two words of the same bank, one of them for 31 lanes.
    check("shr.u32 %r3, %r1, 4; and.b32 %r3, %r3, 1; mul.lo.u32 %r3, %r3, 128", "ld.shared.u32 %r4, [%r3]", [1, 2, 1]);
}

#[test]
fn vectors_have_phases() {
    let pair = "ld.shared.v2.u32 {%r4, %r5}, [%r3]";
    let four = "ld.shared.v4.u32 {%r4, %r5, %r6, %r7}, [%r3]";
    for (stride, wavefronts) in [(8, 2), (16, 4), (24, 2), (128, 32), (136, 2), (0, 2)] {
        let address = format!("mul.lo.u32 %r3, %r1, {stride}");
        check(&address, pair, [1, wavefronts, wavefronts - 2]);
        check(&address, "ld.shared.u64 %rd3, [%r3]", [1, wavefronts, wavefronts - 2]);
    }
    for (stride, wavefronts) in [(16, 4), (32, 8), (48, 4), (64, 16), (128, 32), (144, 4), (0, 4)] {
        let address = format!("mul.lo.u32 %r3, %r1, {stride}");
        check(&address, four, [1, wavefronts, wavefronts - 4]);
        if stride != 0 {
            check(&address, "st.shared.v4.u32 [%r3], {%r4, %r4, %r4, %r4}", [1, wavefronts, wavefronts - 4]);
        }
    }
    // Lanes 0 to 15 and 16 to 31 need the same banks, but in other phases.
    check(
        "and.b32 %r3, %r1, 15; mul.lo.u32 %r3, %r3, 8; and.b32 %r4, %r1, 16; mad.lo.u32 %r3, %r4, 64, %r3",
        pair,
        [1, 2, 0],
    );
}

#[test]
fn only_lanes_that_take_part_count() {
    let quarter = "setp.lt.u32 %p2, %r1, 8; mul.lo.u32 %r3, %r1, 128";
    check(quarter, "@%p2 ld.shared.u32 %r4, [%r3]", [1, 8, 7]);
    check(quarter, "@%p2 ld.shared.v4.u32 {%r4, %r5, %r6, %r7}, [%r3]", [1, 8, 7]);
    check(
        "setp.lt.u32 %p2, %r1, 8; mul.lo.u32 %r3, %r1, 16",
        "@%p2 ld.shared.v4.u32 {%r4, %r5, %r6, %r7}, [%r3]",
        [1, 1, 0],
    );
    // A generic address is one of shared memory too, and one of global memory is not counted.
    let stats =
        run("cvt.u64.u32 %rd3, %r2; cvta.shared.u64 %rd3, %rd3; mad.wide.u32 %rd3, %r1, 8, %rd3; ld.b32 %r4, [%rd3];
                     ld.global.b32 %r5, [%rd2];");
    assert_eq!(of(&stats, "ld.b32").conflicts, 1);
    assert!(!stats.shared_accesses.keys().any(|(_, text)| text.starts_with("ld.global")));
}

/// The address of a chunk of 16 bytes, in rows of 128 bytes. The chunk is `%r5`, and the row `%r4`.
fn chunk(swizzle: bool) -> &'static str {
    if swizzle {
        "and.b32 %r6, %r4, 7; xor.b32 %r5, %r5, %r6; shl.b32 %r5, %r5, 4; mad.lo.u32 %r3, %r4, 128, %r5"
    } else {
        "shl.b32 %r5, %r5, 4; mad.lo.u32 %r3, %r4, 128, %r5"
    }
}

#[test]
fn matrices_of_rows_of_128_bytes() {
    for (count, registers) in [(1, "%r10"), (2, "%r10, %r11"), (4, "%r10, %r11, %r12, %r13")] {
        let load = format!("ldmatrix.sync.aligned.m8n8.x{count}.shared.b16 {{{registers}}}, [%r3]");
        let store = format!("stmatrix.sync.aligned.m8n8.x{count}.trans.shared.b16 [%r3], {{{registers}}}");
        for instruction in [load, store] {
            // The same chunk of each of 32 rows, and the two chunks of 16 rows.
            for rows in ["mov.u32 %r4, %r1; mov.u32 %r5, 3", "and.b32 %r4, %r1, 15; shr.u32 %r5, %r1, 4"] {
                check(&format!("{rows}; {}", chunk(true)), &instruction, [1, count, 0]);
                check(&format!("{rows}; {}", chunk(false)), &instruction, [1, 8 * count, 7 * count]);
            }
            // Rows of 144 bytes have no conflicts without a swizzle, and rows of 32 have some.
            check("mul.lo.u32 %r3, %r1, 144", &instruction, [1, count, 0]);
            check("mul.lo.u32 %r3, %r1, 32", &instruction, [1, 2 * count, count]);
        }
    }
}

#[test]
fn writes_of_copies() {
    // Eight lanes copy a row of 128 bytes. A row lies in all banks, in any order of its chunks.
    let rows = "shr.u32 %r4, %r1, 3; and.b32 %r5, %r1, 7";
    // Or eight lanes copy one chunk of eight rows.
    let columns = "and.b32 %r4, %r1, 7; shr.u32 %r5, %r1, 3";
    let copy = "cp.async.cg.shared.global [%r3], [%rd2], 16; cp.async.wait_all";
    for (place, swizzle, wavefronts) in [(rows, false, 4), (rows, true, 4), (columns, false, 32), (columns, true, 4)] {
        check(&format!("{place}; {}", chunk(swizzle)), copy, [1, wavefronts, wavefronts - 4]);
    }
    let words = "cp.async.ca.shared.global [%r3], [%rd2], 4; cp.async.wait_all";
    check("mul.lo.u32 %r3, %r1, 4", words, [1, 1, 0]);
    check("mul.lo.u32 %r3, %r1, 8", words, [1, 2, 1]);
    let pairs = "cp.async.ca.shared.global [%r3], [%rd2], 8; cp.async.wait_all";
    check("mul.lo.u32 %r3, %r1, 8", pairs, [1, 2, 0]);
}

#[test]
fn the_report_names_instructions_with_conflicts() {
    let stats = run("mov.u32 %r8, 0; mad.lo.u32 %r3, %r1, 4, %r2; mad.lo.u32 %r6, %r1, 64, %r2;
        LOOP: ld.shared.u32 %r4, [%r3];\n ld.shared.u32 %r5, [%r6];
        add.u32 %r8, %r8, 1; setp.lt.u32 %p2, %r8, 10; @%p2 bra LOOP;");
    let lines: Vec<u32> =
        stats.shared_accesses.keys().filter(|(_, text)| text.starts_with("ld")).map(|key| key.0).collect();
    let (total, report) = stats.bank_conflicts();
    // The stores of the filling have 512 bytes between lanes: 8 lanes of a phase in the same banks.
    let fill = 32 * (32 - 4);
    assert_eq!(total, fill + 10 * 15, "{report}");
    let expected = format!("line {}: `ld.shared.u32 %r5, [%r6]`: 150 conflicts in 10 accesses\n", lines[1]);
    assert!(report.ends_with(&expected) && report.lines().count() == 2, "{report}");
    let mut twice = stats.clone();
    twice.add(&stats);
    assert_eq!(twice.bank_conflicts().0, 2 * total);
    assert_eq!(of(&twice, "st.shared").accesses, 64);
}
