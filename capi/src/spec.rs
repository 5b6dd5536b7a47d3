//! Specs: shapes of a model's attention.

use std::ffi::c_char;
use std::mem::offset_of;
use std::sync::Arc;

use framestride::shapes::layout::HeadType;
use framestride::shapes::models;
use framestride::shapes::spec::{
    Compute, Dtype, NormKind, NormOver, Pairs, Problem, Profile, QkNorm, Rope, Schedule, Spec, SpecBuilder, SpecError,
    Width,
};
use framestride::{Description, Device, Error, Kernels};
use framestride_pictures::masks;

use crate::argument::{self, Structure};
use crate::device::{self, framestride_device};
use crate::handle;
use crate::status::framestride_status::{FRAMESTRIDE_INTERNAL, FRAMESTRIDE_INVALID_SPEC, FRAMESTRIDE_UNSUPPORTED};
use crate::status::{Failure, Result, framestride_status, guard};

/// A handle of a spec: the shape of one model's attention, checked. It needs no device.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct framestride_spec {
    /// A number for the library.
    pub handle: u64,
}

/// The type of the elements of Q, K, V and the output.
pub type framestride_dtype = u32;
pub const FRAMESTRIDE_DTYPE_BF16: framestride_dtype = 0;
pub const FRAMESTRIDE_DTYPE_F16: framestride_dtype = 1;

/// What tensor cores multiply in attention.
pub type framestride_compute = u32;
/// The type of the tensors.
pub const FRAMESTRIDE_COMPUTE_DTYPE: framestride_compute = 0;
/// e4m3, 8 bits, with head_dim 128 on a Hopper. It is faster and less exact.
pub const FRAMESTRIDE_COMPUTE_E4M3: framestride_compute = 1;

/// The norm of Q and K before RoPE.
pub type framestride_norm_kind = u32;
pub const FRAMESTRIDE_NORM_NONE: framestride_norm_kind = 0;
/// x / sqrt(mean(x^2) + eps) * weight
pub const FRAMESTRIDE_NORM_RMS: framestride_norm_kind = 1;
/// (x - mean(x)) / sqrt(var(x) + eps) * weight + bias
pub const FRAMESTRIDE_NORM_LAYER: framestride_norm_kind = 2;

/// The channels that one statistic of a norm covers.
pub type framestride_norm_over = u32;
/// The head_dim channels of each head.
pub const FRAMESTRIDE_NORM_OVER_HEAD: framestride_norm_over = 0;
/// All heads x head_dim channels of a token. Every call then has all heads of the model.
pub const FRAMESTRIDE_NORM_OVER_HEADS: framestride_norm_over = 1;

/// Which channels RoPE rotates together.
pub type framestride_rope_pairs = u32;
pub const FRAMESTRIDE_ROPE_NONE: framestride_rope_pairs = 0;
/// (0, 1), (2, 3) and so on.
pub const FRAMESTRIDE_ROPE_INTERLEAVED: framestride_rope_pairs = 1;
/// (0, n / 2), (1, n / 2 + 1) and so on, of n rotated channels.
pub const FRAMESTRIDE_ROPE_HALF: framestride_rope_pairs = 2;

/// The type of a head: which keys its queries see. Arrays of head types have these values.
pub type framestride_head_type = u32;
/// Every key.
pub const FRAMESTRIDE_HEAD_DENSE: framestride_head_type = 0;
/// A band in frame-major order.
pub const FRAMESTRIDE_HEAD_SPATIAL: framestride_head_type = 1;
/// A band in token-major order.
pub const FRAMESTRIDE_HEAD_TEMPORAL: framestride_head_type = 2;

const _: () = assert!(
    FRAMESTRIDE_HEAD_DENSE == HeadType::Dense as u32
        && FRAMESTRIDE_HEAD_SPATIAL == HeadType::Spatial as u32
        && FRAMESTRIDE_HEAD_TEMPORAL == HeadType::Temporal as u32
);

/// In what the width of a mask is counted.
pub type framestride_width_unit = u32;
/// Visible pairs over all S^2 pairs, above 0 and at most 1. The nearest half width is taken.
pub const FRAMESTRIDE_WIDTH_DENSITY: framestride_width_unit = 0;
/// The half width in tokens, 1 to N.
pub const FRAMESTRIDE_WIDTH_TOKENS: framestride_width_unit = 1;
/// The half width in frames' worth of tokens.
pub const FRAMESTRIDE_WIDTH_FRAMES: framestride_width_unit = 2;

