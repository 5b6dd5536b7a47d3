//! The inputs of one layer on the host: Q, K, V and what goes with them.

use framestride::call::{check_heads, check_scale};
use framestride::shapes::layout::{HeadType, Layout, TextPosition};
use framestride::shapes::spec::{Dtype, NormKind, NormOver, Pairs, Spec};
use framestride::{Error, Result};
use half::{bf16, f16};
use rand::rngs::Xoshiro256PlusPlus;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use rayon::prelude::*;

use crate::reference::{Operand, norm};

/// A `[batch, rows, heads, head_dim]` tensor in the spec's 16-bit type, contiguous, in the model's order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tokens {
    /// Type of the elements.
    pub dtype: Dtype,
    /// Batch items.
    pub batch: usize,
    /// Tokens of the sequence.
    pub rows: usize,
    /// Heads.
    pub heads: usize,
    /// Elements of a row.
    pub head_dim: usize,
    /// The elements' bits.
    pub bits: Vec<u16>,
}

/// Nearest 16-bit value, ties to even.
pub fn narrow(dtype: Dtype, value: f64) -> u16 {
    match dtype {
        Dtype::Bf16 => bf16::from_f64(value).to_bits(),
        Dtype::F16 => f16::from_f64(value).to_bits(),
    }
}

/// The value of 16 bits.
pub fn widen(dtype: Dtype, bits: u16) -> f64 {
    match dtype {
        // By way of f32, which holds every 16-bit value, and for which there are instructions.
        Dtype::Bf16 => bf16::from_bits(bits).to_f32().into(),
        Dtype::F16 => f16::from_bits(bits).to_f32().into(),
    }
}

impl Tokens {
    /// Zeros.
    pub fn zeros(dtype: Dtype, [batch, rows, heads, head_dim]: [usize; 4]) -> Tokens {
        Tokens { dtype, batch, rows, heads, head_dim, bits: vec![0; batch * rows * heads * head_dim] }
    }

    /// `[batch, rows, heads, head_dim]`.
    pub fn shape(&self) -> [usize; 4] {
        [self.batch, self.rows, self.heads, self.head_dim]
    }

    /// Index of the first element of a row.
    pub fn index(&self, batch: usize, row: usize, head: usize) -> usize {
        ((batch * self.rows + row) * self.heads + head) * self.head_dim
    }

    /// One row of one head.
    pub fn row(&self, batch: usize, row: usize, head: usize) -> Vec<f64> {
        let mut wide = vec![0.0; self.head_dim];
        self.widen(&self.bits[self.index(batch, row, head)..][..self.head_dim], &mut wide);
        wide
    }

    /// Index and value of the first element that is not finite.
    fn first_not_finite(&self) -> Option<([usize; 4], f64)> {
        let found = self.bits.par_iter().position_first(|&bits| !widen(self.dtype, bits).is_finite())?;
        let (token, element) = (found / (self.heads * self.head_dim), found % (self.heads * self.head_dim));
        let index = [token / self.rows, token % self.rows, element / self.head_dim, element % self.head_dim];
        Some((index, widen(self.dtype, self.bits[found])))
    }

    /// Values of `bits`, which are elements of this tensor.
    pub fn widen(&self, bits: &[u16], wide: &mut [f64]) {
        for (wide, &bits) in wide.iter_mut().zip(bits) {
            *wide = widen(self.dtype, bits);
        }
    }

    /// Fills every row by `row(batch, row, head, values)`, in parallel, and rounds.
    pub fn fill(&mut self, row: impl Fn(usize, usize, usize, &mut [f64]) + Sync) {
        let (dtype, rows, heads, head_dim) = (self.dtype, self.rows, self.heads, self.head_dim);
        // A token at a time: one row is too little work for the scheduler.
        self.bits.par_chunks_exact_mut(heads * head_dim).enumerate().for_each_init(
            || vec![0.0; head_dim],
            |values, (token, bits)| {
                for (head, bits) in bits.chunks_exact_mut(head_dim).enumerate() {
                    row(token / rows, token % rows, head, values);
                    for (bits, value) in bits.iter_mut().zip(&*values) {
                        *bits = narrow(dtype, *value);
                    }
                }
            },
        );
    }
}

/// Affine part of a QK-norm: `head_dim` elements, or heads x head_dim when the statistic is over all heads.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Norm {
    /// Ones when not given.
    pub weight: Option<Vec<f32>>,
    /// Zeros when not given; only a layer norm has one.
    pub bias: Option<Vec<f32>>,
}

/// RoPE tables, each of the shape [`Spec::rope_table_shape`].
#[derive(Clone, Debug, PartialEq)]
pub struct RopeTables {
    /// Cosines.
    pub cos: Vec<f32>,
    /// Sines.
    pub sin: Vec<f32>,
}

