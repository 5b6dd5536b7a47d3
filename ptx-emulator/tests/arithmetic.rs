//! Instructions on registers, against the PTX ISA written out in Rust. Each runs on 32 lanes of
//! edge cases and random operands.

mod common;

use common::{HEADER, Random, module, u64s};
use ptx_emulator::{LaunchConfig, Memory};

/// What an operand is: how many bits it has, and which of its values are interesting.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    I16,
    I32,
    I64,
    F32,
    F64,
    /// Two 16-bit floats in 32 bits, or one in 16.
    F16,
    Bf16,
    F16x2,
    Bf16x2,
    Pred,
    /// A small number, such as a shift or a position.
    Small,
}

use Kind::*;

impl Kind {
    fn bits(self) -> u32 {
        match self {
            Pred => 1,
            I16 | F16 | Bf16 => 16,
            I32 | F32 | F16x2 | Bf16x2 | Small => 32,
            I64 | F64 => 64,
        }
    }

    /// 32 values, of which the first are special.
    fn values(self, random: &mut Random) -> Vec<u64> {
        let special: Vec<u64> = match self {
            I16 | I32 | I64 => {
                let bits = self.bits();
                let top = 1u64 << (bits - 1);
                vec![
                    0,
                    1,
                    2,
                    top,
                    top - 1,
                    top | 1,
                    top.wrapping_mul(2).wrapping_sub(1),
                    0x55,
                    0xff,
                    0x80,
                    0x7fff,
                    0x8000,
                ]
            }
            F32 => [
                0.0f32,
                -0.0,
                1.0,
                -1.5,
                f32::INFINITY,
                f32::NEG_INFINITY,
                f32::NAN,
                f32::MIN_POSITIVE,
                1e-40,
                -1e-40,
                f32::MAX,
                0.5,
                2.5,
                -2.5,
                3e9,
                -3e9,
                1e20,
            ]
            .iter()
            .map(|v| v.to_bits() as u64)
            .collect(),
            F64 => [
                0.0f64,
                -0.0,
                1.0,
                -1.5,
                f64::INFINITY,
                f64::NEG_INFINITY,
                f64::NAN,
                5e-324,
                1e300,
                2.5,
                -2.5,
                3e9,
                -3e9,
                1e20,
                65520.0,
                1.0 + 1.0 / 2048.0,
            ]
            .iter()
            .map(|v| v.to_bits())
            .collect(),
            F16 => vec![0, 0x8000, 0x3c00, 0xbc00, 0x7c00, 0xfc00, 0x7e00, 1, 0x8001, 0x7bff, 0x0400, 0x03ff],
            Bf16 => vec![0, 0x8000, 0x3f80, 0xbf80, 0x7f80, 0xff80, 0x7fc0, 1, 0x8001, 0x7f7f, 0x0080, 0x007f],
            F16x2 => vec![0x3c00_0000, 0x8000_7c00, 0x7e00_bc00, 0x7bff_0001],
            Bf16x2 => vec![0x3f80_0000, 0x8000_7f80, 0x7fc0_bf80, 0x7f7f_0001],
            Pred => vec![0, 1],
            Small => vec![0, 1, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255],
        };
        let mut out: Vec<u64> = (0..32)
            .map(|i| {
                let bits = random.bits();
                if i < special.len() && !random.bits().is_multiple_of(4) {
                    return special[(bits % special.len() as u64) as usize];
                }
                match self {
                    F32 => ((random.unit() * 10f32.powi((bits % 12) as i32 - 4)).to_bits()) as u64,
                    F64 => (random.unit() as f64 * 10f64.powi((bits % 12) as i32 - 4)).to_bits(),
                    F16 => bits & 0xbbff,
                    Bf16 => ((random.unit() * 10f32.powi((bits % 8) as i32 - 4)).to_bits() >> 16) as u64,
                    F16x2 => bits & 0xbbff_bbff,
                    Bf16x2 => ((random.unit().to_bits() & 0xffff_0000) | random.unit().to_bits() >> 16) as u64,
                    Pred => bits & 1,
                    Small => bits % 40,
                    kind if kind.bits() == 64 => bits,
                    kind => bits & ((1 << kind.bits()) - 1),
                }
            })
            .collect();
        // Some operands must be equal.
        out[31] = out[30];
        out
    }

    fn register(self, name: &str) -> String {
        match self {
            Pred => format!("%p{name}"),
            I16 | F16 | Bf16 => format!("%h{name}"),
            I32 | F16x2 | Bf16x2 | Small => format!("%r{name}"),
            F32 => format!("%f{name}"),
            I64 => format!("%rd{name}"),
            F64 => format!("%fd{name}"),
        }
    }
}

/// An instruction with the kinds of its operands, and its result by the ISA.
struct Case {
    text: &'static str,
    d: Kind,
    operands: &'static [Kind],
    expected: Box<dyn Fn(u64, u64, u64) -> u64>,
    /// The relative error that a float result may have. Zero asks for equal bits, or for any NaN.
    tolerance: f64,
}

fn case(
    text: &'static str,
    d: Kind,
    operands: &'static [Kind],
    expected: impl Fn(u64, u64, u64) -> u64 + 'static,
) -> Case {
    Case { text, d, operands, expected: Box::new(expected), tolerance: 0.0 }
}

fn near(
    text: &'static str,
    operands: &'static [Kind],
    tolerance: f64,
    expected: impl Fn(f64) -> f64 + 'static,
) -> Case {
    let expected = move |a: u64, _: u64, _: u64| (expected(f32::from_bits(a as u32) as f64) as f32).to_bits() as u64;
    Case { text, d: F32, operands, expected: Box::new(expected), tolerance }
}

/// Runs all cases as one kernel, and compares every lane.
fn check(cases: &[Case], seed: u64) {
    let mut random = Random(seed);
    let (mut body, mut inputs) = (String::new(), Vec::new());
    for (i, case) in cases.iter().enumerate() {
        let mut text = case.text.replace("$d", &case.d.register("10"));
        for (at, kind) in case.operands.iter().enumerate() {
            let name = ["$a", "$b", "$c"][at];
            let register = kind.register(&(11 + at).to_string());
            text = text.replace(name, &register);
            let address = format!("[%rd3+{}]", (i * 3 + at) * 256);
            body += &match kind.bits() {
                1 => format!("ld.global.u32 %r20, {address};\nsetp.ne.u32 {register}, %r20, 0;\n"),
                bits => format!("ld.global.b{bits} {register}, {address};\n"),
            };
            inputs.push(kind.values(&mut random));
        }
        for _ in case.operands.len()..3 {
            inputs.push(vec![0; 32]);
        }
        let d = case.d.register("10");
        let out = format!("[%rd4+{}]", i * 256);
        body += &format!("{text};\n");
        body += &match case.d.bits() {
            1 => format!("selp.u32 %r20, 1, 0, {d};\nst.global.u32 {out}, %r20;\n"),
            bits => format!("st.global.b{bits} {out}, {d};\n"),
        };
    }
    let ptx = format!(
        "{HEADER}.visible .entry test(.param .u64 out, .param .u64 in) {{
            .reg .pred %p<32>; .reg .b16 %h<32>; .reg .b32 %r<32>; .reg .f32 %f<32>; .reg .b64 %rd<32>; .reg .f64 %fd<32>;
            ld.param.u64 %rd1, [out]; ld.param.u64 %rd2, [in]; mov.u32 %r1, %laneid;
            mad.wide.u32 %rd3, %r1, 8, %rd2; mad.wide.u32 %rd4, %r1, 8, %rd1;
            {body} ret; }}"
    );
    let module = module(&ptx);
    let mut memory = Memory::new();
    let input: Vec<u8> = inputs.iter().flatten().flat_map(|value| value.to_le_bytes()).collect();
    let (source, out) =
        (memory.alloc(input.len() as u64, 8).unwrap(), memory.alloc(cases.len() as u64 * 256, 8).unwrap());
    memory.write(source, &input).unwrap();
    memory.fill(out, cases.len() as u64 * 256, 0).unwrap();
    let launch = LaunchConfig { grid: [1, 1, 1], block: [32, 1, 1], shared_bytes: 0 };
    module.launch(&memory, "test", launch, &[out.to_le_bytes(), source.to_le_bytes()].concat()).unwrap();
    let found = u64s(&memory.read(out, cases.len() as u64 * 256).unwrap());
    for (i, case) in cases.iter().enumerate() {
        for lane in 0..32 {
            let [a, b, c] = [0, 1, 2].map(|at| inputs[i * 3 + at][lane]);
            let mask = if case.d.bits() == 64 { u64::MAX } else { (1 << case.d.bits()) - 1 };
            let (found, expected) = (found[i * 32 + lane] & mask, (case.expected)(a, b, c) & mask);
            assert!(
                same(case.d, found, expected, case.tolerance),
                "{} of {a:#x}, {b:#x}, {c:#x} gave {found:#x}, the ISA says {expected:#x} (seed {seed}, lane {lane})",
                case.text
            );
        }
    }
}

