//! Number formats and roundings that Rust does not have: f16, bf16, fp8, directed rounding, `ex2`.
//!
//! The functions that kernels call a million times (`f16_to_f32`, `f32_to_f16`, `f32_to_bf16`, `exp2`) have no branches, so that
//! a loop over 32 lanes becomes vector code. The others compute in f64, rounding to odd where a sum is not exact: with at least
//! two more bits than the target, a second rounding of an odd value is right in every mode (Boldo and Melquiond, 2008).

/// Rounding modes of floating-point results.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Round {
    /// To nearest, ties to even: `.rn`.
    Nearest,
    /// To nearest, ties away from zero: `.rna`.
    NearestAway,
    /// Towards zero: `.rz`.
    Zero,
    /// Towards minus infinity: `.rm`.
    Down,
    /// Towards plus infinity: `.rp`.
    Up,
}

/// A binary format: `precision` bits with the hidden one, smallest normal exponent, largest finite value, and infinity or not.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Format {
    precision: i32,
    min_exponent: i32,
    max: f64,
    infinite: bool,
}

pub(crate) const F32: Format = Format { precision: 24, min_exponent: -126, max: f32::MAX as f64, infinite: true };
pub(crate) const TF32: Format =
    Format { precision: 11, min_exponent: -126, max: 3.401_162_134_214_653e38, infinite: true };
pub(crate) const F16: Format = Format { precision: 11, min_exponent: -14, max: 65504.0, infinite: true };
pub(crate) const BF16: Format =
    Format { precision: 8, min_exponent: -126, max: 3.389_531_389_251_535_5e38, infinite: true };
pub(crate) const E4M3: Format = Format { precision: 4, min_exponent: -6, max: 448.0, infinite: false };
pub(crate) const E5M2: Format = Format { precision: 3, min_exponent: -14, max: 57344.0, infinite: true };

/// `value` rounded to an integer.
pub(crate) fn round_integer(value: f64, round: Round) -> f64 {
    match round {
        Round::Nearest => value.round_ties_even(),
        Round::NearestAway => value.round(),
        Round::Zero => value.trunc(),
        Round::Down => value.floor(),
        Round::Up => value.ceil(),
    }
}

/// `value` rounded to the format. Overflow gives infinity, or the largest finite value where the mode points inwards, the format
/// has no infinity, or `saturate` is set.
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

/// A rounded result and the sign of what was cut off, made odd.
fn to_odd(value: f64, error: f64) -> f64 {
    if error == 0.0 || error.is_nan() || !value.is_finite() || value.to_bits() & 1 == 1 {
        return value;
    }
    if value == 0.0 {
        return f64::from_bits(1).copysign(error);
    }
    f64::from_bits(if (error > 0.0) == (value > 0.0) { value.to_bits() + 1 } else { value.to_bits() - 1 })
}

/// `a + b` rounded to odd.
pub(crate) fn sum_to_odd(a: f64, b: f64) -> f64 {
    let sum = a + b;
    let b_part = sum - a;
    to_odd(sum, (a - (sum - b_part)) + (b - b_part))
}

/// `a / b` rounded to odd, for values of at most 24 bits.
pub(crate) fn quotient_to_odd(a: f64, b: f64) -> f64 {
    let quotient = a / b;
    let remainder = (-quotient).mul_add(b, a);
    to_odd(quotient, if b < 0.0 { -remainder } else { remainder })
}

/// Square root rounded to odd, for values of at most 24 bits.
pub(crate) fn root_to_odd(a: f64) -> f64 {
    let root = a.sqrt();
    to_odd(root, (-root).mul_add(root, a))
}

/// Value of an f16 in the low half.
#[inline(always)]
pub(crate) fn f16_to_f32(half: u32) -> f32 {
    let magnitude = half & 0x7fff;
    // The exponent moves from bias 15 to bias 127 by a product, which normalises subnormals too.
    let finite = (f32::from_bits(magnitude << 13) * f32::from_bits(0x7780_0000)).to_bits();
    let special = 0x7f80_0000 | magnitude << 13;
    f32::from_bits((half & 0x8000) << 16 | if magnitude >= 0x7c00 { special } else { finite })
}

/// Nearest f16, ties to even; NaN becomes 0x7fff.
#[inline(always)]
pub(crate) fn f32_to_f16(value: f32) -> u32 {
    let bits = value.to_bits();
    let magnitude = bits & 0x7fff_ffff;
    // 0.5 has the ulp of the smallest f16: adding it rounds a subnormal result in place.
    let subnormal = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0.5f32.to_bits());
    let normal = magnitude.wrapping_add(0xc800_0fff).wrapping_add(magnitude >> 13 & 1) >> 13;
    let finite = if magnitude < 113 << 23 { subnormal } else { normal };
    let special = if magnitude > 0x7f80_0000 { 0x7fff } else { 0x7c00 };
    let sign = if magnitude > 0x7f80_0000 { 0 } else { bits >> 16 & 0x8000 };
    sign | if magnitude >= 143 << 23 { special } else { finite }
}

/// Value of a bf16 in the low half.
#[inline(always)]
pub(crate) fn bf16_to_f32(half: u32) -> f32 {
    f32::from_bits(half << 16)
}