/// Everything that one layer reads.
#[derive(Clone, Debug, PartialEq)]
pub struct Inputs {
    /// Q as the projection left it.
    pub q: Tokens,
    /// K.
    pub k: Tokens,
    /// V.
    pub v: Tokens,
    /// QK-norm of video rows of Q.
    pub q_norm: Norm,
    /// QK-norm of video rows of K.
    pub k_norm: Norm,
    /// QK-norm of text rows of Q; the video's when not given.
    pub q_norm_text: Option<Norm>,
    /// QK-norm of text rows of K; the video's when not given.
    pub k_norm_text: Option<Norm>,
    /// Given exactly when the spec has a `[rope]` table.
    pub rope: Option<RopeTables>,
    /// Valid text tokens of each batch item; all when not given.
    pub text_lengths: Option<Vec<u32>>,
    /// Softmax scale; 1 / sqrt(head_dim) when not given.
    pub scale: Option<f32>,
}

impl Inputs {
    /// Q, K and V, norms without weights, all text valid, the default scale.
    pub fn new([q, k, v]: [Tokens; 3], rope: Option<RopeTables>) -> Inputs {
        let (q_norm, k_norm) = (Norm::default(), Norm::default());
        Inputs { q, k, v, q_norm, k_norm, q_norm_text: None, k_norm_text: None, rope, text_lengths: None, scale: None }
    }

    /// The affine part that rows of this kind get.
    pub fn norm(&self, operand: Operand, is_text: bool) -> &Norm {
        let (video, text) = match operand {
            Operand::Query => (&self.q_norm, &self.q_norm_text),
            Operand::Key => (&self.k_norm, &self.k_norm_text),
        };
        if is_text { text.as_ref().unwrap_or(video) } else { video }
    }

    /// The first element of each tensor that is not finite, such as "k[0, 17, 1, 5] is inf". What it reaches is not finite either.
    pub fn not_finite(&self) -> Vec<String> {
        let tokens = [("q", &self.q), ("k", &self.k), ("v", &self.v)].into_iter().filter_map(|(key, tokens)| {
            tokens.first_not_finite().map(|(index, value)| format!("{key}{index:?} is {value}"))
        });
        let norms = [
            ("q_norm", Some(&self.q_norm)),
            ("k_norm", Some(&self.k_norm)),
            ("q_norm_text", self.q_norm_text.as_ref()),
            ("k_norm_text", self.k_norm_text.as_ref()),
        ];
        let affine = norms
            .into_iter()
            .filter_map(|(key, norm)| norm.map(|norm| (key, norm)))
            .flat_map(|(key, norm)| [(format!("{key}.weight"), &norm.weight), (format!("{key}.bias"), &norm.bias)]);
        let affine = affine.filter_map(|(key, values)| values.as_ref().map(|values| (key, values)));
        let tables = self.rope.iter().flat_map(|rope| [("cos".to_owned(), &rope.cos), ("sin".to_owned(), &rope.sin)]);
        let floats = affine.chain(tables).filter_map(|(key, values)| {
            let found = values.par_iter().position_first(|value| !value.is_finite())?;
            Some(format!("{key}, element {found}, is {}", values[found]))
        });
        tokens.chain(floats).collect()
    }

    /// Valid text tokens of a batch item: as the kernels take it, never more than there are.
    pub fn valid_text(&self, layout: &Layout, batch: usize) -> usize {
        self.text_lengths.as_ref().map_or(layout.text_tokens, |lengths| lengths[batch].min(layout.text_tokens)) as usize
    }

    /// Softmax scale: the model's 1 / sqrt(head_dim) when none is given.
    pub fn scale(&self) -> f64 {
        self.scale.map_or(1.0 / (self.q.head_dim as f64).sqrt(), f64::from)
    }

    /// What packed Q is multiplied by: its products with packed K are exponents of two.
    pub fn query_scale(&self) -> f64 {
        self.scale() * std::f64::consts::LOG2_E
    }

