//! The numbers of a spec that its kernels know. `no_std`.
//!
//! Kernels that are compiled for one spec have them as constants. In a **template** each is a name,
//! such as `FS_after_tokens`, which stands where PTX has a literal. Whoever loads a template writes
//! the numbers of a spec there ([`Numbers::literals`]). ptxas then compiles the same machine code
//! as for constants.
//!
//! The table below is the only place that lists them. What the host fills in and what
//! `attention_kernels!` writes both come from it.

use crate::arch::{Arch, Products};
#[cfg(feature = "std")]
use crate::blocks::{PackBlock, Tiles};
use crate::dtype::{Compute, Dtype};
use crate::image::Image;
use crate::layout::{Divisor, Layout};
use crate::params::PartialsLayout;
#[cfg(feature = "std")]
use crate::spec::{NormKind, NormOver, Pairs, Spec};

/// What a template is compiled for. All else that it knows are [`Numbers`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Template {
    /// The rows of packed Q, K and V.
    pub image: Image,
    /// What tensor cores multiply in **attention**.
    pub compute: Compute,
}

impl Template {
    /// All that exist.
    pub const ALL: [Template; 6] = [
        Template::new(64, Dtype::Bf16, Compute::Dtype),
        Template::new(64, Dtype::F16, Compute::Dtype),
        Template::new(128, Dtype::Bf16, Compute::Dtype),
        Template::new(128, Dtype::F16, Compute::Dtype),
        Template::new(128, Dtype::Bf16, Compute::E4m3),
        Template::new(128, Dtype::F16, Compute::E4m3),
    ];

    const fn new(head_dim: u32, dtype: Dtype, compute: Compute) -> Template {
        Template { image: Image { head_dim, dtype }, compute }
    }

    /// Its name, such as `bf16_128` or `bf16_128_e4m3`.
    #[cfg(feature = "std")]
    pub fn name(self) -> String {
        let Template { image: Image { head_dim, dtype }, compute } = self;
        match compute {
            Compute::Dtype => format!("{}_{head_dim}", dtype.as_str()),
            Compute::E4m3 => format!("{}_{head_dim}_e4m3", dtype.as_str()),
        }
    }

    /// Whether a family of GPUs has it. Products of 8 bits are for Hopper alone.
    pub const fn is_of(self, arch: Arch) -> bool {
        matches!((self.compute, arch.products), (Compute::Dtype, _) | (Compute::E4m3, Products::Wgmma))
    }
}

/// How the name of every literal begins.
pub const PREFIX: &str = "FS_";

