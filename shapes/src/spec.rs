//! The spec: the shape of one model's attention, written in TOML.
//!
//! A spec says what a model's self-attention looks like. It has the numbers of tokens, heads and
//! channels, and what happens to Q and K before the product. It says how wide the masks are that
//! replace the dense one. Kernels are generated for one spec and know it as constants. What differs
//! from call to call is given at launch: the batch, the valid length of the text, strides, and the
//! heads.
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
//!     [attention]
//!     heads = 24
//!     head_dim = 128               # 64 or 128
//!     dtype = "bf16"               # "bf16" or "f16"; default "bf16"
//!     batch = 1                    # default 1
//!
//!     [qk_norm]                    # optional: norm of Q and K; its weights are given at run time
//!     kind = "rms"                 # "rms" or "layer"
//!     over = "head"                # "head" or "heads"; default "head"
//!     eps = 1e-6                   # default 1e-6
//!
//!     [rope]                       # optional: rotary embedding; cosines and sines are given at run time
//!     pairs = "interleaved"        # "interleaved" or "half"
//!     text = false                 # rotate text rows too; default false
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
//! assert_eq!(spec.layout.sequence(), 33 * 3600 + 256);
//! assert_eq!(spec.layout.spatial_half_width, 15_695);
//! assert!((spec.density(HeadType::Spatial) - 0.25).abs() < 1e-6);
//! # Ok::<(), framestride_shapes::spec::SpecError>(())
//! ```
//!
//! # Key by key
//!
//! Tokens are counted after patching. A latent frame of 90 x 160 in patches of 2 x 2 has a `grid`
//! of \[45, 80\] and 3600 `tokens_per_frame`. With F `frames`, P `tokens_per_frame` and T text
//! tokens, the sequence has S = F P + T tokens. Its N = F P video tokens lie frame by frame.
//!
//! * **`video.grid`** must multiply to `tokens_per_frame`. Nothing but pictures needs it.
//! * **`text`** is for models that attend over video and text together (HunyuanVideo, CogVideoX).
//!   Models with cross-attention to the text (Wan, LTX-Video, Cosmos) leave it out. `tokens` is the
//!   padded length. How many of them are valid is given at launch, for each batch item. Text sees
//!   everything and is seen by everything.
//! * **`attention.batch`** is what plans and reports assume. It is 2 with classifier-free guidance.
//!   A launch may have another batch, and any subset of the heads.
//! * **`qk_norm.over`** is the extent of one statistic. `"head"` takes the `head_dim` channels of
//!   each head, `"heads"` takes all heads x head_dim channels of a token. Models have the latter
//!   that normalise before they split the heads (Wan, LTX-Video). A launch of such a model needs
//!   all heads.
//! * **`qk_norm.eps`** must be a number that f32 holds: from 1.2e-38 to 1.
//! * **`rope.pairs`** names the channels that rotate together: `"interleaved"` for (2i, 2i + 1),
//!   `"half"` for (i, i + head_dim / 2).
//! * **`rope.text`** says that the tables have rows for the text too, in the order of the model.
//!   Without it, text is not rotated.
//! * **`masks`** are explained below.
//! * **`sink.frames`** are fewer than `video.frames`.
//! * **`profile.rows`** is 1 to 1024 and at most N. Kernels take rows in groups of 64, so 64 cost
//!   as much as 1. The default is 64, or N when that is less.
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

mod error;
mod keys;
mod read;
#[cfg(feature = "schema")]
mod schema;

use std::io::Read;
use std::path::Path;

pub use crate::dtype::Dtype;
pub use crate::norm_rope::{NormKind, NormOver, Pairs, QkNorm, Rope};
pub use error::{Problem, SpecError};
#[cfg(feature = "schema")]
pub use schema::json_schema;

use crate::blocks::{SAMPLE_ROWS, Tiles};
use crate::density;
use crate::image::{ATOM_ROWS, Image};
use crate::layout::{HeadType, Layout, PAD_ROWS, TextPosition};
use crate::params::PartialsLayout;
use crate::tiling::{TileCounts, count_tiles};
use crate::workspace::WorkspaceLayout;
use error::Source;
use keys::{GRID_Z, Key, find};
use read::Reader;

