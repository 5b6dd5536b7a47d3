//! A spec made in code. Its values become the lines of a TOML file, which the same parser reads. So
//! keys, defaults, checks and messages are those of a file.

use std::collections::BTreeMap;

use super::keys::{KEYS, Key, find};
use super::lines::Lines;
use super::{Compute, Dtype, Profile, QkNorm, Rope, Schedule, Spec, SpecError, Width};

/// What messages call the text of a spec that was made in code.
const FILE: &str = "Spec::builder()";

/// Makes a [`Spec`] in code. [`Spec::builder`] gives one without values, and [`Spec::to_builder`]
/// one with those of a spec.
///
/// Each method takes what the field of a [`Spec`] holds. The module's documentation says what it
/// means. A value that is given again replaces the earlier one. What is not given has the default
/// of the file, and the name `unnamed`.
///
/// ```
/// use framestride_shapes::spec::{NormKind, NormOver, Pairs, QkNorm, Rope, Spec, Width};
///
/// let spec = Spec::builder()
///     .name("hunyuan_video_720p")
///     .frames(33)
///     .tokens_per_frame(3600)
///     .after(256)
///     .heads(24)
///     .head_dim(128)
///     .qk_norm(QkNorm { kind: NormKind::Rms, over: NormOver::Head, eps: 1e-6 })
///     .rope(Rope { pairs: Pairs::Interleaved, channels: 128, before: false, after: false, per_head: false })
///     .spatial(Width::Density(0.25))
///     .temporal(Width::Density(0.25))
///     .build()?;
/// assert_eq!(spec.layout.sequence(), 33 * 3600 + 256);
///
/// // The same model with another clip. Densities give half widths of its own.
/// let short = spec.to_builder().name("hunyuan_video_short").frames(17).build()?;
/// assert_eq!(short.layout.sequence(), 17 * 3600 + 256);
/// assert!(short.layout.spatial_half_width < spec.layout.spatial_half_width);
/// # Ok::<(), framestride_shapes::spec::SpecError>(())
/// ```
///
/// All problems come at once, as those of a file do. They show the lines that the values became:
///
/// ```
/// # use framestride_shapes::spec::{Spec, Width};
/// let narrow = Width::Density(0.25);
/// let wrong = Spec::builder().frames(0).tokens_per_frame(3600).heads(24).spatial(narrow).temporal(narrow);
/// let error = wrong.build().unwrap_err();
/// assert_eq!(error.problems.len(), 2);
/// assert_eq!(error.problems[0].to_string(), r#"error: `video.frames` is 0
///  --> Spec::builder():3:10
///   |
/// 3 | frames = 0
///   |          ^
///   = allowed: an integer from 1 to 33554431
///   = mend: write for example `frames = 33`: latent frames
/// "#);
/// assert_eq!((&*error.problems[1].key, &*error.problems[1].found), ("attention.head_dim", "is missing"));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub struct SpecBuilder {
    /// The values that were given, as TOML, by the paths of their keys.
    values: BTreeMap<&'static str, String>,
}

impl SpecBuilder {
    pub(super) fn new() -> SpecBuilder {
        SpecBuilder { values: BTreeMap::new() }.name("unnamed")
    }