/// Writes [`Numbers`] from a table of names, types, and values of a spec.
macro_rules! numbers {
    (|$spec:ident, $arch:ident| $($(#[$doc:meta])* $name:ident: $ty:ty = $value:expr;)*) => {
        /// The numbers of a spec that its kernels know.
        #[derive(Clone, Copy, Debug, Default, PartialEq)]
        pub struct Numbers {
            $($(#[$doc])* pub $name: $ty,)*
        }

        impl Numbers {
            /// The numbers of a spec, for kernels of a family.
            #[cfg(feature = "std")]
            pub fn of($spec: &Spec, $arch: Arch) -> Numbers {
                Numbers { $($name: $value,)* }
            }

            /// The numbers with the names of their fields, in the order of the table.
            #[cfg(feature = "std")]
            pub fn fields(&self) -> Vec<(&'static str, Number)> {
                vec![$((stringify!($name), Number::from(self.$name)),)*]
            }
        }
    };
}

numbers! { |spec, arch|
    /// F, the number of latent frames.
    frames: Divisor = spec.layout.frames;
    /// P, the tokens of a frame.
    tokens_per_frame: Divisor = spec.layout.tokens_per_frame;
    /// Text tokens before the video.
    before_tokens: u32 = spec.layout.before;
    /// Text tokens after the video.
    after_tokens: u32 = spec.layout.after;
    /// Leading frames that every query sees.
    sink_frames: u32 = spec.layout.sink_frames;
    /// Query tiles of a head of **attention** that have text. 1 stands for none too.
    text_tiles: Divisor = Divisor::new(tiles(spec, arch)[0]);
    /// Query tiles of a head of **attention** without text. 1 stands for none too.
    video_tiles: Divisor = Divisor::new(tiles(spec, arch)[1]);
    /// Sampled rows a head.
    profile_rows: Divisor = Divisor::new(spec.profile.rows);
    /// 1 / (sampled rows x head dim), which makes mean errors of sums.
    error_mean: f32 = 1.0 / (spec.profile.rows * spec.head_dim) as f32;
    /// Rows of 8-bit elements from the image in 8 bits of one head to that of the next.
    e4m3_image_rows: u32 = spec.e4m3_image_rows();
    /// Threads of a block of **pack**.
    pack_threads: u32 = pack(spec, arch).threads();
    /// Blocks of **pack** that a multiprocessor holds.
    pack_min_blocks: u32 = pack(spec, arch).min_blocks;
    /// Steps of its row that a warp of **pack** holds in shared memory.
    pack_held_steps: u32 = pack(spec, arch).held_steps;
    /// Whether there is a QK-norm.
    has_norm: bool = spec.qk_norm.is_some();
    /// Whether the QK-norm is a layer norm. If not, it is an RMS norm.
    norm_is_layer: bool = spec.qk_norm.is_some_and(|norm| norm.kind == NormKind::Layer);
    /// Whether the QK-norm has one statistic for all heads of a token.
    norm_over_heads: bool = spec.qk_norm.is_some_and(|norm| norm.over == NormOver::Heads);
    /// The term that a QK-norm adds in the root.
    norm_eps: f32 = spec.qk_norm.map_or(0.0, |norm| norm.eps as f32);
    /// 1 / (heads x head dim), for the statistic of a QK-norm over all heads.
    heads_mean: f32 = 1.0 / (spec.heads * spec.head_dim) as f32;
    /// Whether there is a rotary embedding.
    has_rope: bool = spec.rope.is_some();
    /// Whether it rotates channels (2i, 2i + 1). If not, it rotates those of the two halves.
    rope_interleaved: bool = spec.rope.is_some_and(|rope| rope.pairs == Pairs::Interleaved);
    /// Channels of a head that are rotated. They come first.
    rope_channels: u32 = spec.rope.map_or(0, |rope| rope.channels);
    /// Whether text before the video is rotated too.
    rope_before: bool = spec.rope.is_some_and(|rope| rope.before);
    /// Whether text after the video is rotated too.
    rope_after: bool = spec.rope.is_some_and(|rope| rope.after);
    /// Whether each head has its own tables.
    rope_per_head: bool = spec.rope.is_some_and(|rope| rope.per_head);
}

/// Query tiles of a head of **attention**: those with text, and the others.
#[cfg(feature = "std")]
fn tiles(spec: &Spec, arch: Arch) -> [u32; 2] {
    let Tiles { query_rows, .. } = spec.tiles(arch);
    let text = spec.layout.text_tokens().div_ceil(query_rows);
    [text, spec.layout.sequence().div_ceil(query_rows) - text]
}

#[cfg(feature = "std")]
fn pack(spec: &Spec, arch: Arch) -> PackBlock {
    PackBlock::new(arch, spec.heads, spec.image())
}

impl Numbers {
    /// The geometry. Half widths are given at launch
    /// ([`Layout::with_half_widths`]), and these bands are as wide as the video.
    #[inline(always)]
    pub const fn layout(&self) -> Layout {
        let video = self.frames.value * self.tokens_per_frame.value;
        Layout {
            frames: self.frames,
            tokens_per_frame: self.tokens_per_frame,
            before: self.before_tokens,
            after: self.after_tokens,
            sink_frames: self.sink_frames,
            spatial_half_width: video,
            temporal_half_width: video,
        }
    }

    /// How the partial results of profiling lie, for rows of `head_dim` elements and with the keys
    /// of a head in `splits` parts.
    #[inline(always)]
    pub const fn partials(&self, head_dim: u32, splits: u32) -> PartialsLayout {
        PartialsLayout::new(self.profile_rows.value, head_dim, splits)
    }

    /// The literals of a template and their values: each name, without [`PREFIX`], and what is
    /// written there.
    #[cfg(feature = "std")]
    pub fn literals(&self) -> Vec<(String, u32)> {
        self.fields().into_iter().flat_map(|(name, number)| number.literals(name)).collect()
    }
}

/// A number of any type.
#[cfg(feature = "std")]
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Number {
    /// A count.
    U32(u32),
    /// 1 or 0 as a literal.
    Bool(bool),
    /// Its bits as a literal.
    F32(f32),
    /// Three literals: the number, its multiplier and its shift.
    Divisor(Divisor),
}

#[cfg(feature = "std")]
impl Number {
    /// The literals of the field `name`, and their values.
    pub fn literals(self, name: &str) -> Vec<(String, u32)> {
        match self {
            Number::U32(value) => vec![(name.into(), value)],
            Number::Bool(value) => vec![(name.into(), value.into())],
            Number::F32(value) => vec![(name.into(), value.to_bits())],
            Number::Divisor(divisor) => {
                let names = ["", "_multiplier", "_shift"].map(|part| format!("{name}{part}"));
                names.into_iter().zip(divisor.parts()).collect()
            }
        }
    }
}

/// Makes a [`Number`] of each type.
#[cfg(feature = "std")]
macro_rules! from {
    ($($variant:ident($ty:ty)),*) => {$(
        impl From<$ty> for Number {
            fn from(value: $ty) -> Number {
                Number::$variant(value)
            }
        }
    )*};
}

#[cfg(feature = "std")]
from!(U32(u32), Bool(bool), F32(f32), Divisor(Divisor));
