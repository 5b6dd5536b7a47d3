//! Inputs that are made: random ones, and ones that try the edges of the kernels' arithmetic.

use framestride::shapes::layout::HeadType;
use framestride::shapes::spec::{Dtype, NormKind, Spec};
use rand::RngExt;
use rayon::prelude::*;

use crate::compute_type::ComputeType;
use crate::random::Drawn::{self, K, Q, V};
use crate::random::{Normals, norm_weights, quick_generator, row_generator};
use crate::reference::norm;
use crate::rope::RopeTables;
use crate::tensors::{Inputs, Norm, Text, Tokens, narrow, widen};

/// Gives a row a Euclidean norm.
fn resize(row: &mut [f64], size: f64) {
    let factor = size / norm(row);
    row.iter_mut().for_each(|x| *x *= factor);
}

/// Makes a row orthogonal to a direction of norm 1.
fn remove(row: &mut [f64], direction: &[f64]) {
    let part: f64 = row.iter().zip(direction).map(|(x, direction)| x * direction).sum();
    row.iter_mut().zip(direction).for_each(|(x, direction)| *x -= part * direction);
}

/// The softmax scale with which two equal rows of norm sqrt(head_dim) have a weight of 2^`score`.
fn scale_of(spec: &Spec, score: f32) -> f32 {
    score * std::f32::consts::LN_2 / spec.head_dim as f32
}

/// Score of a query with its own key in [`Inputs::sudden`], in powers of two. Weights without an
/// offset do not hold it ([`Dtype::tile_sums`]; in 8 bits, no more than 448).
fn sudden_score(compute: ComputeType) -> f32 {
    match compute {
        ComputeType::Bf16 => 134.0,
        ComputeType::F16 => 24.0,
        ComputeType::E4m3 => 12.0,
    }
}

/// Softmax scale of [`Inputs::rising`].
const RISING_SCALE: f32 = 4.0;

/// Softmax scale of [`Inputs::rough`].
const ROUGH_SCALE: f32 = 1.0;

/// Factor of V in [`Inputs::lone`]. f16 holds little more than twice the largest elements.
const LARGE: f64 = 8192.0;

/// Rows of a warpgroup, which decides on offsets for all of them together.
const GROUP: usize = 64;

/// Score of two equal rows in [`Inputs::lone`], in powers of two.
fn lone_score(compute: ComputeType) -> f32 {
    match compute {
        ComputeType::Bf16 => 215.0,
        ComputeType::F16 => 34.0,
        ComputeType::E4m3 => 16.0,
    }
}

/// How much a key of [`Inputs::lone`] has of the head's direction, and how much of its own. The
/// squares add up to 1.
///
/// The weight of a score of minus the first part vanishes in the type, and that of the second part
/// overflows. The scores of all other queries lie within a few standard deviations of zero, where
/// weights do neither.
const LONE_PARTS: [f64; 2] = [0.76, 0.65];

/// How many successive queries of [`Inputs::edges`] look at the same kind of edge.
///
/// Query tiles have 128 or 192 rows, which are no multiples of 80. So a given row of a tile meets
/// one kind of edge in some tiles and the other kind in others.
const EDGE_QUERIES: usize = 80;

/// Score of a query of [`Inputs::edges`] that looks at one key alone, with this key, in powers of
/// two.
///
/// A query that looks at four keys has half of this score with each. Its scores with all other keys
/// are random, with the standard deviation score / sqrt(head_dim). Their weights have the mean
/// exp(deviation^2 / 2), in natural units. At this score, the share of the four keys in all weights
/// is largest.
const fn edges_score(head_dim: u32) -> f32 {
    head_dim as f32 / 2.0 * std::f32::consts::LOG2_E
}

/// Scores in [`Inputs::hidden`], in powers of two: that of the highest key, and that of keys with
/// the query's own code.
fn hidden_scores(dtype: Dtype) -> [f64; 2] {
    match dtype {
        Dtype::Bf16 => [174.0, 20.0],
        Dtype::F16 => [43.0, 12.0],
    }
}