    /// Checks every shape against the spec. `source` names where the inputs come from, such as a file.
    pub fn check(&self, spec: &Spec, source: &str) -> Result<()> {
        let [batch, _, heads, _] = self.q.shape();
        let shape = [batch, spec.layout.sequence() as usize, heads, spec.head_dim as usize];
        for (key, tokens) in [("q", &self.q), ("k", &self.k), ("v", &self.v)] {
            if tokens.shape() != shape || batch == 0 || heads == 0 {
                return Err(Error::input(
                    format!("{source}, tensor {key}"),
                    format!("shape {:?}", tokens.shape()),
                    format!(
                        "[batch, {}, heads, {}] for spec {}, the same for q, k and v",
                        shape[1], shape[3], spec.name
                    ),
                    "Give the tensors of the shape that the spec declares, or the spec of this model",
                ));
            }
        }
        check_heads(spec, heads, &format!("{source}, tensor q"))?;
        let elements = shape.iter().try_fold(1usize, |product, &extent| product.checked_mul(extent));
        for (key, tokens) in [("q", &self.q), ("k", &self.k), ("v", &self.v)] {
            if tokens.dtype != spec.dtype || Some(tokens.bits.len()) != elements {
                return Err(Error::input(
                    format!("{source}, tensor {key}"),
                    format!("{} elements of {}", tokens.bits.len(), tokens.dtype.as_str()),
                    format!("as many of {} as shape {shape:?} has", spec.dtype.as_str()),
                    "Make it with Tokens::zeros, and fill it",
                ));
            }
        }
        let norm_length = spec.qk_norm.as_ref().map(|norm| match norm.over {
            NormOver::Head => spec.head_dim as usize,
            NormOver::Heads => heads * spec.head_dim as usize,
        });
        for (key, norm) in [
            ("q_norm", Some(&self.q_norm)),
            ("k_norm", Some(&self.k_norm)),
            ("q_norm_text", self.q_norm_text.as_ref()),
            ("k_norm_text", self.k_norm_text.as_ref()),
        ] {
            let Some(norm) = norm else { continue };
            for (part, values) in [("weight", &norm.weight), ("bias", &norm.bias)] {
                let Some(values) = values else { continue };
                let subject = format!("{source}, tensor {key}.{part}");
                let Some(length) = norm_length else {
                    return Err(Error::input(
                        subject,
                        "a norm",
                        "none: the spec has no [qk_norm]",
                        "Add [qk_norm] to the spec, or drop the tensor",
                    ));
                };
                if part == "bias" && spec.qk_norm.as_ref().is_some_and(|norm| norm.kind == NormKind::Rms) {
                    return Err(Error::input(
                        subject,
                        "a bias",
                        "none: an rms norm has no bias",
                        "Set qk_norm.kind = \"layer\" in the spec, or drop the tensor",
                    ));
                }
                if values.len() != length {
                    return Err(Error::input(
                        subject,
                        format!("{} elements", values.len()),
                        format!("{length} elements"),
                        "qk_norm.over in the spec says whether the norm is over one head or over all",
                    ));
                }
            }
        }
        match (&spec.rope, &self.rope) {
            (Some(_), Some(tables)) => {
                let shape = spec.rope_table_shape(heads as u32);
                let length = RopeTables::length(spec, heads);
                for (key, table) in [("cos", &tables.cos), ("sin", &tables.sin)] {
                    if table.len() != length {
                        return Err(Error::input(
                            format!("{source}, tensor {key}"),
                            format!("{} elements", table.len()),
                            format!("shape {shape:?}"),
                            "The rows are the video rows, or all rows with rope.text = true; one table a head with rope.per_head = true",
                        ));
                    }
                }
            }
            (None, Some(_)) => {
                return Err(Error::input(
                    format!("{source}, tensors cos and sin"),
                    "RoPE tables",
                    "none: the spec has no [rope]",
                    "Add [rope] to the spec, or drop the tensors",
                ));
            }
            (Some(_), None) => {
                return Err(Error::input(
                    format!("{source}, tensors cos and sin"),
                    "nothing",
                    format!("f32 tables of shape {:?}: the spec has [rope]", spec.rope_table_shape(heads as u32)),
                    "Give both tables",
                ));
            }
            (None, None) => {}
        }
        if let Some(scale) = self.scale {
            check_scale(spec, scale)?;
        }
        if let Some(lengths) = &self.text_lengths {
            let longest = lengths.iter().copied().max().unwrap_or(0);
            if lengths.len() != batch || longest > spec.layout.text_tokens {
                return Err(Error::input(
                    format!("{source}, text_lengths"),
                    format!("{lengths:?}"),
                    format!("one length of at most {} for each of {batch} batch items", spec.layout.text_tokens),
                    "A length counts the valid text tokens, which come first among the text",
                ));
            }
        }
        Ok(())
    }
}

/// Axes of the default RoPE: of the head_dim / 2 pairs a quarter turns with the frame, the rest half with the height and half
/// with the width. Gives, for a pair, its axis (0 frame, 1 height, 2 width), its index on that axis and the axis' pairs.
pub fn rope_axis(pair: usize, pairs: usize) -> (usize, usize, usize) {
    let frame = pairs / 4;
    let height = (pairs - frame) / 2;
    if pair < frame {
        (0, pair, frame)
    } else if pair < frame + height {
        (1, pair - frame, height)
    } else {
        (2, pair - frame - height, pairs - frame - height)
    }
}