/// Nearest bf16, ties to even; NaN becomes 0x7fff.
#[inline(always)]
pub(crate) fn f32_to_bf16(value: f32) -> u32 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    if bits & 0x7fff_ffff > 0x7f80_0000 { 0x7fff } else { rounded }
}

/// f16 of a value in f64.
pub(crate) fn f64_to_f16(value: f64, round: Round, saturate: bool) -> u32 {
    f32_to_f16(quantise(value, F16, round, saturate) as f32)
}

/// bf16 of a value in f64.
pub(crate) fn f64_to_bf16(value: f64, round: Round, saturate: bool) -> u32 {
    f32_to_bf16(quantise(value, BF16, round, saturate) as f32)
}

/// f16 bits of the fused `a b + c`.
pub(crate) fn fma_f16(a: u32, b: u32, c: u32) -> u32 {
    let [a, b, c] = [a, b, c].map(|half| f16_to_f32(half & 0xffff) as f64);
    f64_to_f16(sum_to_odd(a * b, c), Round::Nearest, false)
}

/// bf16 bits of the fused `a b + c`.
pub(crate) fn fma_bf16(a: u32, b: u32, c: u32) -> u32 {
    let [a, b, c] = [a, b, c].map(|half| bf16_to_f32(half & 0xffff) as f64);
    f64_to_bf16(sum_to_odd(a * b, c), Round::Nearest, false)
}

/// Subnormals become zeros of their sign.
#[inline(always)]
pub(crate) fn flush(value: f32) -> f32 {
    let bits = value.to_bits();
    f32::from_bits(if bits & 0x7f80_0000 == 0 { bits & 0x8000_0000 } else { bits })
}

/// 2^x within one and a half ulp; subnormal results are kept.
#[inline(always)]
pub(crate) fn exp2(x: f32) -> f32 {
    // Beyond these the result is 0 or infinity. A NaN passes both comparisons by.
    let clamped = if x < -152.0 { -152.0 } else { x };
    let clamped = if clamped > 130.0 { 130.0 } else { clamped };
    // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
    let shifted = clamped + 12_582_912.0;
    let fraction = clamped - (shifted - 12_582_912.0);
    // Taylor series of exp(f ln 2), |f| <= 1/2: the first term left out is below 2^-27.
    let mut power = 1.525_273_4e-5f32;
    for term in [1.540_353e-4, 1.333_355_8e-3, 9.618_129e-3, 5.550_411e-2, 2.402_265e-1, std::f32::consts::LN_2, 1.0] {
        power = power.mul_add(fraction, term);
    }
    // Two factors, because 2^n itself may be subnormal or too large.
    let n = (shifted.to_bits() as i32).wrapping_sub(0x4b40_0000);
    let low = n >> 1;
    let scale = |n: i32| f32::from_bits((n.wrapping_add(127) as u32) << 23);
    power * scale(low) * scale(n.wrapping_sub(low))
}

/// Lesser of two, PTX rules: a NaN loses, -0 is less than +0.
#[inline(always)]
pub(crate) fn min(a: f32, b: f32) -> f32 {
    let lesser = if a < b || (a == b && a.is_sign_negative()) { a } else { b };
    let known = if a.is_nan() { b } else { lesser };
    if b.is_nan() { a } else { known }
}

/// Greater of two, PTX rules.
#[inline(always)]
pub(crate) fn max(a: f32, b: f32) -> f32 {
    let greater = if a > b || (a == b && a.is_sign_positive()) { a } else { b };
    let known = if a.is_nan() { b } else { greater };
    if b.is_nan() { a } else { known }
}

/// `result`, or a NaN if one of the operands is: `min.NaN`, `max.NaN`.
#[inline(always)]
pub(crate) fn or_nan(a: f32, b: f32, result: f32) -> f32 {
    if a.is_nan() | b.is_nan() { f32::from_bits(0x7fff_ffff) } else { result }
}

/// Value of an e4m3 byte.
pub(crate) fn e4m3_to_f32(byte: u32) -> f32 {
    let (exponent, mantissa) = ((byte >> 3 & 15) as i32, (byte & 7) as f32);
    let magnitude = match (exponent, byte & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa * 2f32.powi(-9),
        _ => (8.0 + mantissa) * 2f32.powi(exponent - 10),
    };
    if byte & 0x80 != 0 { -magnitude } else { magnitude }
}

/// Nearest e4m3 byte, saturated to the largest finite value.
pub(crate) fn f32_to_e4m3(value: f32) -> u32 {
    if value.is_nan() {
        return 0x7f;
    }
    let magnitude = quantise(value as f64, E4M3, Round::Nearest, true).abs();
    // Non-negative values order as their bytes do, and the value is exact: halve the interval.
    let byte = (0..0x7f).collect::<Vec<u32>>().partition_point(|&byte| (e4m3_to_f32(byte) as f64) < magnitude) as u32;
    byte | if value.is_sign_negative() { 0x80 } else { 0 }
}

/// Nearest e5m2 byte, saturated to the largest finite value: the upper half of an f16.
pub(crate) fn f32_to_e5m2(value: f32) -> u32 {
    if value.is_nan() {
        return 0x7f;
    }
    f32_to_f16(quantise(value as f64, E5M2, Round::Nearest, true) as f32) >> 8
}
