//! Every table and key of the spec, with its type, range, default and meaning.
//!
//! The parser reads only keys of this list, and refuses all others. It looks them up in constants,
//! so that another key does not compile. The JSON schema is made from this list too.

use super::{Compute, Dtype, NormKind, NormOver, Pairs};
use crate::blocks::GRID_Z;

/// A table of the spec.
pub(crate) struct Table {
    /// Dotted path. It is `""` for the top of the file.
    pub path: &'static str,
    /// Whether a spec must have it.
    pub required: bool,
    /// What it describes.
    pub doc: &'static str,
}

/// A key of a [`Table`].
pub(crate) struct Key {
    /// Dotted path of the key.
    pub path: &'static str,
    /// Type and range of its value.
    pub kind: Kind,
    /// What happens when it is not written.
    pub presence: Presence,
    /// Its meaning, as a noun phrase.
    pub doc: &'static str,
    /// A sensible value, as TOML.
    pub example: &'static str,
}

/// Type and range of a value.
pub(crate) enum Kind {
    /// A string of 1 to [`NAME_LENGTH`] characters: `a` to `z`, `0` to `9` and `_`.
    Name,
    /// An integer in a range. Both ends are allowed.
    Integer(u64, u64),
    /// One of these integers.
    IntegerOf(&'static [u64]),
    /// An integer or float above the first number and at most the second.
    Number(f64, f64),
    /// One of these strings.
    Choice(&'static [&'static str]),
    /// `true` or `false`.
    Boolean,
    /// Two integers in a range. Both ends are allowed.
    Pair(u64, u64),
}