/// A validated spec. Every number in it fits the `u32` arithmetic of [`Layout`] and the grids of
/// the kernels.
///
/// Two specs are equal when they say the same, whatever their comments and their files are.
#[derive(Clone, Debug)]
pub struct Spec {
    /// `name`: what the files made from the spec are called.
    pub name: String,
    /// `[video]`, `[text]`, `[sink]` and the half widths of `[masks]`, solved.
    pub layout: Layout,
    /// `attention.head_dim`: 64 or 128.
    pub head_dim: u32,
    /// `attention.heads` of the model. A launch may have any subset.
    pub heads: u32,
    /// `attention.batch` that is planned for. A launch may have another.
    pub batch: u32,
    /// `attention.dtype`.
    pub dtype: Dtype,
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
            grid,
            qk_norm,
            rope,
            spatial,
            temporal,
            profile,
            schedule,
            source: _,
        } = self;
        *name == other.name
            && *layout == other.layout
            && *head_dim == other.head_dim
            && *heads == other.heads
            && *batch == other.batch
            && *dtype == other.dtype
            && *grid == other.grid
            && *qk_norm == other.qk_norm
            && *rope == other.rope
            && *spatial == other.spatial
            && *temporal == other.temporal
            && *profile == other.profile
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
    /// The seed of the draw.
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

