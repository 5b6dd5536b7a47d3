//! The types of numbers that tensor cores multiply, as far as the reference and tolerances depend
//! on them.

use framestride::shapes::spec::{Compute, Dtype, Spec};
use ptx_emulator::Accumulation;

use crate::tensors::{narrow, widen};

/// What **attention** rounds Q, K, V and the weights to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ComputeType {
    /// bf16: 8 bits of precision.
    Bf16,
    /// f16: 11 bits.
    F16,
    /// e4m3: 4 bits. V is multiplied without its mean ([`Center`](crate::reference::Center)).
    E4m3,
}

impl From<Dtype> for ComputeType {
    fn from(dtype: Dtype) -> ComputeType {
        match dtype {
            Dtype::Bf16 => ComputeType::Bf16,
            Dtype::F16 => ComputeType::F16,
        }
    }
}

impl ComputeType {
    /// What attention of a spec multiplies, where no head is in another precision.
    pub fn of(spec: &Spec) -> ComputeType {
        ComputeType::in_precision(spec, spec.compute)
    }

    /// What heads of a spec multiply in a precision.
    pub fn in_precision(spec: &Spec, precision: Compute) -> ComputeType {
        match precision {
            Compute::Dtype => spec.dtype.into(),
            Compute::E4m3 => ComputeType::E4m3,
        }
    }

    /// Bytes of an element.
    pub fn bytes(self) -> usize {
        match self {
            ComputeType::Bf16 | ComputeType::F16 => 2,
            ComputeType::E4m3 => 1,
        }
    }

    /// The nearest value of the type. Of two equally near, it is the one whose last bit is 0.
    /// Beyond its range, e4m3 has its largest value.
    pub fn round(self, value: f64) -> f64 {
        match self {
            ComputeType::Bf16 => widen(Dtype::Bf16, narrow(Dtype::Bf16, value)),
            ComputeType::F16 => widen(Dtype::F16, narrow(Dtype::F16, value)),
            ComputeType::E4m3 => ((value / self.step(value)).round_ties_even() * self.step(value)).clamp(-448.0, 448.0),
        }
    }

    /// The distance of the type's numbers around a value. Subnormal numbers have the distance of
    /// the smallest normal ones.
    pub fn step(self, value: f64) -> f64 {
        let (smallest_exponent, fraction_bits) = match self {
            ComputeType::Bf16 => (-126, 7),
            ComputeType::F16 => (-14, 10),
            ComputeType::E4m3 => (SMALLEST_EXPONENT, 3),
        };
        power(exponent(value).max(smallest_exponent) - fraction_bits)
    }

    /// What stands for a row of Q or K when it is rounded. In 8 bits, each block of 8 channels is
    /// multiplied by an orthogonal matrix, so products of two such rows stay what they are.
    pub fn transformed(self, row: &[f64]) -> Vec<f64> {
        const SIGNS: [f64; 8] = [1.0, 1.0, 1.0, -1.0, 1.0, 1.0, -1.0, 1.0];
        match self {
            ComputeType::Bf16 | ComputeType::F16 => row.to_vec(),
            ComputeType::E4m3 => {
                let element = |i: usize, x: f64, j: usize| if (i & j).count_ones().is_multiple_of(2) { x } else { -x };
                let of_block = |block: &[f64], i: usize| -> f64 {
                    block.iter().zip(SIGNS).enumerate().map(|(j, (x, sign))| element(i, x * sign, j)).sum()
                };
                let blocks = row.chunks_exact(8);
                blocks.flat_map(|block| (0..8).map(move |i| of_block(block, i) / 8f64.sqrt())).collect()
            }
        }
    }

    /// Largest relative error of rounding to the type.
    pub fn unit_roundoff(self) -> f64 {
        match self {
            ComputeType::Bf16 => 1.0 / 256.0,
            ComputeType::F16 => 1.0 / 2048.0,
            ComputeType::E4m3 => 1.0 / 16.0,
        }
    }

    /// Largest absolute error of rounding a number too small for full precision.
    pub fn smallest_error(self) -> f64 {
        self.step(0.0) / 2.0
    }

    /// Scores that are no further apart may have weights that are rounded the same way. Such
    /// weights differ by at most a quarter of the distance of two neighbouring numbers of the type.
    /// f16 takes the distance of bf16.
    pub fn alike(self) -> f64 {
        match self {
            ComputeType::Bf16 | ComputeType::F16 => 1.0 / 1024.0,
            ComputeType::E4m3 => 1.0 / 64.0,
        }
    }

    /// How tensor cores add products.
    pub fn accumulation(self) -> Accumulation {
        match self {
            ComputeType::Bf16 | ComputeType::F16 => Accumulation::HALF,
            ComputeType::E4m3 => Accumulation::E4M3,
        }
    }