/// What happens when a key is not written.
pub(crate) enum Presence {
    /// It is an error, when its table is there.
    Required,
    /// It has this value, as TOML.
    Default(&'static str),
    /// It is not used.
    Optional,
    /// Exactly one key of this table must be written.
    OneOfTable,
}

/// The most characters of a name, which becomes part of file names.
pub(crate) const NAME_LENGTH: usize = 64;

/// The largest number of tokens or frames. Whether a packed head fits 4 GiB is checked besides.
const COUNT: u64 = (1 << 25) - 1;

/// The most rows that profiling samples from a head.
pub(crate) const MOST_PROFILE_ROWS: u64 = 1024;

pub(crate) const TABLES: &[Table] = &[
    Table { path: "", required: true, doc: "the attention of one video diffusion transformer" },
    Table { path: "video", required: true, doc: "latent frames of patches" },
    Table { path: "text", required: false, doc: "text tokens in the self-attention, on one side of the video" },
    Table { path: "before", required: false, doc: "tokens before the video that see everything, as text does" },
    Table { path: "after", required: false, doc: "tokens after the video that see everything, as text does" },
    Table { path: "attention", required: true, doc: "heads and their type" },
    Table { path: "qk_norm", required: false, doc: "norm of Q and K before RoPE; without the table there is none" },
    Table {
        path: "rope",
        required: false,
        doc: "rotary embedding of Q and K, its cosines and sines given at run time; without the table there is none",
    },
    Table { path: "masks", required: true, doc: "the two masks that profiling chooses from" },
    Table {
        path: "masks.spatial",
        required: true,
        doc: "band in frame-major order; its width is given in exactly one way",
    },
    Table {
        path: "masks.temporal",
        required: true,
        doc: "band in token-major order; its width is given in exactly one way",
    },
    Table { path: "sink", required: false, doc: "frames that every query sees" },
    Table { path: "profile", required: false, doc: "online profiling of the heads" },
    Table { path: "precision", required: false, doc: "which heads may multiply in 8 bits; without the table all do" },
    Table { path: "schedule", required: false, doc: "calls that stay dense; without the table none do" },
];

/// Where [text] may stand: before the video or after it.
pub(crate) const POSITIONS: [&str; 2] = ["first", "last"];

const DENSITY: &str = "visible pairs over all S x S pairs; the nearest half width is used";
const HALF_WIDTH: &str = "tokens; positions that differ by less see each other";
const HALF_WIDTH_FRAMES: &str =
    "half width in frames' worth of tokens, tokens_per_frame positions each in both layouts";

pub(crate) const KEYS: &[Key] = &[
    key("name", Kind::Name, Presence::Required, "name of the spec and of the files made from it", "\"my_model\""),
    key("video.frames", Kind::Integer(1, COUNT), Presence::Required, "latent frames", "33"),
    key("video.tokens_per_frame", Kind::Integer(1, COUNT), Presence::Required, "tokens of one latent frame", "3600"),
    key(
        "video.grid",
        Kind::Pair(1, COUNT),
        Presence::Optional,
        "height and width of a latent frame in patches, for pictures",
        "[45, 80]",
    ),
    key("text.tokens", Kind::Integer(1, COUNT), Presence::Required, "text tokens, padding included", "256"),
    key(
        "text.position",
        Kind::Choice(&POSITIONS),
        Presence::Default("\"last\""),
        "place of the text in the sequence",
        "\"last\"",
    ),
    key(
        "before.tokens",
        Kind::Integer(1, COUNT),
        Presence::Required,
        "tokens before the video, padding included",
        "16",
    ),
    key("after.tokens", Kind::Integer(1, COUNT), Presence::Required, "tokens after the video, padding included", "256"),
    key("attention.heads", Kind::Integer(1, GRID_Z), Presence::Required, "attention heads of a layer", "24"),
    key("attention.head_dim", Kind::IntegerOf(&[64, 128]), Presence::Required, "channels of a head", "128"),
    key(
        "attention.dtype",
        Kind::Choice(&[Dtype::Bf16.as_str(), Dtype::F16.as_str()]),
        Presence::Default("\"bf16\""),
        "type of Q, K, V and the output",
        "\"bf16\"",
    ),
    key(
        "attention.compute",
        Kind::Choice(&[Compute::Dtype.as_str(), Compute::E4m3.as_str()]),
        Presence::Default("\"dtype\""),
        "what tensor cores multiply in attention: the type of the tensors, or 8 bits",
        "\"dtype\"",
    ),
    key(
        "attention.batch",
        Kind::Integer(1, GRID_Z),
        Presence::Default("1"),
        "batch items of a call, 2 with classifier-free guidance; kernels take any batch, this one is planned for",
        "1",
    ),
    key(
        "qk_norm.kind",
        Kind::Choice(&[NormKind::Rms.as_str(), NormKind::Layer.as_str()]),
        Presence::Required,
        "RMS norm or layer norm",
        "\"rms\"",
    ),
    key(
        "qk_norm.over",
        Kind::Choice(&[NormOver::Head.as_str(), NormOver::Heads.as_str()]),
        Presence::Default("\"head\""),
        "extent of one statistic: head_dim channels, or all heads x head_dim",
        "\"head\"",
    ),
    key(
        "qk_norm.eps",
        // Squares below the normal numbers of f32 count as zero in the kernels. Beside this term
        // they make less difference than rounding does.
        Kind::Number(1e-30, 1.0),
        Presence::Default("1e-6"),
        "term that keeps the norm's divisor from zero",
        "1e-6",
    ),
    key(
        "rope.pairs",
        Kind::Choice(&[Pairs::Interleaved.as_str(), Pairs::Half.as_str()]),
        Presence::Required,
        "which channels rotate together: (2i, 2i + 1), or (i, i + channels / 2)",
        "\"interleaved\"",
    ),
    key(
        "rope.channels",
        Kind::Integer(Pairs::Interleaved.channel_step() as u64, 128),
        Presence::Optional,
        "leading channels of a head that are rotated, a multiple of 8 if interleaved and of 16 if half; head_dim if \
         not given",
        "96",
    ),
    key("rope.text", Kind::Boolean, Presence::Default("false"), "whether the rows of [text] are rotated too", "false"),
    key(
        "rope.before",
        Kind::Boolean,
        Presence::Default("false"),
        "whether the rows of [before] are rotated too",
        "false",
    ),
    key(
        "rope.after",
        Kind::Boolean,
        Presence::Default("false"),
        "whether the rows of [after] are rotated too",
        "false",
    ),
    key("rope.per_head", Kind::Boolean, Presence::Default("false"), "whether each head has its own tables", "false"),
    key("masks.spatial.density", Kind::Number(0.0, 1.0), Presence::OneOfTable, DENSITY, "0.25"),
    key("masks.spatial.half_width", Kind::Integer(1, COUNT), Presence::OneOfTable, HALF_WIDTH, "15616"),
    key(
        "masks.spatial.half_width_frames",
        Kind::Number(0.0, COUNT as f64),
        Presence::OneOfTable,
        HALF_WIDTH_FRAMES,
        "4.35",
    ),
    key("masks.temporal.density", Kind::Number(0.0, 1.0), Presence::OneOfTable, DENSITY, "0.25"),
    key("masks.temporal.half_width", Kind::Integer(1, COUNT), Presence::OneOfTable, HALF_WIDTH, "15616"),
    key(
        "masks.temporal.half_width_frames",
        Kind::Number(0.0, COUNT as f64),
        Presence::OneOfTable,
        HALF_WIDTH_FRAMES,
        "4.35",
    ),
    key(
        "sink.frames",
        Kind::Integer(0, COUNT),
        Presence::Default("0"),
        "leading frames that every query sees, fewer than video.frames",
        "1",
    ),
    key(
        "profile.rows",
        Kind::Integer(1, MOST_PROFILE_ROWS),
        Presence::Default("64"),
        "query rows sampled from each head, at most the video tokens; kernels take them in groups of 64",
        "64",
    ),
    key(
        "profile.seed",
        Kind::Integer(0, i64::MAX as u64),
        Presence::Default("0"),
        "seed of the draw of those rows",
        "0",
    ),
    key(
        "precision.largest_error",
        Kind::Number(0.0, 1.0),
        Presence::Required,
        "relative error of 8 bits against 16 over the sampled rows; a head beyond it is computed in 16 bits",
        "0.04",
    ),
    key("schedule.steps", Kind::Integer(1, u32::MAX as u64), Presence::Required, "denoising steps of a video", "50"),
    key(
        "schedule.layers",
        Kind::Integer(1, u32::MAX as u64),
        Presence::Required,
        "attention layers of the model",
        "60",
    ),
    key(
        "schedule.dense_steps",
        Kind::Integer(0, u32::MAX as u64),
        Presence::Default("0"),
        "leading steps that stay dense",
        "5",
    ),
    key(
        "schedule.dense_layers",
        Kind::Integer(0, u32::MAX as u64),
        Presence::Default("0"),
        "leading layers that stay dense in every step",
        "2",
    ),
];

const fn key(path: &'static str, kind: Kind, presence: Presence, doc: &'static str, example: &'static str) -> Key {
    Key { path, kind, presence, doc, example }
}

/// The key of a path. It is called in constants, so that a path that is not in the list is a
/// compile error.
pub(crate) const fn find(path: &str) -> &'static Key {
    const fn equal(a: &[u8], b: &[u8]) -> bool {
        if a.len() != b.len() {
            return false;
        }
        let mut i = 0;
        while i < a.len() {
            if a[i] != b[i] {
                return false;
            }
            i += 1;
        }
        true
    }
    let mut i = 0;
    while i < KEYS.len() {
        if equal(KEYS[i].path.as_bytes(), path.as_bytes()) {
            return &KEYS[i];
        }
        i += 1;
    }
    panic!("no such key in KEYS")
}