/// Frame, height and width position of every video token, and of text tokens behind all of them on every axis.
pub fn token_place(spec: &Spec, row: usize) -> [usize; 3] {
    let layout = &spec.layout;
    let patches = layout.tokens_per_frame as usize;
    let [height, width] = spec.grid.map_or([1, patches], |grid| grid.map(|side| side as usize));
    let (first_text, first_video) = match layout.text_position {
        TextPosition::First => (0, layout.text_tokens as usize),
        TextPosition::Last => (layout.frames as usize * patches, 0),
    };
    let text = layout.text_tokens as usize;
    if row >= first_text && row < first_text + text {
        return [(layout.frames as usize).max(height).max(width) + row - first_text; 3];
    }
    let video = row - first_video;
    [video / patches, video % patches / width, video % width]
}

impl RopeTables {
    /// Elements of each table for `heads` heads.
    fn length(spec: &Spec, heads: usize) -> usize {
        spec.rope_table_shape(heads as u32).into_iter().map(|extent| extent as usize).product()
    }

    /// The tables used when none are given: three axes ([`rope_axis`]), pair `i` of `n` on its axis turning with
    /// `10000^(-i / n)` a step. With tables per head, head `h` of `H` takes the frequencies a fraction `h / H` of a step on,
    /// so that all heads together hold one sequence of frequencies.
    pub fn from_grid(spec: &Spec, heads: usize) -> RopeTables {
        let half = spec.head_dim as usize / 2;
        let tables = if spec.rope.is_some_and(|rope| rope.per_head) { heads } else { 1 };
        let first_row =
            if spec.rope.as_ref().is_some_and(|rope| rope.text) { 0 } else { spec.layout.first_video_row() as usize };
        let angles: Vec<f64> = (0..RopeTables::length(spec, heads))
            .into_par_iter()
            .map(|index| {
                let (row, table, pair) = (index / half / tables, index / half % tables, index % half);
                let (axis, index, pairs) = rope_axis(pair, half);
                let step = index as f64 + table as f64 / tables as f64;
                token_place(spec, first_row + row)[axis] as f64 * 10000f64.powf(-step / pairs as f64)
            })
            .collect();
        RopeTables {
            cos: angles.par_iter().map(|angle| angle.cos() as f32).collect(),
            sin: angles.par_iter().map(|angle| angle.sin() as f32).collect(),
        }
    }

    /// Tables of independent angles, uniform over the circle.
    pub fn random(spec: &Spec, heads: usize, seed: u64) -> RopeTables {
        let half = spec.head_dim as usize / 2;
        let length = RopeTables::length(spec, heads);
        let mut tables = RopeTables { cos: vec![0.0; length], sin: vec![0.0; length] };
        let rows = tables.cos.par_chunks_exact_mut(half).zip(tables.sin.par_chunks_exact_mut(half));
        rows.enumerate().for_each(|(row, (cos, sin))| {
            let mut generator = quick_generator(seed, ANGLES, row as u64);
            for (cos, sin) in cos.iter_mut().zip(sin) {
                let angle = std::f64::consts::TAU * generator.random::<f64>();
                (*cos, *sin) = (angle.cos() as f32, angle.sin() as f32);
            }
        });
        tables
    }

    /// Turns a row of Q or K as the tables say for `direction` 1, and back for -1: what the kernel will turn forth again.
    /// `token` counts in the model's order.
    pub fn rotate(&self, spec: &Spec, heads: usize, token: usize, head: usize, row: &mut [f64], direction: f64) {
        let Some(rope) = &spec.rope else { return };
        let first_row = if rope.text { 0 } else { spec.layout.first_video_row() as usize };
        let Some(table_row) = token.checked_sub(first_row).filter(|&row| row < spec.rope_rows() as usize) else {
            return;
        };
        let half = row.len() / 2;
        let table = if rope.per_head { table_row * heads + head } else { table_row };
        for pair in 0..half {
            let (a, b) = paired(rope.pairs, pair, half);
            let (cos, sin) = (f64::from(self.cos[table * half + pair]), f64::from(self.sin[table * half + pair]));
            let sin = direction * sin;
            (row[a], row[b]) = (row[a] * cos - row[b] * sin, row[b] * cos + row[a] * sin);
        }
    }
}

/// Channels of pair `pair` of `half`.
pub fn paired(pairs: Pairs, pair: usize, half: usize) -> (usize, usize) {
    match pairs {
        Pairs::Interleaved => (2 * pair, 2 * pair + 1),
        Pairs::Half => (pair, pair + half),
    }
}

/// A generator for one row: the same values whatever the number of threads.
pub fn row_generator(seed: u64, stream: u64) -> ChaCha8Rng {
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    generator.set_stream(stream);
    generator
}

