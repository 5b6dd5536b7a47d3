//! The spec: the shape of one model's attention, written in TOML.
//!
//! A spec says what a model's self-attention looks like. It has the numbers of tokens, heads and
//! channels, and what happens to Q and K before the product. It says how wide the masks are that
//! replace the dense one. Kernels know the numbers of one spec, which loading fills in
//! ([`crate::numbers`]). What differs from call to call is given at launch: the batch, the valid
//! length of the text, strides, the heads, and other half widths.
//!
//! ```
//! use framestride_shapes::{layout::HeadType, spec::Spec};
//!
//! let spec = Spec::parse("my_model.toml", r#"
//!     name = "my_model"            # [a-z0-9_], the name of the files made from the spec
//!
//!     [video]
//!     frames = 33                  # latent frames
//!     tokens_per_frame = 3600      # patches of one latent frame
//!     grid = [45, 80]              # optional: their height and width, for pictures
//!
//!     [text]                       # optional: text tokens in the self-attention
//!     tokens = 256                 # padding included
//!     position = "last"            # "first" or "last"; default "last"
//!
//!     [before]                     # optional: tokens before the video that are treated as text is
//!     tokens = 16                  # padding included; [after] describes those after the video
//!
//!     [attention]
//!     heads = 24
//!     head_dim = 128               # 64 or 128
//!     dtype = "bf16"               # "bf16" or "f16"; default "bf16"
//!     batch = 1                    # default 1
//!     compute = "dtype"            # "dtype", or "e4m3" for 8 bits; default "dtype"
//!
//!     [qk_norm]                    # optional: norm of Q and K; its weights are given at run time
//!     kind = "rms"                 # "rms" or "layer"
//!     over = "head"                # "head" or "heads"; default "head"
//!     eps = 1e-6                   # default 1e-6
//!
//!     [rope]                       # optional: rotary embedding; its tables are given at run time
//!     pairs = "interleaved"        # "interleaved" or "half"
//!     channels = 128               # leading channels of a head that are rotated; default head_dim
//!     text = false                 # rotate the rows of [text] too; default false
//!     before = false               # rotate those of [before] too, and likewise `after`
//!     per_head = false             # each head has its own tables; default false
//!
//!     [masks.spatial]              # band in frame-major order
//!     density = 0.25               # or half_width = 15695 (tokens), or half_width_frames = 4.36
//!
//!     [masks.temporal]             # band in token-major order
//!     density = 0.25
//!
//!     [sink]                       # optional
//!     frames = 0                   # leading frames that every query sees; default 0
//!
//!     [profile]                    # optional
//!     rows = 64                    # query rows sampled from each head; default 64
//!     seed = 0                     # default 0
//!
//!     [schedule]                   # optional: which calls stay dense
//!     steps = 50
//!     layers = 60
//!     dense_steps = 5              # default 0
//!     dense_layers = 2             # default 0
//! "#)?;
//! assert_eq!(spec.layout.sequence(), 16 + 33 * 3600 + 256);
//! assert_eq!(spec.layout.spatial_half_width, 15_681);
//! assert!((spec.density(HeadType::Spatial) - 0.25).abs() < 1e-5);
//! # Ok::<(), framestride_shapes::spec::SpecError>(())
//! ```
//!
//! [`Spec::builder`] makes a spec in code, with the same keys, defaults and checks.
//!
//! # Key by key
//!
//! Tokens are counted after patching. A latent frame of 90 x 160 in patches of 2 x 2 has a `grid`
//! of \[45, 80\] and 3600 `tokens_per_frame`. With F `frames`, P `tokens_per_frame` and T text
//! tokens on both sides, the sequence has S = F P + T tokens. Its N = F P video tokens lie frame by
//! frame.
//!
//! * **`video.grid`** must multiply to `tokens_per_frame`. Nothing but pictures needs it.
//! * **`text`** is for models that attend over video and text together (HunyuanVideo, CogVideoX).
//!   Models with cross-attention to the text (Wan, LTX-Video, Cosmos) leave it out. `tokens` is the
//!   padded length. How many of them are valid is given at launch, for each batch item. Text sees
//!   everything and is seen by everything. So sound and conditions that stand beside the text count
//!   as text too (MiniMax-H3).
//! * **`before`** and **`after`** are for models that have such rows on both sides of the video, or
//!   other rows than text there: frames of reference, or clean frames of the past. Each side has
//!   valid lengths and norm weights of its own. `text` is another way to write one of the two: with
//!   position `"first"` it is `before`, with `"last"` it is `after`.
//! * **`attention.batch`** is what plans and reports assume. It is 2 with classifier-free guidance.
//!   A launch may have another batch, and any number of heads.
//! * **`attention.compute`** is what tensor cores multiply in **attention**. `"e4m3"` rounds Q, K, V
//!   and the weights to 8 bits, for head dim 128. It is faster and less exact. Profiling stays in the
//!   type of the tensors.
//! * **`qk_norm.over`** is the extent of one statistic. `"head"` takes the `head_dim` channels of
//!   each head, `"heads"` takes all heads x head_dim channels of a token. Models have the latter
//!   that normalise before they split the heads (Wan, LTX-Video). A launch of such a model needs
//!   all heads.
//! * **`qk_norm.eps`** is from 1e-30 to 1, so that squares which f32 does not hold make no difference
//!   beside it.
//! * **`rope.pairs`** names the channels that rotate together: `"interleaved"` for (2i, 2i + 1),
//!   `"half"` for (i, i + `channels` / 2).
//! * **`rope.channels`** is for models that rotate only the first channels of each head
//!   (MiniMax-H3: 96 of 128). The others stay as the norm left them. Kernels rotate chunks of 8
//!   channels, so it is a multiple of 8 with interleaved pairs. Halves exchange whole chunks, so it
//!   is a multiple of 16 there.
//! * **`rope.text`**, **`rope.before`** and **`rope.after`** say that the tables have rows for this
//!   text too, in the order of the model. Without it, text is not rotated.
//! * **`masks`** are explained below.
//! * **`sink.frames`** are fewer than `video.frames`.
//! * **`profile.rows`** is 1 to 1024 and at most N. Kernels take rows in groups of 64, so 64 cost
//!   as much as 1. The default is 64, or N when that is less.
//! * **`profile.seed`** draws the rows of launches that give no seed of their own.
//! * **`precision.largest_error`** is for `compute = "e4m3"`. A call that profiles computes all heads in 8
//!   bits, and compares the sampled rows with those of 16 bits under the same mask. It computes a head
//!   again in 16 bits when the relative error of its rows is above this number. Which heads these are can
//!   be read, and given to later calls. A call without profiling, to which nothing is given, has nothing to
//!   compare with: it computes all heads in 16 bits. Without the table all heads multiply in 8 bits.
//! * **`schedule`** is answered by [`Schedule::is_dense`]. The first `dense_steps` steps stay
//!   dense, and in all steps the first `dense_layers` layers. Without the table no call stays
//!   dense.
//!
//! # Widths and densities
//!
//! Take the video token at place p of frame f. Its position is `f P + p` in the spatial layout and
//! `p F + f` in the temporal one. A query sees a key when either is text, or when the key lies in a
//! sink frame. It also sees the key when their positions in the head's layout differ by less than
//! the half width. A width is given in exactly one of three ways:
//!
//! * **`half_width`** counts tokens (positions), 1 to N. With 1 a token sees only itself, with N it
//!   sees all.
//! * **`half_width_frames`** counts frames' worth of tokens. One unit is P positions, rounded to
//!   the nearest whole token. In the spatial layout that is a frame. In the temporal layout the
//!   same P positions are P / F places with all F frames of each. So one number makes a mask of the
//!   same size in both.
//! * **`density`** is the wanted part of all S² pairs that is visible, above 0 and at most 1. It
//!   counts everything visible, text and sinks included, exactly ([`crate::density`]). The half
//!   width with the nearest density is used. Text, sinks and each token itself take a least part. A
//!   density below it is an error that names it.
//!
//! # Errors
//!
//! All problems of a file come in one [`SpecError`], in the order of the file. Each names file,
//! line, column and key. It says what was found, what is allowed, and how to mend it:
//!
//! ```text
//! error: `video.frames` is 0
//!  --> my_model.toml:4:10
//!   |
//! 4 | frames = 0
//!   |          ^
//!   = allowed: an integer from 1 to 33554431
//!   = mend: write for example `frames = 33`: latent frames
//! ```
//!
//! Unknown keys are errors too. Sizes are limited by the kernels' 32-bit arithmetic. A packed head
//! has less than 4 GiB, which is 16,777,016 tokens of head dim 128 or 33,554,232 of 64. Batch x
//! heads is at most [`Spec::most_launch_heads`].
//!
//! `shapes/spec.schema.json` is the JSON schema of all this, for editors.