/// Splits a path into its table and the name in it.
fn split(path: &'static str) -> (&'static str, &'static str) {
    path.rsplit_once('.').unwrap_or(("", path))
}

impl Table {
    /// Path of the table that it stands in. The top of the file has none.
    pub fn parent(&self) -> Option<&'static str> {
        (!self.path.is_empty()).then(|| split(self.path).0)
    }

    /// Its name in that table.
    pub fn name(&self) -> &'static str {
        split(self.path).1
    }

    /// The keys in it.
    pub fn keys(&self) -> impl Iterator<Item = &'static Key> + use<> {
        let path = self.path;
        KEYS.iter().filter(move |key| key.table() == path)
    }

    /// The names of all that may stand in it.
    pub fn names(&self) -> impl Iterator<Item = &'static str> + use<> {
        self.keys().map(Key::name).chain(self.tables().map(Table::name))
    }

    /// The tables in it.
    pub fn tables(&self) -> impl Iterator<Item = &'static Table> + use<> {
        let path = self.path;
        TABLES.iter().filter(move |table| table.parent() == Some(path))
    }
}

impl Key {
    /// Path of its table.
    pub fn table(&self) -> &'static str {
        split(self.path).0
    }

    /// Its name in that table.
    pub fn name(&self) -> &'static str {
        split(self.path).1
    }
}

impl Kind {
    /// The values that are allowed, in words.
    pub fn allowed(&self) -> String {
        let quoted = |names: &[&str]| names.iter().map(|name| format!("{name:?}")).collect::<Vec<_>>().join(" or ");
        match self {
            Kind::Name => format!("a string of 1 to {NAME_LENGTH} characters of a-z, 0-9 and _"),
            Kind::Integer(least, most) => format!("an integer from {least} to {most}"),
            Kind::IntegerOf(values) => values.iter().map(u64::to_string).collect::<Vec<_>>().join(" or "),
            Kind::Number(0.0, most) => format!("a number above 0, at most {most}"),
            Kind::Number(least, most) => format!("a number from {least:e} to {most}"),
            Kind::Choice(names) => quoted(names),
            Kind::Boolean => "true or false".into(),
            Kind::Pair(least, most) => format!("[height, width], two integers from {least} to {most}"),
        }
    }
}