/// Likewise, and quicker, where billions of bits are drawn. `which` says what they are for.
fn quick_generator(seed: u64, which: u64, index: u64) -> Xoshiro256PlusPlus {
    // Any odd factor: rows of one seed are not those of the next.
    let key = seed.wrapping_mul(0xd6e8_feb8_6659_fd93).wrapping_add(which << 56).wrapping_add(index);
    Xoshiro256PlusPlus::seed_from_u64(key)
}

/// Standard normal values.
pub fn normal(generator: &mut ChaCha8Rng) -> f64 {
    StandardNormal.sample(generator)
}

/// Standard normal values to pick from: a layer at full size has billions of elements, and drawing each on its own would take longer
/// than everything else. There are about as many as 16-bit numbers of that size, and few enough for the fastest cache.
struct Normals {
    values: [f32; 1 << 12],
    dtype: Dtype,
    seed: u64,
    /// Size of elements whose mean square is the eps of the norm.
    eps_size: f32,
}

impl Normals {
    fn new(spec: &Spec, seed: u64) -> Normals {
        let mut generator = row_generator(seed, NORMALS);
        let eps = spec.qk_norm.as_ref().map_or(1e-6, |norm| norm.eps);
        let values = std::array::from_fn(|_| normal(&mut generator) as f32);
        Normals { values, dtype: spec.dtype, seed, eps_size: eps.sqrt() as f32 }
    }

    /// Of an eighth of the tokens, the size of all elements of Q and K: zero, or such that the eps of a norm is a good part of what it
    /// is added to. A norm hides any other size.
    fn quiet_size(&self, token: usize) -> Option<f32> {
        let picked: u32 = quick_generator(self.seed, QUIET, token as u64).random_range(0..32);
        [0.0, 0.5, 1.0, 2.0].get(picked as usize).map(|part| part * self.eps_size)
    }

    fn pick(&self, bits: u16) -> f32 {
        self.values[usize::from(bits) % self.values.len()]
    }

    /// Draws token `index` of [`Q`], [`K`] or [`V`], `[heads, head_dim]`: see [`Inputs::random`].
    fn token(&self, which: u64, index: usize, head_dim: usize, bits: &mut [u16]) {
        let mut generator = quick_generator(self.seed, which, index as u64);
        // Of each 64 random bits four elements; the head dim is a multiple of it.
        for bits in bits.as_chunks_mut::<4>().0 {
            let random = generator.random::<u64>();
            *bits = [0, 16, 32, 48].map(|shift| (random >> shift) as u16);
        }
        let quiet = (which != V).then(|| self.quiet_size(index)).flatten();
        for row in bits.chunks_exact_mut(head_dim) {
            let (mut centre, mut size) = (0.0, 1.0);
            if let Some(quiet) = quiet {
                size = quiet;
            } else if which != V {
                let picks: [u16; 2] = generator.random();
                let picks = picks.map(|bits| 0.25 * self.pick(bits));
                (centre, size) = (picks[0], 2.0 * picks[1].exp());
            }
            for bits in row {
                let value = centre + size * self.pick(*bits);
                *bits = match self.dtype {
                    // Cut off: a random value need not be rounded well, and rounding takes a branch that nobody can predict.
                    Dtype::Bf16 => (value.to_bits() >> 16) as u16,
                    Dtype::F16 => f16::from_f32(value).to_bits(),
                };
            }
        }
    }

    /// Draws a row of one video token of one head, the same for Q, K and V.
    fn own(&self, head: usize, video: usize, values: &mut [f64]) {
        let mut generator = quick_generator(self.seed, PARTS, (head as u64) << 32 | video as u64);
        values.fill_with(|| f64::from(self.pick(generator.random())));
    }

    /// Draws the code of a frame or a patch for one head.
    fn code(&self, head: usize, code: usize, values: &mut [f64]) {
        let mut generator = quick_generator(self.seed, CODES, (head as u64) << 32 | code as u64);
        values.fill_with(|| 2.0 * f64::from(self.pick(generator.random())));
    }
}

/// Stream of [`row_generator`] that [`Normals`] come from: no row has this number.
const NORMALS: u64 = u64::MAX - 1;

/// What [`quick_generator`] draws, and [`Inputs::made`] asks for.
const Q: u64 = 0;
const K: u64 = 1;
const V: u64 = 2;

/// What [`quick_generator`] draws besides.
const ANGLES: u64 = 3;
const CODES: u64 = 4;
const PARTS: u64 = 5;
const QUIET: u64 = 6;

/// Gives a row a size.
fn resize(row: &mut [f64], size: f64) {
    let factor = size / norm(row);
    row.iter_mut().for_each(|x| *x *= factor);
}

