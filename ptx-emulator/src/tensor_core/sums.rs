//! The arithmetic of Hopper's tensor cores: f32 accumulators, and products of bf16, f16 or e4m3.
//!
//! One instruction adds several products to an accumulator at once:
//!
//! 1. The largest exponent among the products and the accumulator is found.
//! 2. Each of these terms is cut, towards zero, some bits below that exponent.
//! 3. The cut terms are added exactly.
//! 4. The sum is cut, towards zero, to a number of fraction bits.
//!
//! | factors | products | bits kept below the largest exponent | fraction bits of a sum |
//! | --- | --- | --- | --- |
//! | bf16, f16 | 16 | 25 | 23, all of f32 |
//! | e4m3 | 32 | 13 | 13 |
//!
//! So an accumulator is biased towards zero, by at most [`Accumulation::largest_cut`] at each
//! instruction. Where the bits that are cut off are random, the mean is half of that. In e4m3 an
//! accumulator itself loses bits, and products 2^14 times smaller add nothing to it any more.
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

/// How one `wgmma` instruction adds products to an accumulator in f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Accumulation {
    /// How many products it adds.
    pub k: usize,
    /// How many bits it keeps below the largest exponent of products and accumulator.
    pub kept: i32,
}

impl Accumulation {
    /// Products of bf16 or of f16.
    pub const HALF: Accumulation = Accumulation { k: 16, kept: 25 };
    /// Products of e4m3.
    pub const E4M3: Accumulation = Accumulation { k: 32, kept: 13 };

    /// How many fraction bits a sum has.
    const fn fraction(self) -> i32 {
        if self.kept < 23 { self.kept } else { 23 }
    }

    /// The most that one instruction cuts from a sum.
    ///
    /// It is relative to the largest of the products, the accumulator and the sum. All terms but
    /// the largest are cut, and then the sum is. A subnormal factor counts as the smallest normal
    /// number.
    pub const fn largest_cut(self) -> f64 {
        self.k as f64 / (1u64 << self.kept) as f64 + 1.0 / (1u64 << self.fraction()) as f64
    }
}

/// The bits of a factor's fraction in [`significand`]: those of f16, which has most.
const FRACTION: i32 = 10;

/// The exponent of zero. Added to any finite exponent, it stays below that of every other product.
const NONE: i16 = -1000;
/// The exponent of infinities and NaN. Added to any exponent, it stays above that of every product
/// of finite numbers.
const SPECIAL: i16 = 3000;

/// Factors with their exponents, all of one k.
#[derive(Clone)]
pub(crate) struct Factors<const N: usize> {
    values: [f32; N],
    exponents: [i16; N],
}

/// One k of 16 rows of matrix A.
pub(crate) type Rows = Factors<16>;

/// One k of eight columns of matrix B. They stand in the order of [`fragment::even_before_odd`], in
/// which accumulators lie.
pub(crate) type Columns = Factors<8>;

impl<const N: usize> Factors<N> {
    pub const ZERO: Self = Factors { values: [0.0; N], exponents: [NONE; N] };

    #[inline(always)]
    pub fn set(&mut self, i: usize, value: f32, element: ElementType) {
        let magnitude = value.to_bits() & 0x7fff_ffff;
        let exponent = ((magnitude >> 23) as i16 - 127).max(element.smallest_exponent());
        let finite = if magnitude == 0 { NONE } else { exponent };
        self.values[i] = value;
        self.exponents[i] = if magnitude >= 0x7f80_0000 { SPECIAL } else { finite };
    }

    /// The same factors with all signs changed.
    pub fn negated(&self) -> Self {
        Factors { values: self.values.map(|value| -value), exponents: self.exponents }
    }
}

/// Every k of matrix A from its fragment, the four registers of each lane.
pub(crate) fn rows_of_registers(registers: [&Lanes<u32>; 4], element: ElementType) -> Vec<Rows> {
    let mut a = vec![Rows::ZERO; element.k()];
    for (register, lanes) in registers.iter().enumerate() {
        for (lane, bits) in lanes.iter().enumerate() {
            for i in 0..element.per_register() {
                let (row, k) = fragment::of_a(lane, register, i, element.per_register());
                a[k].set(row, element.value(*bits, i), element);
            }
        }
    }
    a
}