impl Inputs {
    /// Random inputs, which depend on nothing but the arguments.
    ///
    /// Elements of Q, K and V are normal. Those of Q and K are twice as large, so that the softmax
    /// has something to choose. Rows of Q and K have different means and sizes. Norm weights lie
    /// around one. RoPE angles are uniform, and each batch item has its own.
    pub fn random(spec: &Spec, batch: usize, heads: usize, seed: u64) -> Inputs {
        let normals = Normals::new(spec, seed);
        let tokens = |drawn: Drawn| {
            Inputs::tokens(spec, batch, heads, |token, bits| {
                normals.token(drawn, token, spec.head_dim as usize, bits);
            })
        };
        let mut generator = row_generator(seed.wrapping_add(3), 0);
        let mut norm = || match &spec.qk_norm {
            None => Norm::default(),
            Some(norm) => {
                let mut values = |centre: f64| norm_weights(spec, heads, centre, &mut generator);
                let weight = values(1.0);
                Norm { weight: Some(weight), bias: (norm.kind == NormKind::Layer).then(|| values(0.0)) }
            }
        };
        let (q_norm, k_norm) = (norm(), norm());
        let mut text = |tokens: u32| match spec.qk_norm {
            Some(_) if tokens > 0 => Text { q_norm: Some(norm()), k_norm: Some(norm()), ..Text::default() },
            _ => Text::default(),
        };
        let (before, after) = (text(spec.layout.before), text(spec.layout.after));
        let rope = spec.rope.as_ref().map(|_| RopeTables::random(spec, batch, heads, seed));
        Inputs { q_norm, k_norm, before, after, ..Inputs::new([tokens(Q), tokens(K), tokens(V)], rope) }
    }

    /// Random V and K, and queries that equal their own keys.
    ///
    /// The scale lets a softmax begin without an offset, until a query meets its key. All rows have
    /// the norm sqrt(head_dim), so other scores are smaller by a factor of about sqrt(head_dim).
    pub fn sudden(spec: &Spec, batch: usize, heads: usize, seed: u64) -> Inputs {
        let inputs = Inputs::made(spec, batch, heads, seed, |normals, drawn, video, head, values| {
            normals.own(head, video, values);
            resize(values, (values.len() as f64).sqrt());
            drawn != V
        });
        Inputs { scale: Some(scale_of(spec, sudden_score(ComputeType::of(spec)))), ..inputs }
    }

    /// Random V, and Q and K whose heads are spatial and temporal in turn.
    ///
    /// Even heads attend to their own frame, odd heads to their own patch in all frames. After norm
    /// and RoPE, Q and K hold a random code of the frame or of the patch.
    pub fn planted(spec: &Spec, batch: usize, heads: usize, seed: u64) -> Inputs {
        let patches = spec.layout.tokens_per_frame.value as usize;
        Inputs::made(spec, batch, heads, seed, |normals, drawn, video, head, values| {
            normals.code(head, if head.is_multiple_of(2) { video / patches } else { video % patches }, values);
            drawn != V
        })
    }

    /// Random V, and Q and K whose scores lie hundreds apart. Along the keys of every head type
    /// they rise up to a query's own key, and fall behind it.
    ///
    /// An online softmax has to lower its offsets again and again, by little and by more than f32
    /// holds.
    ///
    /// Each head has a direction. A key is random, plus more of this direction the later its frame
    /// and its patch are. So scores rise from frame to frame and within each frame; in the temporal
    /// order they rise from patch to patch and within each patch. A query is its own key, plus a
    /// random amount of the direction, plus noise. So most masks show what it attends to most. All
    /// rows have the norm sqrt(head_dim), with a QK-norm and without.
    pub fn rising(spec: &Spec, batch: usize, heads: usize, seed: u64) -> Inputs {
        let (frames, patches) = (spec.layout.frames.value as usize, spec.layout.tokens_per_frame.value as usize);
        let inputs = Inputs::made(spec, batch, heads, seed, |normals, drawn, video, head, values| {
            let mut generator = quick_generator(seed, Drawn::Parts, (head as u64) << 32 | video as u64);
            let mut normal = || f64::from(normals.pick(generator.random()));
            let lateness = (video / patches) as f64 / frames as f64 + (video % patches) as f64 / patches as f64 - 1.0;
            let steepness = normal();
            normals.code(head, 0, values);
            for value in values.iter_mut() {
                let direction = 0.5 * *value;
                let (own, noise) = (normal(), normal());
                let key = own + direction * lateness;
                *value = if drawn == Q { key + direction * steepness + noise } else { key };
            }
            resize(values, (values.len() as f64).sqrt());
            drawn != V
        });
        Inputs { scale: Some(RISING_SCALE), ..inputs }
    }