/// The width of a mask.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct framestride_width {
    /// How much of the unit.
    pub value: f64,
    pub unit: framestride_width_unit,
    pub reserved: u32,
}

/// A shape in numbers. What is 0 has its default, or is not there. shapes/src/spec.rs explains every
/// number and its limits, under the same names.
///
/// The sequence is [before | video | after]: S = before + N + after rows, with N = frames x
/// tokens_per_frame.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct framestride_problem {
    /// sizeof(framestride_problem).
    pub size: u64,
    /// What messages call it, of [a-z0-9_]. NULL is "unnamed".
    pub name: *const c_char,
    /// Latent frames.
    pub frames: u32,
    /// Patches of one latent frame.
    pub tokens_per_frame: u32,
    /// Height and width of a frame in patches, for pictures alone. Both, or neither.
    pub grid_height: u32,
    pub grid_width: u32,
    /// The most text tokens there can be before the video and after it, padding included.
    pub before_tokens: u32,
    pub after_tokens: u32,
    /// Leading frames that every query sees.
    pub sink_frames: u32,
    /// Heads of the model. A call may have another number.
    pub heads: u32,
    /// Channels of a head: 64 or 128.
    pub head_dim: u32,
    pub dtype: framestride_dtype,
    /// The batch that is planned for; 1 by default. A call may have another.
    pub batch: u32,
    pub norm_kind: framestride_norm_kind,
    pub norm_over: framestride_norm_over,
    pub rope_pairs: framestride_rope_pairs,
    /// How many leading channels of a head are rotated; head_dim by default.
    pub rope_channels: u32,
    /// 1 when text before the video is rotated too, and likewise after it.
    pub rope_before: u32,
    pub rope_after: u32,
    /// 1 when each head has its own tables.
    pub rope_per_head: u32,
    /// The term that is added in the root; 1e-6 by default.
    pub norm_eps: f64,
    /// The masks of spatial and temporal heads.
    pub spatial: framestride_width,
    pub temporal: framestride_width,
    /// Seed of the draw of sampled rows, where a call gives none.
    pub profile_seed: u64,
    /// Rows that profiling samples from each head, 1 to 1024; 64 by default.
    pub profile_rows: u32,
    /// Denoising steps and layers of the model, and how many leading ones of each stay dense.
    pub schedule_steps: u32,
    pub schedule_layers: u32,
    pub schedule_dense_steps: u32,
    pub schedule_dense_layers: u32,
    pub compute: framestride_compute,
    /// With FRAMESTRIDE_COMPUTE_E4M3, the largest relative error of 8 bits over the sampled rows of a head,
    /// above 0 and at most 1. Heads beyond it are computed in the type of the tensors. 0: no head is.
    pub largest_error: f64,
}

// SAFETY: it begins with its size, and consists of numbers and a pointer.
unsafe impl Structure for framestride_problem {
    const NAME: &str = "framestride_problem";
    const LEAST: usize = offset_of!(framestride_problem, largest_error);
}

/// What a spec says, and what follows from it.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct framestride_spec_details {
    /// sizeof(framestride_spec_details), set by the caller.
    pub size: u64,
    pub name: [c_char; 128],
    /// Rows of a sequence: S = before_tokens + video_tokens + after_tokens.
    pub sequence: u32,
    pub video_tokens: u32,
    pub before_tokens: u32,
    pub after_tokens: u32,
    pub frames: u32,
    pub tokens_per_frame: u32,
    /// Height and width of a frame in patches, or 0 and 0.
    pub grid_height: u32,
    pub grid_width: u32,
    pub sink_frames: u32,
    pub heads: u32,
    pub head_dim: u32,
    pub dtype: framestride_dtype,
    pub batch: u32,
    /// The most batch x heads of a call.
    pub most_heads: u32,
    pub norm_kind: framestride_norm_kind,
    pub norm_over: framestride_norm_over,
    pub rope_pairs: framestride_rope_pairs,
    /// Rotated channels of a head, or 0 without RoPE. A row of a table has half as many columns.
    pub rope_channels: u32,
    /// 1 when text before the video is rotated too, and likewise after it.
    pub rope_before: u32,
    pub rope_after: u32,
    /// Rows of the tables, or 0 without RoPE.
    pub rope_rows: u32,
    /// 1 when each head has its own tables.
    pub rope_per_head: u32,
    /// Half widths of the spatial and the temporal band in tokens, 1 to N.
    pub spatial_half_width: u32,
    pub temporal_half_width: u32,
    pub profile_rows: u32,
    /// A call stays dense where step < dense_steps, or layer < dense_layers. Both count from 0.
    pub schedule_steps: u32,
    pub schedule_layers: u32,
    pub schedule_dense_steps: u32,
    pub schedule_dense_layers: u32,
    pub compute: framestride_compute,
    pub profile_seed: u64,
    pub norm_eps: f64,
    /// Visible pairs over S^2 of a spatial and of a temporal head, when all text is valid.
    pub spatial_density: f64,
    pub temporal_density: f64,
    /// The widths of the masks as the spec has them.
    pub spatial: framestride_width,
    pub temporal: framestride_width,
    /// The largest error of a head in 8 bits, or 0 where the spec has none.
    pub largest_error: f64,
}

