//! `mma.sync` against a plain triple loop. The places in fragments are written here from the
//! figures of the PTX ISA, independently of the emulator.

mod common;

use common::{HEADER, Random, fault, kernel_with, launch, one_block, place_in_a, place_in_d, u32s};
use ptx_emulator::{FaultKind, Module};

/// The k and the column of matrix B that the low half of a register holds. The high half holds the
/// next k.
fn place_in_b(lane: usize, register: usize) -> (usize, usize) {
    (2 * (lane % 4) + 8 * register, lane / 4)
}

/// The bits of a value in f16 or bf16. The value must have them.
fn bits(value: f32, f16: bool) -> u32 {
    if f16 { half::f16::from_f32(value).to_bits() as u32 } else { half::bf16::from_f32(value).to_bits() as u32 }
}

/// Runs one product, whose registers have the names given, and compares all of D.
fn check(f16: bool, [d, a, b, c]: [&str; 4], seed: u64) {
    let mut random = Random(seed);
    // All terms are multiples of 2^-8 below 2^8, so that the sum is exact in f32 in any order.
    let mut value = || (random.unit() * 48.0).trunc() / 16.0;
    let a_values: [[f32; 16]; 16] = std::array::from_fn(|_| std::array::from_fn(|_| value()));
    let b_values: [[f32; 8]; 16] = std::array::from_fn(|_| std::array::from_fn(|_| value()));
    let c_values: [[f32; 8]; 16] = std::array::from_fn(|_| std::array::from_fn(|_| value()));
    let pair = |low, high| bits(low, f16) | bits(high, f16) << 16;
    // The input has ten words for each lane: the registers of A, of B and of C.
    let mut input = Vec::new();
    for lane in 0..32 {
        input.extend((0..4).map(|register| {
            let (row, k) = place_in_a(lane, register);
            pair(a_values[row][k], a_values[row][k + 1])
        }));
        input.extend((0..2).map(|register| {
            let (k, column) = place_in_b(lane, register);
            pair(b_values[k][column], b_values[k + 1][column])
        }));
        input.extend((0..4).map(|register| {
            let (row, column) = place_in_d(lane, register);
            c_values[row][column].to_bits()
        }));
    }
    let load = |names: &str, first: usize| -> String {
        let load = |(i, name): (usize, &str)| format!("ld.global.b32 {}, [%rd3+{}];\n", name.trim(), 4 * (first + i));
        names.split(',').enumerate().map(load).collect()
    };
    let store: String = d
        .split(',')
        .enumerate()
        .map(|(i, name)| format!("st.global.b32 [%rd4+{}], {};\n", 4 * i, name.trim()))
        .collect();
    let types = if f16 { "f32.f16.f16.f32" } else { "f32.bf16.bf16.f32" };
    let body = format!(
        "mad.wide.u32 %rd3, %r1, 40, %rd2; mad.wide.u32 %rd4, %r1, 16, %rd1;
         {}{}{}
         mma.sync.aligned.m16n8k16.row.col.{types} {{{d}}}, {{{a}}}, {{{b}}}, {{{c}}};
         {store}",
        load(a, 0),
        load(b, 4),
        load(c, 6),
    );
    let (out, stats) =
        launch(&kernel_with("", "", &body), one_block(32, 0), &common::bytes32(input), 32 * 16).expect("no fault");
    for (i, found) in u32s(&out).into_iter().enumerate() {
        let (row, column) = place_in_d(i / 4, i % 4);
        let sum: f32 = (0..16).map(|k| a_values[row][k] * b_values[k][column]).sum();
        assert_eq!(f32::from_bits(found), sum + c_values[row][column], "f16 {f16}, row {row}, column {column}");
    }
    assert_eq!(stats.multiply_adds, 16 * 8 * 16);
    assert_eq!(stats.count("mma.sync.aligned.m16n8k16"), 1);
}

#[test]
fn products() {
    for (seed, f16) in [(1, false), (2, true), (3, false), (4, true)] {
        check(f16, ["%f1, %f2, %f3, %f4", "%r2, %r3, %r4, %r5", "%r6, %r7", "%f5, %f6, %f7, %f8"], seed);
    }
}

#[test]
fn d_may_lie_in_registers_of_the_operands() {
    let (a, b) = ("%r2, %r3, %r4, %r5", "%r6, %r7");
    check(false, ["%f1, %f2, %f3, %f4", a, b, "%f1, %f2, %f3, %f4"], 5);
    check(false, ["%f4, %f3, %f2, %f1", a, b, "%f1, %f2, %f3, %f4"], 6);
    check(true, ["%r6, %r7, %r4, %r5", a, b, "%r8, %r9, %r10, %r11"], 7);
}

#[test]
fn lanes_that_are_missing() {
    let product = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1, %f2, %f3, %f4}, \
                   {%r2, %r3, %r4, %r5}, {%r6, %r7}, {%f1, %f2, %f3, %f4};";
    let missing = |body: &str, threads, words: &[&str]| {
        fault("", "", body, one_block(threads, 0), FaultKind::Divergence, words);
    };
    missing(
        &format!("setp.ne.u32 %p1, %r1, 5; @%p1 {product}"),
        32,
        &["lane 5", "0xffffffff must execute it together", "predicated off"],
    );
    missing(&format!("setp.eq.u32 %p1, %r1, 5; @%p1 ret; {product}"), 32, &["lane 5", "have exited"]);
    missing(product, 40, &["warp 1, lane 8"]);
    // Lanes that come apart are waited for.
    let body = format!("setp.eq.u32 %p1, %r1, 5; @%p1 bra ON; mov.u32 %r9, 1; ON: {product}");
    launch(&kernel_with("", "", &body), one_block(32, 0), &[], 128).expect("no fault");
}

#[test]
fn texts_that_are_refused() {
    let refused = |product: &str, words: &str| {
        let ptx = format!(
            "{HEADER}.visible .entry test() {{ .reg .b32 %r<9>; .reg .f32 %f<9>; .reg .b64 %rd<9>; {product}; ret; }}"
        );
        let error = Module::parse("test.ptx", &ptx).expect_err(product).to_string();
        assert!(error.contains(words), "{words:?} is not in: {error}");
    };
    let (d, a, b) = ("{%f1, %f2, %f3, %f4}", "{%r2, %r3, %r4, %r5}", "{%r6, %r7}");
    let name = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32";
    refused(&format!("{name} {d}, {a}, {b}"), "3 operands instead of 4");
    refused(&format!("{name} {d}, {b}, {b}, {d}"), "operand 2 has 2 registers where 4 are needed");
    refused(&format!("{name} {d}, {a}, {{%rd1, %r2}}, {d}"), "a register of 64 bits");
    for other in [
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32",
        "mma.sync.aligned.m16n8k16.row.row.f32.f16.f16.f32",
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.bf16.f32",
        "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16",
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32.f32",
    ] {
        refused(&format!("{other} {d}, {a}, {b}, {d}"), "this shape, layout or type is unknown");
    }
    refused(&format!("mma.aligned.m16n8k16.row.col.f32.f16.f16.f32 {d}, {a}, {b}, {d}"), "`.sync.aligned`");
}