/// Removes what a row has of a direction of size 1.
fn remove(row: &mut [f64], direction: &[f64]) {
    let part: f64 = row.iter().zip(direction).map(|(x, direction)| x * direction).sum();
    row.iter_mut().zip(direction).for_each(|(x, direction)| *x -= part * direction);
}

/// The softmax scale with which two equal rows of size sqrt(head_dim) have a score of 2^`score`.
fn scale_of(spec: &Spec, score: f32) -> f32 {
    score * std::f32::consts::LN_2 / spec.head_dim as f32
}

/// Score of a query with its own key in [`Inputs::sudden`], in powers of two: beyond what plain weights hold
/// ([`Dtype::tile_sums`]).
fn sudden_score(dtype: Dtype) -> f32 {
    match dtype {
        Dtype::Bf16 => 134.0,
        Dtype::F16 => 24.0,
    }
}

/// Softmax scale of [`Inputs::rising`].
const RISING_SCALE: f32 = 4.0;

/// Size of V in [`Inputs::lone`], of whose largest elements f16 holds little more than twice.
const LARGE: f64 = 8192.0;

/// Rows of a warpgroup, which shares one decision on offsets.
const GROUP: usize = 64;

/// Score of two equal rows of size 1 in [`Inputs::lone`], in powers of two.
fn lone_score(dtype: Dtype) -> f32 {
    match dtype {
        Dtype::Bf16 => 215.0,
        Dtype::F16 => 34.0,
    }
}

/// Parts of a key in [`Inputs::lone`], of the head's direction and of its own, whose squares add up to 1. Such that a score of
/// minus the first part vanishes in the type, one of the second overflows, and a few standard deviations of the rest do neither.
const LONE_PARTS: [f64; 2] = [0.76, 0.65];

/// Successive queries of [`Inputs::edges`] that look at the same kind of edge. Five divides neither 128 nor 192, the rows of a query
/// tile, so the same row of different tiles looks at both kinds.
const EDGE_QUERIES: usize = 80;

/// Score of a query of [`Inputs::edges`] with a key that is all it looks at, in powers of two. With four such keys each has half of it,
/// and a score with any other key has the standard deviation score / sqrt(head_dim). Weights with a normal exponent have the mean
/// exp(deviation^2 / 2): this score is where the four have the largest share of all.
const fn edges_score(head_dim: u32) -> f32 {
    head_dim as f32 / 2.0 * std::f32::consts::LOG2_E
}

/// In [`Inputs::hidden`], the score of the highest key, and that of keys with a query's own code, in powers of two.
fn hidden_scores(dtype: Dtype) -> [f64; 2] {
    match dtype {
        Dtype::Bf16 => [174.0, 20.0],
        Dtype::F16 => [43.0, 12.0],
    }
}

impl Inputs {
    /// Random inputs: Q, K, V normal (Q and K twice as large, so that the softmax has something to choose), rows of Q and K off
    /// centre and of different sizes, norm weights around one, RoPE angles uniform. They depend on nothing but the arguments.
    pub fn random(spec: &Spec, batch: usize, heads: usize, seed: u64) -> Inputs {
        let normals = Normals::new(spec, seed);
        let tokens = |which: u64| {
            Inputs::tokens(spec, batch, heads, |token, bits| {
                normals.token(which, token, spec.head_dim as usize, bits);
            })
        };
        let mut generator = row_generator(seed.wrapping_add(3), 0);
        let mut norm = || match &spec.qk_norm {
            None => Norm::default(),
            Some(norm) => {
                let length = match norm.over {
                    NormOver::Head => spec.head_dim as usize,
                    NormOver::Heads => heads * spec.head_dim as usize,
                };
                let mut values = |centre: f64| {
                    Some((0..length).map(|_| (centre + 0.2 * normal(&mut generator)) as f32).collect::<Vec<f32>>())
                };
                Norm { weight: values(1.0), bias: if norm.kind == NormKind::Layer { values(0.0) } else { None } }
            }
        };
        let (q_norm, k_norm, q_text, k_text) = (norm(), norm(), norm(), norm());
        let text_norms = spec.qk_norm.is_some() && spec.layout.text_tokens > 0;
        let rope = spec.rope.as_ref().map(|_| RopeTables::random(spec, heads, seed));
        Inputs {
            q_norm,
            k_norm,
            q_norm_text: text_norms.then_some(q_text),
            k_norm_text: text_norms.then_some(k_text),
            ..Inputs::new([tokens(Q), tokens(K), tokens(V)], rope)
        }
    }

