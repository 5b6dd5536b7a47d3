//! The arithmetic of one attention layer in plain f64, with which the kernels are compared.
//!
//! It is written straight from the rules, one token and one pair at a time, and slow on purpose. It
//! shares no geometry with the kernels. It reads only the plain fields of [`Layout`], and the draw
//! of the profiling rows, which is an input of the layer.
//!
//! Everything starts from inputs that are already rounded to the spec's type
//! ([`Tokens`](crate::tensors::Tokens)), and nothing is rounded on the way.

use framestride::shapes::layout::{Divisor, HeadType, Layout, ValidText};
use framestride::shapes::spec::{NormKind, Pairs, Spec};
use rayon::prelude::*;

use crate::compute_type::{ComputeType, cut_dot};
use crate::tensors::{Inputs, Norm};

/// Mean and reciprocal deviation of a QK-norm's statistic.
#[derive(Clone, Copy)]
struct Statistic {
    mean: f64,
    scale: f64,
}

/// One layer's inputs, ready to be normalised and rotated row by row.
pub struct Reference<'a> {
    spec: &'a Spec,
    inputs: &'a Inputs,
    /// Statistics of Q and of K, each `[batch, rows]`, where they are taken over all heads.
    over_heads: Option<[Vec<Statistic>; 2]>,
}

/// A tensor that is normalised and rotated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operand {
    /// Q.
    Query,
    /// K.
    Key,
}

impl<'a> Reference<'a> {
    /// Prepares the statistics of `inputs`. [`Inputs::check`] must have accepted them for `spec`.
    pub fn new(spec: &'a Spec, inputs: &'a Inputs) -> Reference<'a> {
        let over_heads = spec.qk_norm.filter(|_| spec.norm_is_over_heads()).map(|norm| {
            [&inputs.q, &inputs.k].map(|tokens| {
                let row_of = tokens.heads * tokens.head_dim;
                (0..tokens.batch * tokens.rows)
                    .into_par_iter()
                    .map_init(
                        || vec![0.0; row_of],
                        |row, token| {
                            tokens.widen(&tokens.bits[token * row_of..][..row_of], row);
                            statistic(row, norm.kind, norm.eps)
                        },
                    )
                    .collect()
            })
        });
        Reference { spec, inputs, over_heads }
    }

    /// A row of Q or K, normalised and rotated: `head_dim` elements. `row` counts in the model's
    /// order.
    pub fn row(&self, operand: Operand, batch: usize, row: usize, head: usize) -> Vec<f64> {
        let (tokens, index) = match operand {
            Operand::Query => (&self.inputs.q, 0),
            Operand::Key => (&self.inputs.k, 1),
        };
        let mut x = tokens.row(batch, row, head);
        let layout = &self.spec.layout;
        let place = Place::of(layout, row);
        let text = match place {
            Place::Video(_) => None,
            Place::Before(_) => Some(&self.inputs.before),
            Place::After(_) => Some(&self.inputs.after),
        };
        if let Some(norm) = &self.spec.qk_norm {
            let statistic = match &self.over_heads {
                Some(statistics) => statistics[index][batch * tokens.rows + row],
                None => statistic(&x, norm.kind, norm.eps),
            };
            let first = if self.spec.norm_is_over_heads() { head * tokens.head_dim } else { 0 };
            let Norm { weight, bias } = self.inputs.norm(operand, text);
            for (d, x) in x.iter_mut().enumerate() {
                let weight = weight.as_ref().map_or(1.0, |weight| f64::from(weight[first + d]));
                let bias = bias.as_ref().map_or(0.0, |bias| f64::from(bias[first + d]));
                *x = (*x - statistic.mean) * statistic.scale * weight + bias;
            }
        }
        if let (Some(rope), Some(tables)) = (&self.spec.rope, &self.inputs.rope)
            && match place {
                Place::Video(_) => true,
                Place::Before(_) => rope.before,
                Place::After(_) => rope.after,
            }
        {
            let table_row = if rope.before { row } else { row - layout.before as usize };
            let table = if rope.per_head { table_row * tokens.heads + head } else { table_row };
            let half = rope.channels as usize / 2;
            let item = if tables.items == 1 { 0 } else { batch * (tables.cos.len() / tables.items) };
            for pair in 0..half {
                let (a, b) = match rope.pairs {
                    Pairs::Interleaved => (2 * pair, 2 * pair + 1),
                    Pairs::Half => (pair, pair + half),
                };
                let index = item + table * half + pair;
                let (cos, sin) = (f64::from(tables.cos[index]), f64::from(tables.sin[index]));
                (x[a], x[b]) = (x[a] * cos - x[b] * sin, x[b] * cos + x[a] * sin);
            }
        }
        x
    }

    /// All rows of one head, normalised and rotated.
    pub fn head(&self, batch: usize, head: usize) -> Head {
        let gather = |operand| {
            let dim = self.inputs.q.head_dim;
            let mut rows = vec![0.0; self.inputs.q.rows * dim];
            rows.par_chunks_exact_mut(dim)
                .enumerate()
                .for_each(|(row, values)| values.copy_from_slice(&self.row(operand, batch, row, head)));
            rows
        };
        let rows = [gather(Operand::Query), gather(Operand::Key), self.inputs.v.head(batch, head)];
        let center = vec![0.0; self.spec.head_dim as usize];
        let valid = self.inputs.valid(&self.spec.layout, batch);
        Head::new(&self.spec.layout, self.spec.dtype.into(), valid, rows, center)
    }
}

