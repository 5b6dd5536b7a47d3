//! What is done to Q and K before attention: QK-norm and RoPE. `no_std`: a spec states it, and the kernels are compiled for it.

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
