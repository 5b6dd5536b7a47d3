//! Reads a spec key by key, and checks what several keys say together.

use super::keys::{Key, MOST_PROFILE_ROWS, POSITIONS, find};
use super::read::Reader;
use super::{Compute, Dtype, NormKind, NormOver, Pairs, Profile, QkNorm, Rope, Schedule, Spec, SpecSource, Width};
use crate::blocks::GRID_Z;
use crate::density;
use crate::image::{ATOM_ROWS, Image};
use crate::layout::{Divisor, HeadType, Layout, PAD_ROWS};

const NAME: &Key = find("name");
const FRAMES: &Key = find("video.frames");
const TOKENS_PER_FRAME: &Key = find("video.tokens_per_frame");
const GRID: &Key = find("video.grid");
const TEXT_TOKENS: &Key = find("text.tokens");
const TEXT_POSITION: &Key = find("text.position");
const BEFORE_TOKENS: &Key = find("before.tokens");
const AFTER_TOKENS: &Key = find("after.tokens");
const HEADS: &Key = find("attention.heads");
const HEAD_DIM: &Key = find("attention.head_dim");
const COMPUTE: &Key = find("attention.compute");
const LARGEST_ERROR: &Key = find("precision.largest_error");
const DTYPE: &Key = find("attention.dtype");
const BATCH: &Key = find("attention.batch");
const NORM_KIND: &Key = find("qk_norm.kind");
const NORM_OVER: &Key = find("qk_norm.over");
const NORM_EPS: &Key = find("qk_norm.eps");
const ROPE_PAIRS: &Key = find("rope.pairs");
const ROPE_CHANNELS: &Key = find("rope.channels");
const ROPE_TEXT: &Key = find("rope.text");
const ROPE_BEFORE: &Key = find("rope.before");
const ROPE_AFTER: &Key = find("rope.after");
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
pub(super) fn read_spec(r: &mut Reader) -> Option<Spec> {
    let name = r.name(NAME);
    let frames = r.integer32(FRAMES);
    let tokens_per_frame = r.integer32(TOKENS_PER_FRAME);
    let grid = r.pair(GRID);
    let text = read_text(r);
    let heads = r.integer32(HEADS);
    let head_dim = r.integer32(HEAD_DIM);
    let dtype = r.choice(DTYPE, &Dtype::ALL, Dtype::as_str);
    let compute = r.choice(COMPUTE, &Compute::ALL, Compute::as_str);
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
        let channels = read_channels(r, pairs, head_dim);
        let (sides, per_head) = (read_rotated_text(r, text), r.boolean(ROPE_PER_HEAD));
        let rope = pairs.zip(channels).zip(sides.zip(per_head));
        rope.map(|((pairs, channels), ([before, after], per_head))| {
            Some(Rope { pairs, channels, before, after, per_head })
        })
    } else {
        Some(None)
    };
    let (spatial, temporal) = (read_width(r, &SPATIAL), read_width(r, &TEMPORAL));
    let sink_frames = r.integer32(SINK_FRAMES);
    let rows = r.integer32(PROFILE_ROWS);
    let seed = r.integer(PROFILE_SEED);
    let largest_error = if r.has_table("precision") { r.number(LARGEST_ERROR).map(Some) } else { Some(None) };
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

    if let (Some(Compute::E4m3), Some(64)) = (compute, head_dim) {
        r.report(
            COMPUTE,
            "is \"e4m3\" with head_dim = 64",
            "\"e4m3\" with head_dim = 128, or \"dtype\"",
            "write compute = \"dtype\"; with head dim 64 the exponentials take longer than the products",
        );
    }

    if let (Some(Compute::Dtype), Some(Some(error))) = (compute, largest_error) {
        r.report(
            LARGEST_ERROR,
            format!("is {error}, but no head multiplies in 8 bits"),
            "none with compute = \"dtype\"",
            "write compute = \"e4m3\" in [attention], or remove [precision]",
        );
    }

    // From here on a layout is needed.
    let head_dim = head_dim?;
    let image = Image { head_dim, dtype: dtype.unwrap_or(Dtype::Bf16) };
    check_sizes(r, frames?, tokens_per_frame?, text?, image, heads?, batch?, rope?)?;
    let [before, after] = text?.map(|side| side.tokens);
    let mut layout = Layout {
        frames: Divisor::new(frames?),
        tokens_per_frame: Divisor::new(tokens_per_frame?),
        before,
        after,
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
        compute: compute?,
        grid,
        qk_norm: qk_norm?,
        rope: rope?,
        spatial: spatial?,
        temporal: temporal?,
        profile: Profile { rows: rows?, seed: seed? },
        largest_error: largest_error?,
        schedule: schedule?,
        source: SpecSource { file: r.source.file.into(), text: r.source.text.into() },
    })
}

