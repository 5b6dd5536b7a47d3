//! The arithmetic of Hopper's tensor cores: f32 accumulators, and products of bf16 or f16.
//!
//! One instruction adds [`K`] products to an accumulator at once:
//!
//! 1. The largest exponent among the 17 terms is found.
//! 2. Each term is cut, towards zero, [`KEPT`] bits below that exponent.
//! 3. The cut terms are added exactly.
//! 4. The sum is cut to f32.
//!
//! So an accumulator is biased towards zero, by at most [`LARGEST_CUT`] at each instruction. Where
//! the bits that are cut off are random, the mean is half of that.
//!
//! The exponent of a product is the sum of its factors' exponents, whatever its mantissa, which
//! lies in [1, 4). Subnormal factors have the exponent of the smallest normal number. A product
//! with a zero has no exponent. A subnormal accumulator has the exponent -126, and a zero
//! accumulator -128. So products below 2^-128 are aligned to 2^-128, and not to each other.
//!
//! `tests/data/wgmma-h200.bin` holds what an NVIDIA H200 computed (driver 580.159.04, CUDA 13.0)
//! for the cases of `tests/common/tensor_core.rs`, and `tests/tensor_core.rs` compares every bit.
//! The example `wgmma_probe` writes such a file on another GPU. Another family of instructions may
//! cut elsewhere, and must be measured in the same way.

use super::ElementType;
use super::fragment;
use crate::alu::Lanes;
use crate::isa::R;

/// How many products one instruction adds to an accumulator.
pub(crate) const K: usize = 16;

/// How many bits below the largest exponent are kept.
pub(crate) const KEPT: i32 = 25;

/// The most that one `wgmma` instruction of 16 products cuts from a sum in f32.
///
/// It is relative to the largest of the 17 terms and the sum. The 16 terms beside the largest are
/// cut, and then the sum is. A subnormal factor counts as the smallest normal number.
pub const LARGEST_CUT: f64 = K as f64 / (1u64 << KEPT) as f64 + 1.0 / (1u64 << 23) as f64;

/// The bits of a factor's fraction in [`significand`]: those of f16, which has more than bf16.
const FRACTION: i32 = 10;

/// The exponent of zero. Added to any finite exponent, it stays below that of every other product.
const NONE: i16 = -1000;
/// The exponent of infinities and NaN. Added to any exponent, it stays above that of every product
/// of finite numbers.
const SPECIAL: i16 = 3000;

/// Factors with their exponents.
#[derive(Clone)]
pub(crate) struct Factors<const N: usize, const M: usize> {
    values: [[f32; N]; M],
    exponents: [[i16; N]; M],
}

/// 16 rows of matrix A, each with [`K`] values.
pub(crate) type Rows = Factors<K, 16>;

/// Eight columns of matrix B. Each k has one value of each column, in the order of
/// [`fragment::even_before_odd`], in which accumulators lie.
pub(crate) type Columns = Factors<8, K>;

impl<const N: usize, const M: usize> Factors<N, M> {
    pub const ZERO: Self = Factors { values: [[0.0; N]; M], exponents: [[NONE; N]; M] };

    #[inline(always)]
    pub fn set(&mut self, i: usize, j: usize, value: f32, element: ElementType) {
        let magnitude = value.to_bits() & 0x7fff_ffff;
        let exponent = ((magnitude >> 23) as i16 - 127).max(element.smallest_exponent());
        let finite = if magnitude == 0 { NONE } else { exponent };
        self.values[i][j] = value;
        self.exponents[i][j] = if magnitude >= 0x7f80_0000 { SPECIAL } else { finite };
    }

    /// The same factors with all signs changed.
    pub fn negated(&self) -> Self {
        Factors { values: self.values.map(|row| row.map(|value| -value)), exponents: self.exponents }
    }
}

impl Rows {
    /// Matrix A from its fragment, the four registers of each lane.
    pub fn from_registers(registers: [&Lanes<u32>; 4], element: ElementType) -> Rows {
        let mut a = Rows::ZERO;
        for (register, lanes) in registers.iter().enumerate() {
            for (lane, bits) in lanes.iter().enumerate() {
                for half in 0..2 {
                    let (row, k) = fragment::of_a(lane, register, half);
                    a.set(row, k, element.value(bits >> (16 * half)), element);
                }
            }
        }
        a
    }
}

impl Columns {
    /// Matrix B of one step from its fragment, the two registers of each lane.
    pub fn from_registers(registers: [&Lanes<u32>; 2], element: ElementType) -> Columns {
        let mut b = Columns::ZERO;
        for (register, lanes) in registers.iter().enumerate() {
            for (lane, bits) in lanes.iter().enumerate() {
                for half in 0..2 {
                    let (k, column) = fragment::of_b(lane, register, half);
                    b.set(k, fragment::even_before_odd(column), element.value(bits >> (16 * half)), element);
                }
            }
        }
        b
    }
}