    /// Large V, and Q and K whose queries come in groups of 64. One query of a group alone
    /// decides how the softmax begins, or that it may not go on so.
    ///
    /// All other queries may do without offsets in every tile. What the one does changes from group
    /// to group:
    ///
    /// * all its weights vanish without an offset,
    /// * all its weights overflow without one,
    /// * the weight of one key, which lies in the first tile, overflows,
    /// * the last two, done by two queries.
    ///
    /// Each happens in the upper and in the lower half of a warp's 16 rows. Groups are those of
    /// dense heads without text.
    ///
    /// A key has a part of a direction of the head, and a part of its own. A query is minus that
    /// direction, or the direction, or what a key has of its own. Nearly all queries are something
    /// random that is orthogonal to the direction.
    pub fn lone(spec: &Spec, batch: usize, heads: usize, seed: u64) -> Inputs {
        let video_tokens = spec.layout.video_tokens() as usize;
        let groups = video_tokens.div_ceil(GROUP);
        let inputs = Inputs::made(spec, batch, heads, seed, |normals, drawn, video, head, values| {
            let mut direction = vec![0.0; values.len()];
            normals.code(head, 0, &mut direction);
            resize(&mut direction, 1.0);
            let own = |token: usize, values: &mut [f64]| {
                normals.own(head, token, values);
                remove(values, &direction);
                resize(values, 1.0);
            };
            let mut generator = quick_generator(seed, Drawn::Parts, (head * groups + video / GROUP) as u64 | 1 << 63);
            // Each head begins with another kind. So each kind is in a whole group of some head.
            let kind = (head + video / GROUP + (seed % 4) as usize) % 4;
            let half = (head * groups + video / GROUP) / 4 % 2;
            // The row of the one query, and the same row of the next warp.
            let [one, next] = {
                let [warp, row] = [4, 8].map(|rows| generator.random_range(0..rows));
                [warp, (warp + 1) % 4].map(|warp: usize| warp * 16 + half * 8 + row)
            };
            let late = match kind {
                2 => Some(one),
                3 => Some(next),
                _ => None,
            };
            let row = video % GROUP;
            match drawn {
                Q if row == one && kind != 2 => {
                    let sign = if kind == 0 { -1.0 } else { 1.0 };
                    values.iter_mut().zip(&direction).for_each(|(value, direction)| *value = sign * direction);
                }
                // The key lies in the first tile. The middle tile, which is read before it, is
                // another one where there are two.
                Q if Some(row) == late => own(video / GROUP * 11 % video_tokens.min(GROUP), values),
                Q => own(video_tokens + video, values),
                K => {
                    own(video, values);
                    let [common, own] = LONE_PARTS;
                    values
                        .iter_mut()
                        .zip(&direction)
                        .for_each(|(value, direction)| *value = own * *value + common * direction);
                }
                _ => {
                    normals.own(head, video, values);
                    values.iter_mut().for_each(|value| *value *= LARGE);
                    return true;
                }
            }
            resize(values, (values.len() as f64).sqrt());
            true
        });
        Inputs { scale: Some(scale_of(spec, lone_score(ComputeType::of(spec)))), ..inputs }
    }

    /// Heads as in [`Inputs::planted`], with one key that has a higher score than all others: the
    /// last key of the video.
    ///
    /// Relative to it, weights of the others vanish in the type. V is random around a row that this
    /// key has exactly. So the mask that shows more of what a query looks at is the better one,
    /// whether it shows that key or not.
    pub fn hidden(spec: &Spec, batch: usize, heads: usize, seed: u64) -> Inputs {
        let patches = spec.layout.tokens_per_frame.value as usize;
        let last = spec.layout.video_tokens() as usize - 1;
        let [highest, own] = hidden_scores(spec.dtype);
        let score = highest.hypot(own);
        let inputs = Inputs::made(spec, batch, heads, seed, |normals, drawn, video, head, values| {
            let mut direction = vec![0.0; values.len()];
            normals.code(head, usize::MAX >> 32, &mut direction);
            if drawn == V {
                if video != last {
                    normals.own(head, video, values);
                    values.iter_mut().zip(&direction).for_each(|(value, direction)| *value = 0.25 * *value + direction);
                } else {
                    values.copy_from_slice(&direction);
                }
                return true;
            }
            resize(&mut direction, 1.0);
            normals.code(head, if head.is_multiple_of(2) { video / patches } else { video % patches }, values);
            remove(values, &direction);
            resize(values, 1.0);
            let parts = match drawn {
                Q => [own, highest].map(|part| part / score),
                _ if video == last => [0.0, 1.0],
                _ => [1.0, 0.0],
            };
            values
                .iter_mut()
                .zip(&direction)
                .for_each(|(value, direction)| *value = parts[0] * *value + parts[1] * direction);
            resize(values, (values.len() as f64).sqrt());
            true
        });
        Inputs { scale: Some(scale_of(spec, score as f32)), ..inputs }
    }