/// A text position as a spec writes it.
pub(crate) const fn text_position_name(position: TextPosition) -> &'static str {
    match position {
        TextPosition::First => "first",
        TextPosition::Last => "last",
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

    /// Reads and checks several files, and reports the problems of all together.
    ///
    /// The names of the specs must differ, since the files that are made from them have these
    /// names.
    pub fn from_files(paths: impl IntoIterator<Item = impl AsRef<Path>>) -> Result<Vec<Spec>, SpecError> {
        let mut specs: Vec<(String, Spec)> = Vec::new();
        let mut problems = Vec::new();
        for path in paths {
            let path = path.as_ref();
            let file = path.display().to_string();
            let text = match read_file(path) {
                Ok(text) => text,
                Err(error) => {
                    problems.extend(error.problems);
                    continue;
                }
            };
            match Spec::parse(&file, &text) {
                Ok(spec) => {
                    if let Some((first, _)) = specs.iter().find(|(_, other)| other.name == spec.name) {
                        problems.push(duplicate_name(Source { file: &file, text: &text }, &spec.name, first));
                    }
                    specs.push((file, spec));
                }
                Err(error) => problems.extend(error.problems),
            }
        }
        match problems.is_empty() {
            true => Ok(specs.into_iter().map(|(_, spec)| spec).collect()),
            false => Err(SpecError { problems }),
        }
    }

    /// Tile sizes of the attention kernel.
    pub const fn tiles(&self) -> Tiles {
        Tiles::for_head_dim(self.head_dim)
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

    /// Tiles of the attention kernel that one head visits and skips. All text is valid.
    pub fn tile_counts(&self, head: HeadType) -> TileCounts {
        count_tiles(&self.layout, head, self.tiles(), self.layout.text_tokens)
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

    /// Rows of the RoPE tables. They are the video rows, or all rows of the model's order when text
    /// is rotated too.
    pub fn rope_rows(&self) -> u32 {
        let rotates_text = self.rope.is_some_and(|rope| rope.text);
        self.layout.video_tokens() + if rotates_text { self.layout.text_tokens } else { 0 }
    }

    /// The shape of each RoPE table for a launch of `heads` heads. It is `[rows, head_dim / 2]`, or
    /// `[rows, heads, head_dim / 2]` where each head has its own.
    pub fn rope_table_shape(&self, heads: u32) -> Vec<u32> {
        let (rows, half) = (self.rope_rows(), self.head_dim / 2);
        if self.rope.is_some_and(|rope| rope.per_head) { vec![rows, heads, half] } else { vec![rows, half] }
    }

    /// The rows that packed Q, K and V consist of.
    pub const fn image(&self) -> Image {
        Image { head_dim: self.head_dim, dtype: self.dtype }
    }

    /// Where the partial results of profiling lie, with the keys in `splits` parts.
    pub const fn partials(&self, splits: u32) -> PartialsLayout {
        let rows = self.profile.rows;
        PartialsLayout { rows, groups: rows.div_ceil(SAMPLE_ROWS), splits, head_dim: self.head_dim }
    }

    /// The workspace of a launch with `batch` items of `heads` heads, profiled over `splits` parts
    /// of the keys.
    pub fn workspace(&self, batch: u32, heads: u32, splits: u32) -> WorkspaceLayout {
        WorkspaceLayout::new(&self.layout, self.image(), batch, heads, self.partials(splits))
    }
}

/// A spec has at most so many bytes.
const MOST_BYTES: u64 = 1 << 20;

/// The text of a spec's file. The file is read once, so that it may be a pipe.
fn read_file(path: &Path) -> Result<String, SpecError> {
    let file = path.display().to_string();
    let fail = |found: String, allowed: &str, mend: &str| SpecError {
        problems: vec![Source { file: &file, text: "" }.problem(None, "", found, allowed, mend)],
    };
    let mut bytes = Vec::new();
    std::fs::File::open(path).and_then(|file| file.take(MOST_BYTES + 1).read_to_end(&mut bytes)).map_err(|error| {
        fail(format!("the spec cannot be read: {error}"), "a TOML file", "check the path and its permissions")
    })?;
    if bytes.len() as u64 > MOST_BYTES {
        return Err(fail(
            format!("more than {MOST_BYTES} bytes"),
            "a TOML file of some lines",
            "give the spec's own file",
        ));
    }
    String::from_utf8(bytes).map_err(|error| {
        let valid = error.utf8_error().valid_up_to();
        let byte = error.as_bytes()[valid];
        let text = String::from_utf8_lossy(error.as_bytes());
        // Up to `valid`, the text with replacements equals the text itself.
        let problem = Source { file: &file, text: &text }.problem(
            Some(valid..valid + 1),
            "",
            format!("not UTF-8: byte 0x{byte:02x}"),
            "UTF-8 text",
            "save the file as UTF-8",
        );
        SpecError { problems: vec![problem] }
    })
}

fn duplicate_name(source: Source, name: &str, first: &str) -> Problem {
    // The spec was parsed before. This finds where its name stands.
    let span = Reader::new(source).ok().map(|reader| reader.span(NAME));
    source.problem(
        span,
        NAME.path,
        format!("is {name:?}, as in {first}"),
        "a name that no other spec of the set has",
        "rename one of them",
    )
}

const NAME: &Key = find("name");
const FRAMES: &Key = find("video.frames");
const TOKENS_PER_FRAME: &Key = find("video.tokens_per_frame");
const GRID: &Key = find("video.grid");
const TEXT_TOKENS: &Key = find("text.tokens");
const TEXT_POSITION: &Key = find("text.position");
const HEADS: &Key = find("attention.heads");
const HEAD_DIM: &Key = find("attention.head_dim");
const DTYPE: &Key = find("attention.dtype");
const BATCH: &Key = find("attention.batch");
const NORM_KIND: &Key = find("qk_norm.kind");
const NORM_OVER: &Key = find("qk_norm.over");
const NORM_EPS: &Key = find("qk_norm.eps");
const ROPE_PAIRS: &Key = find("rope.pairs");
const ROPE_TEXT: &Key = find("rope.text");
const ROPE_PER_HEAD: &Key = find("rope.per_head");
const SINK_FRAMES: &Key = find("sink.frames");
const PROFILE_ROWS: &Key = find("profile.rows");
const PROFILE_SEED: &Key = find("profile.seed");
const STEPS: &Key = find("schedule.steps");
const LAYERS: &Key = find("schedule.layers");
const DENSE_STEPS: &Key = find("schedule.dense_steps");
const DENSE_LAYERS: &Key = find("schedule.dense_layers");

/// The keys that give a mask's width.
struct WidthKeys {
    head: HeadType,
    density: &'static Key,
    tokens: &'static Key,
    frames: &'static Key,
}

const SPATIAL: WidthKeys = WidthKeys {
    head: HeadType::Spatial,
    density: find("masks.spatial.density"),
    tokens: find("masks.spatial.half_width"),
    frames: find("masks.spatial.half_width_frames"),
};

const TEMPORAL: WidthKeys = WidthKeys {
    head: HeadType::Temporal,
    density: find("masks.temporal.density"),
    tokens: find("masks.temporal.half_width"),
    frames: find("masks.temporal.half_width_frames"),
};

/// Reads all keys, even after problems, and then checks what concerns several keys as far as they
/// could be read.
fn read_spec(r: &mut Reader) -> Option<Spec> {
    let name = r.name(NAME);
    let frames = r.integer32(FRAMES);
    let tokens_per_frame = r.integer32(TOKENS_PER_FRAME);
    let grid = r.pair(GRID);
    let text_tokens = if r.has_table("text") { r.integer32(TEXT_TOKENS) } else { Some(0) };
    let text_position = r.choice(TEXT_POSITION, &[TextPosition::First, TextPosition::Last], text_position_name);
    let heads = r.integer32(HEADS);
    let head_dim = r.integer32(HEAD_DIM);
    let dtype = r.choice(DTYPE, &Dtype::ALL, Dtype::as_str);
    let batch = r.integer32(BATCH);
    let qk_norm = if r.has_table("qk_norm") {
        let kind = r.choice(NORM_KIND, &NormKind::ALL, NormKind::as_str);
        let over = r.choice(NORM_OVER, &NormOver::ALL, NormOver::as_str);
        let eps = r.number(NORM_EPS);
        kind.zip(over).zip(eps).map(|((kind, over), eps)| Some(QkNorm { kind, over, eps }))
    } else {
        Some(None)
    };
    let rope = if r.has_table("rope") {
        let pairs = r.choice(ROPE_PAIRS, &Pairs::ALL, Pairs::as_str);
        let (text, per_head) = (r.boolean(ROPE_TEXT), r.boolean(ROPE_PER_HEAD));
        pairs.zip(text).zip(per_head).map(|((pairs, text), per_head)| Some(Rope { pairs, text, per_head }))
    } else {
        Some(None)
    };
    let (spatial, temporal) = (read_width(r, &SPATIAL), read_width(r, &TEMPORAL));
    let sink_frames = r.integer32(SINK_FRAMES);
    let rows = r.integer32(PROFILE_ROWS);
    let seed = r.integer(PROFILE_SEED);
    let schedule = if r.has_table("schedule") { read_schedule(r) } else { Some(Schedule::default()) };

    if let (Some([height, width]), Some(tokens)) = (grid, tokens_per_frame) {
        let product = u64::from(height) * u64::from(width);
        if product != u64::from(tokens) {
            r.report(
                GRID,
                format!("is [{height}, {width}], which makes {product} tokens a frame"),
                format!("height x width = tokens_per_frame = {tokens}"),
                "correct the grid or video.tokens_per_frame, or remove the grid",
            );
        }
    }
    if let (Some(sinks), Some(frames)) = (sink_frames, frames)
        && sinks >= frames
    {
        r.report(
            SINK_FRAMES,
            format!("is {sinks}, which leaves no frame of {frames} to a mask"),
            format!("an integer from 0 to {}", frames - 1),
            "give fewer sink frames",
        );
    }
    if let (Some(Some(Rope { text: true, .. })), Some(0)) = (rope, text_tokens) {
        r.report(
            ROPE_TEXT,
            "is true, but there is no text",
            "false without a [text] table",
            "remove it, or add [text]",
        );
    }

    // From here on a layout is needed.
    let head_dim = head_dim?;
    let image = Image { head_dim, dtype: dtype.unwrap_or(Dtype::Bf16) };
    check_sizes(r, frames?, tokens_per_frame?, text_tokens?, image, heads?, batch?, rope?)?;
    let mut layout = Layout {
        frames: frames?,
        tokens_per_frame: tokens_per_frame?,
        text_tokens: text_tokens?,
        text_position: text_position?,
        sink_frames: sink_frames.filter(|&sinks| Some(sinks) < frames)?,
        spatial_half_width: 1,
        temporal_half_width: 1,
    };
    let rows = check_rows(r, rows, layout.video_tokens());
    let spatial_half_width = spatial.and_then(|width| solve_width(r, &SPATIAL, &layout, width));
    let temporal_half_width = temporal.and_then(|width| solve_width(r, &TEMPORAL, &layout, width));
    layout.spatial_half_width = spatial_half_width?;
    layout.temporal_half_width = temporal_half_width?;
    Some(Spec {
        name: name?,
        layout,
        head_dim,
        heads: heads?,
        batch: batch?,
        dtype: dtype?,
        grid,
        qk_norm: qk_norm?,
        rope: rope?,
        spatial: spatial?,
        temporal: temporal?,
        profile: Profile { rows: rows?, seed: seed? },
        schedule: schedule?,
        source: SpecSource { file: r.source.file.into(), text: r.source.text.into() },
    })
}

fn read_width(r: &mut Reader, keys: &WidthKeys) -> Option<Width> {
    let all = [keys.density, keys.tokens, keys.frames];
    let given: Vec<&Key> = all.into_iter().filter(|key| r.has(key)).collect();
    // Each is read whatever the others are, so that every wrong value is reported.
    let density = r.number(keys.density).map(Width::Density);
    let tokens = r.integer32(keys.tokens).map(Width::Tokens);
    let frames = r.number(keys.frames).map(Width::Frames);
    match given[..] {
        [] => {
            if r.has_table(keys.density.table()) {
                r.report(
                    keys.density,
                    "is missing, and so is any other width",
                    "density, half_width or half_width_frames",
                    format!("add `{} = {}` to [{}]", keys.density.name(), keys.density.example, keys.density.table()),
                );
            }
            None
        }
        [_] => density.or(tokens).or(frames),
        [first, ref others @ ..] => {
            for other in others {
                r.report(
                    other,
                    format!("gives the width a second time, after `{}`", first.name()),
                    "one of density, half_width and half_width_frames",
                    "remove one of them",
                );
            }
            None
        }
    }
}

fn read_schedule(r: &mut Reader) -> Option<Schedule> {
    let (steps, layers) = (r.integer32(STEPS), r.integer32(LAYERS));
    let (dense_steps, dense_layers) = (r.integer32(DENSE_STEPS), r.integer32(DENSE_LAYERS));
    for (dense_key, dense, key, all) in
        [(DENSE_STEPS, dense_steps, STEPS, steps), (DENSE_LAYERS, dense_layers, LAYERS, layers)]
    {
        if let (Some(dense), Some(all)) = (dense, all)
            && dense > all
        {
            r.report(
                dense_key,
                format!("is {dense}, more than the {all} {} there are", key.name()),
                format!("an integer from 0 to {all}"),
                format!("give at most `{}`", key.path),
            );
        }
    }
    Some(Schedule { steps: steps?, layers: layers?, dense_steps: dense_steps?, dense_layers: dense_layers? })
}

/// Checks that everything the kernels index fits their `u32` arithmetic.
#[allow(clippy::too_many_arguments)]
fn check_sizes(
    r: &mut Reader,
    frames: u32,
    tokens_per_frame: u32,
    text_tokens: u32,
    image: Image,
    heads: u32,
    batch: u32,
    rope: Option<Rope>,
) -> Option<()> {
    let video = u64::from(frames) * u64::from(tokens_per_frame);
    let sequence = video + u64::from(text_tokens);
    let head_dim = image.head_dim;
    // Kernels count the bytes of a packed head in 32 bits. It has [`Layout::packed_rows`] rows,
    // which are whole atoms.
    let most_rows = u64::from(u32::MAX / image.bytes(1)) - u64::from(PAD_ROWS);
    let most = most_rows - most_rows % u64::from(ATOM_ROWS);
    if sequence > most {
        r.report(
            if video > most { FRAMES } else { TEXT_TOKENS },
            match text_tokens {
                0 => format!("makes a sequence of {frames} x {tokens_per_frame} = {sequence} tokens"),
                _ => format!("makes a sequence of {frames} x {tokens_per_frame} + {text_tokens} = {sequence} tokens"),
            },
            format!("a sequence of at most {most} tokens with head_dim {head_dim}, so that 32 bits count the bytes of a packed head"),
            "give fewer frames, tokens per frame or text tokens",
        );
        return None;
    }
    let packed_rows = sequence.next_multiple_of(u64::from(ATOM_ROWS)) + u64::from(PAD_ROWS);
    let (all_heads, most_heads) = (u64::from(batch) * u64::from(heads), most_heads(packed_rows));
    if all_heads > most_heads {
        r.report(
            HEADS,
            format!("makes {batch} x {heads} = {all_heads} heads over the batch"),
            match most_heads {
                GRID_Z => format!("batch x heads of at most {GRID_Z}, the third extent of a CUDA grid"),
                _ => format!(
                    "batch x heads of at most {most_heads}, so that 32 bits count {packed_rows} packed rows of each"
                ),
            },
            "give fewer heads, a smaller batch or a shorter sequence",
        );
        return None;
    }
    if let Some(Rope { text, per_head: true, .. }) = rope {
        let rows = if text { sequence } else { video };
        let elements = rows * u64::from(heads) * u64::from(head_dim / 2);
        if elements > u64::from(u32::MAX) {
            r.report(
                ROPE_PER_HEAD,
                format!("is true, which makes tables of {rows} x {heads} x {} = {elements} elements", head_dim / 2),
                format!("rows x heads x head_dim / 2 of at most {}", u32::MAX),
                "share the tables between heads, or give fewer heads or a shorter sequence",
            );
            return None;
        }
    }
    Some(())
}

/// The most heads over the batch of one launch. The third extent of a grid and the rows that `u32`
/// counts limit it.
const fn most_heads(packed_rows: u64) -> u64 {
    let countable = u32::MAX as u64 / packed_rows;
    if countable < GRID_Z { countable } else { GRID_Z }
}

/// The number of sampled rows. It cannot be more than that of video rows; then the default is all
/// of them.
fn check_rows(r: &mut Reader, rows: Option<u32>, video: u32) -> Option<u32> {
    let rows = rows?;
    if rows <= video {
        return Some(rows);
    }
    if !r.has(PROFILE_ROWS) {
        return Some(video);
    }
    r.report(
        PROFILE_ROWS,
        format!("is {rows}, more than the {video} video tokens"),
        format!("an integer from 1 to {}", video.min(1024)),
        "sample fewer rows",
    );
    None
}

/// The half width of a mask in tokens. The rest of the layout is finished.
fn solve_width(r: &mut Reader, keys: &WidthKeys, layout: &Layout, width: Width) -> Option<u32> {
    let video = layout.video_tokens();
    match width {
        Width::Tokens(tokens) if tokens <= video => Some(tokens),
        Width::Tokens(tokens) => {
            r.report(
                keys.tokens,
                format!("is {tokens}, more than the {video} video tokens"),
                format!("an integer from 1 to {video}"),
                format!("give at most {video}, which shows every token"),
            );
            None
        }
        Width::Frames(frames) => {
            let tokens = (frames * f64::from(layout.tokens_per_frame)).round();
            if tokens >= 1.0 && frames <= f64::from(layout.frames) {
                return Some(tokens as u32);
            }
            // Half a token is rounded to one token.
            let least = rounded_up(0.5 / f64::from(layout.tokens_per_frame));
            r.report(
                keys.frames,
                format!("is {frames}, which makes {tokens} tokens"),
                format!("a number from {least} to {}, which make 1 to {video} tokens", layout.frames),
                if tokens < 1.0 { "give a wider band" } else { "give a narrower band" },
            );
            None
        }
        Width::Density(wanted) => {
            let least = density::least_density(layout, keys.head);
            if wanted >= least {
                return Some(density::half_width_of_density(layout, keys.head, wanted));
            }
            let least = rounded_up(least).min(1.0);
            r.report(
                keys.density,
                format!("is {wanted}, less than text, sinks and each token itself take"),
                format!("a number from {least} to 1"),
                format!("give at least {least}, or fewer text tokens or sink frames"),
            );
            None
        }
    }
}

/// A least value, rounded up to six digits. So the number that a message gives is allowed itself.
fn rounded_up(least: f64) -> f64 {
    (least * 1e6).ceil() / 1e6
}