fn same(kind: Kind, found: u64, expected: u64, tolerance: f64) -> bool {
    let value = |bits: u64| match kind {
        F32 => Some(f32::from_bits(bits as u32) as f64),
        F64 => Some(f64::from_bits(bits)),
        F16 => Some(h(bits) as f64),
        Bf16 => Some(f32::from_bits((bits as u32) << 16) as f64),
        _ => None,
    };
    if let Kind::F16x2 | Kind::Bf16x2 = kind {
        let half = if kind == F16x2 { F16 } else { Bf16 };
        return same(half, found & 0xffff, expected & 0xffff, tolerance)
            && same(half, found >> 16, expected >> 16, tolerance);
    }
    match (value(found), value(expected)) {
        (Some(x), Some(y)) if x.is_nan() || y.is_nan() => x.is_nan() && y.is_nan(),
        (Some(x), Some(y)) if tolerance > 0.0 => x == y || (x - y).abs() <= tolerance * y.abs(),
        _ => found == expected,
    }
}

fn f(bits: u64) -> f32 {
    f32::from_bits(bits as u32)
}
fn bits(value: f32) -> u64 {
    value.to_bits() as u64
}
fn d(bits: u64) -> f64 {
    f64::from_bits(bits)
}
fn s32(bits: u64) -> i32 {
    bits as i32
}
fn s16(bits: u64) -> i16 {
    bits as i16
}
fn b(value: bool) -> u64 {
    value as u64
}

/// The value of f16 bits, by the definition of the format.
fn h(bits: u64) -> f32 {
    let (exponent, mantissa) = ((bits >> 10 & 31) as i32, (bits & 0x3ff) as f32);
    let magnitude = match exponent {
        31 if bits & 0x3ff != 0 => f32::NAN,
        31 => f32::INFINITY,
        0 => mantissa * 2f32.powi(-24),
        _ => (1024.0 + mantissa) * 2f32.powi(exponent - 25),
    };
    if bits & 0x8000 != 0 { -magnitude } else { magnitude }
}

/// The nearest 16-bit float, with ties to even, by a search over all. `value_of` gives their
/// values.
fn nearest(value: f64, value_of: impl Fn(u64) -> f64, infinity: u64) -> u64 {
    if value.is_nan() {
        return 0x7fff;
    }
    let sign = if value.is_sign_negative() { 0x8000 } else { 0 };
    let magnitude = value.abs();
    // Finite magnitudes ascend with their bits. One step beyond the largest stands for infinity.
    let step = value_of(infinity - 1) - value_of(infinity - 2);
    let at = |bits: u64| if bits == infinity { value_of(infinity - 1) + step } else { value_of(bits) };
    let (mut low, mut high) = (0, infinity);
    if magnitude >= at(infinity) {
        return sign | infinity;
    }
    while high - low > 1 {
        let middle = (low + high) / 2;
        if at(middle) <= magnitude { low = middle } else { high = middle }
    }
    let (below, above) = (magnitude - at(low), at(high) - magnitude);
    let even = if low % 2 == 0 { low } else { high };
    sign | if below < above {
        low
    } else if above < below {
        high
    } else {
        even
    }
}

fn to_h(value: f64) -> u64 {
    nearest(value, |bits| h(bits) as f64, 0x7c00)
}

fn to_bf(value: f64) -> u64 {
    nearest(value, |bits| f32::from_bits((bits as u32) << 16) as f64, 0x7f80)
}

fn bf(bits: u64) -> f32 {
    f32::from_bits((bits as u32 & 0xffff) << 16)
}

fn seeds(cases: impl Fn() -> Vec<Case>) {
    for seed in 1..=6 {
        check(&cases(), seed);
    }
}

#[test]
fn integers_of_32_bits() {
    seeds(|| {
        vec![
            case("mov.b32 $d, $a", I32, &[I32], |a, _, _| a),
            case("add.u32 $d, $a, $b", I32, &[I32, I32], |a, b, _| a + b),
            case("add.s32 $d, $a, -7", I32, &[I32], |a, _, _| (s32(a).wrapping_add(-7)) as u64),
            case("add.sat.s32 $d, $a, $b", I32, &[I32, I32], |a, b, _| s32(a).saturating_add(s32(b)) as u64),
            case("sub.u32 $d, $a, $b", I32, &[I32, I32], |a, b, _| a.wrapping_sub(b)),
            case("sub.sat.s32 $d, $a, $b", I32, &[I32, I32], |a, b, _| s32(a).saturating_sub(s32(b)) as u64),
            case("mul.lo.u32 $d, $a, $b", I32, &[I32, I32], |a, b, _| a.wrapping_mul(b)),
            case("mul.hi.u32 $d, $a, $b", I32, &[I32, I32], |a, b, _| a.wrapping_mul(b) >> 32),
            case("mul.hi.s32 $d, $a, $b", I32, &[I32, I32], |a, b, _| ((s32(a) as i64 * s32(b) as i64) >> 32) as u64),
            case("mul.wide.u32 $d, $a, $b", I64, &[I32, I32], |a, b, _| a * b),
            case("mul.wide.s32 $d, $a, $b", I64, &[I32, I32], |a, b, _| (s32(a) as i64 * s32(b) as i64) as u64),
            case("mad.lo.s32 $d, $a, $b, $c", I32, &[I32, I32, I32], |a, b, c| a.wrapping_mul(b).wrapping_add(c)),
            case("mad.hi.u32 $d, $a, $b, $c", I32, &[I32, I32, I32], |a, b, c| (a.wrapping_mul(b) >> 32) + c),
            case("mad.wide.u32 $d, $a, $b, $c", I64, &[I32, I32, I64], |a, b, c| (a * b).wrapping_add(c)),
            case("mad.wide.s32 $d, $a, $b, $c", I64, &[I32, I32, I64], |a, b, c| {
                (s32(a) as i64 * s32(b) as i64).wrapping_add(c as i64) as u64
            }),
            case("mul24.lo.u32 $d, $a, $b", I32, &[I32, I32], |a, b, _| (a & 0xff_ffff) * (b & 0xff_ffff)),
            case("sad.s32 $d, $a, $b, $c", I32, &[I32, I32, I32], |a, b, c| {
                (s32(a) as i64 - s32(b) as i64).unsigned_abs().wrapping_add(c)
            }),
            case("or.b32 $d, $b, 1;\n div.u32 $d, $a, $d", I32, &[I32, I32], |a, b, _| a / (b | 1)),
            case("or.b32 $d, $b, 1;\n rem.u32 $d, $a, $d", I32, &[I32, I32], |a, b, _| a % (b | 1)),
            case("or.b32 $d, $b, 1;\n div.s32 $d, $a, $d", I32, &[I32, I32], |a, b, _| {
                s32(a).wrapping_div(s32(b | 1)) as u64
            }),
            case("or.b32 $d, $b, 1;\n rem.s32 $d, $a, $d", I32, &[I32, I32], |a, b, _| {
                s32(a).wrapping_rem(s32(b | 1)) as u64
            }),
            case("min.s32 $d, $a, $b", I32, &[I32, I32], |a, b, _| s32(a).min(s32(b)) as u64),
            case("min.u32 $d, $a, $b", I32, &[I32, I32], |a, b, _| a.min(b)),
            case("max.s32 $d, $a, $b", I32, &[I32, I32], |a, b, _| s32(a).max(s32(b)) as u64),
            case("max.u32 $d, $a, $b", I32, &[I32, I32], |a, b, _| a.max(b)),
            case("abs.s32 $d, $a", I32, &[I32], |a, _, _| s32(a).wrapping_abs() as u64),
            case("neg.s32 $d, $a", I32, &[I32], |a, _, _| s32(a).wrapping_neg() as u64),
            case("not.b32 $d, $a", I32, &[I32], |a, _, _| !a),
            case("cnot.b32 $d, $a", I32, &[I32], |a, _, _| b(a == 0)),
            case("and.b32 $d, $a, $b", I32, &[I32, I32], |a, b, _| a & b),
            case("or.b32 $d, $a, $b", I32, &[I32, I32], |a, b, _| a | b),
            case("xor.b32 $d, $a, $b", I32, &[I32, I32], |a, b, _| a ^ b),
            case("shl.b32 $d, $a, $b", I32, &[I32, Small], |a, b, _| if b > 31 { 0 } else { a << b }),
            case("shr.u32 $d, $a, $b", I32, &[I32, Small], |a, b, _| if b > 31 { 0 } else { a >> b }),
            case("shr.s32 $d, $a, $b", I32, &[I32, Small], |a, b, _| (s32(a) >> b.min(31)) as u64),
            case("add.cc.u32 $d, $a, $b;\n addc.u32 $d, $c, 0", I32, &[I32, I32, I32], |a, b, c| c + ((a + b) >> 32)),
            case("sub.cc.u32 $d, $a, $b;\n subc.u32 $d, $c, 0", I32, &[I32, I32, I32], |a, b, c| {
                c.wrapping_sub(u64::from(a < b))
            }),
            case("dp4a.s32.s32 $d, $a, $b, $c", I32, &[I32, I32, I32], |a, b, c| {
                let byte = |x: u64, i: u32| (x >> (8 * i)) as i8 as i64;
                (0..4).map(|i| byte(a, i) * byte(b, i)).sum::<i64>().wrapping_add(c as i64) as u64
            }),
        ]
    });
}