    /// How many keys have their products with V in one accumulator, if not all keys of a row have.
    /// Accumulators are added in f32.
    pub fn accumulated_keys(self) -> Option<usize> {
        match self {
            ComputeType::Bf16 | ComputeType::F16 => None,
            ComputeType::E4m3 => Some(128),
        }
    }
}

/// The value of an e4m3 byte: a sign, 4 bits of the exponent with bias 7, and 3 of the fraction.
pub(crate) fn e4m3(byte: u8) -> f64 {
    let (exponent, fraction) = (i32::from(byte >> 3 & 15), f64::from(byte & 7) / 8.0);
    let magnitude = match (exponent, byte & 7) {
        (15, 7) => f64::NAN,
        (0, _) => fraction * power(SMALLEST_EXPONENT),
        _ => (1.0 + fraction) * power(exponent - 7),
    };
    if byte & 0x80 == 0 { magnitude } else { -magnitude }
}

/// The exponent of the smallest normal e4m3, which subnormal ones have too.
const SMALLEST_EXPONENT: i32 = -6;

/// The exponent of a number. That of 0 is below all others.
fn exponent(value: f64) -> i32 {
    (value.to_bits() >> 52 & 0x7ff) as i32 - 1023
}

/// 2^n, which must be a normal f64.
fn power(n: i32) -> f64 {
    f64::from_bits(((1023 + n) as u64) << 52)
}

/// The sum of products of two rows of e4m3, as an accumulator of tensor cores has it.
///
/// Each step adds the products of 32 neighbours. Products and accumulator are cut 13 bits below the
/// largest exponent among them, and so is the sum below its own. The exponent of a product is the
/// sum of its factors' exponents.
pub fn cut_dot(a: &[f64], b: &[f64]) -> f64 {
    let Accumulation { k, kept } = Accumulation::E4M3;
    let mut sum = 0.0f64;
    for (a, b) in a.chunks(k).zip(b.chunks(k)) {
        let mut largest = exponent(sum);
        for (a, b) in a.iter().zip(b) {
            let both = exponent(*a).max(SMALLEST_EXPONENT) + exponent(*b).max(SMALLEST_EXPONENT);
            largest = largest.max(if a * b == 0.0 { i32::MIN } else { both });
        }
        // With nothing but zeros, the exponent is that of zero.
        let unit = power(largest.max(-900) - kept);
        let cut = |x: f64| (x / unit).trunc();
        let total = a.iter().zip(b).map(|(a, b)| cut(a * b)).sum::<f64>() + cut(sum);
        let last = power((exponent(total) - kept).max(0));
        sum = (total / last).trunc() * last * unit;
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e4m3_has_the_values_of_its_bytes() {
        // The values of positive numbers ascend with their bytes.
        let values: Vec<f64> = (0..0x7f).map(e4m3).collect();
        assert!(values.is_sorted() && values[1] == 1.0 / 512.0 && values[0x38] == 1.0 && values[0x7e] == 448.0);
        assert!(e4m3(0x7f).is_nan() && e4m3(0xff).is_nan() && e4m3(0xb8) == -1.0);
        for (index, pair) in values.windows(2).enumerate() {
            let [low, high] = [pair[0], pair[1]];
            let middle = (low + high) / 2.0;
            let even = if index % 2 == 0 { low } else { high };
            for sign in [1.0, -1.0] {
                let round = |value: f64| sign * ComputeType::E4m3.round(sign * value);
                assert_eq!([round(low), round(middle.next_down()), round(middle)], [low, low, even]);
                assert_eq!([round(middle.next_up()), round(high)], [high, high]);
            }
        }
        assert_eq!(ComputeType::E4m3.round(1e9), 448.0);
        assert!(ComputeType::E4m3.round(f64::NAN).is_nan());
    }

    /// What an H100 gives (see `ptx_emulator`'s tests of tensor cores).
    #[test]
    fn sums_are_cut_as_tensor_cores_cut_them() {
        let row = |first: f64, others: f64| std::iter::once(first).chain([others; 31]).collect::<Vec<f64>>();
        let ones = [1.0; 32];
        // Products of 2^-13 beside 1 count, and those of 2^-14 vanish.
        let small = |n: i32| {
            let (a, b) = (row(1.0, power(n / 2)), row(1.0, power(n - n / 2)));
            cut_dot(&a, &b)
        };
        assert_eq!(small(-13), 1.0 + 31.0 * power(-13));
        assert_eq!(small(-14), 1.0);
        // The sum is cut at its own exponent.
        assert_eq!(cut_dot(&[1.0, 1.0, power(-6)], &[1.0, 1.0, power(-7)]), 2.0);
        assert_eq!(cut_dot(&ones, &ones), 32.0);
        assert_eq!(cut_dot(&[0.0; 64], &[1.0; 64]), 0.0);
        // An accumulator stops growing: 1000 steps of 32 products of 2^-6.
        let eighths = vec![0.125; 32 * 1000];
        assert_eq!(cut_dot(&eighths, &eighths), 256.0);
    }
}
