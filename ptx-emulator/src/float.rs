//! Number formats and roundings that Rust does not have: f16, bf16, fp8, directed rounding, `ex2`.
//!
//! ```text
//!         sign  exponent  fraction            sign  exponent  fraction
//! f32       1       8        23       f16       1       5        10
//! tf32      1       8        10       e5m2      1       5         2
//! bf16      1       8         7       e4m3      1       4         3
//! ```
//!
//! Kernels call some functions a million times: `exp2`, and those between f32 and f16, bf16 or
//! e4m3. These have no branches, so that a loop over 32 lanes becomes vector code.
//!
//! The others compute in f64. Where the result is not exact, they round it to odd: the last bit is
//! set if something was cut off. A second rounding is then right in every mode, when f64 has at
//! least two bits more than the target (Boldo and Melquiond 2008).

/// How a result is rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Round {
    /// `.rn`: to nearest, and ties to even.
    Nearest,
    /// `.rna`: to nearest, and ties away from zero.
    NearestAway,
    /// `.rz`: towards zero.
    Zero,
    /// `.rm`: towards minus infinity.
    Down,
    /// `.rp`: towards plus infinity.
    Up,
}

/// What rounding must know of a binary format.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Format {
    /// The bits of a mantissa, with the hidden one.
    precision: i32,
    /// The exponent of the smallest normal number.
    min_exponent: i32,
    /// The largest finite value.
    max: f64,
    /// Whether there are infinities.
    infinite: bool,
}

pub(crate) const F32: Format = Format { precision: 24, min_exponent: -126, max: f32::MAX as f64, infinite: true };
pub(crate) const TF32: Format =
    Format { precision: 11, min_exponent: -126, max: 3.401_162_134_214_653e38, infinite: true };
pub(crate) const F16: Format = Format { precision: 11, min_exponent: -14, max: 65504.0, infinite: true };
pub(crate) const BF16: Format =
    Format { precision: 8, min_exponent: -126, max: 3.389_531_389_251_535_5e38, infinite: true };
pub(crate) const E5M2: Format = Format { precision: 3, min_exponent: -14, max: 57344.0, infinite: true };

/// Rounds a value to an integer.
pub(crate) fn round_integer(value: f64, round: Round) -> f64 {
    match round {
        Round::Nearest => value.round_ties_even(),
        Round::NearestAway => value.round(),
        Round::Zero => value.trunc(),
        Round::Down => value.floor(),
        Round::Up => value.ceil(),
    }
}

/// Rounds a value to a format.
///
/// A value beyond the range becomes infinity. It becomes the largest finite value where the mode
/// points towards zero, the format has no infinity, or `saturate` is set.
pub(crate) fn quantise(value: f64, format: Format, round: Round, saturate: bool) -> f64 {
    if value == 0.0 || value.is_nan() {
        return value;
    }
    let clamp = saturate || !format.infinite;
    if value.is_infinite() {
        return if clamp { format.max.copysign(value) } else { value };
    }
    let exponent = ((value.to_bits() >> 52 & 0x7ff) as i32 - 1023).max(format.min_exponent);
    let ulp = 2f64.powi(exponent - format.precision + 1);
    let rounded = (round_integer(value / ulp, round) * ulp).copysign(value);
    if rounded.abs() <= format.max {
        return rounded;
    }
    let inwards = match round {
        Round::Zero => true,
        Round::Down => value > 0.0,
        Round::Up => value < 0.0,
        Round::Nearest | Round::NearestAway => false,
    };
    if clamp || inwards { format.max.copysign(value) } else { f64::INFINITY.copysign(value) }
}

/// Rounds to odd: `value` is rounded to nearest, and `error` has the sign of what that left out.
fn to_odd(value: f64, error: f64) -> f64 {
    if error == 0.0 || error.is_nan() || !value.is_finite() || value.to_bits() & 1 == 1 {
        return value;
    }
    if value == 0.0 {
        return f64::from_bits(1).copysign(error);
    }
    f64::from_bits(if (error > 0.0) == (value > 0.0) { value.to_bits() + 1 } else { value.to_bits() - 1 })
}