    /// Random V and K, queries that are their own keys, and such a scale that a softmax may begin without an offset, until a query meets
    /// its key: all norms are sqrt(head_dim), so other scores are smaller by a factor of sqrt(head_dim) or so.
    pub fn sudden(spec: &Spec, batch: usize, heads: usize, seed: u64) -> Inputs {
        let inputs = Inputs::made(spec, batch, heads, seed, |normals, which, video, head, values| {
            normals.own(head, video, values);
            resize(values, (values.len() as f64).sqrt());
            which != V
        });
        Inputs { scale: Some(scale_of(spec, sudden_score(spec.dtype))), ..inputs }
    }

    /// Random V, and Q and K such that head `h` attends to its own frame when `h` is even and to its own patch in all frames
    /// when it is odd: after norm and RoPE, both hold a random code of the frame or of the patch.
    pub fn planted(spec: &Spec, batch: usize, heads: usize, seed: u64) -> Inputs {
        let patches = spec.layout.tokens_per_frame as usize;
        Inputs::made(spec, batch, heads, seed, |normals, which, video, head, values| {
            normals.code(head, if head.is_multiple_of(2) { video / patches } else { video % patches }, values);
            which != V
        })
    }

    /// Random V, and Q and K, with a scale, such that scores lie hundreds apart, rise along the keys of every head type up to a query's
    /// own key, and fall behind it: an online softmax has to lower its offsets again and again, by little and by more than f32 holds.
    ///
    /// A key is random but for a direction common to the head, of which it has the more the later its frame and its patch: so more
    /// from frame to frame and within each, and in the temporal order from patch to patch and within each. A query is its own key, and
    /// as much of the direction as chance has it, and noise; so what it attends to most is mostly visible through every mask. All have
    /// norm sqrt(head_dim), with a QK-norm and without.
    pub fn rising(spec: &Spec, batch: usize, heads: usize, seed: u64) -> Inputs {
        let (frames, patches) = (spec.layout.frames as usize, spec.layout.tokens_per_frame as usize);
        let inputs = Inputs::made(spec, batch, heads, seed, |normals, which, video, head, values| {
            let mut generator = quick_generator(seed, PARTS, (head as u64) << 32 | video as u64);
            let mut normal = || f64::from(normals.pick(generator.random()));
            let place = (video / patches) as f64 / frames as f64 + (video % patches) as f64 / patches as f64 - 1.0;
            let steepness = normal();
            normals.code(head, 0, values);
            for value in values.iter_mut() {
                let direction = 0.5 * *value;
                let (own, noise) = (normal(), normal());
                let key = own + direction * place;
                *value = if which == Q { key + direction * steepness + noise } else { key };
            }
            resize(values, (values.len() as f64).sqrt());
            which != V
        });
        Inputs { scale: Some(RISING_SCALE), ..inputs }
    }