fn statistic(row: &[f64], kind: NormKind, eps: f64) -> Statistic {
    let count = row.len() as f64;
    let mean = match kind {
        NormKind::Rms => 0.0,
        NormKind::Layer => row.iter().sum::<f64>() / count,
    };
    let square = row.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / count;
    Statistic { mean, scale: 1.0 / (square + eps).sqrt() }
}

/// What stands at a row of the model's order, and its index among what stands there.
#[derive(Clone, Copy)]
enum Place {
    /// Text before the video.
    Before(usize),
    /// The video, frame by frame.
    Video(usize),
    /// Text after the video.
    After(usize),
}

impl Place {
    fn of(layout: &Layout, row: usize) -> Place {
        let before = layout.before as usize;
        let video = layout.frames.value as usize * layout.tokens_per_frame.value as usize;
        match row.checked_sub(before) {
            None => Place::Before(row),
            Some(row) if row < video => Place::Video(row),
            Some(row) => Place::After(row - video),
        }
    }
}

/// What the rule asks of a token, to say who sees whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token {
    /// Text beyond the valid length. It sees nothing, and nobody sees it.
    Invalid,
    Text,
    Video {
        sink: bool,
        position: i64,
    },
}

/// The rule of one head type that says who sees whom, pair by pair.
pub struct Mask {
    tokens: Vec<Token>,
    half_width: i64,
}

impl Mask {
    /// The rule of a head type, for a sequence with so much valid text.
    pub fn new(layout: &Layout, head: HeadType, valid: ValidText) -> Mask {
        let (frames, patches) = (layout.frames.value as usize, layout.tokens_per_frame.value as usize);
        let rows = layout.before as usize + frames * patches + layout.after as usize;
        let tokens = (0..rows)
            .map(|row| match Place::of(layout, row) {
                Place::Before(text) if text < valid.before as usize => Token::Text,
                Place::After(text) if text < valid.after as usize => Token::Text,
                Place::Video(video) => {
                    let (frame, patch) = (video / patches, video % patches);
                    let position = match head {
                        HeadType::Dense | HeadType::Spatial => frame * patches + patch,
                        HeadType::Temporal => patch * frames + frame,
                    };
                    Token::Video { sink: frame < layout.sink_frames as usize, position: position as i64 }
                }
                Place::Before(_) | Place::After(_) => Token::Invalid,
            })
            .collect();
        let half_width = match head {
            HeadType::Dense => i64::MAX,
            HeadType::Spatial => i64::from(layout.spatial_half_width),
            HeadType::Temporal => i64::from(layout.temporal_half_width),
        };
        Mask { tokens, half_width }
    }