// SAFETY: it begins with its size, and consists of numbers.
unsafe impl Structure for framestride_spec_details {
    const NAME: &str = "framestride_spec_details";
    const LEAST: usize = offset_of!(framestride_spec_details, largest_error);
}

/// Makes a spec of numbers.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn framestride_spec_new(
    problem: *const framestride_problem,
    spec: *mut framestride_spec,
) -> framestride_status {
    guard(|| {
        // SAFETY: the pointer is null, or that of a structure with its size.
        let problem = unsafe { argument::read_sized(problem)? };
        // SAFETY: its name is null or a text, and `spec` is null or that of a variable.
        unsafe { write_spec(spec, || of_numbers(&problem)) }
    })
}

/// Makes a spec of `bytes` bytes of TOML text. README.md has an example.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn framestride_spec_parse(
    toml: *const c_char,
    bytes: usize,
    spec: *mut framestride_spec,
) -> framestride_status {
    guard(|| {
        // SAFETY: the pointer is null, or that of so many bytes.
        let toml = unsafe { argument::text_of("toml", toml, bytes)? };
        // SAFETY: the pointer is null, or that of a variable.
        unsafe { write_spec(spec, || parse("toml", toml)) }
    })
}

/// Makes a spec that the library ships, such as "hunyuan_video_720p". shapes/models has them all.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn framestride_spec_shipped(
    name: *const c_char,
    spec: *mut framestride_spec,
) -> framestride_status {
    guard(|| {
        // SAFETY: the pointer is null, or that of a text.
        let name = unsafe { argument::text("name", name)? };
        // SAFETY: the pointer is null, or that of a variable.
        unsafe { write_spec(spec, || Ok(Spec::shipped(name).map_err(Error::from)?)) }
    })
}

/// Writes the names of all specs that the library ships to `buffer`, one a line, as framestride_spec_toml
/// does.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn framestride_spec_names(
    buffer: *mut c_char,
    capacity: usize,
    needed: *mut usize,
) -> framestride_status {
    guard(|| {
        let names: Vec<&str> = models().iter().map(|(name, _)| *name).collect();
        // SAFETY: the buffer has room for `capacity` bytes, and `needed` is null or that of a variable.
        unsafe { argument::write_text(&names.join("\n"), buffer, capacity, needed) }
    })
}

/// Fills `details`, whose size is set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn framestride_spec_info(
    spec: framestride_spec,
    details: *mut framestride_spec_details,
) -> framestride_status {
    guard(|| {
        let spec: Arc<Spec> = handle::get(spec.handle)?;
        // SAFETY: the pointer is null, or that of a structure with its size.
        unsafe { argument::write_sized(details, self::details(&spec)) }
    })
}

/// Writes the TOML text of a spec to `buffer`, with a zero byte behind it.
///
/// `*needed` becomes the bytes of both. Where `capacity` is less, nothing else is written, and that
/// is no error: `buffer` may be NULL with a capacity of 0, to ask for the size.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn framestride_spec_toml(
    spec: framestride_spec,
    buffer: *mut c_char,
    capacity: usize,
    needed: *mut usize,
) -> framestride_status {
    guard(|| {
        let spec: Arc<Spec> = handle::get(spec.handle)?;
        // SAFETY: the buffer has room for `capacity` bytes, and `needed` is null or that of a variable.
        unsafe { argument::write_text(&spec.source.text, buffer, capacity, needed) }
    })
}