#[test]
fn integers_of_64_and_16_bits() {
    seeds(|| {
        vec![
            case("mov.b64 $d, $a", I64, &[I64], |a, _, _| a),
            case("add.s64 $d, $a, $b", I64, &[I64, I64], |a, b, _| a.wrapping_add(b)),
            case("sub.u64 $d, $a, $b", I64, &[I64, I64], |a, b, _| a.wrapping_sub(b)),
            case("mul.lo.s64 $d, $a, $b", I64, &[I64, I64], |a, b, _| a.wrapping_mul(b)),
            case("mul.hi.u64 $d, $a, $b", I64, &[I64, I64], |a, b, _| ((a as u128 * b as u128) >> 64) as u64),
            case("mul.hi.s64 $d, $a, $b", I64, &[I64, I64], |a, b, _| {
                ((a as i64 as i128 * b as i64 as i128) >> 64) as u64
            }),
            case("mad.lo.u64 $d, $a, $b, $c", I64, &[I64, I64, I64], |a, b, c| a.wrapping_mul(b).wrapping_add(c)),
            case("or.b64 $d, $b, 1;\n div.u64 $d, $a, $d", I64, &[I64, I64], |a, b, _| a / (b | 1)),
            case("or.b64 $d, $b, 1;\n rem.s64 $d, $a, $d", I64, &[I64, I64], |a, b, _| {
                (a as i64).wrapping_rem((b | 1) as i64) as u64
            }),
            case("min.s64 $d, $a, $b", I64, &[I64, I64], |a, b, _| (a as i64).min(b as i64) as u64),
            case("max.u64 $d, $a, $b", I64, &[I64, I64], |a, b, _| a.max(b)),
            case("abs.s64 $d, $a", I64, &[I64], |a, _, _| (a as i64).wrapping_abs() as u64),
            case("neg.s64 $d, $a", I64, &[I64], |a, _, _| a.wrapping_neg()),
            case("not.b64 $d, $a", I64, &[I64], |a, _, _| !a),
            case("xor.b64 $d, $a, $b", I64, &[I64, I64], |a, b, _| a ^ b),
            case("shl.b64 $d, $a, $b", I64, &[I64, Small], |a, b, _| if b > 63 { 0 } else { a << b }),
            case("shr.u64 $d, $a, $b", I64, &[I64, Small], |a, b, _| if b > 63 { 0 } else { a >> b }),
            case("shr.s64 $d, $a, $b", I64, &[I64, Small], |a, b, _| (a as i64 >> b.min(63)) as u64),
            case("add.cc.u64 $d, $a, $b;\n addc.u64 $d, $c, 0", I64, &[I64, I64, I64], |a, b, c| {
                c.wrapping_add(u64::from(a.checked_add(b).is_none()))
            }),
            case("add.s16 $d, $a, $b", I16, &[I16, I16], |a, b, _| a + b),
            case("sub.s16 $d, $a, $b", I16, &[I16, I16], |a, b, _| a.wrapping_sub(b)),
            case("mul.lo.s16 $d, $a, $b", I16, &[I16, I16], |a, b, _| a * b),
            case("mul.hi.s16 $d, $a, $b", I16, &[I16, I16], |a, b, _| ((s16(a) as i32 * s16(b) as i32) >> 16) as u64),
            case("mul.hi.u16 $d, $a, $b", I16, &[I16, I16], |a, b, _| (a * b) >> 16),
            case("mul.wide.s16 $d, $a, $b", I32, &[I16, I16], |a, b, _| (s16(a) as i32 * s16(b) as i32) as u64),
            case("mul.wide.u16 $d, $a, $b", I32, &[I16, I16], |a, b, _| a * b),
            case("mad.lo.s16 $d, $a, $b, $c", I16, &[I16, I16, I16], |a, b, c| a * b + c),
            case("mad.wide.s16 $d, $a, $b, $c", I32, &[I16, I16, I32], |a, b, c| {
                (s16(a) as i32 * s16(b) as i32).wrapping_add(s32(c)) as u64
            }),
            case("min.s16 $d, $a, $b", I16, &[I16, I16], |a, b, _| s16(a).min(s16(b)) as u64),
            case("max.s16 $d, $a, $b", I16, &[I16, I16], |a, b, _| s16(a).max(s16(b)) as u64),
            case("shl.b16 $d, $a, $b", I16, &[I16, Small], |a, b, _| if b > 15 { 0 } else { a << b }),
            case("shr.s16 $d, $a, $b", I16, &[I16, Small], |a, b, _| (s16(a) >> b.min(15)) as u64),
            case("shr.u16 $d, $a, $b", I16, &[I16, Small], |a, b, _| if b > 15 { 0 } else { a >> b }),
            case("not.b16 $d, $a", I16, &[I16], |a, _, _| !a),
            case("neg.s16 $d, $a", I16, &[I16], |a, _, _| a.wrapping_neg()),
            case("abs.s16 $d, $a", I16, &[I16], |a, _, _| s16(a).wrapping_abs() as u64),
        ]
    });
}