    /// Random V and K, and queries that look at both sides of the edges of their runs.
    ///
    /// A query looks at four keys with equal weight. They are the last visible and the first hidden
    /// key of the spatial mask, and those of the temporal mask. Of the queries, 80 in succession
    /// look at where their runs begin, and the next 80 at where they end. So an edge that is wrong
    /// by one key changes a large part of a row.
    pub fn edges(spec: &Spec, batch: usize, heads: usize, seed: u64) -> Inputs {
        let layout = spec.layout;
        let (frames, patches) = (layout.frames.value as usize, layout.tokens_per_frame.value as usize);
        let at_temporal = |position: usize| position % frames * patches + position / frames;
        let inputs = Inputs::made(spec, batch, heads, seed, |normals, drawn, video, head, values| {
            if drawn != Q {
                normals.own(head, video, values);
                resize(values, (values.len() as f64).sqrt());
                return drawn != V;
            }
            let temporal = video % patches * frames + video / patches;
            let ends = (video / EDGE_QUERIES + head).is_multiple_of(2);
            values.fill(0.0);
            let mut key = vec![0.0; values.len()];
            for (mask, position) in [(HeadType::Spatial, video), (HeadType::Temporal, temporal)] {
                let half_width = layout.half_width(mask) as usize;
                for distance in [half_width - 1, half_width] {
                    let position = if ends { position.checked_add(distance) } else { position.checked_sub(distance) };
                    let Some(position) = position.filter(|&position| position < frames * patches) else { continue };
                    normals.own(
                        head,
                        if mask == HeadType::Temporal { at_temporal(position) } else { position },
                        &mut key,
                    );
                    resize(&mut key, 1.0);
                    values.iter_mut().zip(&key).for_each(|(value, key)| *value += key);
                }
            }
            // A query whose runs have no such edge looks at its own key.
            if values.iter().all(|&value| value == 0.0) {
                normals.own(head, video, values);
            }
            resize(values, (values.len() as f64).sqrt());
            true
        });
        Inputs { scale: Some(scale_of(spec, edges_score(spec.head_dim))), ..inputs }
    }

    /// Equal scores and constant values.
    ///
    /// Every other query is zero. The keys of odd heads are all the same. In V half of the columns
    /// are constant, and the first of these are 1.
    pub fn constant(spec: &Spec, batch: usize, heads: usize, seed: u64) -> Inputs {
        Inputs::made(spec, batch, heads, seed, |normals, drawn, video, head, values| {
            match drawn {
                Q if video.is_multiple_of(2) => values.fill(0.0),
                K if !head.is_multiple_of(2) => normals.code(head, 0, values),
                V => {
                    let (dim, mut constants) = (values.len(), vec![0.0; values.len()]);
                    normals.code(head, 1, &mut constants);
                    constants[..dim / 4].fill(1.0);
                    normals.own(head, video, values);
                    values[..dim / 2].copy_from_slice(&constants[..dim / 2]);
                }
                _ => normals.own(head, video + drawn as usize * spec.layout.video_tokens() as usize, values),
            }
            true
        })
    }

    /// Random Q, and K and V that are not centered, as those of trained models.
    ///
    /// In K, the first eighth of the channels have a mean of 4, and one channel is 20 times as large
    /// as the others. Rows of K have the norm sqrt(head_dim). Elements of V have a mean of 1 in even
    /// heads and of 4 in odd heads.
    pub fn off_centre(spec: &Spec, batch: usize, heads: usize, seed: u64) -> Inputs {
        let outlier = spec.head_dim as usize / 2;
        Inputs::made(spec, batch, heads, seed, |normals, drawn, video, head, values| {
            normals.own(head, video + drawn as usize * spec.layout.video_tokens() as usize, values);
            match drawn {
                K => {
                    let few = values.len() / 8;
                    values[..few].iter_mut().for_each(|value| *value += 4.0);
                    values[outlier] *= 20.0;
                    resize(values, (values.len() as f64).sqrt());
                }
                V => values.iter_mut().for_each(|value| *value += if head.is_multiple_of(2) { 1.0 } else { 4.0 }),
                _ => resize(values, (values.len() as f64).sqrt()),
            }
            true
        })
    }

    /// Random K and V, and Q for which 8 bits are enough in even heads, and too rough in odd ones.
    ///
    /// In an even head the queries of the video are zero, so that all weights are equal. In an odd head,
    /// scores lie so far apart that their rounding decides which keys win.
    pub fn rough(spec: &Spec, batch: usize, heads: usize, seed: u64) -> Inputs {
        let inputs = Inputs::made(spec, batch, heads, seed, |normals, drawn, video, head, values| {
            normals.own(head, video + drawn as usize * spec.layout.video_tokens() as usize, values);
            resize(values, if drawn == Q && head.is_multiple_of(2) { 0.0 } else { (values.len() as f64).sqrt() });
            true
        });
        Inputs { scale: Some(ROUGH_SCALE), ..inputs }
    }