mod builder;
mod check;
mod error;
mod keys;
mod lines;
mod read;
#[cfg(feature = "schema")]
mod schema;

use std::ops::Range;
use std::path::Path;

pub use crate::dtype::{Compute, Dtype};
pub use crate::norm_rope::{NormKind, NormOver, Pairs, QkNorm, Rope};
pub use builder::SpecBuilder;
pub use error::{Problem, SpecError};
#[doc(hidden)]
pub use lines::Lines;
#[cfg(feature = "schema")]
pub use schema::json_schema;

use crate::arch::Arch;
use crate::blocks::{PROFILE_KEY_ROWS, Tiles};
use crate::density;
use crate::image::{Image, e4m3};
use crate::layout::{HeadType, Layout};
use crate::numbers::Template;
use crate::params::PartialsLayout;
use crate::text::nearest;
use crate::tiling::{TileCounts, count_tiles};
use crate::workspace::WorkspaceLayout;
use check::{most_heads, read_spec};
use error::Source;
use read::{Reader, read_file};

/// A validated spec. Every number in it fits the `u32` arithmetic of [`Layout`] and the grids of
/// the kernels.
///
/// Two specs are equal when they say the same, whatever their comments and their files are.
#[derive(Clone, Debug)]
pub struct Spec {
    /// `name`: what the files made from the spec are called.
    pub name: String,
    /// `[video]`, `[text]`, `[before]`, `[after]`, `[sink]` and the half widths of `[masks]`,
    /// solved.
    pub layout: Layout,
    /// `attention.head_dim`: 64 or 128.
    pub head_dim: u32,
    /// `attention.heads` of the model. A launch may have another number, unless the QK-norm is over
    /// all heads.
    pub heads: u32,
    /// `attention.batch` that is planned for. A launch may have another.
    pub batch: u32,
    /// `attention.dtype`.
    pub dtype: Dtype,
    /// `attention.compute`.
    pub compute: Compute,
    /// `video.grid`: height and width of a frame in patches.
    pub grid: Option<[u32; 2]>,
    /// `[qk_norm]`.
    pub qk_norm: Option<QkNorm>,
    /// `[rope]`.
    pub rope: Option<Rope>,
    /// `[masks.spatial]` as written. The half width in tokens is in `layout`.
    pub spatial: Width,
    /// `[masks.temporal]` as written. The half width in tokens is in `layout`.
    pub temporal: Width,
    /// `[profile]`.
    pub profile: Profile,
    /// `precision.largest_error`.
    pub largest_error: Option<f64>,
    /// `[schedule]`.
    pub schedule: Schedule,
    /// What the spec was read from. Kernels are built from this text.
    pub source: SpecSource,
}