/// The text on one side of the video.
#[derive(Clone, Copy)]
struct Side {
    /// 0 when there is none.
    tokens: u32,
    /// The keys that say how many there are, and whether they are rotated.
    keys: [&'static Key; 2],
}

/// The text before the video and that after it. `[text]` describes one of them.
fn read_text(r: &mut Reader) -> Option<[Side; 2]> {
    let in_text = r.has_table("text");
    let tokens = if in_text { r.integer32(TEXT_TOKENS) } else { Some(0) };
    let position = r.choice(TEXT_POSITION, &POSITIONS, |name| name);
    let sides = [[BEFORE_TOKENS, ROPE_BEFORE], [AFTER_TOKENS, ROPE_AFTER]];
    let [before, after] = [0, 1].map(|side| {
        let [key, _] = sides[side];
        let own = if r.has_table(key.table()) { Some(r.integer32(key)?) } else { None };
        let is_text = in_text && position? == POSITIONS[side];
        if own.is_some() && is_text {
            r.report(
                key,
                format!("gives the text {} the video a second time, after [text]", key.table()),
                format!("[text] with position = {:?}, or [{}]", POSITIONS[side], key.table()),
                "remove one of the two tables, or give [text] the other position",
            );
            return None;
        }
        if is_text {
            return Some(Side { tokens: tokens?, keys: [TEXT_TOKENS, ROPE_TEXT] });
        }
        Some(Side { tokens: own.unwrap_or(0), keys: sides[side] })
    });
    Some([before?, after?])
}

/// Whether the text on each side is rotated.
fn read_rotated_text(r: &mut Reader, text: Option<[Side; 2]>) -> Option<[bool; 2]> {
    let mut rotated = [false; 2];
    for (key, is_rotated) in [ROPE_TEXT, ROPE_BEFORE, ROPE_AFTER].map(|key| (key, r.boolean(key))) {
        let is_rotated = is_rotated?;
        if is_rotated && !r.has_table(key.name()) {
            r.report(
                key,
                format!("is true, but there is no [{}]", key.name()),
                format!("false without the table [{}]", key.name()),
                format!("remove it, or add [{}]", key.name()),
            );
        }
        for (rotated, side) in rotated.iter_mut().zip(text?) {
            *rotated |= is_rotated && side.keys[1].path == key.path;
        }
    }
    Some(rotated)
}

/// The number of rotated channels: `head_dim` where it is not given.
fn read_channels(r: &mut Reader, pairs: Option<Pairs>, head_dim: Option<u32>) -> Option<u32> {
    if !r.has(ROPE_CHANNELS) {
        return head_dim;
    }
    let (channels, pairs, head_dim) = (r.integer32(ROPE_CHANNELS)?, pairs?, head_dim?);
    let step = pairs.channel_step();
    if channels <= head_dim && channels.is_multiple_of(step) {
        return Some(channels);
    }
    let below = (channels.min(head_dim) / step * step).max(step);
    r.report(
        ROPE_CHANNELS,
        format!("is {channels}"),
        format!("a multiple of {step} from {step} to {head_dim}, the head_dim, with pairs = {:?}", pairs.as_str()),
        format!("give {below}, or leave it out to rotate all {head_dim} channels"),
    );
    None
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
            let misspelt = all.iter().any(|key| r.is_misspelt(key.table(), key.name()));
            if r.has_table(keys.density.table()) && !misspelt {
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
    text: [Side; 2],
    image: Image,
    heads: u32,
    batch: u32,
    rope: Option<Rope>,
) -> Option<()> {
    let [before, after] = text.map(|side| u64::from(side.tokens));
    let text_tokens = before + after;
    let video = u64::from(frames) * u64::from(tokens_per_frame);
    let sequence = video + text_tokens;
    let head_dim = image.head_dim;
    // Kernels count the bytes of a packed head in 32 bits. It has [`Layout::packed_rows`] rows,
    // which are whole atoms.
    let most_rows = u64::from(u32::MAX / image.bytes(1)) - u64::from(PAD_ROWS);
    let most = most_rows - most_rows % u64::from(ATOM_ROWS);
    if sequence > most {
        r.report(
            if video > most { FRAMES } else { text[usize::from(after > before)].keys[0] },
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
    if let Some(Rope { channels, before: rotates_before, after: rotates_after, per_head: true, .. }) = rope {
        let rows = video + before * u64::from(rotates_before) + after * u64::from(rotates_after);
        let elements = rows * u64::from(heads) * u64::from(channels / 2);
        if elements > u64::from(u32::MAX) {
            r.report(
                ROPE_PER_HEAD,
                format!("is true, which makes tables of {rows} x {heads} x {} = {elements} elements", channels / 2),
                format!("rows x heads x channels / 2 of at most {}", u32::MAX),
                "share the tables between heads, or give fewer heads or a shorter sequence",
            );
            return None;
        }
    }
    Some(())
}

/// The most heads over the batch of one launch. The third extent of a grid and the rows that `u32`
/// counts limit it.
pub(super) const fn most_heads(packed_rows: u64) -> u64 {
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
        format!("an integer from 1 to {}", u64::from(video).min(MOST_PROFILE_ROWS)),
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
            let tokens = (frames * f64::from(layout.tokens_per_frame.value)).round();
            if tokens >= 1.0 && frames <= f64::from(layout.frames.value) {
                return Some(tokens as u32);
            }
            // Half a token is rounded to one token.
            let least = rounded_up(0.5 / f64::from(layout.tokens_per_frame.value));
            r.report(
                keys.frames,
                format!("is {frames}, which makes {tokens} tokens"),
                format!("a number from {least} to {}, which make 1 to {video} tokens", layout.frames.value),
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