#[test]
fn bits_and_bytes() {
    // This takes a field of `len` bits at `pos`, bit by bit as the pseudo-code of the ISA does.
    let field = |a: u64, pos: u64, len: u64, width: u64, signed: bool| {
        let (pos, len) = (pos & 0xff, len & 0xff);
        let sign = if !signed || len == 0 { 0 } else { a >> (pos + len - 1).min(width - 1) & 1 };
        (0..width).fold(0u64, |out, i| out | (if i < len && pos + i < width { a >> (pos + i) & 1 } else { sign }) << i)
    };
    let inserted = |a: u64, b: u64, pos: u64, len: u64, width: u64| {
        let (pos, len) = (pos & 0xff, len & 0xff);
        (0..width)
            .fold(0u64, |out, i| out | (if i >= pos && i < pos + len { a >> (i - pos) & 1 } else { b >> i & 1 }) << i)
    };
    let permuted = |a: u64, b: u64, selector: u64| {
        let bytes = (b << 32 | a).to_le_bytes();
        (0..4).fold(0u64, |out, i| {
            let nibble = selector >> (4 * i) & 15;
            let byte = bytes[(nibble & 7) as usize];
            let byte = if nibble & 8 == 0 {
                byte
            } else if byte & 0x80 != 0 {
                0xff
            } else {
                0
            };
            out | (byte as u64) << (8 * i)
        })
    };
    seeds(|| {
        vec![
            case("brev.b32 $d, $a", I32, &[I32], |a, _, _| (a as u32).reverse_bits() as u64),
            case("brev.b64 $d, $a", I64, &[I64], |a, _, _| a.reverse_bits()),
            case("popc.b32 $d, $a", I32, &[I32], |a, _, _| a.count_ones() as u64),
            case("popc.b64 $d, $a", I32, &[I64], |a, _, _| a.count_ones() as u64),
            case("clz.b32 $d, $a", I32, &[I32], |a, _, _| (a as u32).leading_zeros() as u64),
            case("clz.b64 $d, $a", I32, &[I64], |a, _, _| a.leading_zeros() as u64),
            case("bfind.u32 $d, $a", I32, &[I32], |a, _, _| {
                (0..32).rev().find(|i| a >> i & 1 == 1).unwrap_or(u64::MAX)
            }),
            case("bfind.s32 $d, $a", I32, &[I32], |a, _, _| {
                (0..32).rev().find(|i| a >> i & 1 != a >> 31 & 1).unwrap_or(u64::MAX)
            }),
            case("bfind.shiftamt.u32 $d, $a", I32, &[I32], |a, _, _| {
                (0..32).rev().find(|i| a >> i & 1 == 1).map_or(u64::MAX, |i| 31 - i)
            }),
            case("bfind.u64 $d, $a", I32, &[I64], |a, _, _| {
                (0..64).rev().find(|i| a >> i & 1 == 1).unwrap_or(u64::MAX)
            }),
            case("bfe.u32 $d, $a, $b, $c", I32, &[I32, Small, Small], move |a, p, l| field(a, p, l, 32, false)),
            case("bfe.s32 $d, $a, $b, $c", I32, &[I32, Small, Small], move |a, p, l| field(a, p, l, 32, true)),
            case("bfe.u64 $d, $a, $b, $c", I64, &[I64, Small, Small], move |a, p, l| field(a, p, l, 64, false)),
            case("bfe.s64 $d, $a, $b, $c", I64, &[I64, Small, Small], move |a, p, l| field(a, p, l, 64, true)),
            case("bfi.b32 $d, $a, 0x5a5a5a5a, $b, $c", I32, &[I32, Small, Small], move |a, p, l| {
                inserted(a, 0x5a5a_5a5a, p, l, 32)
            }),
            case("bfi.b64 $d, $a, 0x5a5a5a5a5a5a, $b, $c", I64, &[I64, Small, Small], move |a, p, l| {
                inserted(a, 0x5a5a_5a5a_5a5a, p, l, 64)
            }),
            case("bmsk.clamp.b32 $d, $a, $b", I32, &[Small, Small], |a, b, _| {
                (0..32).fold(0, |out, i| out | u64::from(i >= a && i < a + b) << i)
            }),
            case("shf.l.wrap.b32 $d, $a, $b, $c", I32, &[I32, I32, Small], |a, b, c| (b << 32 | a) << (c & 31) >> 32),
            case("shf.l.clamp.b32 $d, $a, $b, $c", I32, &[I32, I32, Small], |a, b, c| (b << 32 | a) << c.min(32) >> 32),
            case("shf.r.wrap.b32 $d, $a, $b, $c", I32, &[I32, I32, Small], |a, b, c| (b << 32 | a) >> (c & 31)),
            case("shf.r.clamp.b32 $d, $a, $b, $c", I32, &[I32, I32, Small], |a, b, c| (b << 32 | a) >> c.min(32)),
            case("prmt.b32 $d, $a, $b, $c", I32, &[I32, I32, I32], permuted),
            case("prmt.b32.f4e $d, $a, $b, $c", I32, &[I32, I32, I32], move |a, b, c| {
                permuted(a, b, 0x3210 + 0x1111 * (c & 3))
            }),
            case("prmt.b32.b4e $d, $a, $b, $c", I32, &[I32, I32, I32], move |a, b, c| {
                permuted(a, b, [0x5670, 0x6701, 0x7012, 0x0123][(c & 3) as usize])
            }),
            case("prmt.b32.rc8 $d, $a, $b, $c", I32, &[I32, I32, I32], move |a, b, c| permuted(a, b, 0x1111 * (c & 3))),
            case("prmt.b32.ecl $d, $a, $b, $c", I32, &[I32, I32, I32], move |a, b, c| {
                permuted(a, b, [0x3210, 0x3211, 0x3222, 0x3333][(c & 3) as usize])
            }),
            case("prmt.b32.ecr $d, $a, $b, $c", I32, &[I32, I32, I32], move |a, b, c| {
                permuted(a, b, [0x0000, 0x1110, 0x2210, 0x3210][(c & 3) as usize])
            }),
            case("prmt.b32.rc16 $d, $a, $b, $c", I32, &[I32, I32, I32], move |a, b, c| {
                permuted(a, b, [0x1010, 0x3232, 0x1010, 0x3232][(c & 3) as usize])
            }),
            case("lop3.b32 $d, $a, $b, $c, 0xe8", I32, &[I32, I32, I32], |a, b, c| a & b | a & c | b & c),
            case("lop3.b32 $d, $a, $b, $c, 0x1e", I32, &[I32, I32, I32], |a, b, c| a ^ (b | c)),
            case("lop3.b32 $d, $a, $b, $c, 0x2c", I32, &[I32, I32, I32], |a, b, c| {
                (!a & b & !c) | (!a & b & c) | (a & !b & c)
            }),
        ]
    });
}

#[test]
fn comparisons_and_selections() {
    seeds(|| {
        vec![
            case("setp.eq.s32 $d, $a, $b", Pred, &[I32, I32], |x, y, _| b(x == y)),
            case("setp.ne.b32 $d, $a, $b", Pred, &[I32, I32], |x, y, _| b(x != y)),
            case("setp.lt.s32 $d, $a, $b", Pred, &[I32, I32], |x, y, _| b(s32(x) < s32(y))),
            case("setp.le.u32 $d, $a, $b", Pred, &[I32, I32], |x, y, _| b(x <= y)),
            case("setp.hi.u32 $d, $a, $b", Pred, &[I32, I32], |x, y, _| b(x > y)),
            case("setp.ls.u32 $d, $a, $b", Pred, &[I32, I32], |x, y, _| b(x <= y)),
            case("setp.ge.s64 $d, $a, $b", Pred, &[I64, I64], |x, y, _| b(x as i64 >= y as i64)),
            case("setp.gt.u64 $d, $a, $b", Pred, &[I64, I64], |x, y, _| b(x > y)),
            case("setp.lt.s16 $d, $a, $b", Pred, &[I16, I16], |x, y, _| b(s16(x) < s16(y))),
            case("setp.ge.u16 $d, $a, $b", Pred, &[I16, I16], |x, y, _| b(x >= y)),
            case("setp.eq.f32 $d, $a, $b", Pred, &[F32, F32], |x, y, _| b(f(x) == f(y))),
            case("setp.ne.f32 $d, $a, $b", Pred, &[F32, F32], |x, y, _| {
                b(f(x) != f(y) && !f(x).is_nan() && !f(y).is_nan())
            }),
            case("setp.neu.f32 $d, $a, $b", Pred, &[F32, F32], |x, y, _| b(f(x) != f(y))),
            case("setp.lt.f32 $d, $a, $b", Pred, &[F32, F32], |x, y, _| b(f(x) < f(y))),
            case("setp.geu.f32 $d, $a, $b", Pred, &[F32, F32], |x, y, _| {
                b(f(x) >= f(y) || f(x).is_nan() || f(y).is_nan())
            }),
            case("setp.equ.f32 $d, $a, $b", Pred, &[F32, F32], |x, y, _| {
                b(f(x) == f(y) || f(x).is_nan() || f(y).is_nan())
            }),
            case("setp.num.f32 $d, $a, $b", Pred, &[F32, F32], |x, y, _| b(!f(x).is_nan() && !f(y).is_nan())),
            case("setp.nan.f32 $d, $a, $b", Pred, &[F32, F32], |x, y, _| b(f(x).is_nan() || f(y).is_nan())),
            case("setp.ltu.f64 $d, $a, $b", Pred, &[F64, F64], |x, y, _| {
                b(d(x) < d(y) || d(x).is_nan() || d(y).is_nan())
            }),
            case("setp.gt.f64 $d, $a, $b", Pred, &[F64, F64], |x, y, _| b(d(x) > d(y))),
            case("setp.lt.f16 $d, $a, $b", Pred, &[F16, F16], |x, y, _| b(h(x) < h(y))),
            case("setp.gtu.bf16 $d, $a, $b", Pred, &[Bf16, Bf16], |x, y, _| {
                b(bf(x) > bf(y) || bf(x).is_nan() || bf(y).is_nan())
            }),
            case("setp.lt.and.s32 $d, $a, $b, $c", Pred, &[I32, I32, Pred], |x, y, p| b(s32(x) < s32(y)) & p),
            case("setp.lt.or.s32 $d, $a, $b, !$c", Pred, &[I32, I32, Pred], |x, y, p| b(s32(x) < s32(y)) | !p & 1),
            case("setp.lt.xor.u32 $d, $a, $b, $c", Pred, &[I32, I32, Pred], |x, y, p| b(x < y) ^ p),
            // The second result combines the negated comparison in the same way.
            case("setp.lt.and.s32 %p20|$d, $a, $b, $c", Pred, &[I32, I32, Pred], |x, y, p| b(s32(x) >= s32(y)) & p),
            case("setp.lt.u32 $d|%p20, $a, $b", Pred, &[I32, I32], |x, y, _| b(x < y)),
            case(
                "set.lt.u32.s32 $d, $a, $b",
                I32,
                &[I32, I32],
                |x, y, _| if s32(x) < s32(y) { 0xffff_ffff } else { 0 },
            ),
            case("set.gt.f32.f32 $d, $a, $b", F32, &[F32, F32], |x, y, _| bits(if f(x) > f(y) { 1.0 } else { 0.0 })),
            case("testp.finite.f32 $d, $a", Pred, &[F32], |x, _, _| b(f(x).is_finite())),
            case("testp.infinite.f32 $d, $a", Pred, &[F32], |x, _, _| b(f(x).is_infinite())),
            case("testp.notanumber.f32 $d, $a", Pred, &[F32], |x, _, _| b(f(x).is_nan())),
            case("selp.b32 $d, $a, $b, $c", I32, &[I32, I32, Pred], |x, y, p| if p == 1 { x } else { y }),
            case("selp.b64 $d, $a, $b, $c", I64, &[I64, I64, Pred], |x, y, p| if p == 1 { x } else { y }),
            case("selp.f32 $d, $a, 0f3F800000, $b", F32, &[F32, Pred], |x, p, _| if p == 1 { x } else { bits(1.0) }),
            case("selp.b16 $d, $a, 9, $b", I16, &[I16, Pred], |x, p, _| if p == 1 { x } else { 9 }),
            case("slct.u32.s32 $d, $a, $b, $c", I32, &[I32, I32, I32], |x, y, c| if s32(c) >= 0 { x } else { y }),
            case("slct.b32.f32 $d, $a, $b, $c", I32, &[I32, I32, F32], |x, y, c| if f(c) >= 0.0 { x } else { y }),
            case("and.pred $d, $a, $b", Pred, &[Pred, Pred], |x, y, _| x & y),
            case("or.pred $d, $a, $b", Pred, &[Pred, Pred], |x, y, _| x | y),
            case("xor.pred $d, $a, $b", Pred, &[Pred, Pred], |x, y, _| x ^ y),
            case("not.pred $d, $a", Pred, &[Pred], |x, _, _| !x),
            case("mov.pred $d, $a", Pred, &[Pred], |x, _, _| x),
        ]
    });
}