/// The text of a spec.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpecSource {
    /// What messages call the text: the name of a file, most often.
    pub file: String,
    /// The TOML text.
    pub text: String,
}

impl PartialEq for Spec {
    fn eq(&self, other: &Spec) -> bool {
        // Every field is named, so that one that is added later is not forgotten here.
        let Spec {
            name,
            layout,
            head_dim,
            heads,
            batch,
            dtype,
            compute,
            grid,
            qk_norm,
            rope,
            spatial,
            temporal,
            profile,
            largest_error,
            schedule,
            source: _,
        } = self;
        *name == other.name
            && *layout == other.layout
            && *head_dim == other.head_dim
            && *heads == other.heads
            && *batch == other.batch
            && *dtype == other.dtype
            && *compute == other.compute
            && *grid == other.grid
            && *qk_norm == other.qk_norm
            && *rope == other.rope
            && *spatial == other.spatial
            && *temporal == other.temporal
            && *profile == other.profile
            && *largest_error == other.largest_error
            && *schedule == other.schedule
    }
}

/// The width of a mask, as a spec gives it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Width {
    /// The wanted visible pairs over S².
    Density(f64),
    /// The half width in tokens.
    Tokens(u32),
    /// The half width in frames' worth of tokens. Each is `tokens_per_frame` positions, in both
    /// layouts.
    Frames(f64),
}