/// Writes a description for people to `buffer`, as framestride_spec_toml does: sequence, tiles, exact
/// densities, workspace, arithmetic, and what the spec is estimated to gain over dense attention.
///
/// `gpu` is the short name of one that there are rates of, such as "h100". NULL is the first GPU of
/// this machine, or all there are rates of.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn framestride_describe(
    spec: framestride_spec,
    gpu: *const c_char,
    buffer: *mut c_char,
    capacity: usize,
    needed: *mut usize,
) -> framestride_status {
    guard(|| {
        let spec: Arc<Spec> = handle::get(spec.handle)?;
        // SAFETY: the pointer is null, or that of a text.
        let gpu = if gpu.is_null() { None } else { Some(unsafe { argument::text("gpu", gpu)? }) };
        let text = Description::new(&spec, gpu)?.to_string();
        // SAFETY: the buffer has room for `capacity` bytes, and `needed` is null or that of a variable.
        unsafe { argument::write_text(&text, buffer, capacity, needed) }
    })
}

/// Draws the masks of a spec, as the command `framestride plot` does, and writes the PNG file to
/// `buffer`. Sizes are as for framestride_spec_toml, but there is no zero byte.
///
/// Pictures of common models have less than 1 MiB. Each call draws, which takes a moment.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn framestride_plot(
    spec: framestride_spec,
    buffer: *mut u8,
    capacity: usize,
    needed: *mut usize,
) -> framestride_status {
    guard(|| {
        let spec: Arc<Spec> = handle::get(spec.handle)?;
        let png = masks::picture(&spec, &HeadType::ALL).png();
        let png = png.map_err(|error| Failure::new(FRAMESTRIDE_INTERNAL, error))?;
        // SAFETY: the buffer has room for `capacity` bytes, and `needed` is null or that of a variable.
        unsafe { argument::write_bytes(&png, buffer, capacity, needed) }
    })
}

/// The half width in tokens that gives a type of head the density that is nearest to `density`. A
/// call takes it as spatial_half_width or temporal_half_width.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn framestride_half_width(
    spec: framestride_spec,
    head_type: framestride_head_type,
    density: f64,
    half_width: *mut u32,
) -> framestride_status {
    guard(|| {
        let spec: Arc<Spec> = handle::get(spec.handle)?;
        let solve = || {
            let builder = spec.to_builder();
            let density = Width::Density(density);
            let (builder, head_type) = match head_type {
                FRAMESTRIDE_HEAD_SPATIAL => (builder.spatial(density), HeadType::Spatial),
                FRAMESTRIDE_HEAD_TEMPORAL => (builder.temporal(density), HeadType::Temporal),
                other => return Err(unknown("head_type", other, "1 (spatial) or 2 (temporal)")),
            };
            // Nobody wrote a text, so no line of it is shown.
            let said = |p: &Problem| format!("density {}\n = allowed: {}\n = mend: {}", p.found, p.allowed, p.mend);
            let refused = |error: SpecError| {
                let problems: Vec<String> = error.problems.iter().map(said).collect();
                Failure::new(FRAMESTRIDE_INVALID_SPEC, problems.join("\n"))
            };
            Ok(builder.build().map_err(refused)?.layout.half_width(head_type))
        };
        // SAFETY: the pointer is null, or that of a variable.
        unsafe { argument::write("half_width", half_width, solve) }
    })
}

/// Whether a device runs the kernels of a spec: FRAMESTRIDE_OK, or FRAMESTRIDE_UNSUPPORTED and a
/// message with the reason. Nothing is loaded.
#[unsafe(no_mangle)]
pub extern "C" fn framestride_supported(device: framestride_device, spec: framestride_spec) -> framestride_status {
    guard(|| {
        let spec: Arc<Spec> = handle::get(spec.handle)?;
        let device = handle::get::<Device>(device.handle)?;
        device::check(&device)?;
        let refused = |error| Failure::new(FRAMESTRIDE_UNSUPPORTED, error);
        device.arch().and_then(|arch| Kernels::for_spec(&spec, arch)).map(|_| ()).map_err(refused)
    })
}

/// Frees a spec. What was made of it goes on working.
#[unsafe(no_mangle)]
pub extern "C" fn framestride_spec_free(spec: framestride_spec) -> framestride_status {
    guard(|| handle::remove::<Arc<Spec>>(spec.handle))
}