/// The sum `a + b`, rounded to odd.
pub(crate) fn sum_to_odd(a: f64, b: f64) -> f64 {
    let sum = a + b;
    let b_part = sum - a;
    to_odd(sum, (a - (sum - b_part)) + (b - b_part))
}

/// The quotient `a / b` of values of at most 24 bits, rounded to odd.
pub(crate) fn quotient_to_odd(a: f64, b: f64) -> f64 {
    let quotient = a / b;
    let remainder = (-quotient).mul_add(b, a);
    to_odd(quotient, if b < 0.0 { -remainder } else { remainder })
}

/// The square root of a value of at most 24 bits, rounded to odd.
pub(crate) fn root_to_odd(a: f64) -> f64 {
    let root = a.sqrt();
    to_odd(root, (-root).mul_add(root, a))
}

/// The value of an f16, whose bits are the low 16 of `half`. The others must be zero.
#[inline(always)]
pub(crate) fn f16_to_f32(half: u32) -> f32 {
    let magnitude = half & 0x7fff;
    // A product moves the exponent from bias 15 to bias 127. It makes subnormals normal too.
    let finite = (f32::from_bits(magnitude << 13) * f32::from_bits(0x7780_0000)).to_bits();
    let special = 0x7f80_0000 | magnitude << 13;
    f32::from_bits((half & 0x8000) << 16 | if magnitude >= 0x7c00 { special } else { finite })
}

/// The bits of the nearest f16, with ties to even. NaN becomes 0x7fff.
#[inline(always)]
pub(crate) fn f32_to_f16(value: f32) -> u32 {
    let bits = value.to_bits();
    let magnitude = bits & 0x7fff_ffff;
    // The last bit of 0.5 is worth the smallest f16. So adding 0.5 rounds a subnormal result in
    // place.
    let subnormal = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0.5f32.to_bits());
    let normal = magnitude.wrapping_add(0xc800_0fff).wrapping_add(magnitude >> 13 & 1) >> 13;
    let finite = if magnitude < 113 << 23 { subnormal } else { normal };
    let special = if magnitude > 0x7f80_0000 { 0x7fff } else { 0x7c00 };
    let sign = if magnitude > 0x7f80_0000 { 0 } else { bits >> 16 & 0x8000 };
    sign | if magnitude >= 143 << 23 { special } else { finite }
}

/// The value of a bf16, whose bits are the low 16 of `half`.
#[inline(always)]
pub(crate) fn bf16_to_f32(half: u32) -> f32 {
    f32::from_bits(half << 16)
}

/// The bits of the nearest bf16, with ties to even. NaN becomes 0x7fff.
#[inline(always)]
pub(crate) fn f32_to_bf16(value: f32) -> u32 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    if bits & 0x7fff_ffff > 0x7f80_0000 { 0x7fff } else { rounded }
}

/// The bits of a value as f16.
pub(crate) fn f64_to_f16(value: f64, round: Round, saturate: bool) -> u32 {
    f32_to_f16(quantise(value, F16, round, saturate) as f32)
}

/// The bits of a value as bf16.
pub(crate) fn f64_to_bf16(value: f64, round: Round, saturate: bool) -> u32 {
    f32_to_bf16(quantise(value, BF16, round, saturate) as f32)
}

/// The bits of `a b + c` of f16, rounded once.
pub(crate) fn fma_f16(a: u32, b: u32, c: u32) -> u32 {
    let [a, b, c] = [a, b, c].map(|half| f16_to_f32(half & 0xffff) as f64);
    f64_to_f16(sum_to_odd(a * b, c), Round::Nearest, false)
}

/// The bits of `a b + c` of bf16, rounded once.
pub(crate) fn fma_bf16(a: u32, b: u32, c: u32) -> u32 {
    let [a, b, c] = [a, b, c].map(|half| bf16_to_f32(half & 0xffff) as f64);
    f64_to_bf16(sum_to_odd(a * b, c), Round::Nearest, false)
}

/// Makes a subnormal value a zero of its sign.
#[inline(always)]
pub(crate) fn flush(value: f32) -> f32 {
    let bits = value.to_bits();
    f32::from_bits(if bits & 0x7f80_0000 == 0 { bits & 0x8000_0000 } else { bits })
}