/// How heads are profiled in each call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Profile {
    /// How many query rows are sampled from each head, 1 to 1024.
    pub rows: u32,
    /// The seed of the draw, where a launch gives none.
    pub seed: u64,
}

/// Which calls of a video's denoising stay dense. Without a `[schedule]` all numbers are zero, and
/// no call does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Schedule {
    /// How many denoising steps there are.
    pub steps: u32,
    /// How many attention layers there are.
    pub layers: u32,
    /// How many leading steps stay dense.
    pub dense_steps: u32,
    /// How many leading layers stay dense in every step.
    pub dense_layers: u32,
}

impl Schedule {
    /// Whether the call of `layer` in `step` stays dense. Both count from 0.
    pub const fn is_dense(&self, step: u32, layer: u32) -> bool {
        step < self.dense_steps || layer < self.dense_layers
    }
}

/// What to do about the name of a shipped spec that there is not: names that it is a part of, or
/// one that may be meant.
pub fn similar_models(name: &str) -> String {
    let names = || crate::models().iter().map(|(known, _)| *known);
    let plain = |name: &str| name.chars().filter(char::is_ascii_alphanumeric).collect::<String>().to_ascii_lowercase();
    // Names are short, and nothing longer is a part of one.
    let part = if name.len() < 64 { plain(name) } else { String::new() };
    let mut similar: Vec<&str> = names().filter(|known| !part.is_empty() && plain(known).contains(&part)).collect();
    if similar.is_empty() {
        similar.extend(nearest(name, names()));
    }
    match similar.split_last() {
        None => "`framestride doctor` lists the names".into(),
        Some((last, [])) => format!("did you mean {last}?"),
        Some((last, others)) => format!("did you mean {} or {last}?", others.join(", ")),
    }
}

