//! What is done to Q and K before attention, and the type of the elements. `no_std`: a spec states it, the kernels are compiled for
//! it.

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

    /// Largest finite number.
    pub const fn largest(self) -> f32 {
        match self {
            // The same as f32's with the lower half of its bits cut off.
            Dtype::Bf16 => f32::from_bits(f32::MAX.to_bits() & 0xffff_0000),
            Dtype::F16 => 65504.0,
        }
    }

    /// What the sums of a thread's weights of a key tile may be: of a first tile at least the first number, if weights are to be 2^score, of
    /// any tile at most the second.
    ///
    /// Of bf16 the exponents are those of f32, which tells weights from zero down to 2^-126, and holds 2^16 times the most, times a V of up
    /// to 2^15. Normal numbers of f16 begin at 2^-14 and end below 2^16.
    pub const fn tile_sums(self) -> [f32; 2] {
        match self {
            Dtype::Bf16 => [power(-60), power(96)],
            Dtype::F16 => [power(0), power(15)],
        }
    }

    /// Profiling weighs the keys that a mask shows relative to all keys. It does so again relative to the mask's own where their weights in
    /// a split come to less than this.
    ///
    /// A weight changes by 2^-25 at most when it is too small for the normal numbers of f16: a 2^19th of this. bf16 has room for more.
    pub const fn least_masked_sum(self) -> f32 {
        match self {
            Dtype::Bf16 => power(-60),
            Dtype::F16 => power(-6),
        }
    }
}

/// 2^exponent.
const fn power(exponent: i32) -> f32 {
    f32::from_bits(((127 + exponent) as u32) << 23)
}

/// Kind of a QK-norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NormKind {
    /// x / sqrt(mean(x²) + eps), times a weight.
    Rms,
    /// (x - mean(x)) / sqrt(var(x) + eps), times a weight, plus a bias.
    Layer,
}

impl NormKind {
    /// All of them.
    pub const ALL: [NormKind; 2] = [NormKind::Rms, NormKind::Layer];

    /// As a spec writes it.
    pub const fn as_str(self) -> &'static str {
        match self {
            NormKind::Rms => "rms",
            NormKind::Layer => "layer",
        }
    }
}

/// Extent of one statistic of a QK-norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NormOver {
    /// The `head_dim` channels of each head.
    Head,
    /// All `heads x head_dim` channels of a token: a launch needs all heads of the model.
    Heads,
}

impl NormOver {
    /// All of them.
    pub const ALL: [NormOver; 2] = [NormOver::Head, NormOver::Heads];

    /// As a spec writes it.
    pub const fn as_str(self) -> &'static str {
        match self {
            NormOver::Head => "head",
            NormOver::Heads => "heads",
        }
    }
}

/// Norm of Q and K, before RoPE. Its weights are given at run time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QkNorm {
    /// RMS or layer norm.
    pub kind: NormKind,
    /// Extent of a statistic.
    pub over: NormOver,
    /// Term in the root, positive as an f32.
    pub eps: f64,
}

/// Channels that RoPE rotates together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pairs {
    /// (0, 1), (2, 3), ...
    Interleaved,
    /// (0, head_dim / 2), (1, head_dim / 2 + 1), ...
    Half,
}

impl Pairs {
    /// All of them.
    pub const ALL: [Pairs; 2] = [Pairs::Interleaved, Pairs::Half];

    /// As a spec writes it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Pairs::Interleaved => "interleaved",
            Pairs::Half => "half",
        }
    }
}

/// Rotary embedding of Q and K. Cosines and sines are given at run time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rope {
    /// Channels that rotate together.
    pub pairs: Pairs,
    /// Whether the tables cover text rows too.
    pub text: bool,
    /// Whether each head has its own tables.
    pub per_head: bool,
}
