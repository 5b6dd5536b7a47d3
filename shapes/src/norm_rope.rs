//! What is done to Q and K before attention: QK-norm and RoPE. `no_std`. A spec states it, and the
//! kernels are compiled for it.

/// The kind of a QK-norm.
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

/// The channels that one statistic of a QK-norm covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NormOver {
    /// It covers the `head_dim` channels of each head.
    Head,
    /// It covers all `heads x head_dim` channels of a token. A launch then needs all heads of the
    /// model.
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

/// The norm of Q and K, before RoPE. Its weights are given at run time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QkNorm {
    /// RMS or layer norm.
    pub kind: NormKind,
    /// The channels that a statistic covers.
    pub over: NormOver,
    /// The term that is added in the root. It is positive as an f32.
    pub eps: f64,
}

/// Which channels RoPE rotates together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pairs {
    /// (0, 1), (2, 3) and so on.
    Interleaved,
    /// (0, head_dim / 2), (1, head_dim / 2 + 1) and so on.
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

/// The rotary embedding of Q and K. Cosines and sines are given at run time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rope {
    /// Which channels rotate together.
    pub pairs: Pairs,
    /// Whether the tables cover text rows too.
    pub text: bool,
    /// Whether each head has its own tables.
    pub per_head: bool,
}
