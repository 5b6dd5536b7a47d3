//! What is done to Q and K before attention: QK-norm and RoPE. `no_std`. A spec states it, and it
//! is among the numbers that kernels know.

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
    /// (0, n / 2), (1, n / 2 + 1) and so on, of n rotated channels.
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

    /// The number of rotated channels is a multiple of this.
    ///
    /// A lane of **pack** holds one chunk of 8 channels. It rotates whole chunks, and the partner of
    /// a chunk of halves is a whole chunk too.
    pub const fn channel_step(self) -> u32 {
        match self {
            Pairs::Interleaved => 8,
            Pairs::Half => 16,
        }
    }
}

/// The rotary embedding of Q and K. Cosines and sines are given at run time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rope {
    /// Which channels rotate together.
    pub pairs: Pairs,
    /// How many leading channels of each head are rotated. It is a multiple of
    /// [`Pairs::channel_step`], at most the head dim.
    pub channels: u32,
    /// Whether text before the video is rotated too. The tables then begin with its rows.
    pub before: bool,
    /// Whether text after the video is rotated too. The tables then end with its rows.
    pub after: bool,
    /// Whether each head has its own tables.
    pub per_head: bool,
}
