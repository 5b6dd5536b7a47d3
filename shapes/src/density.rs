//! How many (query, key) pairs a head sees, counted exactly, and which half width comes nearest to
//! a wanted density.
//!
//! Density is the number of visible pairs over S², over all rows of the model's sequence and with
//! all text valid. It is never called sparsity, which would be one minus it.

use crate::layout::{HeadType, Layout};

/// Visible pairs of one head of one batch item, when all text is valid. A dense head has S².
///
/// Text queries see S keys each, and video queries see T text keys and K sink keys each. The rest
/// is a band. With d = half_width - 1, the key at position k is seen from the positions max(0, k -
/// d) to min(N - 1, k + d). Summed over the keys outside sink frames, that makes
///
/// ```text
/// pairs = T S + N (T + K) + sum over body positions k of (min(N - 1, k + d) - max(0, k - d) + 1)
/// ```
///
/// Both bounds are linear in k on each side of one position, so counts and sums of body positions
/// give the sum.
pub fn visible_pairs(layout: &Layout, head: HeadType) -> u128 {
    visible_pairs_of_width(layout, head, layout.half_width(head))
}

/// [`visible_pairs`] with another half width than the layout's. It grows with the half width. A
/// dense head has no width, and S² pairs.
pub fn visible_pairs_of_width(layout: &Layout, head: HeadType, half_width: u32) -> u128 {
    let (sequence, text, video) = (wide(layout.sequence()), wide(layout.text_tokens()), wide(layout.video_tokens()));
    if matches!(head, HeadType::Dense) {
        return sequence * sequence;
    }
    let reach = wide(half_width.clamp(1, layout.video_tokens()) - 1);
    let body = |below| BodySum::below(layout, head, below);
    let all = body(video);
    // Keys below `video - reach` are seen up to k + reach, and the others up to the last position.
    let open_above = body(video - reach);
    let last_seen_from = open_above.sum + reach * open_above.count + (all.count - open_above.count) * (video - 1);
    // Keys from `reach` on are seen from k - reach on, and those before it from 0 on.
    let open_below = body(reach);
    let first_seen_from = (all.sum - open_below.sum) - reach * (all.count - open_below.count);
    text * sequence + video * (text + wide(layout.sink_tokens())) + (last_seen_from + all.count - first_seen_from)
}

/// Visible pairs over S².
pub fn density_of_width(layout: &Layout, head: HeadType, half_width: u32) -> f64 {
    let sequence = f64::from(layout.sequence());
    visible_pairs_of_width(layout, head, half_width) as f64 / (sequence * sequence)
}

/// The least density that a layout can have. Text, sinks and each token itself (half width 1) take
/// it.
pub fn least_density(layout: &Layout, head: HeadType) -> f64 {
    density_of_width(layout, head, 1)
}

/// The half width, 1 to N, whose density is nearest to `density`. Of two that are equally near, it
/// is the smaller. Densities that the layout cannot have give its ends.
pub fn half_width_of_density(layout: &Layout, head: HeadType, density: f64) -> u32 {
    let sequence = f64::from(layout.sequence());
    let wanted = density * sequence * sequence;
    let pairs = |half_width| visible_pairs_of_width(layout, head, half_width) as f64;
    // Searches the least width with at least the wanted pairs, or N.
    let (mut low, mut high) = (1, layout.video_tokens());
    while low < high {
        let middle = low + (high - low) / 2;
        if pairs(middle) >= wanted { high = middle } else { low = middle + 1 }
    }
    if low == 1 || pairs(low) - wanted < wanted - pairs(low - 1) {
        return low;
    }
    low - 1
}

/// How many positions of the body lie below a bound, and their sum. The body is the video tokens
/// outside sink frames.
struct BodySum {
    count: u128,
    sum: u128,
}

impl BodySum {
    fn below(layout: &Layout, head: HeadType, bound: u128) -> BodySum {
        // In both layouts the body is what follows the first `skipped` positions of every period.
        let (period, skipped) = match head {
            HeadType::Temporal => (wide(layout.frames.value), wide(layout.sink_frames)),
            HeadType::Dense | HeadType::Spatial => (wide(layout.video_tokens()), wide(layout.sink_tokens())),
        };
        let (periods, rest) = (bound / period, bound % period);
        let (kept, partial) = (period - skipped, rest.saturating_sub(skipped));
        // 0 + 1 + ... + (n - 1)
        let triangle = |n: u128| n * n.saturating_sub(1) / 2;
        BodySum {
            count: periods * kept + partial,
            sum: kept * period * triangle(periods)
                + periods * (kept * skipped + triangle(kept))
                + partial * (periods * period + skipped)
                + triangle(partial),
        }
    }
}

fn wide(value: u32) -> u128 {
    u128::from(value)
}
