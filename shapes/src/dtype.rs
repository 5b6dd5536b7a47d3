//! The types of the elements of Q, K, V and the output. `no_std`: a spec states the type, and the
//! kernels are compiled for it.

/// Type of Q, K, V and the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// bfloat16.
    Bf16,
    /// IEEE binary16.
    F16,
}

impl Dtype {
    /// All of them.
    pub const ALL: [Dtype; 2] = [Dtype::Bf16, Dtype::F16];

    /// As a spec writes it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Dtype::Bf16 => "bf16",
            Dtype::F16 => "f16",
        }
    }

    /// Bytes of one element.
    #[inline(always)]
    pub const fn bytes(self) -> u32 {
        match self {
            Dtype::Bf16 | Dtype::F16 => 2,
        }
    }

    /// Largest finite number.
    pub const fn largest(self) -> f32 {
        match self {
            // The same as f32's with the lower half of its bits cut off.
            Dtype::Bf16 => f32::from_bits(f32::MAX.to_bits() & 0xffff_0000),
            Dtype::F16 => 65504.0,
        }
    }

    /// The least and the greatest sum that a thread's weights of a key tile may have, `[least,
    /// most]`.
    ///
    /// A first tile must reach `least` if the weights are to be 2^score; no tile may exceed `most`.
    /// bf16 has the exponents of f32, so it tells weights from zero down to 2^-126. Weights of up
    /// to 2^96, times a V of up to 2^15, leave room for sums. Normal numbers of f16 begin at 2^-14
    /// and end below 2^16.
    pub const fn tile_sums(self) -> [f32; 2] {
        match self {
            Dtype::Bf16 => [power(-60), power(96)],
            Dtype::F16 => [power(0), power(15)],
        }
    }

    /// The least sum of weights under a mask that profiling trusts.
    ///
    /// Profiling weighs the keys that a mask shows relative to all keys. Where their weights in a
    /// split come to less than this, it weighs them again, relative to the mask's own keys. A
    /// weight that is too small for the normal numbers of f16 changes by 2^-25 at most, which is
    /// 2^-19 of this sum. bf16 has room for more.
    pub const fn least_masked_sum(self) -> f32 {
        match self {
            Dtype::Bf16 => power(-60),
            Dtype::F16 => power(-6),
        }
    }
}

/// The type of what tensor cores multiply in **attention**.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Compute {
    /// The type of the tensors.
    #[default]
    Dtype,
    /// e4m3: eight bits with four of the exponent and three of the mantissa.
    E4m3,
}

impl Compute {
    /// All of them.
    pub const ALL: [Compute; 2] = [Compute::Dtype, Compute::E4m3];

    /// As a spec writes it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Compute::Dtype => "dtype",
            Compute::E4m3 => "e4m3",
        }
    }

    /// Bits of a number, which say in which precision a head multiplies: 16 or 8.
    #[inline(always)]
    pub const fn bits(self) -> u32 {
        match self {
            Compute::Dtype => 16,
            Compute::E4m3 => 8,
        }
    }

    /// The type with so many bits. Every number but 8 stands for [`Compute::Dtype`].
    pub const fn of_bits(bits: u32) -> Compute {
        if bits == Compute::E4m3.bits() { Compute::E4m3 } else { Compute::Dtype }
    }
}

/// 2^exponent.
const fn power(exponent: i32) -> f32 {
    f32::from_bits(((127 + exponent) as u32) << 23)
}