    /// Random inputs, but that V is 64 times as large in text as in the video.
    ///
    /// In 8 bits V has one factor, which must leave room for both.
    pub fn large_text(spec: &Spec, batch: usize, heads: usize, seed: u64) -> Inputs {
        let mut inputs = Inputs::random(spec, batch, heads, seed);
        let Tokens { dtype, rows, heads, head_dim, .. } = inputs.v;
        let first = spec.layout.before as usize;
        let video = first..first + spec.layout.video_tokens() as usize;
        for (row, bits) in inputs.v.bits.chunks_exact_mut(heads * head_dim).enumerate() {
            if !video.contains(&(row % rows)) {
                bits.iter_mut().for_each(|bits| *bits = narrow(dtype, 64.0 * widen(dtype, *bits)));
            }
        }
        inputs
    }

    /// Random Q and K, and V whose mean changes along the video: it is 7 in the first quarter, and
    /// -1 in the rest.
    ///
    /// So no constant center takes the mean away. A sum over all keys first grows large, and then
    /// many small values make it as small again. An accumulator of 8-bit products would lose of
    /// them. Every fourth channel has a mean of 2 throughout. So the output of a row does not
    /// vanish beside its errors where the weights happen to balance the others.
    pub fn drifting(spec: &Spec, batch: usize, heads: usize, seed: u64) -> Inputs {
        let quarter = spec.layout.video_tokens() as usize / 4;
        Inputs::made(spec, batch, heads, seed, |normals, drawn, video, head, values| {
            normals.own(head, video, values);
            let mean = if video < quarter { 7.0 } else { -1.0 };
            for (channel, value) in values.iter_mut().enumerate() {
                *value += if channel % 4 == 0 { 2.0 } else { mean };
            }
            drawn == V
        })
    }

    /// Random text, and video rows that hold what `values` writes; those of Q and K hold it after
    /// norm and RoPE.
    ///
    /// `values` is given what is drawn (Q, K or V), the video token, the same in all batch items,
    /// and the head. Where it gives false, the row is random.
    fn made(
        spec: &Spec,
        batch: usize,
        heads: usize,
        seed: u64,
        values: impl Fn(&Normals, Drawn, usize, usize, &mut [f64]) -> bool + Sync,
    ) -> Inputs {
        let normals = Normals::new(spec, seed);
        let (layout, rope) = (spec.layout, spec.rope.as_ref().map(|_| RopeTables::random(spec, 1, heads, seed)));
        let video = (layout.frames.value * layout.tokens_per_frame.value) as usize;
        let (sequence, dim) = (layout.sequence() as usize, spec.head_dim as usize);
        let tokens = |drawn: Drawn| {
            Inputs::tokens(spec, batch, heads, |token, bits| {
                let row = token % sequence;
                normals.token(drawn, token, dim, bits);
                let token = row.checked_sub(layout.before as usize).filter(|&token| token < video);
                let Some(token) = token else { return };
                let mut row_values = vec![0.0; dim];
                for (head, bits) in bits.chunks_exact_mut(dim).enumerate() {
                    if !values(&normals, drawn, token, head, &mut row_values) {
                        continue;
                    }
                    if let Some(tables) = rope.as_ref().filter(|_| drawn != V) {
                        tables.rotate(spec, heads, row, head, &mut row_values, -1.0);
                    }
                    for (bits, value) in bits.iter_mut().zip(&row_values) {
                        *bits = narrow(spec.dtype, *value);
                    }
                }
            })
        };
        Inputs::new([tokens(Q), tokens(K), tokens(V)], rope)
    }

    /// A tensor of the spec's layout. `token` writes the bits of one token, `[heads, head_dim]`,
    /// given its index in `[batch, rows]`.
    fn tokens(spec: &Spec, batch: usize, heads: usize, token: impl Fn(usize, &mut [u16]) + Sync) -> Tokens {
        let shape = [batch, spec.layout.sequence() as usize, heads, spec.head_dim as usize];
        let mut tokens = Tokens::zeros(spec.dtype, shape);
        let rows = tokens.bits.par_chunks_exact_mut(shape[2] * shape[3]).enumerate();
        rows.for_each(|(index, bits)| token(index, bits));
        tokens
    }
}