    /// Whether the query at row `query` of the model's order sees the key at row `key`.
    #[inline]
    pub fn sees(&self, query: usize, key: usize) -> bool {
        match (self.tokens[query], self.tokens[key]) {
            (Token::Invalid, _) | (_, Token::Invalid) => false,
            (Token::Text, _) | (_, Token::Text) | (_, Token::Video { sink: true, .. }) => true,
            (Token::Video { position: query, .. }, Token::Video { position: key, .. }) => {
                (query - key).abs() < self.half_width
            }
        }
    }

    /// The rows of the model's order in the packed order of keys: valid text, sink frames, the
    /// other video tokens, invalid text. Video tokens stand in the order of their positions.
    pub fn key_order(&self) -> Vec<usize> {
        let mut rows: Vec<usize> = (0..self.tokens.len()).collect();
        // The sort is stable, so text keeps its order, with that before the video first.
        rows.sort_by_key(|&row| match self.tokens[row] {
            Token::Text => (0, 0),
            Token::Video { sink: true, position } => (1, position),
            Token::Video { sink: false, position } => (2, position),
            Token::Invalid => (3, 0),
        });
        rows
    }

    /// The rows of the model's order in the packed order of queries: valid text, video tokens by
    /// position, invalid text.
    pub fn query_order(&self) -> Vec<usize> {
        let mut rows: Vec<usize> = (0..self.tokens.len()).collect();
        rows.sort_by_key(|&row| match self.tokens[row] {
            Token::Text => (0, 0),
            Token::Video { position, .. } => (1, position),
            Token::Invalid => (2, 0),
        });
        rows
    }

    /// The number of visible pairs, counted one by one.
    pub fn visible_pairs(&self) -> u128 {
        let rows = self.tokens.len();
        let seen_by = |query| (0..rows).filter(|&key| self.sees(query, key)).count() as u128;
        (0..rows).into_par_iter().map(seen_by).sum()
    }
}

/// What is subtracted from the values of a head before they are rounded to 8 bits, and added to its
/// output. Weights add up to 1, so in exact arithmetic it changes nothing.
///
/// What rounding takes from the values is added too, in the mean over all keys that somebody sees.
pub struct Center {
    /// The mean of each channel over the sampled rows.
    pub mean: Vec<f64>,
    /// The root mean square of the rest in the sampled rows.
    pub size: f64,
    /// The largest of what [`Center::new`] looks at.
    pub most: f64,
}

impl Center {
    /// Rows that are sampled.
    pub const ROWS: usize = 512;

    /// Rows of valid text that are sampled.
    pub const TEXT_ROWS: usize = 64;

    /// The center of the values of a head, `[rows, head_dim]` in the model's order. Video rows at
    /// equal distances are sampled, and what is not finite counts as 0. The factor gives them a
    /// root mean square from 4 to 8, or less where the largest of these and of text would exceed
    /// 256.
    pub fn new(layout: &Layout, valid: ValidText, values: &[f64], head_dim: usize) -> Center {
        let video = layout.frames.value as usize * layout.tokens_per_frame.value as usize;
        let row = |sample: usize| layout.before as usize + sample * video / Center::ROWS;
        let finite = |x: &f64| if x.is_finite() { *x } else { 0.0 };
        let samples = || (0..Center::ROWS).map(|sample| &values[row(sample) * head_dim..][..head_dim]);
        let mut mean = vec![0.0; head_dim];
        for row in samples() {
            mean.iter_mut().zip(row).for_each(|(mean, x)| *mean += finite(x) / Center::ROWS as f64);
        }
        let square = samples().flat_map(|row| row.iter().zip(&mean)).map(|(x, mean)| (finite(x) - mean).powi(2));
        let size = (square.sum::<f64>() / (Center::ROWS * head_dim) as f64).sqrt();
        let first_after = layout.before as usize + video;
        let text = (0..valid.before as usize).chain(first_after..first_after + valid.after as usize);
        let text: Vec<usize> = text.collect();
        let sampled = (0..Center::TEXT_ROWS).filter_map(|sample| text.get(sample * text.len() / Center::TEXT_ROWS));
        let sampled = sampled.map(|row| &values[row * head_dim..][..head_dim]);
        let distances = samples().chain(sampled).flat_map(|row| row.iter().zip(&mean));
        let distances = distances.map(|(x, mean)| (finite(x) - mean).abs());
        let most = distances.chain(mean.iter().map(|mean| mean.abs())).fold(0.0, f64::max);
        Center { mean, size, most }
    }