    /// Large V, and Q and K, with a scale, such that of each [`GROUP`] queries one alone decides how the softmax begins, or that it may
    /// not go on so. All others may do without offsets in every tile. What the one does goes from group to group through:
    ///
    /// * all its weights vanish without an offset,
    /// * all overflow without one,
    /// * that of one key, of the first tile, overflows,
    /// * the last two, of two queries,
    ///
    /// each in the upper and in the lower half of a warp's 16 rows. Groups are those of dense heads without text.
    ///
    /// A key has a part of a direction of the head, and a part of its own. The queries have minus that direction, the direction, what the
    /// key has of its own, or, nearly all of them, something random that is orthogonal to the direction.
    pub fn lone(spec: &Spec, batch: usize, heads: usize, seed: u64) -> Inputs {
        let video_tokens = spec.layout.video_tokens() as usize;
        let groups = video_tokens.div_ceil(GROUP);
        let inputs = Inputs::made(spec, batch, heads, seed, |normals, which, video, head, values| {
            let mut direction = vec![0.0; values.len()];
            normals.code(head, 0, &mut direction);
            resize(&mut direction, 1.0);
            let own = |token: usize, values: &mut [f64]| {
                normals.own(head, token, values);
                remove(values, &direction);
                resize(values, 1.0);
            };
            let mut generator = quick_generator(seed, PARTS, (head * groups + video / GROUP) as u64 | 1 << 63);
            let turn = head * groups + video / GROUP + (seed % 8) as usize;
            let (kind, half) = (turn % 4, turn / 4 % 2);
            // The row of the one, and the same row of the next warp.
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
            match which {
                Q if row == one && kind != 2 => {
                    let sign = if kind == 0 { -1.0 } else { 1.0 };
                    values.iter_mut().zip(&direction).for_each(|(value, direction)| *value = sign * direction);
                }
                // A first tile's key: the middle tile, which is read before it, is another one where there are two.
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
        Inputs { scale: Some(scale_of(spec, lone_score(spec.dtype))), ..inputs }
    }

    /// Heads as [`Inputs::planted`], but with one key, the last of the video, whose score is higher than all others by more than weights of
    /// the type can tell from zero. V is random about a row, which that key has: so the mask that shows more of what a query looks at is the
    /// better one, whether it shows that key or not.
    pub fn hidden(spec: &Spec, batch: usize, heads: usize, seed: u64) -> Inputs {
        let patches = spec.layout.tokens_per_frame as usize;
        let last = spec.layout.video_tokens() as usize - 1;
        let [highest, own] = hidden_scores(spec.dtype);
        let score = highest.hypot(own);
        let inputs = Inputs::made(spec, batch, heads, seed, |normals, which, video, head, values| {
            let mut direction = vec![0.0; values.len()];
            normals.code(head, usize::MAX >> 32, &mut direction);
            if which == V {
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
            let parts = match which {
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

    /// Random V, keys of their own, and queries that look at the keys on both sides of an edge of their run, with equal weight: at the last
    /// visible and at the first hidden one, through the spatial mask and through the temporal one. [`EDGE_QUERIES`] queries look at where
    /// their runs begin, the next at where they end. So whoever moves an edge by one key changes a large part of a row.
    pub fn edges(spec: &Spec, batch: usize, heads: usize, seed: u64) -> Inputs {
        let layout = spec.layout;
        let (frames, patches) = (layout.frames as usize, layout.tokens_per_frame as usize);
        let at_temporal = |position: usize| position % frames * patches + position / frames;
        let inputs = Inputs::made(spec, batch, heads, seed, |normals, which, video, head, values| {
            if which != Q {
                normals.own(head, video, values);
                resize(values, (values.len() as f64).sqrt());
                return which != V;
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

    /// Equal scores and constant values: every other query is zero, the keys of odd heads are all the same, and of V half of the columns
    /// are, the first of them 1.
    pub fn constant(spec: &Spec, batch: usize, heads: usize, seed: u64) -> Inputs {
        Inputs::made(spec, batch, heads, seed, |normals, which, video, head, values| {
            match which {
                Q if video.is_multiple_of(2) => values.fill(0.0),
                K if !head.is_multiple_of(2) => normals.code(head, 0, values),
                V => {
                    let (dim, mut constants) = (values.len(), vec![0.0; values.len()]);
                    normals.code(head, 1, &mut constants);
                    constants[..dim / 4].fill(1.0);
                    normals.own(head, video, values);
                    values[..dim / 2].copy_from_slice(&constants[..dim / 2]);
                }
                _ => normals.own(head, video + which as usize * spec.layout.video_tokens() as usize, values),
            }
            true
        })
    }

    /// Random text, and video rows that hold what `values` writes, those of Q and K after norm and RoPE. It is given [`Q`], [`K`] or [`V`],
    /// the video token, the same in all batch items, and the head; where it gives false, the row is random.
    fn made(
        spec: &Spec,
        batch: usize,
        heads: usize,
        seed: u64,
        values: impl Fn(&Normals, u64, usize, usize, &mut [f64]) -> bool + Sync,
    ) -> Inputs {
        let normals = Normals::new(spec, seed);
        let (layout, rope) = (spec.layout, spec.rope.as_ref().map(|_| RopeTables::random(spec, heads, seed)));
        let video = (layout.frames * layout.tokens_per_frame) as usize;
        let (sequence, dim) = (layout.sequence() as usize, spec.head_dim as usize);
        let tokens = |which: u64| {
            Inputs::tokens(spec, batch, heads, |token, bits| {
                let row = token % sequence;
                normals.token(which, token, dim, bits);
                let place = row.checked_sub(layout.first_video_row() as usize).filter(|&place| place < video);
                let Some(place) = place else { return };
                let mut row_values = vec![0.0; dim];
                for (head, bits) in bits.chunks_exact_mut(dim).enumerate() {
                    if !values(&normals, which, place, head, &mut row_values) {
                        continue;
                    }
                    if let Some(tables) = rope.as_ref().filter(|_| which != V) {
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

    /// A tensor of the spec's layout, of which `token` writes the bits of one token, `[heads, head_dim]`, given its index in
    /// `[batch, rows]`.
    fn tokens(spec: &Spec, batch: usize, heads: usize, token: impl Fn(usize, &mut [u16]) + Sync) -> Tokens {
        let shape = [batch, spec.layout.sequence() as usize, heads, spec.head_dim as usize];
        let mut tokens = Tokens::zeros(spec.dtype, shape);
        let rows = tokens.bits.par_chunks_exact_mut(shape[2] * shape[3]).enumerate();
        rows.for_each(|(index, bits)| token(index, bits));
        tokens
    }
}