impl Spec {
    /// Reads and checks a file.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Spec, SpecError> {
        let path = path.as_ref();
        let file = path.display().to_string();
        Spec::parse(&file, &read_file(path)?)
    }

    /// Checks the text of a spec. `file` is only what messages call it.
    pub fn parse(file: &str, text: &str) -> Result<Spec, SpecError> {
        let mut reader = Reader::new(Source { file, text }).map_err(|problems| SpecError { problems })?;
        let spec = read_spec(&mut reader);
        reader.finish(spec).map_err(|problems| SpecError { problems })
    }

    /// Checks that the fields say what the text says, which kernels are made from. They do not when
    /// they were changed after the spec was read.
    ///
    /// # Errors
    /// A [`SpecError`] that says how another spec is made from this one.
    pub fn check_unchanged(&self) -> Result<(), SpecError> {
        let SpecSource { file, text } = &self.source;
        if Spec::parse(file, text)? == *self {
            return Ok(());
        }
        let problem = Source { file, text }.problem(
            None,
            "",
            format!("the fields of spec {} are not what its text says", self.name),
            "a spec as it was read",
            "make the other one with `Spec::to_builder`, or change the text and read it again",
        );
        Err(SpecError { problems: vec![problem] })
    }

    /// A spec made in code, without values yet.
    pub fn builder() -> SpecBuilder {
        SpecBuilder::new()
    }

    /// The values of this spec, to make another from. They hold the masks' widths as they were
    /// written, so that a density is solved again for another shape.
    pub fn to_builder(&self) -> SpecBuilder {
        SpecBuilder::with_values_of(self)
    }

    /// The spec of a model that this crate knows ([`crate::models`]).
    ///
    /// # Errors
    /// A [`SpecError`] that names specs with a similar name.
    pub fn shipped(name: &str) -> Result<Spec, SpecError> {
        match crate::models().iter().find(|(known, _)| *known == name) {
            Some((_, text)) => Spec::parse(&format!("{name} (shipped)"), text),
            None => {
                let found = "no shipped spec has this name";
                let problem = Source { file: name, text: "" };
                let problem = problem.problem(None, "", found, "a name of shapes/models", similar_models(name));
                Err(SpecError { problems: vec![problem] })
            }
        }
    }

    /// Tile sizes of the attention kernel of a family.
    pub const fn tiles(&self, arch: Arch) -> Tiles {
        Tiles::new(arch, self.head_dim, self.compute)
    }

    /// Visible pairs of one head of one batch item. All text is valid.
    pub fn visible_pairs(&self, head: HeadType) -> u128 {
        density::visible_pairs(&self.layout, head)
    }

    /// Visible pairs over S². It is 1 for a dense head.
    pub fn density(&self, head: HeadType) -> f64 {
        density::density_of_width(&self.layout, head, self.layout.half_width(head))
    }

    /// Floating-point operations of one head of one batch item on its visible pairs: 4 x pairs x
    /// head_dim.
    ///
    /// A pair has two products of `head_dim` multiply-adds. Dense heads have 4 S² head_dim
    /// operations.
    pub fn flops(&self, head: HeadType) -> u128 {
        4 * self.visible_pairs(head) * u128::from(self.head_dim)
    }

    /// Tiles of the attention kernel of a family that one head visits and skips. All text is valid.
    pub fn tile_counts(&self, arch: Arch, head: HeadType) -> TileCounts {
        count_tiles(&self.layout, head, self.tiles(arch), self.layout.text_tokens())
    }

    /// The most batch x heads that one launch may have. A spec's own are within it.
    ///
    /// The third extent of a CUDA grid limits it, and so does the number of packed rows that the
    /// kernels' `u32` counts.
    pub const fn most_launch_heads(&self) -> u32 {
        most_heads(self.layout.packed_rows() as u64) as u32
    }

    /// Bytes of Q, and so of K, V and the output, in a launch with `batch` items of `heads` heads.
    pub fn tensor_bytes(&self, batch: u32, heads: u32) -> u64 {
        let rows = u64::from(batch) * u64::from(self.layout.sequence()) * u64::from(heads);
        rows * u64::from(self.head_dim * self.dtype.bytes())
    }

    /// Whether one statistic of the QK-norm is taken over all heads of a token. Then every launch
    /// has all of them.
    pub fn norm_is_over_heads(&self) -> bool {
        self.qk_norm.is_some_and(|norm| norm.over == NormOver::Heads)
    }

    /// How many elements one statistic of the QK-norm is taken over, in a launch of `heads` heads.
    /// Each norm weight and bias has as many.
    pub fn norm_length(&self, heads: u32) -> u32 {
        if self.norm_is_over_heads() { heads * self.head_dim } else { self.head_dim }
    }

    /// The rows of the model's order that the RoPE tables have: those of the video, and those of
    /// the text on either side that is rotated too.
    pub fn rope_rows(&self) -> Range<u32> {
        let Layout { before, after, .. } = self.layout;
        let [rotates_before, rotates_after] = self.rope.map_or([false; 2], |rope| [rope.before, rope.after]);
        let video_end = before + self.layout.video_tokens();
        (if rotates_before { 0 } else { before })..(video_end + if rotates_after { after } else { 0 })
    }

    /// The shape of each RoPE table for a launch of `heads` heads. It is `[rows, channels / 2]`, or
    /// `[rows, heads, channels / 2]` where each head has its own. Without RoPE it is empty.
    pub fn rope_table_shape(&self, heads: u32) -> Vec<u32> {
        let rows = self.rope_rows().len() as u32;
        match self.rope {
            None => Vec::new(),
            Some(Rope { channels, per_head: true, .. }) => vec![rows, heads, channels / 2],
            Some(Rope { channels, .. }) => vec![rows, channels / 2],
        }
    }

    /// Elements of each RoPE table for a launch of `heads` heads. Without RoPE there are none.
    pub fn rope_table_elements(&self, heads: u32) -> u64 {
        let Some(Rope { channels, per_head, .. }) = self.rope else { return 0 };
        let rows = self.rope_rows().len() as u64 * if per_head { u64::from(heads) } else { 1 };
        rows * u64::from(channels / 2)
    }

    /// Bytes of both RoPE tables, f32, for a launch of `heads` heads. Without RoPE there are none.
    pub fn rope_table_bytes(&self, heads: u32) -> u64 {
        2 * 4 * self.rope_table_elements(heads)
    }

    /// The rows that packed Q, K and V consist of.
    pub const fn image(&self) -> Image {
        Image { head_dim: self.head_dim, dtype: self.dtype }
    }

    /// Whether heads may multiply in the type of the tensors, and whether in 8 bits. With a bound
    /// of errors, both are so.
    pub const fn precisions(&self) -> [bool; 2] {
        let in_8_bits = matches!(self.compute, Compute::E4m3);
        [!in_8_bits || self.largest_error.is_some(), in_8_bits]
    }

    /// The template that the spec's kernels come from.
    pub const fn template(&self) -> Template {
        Template { image: self.image(), compute: self.compute }
    }

    /// Rows of packed K and V that are profiled at a time. Without heads in 16 bits they are half
    /// of the keys, in whole tiles, so that both halves are within the packed rows.
    pub const fn profiled_rows(&self) -> u32 {
        match self.precisions() {
            [true, _] => self.layout.packed_rows(),
            [false, _] => self.layout.sequence().div_ceil(2 * PROFILE_KEY_ROWS) * PROFILE_KEY_ROWS,
        }
    }

    /// Rows of 8-bit elements from the image in 8 bits of one head to that of the next. Where there
    /// are heads in 16 bits too, each of both has its place.
    pub const fn e4m3_image_rows(&self) -> u32 {
        let rows = self.layout.packed_rows();
        match self.precisions() {
            [true, _] => self.image().bytes(rows) / e4m3::ROW_BYTES,
            [false, _] => e4m3::bytes(rows) / e4m3::ROW_BYTES,
        }
    }

    /// Where the partial results of profiling lie, with the keys in `splits` parts.
    pub const fn partials(&self, splits: u32) -> PartialsLayout {
        PartialsLayout::new(self.profile.rows, self.head_dim, splits)
    }

    /// The workspace of a launch with `batch` items of `heads` heads, profiled over `splits` parts
    /// of the keys.
    pub fn workspace(&self, batch: u32, heads: u32, splits: u32) -> WorkspaceLayout {
        WorkspaceLayout::new(self, batch, heads, splits)
    }
}