    /// The powers of two that follow from size and largest. By the first the rest is multiplied
    /// before it is rounded. The second is the largest value, so multiplied, of which is given back
    /// what rounding took.
    pub fn powers(size: f64, most: f64) -> [f64; 2] {
        let size = size.log2().floor().clamp(-60.0, 60.0);
        let exponent = size.max(most.log2().floor() - 5.0).min(60.0);
        [(2.0 - exponent).exp2(), (6.0 + size - exponent).exp2()]
    }
}

/// One head of one batch item: Q and K, normalised and rotated, and V. Each is `[rows, head_dim]`
/// in the model's order.
pub struct Head {
    /// What tensor cores multiply.
    pub compute: ComputeType,
    /// Elements of a row.
    pub head_dim: usize,
    /// Q.
    pub queries: Vec<f64>,
    /// K.
    pub keys: Vec<f64>,
    /// V, less `center`.
    pub values: Vec<f64>,
    /// What is added to every output.
    pub center: Vec<f64>,
    /// How many text tokens are valid.
    pub valid: ValidText,
    key_norms: Vec<f64>,
    value_norms: Vec<f64>,
    /// The rule of each type, indexed by the type's value.
    masks: [Mask; HeadType::ALL.len()],
    /// The packed order of keys of each type, where several accumulators share them.
    key_orders: [Vec<usize>; HeadType::ALL.len()],
}

/// One row of attention, and what bounds the error of computing it with rounded weights (see
/// [`crate::tolerance`]).
#[derive(Clone, Debug)]
pub struct Attended {
    /// The output, `head_dim` elements. It is zero where nothing is seen.
    pub out: Vec<f64>,
    /// The natural log-sum-exp of the scaled scores. It is -inf where nothing is seen.
    pub lse: f64,
    /// The largest scaled score. It is -inf where nothing is seen.
    pub maximum: f64,
    /// sqrt(sum over keys of weight^2 |v|^2). It is the size of the error that independent relative
    /// errors of the weights make.
    ///
    /// Weights that lie near each other are rounded alike, or to neighbours where they lie on
    /// either side of a boundary. So keys whose scores lie within [`ComputeType::alike`] count as
    /// one key, with the sum of their values, or as several where that is more. Values are those
    /// that are multiplied, without a center.
    pub spread: f64,
    /// The norm of the output without the center.
    pub summed: f64,
    /// The smallest weight of a key that is seen, relative to the largest.
    pub least: f64,
    /// The part of all weights that lies below [`Attended::SMALL`], relative to the largest.
    pub small: f64,
    /// sqrt(sum of the squared norms of the parts of the output that accumulators have), if there
    /// are several accumulators. Else it is 0.
    pub apart: f64,
    /// The distance that the output moves when tensor cores cut the sums of its scores, and by how
    /// much the log-sum-exp changes. Both are 0 for 16-bit types, for which a bound is near enough.
    pub moved_by_scores: [f64; 2],
    /// sqrt(sum over keys of |v|^2) over the sum of weights relative to the largest. It is the size
    /// of the error that independent absolute errors of the weights make.
    pub flat_spread: f64,
    /// The largest |q| |k|, scaled. It bounds every partial sum of every score.
    pub score_size: f64,
    /// How many keys are seen.
    pub keys: usize,
}

impl Attended {
    /// A weight this large beside the largest is not rounded to zero in 8 bits.
    ///
    /// The visible weights of a key tile have a mean of 2^-5 at least, or else its largest weight
    /// is 4, and zero is what lies below 2^-10.
    pub const SMALL: f64 = 1.0 / 32.0;
}

/// Rows of one query under the mask of each type, indexed by the type's value.
pub type UnderEachMask = [Attended; HeadType::ALL.len()];

/// What profiling finds for one head, over the sampled rows.
#[derive(Clone, Debug)]
pub struct ProfileErrors {
    /// The mean squared error of each of [`HeadType::CANDIDATES`].
    pub errors: [f64; HeadType::CANDIDATES.len()],
    /// Root mean square of the dense output over the same rows.
    pub dense_rms: f64,
    /// The rows that the errors were computed from, for the tolerance.
    pub rows: Vec<UnderEachMask>,
}