/// The exponent of a finite accumulator.
fn exponent_of_sum(bits: u32) -> i32 {
    if bits << 1 == 0 { -128 } else { (bits >> 23 & 0xff).max(1) as i32 - 127 }
}

/// 2^n, which must be a normal f64.
fn power(n: i32) -> f64 {
    f64::from_bits(((1023 + n) as u64) << 52)
}

/// A factor as an integer, whose last bit lies [`FRACTION`] bits below the exponent.
fn significand(value: f32, exponent: i16) -> i64 {
    (value as f64 * power(FRACTION - exponent as i32)) as i64
}

/// Moves a term to the place of the largest exponent, and cuts what falls off.
///
/// The last bit of `value` lies `fraction` bits below the term's exponent. The last bit of the
/// result lies [`KEPT`] bits below the largest exponent, which is greater by `below`:
///
/// ```text
/// the largest exponent   1.xxxxxxxxxxxxxxxxxxxxxxxxx        1 and KEPT bits
/// a term, 3 below           1.yyyyyyyyyyyyyyyyyyyyyy|yyy    its last 3 bits are cut
/// ```
fn align(value: i64, fraction: i32, below: i32) -> i64 {
    let magnitude = (value.unsigned_abs() << (KEPT - fraction) >> below.min(63)) as i64;
    if value < 0 { -magnitude } else { magnitude }
}

/// The bits of `sum * 2^exponent`, cut to f32. Beyond the range of f32 it is an infinity.
fn cut(sum: i64, exponent: i32) -> u32 {
    let magnitude = sum.unsigned_abs();
    if magnitude == 0 {
        return 0;
    }
    let sign = if sum < 0 { 1 << 31 } else { 0 };
    // The exponent of the last bit of the result; that of a subnormal number is -149.
    let last = (magnitude.ilog2() as i32 + exponent - 23).max(-149);
    if last > 127 - 23 {
        return sign | 0x7f80_0000;
    }
    let down = last - exponent;
    let significand = if down < 0 { magnitude << -down } else { magnitude >> down.min(63) };
    // The hidden bit of a normal number adds one to the exponent field.
    sign | ((((last + 149) as u32) << 23) + significand as u32)
}

/// The accumulator after one instruction: the definition of the arithmetic, for every input.
fn accumulate(sum: u32, factors: [[(f32, i16); 2]; K]) -> u32 {
    let value = f32::from_bits(sum);
    if !value.is_finite() || factors.iter().flatten().any(|(factor, _)| !factor.is_finite()) {
        let infinite = |[(a, _), (b, _)]: [(f32, i16); 2]| if (a * 0.0 + b * 0.0).is_nan() { a * b } else { 0.0 };
        let total = factors.map(infinite).iter().sum::<f32>() + if value.is_finite() { 0.0 } else { value };
        return if total.is_nan() { 0x7fff_ffff } else { total.to_bits() };
    }
    let exponent = exponent_of_sum(sum);
    let largest = factors.iter().map(|[(_, a), (_, b)]| (a + b) as i32).fold(exponent, i32::max);
    let products = factors.iter().map(|[(a, x), (b, y)]| {
        align(significand(*a, *x) * significand(*b, *y), 2 * FRACTION, largest - (x + y) as i32)
    });
    let accumulator = (value as f64 * power(23 - exponent)) as i64;
    cut(align(accumulator, 23, largest - exponent) + products.sum::<i64>(), largest - KEPT)
}

/// Does what [`accumulate`] does, for eight accumulators of a row.
#[cold]
fn accumulate_row(sums: [u32; 8], a: (&[f32; K], &[i16; K]), b: &Columns) -> [u32; 8] {
    std::array::from_fn(|i| {
        let factors = |k: usize| [(a.0[k], a.1[k]), (b.values[k][i], b.exponents[k][i])];
        accumulate(sums[i], std::array::from_fn(factors))
    })
}

/// Adds the product of A and B to the accumulators, with one of the functions for eight of a row.
#[inline(always)]
fn multiply_with(
    registers: &mut [Lanes<u32>],
    d: &[R],
    a: &Rows,
    b: &[Columns],
    accumulate_row: impl Fn([u32; 8], (&[f32; K], &[i16; K]), &Columns) -> [u32; 8],
) {
    for (columns, d) in b.iter().zip(d.as_chunks::<4>().0) {
        for row in 0..16 {
            let (lane, first) = fragment::accumulator(row, 0);
            let pair = [d[first] as usize, d[first + 1] as usize];
            let sums = std::array::from_fn(|i| registers[pair[i / 4]][lane + i % 4]);
            let sums = accumulate_row(sums, (&a.values[row], &a.exponents[row]), columns);
            registers[pair[0]][lane..lane + 4].copy_from_slice(&sums[..4]);
            registers[pair[1]][lane..lane + 4].copy_from_slice(&sums[4..]);
        }
    }
}