#[test]
fn floats_of_32_and_64_bits() {
    // This flushes subnormals, as `.ftz` does to operands and results.
    let z = |x: f32| if x.is_subnormal() { 0f32.copysign(x) } else { x };
    let sat = |x: f32| if x.is_nan() { 0.0 } else { x.clamp(0.0, 1.0) + 0.0 };
    let least = |x: f32, y: f32| match (x.is_nan(), y.is_nan()) {
        (true, _) => y,
        (_, true) => x,
        _ if x == y => {
            if x.is_sign_negative() {
                x
            } else {
                y
            }
        }
        _ => x.min(y),
    };
    let most = move |x: f32, y: f32| -least(-x, -y);
    seeds(|| {
        vec![
            case("add.f32 $d, $a, $b", F32, &[F32, F32], |x, y, _| bits(f(x) + f(y))),
            case("add.rn.ftz.f32 $d, $a, $b", F32, &[F32, F32], move |x, y, _| bits(z(z(f(x)) + z(f(y))))),
            case("add.sat.f32 $d, $a, $b", F32, &[F32, F32], move |x, y, _| bits(sat(f(x) + f(y)))),
            case("sub.rn.f32 $d, $a, $b", F32, &[F32, F32], |x, y, _| bits(f(x) - f(y))),
            case("mul.f32 $d, $a, $b", F32, &[F32, F32], |x, y, _| bits(f(x) * f(y))),
            case("mul.ftz.f32 $d, $a, 0f00400000", F32, &[F32], move |x, _, _| bits(z(z(f(x)) * 0.0))),
            case("fma.rn.f32 $d, $a, $b, $c", F32, &[F32, F32, F32], |x, y, w| bits(f(x).mul_add(f(y), f(w)))),
            case("fma.rn.ftz.f32 $d, $a, $b, $c", F32, &[F32, F32, F32], move |x, y, w| {
                bits(z(z(f(x)).mul_add(z(f(y)), z(f(w)))))
            }),
            case("fma.rn.sat.f32 $d, $a, $b, $c", F32, &[F32, F32, F32], move |x, y, w| {
                bits(sat(f(x).mul_add(f(y), f(w))))
            }),
            case("mad.rn.f32 $d, $a, $b, $c", F32, &[F32, F32, F32], |x, y, w| bits(f(x).mul_add(f(y), f(w)))),
            case("div.rn.f32 $d, $a, $b", F32, &[F32, F32], |x, y, _| bits(f(x) / f(y))),
            case("min.f32 $d, $a, $b", F32, &[F32, F32], move |x, y, _| bits(least(f(x), f(y)))),
            case("max.f32 $d, $a, $b", F32, &[F32, F32], move |x, y, _| bits(most(f(x), f(y)))),
            case("min.NaN.f32 $d, $a, $b", F32, &[F32, F32], move |x, y, _| {
                bits(if f(x).is_nan() || f(y).is_nan() { f32::NAN } else { least(f(x), f(y)) })
            }),
            case("max.ftz.f32 $d, $a, $b", F32, &[F32, F32], move |x, y, _| bits(most(z(f(x)), z(f(y))))),
            case("abs.f32 $d, $a", F32, &[F32], |x, _, _| x & 0x7fff_ffff),
            case("neg.f32 $d, $a", F32, &[F32], |x, _, _| x ^ 0x8000_0000),
            case("neg.ftz.f32 $d, $a", F32, &[F32], move |x, _, _| bits(-z(f(x)))),
            case("copysign.f32 $d, $a, $b", F32, &[F32, F32], |x, y, _| x & 0x8000_0000 | y & 0x7fff_ffff),
            case("sqrt.rn.f32 $d, $a", F32, &[F32], |x, _, _| bits(f(x).sqrt())),
            case("rcp.rn.f32 $d, $a", F32, &[F32], |x, _, _| bits(1.0 / f(x))),
            // The PTX ISA allows these relative errors: 2^-23 (rcp), 2^-22.9 (rsqrt) and 2^-22.5
            // (ex2). For lg2 near 1 it allows an absolute error of 2^-22.6.
            near("rcp.approx.f32 $d, $a", &[F32], 2e-7, |x| 1.0 / x),
            near("rsqrt.approx.f32 $d, $a", &[F32], 2e-7, |x| 1.0 / x.sqrt()),
            near("sqrt.approx.f32 $d, $a", &[F32], 2e-7, |x| x.sqrt()),
            near("ex2.approx.f32 $d, $a", &[F32], 2e-7, |x| x.exp2()),
            near("lg2.approx.f32 $d, $a", &[F32], 2e-7, |x| x.log2()),
            near("abs.f32 $d, $a; min.f32 $d, $d, 0f40400000; sin.approx.f32 $d, $d", &[F32], 3e-6, |x| {
                x.abs().min(3.0).sin()
            }),
            near("abs.f32 $d, $a; min.f32 $d, $d, 0f40400000; cos.approx.f32 $d, $d", &[F32], 3e-6, |x| {
                x.abs().min(3.0).cos()
            }),
            near("tanh.approx.f32 $d, $a", &[F32], 5e-4, |x| x.tanh()),
            Case { tolerance: 3e-7, ..case("div.full.f32 $d, $a, $b", F32, &[F32, F32], |x, y, _| bits(f(x) / f(y))) },
            case("add.f64 $d, $a, $b", F64, &[F64, F64], |x, y, _| (d(x) + d(y)).to_bits()),
            case("sub.f64 $d, $a, $b", F64, &[F64, F64], |x, y, _| (d(x) - d(y)).to_bits()),
            case("mul.rn.f64 $d, $a, $b", F64, &[F64, F64], |x, y, _| (d(x) * d(y)).to_bits()),
            case("fma.rn.f64 $d, $a, $b, $c", F64, &[F64, F64, F64], |x, y, w| d(x).mul_add(d(y), d(w)).to_bits()),
            case("div.rn.f64 $d, $a, $b", F64, &[F64, F64], |x, y, _| (d(x) / d(y)).to_bits()),
            case("sqrt.rn.f64 $d, $a", F64, &[F64], |x, _, _| d(x).sqrt().to_bits()),
            case("rcp.rn.f64 $d, $a", F64, &[F64], |x, _, _| (1.0 / d(x)).to_bits()),
            case("max.f64 $d, $a, $b", F64, &[F64, F64], |x, y, _| match (d(x).is_nan(), d(y).is_nan()) {
                (true, _) => y,
                (_, true) => x,
                _ if d(x) == d(y) => x & y,
                _ => d(x).max(d(y)).to_bits(),
            }),
            case("abs.f64 $d, $a", F64, &[F64], |x, _, _| d(x).abs().to_bits()),
            case("neg.f64 $d, $a", F64, &[F64], |x, _, _| x ^ 1 << 63),
        ]
    });
}