/// Every k of matrix B, of 16-bit elements, from its fragment, the two registers of each lane.
pub(crate) fn columns_of_registers(registers: [&Lanes<u32>; 2], element: ElementType) -> Vec<Columns> {
    let mut b = vec![Columns::ZERO; element.k()];
    for (register, lanes) in registers.iter().enumerate() {
        for (lane, bits) in lanes.iter().enumerate() {
            for half in 0..2 {
                let (k, column) = fragment::of_b(lane, register, half);
                b[k].set(fragment::even_before_odd(column), element.value(*bits, half), element);
            }
        }
    }
    b
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
/// result lies `kept` bits below the largest exponent, which is greater by `below`:
///
/// ```text
/// the largest exponent   1.xxxxxxxxxxxxxxxxxxxxxxxxx        1 and 25 bits that are kept
/// a term, 3 below           1.yyyyyyyyyyyyyyyyyyyyyy|yyy    its last 3 bits are cut
/// ```
fn align(value: i64, fraction: i32, below: i32, kept: i32) -> i64 {
    let (magnitude, down) = (value.unsigned_abs(), fraction + below - kept);
    let magnitude = (if down < 0 { magnitude << -down } else { magnitude >> down.min(63) }) as i64;
    if value < 0 { -magnitude } else { magnitude }
}

/// The bits of `sum * 2^exponent`, cut to f32 with so many fraction bits. Beyond the range of f32 it
/// is an infinity.
fn cut(sum: i64, exponent: i32, fraction: i32) -> u32 {
    let magnitude = sum.unsigned_abs();
    if magnitude == 0 {
        return 0;
    }
    let excess = (magnitude.ilog2() as i32 - fraction).max(0);
    let magnitude = magnitude >> excess << excess;
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
fn accumulate<const K: usize, const KEPT: i32>(sum: u32, factors: [[(f32, i16); 2]; K]) -> u32 {
    let value = f32::from_bits(sum);
    if !value.is_finite() || factors.iter().flatten().any(|(factor, _)| !factor.is_finite()) {
        let infinite = |[(a, _), (b, _)]: [(f32, i16); 2]| if (a * 0.0 + b * 0.0).is_nan() { a * b } else { 0.0 };
        let total = factors.map(infinite).iter().sum::<f32>() + if value.is_finite() { 0.0 } else { value };
        return if total.is_nan() { 0x7fff_ffff } else { total.to_bits() };
    }
    let exponent = exponent_of_sum(sum);
    let largest = factors.iter().map(|[(_, a), (_, b)]| (a + b) as i32).fold(exponent, i32::max);
    let products = factors.iter().map(|[(a, x), (b, y)]| {
        align(significand(*a, *x) * significand(*b, *y), 2 * FRACTION, largest - (x + y) as i32, KEPT)
    });
    let accumulator = (value as f64 * power(23 - exponent)) as i64;
    let total = align(accumulator, 23, largest - exponent, KEPT) + products.sum::<i64>();
    cut(total, largest - KEPT, Accumulation { k: K, kept: KEPT }.fraction())
}

/// Eight accumulators of a row, in the order of [`fragment::even_before_odd`].
type Eight = [[u32; 4]; 2];

/// Does what [`accumulate`] does, for eight accumulators of a row.
#[cold]
fn accumulate_row<const K: usize, const KEPT: i32>(sums: Eight, a: &[Rows; K], row: usize, b: &[Columns; K]) -> Eight {
    let one = |i: usize| {
        let factors = |k: usize| [(a[k].values[row], a[k].exponents[row]), (b[k].values[i], b[k].exponents[i])];
        accumulate::<K, KEPT>(sums[i / 4][i % 4], std::array::from_fn(factors))
    };
    [0, 4].map(|first| std::array::from_fn(|i| one(first + i)))
}

/// Adds the product of A and B to the accumulators, with one of the functions for eight of a row.
#[inline(always)]
fn multiply_with<const K: usize>(
    registers: &mut [Lanes<u32>],
    d: &[R],
    a: &[Rows],
    b: &[Columns],
    accumulate_row: impl Fn(Eight, &[Rows; K], usize, &[Columns; K]) -> Eight,
) {
    let a = a.try_into().expect("A has as many k as the instruction");
    for (columns, d) in b.as_chunks::<K>().0.iter().zip(d.as_chunks::<4>().0) {
        for row in 0..16 {
            let (lane, first) = fragment::accumulator(row, 0);
            let pair = [d[first] as usize, d[first + 1] as usize];
            let sums = pair.map(|r| *registers[r][lane..].first_chunk().expect("four neighbouring lanes"));
            for (r, sums) in pair.into_iter().zip(accumulate_row(sums, a, row, columns)) {
                registers[r][lane..lane + 4].copy_from_slice(&sums);
            }
        }
    }
}

/// The same arithmetic in vector code.
#[cfg(target_arch = "x86_64")]
mod avx2 {
    use super::*;
    use std::arch::x86_64::*;
    use std::mem::transmute;

    /// The least and the greatest ordinary exponent. Between them no sum overflows, and f32 holds
    /// every product exactly, or holds it as less than what is cut off.
    const ORDINARY: [i32; 2] = [-100, 120];

    /// Does what [`super::accumulate_row`] does, in f32 and i32 where all exponents are ordinary.
    #[target_feature(enable = "avx2")]
    pub fn accumulate_row<const K: usize, const KEPT: i32>(
        sums: Eight,
        a: &[Rows; K],
        row: usize,
        b: &[Columns; K],
    ) -> Eight {
        let mut products = _mm_set1_epi16(2 * NONE);
        for (a, b) in a.iter().zip(b) {
            // SAFETY: both types hold eight i16.
            let b = unsafe { transmute::<[i16; 8], __m128i>(b.exponents) };
            products = _mm_max_epi16(products, _mm_add_epi16(_mm_set1_epi16(a.exponents[row]), b));
        }
        let products = _mm256_cvtepi16_epi32(products);
        // SAFETY: both types hold four u32. The halves are loaded one by one, because a CPU cannot
        // forward two stores to one load.
        let [lower, upper] = sums.map(|half| unsafe { transmute::<[u32; 4], __m128i>(half) });
        let old = _mm256_set_m128i(upper, lower);
        // An exponent below -126 counts as -126 here, which is not ordinary either.
        let field = _mm256_and_si256(_mm256_srli_epi32::<23>(old), _mm256_set1_epi32(0xff));
        let exponent = _mm256_sub_epi32(_mm256_max_epi32(field, _mm256_set1_epi32(1)), _mm256_set1_epi32(127));
        let largest = _mm256_max_epi32(products, exponent);

        // An accumulator whose products are all zero stays what it is, however small, if all of its
        // bits are kept.
        let alone = _mm256_cmpgt_epi32(_mm256_set1_epi32(NONE as i32 / 2), products);
        let zero = _mm256_cmpeq_epi32(_mm256_slli_epi32::<1>(old), _mm256_setzero_si256());
        let unchanged = if KEPT >= 23 { alone } else { _mm256_and_si256(alone, zero) };
        let [low, high] = ORDINARY.map(|exponent| _mm256_set1_epi32(exponent));
        let too_small = _mm256_andnot_si256(unchanged, _mm256_cmpgt_epi32(low, largest));
        let too_large = _mm256_cmpgt_epi32(largest, high);
        if _mm256_testz_si256(_mm256_or_si256(too_small, too_large), _mm256_set1_epi32(-1)) == 0 {
            return super::accumulate_row::<K, KEPT>(sums, a, row, b);
        }

        // The exponent of the last bit kept, and the factor that makes it 1.
        let last = _mm256_sub_epi32(_mm256_max_epi32(largest, low), _mm256_set1_epi32(KEPT));
        let scale = _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_sub_epi32(_mm256_set1_epi32(127), last)));
        // The sum of products is at most 16 (2 - 2^-10)^2 2^25, which an i32 holds. The accumulator
        // is added later.
        let mut total = _mm256_setzero_si256();
        for (a, b) in a.iter().zip(b) {
            // SAFETY: both types hold eight f32.
            let b = unsafe { transmute::<[f32; 8], __m256>(b.values) };
            let product = _mm256_mul_ps(_mm256_set1_ps(a.values[row]), b);
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
        let changed = if KEPT < 23 {
            // The sum is below (4 K + 2) 2^KEPT, which an f32 holds.
            let sum = _mm256_castps_si256(_mm256_cvtepi32_ps(_mm256_add_epi32(total, accumulator)));
            let cut = _mm256_and_si256(sum, _mm256_set1_epi32(-1 << (23 - KEPT)));
            let field = _mm256_slli_epi32::<23>(_mm256_add_epi32(last, _mm256_set1_epi32(127)));
            _mm256_mul_ps(_mm256_castsi256_ps(cut), _mm256_castsi256_ps(field))
        } else {
            let halves =
                [total, accumulator, last].map(|all| [_mm256_castsi256_si128(all), _mm256_extracti128_si256::<1>(all)]);
            let [lower, upper] = [0, 1].map(|half| cut(halves[0][half], halves[1][half], halves[2][half]));
            _mm256_set_m128(upper, lower)
        };
        // An unchanged accumulator of -0 becomes +0 when zero is added.
        let kept = _mm256_add_ps(value, _mm256_setzero_ps());
        let new = _mm256_blendv_ps(changed, kept, _mm256_castsi256_ps(unchanged));
        // SAFETY: both types hold eight values of 32 bits.
        unsafe { transmute::<__m256, Eight>(new) }
    }

    #[target_feature(enable = "avx2")]
    pub fn multiply<const K: usize, const KEPT: i32>(registers: &mut [Lanes<u32>], d: &[R], a: &[Rows], b: &[Columns]) {
        multiply_with(registers, d, a, b, |sums, a, row, b| accumulate_row::<K, KEPT>(sums, a, row, b));
    }
}

/// Adds the product of A and B to the accumulators of one warp. They have 16 rows, and four
/// registers in `d` for each group of eight columns. `b` has every k of one group after that of the
/// other.
pub(crate) fn multiply(registers: &mut [Lanes<u32>], d: &[R], a: &[Rows], b: &[Columns], element: ElementType) {
    const HALF: Accumulation = Accumulation::HALF;
    const E4M3: Accumulation = Accumulation::E4M3;
    match element {
        ElementType::Bf16 | ElementType::F16 => multiply_as::<{ HALF.k }, { HALF.kept }>(registers, d, a, b),
        ElementType::E4m3 => multiply_as::<{ E4M3.k }, { E4M3.kept }>(registers, d, a, b),
    }
}

/// Does what [`multiply`] does.
///
/// A CPU without AVX2 runs the definition, which takes about twenty times as long. Plain loops in
/// place of both were tried. The AVX2 code that LLVM makes of them is a third as fast as the
/// intrinsics.
fn multiply_as<const K: usize, const KEPT: i32>(registers: &mut [Lanes<u32>], d: &[R], a: &[Rows], b: &[Columns]) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the CPU was just found to have the feature that the function is compiled for.
        return unsafe { avx2::multiply::<K, KEPT>(registers, d, a, b) };
    }
    multiply_with(registers, d, a, b, accumulate_row::<K, KEPT>);
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
            return element.value(bits >> 16, 0);
        }
        let fraction = match element {
            ElementType::Bf16 => 7,
            ElementType::F16 => 10,
            ElementType::E4m3 => 3,
        };
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
        for round in 0..30_000 {
            let (anything, spread) = (round % 5 == 0, [0, 3, 6][round / 3 % 3]);
            match [ElementType::Bf16, ElementType::F16, ElementType::E4m3][round % 3] {
                ElementType::E4m3 => compare::<32, 13>(&mut state, ElementType::E4m3, anything, spread),
                half => compare::<16, 25>(&mut state, half, anything, spread),
            }
        }
    }

    /// Compares both functions for a row of random factors.
    #[cfg(target_arch = "x86_64")]
    fn compare<const K: usize, const KEPT: i32>(state: &mut u64, element: ElementType, anything: bool, spread: u64) {
        let mut top = |low: i32, count: u64| low + (random(state) % count) as i32;
        let tops = match element {
            ElementType::Bf16 => [top(-80, 160), top(-60, 120)],
            ElementType::F16 => [top(-8, 22), top(-8, 22)],
            ElementType::E4m3 => [top(-3, 11), top(-3, 11)],
        };
        let (mut a, mut b) = ([const { Rows::ZERO }; K], [const { Columns::ZERO }; K]);
        for (a, b) in a.iter_mut().zip(&mut b) {
            a.set(0, value(state, element, tops[0], spread, anything), element);
            // All products of the last column are zero.
            (0..7).for_each(|i| b.set(i, value(state, element, tops[1], spread, anything), element));
        }
        let mut sum = |i| match i {
            0 => 0,
            1 if anything => random(state) as u32,
            _ => {
                let exponent = (tops[0] + tops[1] + 30 - (random(state) % 60) as i32).clamp(-126, 127);
                (random(state) as u32 & 0x807f_ffff) | ((exponent + 127) as u32) << 23
            }
        };
        let sums = [0, 4].map(|first| std::array::from_fn(|i| sum(first + i)));
        // SAFETY: the CPU has the feature, or the test has returned.
        let found = unsafe { avx2::accumulate_row::<K, KEPT>(sums, &a, 0, &b) };
        assert_eq!(found, accumulate_row::<K, KEPT>(sums, &a, 0, &b), "{element:?}: {sums:08x?}");
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
            assert_eq!(cut(sum, exponent, 23), expected.to_bits(), "{sum} * 2^{exponent}");
        }
        for (sum, expected) in [((1 << 14) + 1, 16384.0f32), (-(1 << 15) - 3, -32768.0), ((1 << 14) - 1, 16383.0)] {
            assert_eq!(cut(sum, 0, 13), expected.to_bits(), "{sum}, cut to 13 bits");
        }
    }
}