    pub(super) fn with_values_of(spec: &Spec) -> SpecBuilder {
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
        } = spec;
        SpecBuilder::new()
            .name(name)
            .frames(layout.frames.value)
            .tokens_per_frame(layout.tokens_per_frame.value)
            .grid(*grid)
            .before(layout.before)
            .after(layout.after)
            .heads(*heads)
            .head_dim(*head_dim)
            .dtype(*dtype)
            .compute(*compute)
            .batch(*batch)
            .qk_norm(*qk_norm)
            .rope(*rope)
            .spatial(*spatial)
            .temporal(*temporal)
            .sink_frames(layout.sink_frames)
            .profile(*profile)
            .largest_error(*largest_error)
            .schedule(*schedule)
    }

    /// `name`: what the files made from the spec are called.
    pub fn name(self, name: &str) -> SpecBuilder {
        self.set(const { find("name") }, quoted(name))
    }

    /// `video.frames`: latent frames.
    pub fn frames(self, frames: u32) -> SpecBuilder {
        self.set(const { find("video.frames") }, frames.to_string())
    }

    /// `video.tokens_per_frame`: patches of one latent frame.
    pub fn tokens_per_frame(self, tokens: u32) -> SpecBuilder {
        self.set(const { find("video.tokens_per_frame") }, tokens.to_string())
    }

    /// `video.grid`: height and width of a frame in patches.
    pub fn grid(self, grid: impl Into<Option<[u32; 2]>>) -> SpecBuilder {
        let grid = grid.into().map(|[height, width]| format!("[{height}, {width}]"));
        self.set(const { find("video.grid") }, grid)
    }

    /// `[before]`: the most text tokens there can be before the video. With 0 there are none.
    pub fn before(self, tokens: u32) -> SpecBuilder {
        self.set(const { find("before.tokens") }, (tokens > 0).then(|| tokens.to_string()))
    }

    /// `[after]`: the most text tokens there can be after the video. With 0 there are none.
    pub fn after(self, tokens: u32) -> SpecBuilder {
        self.set(const { find("after.tokens") }, (tokens > 0).then(|| tokens.to_string()))
    }

    /// `attention.heads` of the model.
    pub fn heads(self, heads: u32) -> SpecBuilder {
        self.set(const { find("attention.heads") }, heads.to_string())
    }

    /// `attention.head_dim`: 64 or 128.
    pub fn head_dim(self, head_dim: u32) -> SpecBuilder {
        self.set(const { find("attention.head_dim") }, head_dim.to_string())
    }

    /// `attention.dtype`.
    pub fn dtype(self, dtype: Dtype) -> SpecBuilder {
        self.set(const { find("attention.dtype") }, quoted(dtype.as_str()))
    }

    /// `attention.compute`.
    pub fn compute(self, compute: Compute) -> SpecBuilder {
        self.set(const { find("attention.compute") }, quoted(compute.as_str()))
    }

    /// `attention.batch` that is planned for.
    pub fn batch(self, batch: u32) -> SpecBuilder {
        self.set(const { find("attention.batch") }, batch.to_string())
    }

    /// `[qk_norm]`.
    pub fn qk_norm(self, norm: impl Into<Option<QkNorm>>) -> SpecBuilder {
        let norm = norm.into();
        self.set(const { find("qk_norm.kind") }, norm.map(|norm| quoted(norm.kind.as_str())))
            .set(const { find("qk_norm.over") }, norm.map(|norm| quoted(norm.over.as_str())))
            .set(const { find("qk_norm.eps") }, norm.map(|norm| float(norm.eps)))
    }

    /// `[rope]`.
    pub fn rope(self, rope: impl Into<Option<Rope>>) -> SpecBuilder {
        let rope = rope.into();
        self.set(const { find("rope.pairs") }, rope.map(|rope| quoted(rope.pairs.as_str())))
            .set(const { find("rope.channels") }, rope.map(|rope| rope.channels.to_string()))
            .set(const { find("rope.before") }, rope.map(|rope| rope.before.to_string()))
            .set(const { find("rope.after") }, rope.map(|rope| rope.after.to_string()))
            .set(const { find("rope.per_head") }, rope.map(|rope| rope.per_head.to_string()))
    }

    /// `[masks.spatial]`.
    pub fn spatial(self, width: Width) -> SpecBuilder {
        let [density, tokens, frames] = width_values(width);
        self.set(const { find("masks.spatial.density") }, density)
            .set(const { find("masks.spatial.half_width") }, tokens)
            .set(const { find("masks.spatial.half_width_frames") }, frames)
    }

    /// `[masks.temporal]`.
    pub fn temporal(self, width: Width) -> SpecBuilder {
        let [density, tokens, frames] = width_values(width);
        self.set(const { find("masks.temporal.density") }, density)
            .set(const { find("masks.temporal.half_width") }, tokens)
            .set(const { find("masks.temporal.half_width_frames") }, frames)
    }

    /// `sink.frames`: leading frames that every query sees.
    pub fn sink_frames(self, frames: u32) -> SpecBuilder {
        self.set(const { find("sink.frames") }, frames.to_string())
    }

    /// `[profile]`.
    pub fn profile(self, Profile { rows, seed }: Profile) -> SpecBuilder {
        self.set(const { find("profile.rows") }, rows.to_string()).set(const { find("profile.seed") }, seed.to_string())
    }

    /// `precision.largest_error`. Without it, all heads multiply in the type that `attention.compute` says.
    pub fn largest_error(self, error: impl Into<Option<f64>>) -> SpecBuilder {
        self.set(const { find("precision.largest_error") }, error.into().map(float))
    }

    /// `[schedule]`. With the default, all numbers of which are zero, no call stays dense.
    pub fn schedule(self, schedule: Schedule) -> SpecBuilder {
        let number = |number: u32| (schedule != Schedule::default()).then(|| number.to_string());
        self.set(const { find("schedule.steps") }, number(schedule.steps))
            .set(const { find("schedule.layers") }, number(schedule.layers))
            .set(const { find("schedule.dense_steps") }, number(schedule.dense_steps))
            .set(const { find("schedule.dense_layers") }, number(schedule.dense_layers))
    }

    /// The TOML file that says the same.
    #[must_use]
    pub fn to_toml(&self) -> String {
        let mut lines = Lines::new();
        // Whatever the order of the calls, the same values make the same text.
        for key in KEYS {
            if let Some(value) = self.values.get(key.path) {
                lines.push(key.table(), key.name(), value, ());
            }
        }
        lines.text(()).0
    }

    /// Checks the values, and makes the spec of them. Its source is [`SpecBuilder::to_toml`].
    ///
    /// # Errors
    /// All problems that the same file would have.
    pub fn build(&self) -> Result<Spec, SpecError> {
        Spec::parse(FILE, &self.to_toml())
    }

    /// Gives a key another value, as TOML, or none.
    fn set(mut self, key: &'static Key, value: impl Into<Option<String>>) -> SpecBuilder {
        match value.into() {
            Some(value) => self.values.insert(key.path, value),
            None => self.values.remove(key.path),
        };
        self
    }
}

/// The values of the keys `density`, `half_width` and `half_width_frames`.
fn width_values(width: Width) -> [Option<String>; 3] {
    match width {
        Width::Density(density) => [Some(float(density)), None, None],
        Width::Tokens(tokens) => [None, Some(tokens.to_string()), None],
        Width::Frames(frames) => [None, None, Some(float(frames))],
    }
}

/// A float as TOML writes it. It is read back as the same number.
fn float(value: f64) -> String {
    // Rust writes the others as TOML does, with a fraction or an exponent.
    if value.is_nan() { "nan".into() } else { format!("{value:?}") }
}

/// A string as TOML writes it.
fn quoted(text: &str) -> String {
    let escaped = text.chars().map(|c| match c {
        '"' | '\\' => format!("\\{c}"),
        c if c.is_control() => format!("\\u{:04x}", u32::from(c)),
        c => c.into(),
    });
    format!("\"{}\"", escaped.collect::<String>())
}