/// The same arithmetic in vector code.
#[cfg(target_arch = "x86_64")]
mod avx2 {
    use super::*;
    use std::arch::x86_64::*;

    /// The least and the greatest ordinary exponent. Between them no sum overflows, and f32 holds
    /// every product exactly, or holds it as less than what is cut off.
    const ORDINARY: [i32; 2] = [-100, 120];

    /// Does what [`super::accumulate_row`] does, in f32 and i32 where all exponents are ordinary.
    #[target_feature(enable = "avx2")]
    pub fn accumulate_row(sums: [u32; 8], a: (&[f32; K], &[i16; K]), b: &Columns) -> [u32; 8] {
        let mut products = _mm_set1_epi16(2 * NONE);
        for (a, b) in a.1.iter().zip(&b.exponents) {
            // SAFETY: the array has eight i16.
            let b = unsafe { _mm_loadu_si128(b.as_ptr().cast()) };
            products = _mm_max_epi16(products, _mm_add_epi16(_mm_set1_epi16(*a), b));
        }
        let products = _mm256_cvtepi16_epi32(products);
        // SAFETY: the array has eight u32.
        let old = unsafe { _mm256_loadu_si256(sums.as_ptr().cast()) };
        // An exponent below -126 counts as -126 here, which is not ordinary either.
        let field = _mm256_and_si256(_mm256_srli_epi32::<23>(old), _mm256_set1_epi32(0xff));
        let exponent = _mm256_sub_epi32(_mm256_max_epi32(field, _mm256_set1_epi32(1)), _mm256_set1_epi32(127));
        let largest = _mm256_max_epi32(products, exponent);

        // An accumulator whose products are all zero stays what it is, however small.
        let unchanged = _mm256_cmpgt_epi32(_mm256_set1_epi32(NONE as i32 / 2), products);
        let [low, high] = ORDINARY.map(|exponent| _mm256_set1_epi32(exponent));
        let too_small = _mm256_andnot_si256(unchanged, _mm256_cmpgt_epi32(low, largest));
        let too_large = _mm256_cmpgt_epi32(largest, high);
        if _mm256_testz_si256(_mm256_or_si256(too_small, too_large), _mm256_set1_epi32(-1)) == 0 {
            return super::accumulate_row(sums, a, b);
        }

        // The exponent of the last bit kept, and the factor that makes it 1.
        let last = _mm256_sub_epi32(_mm256_max_epi32(largest, low), _mm256_set1_epi32(KEPT));
        let scale = _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_sub_epi32(_mm256_set1_epi32(127), last)));
        // The sum of products is at most 16 (2 - 2^-10)^2 2^25, which an i32 holds. The accumulator
        // is added later.
        let mut total = _mm256_setzero_si256();
        for (a, b) in a.0.iter().zip(&b.values) {
            // SAFETY: the array has eight f32.
            let product = _mm256_mul_ps(_mm256_set1_ps(*a), unsafe { _mm256_loadu_ps(b.as_ptr()) });
            total = _mm256_add_epi32(total, _mm256_cvttps_epi32(_mm256_mul_ps(product, scale)));
        }
        let value = _mm256_castsi256_ps(old);
        let accumulator = _mm256_cvttps_epi32(_mm256_mul_ps(value, scale));
        let cut = |total, accumulator, last| {
            // The last 29 bits of the f64's fraction are cut. What remains is an f32, normal or
            // zero.
            let exact = _mm256_castpd_si256(_mm256_add_pd(_mm256_cvtepi32_pd(total), _mm256_cvtepi32_pd(accumulator)));
            let cut = _mm256_castsi256_pd(_mm256_slli_epi64::<29>(_mm256_srli_epi64::<29>(exact)));
            let field = _mm256_add_epi64(_mm256_cvtepi32_epi64(last), _mm256_set1_epi64x(1023));
            _mm256_cvtpd_ps(_mm256_mul_pd(cut, _mm256_castsi256_pd(_mm256_slli_epi64::<52>(field))))
        };
        let halves =
            [total, accumulator, last].map(|all| [_mm256_castsi256_si128(all), _mm256_extracti128_si256::<1>(all)]);
        let [lower, upper] = [0, 1].map(|half| cut(halves[0][half], halves[1][half], halves[2][half]));
        // An unchanged accumulator of -0 becomes +0 when zero is added.
        let kept = _mm256_add_ps(value, _mm256_setzero_ps());
        let new = _mm256_blendv_ps(_mm256_set_m128(upper, lower), kept, _mm256_castsi256_ps(unchanged));
        let mut sums = [0; 8];
        // SAFETY: the array has eight u32.
        unsafe { _mm256_storeu_ps(sums.as_mut_ptr().cast(), new) };
        sums
    }

    #[target_feature(enable = "avx2")]
    pub fn multiply(registers: &mut [Lanes<u32>], d: &[R], a: &Rows, b: &[Columns]) {
        multiply_with(registers, d, a, b, |sums, a, b| accumulate_row(sums, a, b));
    }
}