#[test]
fn exp2_over_its_whole_range() {
    // Every integer power is exact. Between them the relative error is at most 2^-22.5, as the ISA
    // asks. That includes subnormal results.
    let points: Vec<f32> =
        (-155 * 8..=130 * 8).map(|i| i as f32 / 8.0 + if i % 3 == 0 { 0.0 } else { 0.001 }).collect();
    for chunk in points.chunks(32) {
        let mut chunk = chunk.to_vec();
        chunk.resize(32, 0.0);
        let body = format!(
            "mad.wide.u32 %rd3, %r1, 4, %rd2; ld.global.f32 %f1, [%rd3]; ex2.approx.f32 %f2, %f1; {}",
            common::store("%f2")
        );
        let out = common::warp(&body, &common::bytes32(chunk.iter().map(|x| x.to_bits())));
        for (x, y) in chunk.iter().zip(out) {
            let (y, exact) = (f32::from_bits(y) as f64, (*x as f64).exp2());
            let exact = exact.min(f32::MAX as f64 * 2.0);
            if exact > f32::MAX as f64 {
                assert!(y.is_infinite(), "2^{x} gave {y}");
            } else {
                let error = 2f64.powf(-22.5) * exact + if exact < 1.2e-38 { 1.5e-45 } else { 0.0 };
                assert!((y - exact).abs() <= error, "2^{x} gave {y:e}, not {exact:e}");
            }
            if x.fract() == 0.0 && (-149.0..128.0).contains(x) {
                assert_eq!(y, exact, "2^{x}");
            }
        }
    }
}

#[test]
fn directed_rounding_brackets_the_exact_result() {
    // The result in f64 must lie between those that are rounded down and up, which must be equal or
    // neighbours.
    let mut random = Random(7);
    let (a, b): (Vec<f32>, Vec<f32>) = (0..32).map(|_| (random.unit() * 100.0, random.unit())).unzip();
    let input = common::bytes32(a.iter().chain(&b).map(|x| x.to_bits()));
    for (op, exact) in [
        ("add", Box::new(|x: f64, y: f64| x + y) as Box<dyn Fn(f64, f64) -> f64>),
        ("sub", Box::new(|x, y| x - y)),
        ("mul", Box::new(|x, y| x * y)),
        ("div", Box::new(|x, y| x / y)),
    ] {
        let run = |mode: &str| {
            let body = format!(
                "mad.wide.u32 %rd3, %r1, 4, %rd2; ld.global.f32 %f1, [%rd3]; ld.global.f32 %f2, [%rd3+128];
                 {op}.{mode}.f32 %f3, %f1, %f2; {}",
                common::store("%f3")
            );
            common::warp(&body, &input).into_iter().map(f32::from_bits).collect::<Vec<f32>>()
        };
        let [down, up, zero, nearest] = ["rm", "rp", "rz", "rn"].map(run);
        for lane in 0..32 {
            let exact = exact(a[lane] as f64, b[lane] as f64);
            let (low, high) = (down[lane] as f64, up[lane] as f64);
            assert!(low <= exact && exact <= high, "{op} lane {lane}: {low} {exact} {high}");
            assert!(high == low || up[lane] == down[lane].next_up(), "{op}: one step apart");
            assert_eq!(zero[lane], if exact > 0.0 { down[lane] } else { up[lane] }, "{op} towards zero");
            assert!(nearest[lane] == down[lane] || nearest[lane] == up[lane]);
        }
    }
}

#[test]
fn halves() {
    let pair = |x: u64, y: u64, with: &dyn Fn(f64, f64) -> f64, of: &dyn Fn(u64) -> f64, to: &dyn Fn(f64) -> u64| {
        to(with(of(x & 0xffff), of(y & 0xffff))) | to(with(of(x >> 16), of(y >> 16))) << 16
    };
    let hd = |bits: u64| h(bits) as f64;
    let bd = |bits: u64| bf(bits) as f64;
    seeds(|| {
        vec![
            case("add.f16 $d, $a, $b", F16, &[F16, F16], |x, y, _| to_h(h(x) as f64 + h(y) as f64)),
            case("sub.f16 $d, $a, $b", F16, &[F16, F16], |x, y, _| to_h(h(x) as f64 - h(y) as f64)),
            case("mul.f16 $d, $a, $b", F16, &[F16, F16], |x, y, _| to_h(h(x) as f64 * h(y) as f64)),
            // A product has 22 bits, so that f64 holds the sum of moderate values exactly.
            case("fma.rn.f16 $d, $a, $b, $c", F16, &[F16, F16, F16], |x, y, w| {
                to_h((h(x) as f64).mul_add(h(y) as f64, h(w) as f64))
            }),
            case("add.bf16 $d, $a, $b", Bf16, &[Bf16, Bf16], |x, y, _| to_bf(bf(x) as f64 + bf(y) as f64)),
            case("mul.bf16 $d, $a, $b", Bf16, &[Bf16, Bf16], |x, y, _| to_bf(bf(x) as f64 * bf(y) as f64)),
            case("fma.rn.bf16 $d, $a, $b, $c", Bf16, &[Bf16, Bf16, Bf16], |x, y, w| {
                to_bf((bf(x) as f64).mul_add(bf(y) as f64, bf(w) as f64))
            }),
            case("add.rn.f16x2 $d, $a, $b", F16x2, &[F16x2, F16x2], move |x, y, _| {
                pair(x, y, &|x, y| x + y, &hd, &to_h)
            }),
            case("mul.rn.f16x2 $d, $a, $b", F16x2, &[F16x2, F16x2], move |x, y, _| {
                pair(x, y, &|x, y| x * y, &hd, &to_h)
            }),
            case("mul.bf16x2 $d, $a, $b", Bf16x2, &[Bf16x2, Bf16x2], move |x, y, _| {
                pair(x, y, &|x, y| x * y, &bd, &to_bf)
            }),
            case("sub.bf16x2 $d, $a, $b", Bf16x2, &[Bf16x2, Bf16x2], move |x, y, _| {
                pair(x, y, &|x, y| x - y, &bd, &to_bf)
            }),
            case("fma.rn.bf16x2 $d, $a, $b, $a", Bf16x2, &[Bf16x2, Bf16x2], move |x, y, _| {
                pair(x, y, &|x, y| x.mul_add(y, x), &bd, &to_bf)
            }),
            case("fma.rn.f16x2 $d, $a, $b, $a", F16x2, &[F16x2, F16x2], move |x, y, _| {
                pair(x, y, &|x, y| x.mul_add(y, x), &hd, &to_h)
            }),
            case("max.f16x2 $d, $a, $b", F16x2, &[F16x2, F16x2], move |x, y, _| pair(x, y, &f64::max, &hd, &to_h)),
            case("min.bf16x2 $d, $a, $b", Bf16x2, &[Bf16x2, Bf16x2], move |x, y, _| pair(x, y, &f64::min, &bd, &to_bf)),
            case("neg.f16x2 $d, $a", F16x2, &[F16x2], |x, _, _| x ^ 0x8000_8000),
            case("abs.bf16x2 $d, $a", Bf16x2, &[Bf16x2], |x, _, _| x & 0x7fff_7fff),
            case("neg.bf16 $d, $a", Bf16, &[Bf16], |x, _, _| x ^ 0x8000),
            Case {
                tolerance: 1e-3,
                ..case("ex2.approx.f16 $d, $a", F16, &[F16], |x, _, _| to_h((h(x) as f64).exp2()))
            },
        ]
    });
}