/// # Safety
/// The pointer is null, or that of a variable.
pub(crate) unsafe fn write_spec(spec: *mut framestride_spec, make: impl FnOnce() -> Result<Spec>) -> Result {
    let make = || Ok(framestride_spec { handle: handle::insert(Arc::new(make()?)) });
    // SAFETY: the caller's promise.
    unsafe { argument::write("spec", spec, make) }
}

/// The spec of a text, which messages call `file`.
fn parse(file: &str, toml: &str) -> Result<Spec> {
    Ok(Spec::parse(file, toml).map_err(Error::from)?)
}

/// The spec of numbers, which are checked as those of a file are.
///
/// # Safety
/// The name is null, or a text.
unsafe fn of_numbers(problem: &framestride_problem) -> Result<Spec> {
    let p = problem;
    argument::check_reserved(&[p.spatial.reserved, p.temporal.reserved])?;
    let choice = |name: &str, value: u32, allowed: &[u32], meaning: &str| match allowed.contains(&value) {
        true => Ok(value as usize),
        false => Err(unknown(name, value, meaning)),
    };
    let flag = |name: &str, value: u32| choice(name, value, &[0, 1], "0 or 1").map(|value| value == 1);
    let dtype = Dtype::ALL[choice("dtype", p.dtype, &[0, 1], "0 (bf16) or 1 (f16)")?];
    let compute = Compute::ALL[choice("compute", p.compute, &[0, 1], "0 (the dtype) or 1 (e4m3)")?];
    let mut builder = Spec::builder()
        .frames(p.frames)
        .tokens_per_frame(p.tokens_per_frame)
        .grid((p.grid_height > 0 || p.grid_width > 0).then_some([p.grid_height, p.grid_width]))
        .before(p.before_tokens)
        .after(p.after_tokens)
        .sink_frames(p.sink_frames)
        .heads(p.heads)
        .head_dim(p.head_dim)
        .dtype(dtype)
        .compute(compute)
        .largest_error((p.largest_error != 0.0).then_some(p.largest_error))
        .batch(p.batch.max(1))
        .spatial(width("spatial", p.spatial)?)
        .temporal(width("temporal", p.temporal)?)
        .schedule(Schedule {
            steps: p.schedule_steps,
            layers: p.schedule_layers,
            dense_steps: p.schedule_dense_steps,
            dense_layers: p.schedule_dense_layers,
        });
    if !p.name.is_null() {
        // SAFETY: the caller's promise.
        builder = builder.name(unsafe { argument::text("name", p.name)? });
    }
    let kind = choice("norm_kind", p.norm_kind, &[0, 1, 2], "0 (none), 1 (rms) or 2 (layer)")?;
    let over = NormOver::ALL[choice("norm_over", p.norm_over, &[0, 1], "0 (head) or 1 (heads)")?];
    if kind > 0 {
        let eps = if p.norm_eps == 0.0 { 1e-6 } else { p.norm_eps };
        builder = builder.qk_norm(QkNorm { kind: NormKind::ALL[kind - 1], over, eps });
    }
    let pairs = choice("rope_pairs", p.rope_pairs, &[0, 1, 2], "0 (none), 1 (interleaved) or 2 (half)")?;
    let (before, after) = (flag("rope_before", p.rope_before)?, flag("rope_after", p.rope_after)?);
    let per_head = flag("rope_per_head", p.rope_per_head)?;
    if pairs > 0 {
        let channels = if p.rope_channels == 0 { p.head_dim } else { p.rope_channels };
        builder = builder.rope(Rope { pairs: Pairs::ALL[pairs - 1], channels, before, after, per_head });
    }
    let parse = |builder: SpecBuilder| parse(framestride_problem::NAME, &builder.to_toml());
    let seed = p.profile_seed;
    if p.profile_rows > 0 {
        return parse(builder.profile(Profile { rows: p.profile_rows, seed }));
    }
    let spec = parse(builder)?;
    if seed == 0 { Ok(spec) } else { parse(spec.to_builder().profile(Profile { seed, ..spec.profile })) }
}