/// Adds the product of A and B to the accumulators of one warp. They have 16 rows, and four
/// registers in `d` for each group of eight columns in `b`.
///
/// A CPU without AVX2 runs the definition, which takes about twenty times as long. Plain loops in
/// place of both were tried. The AVX2 code that LLVM makes of them is a third as fast as the
/// intrinsics.
pub(crate) fn multiply(registers: &mut [Lanes<u32>], d: &[R], a: &Rows, b: &[Columns]) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the CPU was just found to have the feature that the function is compiled for.
        return unsafe { avx2::multiply(registers, d, a, b) };
    }
    multiply_with(registers, d, a, b, accumulate_row);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The generator splitmix64 (Steele, Lea and Flood 2014).
    fn random(state: &mut u64) -> u64 {
        *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = *state;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// A random value with an exponent from `top - spread` to `top`. Now and then it is a zero, and
    /// if `anything` is set, any bits.
    fn value(state: &mut u64, element: ElementType, top: i32, spread: u64, anything: bool) -> f32 {
        let bits = random(state) as u32;
        if anything && bits.is_multiple_of(16) {
            return element.value(bits >> 16);
        }
        let fraction = if element == ElementType::F16 { 10 } else { 7 };
        let mantissa = 1.0 + (bits >> (32 - fraction)) as f32 / (1u32 << fraction) as f32;
        let exponent = top - (random(state) % (spread + 1)) as i32;
        let value = if bits.is_multiple_of(13) { 0.0 } else { mantissa * 2f32.powi(exponent) };
        if bits & 1 << 10 != 0 { -value } else { value }
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn vectors_are_what_single_accumulators_are() {
        if !is_x86_feature_detected!("avx2") {
            return;
        }
        let mut state = 1;
        for round in 0..20_000 {
            let element = if round % 2 == 0 { ElementType::Bf16 } else { ElementType::F16 };
            let anything = round % 5 == 0;
            let tops: [i32; 3] = match element {
                ElementType::F16 => [(random(&mut state) % 22) as i32 - 8, (random(&mut state) % 22) as i32 - 8, 0],
                ElementType::Bf16 => {
                    [(random(&mut state) % 160) as i32 - 80, (random(&mut state) % 120) as i32 - 60, 0]
                }
            };
            let spread = [0, 3, 6][round / 2 % 3];
            let (mut a, mut b) = (Rows::ZERO, Columns::ZERO);
            for k in 0..K {
                a.set(0, k, value(&mut state, element, tops[0], spread, anything), element);
                for i in 0..8 {
                    b.set(k, i, value(&mut state, element, tops[1], spread, anything), element);
                }
            }
            let sums: [u32; 8] = std::array::from_fn(|i| match i {
                0 => 0,
                1 if anything => random(&mut state) as u32,
                _ => {
                    let exponent = (tops[0] + tops[1] + 30 - (random(&mut state) % 60) as i32).clamp(-126, 127);
                    (random(&mut state) as u32 & 0x807f_ffff) | ((exponent + 127) as u32) << 23
                }
            });
            let row = (&a.values[0], &a.exponents[0]);
            // SAFETY: the CPU has the feature, or the test has returned.
            let found = unsafe { avx2::accumulate_row(sums, row, &b) };
            assert_eq!(found, accumulate_row(sums, row, &b), "round {round}: {sums:08x?}");
        }
    }

    #[test]
    fn cut_is_towards_zero_in_every_range() {
        for (sum, exponent, expected) in [
            (1, 0, 1.0f32),
            (-3, -1, -1.5),
            ((1 << 24) + 1, 0, 16_777_216.0),
            ((1 << 25) + 3, 0, 33_554_432.0),
            (-(1 << 25) - 3, 0, -33_554_432.0),
            ((1 << 24) - 1, 104, f32::MAX),
            ((1 << 25) - 1, 103, f32::MAX),
            (1 << 24, 104, f32::INFINITY),
            (7, -151, f32::from_bits(1)),
            (-3, -151, -0.0),
            (0, 0, 0.0),
            ((1 << 24) - 1, -150, f32::from_bits((1 << 23) - 1)),
        ] {
            assert_eq!(cut(sum, exponent), expected.to_bits(), "{sum} * 2^{exponent}");
        }
    }
}