impl ProfileErrors {
    /// The type with the lowest error.
    pub fn head_type(&self) -> HeadType {
        least(self.errors)
    }
}

/// The candidate with the lowest error. Of equal errors the first wins.
pub(crate) fn least<T: Copy + PartialOrd>(errors: [T; HeadType::CANDIDATES.len()]) -> HeadType {
    let [first, others @ ..] = HeadType::CANDIDATES;
    let lower = |(least, error), (candidate, other)| if other < error { (candidate, other) } else { (least, error) };
    others.into_iter().zip(errors.into_iter().skip(1)).fold((first, errors[0]), lower).0
}

impl Head {
    /// A head from its rows of Q, K and V less `center`, each `[rows, head_dim]` in the model's
    /// order.
    pub fn new(
        layout: &Layout,
        compute: ComputeType,
        valid: ValidText,
        [queries, keys, values]: [Vec<f64>; 3],
        center: Vec<f64>,
    ) -> Head {
        let head_dim = center.len();
        let masks = HeadType::ALL.map(|head| Mask::new(layout, head, valid));
        let key_orders = [0, 1, 2].map(|head: usize| match compute.accumulated_keys() {
            Some(_) => masks[head].key_order(),
            None => Vec::new(),
        });
        let norms = |rows: &[f64]| rows.par_chunks_exact(head_dim).map(norm).collect();
        let (key_norms, value_norms) = (norms(&keys), norms(&values));
        Head { compute, head_dim, queries, keys, values, center, valid, key_norms, value_norms, masks, key_orders }
    }

    /// The head with its rows rounded, as the kernels store them. Q is rounded times `query_scale`.
    /// Rows of Q and K are those that are rounded ([`ComputeType::transformed`]). V has a 16-bit
    /// type already, and for 8 bits it is rounded without its center.
    pub fn rounded(&self, layout: &Layout, compute: ComputeType, query_scale: f64) -> Head {
        let round =
            |rows: &[f64], scale: f64| rows.par_iter().map(|&x| compute.round(x * scale) / scale).collect::<Vec<f64>>();
        let transformed = |rows: &[f64]| -> Vec<f64> {
            rows.par_chunks_exact(self.head_dim).flat_map_iter(|row| compute.transformed(row)).collect()
        };
        let (queries, keys) = (round(&transformed(&self.queries), query_scale), round(&transformed(&self.keys), 1.0));
        let (values, center) = match compute {
            ComputeType::Bf16 | ComputeType::F16 => (self.values.clone(), self.center.clone()),
            ComputeType::E4m3 => {
                let Center { mut mean, size, most } = Center::new(layout, self.valid, &self.values, self.head_dim);
                let [factor, counted] = Center::powers(size, most);
                let rest = self.values.par_iter().enumerate().map(|(i, x)| x - mean[i % self.head_dim]);
                let rest: Vec<f64> = rest.collect();
                let values = round(&rest, factor);
                let live = (self.valid.sum() + layout.video_tokens()) as usize;
                for &key in &self.mask(HeadType::Dense).key_order()[..live] {
                    for (channel, mean) in mean.iter_mut().enumerate() {
                        let element = key * self.head_dim + channel;
                        if (rest[element] * factor).abs() <= counted {
                            *mean += (rest[element] - values[element]) / live as f64;
                        }
                    }
                }
                (values, mean)
            }
        };
        Head::new(layout, compute, self.valid, [queries, keys, values], center)
    }

    /// Rows of the sequence.
    pub fn rows(&self) -> usize {
        self.values.len() / self.head_dim
    }

    /// The rule of a head type for this head's valid text.
    pub fn mask(&self, head: HeadType) -> &Mask {
        &self.masks[head as usize]
    }

    /// The scaled scores of one query row with every key, seen or not.
    pub fn scores(&self, row: usize, scale: f64) -> Vec<f64> {
        let query = &self.queries[row * self.head_dim..][..self.head_dim];
        self.keys.chunks_exact(self.head_dim).map(|key| scale * dot(query, key)).collect()
    }