fn width(name: &str, width: framestride_width) -> Result<Width> {
    let framestride_width { value, unit, .. } = width;
    match unit {
        FRAMESTRIDE_WIDTH_DENSITY => Ok(Width::Density(value)),
        FRAMESTRIDE_WIDTH_FRAMES => Ok(Width::Frames(value)),
        FRAMESTRIDE_WIDTH_TOKENS if f64::from(value as u32) == value => Ok(Width::Tokens(value as u32)),
        FRAMESTRIDE_WIDTH_TOKENS => {
            let allowed = "a whole number of tokens, 1 to N";
            Err(Failure::argument(&format!("{name}.value"), value, allowed, "Pass a whole number"))
        }
        other => Err(unknown(&format!("{name}.unit"), other, "0 (density), 1 (tokens) or 2 (frames)")),
    }
}

impl framestride_width {
    fn of(width: Width) -> framestride_width {
        let (value, unit) = match width {
            Width::Density(density) => (density, FRAMESTRIDE_WIDTH_DENSITY),
            Width::Tokens(tokens) => (tokens.into(), FRAMESTRIDE_WIDTH_TOKENS),
            Width::Frames(frames) => (frames, FRAMESTRIDE_WIDTH_FRAMES),
        };
        framestride_width { value, unit, reserved: 0 }
    }
}

/// A number that stands for nothing.
pub(crate) fn unknown(name: &str, value: u32, allowed: &str) -> Failure {
    Failure::argument(name, value, allowed, "Pass one of the constants of the header")
}

fn details(spec: &Spec) -> framestride_spec_details {
    let layout = &spec.layout;
    let [grid_height, grid_width] = spec.grid.unwrap_or_default();
    let norm = spec.qk_norm;
    let rope = spec.rope;
    framestride_spec_details {
        size: 0,
        name: argument::field(&spec.name),
        sequence: layout.sequence(),
        video_tokens: layout.video_tokens(),
        before_tokens: layout.before,
        after_tokens: layout.after,
        frames: layout.frames.value,
        tokens_per_frame: layout.tokens_per_frame.value,
        grid_height,
        grid_width,
        sink_frames: layout.sink_frames,
        heads: spec.heads,
        head_dim: spec.head_dim,
        dtype: match spec.dtype {
            Dtype::Bf16 => FRAMESTRIDE_DTYPE_BF16,
            Dtype::F16 => FRAMESTRIDE_DTYPE_F16,
        },
        batch: spec.batch,
        most_heads: spec.most_launch_heads(),
        norm_kind: match norm.map(|norm| norm.kind) {
            None => FRAMESTRIDE_NORM_NONE,
            Some(NormKind::Rms) => FRAMESTRIDE_NORM_RMS,
            Some(NormKind::Layer) => FRAMESTRIDE_NORM_LAYER,
        },
        norm_over: match norm.map(|norm| norm.over) {
            None | Some(NormOver::Head) => FRAMESTRIDE_NORM_OVER_HEAD,
            Some(NormOver::Heads) => FRAMESTRIDE_NORM_OVER_HEADS,
        },
        rope_pairs: match rope.map(|rope| rope.pairs) {
            None => FRAMESTRIDE_ROPE_NONE,
            Some(Pairs::Interleaved) => FRAMESTRIDE_ROPE_INTERLEAVED,
            Some(Pairs::Half) => FRAMESTRIDE_ROPE_HALF,
        },
        rope_channels: rope.map_or(0, |rope| rope.channels),
        rope_before: rope.is_some_and(|rope| rope.before).into(),
        rope_after: rope.is_some_and(|rope| rope.after).into(),
        rope_rows: if rope.is_some() { spec.rope_rows().len() as u32 } else { 0 },
        rope_per_head: rope.is_some_and(|rope| rope.per_head).into(),
        spatial_half_width: layout.spatial_half_width,
        temporal_half_width: layout.temporal_half_width,
        profile_rows: spec.profile.rows,
        schedule_steps: spec.schedule.steps,
        schedule_layers: spec.schedule.layers,
        schedule_dense_steps: spec.schedule.dense_steps,
        schedule_dense_layers: spec.schedule.dense_layers,
        compute: match spec.compute {
            Compute::Dtype => FRAMESTRIDE_COMPUTE_DTYPE,
            Compute::E4m3 => FRAMESTRIDE_COMPUTE_E4M3,
        },
        profile_seed: spec.profile.seed,
        norm_eps: norm.map_or(0.0, |norm| norm.eps),
        spatial_density: spec.density(HeadType::Spatial),
        temporal_density: spec.density(HeadType::Temporal),
        spatial: framestride_width::of(spec.spatial),
        temporal: framestride_width::of(spec.temporal),
        largest_error: spec.largest_error.unwrap_or(0.0),
    }
}