#[test]
fn conversions() {
    let rounded = |x: f64, low: f64, high: f64| if x.is_nan() { 0.0 } else { x.clamp(low, high) };
    seeds(|| {
        vec![
            case("cvt.u64.u32 $d, $a", I64, &[I32], |x, _, _| x),
            case("cvt.s64.s32 $d, $a", I64, &[I32], |x, _, _| s32(x) as i64 as u64),
            case("cvt.u32.u64 $d, $a", I32, &[I64], |x, _, _| x),
            case("cvt.u16.u32 $d, $a", I16, &[I32], |x, _, _| x),
            case("cvt.u32.u16 $d, $a", I32, &[I16], |x, _, _| x),
            case("cvt.s32.s16 $d, $a", I32, &[I16], |x, _, _| s16(x) as i32 as u64),
            case("cvt.s32.s8 $d, $a", I32, &[I32], |x, _, _| x as i8 as i32 as u64),
            case("cvt.u32.u8 $d, $a", I32, &[I16], |x, _, _| x & 0xff),
            case("cvt.s64.s8 $d, $a", I64, &[I64], |x, _, _| x as i8 as i64 as u64),
            case("cvt.sat.u8.s32 $d, $a", I32, &[I32], |x, _, _| s32(x).clamp(0, 255) as u64),
            case("cvt.sat.s16.s64 $d, $a", I16, &[I64], |x, _, _| (x as i64).clamp(-32768, 32767) as u64),
            case("cvt.sat.u32.s64 $d, $a", I32, &[I64], |x, _, _| (x as i64).clamp(0, u32::MAX as i64) as u64),
            case("cvt.sat.s32.u32 $d, $a", I32, &[I32], |x, _, _| x.min(i32::MAX as u64)),
            case("cvt.rn.f32.s32 $d, $a", F32, &[I32], |x, _, _| bits(s32(x) as f32)),
            case("cvt.rn.f32.u32 $d, $a", F32, &[I32], |x, _, _| bits(x as f32)),
            case("cvt.rz.f32.u32 $d, $a", F32, &[I32], |x, _, _| {
                // These are the highest 24 bits.
                let cut = 40u32.saturating_sub(x.leading_zeros());
                bits((x >> cut << cut) as f32)
            }),
            case("cvt.rn.f32.s64 $d, $a", F32, &[I64], |x, _, _| bits(x as i64 as f32)),
            case("cvt.rn.f64.u64 $d, $a", F64, &[I64], |x, _, _| (x as f64).to_bits()),
            case("cvt.rn.f32.u16 $d, $a", F32, &[I16], |x, _, _| bits(x as f32)),
            case("cvt.rn.f16.s32 $d, $a", F16, &[I32], |x, _, _| to_h(s32(x) as f64)),
            case("cvt.rzi.s32.f32 $d, $a", I32, &[F32], |x, _, _| f(x) as i32 as u64),
            case("cvt.rzi.u32.f32 $d, $a", I32, &[F32], |x, _, _| f(x) as u32 as u64),
            case("cvt.rni.s32.f32 $d, $a", I32, &[F32], |x, _, _| f(x).round_ties_even() as i32 as u64),
            case("cvt.rmi.s32.f32 $d, $a", I32, &[F32], |x, _, _| f(x).floor() as i32 as u64),
            case("cvt.rpi.u32.f32 $d, $a", I32, &[F32], |x, _, _| f(x).ceil() as u32 as u64),
            case(
                "cvt.rzi.s64.f32 $d, $a",
                I64,
                &[F32],
                |x, _, _| if f(x).is_nan() { 1 << 63 } else { f(x) as i64 as u64 },
            ),
            case("cvt.rzi.u16.f32 $d, $a", I16, &[F32], move |x, _, _| {
                rounded(f(x).trunc() as f64, 0.0, 65535.0) as u64
            }),
            case("cvt.rzi.s16.f32 $d, $a", I16, &[F32], move |x, _, _| {
                rounded(f(x).trunc() as f64, -32768.0, 32767.0) as i64 as u64
            }),
            case(
                "cvt.rzi.s32.f64 $d, $a",
                I32,
                &[F64],
                |x, _, _| if d(x).is_nan() { 1 << 31 } else { d(x) as i32 as u64 },
            ),
            case("cvt.rpi.s64.f64 $d, $a", I64, &[F64], |x, _, _| {
                if d(x).is_nan() { 1 << 63 } else { d(x).ceil() as i64 as u64 }
            }),
            case("cvt.rni.f32.f32 $d, $a", F32, &[F32], |x, _, _| bits(f(x).round_ties_even())),
            case("cvt.rmi.f32.f32 $d, $a", F32, &[F32], |x, _, _| bits(f(x).floor())),
            case("cvt.rpi.f64.f64 $d, $a", F64, &[F64], |x, _, _| d(x).ceil().to_bits()),
            case("cvt.ftz.f32.f32 $d, $a", F32, &[F32], |x, _, _| {
                bits(if f(x).is_subnormal() { 0f32.copysign(f(x)) } else { f(x) })
            }),
            case("cvt.sat.f32.f32 $d, $a", F32, &[F32], |x, _, _| bits(if f(x) > 0.0 { f(x).min(1.0) } else { 0.0 })),
            case("cvt.f64.f32 $d, $a", F64, &[F32], |x, _, _| (f(x) as f64).to_bits()),
            case("cvt.rn.f32.f64 $d, $a", F32, &[F64], |x, _, _| bits(d(x) as f32)),
            case("cvt.rz.f32.f64 $d, $a", F32, &[F64], |x, _, _| {
                let near = d(x) as f32;
                bits(if (near as f64).abs() > d(x).abs() { f32::from_bits(near.to_bits() - 1) } else { near })
            }),
            case("cvt.f32.f16 $d, $a", F32, &[F16], |x, _, _| bits(h(x))),
            case("cvt.f32.bf16 $d, $a", F32, &[Bf16], |x, _, _| x << 16),
            case("cvt.f64.f16 $d, $a", F64, &[F16], |x, _, _| (h(x) as f64).to_bits()),
            case("cvt.rn.f16.f32 $d, $a", F16, &[F32], |x, _, _| to_h(f(x) as f64)),
            case("cvt.rn.f16.f64 $d, $a", F16, &[F64], |x, _, _| to_h(d(x))),
            case("cvt.rn.bf16.f32 $d, $a", Bf16, &[F32], |x, _, _| to_bf(f(x) as f64)),
            case("cvt.rz.bf16.f32 $d, $a", Bf16, &[F32], |x, _, _| if f(x).is_nan() { 0x7fff } else { x >> 16 }),
            case("cvt.rn.relu.bf16.f32 $d, $a", Bf16, &[F32], |x, _, _| {
                to_bf(if f(x) < 0.0 { 0.0 } else { f(x) as f64 + 0.0 })
            }),
            case("cvt.rn.bf16x2.f32 $d, $a, $b", Bf16x2, &[F32, F32], |x, y, _| {
                to_bf(f(x) as f64) << 16 | to_bf(f(y) as f64)
            }),
            case("cvt.rn.f16x2.f32 $d, $a, $b", F16x2, &[F32, F32], |x, y, _| {
                to_h(f(x) as f64) << 16 | to_h(f(y) as f64)
            }),
            case("cvt.rz.f16x2.f32 $d, $a, $b", F16x2, &[F32, F32], |x, y, _| {
                let cut = |x: f32| {
                    let near = to_h(x as f64);
                    if x.is_finite() && (h(near) as f64).abs() > (x as f64).abs() { near - 1 } else { near }
                };
                cut(f(x)) << 16 | cut(f(y))
            }),
            case("cvt.rni.f16.f16 $d, $a", F16, &[F16], |x, _, _| to_h(h(x).round_ties_even() as f64)),
            case("cvt.rna.tf32.f32 $d, $a", I32, &[F32], |x, _, _| {
                // Half of the last bit that is kept is added to the magnitude, so that ties go away
                // from zero.
                if f(x).is_finite() { (x + 0x1000) & 0xffff_e000 } else { x }
            }),
        ]
    });
}