    /// The softmax over the keys that `row` sees, times V.
    pub fn attend(&self, head: HeadType, row: usize, scale: f64) -> Attended {
        let (mask, query) = (self.mask(head), &self.queries[row * self.head_dim..][..self.head_dim]);
        // Nobody asks for the scores of keys that the row does not see.
        let score = |(key, keys)| if mask.sees(row, key) { scale * dot(query, keys) } else { 0.0 };
        let scores: Vec<f64> = self.keys.chunks_exact(self.head_dim).enumerate().map(score).collect();
        self.attend_scores(head, row, scale, &scores)
    }

    /// The weights of one query row over all keys. They add up to 1, and are zero for keys that it
    /// does not see.
    pub fn probabilities(&self, head: HeadType, row: usize, scale: f64) -> Vec<f64> {
        let lse = self.attend(head, row, scale).lse;
        let mask = self.mask(head);
        let probability = |(key, score): (usize, &f64)| if mask.sees(row, key) { (score - lse).exp() } else { 0.0 };
        self.scores(row, scale).iter().enumerate().map(probability).collect()
    }

    /// [`Head::attend`] for scores that are already computed.
    pub fn attend_scores(&self, head: HeadType, row: usize, scale: f64, scores: &[f64]) -> Attended {
        let mask = self.mask(head);
        let seen: Vec<usize> = (0..scores.len()).filter(|&key| mask.sees(row, key)).collect();
        let mut attended = Attended {
            out: vec![0.0; self.head_dim],
            lse: f64::NEG_INFINITY,
            maximum: f64::NEG_INFINITY,
            spread: 0.0,
            summed: 0.0,
            least: 1.0,
            small: 0.0,
            apart: 0.0,
            moved_by_scores: [0.0; 2],
            flat_spread: 0.0,
            score_size: 0.0,
            keys: seen.len(),
        };
        if seen.is_empty() {
            return attended;
        }
        // f64::max drops NaN. The sum below brings it back, so NaN in the inputs reaches every row
        // that sees it.
        let maximum = seen.iter().map(|&key| scores[key]).fold(f64::NEG_INFINITY, f64::max);
        // Keys whose scores lie in the same step become neighbours.
        let step = |key: usize| ((maximum - scores[key]) / self.compute.alike()) as u32;
        let mut seen: Vec<(u32, u32)> = seen.iter().map(|&key| (step(key), key as u32)).collect();
        seen.sort_unstable();
        let weights: Vec<f64> = seen.iter().map(|&(_, key)| (scores[key as usize] - maximum).exp()).collect();
        let sum: f64 = weights.iter().sum();
        attended.lse = maximum + sum.ln();
        attended.maximum = maximum;
        attended.least = weights.iter().copied().fold(1.0, f64::min);
        attended.small = weights.iter().filter(|&&weight| weight < Attended::SMALL).sum::<f64>() / sum;
        let query_norm = norm(&self.queries[row * self.head_dim..][..self.head_dim]);
        let (mut square, mut flat) = (0.0, 0.0);
        let mut values = vec![0.0; self.head_dim];
        let mut rest = &weights[..];
        for run in seen.chunk_by(|(a, _), (b, _)| a == b) {
            let (run_weights, others) = rest.split_at(run.len());
            for (&(_, key), weight) in run.iter().zip(run_weights) {
                let value = &self.values[key as usize * self.head_dim..][..self.head_dim];
                let weight = weight / sum;
                for (out, value) in attended.out.iter_mut().zip(value) {
                    *out += weight * value;
                }
                flat += self.value_norms[key as usize].powi(2);
                attended.score_size = attended.score_size.max(scale.abs() * query_norm * self.key_norms[key as usize]);
            }
            let apart: f64 = run.iter().map(|&(_, key)| self.value_norms[key as usize].powi(2)).sum();
            let together = if run.len() == 1 {
                apart
            } else {
                values.fill(0.0);
                for &(_, key) in run {
                    let value = &self.values[key as usize * self.head_dim..][..self.head_dim];
                    values.iter_mut().zip(value).for_each(|(sum, value)| *sum += value);
                }
                norm(&values).powi(2)
            };
            square += (run_weights[0] / sum).powi(2) * apart.max(together);
            rest = others;
        }
        attended.spread = square.sqrt();
        attended.flat_spread = flat.sqrt() / sum;
        attended.summed = norm(&attended.out);
        if let Some(keys) = self.compute.accumulated_keys() {
            let parts = self.key_orders[head as usize].chunks(keys);
            let squares = parts.map(|part| norm(&self.weighted(part, mask, row, scores, attended.lse)).powi(2));
            attended.apart = squares.sum::<f64>().sqrt();
        }
        if self.compute == ComputeType::E4m3 {
            let cut = self.cut_scores(row, scale);
            let maximum = seen.iter().map(|&(_, key)| cut[key as usize]).fold(f64::NEG_INFINITY, f64::max);
            let lse = maximum + seen.iter().map(|&(_, key)| (cut[key as usize] - maximum).exp()).sum::<f64>().ln();
            let out = self.weighted(&self.key_orders[head as usize], mask, row, &cut, lse);
            attended.moved_by_scores = [distance(&out, &attended.out), (lse - attended.lse).abs()];
        }
        attended.out.iter_mut().zip(&self.center).for_each(|(out, center)| *out += center);
        attended
    }