/// 2^x, within one and a half units of the last bit. Subnormal results are kept.
#[inline(always)]
pub(crate) fn exp2(x: f32) -> f32 {
    // Beyond these values the result is 0 or infinity. A NaN stays, as both comparisons fail.
    let clamped = if x < -152.0 { -152.0 } else { x };
    let clamped = if clamped > 130.0 { 130.0 } else { clamped };
    // The sum with 1.5 * 2^23 has the nearest integer in its low bits.
    let shifted = clamped + 12_582_912.0;
    let fraction = clamped - (shifted - 12_582_912.0);
    // This is the Taylor series of exp(f ln 2), |f| <= 1/2. The first term left out is below 2^-27.
    let mut power = 1.525_273_4e-5f32;
    for term in [1.540_353e-4, 1.333_355_8e-3, 9.618_129e-3, 5.550_411e-2, 2.402_265e-1, std::f32::consts::LN_2, 1.0] {
        power = power.mul_add(fraction, term);
    }
    // There are two factors, because 2^n itself may be subnormal or too large.
    let n = (shifted.to_bits() as i32).wrapping_sub(0x4b40_0000);
    let low = n >> 1;
    let scale = |n: i32| f32::from_bits((n.wrapping_add(127) as u32) << 23);
    power * scale(low) * scale(n.wrapping_sub(low))
}

/// The lesser of two by the rules of PTX: the other one if one is a NaN, and -0 is less than +0.
#[inline(always)]
pub(crate) fn min(a: f32, b: f32) -> f32 {
    let lesser = if a < b || (a == b && a.is_sign_negative()) { a } else { b };
    let known = if a.is_nan() { b } else { lesser };
    if b.is_nan() { a } else { known }
}

/// The greater of two by the rules of PTX: the other one if one is a NaN, and +0 is more than -0.
#[inline(always)]
pub(crate) fn max(a: f32, b: f32) -> f32 {
    let greater = if a > b || (a == b && a.is_sign_positive()) { a } else { b };
    let known = if a.is_nan() { b } else { greater };
    if b.is_nan() { a } else { known }
}

/// `min.NaN` and `max.NaN`: the result, or a NaN if one of the operands is.
#[inline(always)]
pub(crate) fn or_nan(a: f32, b: f32, result: f32) -> f32 {
    if a.is_nan() | b.is_nan() { f32::from_bits(0x7fff_ffff) } else { result }
}

/// The value of an e4m3 byte. The other bits must be zero.
#[inline(always)]
pub(crate) fn e4m3_to_f32(byte: u32) -> f32 {
    let magnitude = byte & 0x7f;
    // The exponent has bias 7 in e4m3, and 127 in f32. A subnormal is a multiple of 2^-9.
    let normal = (magnitude << 20) + ((127 - 7) << 23);
    let subnormal = (magnitude as f32 * (1.0 / 512.0)).to_bits();
    let finite = if magnitude < 8 { subnormal } else { normal };
    f32::from_bits((byte & 0x80) << 24 | if magnitude == 0x7f { 0x7fff_ffff } else { finite })
}

/// The nearest e4m3 byte, with ties to even, saturated to the largest finite value. NaN becomes
/// 0x7f.
#[inline(always)]
pub(crate) fn f32_to_e4m3(value: f32) -> u32 {
    let bits = value.to_bits();
    let magnitude = bits & 0x7fff_ffff;
    // The last bit of 2^14 is worth the smallest e4m3. So adding 2^14 rounds a subnormal result in
    // place.
    let subnormal = (f32::from_bits(magnitude) + 16384.0).to_bits().wrapping_sub(16384f32.to_bits());
    let normal = magnitude.wrapping_add(0x7_ffff + (magnitude >> 20 & 1)).wrapping_sub((127 - 7) << 23) >> 20;
    let finite = if magnitude < (127 - 6) << 23 { subnormal } else { normal.min(0x7e) };
    if magnitude > 0x7f80_0000 { 0x7f } else { finite | bits >> 24 & 0x80 }
}

/// The nearest e5m2 byte, saturated to the largest finite value. It is the upper half of an f16.
pub(crate) fn f32_to_e5m2(value: f32) -> u32 {
    if value.is_nan() {
        return 0x7f;
    }
    f32_to_f16(quantise(value as f64, E5M2, Round::Nearest, true) as f32) >> 8
}
