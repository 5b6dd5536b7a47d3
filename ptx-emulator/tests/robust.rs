//! Damaged programs. Whatever stands in a text, parsing gives a module or an error, and a launch
//! ends or faults. There is no panic, no endless run, and no unbounded memory.

mod common;

use common::{HEADER, Random, one_block};
use ptx_emulator::{Memory, Module, Options};

/// A program with copies, barriers, products, shuffles, atomics, branches, scopes and data.
const PROGRAM: &str = "
.global .align 4 .b8 table[8] = {1, 2, 3, 4, 0x10, 6, 7, 8};
.extern .shared .align 1024 .b8 smem[];
.visible .entry test(.param .u64 out, .param .align 8 .b8 in[8])
.maxntid 128, 1, 1 .minnctapersm 2
{
    .reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<40>; .reg .f32 %f<20>; .reg .b64 %rd<20>; .local .align 8 .b8 depot[16];
    ld.param.u64 %rd1, [out]; ld.param.u64 %rd2, [in+0]; mov.u32 %r1, %tid.x; mov.u32 %r2, smem;
    setp.ne.u32 %p1, %r1, 0; @%p1 bra READY;
    mbarrier.init.shared::cta.b64 [%r2], 1; fence.mbarrier_init.release.cluster;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 2048; add.u32 %r3, %r2, 1024;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r3], [%rd2], 2048, [%r2];
READY: bar.sync 0;
WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2], 0; @!%p2 bra WAIT;
    mov.b64 %rd10, 0x0000000800400080; mov.b32 %r11, 0x3f803f80; mov.b32 %r12, %r11; mov.b32 %r13, %r11; mov.b32 %r14, %r11;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f1, %f2, %f3, %f4}, %rd10, %rd10, 0, 1, 1, 0, 0;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f1, %f2, %f3, %f4}, {%r11, %r12, %r13, %r14}, %rd10, 1, 1, -1, 0;
    wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
    { .reg .pred q; setp.lt.f32 q, %f1, 0f40000000; selp.f32 %f5, %f2, %f3, q; @q bra SKIP; add.rn.f32 %f5, %f5, %f4; SKIP: }
    cvt.rn.bf16x2.f32 %r20, %f5, %f1; shfl.sync.bfly.b32 %r21|%p3, %r20, 4, 31, -1; prmt.b32 %r22, %r20, %r21, 0x5410;
    lop3.b32 %r22, %r22, %r21, %r20, 0x96; shf.l.wrap.b32 %r23, %r22, %r21, 7; bfe.u32 %r24, %r23, 3, 9; div.u32 %r25, %r24, 3;
    mul.wide.u32 %rd3, %r25, 4; ld.global.v2.u32 {%r26, %r27}, [table]; atom.global.add.u32 %r28, [%rd1], %r26;
    st.local.v2.b32 [depot+8], {%r27, %r28}; ld.local.b64 %rd4, [depot+8]; mov.b64 {%r29, %r30}, %rd4;
    mad.lo.u32 %r31, %r1, 4, %r2; add.u32 %r31, %r31, 3072; st.shared.u32 [%r31], %r30; fence.proxy.async; bar.sync 1, 128;
    vote.sync.ballot.b32 %r32, %p3, -1; redux.sync.max.u32 %r33, %r32, -1; mov.u32 %r35, 0;
LOOP: add.u32 %r35, %r35, 1; setp.lt.u32 %p4, %r35, %r33; setp.lt.and.u32 %p5|%p6, %r35, 10, %p4; @%p5 bra LOOP;
    mul.wide.u32 %rd5, %r1, 4; add.s64 %rd5, %rd5, %rd1; st.global.b32 [%rd5+16], %r35;
    @%p1 bra END;
    add.u32 %r36, %r2, 3072; cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r36], 512;
    cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;
    add.u32 %r36, %r2, 4096; cp.async.cg.shared.global [%r36], [%rd2], 16; cp.async.commit_group; cp.async.wait_group 0;
END: ret;
}
";

/// Parses and runs a text. Tells whether it ran to its end.
fn attempt(text: &str) -> bool {
    let Ok(module) = Module::parse("damaged", text) else { return false };
    let mut memory = Memory::new();
    let (out, source) = (memory.alloc(4096, 16).unwrap(), memory.alloc(4096, 16).unwrap());
    memory.fill(out, 4096, 0).unwrap();
    memory.fill(source, 4096, 0x3f).unwrap();
    let params = [out.to_le_bytes(), source.to_le_bytes()].concat();
    let options = Options { seed: 0, idle_instructions: 20_000, instructions: 200_000 };
    module.launch_with(&memory, "test", one_block(128, 8192), &params, options).is_ok()
}

#[test]
fn the_program_itself_runs() {
    assert!(attempt(&format!("{HEADER}{PROGRAM}")));
    // If there is a ptxas, it must accept the program too.
    common::module(&format!("{HEADER}{PROGRAM}"));
}

#[test]
fn damaged_programs_end() {
    let original = format!("{HEADER}{PROGRAM}");
    let bytes = original.as_bytes();
    let words: Vec<&str> = original.split_inclusive([' ', '\n', ',', ';', '.', '[', ']', '{', '}']).collect();
    let mut random = Random(1);
    let mut survived = 0;
    for _ in 0..6000 {
        let mut at = |n: usize| (random.bits() % n as u64) as usize;
        let text = match at(6) {
            // These change a byte, cut a stretch out, and cut the end off.
            0 => {
                let mut copy = bytes.to_vec();
                copy[at(bytes.len())] = b" ,;{}[]()!@%0123456789-+.:|abcdefrxp\n\"/*\xc3"[at(40)];
                String::from_utf8_lossy(&copy).into_owned()
            }
            1 => {
                let (start, length) = (at(bytes.len()), at(40));
                let mut copy = bytes.to_vec();
                copy.drain(start..(start + length).min(bytes.len()));
                String::from_utf8_lossy(&copy).into_owned()
            }
            2 => original[..at(original.len())].to_string(),
            // These put a word in the place of another, or between two others.
            3 => {
                let mut copy = words.clone();
                copy[at(words.len())] = words[at(words.len())];
                copy.concat()
            }
            4 => {
                let mut copy = words.clone();
                copy.insert(at(words.len()), words[at(words.len())]);
                copy.concat()
            }
            _ => {
                let huge = [
                    "4294967296",
                    "-1",
                    "9223372036854775807",
                    "0xffffffffffffffff",
                    "0",
                    "255",
                    "0f7FC00000",
                    "1e400",
                ];
                let mut copy: Vec<String> = words.iter().map(|word| word.to_string()).collect();
                let numbers: Vec<usize> =
                    (0..words.len()).filter(|i| words[*i].starts_with(|c: char| c.is_ascii_digit())).collect();
                let chosen = numbers[at(numbers.len())];
                let end = copy[chosen].pop().unwrap();
                copy[chosen] = format!("{}{end}", huge[at(huge.len())]);
                copy.concat()
            }
        };
        survived += attempt(&text) as u32;
    }
    // Some damage is harmless, such as that of an unused operand. Most is not.
    assert!((100..3000).contains(&survived), "{survived} of 6000 ran to their end");
}