#[test]
fn fp8_conversions() {
    // In e4m3, 1.0 is 0x38, 448 is 0x7e and 2^-9 is 0x01. In e5m2, 1.0 is 0x3c and 57344 is 0x7b.
    // Beyond their range both saturate.
    let values = [1.0f32, -1.0, 448.0, 1000.0, 2f32.powi(-9), 0.0, 1.0625, 1.1875, -0.3, f32::NAN];
    let e4m3 = [0x38u32, 0xb8, 0x7e, 0x7e, 0x01, 0x00, 0x38, 0x3a, 0xaa, 0x7f];
    let e5m2 = [0x3c, 0xbc, 0x5f, 0x64, 0x18, 0x00, 0x3c, 0x3d, 0xb5, 0x7f];
    let mut input: Vec<u32> = values.iter().map(|x| x.to_bits()).collect();
    input.resize(32, 0);
    for (name, expected) in [("e4m3x2", e4m3), ("e5m2x2", e5m2)] {
        let body = format!(
            "mad.wide.u32 %rd3, %r1, 4, %rd2; ld.global.f32 %f1, [%rd3];
             cvt.rn.satfinite.{name}.f32 %h1, %f1, 0f3F800000; cvt.u32.u16 %r2, %h1; {}",
            common::store("%r2")
        );
        let out = common::warp(&body, &common::bytes32(input.iter().copied()));
        for (i, expected) in expected.iter().enumerate() {
            let one = if name == "e4m3x2" { 0x38 } else { 0x3c };
            assert_eq!(out[i], expected << 8 | one, "{name} of {}", values[i]);
        }
        let back = format!(
            "mad.wide.u32 %rd3, %r1, 4, %rd2; ld.global.f32 %f1, [%rd3];
             cvt.rn.satfinite.{name}.f32 %h1, %f1, 0f3F800000; cvt.rn.f16x2.{name} %r2, %h1; {}",
            common::store("%r2")
        );
        let out = common::warp(&back, &common::bytes32(input.iter().copied()));
        assert_eq!(out[0], 0x3c00_3c00, "{name}");
        assert_eq!(out[1], 0xbc00_3c00, "{name}");
    }
}

/// Runs a body, which takes `%r2` to `%r3`, on each input.
fn on_each(body: &str, inputs: &[u32]) -> Vec<u32> {
    let body = format!(
        "mov.u32 %r4, %ctaid.x; mov.u32 %r5, %ntid.x; mad.lo.u32 %r4, %r4, %r5, %r1;
         mad.wide.u32 %rd3, %r4, 4, %rd2; ld.global.b32 %r2, [%rd3];
         {body}
         mad.wide.u32 %rd3, %r4, 4, %rd1; st.global.b32 [%rd3], %r3;"
    );
    let mut input = common::bytes32(inputs.iter().copied());
    input.resize(input.len().next_multiple_of(4096), 0);
    let launch = LaunchConfig { grid: [input.len() as u32 / 4096, 1, 1], block: [1024, 1, 1], shared_bytes: 0 };
    let (out, _) = common::launch(&common::kernel_with("", "", &body), launch, &input, input.len() as u64).unwrap();
    common::u32s(&out)[..inputs.len()].to_vec()
}

/// The nearest e4m3, or the largest where there is none.
fn to_e4m3(value: f64) -> u32 {
    if value.is_nan() {
        return 0x7f;
    }
    let magnitude = nearest(value.abs(), |byte| if byte == 0x7f { 480.0 } else { common::e4m3(byte as u32) }, 0x7f);
    (magnitude as u32).min(0x7e) | if value.is_sign_negative() { 0x80 } else { 0 }
}

#[test]
fn every_number_to_8_bits() {
    let halves: Vec<u32> = (0..0x1_0000).collect();
    // The other half of a pair must not matter.
    let pairs: Vec<u32> = halves.iter().map(|x| x | (x ^ 0x3a5c) << 16).collect();
    let found = on_each("cvt.rn.satfinite.e4m3x2.f16x2 %h1, %r2; cvt.u32.u16 %r3, %h1;", &pairs);
    for (pair, found) in pairs.iter().zip(found) {
        let [low, high] = [pair & 0xffff, pair >> 16].map(|half| to_e4m3(h(half as u64) as f64));
        assert_eq!(found, high << 8 | low, "f16x2 {pair:#x}");
    }

    // All bf16, and the neighbours of each e4m3 and of each middle between two.
    let mut floats: Vec<u32> = halves.iter().map(|x| x << 16).collect();
    for byte in 0..0x7e {
        let [low, high] = [byte, byte + 1].map(|byte| common::e4m3(byte) as f32);
        for value in [low, (low + high) / 2.0, high] {
            let around = [value.next_down(), value, value.next_up()];
            floats.extend(around.into_iter().flat_map(|x| [x.to_bits(), (-x).to_bits()]));
        }
    }
    floats.extend([463.9f32, 464.0, 464.1, 479.9, 480.0, 1e30].map(f32::to_bits));
    let body = "mov.b32 %f1, %r2; cvt.rn.satfinite.e4m3x2.f32 %h1, 0f3F800000, %f1; cvt.u32.u16 %r3, %h1;";
    for (bits, found) in floats.iter().zip(on_each(body, &floats)) {
        let expected = to_e4m3(f32::from_bits(*bits) as f64);
        assert_eq!(found, 0x3800 | expected, "f32 {:e} ({bits:#x})", f32::from_bits(*bits));
    }
}

#[test]
fn every_pair_of_8_bits_to_f16() {
    let pairs: Vec<u32> = (0..0x1_0000).collect();
    let found = on_each("cvt.u16.u32 %h1, %r2; cvt.rn.f16x2.e4m3x2 %r3, %h1;", &pairs);
    for (pair, found) in pairs.iter().zip(found) {
        let [low, high] = [pair & 0xff, pair >> 8].map(|byte| to_h(common::e4m3(byte)) as u32);
        assert_eq!(found, high << 16 | low, "e4m3x2 {pair:#x}");
    }
}

#[test]
fn every_power_of_two_in_16_bits() {
    let halves: Vec<u32> = (0..0x1_0000).collect();
    let pairs: Vec<u32> = halves.iter().map(|x| x | (x ^ 0x1234) << 16).collect();
    // The bounds are the largest errors that an H100 was found to have. The last step of f16 is
    // 2^-24. bf16 below its normal numbers becomes zero.
    type Value = fn(u64) -> f32;
    let types: [(&str, Value, f64, f64); 2] = [
        ("ex2.approx.f16x2", h, 9.3e-4, 2f64.powi(-25)),
        ("ex2.approx.ftz.bf16x2", bf, 7.1e-3, f32::MIN_POSITIVE as f64),
    ];
    for (instruction, value, relative, absolute) in types {
        let found = on_each(&format!("{instruction} %r3, %r2;"), &pairs);
        for (pair, found) in pairs.iter().zip(found) {
            for half in [0, 16] {
                let [x, found] = [*pair, found].map(|bits| value((bits >> half & 0xffff) as u64) as f64);
                let exact = x.exp2();
                let largest = value(if instruction.contains("bf16") { 0x7f7f } else { 0x7bff }) as f64;
                let right = match exact {
                    _ if x.is_nan() => found.is_nan(),
                    _ if exact > largest => {
                        found == f64::INFINITY || found == largest && exact < largest * (1.0 + relative)
                    }
                    _ => (found - exact).abs() <= (relative * exact).max(absolute),
                };
                assert!(right, "{instruction} of {x:e}: {found:e} for {exact:e}");
                assert!(!instruction.contains("ftz") || !(found as f32).is_subnormal(), "{x:e}: {found:e}");
            }
        }
    }
}

#[test]
fn packing() {
    seeds(|| {
        vec![
            case("mov.b64 $d, {$a, $b}", I64, &[I32, I32], |x, y, _| y << 32 | x),
            case("mov.b32 $d, {$a, $b}", I32, &[I16, I16], |x, y, _| y << 16 | x),
            case("mov.b64 $d, {$a, $b, $c, $a}", I64, &[I16, I16, I16], |x, y, w| x << 48 | w << 32 | y << 16 | x),
            case("mov.b64 {%r20, $d}, $a", I32, &[I64], |x, _, _| x >> 32),
            case("mov.b64 {$d, %r20}, $a", I32, &[I64], |x, _, _| x),
            case("mov.b32 {%h20, $d}, $a", I16, &[I32], |x, _, _| x >> 16),
            case("mov.b32 {$d, %h20}, $a", I16, &[I32], |x, _, _| x),
            case("mov.b64 {%h20, %h21, $d, %h22}, $a", I16, &[I64], |x, _, _| x >> 32),
        ]
    });
}