    /// The sum of the values of some keys with their weights, without the center. Keys that `row`
    /// does not see have none.
    fn weighted(&self, keys: &[usize], mask: &Mask, row: usize, scores: &[f64], lse: f64) -> Vec<f64> {
        let mut sum = vec![0.0; self.head_dim];
        for &key in keys.iter().filter(|&&key| mask.sees(row, key)) {
            let (weight, value) = ((scores[key] - lse).exp(), &self.values[key * self.head_dim..][..self.head_dim]);
            sum.iter_mut().zip(value).for_each(|(sum, value)| *sum += weight * value);
        }
        sum
    }

    /// [`Head::scores`] as tensor cores add their products in 8 bits.
    fn cut_scores(&self, row: usize, scale: f64) -> Vec<f64> {
        // The kernel's query is rounded, so rounding undoes what division by the scale has changed.
        let query_scale = scale * std::f64::consts::LOG2_E;
        let query = &self.queries[row * self.head_dim..][..self.head_dim];
        let query: Vec<f64> = query.iter().map(|x| self.compute.round(x * query_scale)).collect();
        let keys = self.keys.chunks_exact(self.head_dim);
        keys.map(|key| cut_dot(&query, key) * std::f64::consts::LN_2).collect()
    }

    /// What profiling finds for this head. `head_index` counts over batch x heads.
    pub fn profile(&self, layout: &Layout, scale: f64, seed: u64, head_index: u32, samples: u32) -> ProfileErrors {
        let rows: Vec<UnderEachMask> = (0..samples)
            .into_par_iter()
            .map(|index| {
                let row = layout.before as usize
                    + layout.sampled_video_row(seed, head_index, index, Divisor::new(samples)) as usize;
                let scores = self.scores(row, scale);
                HeadType::ALL.map(|head| self.attend_scores(head, row, scale, &scores))
            })
            .collect();
        let count = (rows.len() * self.head_dim) as f64;
        let dense = HeadType::Dense as usize;
        let error = |candidate: HeadType| {
            let row = |row: &UnderEachMask| distance(&row[candidate as usize].out, &row[dense].out).powi(2);
            rows.iter().map(row).sum::<f64>() / count
        };
        let square = rows.iter().map(|row| norm(&row[dense].out).powi(2)).sum::<f64>() / count;
        ProfileErrors { errors: HeadType::CANDIDATES.map(error), dense_rms: square.sqrt(), rows }
    }
}

/// The scalar product. It has eight partial sums, which the compiler keeps in vector registers.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut sums = [0.0; 8];
    for (a, b) in a.chunks_exact(8).zip(b.chunks_exact(8)) {
        for lane in 0..8 {
            sums[lane] += a[lane] * b[lane];
        }
    }
    sums.iter().sum()
}

/// Euclidean norm.
pub fn norm(row: &[f64]) -> f64 {
    row.iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// Euclidean distance.
pub fn distance(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum::<f64>().sqrt()
}
