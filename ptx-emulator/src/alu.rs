//! The arithmetic of a lane, in tables. Each row of a table is one operation. The table makes an
//! enum of its rows. It also makes a function that applies one to the 32 lanes of a warp, in a loop
//! that vectorises.
//!
//! Registers hold bits. Values of 8 and 16 bits lie in 32-bit registers with zeros above them, so
//! that each 16-bit operation masks its result.

use crate::float::{self, *};

/// An array that holds one value for each lane.
pub(crate) type Lanes<T> = [T; 32];

/// The loop over lanes for one row of a table.
macro_rules! each_lane {
    (($($arg:ident: $in:ty),+) $out:ty, $value:expr) => {{
        let mut out = [<$out>::default(); 32];
        for lane in 0..32 {
            $(let $arg = $arg[lane];)+
            out[lane] = $value;
        }
        out
    }};
}

/// Makes the enum and the function of a table. The inner rule has the parameters once more, with
/// the types of 32 lanes.
macro_rules! table {
    ($(#[$doc:meta])* $name:ident, $apply:ident($($arg:ident: $in:ty),+) -> $out:ty { $($rows:tt)* }) => {
        table!(@ $(#[$doc])* $name, $apply ($($arg: $in),+) ($($arg: &Lanes<$in>),+) $out, { $($rows)* });
    };
    (@ $(#[$doc:meta])* $name:ident, $apply:ident $args:tt ($($param:ident: $lanes:ty),+) $out:ty,
        { $($row:ident => $value:expr,)+ }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum $name { $($row),+ }

        #[inline(always)]
        pub(crate) fn $apply(row: $name, $($param: $lanes),+) -> Lanes<$out> {
            match row {
                $($name::$row => each_lane!($args $out, $value),)+
            }
        }
    };
}

#[inline(always)]
fn f(bits: u32) -> f32 {
    f32::from_bits(bits)
}

#[inline(always)]
fn d(bits: u64) -> f64 {
    f64::from_bits(bits)
}

#[inline(always)]
fn s16(bits: u32) -> i32 {
    bits as u16 as i16 as i32
}

/// Clamps a value to [0, 1]. NaN becomes 0.
#[inline(always)]
fn sat(value: f32) -> f32 {
    if value > 0.0 { if value < 1.0 { value } else { 1.0 } } else { 0.0 }
}

/// Applies a function of f32 to f16 bits. Two roundings of a sum, product or quotient are right,
/// because f32 has twice the bits of f16 and two more. The same holds for bf16.
#[inline(always)]
fn in_f16(bits: [u32; 2], with: impl Fn(f32, f32) -> f32) -> u32 {
    f32_to_f16(with(f16_to_f32(bits[0] & 0xffff), f16_to_f32(bits[1] & 0xffff)))
}

/// Applies a function of f32 to bf16 bits.
#[inline(always)]
fn in_bf16(bits: [u32; 2], with: impl Fn(f32, f32) -> f32) -> u32 {
    f32_to_bf16(with(bf16_to_f32(bits[0] & 0xffff), bf16_to_f32(bits[1] & 0xffff)))
}

/// Applies a function of 16-bit values to both halves of packed operands.
#[inline(always)]
fn both(a: u32, b: u32, with: impl Fn(u32, u32) -> u32) -> u32 {
    with(a & 0xffff, b & 0xffff) | with(a >> 16, b >> 16) << 16
}

/// `prmt` in its default mode. Each nibble of the selector picks one of eight bytes for a byte of
/// the result. With its high bit it spreads the sign of that byte in its place:
///
/// ```text
/// bytes        7 6 5 4 (b)   3 2 1 0 (a)
/// selector     nibble i names the byte that goes to byte i of the result
/// ```
#[inline(always)]
fn permute(a: u32, b: u32, selector: u32) -> u32 {
    let bytes = (b as u64) << 32 | a as u64;
    let mut out = 0;
    for i in 0..4 {
        let nibble = selector >> (4 * i) & 15;
        let byte = (bytes >> (8 * (nibble & 7))) as u32 & 0xff;
        let byte = if nibble & 8 != 0 { if byte & 0x80 != 0 { 0xff } else { 0 } } else { byte };
        out |= byte << (8 * i);
    }
    out
}

/// The other six modes of `prmt`. The low two bits of the selector give the order of bytes.
fn permute_mode(mode: Prmt, a: u32, b: u32, selector: u32) -> u32 {
    let s = selector & 3;
    let order: [u32; 4] = match mode {
        Prmt::F4e => [s, s + 1, s + 2, s + 3],
        Prmt::B4e => [s, (s + 7) & 7, (s + 6) & 7, (s + 5) & 7],
        Prmt::Rc8 => [s; 4],
        Prmt::Ecl => [s, s.max(1), s.max(2), 3],
        Prmt::Ecr => [0, s.min(1), s.min(2), s],
        Prmt::Rc16 if s & 1 == 0 => [0, 1, 0, 1],
        Prmt::Rc16 => [2, 3, 2, 3],
    };
    permute(a, b, order[0] | order[1] << 4 | order[2] << 8 | order[3] << 12)
}

/// The modes of `prmt` beside the default.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Prmt {
    F4e,
    B4e,
    Rc8,
    Ecl,
    Ecr,
    Rc16,
}

/// `bfe`: the bits `[position, position + length)` of a value of `width` bits. If `signed` is set,
/// they are extended by the last of them that lies inside the value.
#[inline(always)]
fn extract(value: u64, position: u32, length: u32, width: u32, signed: bool) -> u64 {
    let (position, length) = (position & 0xff, length & 0xff);
    if length == 0 {
        return 0;
    }
    let top = (position + length - 1).min(width - 1);
    let sign = if signed && value >> top & 1 == 1 { u64::MAX } else { 0 };
    if position >= width {
        return sign;
    }
    let count = top - position + 1;
    let field = if count >= 64 { value >> position } else { value >> position & ((1 << count) - 1) };
    if count >= 64 { field } else { field | sign << count }
}

/// `bfi`: `base` with the low `length` bits of `value` at `position`.
#[inline(always)]
fn insert(value: u64, base: u64, position: u32, length: u32, width: u32) -> u64 {
    let (position, length) = (position & 0xff, length & 0xff);
    if position >= width || length == 0 {
        return base;
    }
    let count = length.min(width - position);
    let mask = if count >= 64 { u64::MAX } else { (1 << count) - 1 } << position;
    base & !mask | value << position & mask
}

/// The number of the highest bit that is set, or -1.
#[inline(always)]
fn top_bit(value: u32) -> u32 {
    31u32.wrapping_sub(value.leading_zeros())
}

table! {
    /// Operations that read one 32-bit register and write another.
    Unary32, unary32(a: u32) -> u32 {
        Mov => a,
        Zext8 => a & 0xff,
        Zext16 => a & 0xffff,
        Sext8 => a as u8 as i8 as i32 as u32,
        Sext16 => s16(a) as u32,
        Sext8To16 => a as u8 as i8 as u16 as u32,
        Not => !a,
        Not16 => !a & 0xffff,
        Cnot => (a == 0) as u32,
        Neg => a.wrapping_neg(),
        Neg16 => a.wrapping_neg() & 0xffff,
        Abs => (a as i32).wrapping_abs() as u32,
        Abs16 => s16(a).wrapping_abs() as u32 & 0xffff,
        Brev => a.reverse_bits(),
        Popc => a.count_ones(),
        Clz => a.leading_zeros(),
        BfindU => top_bit(a),
        BfindS => top_bit(a ^ ((a as i32 >> 31) as u32)),
        BfindShiftU => if a == 0 { u32::MAX } else { a.leading_zeros() },
        BfindShiftS => { let x = a ^ ((a as i32 >> 31) as u32); if x == 0 { u32::MAX } else { x.leading_zeros() } },
        NegF32 => a ^ 0x8000_0000,
        AbsF32 => a & 0x7fff_ffff,
        FlushF32 => flush(f(a)).to_bits(),
        SatF32 => sat(f(a)).to_bits(),
        RcpF32 => (1.0 / f(a)).to_bits(),
        SqrtF32 => f(a).sqrt().to_bits(),
        RsqrtF32 => ((1.0 / (f(a) as f64).sqrt()) as f32).to_bits(),
        Ex2F32 => float::exp2(f(a)).to_bits(),
        Ex2FtzF32 => flush(float::exp2(f(a))).to_bits(),
        Lg2F32 => f(a).log2().to_bits(),
        SinF32 => f(a).sin().to_bits(),
        CosF32 => f(a).cos().to_bits(),
        TanhF32 => f(a).tanh().to_bits(),
        NegF16 => a ^ 0x8000,
        AbsF16 => a & 0x7fff,
        NegX2 => a ^ 0x8000_8000,
        AbsX2 => a & 0x7fff_7fff,
        ReluF16 => if a & 0x8000 != 0 && a & 0x7fff <= 0x7c00 { 0 } else { a },
        ReluBf16 => if a & 0x8000 != 0 && a & 0x7fff <= 0x7f80 { 0 } else { a },
        Ex2F16 => in_f16([a, 0], |a, _| float::exp2(a)),
        Ex2Bf16 => in_bf16([a, 0], |a, _| flush(float::exp2(a))),
        Ex2F16x2 => both(a, 0, |a, _| in_f16([a, 0], |a, _| float::exp2(a))),
        Ex2Bf16x2 => both(a, 0, |a, _| in_bf16([a, 0], |a, _| flush(float::exp2(a)))),
        TanhF16 => in_f16([a, 0], |a, _| a.tanh()),
        TanhBf16 => in_bf16([a, 0], |a, _| a.tanh()),
        TanhF16x2 => both(a, 0, |a, _| in_f16([a, 0], |a, _| a.tanh())),
        TanhBf16x2 => both(a, 0, |a, _| in_bf16([a, 0], |a, _| a.tanh())),
        RoundF32 => f(a).round_ties_even().to_bits(),
        TruncF32 => f(a).trunc().to_bits(),
        FloorF32 => f(a).floor().to_bits(),
        CeilF32 => f(a).ceil().to_bits(),
        F32ToS32 => f(a) as i32 as u32,
        F32ToU32 => f(a) as u32,
        S32ToF32 => (a as i32 as f32).to_bits(),
        U32ToF32 => (a as f32).to_bits(),
        F32ToF16 => f32_to_f16(f(a)),
        F32ToBf16 => f32_to_bf16(f(a)),
        F16ToF32 => f16_to_f32(a & 0xffff).to_bits(),
        Bf16ToF32 => a << 16,
        F32ToTf32 => (quantise(f(a) as f64, TF32, Round::NearestAway, false) as f32).to_bits(),
        F32ToTf32Rn => (quantise(f(a) as f64, TF32, Round::Nearest, false) as f32).to_bits(),
        F32ToTf32Rz => a & 0xffff_e000,
        F16x2ToE4m3x2 => f32_to_e4m3(f16_to_f32(a & 0xffff)) | f32_to_e4m3(f16_to_f32(a >> 16)) << 8,
        F16x2ToE5m2x2 => f32_to_e5m2(f16_to_f32(a & 0xffff)) | f32_to_e5m2(f16_to_f32(a >> 16)) << 8,
        E4m3x2ToF16x2 => both(a & 0xff | (a & 0xff00) << 8, 0, |a, _| f32_to_f16(e4m3_to_f32(a))),
        E5m2x2ToF16x2 => (a & 0xff) << 8 | (a & 0xff00) << 16,
    }
}

table! {
    /// Operations that read two 32-bit registers and write one.
    Binary32, binary32(a: u32, b: u32) -> u32 {
        Add => a.wrapping_add(b),
        Add16 => a.wrapping_add(b) & 0xffff,
        AddSat => (a as i32).saturating_add(b as i32) as u32,
        Sub => a.wrapping_sub(b),
        Sub16 => a.wrapping_sub(b) & 0xffff,
        SubSat => (a as i32).saturating_sub(b as i32) as u32,
        Mul => a.wrapping_mul(b),
        Mul16 => a.wrapping_mul(b) & 0xffff,
        MulHiU => ((a as u64 * b as u64) >> 32) as u32,
        MulHiS => ((a as i32 as i64 * b as i32 as i64) >> 32) as u32,
        MulHiU16 => (a & 0xffff).wrapping_mul(b & 0xffff) >> 16,
        MulHiS16 => ((s16(a) * s16(b)) as u32) >> 16,
        MulWideS16 => (s16(a) * s16(b)) as u32,
        Mul24U => (a & 0xff_ffff).wrapping_mul(b & 0xff_ffff),
        Mul24S => ((a << 8) as i32 >> 8).wrapping_mul((b << 8) as i32 >> 8) as u32,
        DivU => a.checked_div(b).unwrap_or(u32::MAX),
        DivS => if b == 0 { u32::MAX } else { (a as i32).wrapping_div(b as i32) as u32 },
        DivS16 => if b == 0 { 0xffff } else { (s16(a) / s16(b)) as u32 & 0xffff },
        RemU => if b == 0 { a } else { a % b },
        RemS => if b == 0 { a } else { (a as i32).wrapping_rem(b as i32) as u32 },
        RemS16 => if b == 0 { a } else { (s16(a) % s16(b)) as u32 & 0xffff },
        MinU => a.min(b),
        MinS => (a as i32).min(b as i32) as u32,
        MinS16 => s16(a).min(s16(b)) as u32 & 0xffff,
        MaxU => a.max(b),
        MaxS => (a as i32).max(b as i32) as u32,
        MaxS16 => s16(a).max(s16(b)) as u32 & 0xffff,
        And => a & b,
        Or => a | b,
        Xor => a ^ b,
        Shl => if b > 31 { 0 } else { a << b },
        Shl16 => if b > 15 { 0 } else { a << b & 0xffff },
        ShrU => if b > 31 { 0 } else { a >> b },
        ShrS => (a as i32 >> b.min(31)) as u32,
        ShrS16 => (s16(a) >> b.min(31)) as u32 & 0xffff,
        Bmsk => insert(u64::MAX, 0, a, b, 32) as u32,
        AddF32 => (f(a) + f(b)).to_bits(),
        AddFtzF32 => flush(flush(f(a)) + flush(f(b))).to_bits(),
        SubF32 => (f(a) - f(b)).to_bits(),
        SubFtzF32 => flush(flush(f(a)) - flush(f(b))).to_bits(),
        MulF32 => (f(a) * f(b)).to_bits(),
        MulFtzF32 => flush(flush(f(a)) * flush(f(b))).to_bits(),
        DivF32 => (f(a) / f(b)).to_bits(),
        MinF32 => float::min(f(a), f(b)).to_bits(),
        MaxF32 => float::max(f(a), f(b)).to_bits(),
        MinNanF32 => or_nan(f(a), f(b), float::min(f(a), f(b))).to_bits(),
        MaxNanF32 => or_nan(f(a), f(b), float::max(f(a), f(b))).to_bits(),
        // PTX puts the sign of a on the magnitude of b.
        CopysignF32 => a & 0x8000_0000 | b & 0x7fff_ffff,
        AddF16 => in_f16([a, b], |a, b| a + b),
        SubF16 => in_f16([a, b], |a, b| a - b),
        MulF16 => in_f16([a, b], |a, b| a * b),
        MinF16 => in_f16([a, b], float::min),
        MaxF16 => in_f16([a, b], float::max),
        MinNanF16 => in_f16([a, b], |a, b| or_nan(a, b, float::min(a, b))),
        MaxNanF16 => in_f16([a, b], |a, b| or_nan(a, b, float::max(a, b))),
        AddBf16 => in_bf16([a, b], |a, b| a + b),
        SubBf16 => in_bf16([a, b], |a, b| a - b),
        MulBf16 => in_bf16([a, b], |a, b| a * b),
        MinBf16 => in_bf16([a, b], float::min),
        MaxBf16 => in_bf16([a, b], float::max),
        MinNanBf16 => in_bf16([a, b], |a, b| or_nan(a, b, float::min(a, b))),
        MaxNanBf16 => in_bf16([a, b], |a, b| or_nan(a, b, float::max(a, b))),
        AddF16x2 => both(a, b, |a, b| in_f16([a, b], |a, b| a + b)),
        SubF16x2 => both(a, b, |a, b| in_f16([a, b], |a, b| a - b)),
        MulF16x2 => both(a, b, |a, b| in_f16([a, b], |a, b| a * b)),
        MinF16x2 => both(a, b, |a, b| in_f16([a, b], float::min)),
        MaxF16x2 => both(a, b, |a, b| in_f16([a, b], float::max)),
        MinNanF16x2 => both(a, b, |a, b| in_f16([a, b], |a, b| or_nan(a, b, float::min(a, b)))),
        MaxNanF16x2 => both(a, b, |a, b| in_f16([a, b], |a, b| or_nan(a, b, float::max(a, b)))),
        AddBf16x2 => both(a, b, |a, b| in_bf16([a, b], |a, b| a + b)),
        SubBf16x2 => both(a, b, |a, b| in_bf16([a, b], |a, b| a - b)),
        MulBf16x2 => both(a, b, |a, b| in_bf16([a, b], |a, b| a * b)),
        MinBf16x2 => both(a, b, |a, b| in_bf16([a, b], float::min)),
        MaxBf16x2 => both(a, b, |a, b| in_bf16([a, b], float::max)),
        MinNanBf16x2 => both(a, b, |a, b| in_bf16([a, b], |a, b| or_nan(a, b, float::min(a, b)))),
        MaxNanBf16x2 => both(a, b, |a, b| in_bf16([a, b], |a, b| or_nan(a, b, float::max(a, b)))),
        Pack16 => a & 0xffff | b << 16,
        // The first source of a packing conversion goes to the upper half.
        F32ToF16x2 => f32_to_f16(f(a)) << 16 | f32_to_f16(f(b)),
        F32ToBf16x2 => f32_to_bf16(f(a)) << 16 | f32_to_bf16(f(b)),
        F32ToE4m3x2 => f32_to_e4m3(f(a)) << 8 | f32_to_e4m3(f(b)),
        F32ToE5m2x2 => f32_to_e5m2(f(a)) << 8 | f32_to_e5m2(f(b)),
    }
}

table! {
    /// Operations that read three 32-bit registers and write one.
    Ternary32, ternary32(a: u32, b: u32, c: u32) -> u32 {
        Mad => a.wrapping_mul(b).wrapping_add(c),
        Mad16 => a.wrapping_mul(b).wrapping_add(c) & 0xffff,
        MadHiU => (((a as u64 * b as u64) >> 32) as u32).wrapping_add(c),
        MadHiS => (((a as i32 as i64 * b as i32 as i64) >> 32) as u32).wrapping_add(c),
        MadWideU16 => (a & 0xffff).wrapping_mul(b & 0xffff).wrapping_add(c),
        MadWideS16 => (s16(a) * s16(b)).wrapping_add(c as i32) as u32,
        Mad24U => (a & 0xff_ffff).wrapping_mul(b & 0xff_ffff).wrapping_add(c),
        Mad24S => ((a << 8) as i32 >> 8).wrapping_mul((b << 8) as i32 >> 8).wrapping_add(c as i32) as u32,
        SadU => a.abs_diff(b).wrapping_add(c),
        SadS => (a as i32).abs_diff(b as i32).wrapping_add(c),
        Dp4aS => (0..4).fold(c, |sum, i| {
            let byte = |x: u32| (x >> (8 * i)) as u8 as i8 as i32;
            sum.wrapping_add((byte(a) * byte(b)) as u32)
        }),
        Dp4aU => (0..4).fold(c, |sum, i| sum.wrapping_add((a >> (8 * i) & 0xff) * (b >> (8 * i) & 0xff))),
        BfeU => extract(a as u64, b, c, 32, false) as u32,
        BfeS => extract(a as u64, b, c, 32, true) as u32,
        Prmt => permute(a, b, c),
        PrmtF4e => permute_mode(self::Prmt::F4e, a, b, c),
        PrmtB4e => permute_mode(self::Prmt::B4e, a, b, c),
        PrmtRc8 => permute_mode(self::Prmt::Rc8, a, b, c),
        PrmtEcl => permute_mode(self::Prmt::Ecl, a, b, c),
        PrmtEcr => permute_mode(self::Prmt::Ecr, a, b, c),
        PrmtRc16 => permute_mode(self::Prmt::Rc16, a, b, c),
        ShfLWrap => (((b as u64) << 32 | a as u64) << (c & 31) >> 32) as u32,
        ShfLClamp => (((b as u64) << 32 | a as u64) << c.min(32) >> 32) as u32,
        ShfRWrap => (((b as u64) << 32 | a as u64) >> (c & 31)) as u32,
        ShfRClamp => (((b as u64) << 32 | a as u64) >> c.min(32)) as u32,
        SlctS => if c as i32 >= 0 { a } else { b },
        SlctF32 => if f(c) >= 0.0 { a } else { b },
        FmaF32 => f(a).mul_add(f(b), f(c)).to_bits(),
        FmaFtzF32 => flush(flush(f(a)).mul_add(flush(f(b)), flush(f(c)))).to_bits(),
        FmaF16 => fma_f16(a, b, c),
        FmaBf16 => fma_bf16(a, b, c),
        FmaF16x2 => fma_f16(a, b, c) | fma_f16(a >> 16, b >> 16, c >> 16) << 16,
        FmaBf16x2 => fma_bf16(a, b, c) | fma_bf16(a >> 16, b >> 16, c >> 16) << 16,
    }
}

table! {
    /// Operations that read one 64-bit register and write another.
    Unary64, unary64(a: u64) -> u64 {
        Mov => a,
        Sext8 => a as u8 as i8 as i64 as u64,
        Sext16 => a as u16 as i16 as i64 as u64,
        Sext32 => a as u32 as i32 as i64 as u64,
        Zext8 => a & 0xff,
        Zext16 => a & 0xffff,
        Zext32 => a & 0xffff_ffff,
        Not => !a,
        Cnot => (a == 0) as u64,
        Neg => a.wrapping_neg(),
        Abs => (a as i64).wrapping_abs() as u64,
        Brev => a.reverse_bits(),
        NegF64 => a ^ 1 << 63,
        AbsF64 => a & !(1 << 63),
        RcpF64 => (1.0 / d(a)).to_bits(),
        SqrtF64 => d(a).sqrt().to_bits(),
        RsqrtF64 => (1.0 / d(a).sqrt()).to_bits(),
        RoundF64 => d(a).round_ties_even().to_bits(),
        TruncF64 => d(a).trunc().to_bits(),
        FloorF64 => d(a).floor().to_bits(),
        CeilF64 => d(a).ceil().to_bits(),
        F64ToS64 => if d(a).is_nan() { 1 << 63 } else { d(a) as i64 as u64 },
        F64ToU64 => if d(a).is_nan() { 1 << 63 } else { d(a) as u64 },
        S64ToF64 => (a as i64 as f64).to_bits(),
        U64ToF64 => (a as f64).to_bits(),
    }
}

table! {
    /// Operations that read two 64-bit registers and write one.
    Binary64, binary64(a: u64, b: u64) -> u64 {
        Add => a.wrapping_add(b),
        Sub => a.wrapping_sub(b),
        Mul => a.wrapping_mul(b),
        MulHiU => ((a as u128 * b as u128) >> 64) as u64,
        MulHiS => ((a as i64 as i128 * b as i64 as i128) >> 64) as u64,
        DivU => a.checked_div(b).unwrap_or(u64::MAX),
        DivS => if b == 0 { u64::MAX } else { (a as i64).wrapping_div(b as i64) as u64 },
        RemU => if b == 0 { a } else { a % b },
        RemS => if b == 0 { a } else { (a as i64).wrapping_rem(b as i64) as u64 },
        MinU => a.min(b),
        MinS => (a as i64).min(b as i64) as u64,
        MaxU => a.max(b),
        MaxS => (a as i64).max(b as i64) as u64,
        And => a & b,
        Or => a | b,
        Xor => a ^ b,
        AddF64 => (d(a) + d(b)).to_bits(),
        SubF64 => (d(a) - d(b)).to_bits(),
        MulF64 => (d(a) * d(b)).to_bits(),
        DivF64 => (d(a) / d(b)).to_bits(),
        MinF64 => if d(a).is_nan() { b } else if d(b).is_nan() || d(a) < d(b) || (d(a) == d(b) && a >> 63 == 1) { a } else { b },
        MaxF64 => if d(a).is_nan() { b } else if d(b).is_nan() || d(a) > d(b) || (d(a) == d(b) && a >> 63 == 0) { a } else { b },
        CopysignF64 => a & 1 << 63 | b & !(1 << 63),
    }
}

table! {
    /// Operations that read three 64-bit registers and write one.
    Ternary64, ternary64(a: u64, b: u64, c: u64) -> u64 {
        Mad => a.wrapping_mul(b).wrapping_add(c),
        MadHiU => (((a as u128 * b as u128) >> 64) as u64).wrapping_add(c),
        MadHiS => (((a as i64 as i128 * b as i64 as i128) >> 64) as u64).wrapping_add(c),
        FmaF64 => d(a).mul_add(d(b), d(c)).to_bits(),
    }
}

table! {
    /// Operations that read a 32-bit register and write a 64-bit one.
    Widen, widen(a: u32) -> u64 {
        Zext => a as u64,
        Sext => a as i32 as i64 as u64,
        F32ToF64 => (f(a) as f64).to_bits(),
        F32ToS64 => if f(a).is_nan() { 1 << 63 } else { f(a) as i64 as u64 },
        F32ToU64 => if f(a).is_nan() { 1 << 63 } else { f(a) as u64 },
    }
}

table! {
    /// Operations that read a 64-bit register and write a 32-bit one.
    Narrow, narrow(a: u64) -> u32 {
        Low => a as u32,
        High => (a >> 32) as u32,
        Popc => a.count_ones(),
        Clz => a.leading_zeros(),
        BfindU => 63u32.wrapping_sub(a.leading_zeros()),
        BfindS => 63u32.wrapping_sub((a ^ (a as i64 >> 63) as u64).leading_zeros()),
        F64ToF32 => (d(a) as f32).to_bits(),
        F64ToF32Rz => (quantise(d(a), F32, Round::Zero, false) as f32).to_bits(),
        F64ToF32Rm => (quantise(d(a), F32, Round::Down, false) as f32).to_bits(),
        F64ToF32Rp => (quantise(d(a), F32, Round::Up, false) as f32).to_bits(),
        F64ToF16 => f64_to_f16(d(a), Round::Nearest, false),
        F64ToF16Rz => f64_to_f16(d(a), Round::Zero, false),
        F64ToF16Rm => f64_to_f16(d(a), Round::Down, false),
        F64ToF16Rp => f64_to_f16(d(a), Round::Up, false),
        F64ToF16Sat => f64_to_f16(d(a), Round::Nearest, true),
        F64ToBf16 => f64_to_bf16(d(a), Round::Nearest, false),
        F64ToBf16Rz => f64_to_bf16(d(a), Round::Zero, false),
        F64ToBf16Rm => f64_to_bf16(d(a), Round::Down, false),
        F64ToBf16Rp => f64_to_bf16(d(a), Round::Up, false),
        F64ToBf16Sat => f64_to_bf16(d(a), Round::Nearest, true),
        F64ToS32 => if d(a).is_nan() { 1 << 31 } else { d(a) as i32 as u32 },
        F64ToU32 => if d(a).is_nan() { 1 << 31 } else { d(a) as u32 },
        S64ToF32 => (a as i64 as f32).to_bits(),
        U64ToF32 => (a as f32).to_bits(),
    }
}

table! {
    /// Operations that read two 32-bit registers and write a 64-bit one.
    WideMul, wide_mul(a: u32, b: u32) -> u64 {
        MulU => a as u64 * b as u64,
        MulS => (a as i32 as i64 * b as i32 as i64) as u64,
        Pack => a as u64 | (b as u64) << 32,
    }
}

table! {
    /// Operations that read two 32-bit registers and a 64-bit one, and write a 64-bit one.
    WideMad, wide_mad(a: u32, b: u32, c: u64) -> u64 {
        MadU => (a as u64 * b as u64).wrapping_add(c),
        MadS => ((a as i32 as i64 * b as i32 as i64) as u64).wrapping_add(c),
        // Extracts from c: a is the position, and b the length.
        BfeU => extract(c, a, b, 64, false),
        BfeS => extract(c, a, b, 64, true),
    }
}

table! {
    /// Operations that shift a 64-bit register by a 32-bit one.
    Shift64, shift64(a: u64, b: u32) -> u64 {
        Shl => if b > 63 { 0 } else { a << b },
        ShrU => if b > 63 { 0 } else { a >> b },
        ShrS => (a as i64 >> b.min(63)) as u64,
    }
}

/// `lop3`: each bit of the result is bit `4a + 2b + c` of a truth table.
#[inline(always)]
pub(crate) fn lop3(a: u32, b: u32, c: u32, table: u8) -> u32 {
    let mut out = 0;
    for case in 0..8 {
        let pick = |value: u32, bit: u32| if case >> bit & 1 == 1 { value } else { !value };
        if table >> case & 1 == 1 {
            out |= pick(a, 2) & pick(b, 1) & pick(c, 0);
        }
    }
    out
}

/// `bfi` on values of 32 bits.
#[inline(always)]
pub(crate) fn insert32(value: u32, base: u32, position: u32, length: u32) -> u32 {
    insert(value as u64, base as u64, position, length, 32) as u32
}

/// `bfi` on values of 64 bits.
#[inline(always)]
pub(crate) fn insert64(value: u64, base: u64, position: u32, length: u32) -> u64 {
    insert(value, base, position, length, 64)
}

/// Makes the enum and the function of a table of comparisons.
macro_rules! compare_table {
    ($(#[$doc:meta])* $name:ident, $apply:ident($a:ident, $b:ident: $in:ty) { $($row:ident => $value:expr,)+ }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum $name { $($row),+ }

        /// The result has one bit for each lane.
        #[inline(always)]
        pub(crate) fn $apply(row: $name, $a: &Lanes<$in>, $b: &Lanes<$in>) -> u32 {
            match row {
                $($name::$row => {
                    let mut out = 0;
                    for lane in 0..32 {
                        let ($a, $b) = ($a[lane], $b[lane]);
                        out |= if $value { 1 << lane } else { 0 };
                    }
                    out
                })+
            }
        }
    };
}

compare_table! {
    /// Comparisons of 32-bit registers. Those of f32 that end in `U` also hold when an operand is
    /// NaN.
    Compare32, compare32(a, b: u32) {
        Eq => a == b,
        Ne => a != b,
        LtU => a < b,
        LeU => a <= b,
        GtU => a > b,
        GeU => a >= b,
        LtS => (a as i32) < (b as i32),
        LeS => (a as i32) <= (b as i32),
        GtS => (a as i32) > (b as i32),
        GeS => (a as i32) >= (b as i32),
        LtS16 => s16(a) < s16(b),
        LeS16 => s16(a) <= s16(b),
        GtS16 => s16(a) > s16(b),
        GeS16 => s16(a) >= s16(b),
        FEq => f(a) == f(b),
        FNe => (f(a) < f(b)) | (f(a) > f(b)),
        FLt => f(a) < f(b),
        FLe => f(a) <= f(b),
        FGt => f(a) > f(b),
        FGe => f(a) >= f(b),
        FEqU => !((f(a) < f(b)) | (f(a) > f(b))),
        FNeU => f(a) != f(b),
        FLtU => (f(a) < f(b)) | f(a).is_nan() | f(b).is_nan(),
        FLeU => (f(a) <= f(b)) | f(a).is_nan() | f(b).is_nan(),
        FGtU => (f(a) > f(b)) | f(a).is_nan() | f(b).is_nan(),
        FGeU => (f(a) >= f(b)) | f(a).is_nan() | f(b).is_nan(),
        FNum => !(f(a).is_nan() | f(b).is_nan()),
        FNan => f(a).is_nan() | f(b).is_nan(),
    }
}

compare_table! {
    /// Comparisons of 64-bit registers. Those of f64 that end in `U` also hold when an operand is
    /// NaN.
    Compare64, compare64(a, b: u64) {
        Eq => a == b,
        Ne => a != b,
        LtU => a < b,
        LeU => a <= b,
        GtU => a > b,
        GeU => a >= b,
        LtS => (a as i64) < (b as i64),
        LeS => (a as i64) <= (b as i64),
        GtS => (a as i64) > (b as i64),
        GeS => (a as i64) >= (b as i64),
        FEq => d(a) == d(b),
        FNe => (d(a) < d(b)) | (d(a) > d(b)),
        FLt => d(a) < d(b),
        FLe => d(a) <= d(b),
        FGt => d(a) > d(b),
        FGe => d(a) >= d(b),
        FEqU => !((d(a) < d(b)) | (d(a) > d(b))),
        FNeU => d(a) != d(b),
        FLtU => (d(a) < d(b)) | d(a).is_nan() | d(b).is_nan(),
        FLeU => (d(a) <= d(b)) | d(a).is_nan() | d(b).is_nan(),
        FGtU => (d(a) > d(b)) | d(a).is_nan() | d(b).is_nan(),
        FGeU => (d(a) >= d(b)) | d(a).is_nan() | d(b).is_nan(),
        FNum => !(d(a).is_nan() | d(b).is_nan()),
        FNan => d(a).is_nan() | d(b).is_nan(),
    }
}

/// Slow arithmetic on f32, with any rounding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Directed {
    Add,
    Sub,
    Mul,
    Fma,
    Div,
    Rcp,
    Sqrt,
    FromS32,
    FromU32,
}

/// Applies a [`Directed`] operation, which is rounded once.
pub(crate) fn directed(kind: Directed, round: Round, a: u32, b: u32, c: u32) -> u32 {
    let [x, y, z] = [a, b, c].map(|bits| f(bits) as f64);
    let exact = match kind {
        Directed::Add => sum_to_odd(x, y),
        Directed::Sub => sum_to_odd(x, -y),
        Directed::Mul => x * y,
        Directed::Fma => sum_to_odd(x * y, z),
        Directed::Div => quotient_to_odd(x, y),
        Directed::Rcp => quotient_to_odd(1.0, x),
        Directed::Sqrt => root_to_odd(x),
        Directed::FromS32 => a as i32 as f64,
        Directed::FromU32 => a as f64,
    };
    // A sum that is exactly zero, of terms that are not, is -0 only when it is rounded down.
    let opposite = matches!(kind, Directed::Add | Directed::Sub | Directed::Fma) && exact == 0.0;
    let exact = if opposite && round == Round::Down && !(x == 0.0 && y == 0.0) { -0.0 } else { exact };
    (quantise(exact, F32, round, false) as f32).to_bits()
}
