//! **pack**: QK-norm, RoPE and reordering in one pass over Q, K and V.
//!
//! One warp a token, for all of its heads: the token's cosines and sines are read once, its row of heads x head_dim is read in
//! order, and each head's part goes to where the head's layout wants it, in the image of
//! [`packed_bytes`](framestride_shapes::launch::packed_bytes). Grid: x = packed_rows / 8, y = Q, K, V, z = batch.

use crate::attention::valid_text;
use crate::cuda::mma::TileProducts;
use crate::cuda::{global, math, thread, warp};
use crate::element;
use crate::shape::Shape;
use framestride_shapes::launch::{NormWeights, PackParams, PackPass, Tensor};
use framestride_shapes::layout::{ATOM_ROWS, HeadType};
use framestride_shapes::operators::{NormKind, NormOver, Pairs};

type ElementOf<T> = <<T as Shape>::Attention as TileProducts>::Element;

/// Whether the QK-norm has one statistic for all heads of a token.
#[inline(always)]
fn norm_over_heads<T: Shape>() -> bool {
    T::QK_NORM.is_some_and(|norm| matches!(norm.over, NormOver::Heads))
}

#[inline(always)]
fn is_layer_norm<T: Shape>() -> bool {
    T::QK_NORM.is_some_and(|norm| matches!(norm.kind, NormKind::Layer))
}

#[inline(always)]
fn rotates_text<T: Shape>() -> bool {
    T::ROPE.is_some_and(|rope| rope.text)
}

#[inline(always)]
fn rotates_per_head<T: Shape>() -> bool {
    T::ROPE.is_some_and(|rope| rope.per_head)
}

#[inline(always)]
fn is_interleaved<T: Shape>() -> bool {
    T::ROPE.is_some_and(|rope| matches!(rope.pairs, Pairs::Interleaved))
}

/// A token and what all of its heads share.
struct Token {
    /// Row of the model's order; from S on, padding.
    row: u32,
    /// Whether it is padding or invalid text: its packed rows are zero.
    blank: bool,
    valid_text: u32,
    norm: NormWeights,
    /// Row of the RoPE tables, if it is rotated.
    rope_row: Option<u32>,
}

/// The kernel's body.
///
/// # Safety
/// Launched with the table that `attention_kernels!` wrote for `T`; `params` as its documentation says.
#[inline(always)]
pub unsafe fn pack<T: Shape>(params: &PackParams) {
    let item = thread::block_z();
    let row = thread::block_x() * ATOM_ROWS + thread::warp();
    let (source, packed, norm, text_norm) = match thread::block_y() {
        0 => (params.q, params.packed_q, Some(params.q_norm), params.q_norm_text),
        1 => (params.k, params.packed_k, Some(params.k_norm), params.k_norm_text),
        _ => (params.v, params.packed_v, None, params.k_norm_text),
    };
    let valid_text = valid_text::<T>(params.text_lengths, item);
    let text = row.wrapping_sub(T::LAYOUT.first_text_row());
    let is_text = text < T::LAYOUT.text_tokens;
    let rotated = T::ROPE.is_some() && norm.is_some() && (rotates_text::<T>() || !is_text);
    let rope_row = if rotates_text::<T>() { row } else { row - T::LAYOUT.first_video_row() };
    let token = Token {
        row,
        blank: row >= T::LAYOUT.sequence() || (is_text && text >= valid_text),
        valid_text,
        norm: if is_text { text_norm } else { norm.unwrap_or_default() },
        rope_row: if rotated { Some(rope_row) } else { None },
    };
    let source = Tensor { data: source.data + item as u64 * source.batch * 2, ..source };
    write_heads::<T>(params, item, &token, &source, packed, norm.is_some());
}

/// All heads of one token of Q, K (`normed`, perhaps rotated) or V.
#[inline(always)]
unsafe fn write_heads<T: Shape>(
    params: &PackParams,
    item: u32,
    token: &Token,
    source: &Tensor,
    packed: u64,
    normed: bool,
) {
    let row_bytes = T::HEAD_DIM * 2;
    // Lanes of one head, 8 elements each, and heads of one warp.
    let head_lanes = T::HEAD_DIM / 8;
    let heads_at_once = 32 / head_lanes;
    let lane = thread::lane();
    let (chunk, first_head) = (lane % head_lanes, lane / head_lanes);
    let normed = normed && T::QK_NORM.is_some() && !token.blank;

    let token_statistic = if normed && norm_over_heads::<T>() {
        let mut sums = Moments::default();
        let mut head = first_head;
        while head < params.heads {
            sums = sums.plus(Moments::of(load::<T>(params, source, token.row, head, chunk)));
            head += heads_at_once;
        }
        let sums = sums.summed::<32>();
        let mean = sums.mean(T::HEADS * T::HEAD_DIM);
        let mut squares = 0.0;
        if is_layer_norm::<T>() {
            let mut head = first_head;
            while head < params.heads {
                squares += squared_distance(load::<T>(params, source, token.row, head, chunk), mean);
                head += heads_at_once;
            }
            squares = warp::sum::<32>(squares);
        }
        Statistic::new::<T>(sums, squares, T::HEADS * T::HEAD_DIM)
    } else {
        Statistic { mean: 0.0, factor: 1.0 }
    };

    // What all heads of the token share stays in registers.
    let shared_affine =
        if normed && !norm_over_heads::<T>() { Affine::load(token.norm, chunk * 8) } else { Affine::IDENTITY };
    let shared_rotation = match token.rope_row {
        Some(row) if !rotates_per_head::<T>() && !token.blank => Rotation::load::<T>(params, row, chunk),
        _ => Rotation::IDENTITY,
    };
    let packed_row = |head_type: HeadType| {
        if token.row < T::LAYOUT.sequence() {
            let order = if thread::block_y() == 0 { T::LAYOUT.query_order() } else { T::LAYOUT };
            order.packed_row(head_type, token.row, token.valid_text)
        } else {
            token.row
        }
    };
    let packed_rows = [packed_row(HeadType::Spatial), packed_row(HeadType::Temporal)];

    // All lanes go round as often as the first head's, since they exchange values.
    let mut base = 0;
    while base < params.heads {
        let part = |i: u32| {
            let head = base + i * heads_at_once + first_head;
            let temporal = head < params.heads
                && params.head_types != 0
                && global::load_u32(params.head_types + (item * params.heads + head) as u64 * 4)
                    == HeadType::Temporal as u32;
            let wanted = head < params.heads && (temporal || params.pass != PackPass::Temporal as u32);
            let values =
                if wanted && !token.blank { load_raw::<T>(params, source, token.row, head, chunk) } else { [0; 4] };
            Part { values, head, wanted, packed_row: packed_rows[temporal as usize] }
        };
        let finish = |part: Part| {
            let Part { mut values, head, wanted, packed_row } = part;
            if (normed || token.rope_row.is_some()) && warp::any(wanted) {
                let mut x = element::widen::<ElementOf<T>>(values);
                if normed {
                    let (statistic, affine) = if norm_over_heads::<T>() {
                        let first = if wanted { head * T::HEAD_DIM + chunk * 8 } else { 0 };
                        (token_statistic, Affine::load(token.norm, first))
                    } else {
                        (head_statistic::<T>(x), shared_affine)
                    };
                    x = affine.apply(x, statistic);
                }
                if let Some(row) = token.rope_row {
                    let rotation = if rotates_per_head::<T>() && wanted && !token.blank {
                        Rotation::load::<T>(params, row * params.heads + head, chunk)
                    } else {
                        shared_rotation
                    };
                    x = rotation.apply::<T>(x, chunk);
                }
                values = if token.blank { [0; 4] } else { element::narrow::<ElementOf<T>>(x) };
            }
            if wanted {
                let head_image = (item * params.heads + head) as u64 * (T::LAYOUT.packed_rows() * row_bytes) as u64;
                let row_in_atom = packed_row % ATOM_ROWS;
                let atom = packed_row / ATOM_ROWS * (T::HEAD_DIM / 64) + chunk / 8;
                let place = atom as u64 * 1024 + (row_in_atom * 128 + (chunk % 8 ^ row_in_atom) * 16) as u64;
                global::store16(packed + head_image + place, values);
            }
        };
        // All loads before the first use: what is in flight hides the latency of memory.
        let (a, b) = (part(0), part(1));
        let more = if loads_in_flight::<T>() == 4 { Some((part(2), part(3))) } else { None };
        finish(a);
        finish(b);
        if let Some((c, d)) = more {
            finish(c);
            finish(d);
        }
        base += loads_in_flight::<T>() * heads_at_once;
    }
}

/// How many heads' rows a lane loads before it uses the first. Weights of a norm per head and tables of RoPE in halves take 32
/// registers, and with four loads beside them some would spill.
fn loads_in_flight<T: Shape>() -> u32 {
    let halves = T::ROPE.is_some() && !is_interleaved::<T>();
    if halves && T::QK_NORM.is_some() && !norm_over_heads::<T>() { 2 } else { 4 }
}

/// A lane's eight elements of one head's row, on their way.
struct Part {
    values: [u32; 4],
    head: u32,
    /// Whether this launch writes the head.
    wanted: bool,
    packed_row: u32,
}

/// Eight elements of a head's row.
#[inline(always)]
unsafe fn load_raw<T: Shape>(params: &PackParams, source: &Tensor, row: u32, head: u32, chunk: u32) -> [u32; 4] {
    let address = source.data + (row as u64 * source.row + head as u64 * source.head + (chunk * 8) as u64) * 2;
    if params.aligned != 0 { global::load16(address) } else { global::load16_unaligned(address) }
}

#[inline(always)]
unsafe fn load<T: Shape>(params: &PackParams, source: &Tensor, row: u32, head: u32, chunk: u32) -> [f32; 8] {
    element::widen::<ElementOf<T>>(load_raw::<T>(params, source, row, head, chunk))
}

/// Sum and sum of squares of some elements.
#[derive(Clone, Copy, Default)]
struct Moments {
    sum: f32,
    squares: f32,
}

impl Moments {
    #[inline(always)]
    fn of(x: [f32; 8]) -> Moments {
        let mut moments = Moments::default();
        for x in x {
            moments.sum += x;
            moments.squares = math::fma(x, x, moments.squares);
        }
        moments
    }
    #[inline(always)]
    fn plus(self, other: Moments) -> Moments {
        Moments { sum: self.sum + other.sum, squares: self.squares + other.squares }
    }
    #[inline(always)]
    unsafe fn summed<const LANES: u32>(self) -> Moments {
        Moments { sum: warp::sum::<LANES>(self.sum), squares: warp::sum::<LANES>(self.squares) }
    }
    #[inline(always)]
    fn mean(self, count: u32) -> f32 {
        // The reciprocal of a constant: a division in full precision would be a call.
        self.sum * (1.0 / count as f32)
    }
}

/// Sum of (x - mean)^2.
#[inline(always)]
fn squared_distance(x: [f32; 8], mean: f32) -> f32 {
    let mut sum = 0.0;
    for x in x {
        sum = math::fma(x - mean, x - mean, sum);
    }
    sum
}

/// y = (x - mean) factor, before weight and bias.
#[derive(Clone, Copy)]
struct Statistic {
    mean: f32,
    factor: f32,
}

impl Statistic {
    /// From the sums over `count` elements; `distance` is the sum of squared distances to the mean, for a layer norm (the
    /// difference of moments would cancel).
    #[inline(always)]
    fn new<T: Shape>(sums: Moments, distance: f32, count: u32) -> Statistic {
        let eps = match T::QK_NORM {
            Some(norm) => norm.eps as f32,
            None => 0.0,
        };
        if is_layer_norm::<T>() {
            Statistic { mean: sums.mean(count), factor: math::reciprocal_sqrt(distance * (1.0 / count as f32) + eps) }
        } else {
            Statistic { mean: 0.0, factor: math::reciprocal_sqrt(sums.squares * (1.0 / count as f32) + eps) }
        }
    }
}

/// The statistic of one head's row, over the lanes that hold it.
#[inline(always)]
unsafe fn head_statistic<T: Shape>(x: [f32; 8]) -> Statistic {
    if T::HEAD_DIM == 64 { head_statistic_over::<T, 8>(x) } else { head_statistic_over::<T, 16>(x) }
}

#[inline(always)]
unsafe fn head_statistic_over<T: Shape, const LANES: u32>(x: [f32; 8]) -> Statistic {
    let sums = Moments::of(x).summed::<LANES>();
    let distance =
        if is_layer_norm::<T>() { warp::sum::<LANES>(squared_distance(x, sums.mean(T::HEAD_DIM))) } else { 0.0 };
    Statistic::new::<T>(sums, distance, T::HEAD_DIM)
}

/// Weight and bias of a lane's eight elements.
#[derive(Clone, Copy)]
struct Affine {
    weight: [f32; 8],
    bias: [f32; 8],
}

impl Affine {
    const IDENTITY: Affine = Affine { weight: [1.0; 8], bias: [0.0; 8] };

    /// From element `first` on.
    #[inline(always)]
    unsafe fn load(norm: NormWeights, first: u32) -> Affine {
        let mut affine = Affine::IDENTITY;
        if norm.weight != 0 {
            affine.weight = load8(norm.weight + first as u64 * 4);
        }
        if norm.bias != 0 {
            affine.bias = load8(norm.bias + first as u64 * 4);
        }
        affine
    }

    #[inline(always)]
    fn apply(&self, mut x: [f32; 8], statistic: Statistic) -> [f32; 8] {
        let mut i = 0;
        while i < 8 {
            x[i] = math::fma((x[i] - statistic.mean) * statistic.factor, self.weight[i], self.bias[i]);
            i += 1;
        }
        x
    }
}

/// Eight f32.
#[inline(always)]
unsafe fn load8(address: u64) -> [f32; 8] {
    let ([a, b, c, d], [e, f, g, h]) = (global::load_f32x4(address), global::load_f32x4(address + 16));
    [a, b, c, d, e, f, g, h]
}

/// Cosines and sines of a lane's eight elements. Interleaved pairs share one: there the first four are used.
#[derive(Clone, Copy)]
struct Rotation {
    cos: [f32; 8],
    sin: [f32; 8],
}

impl Rotation {
    const IDENTITY: Rotation = Rotation { cos: [1.0; 8], sin: [0.0; 8] };

    /// From row `row` of the tables.
    #[inline(always)]
    unsafe fn load<T: Shape>(params: &PackParams, row: u32, chunk: u32) -> Rotation {
        let row = row as u64 * (T::HEAD_DIM / 2 * 4) as u64;
        let mut rotation = Rotation::IDENTITY;
        if is_interleaved::<T>() {
            let place = row + (chunk * 16) as u64;
            let (cos, sin) = (global::load_f32x4(params.cos + place), global::load_f32x4(params.sin + place));
            let mut i = 0;
            while i < 4 {
                (rotation.cos[i], rotation.sin[i]) = (cos[i], sin[i]);
                i += 1;
            }
        } else {
            let place = row + (chunk % (T::HEAD_DIM / 16) * 32) as u64;
            rotation = Rotation { cos: load8(params.cos + place), sin: load8(params.sin + place) };
        }
        rotation
    }

    /// Rotates (a, b) -> (a cos - b sin, a sin + b cos). All lanes of the warp take part.
    #[inline(always)]
    unsafe fn apply<T: Shape>(&self, x: [f32; 8], chunk: u32) -> [f32; 8] {
        let Rotation { cos, sin } = self;
        let mut out = x;
        if is_interleaved::<T>() {
            let mut i = 0;
            while i < 4 {
                out[2 * i] = x[2 * i] * cos[i] - x[2 * i + 1] * sin[i];
                out[2 * i + 1] = x[2 * i] * sin[i] + x[2 * i + 1] * cos[i];
                i += 1;
            }
        } else {
            // The lower half of a head's lanes holds a, the upper half b.
            let half_lanes = T::HEAD_DIM / 16;
            let sign = if chunk < half_lanes { -1.0 } else { 1.0 };
            let mut i = 0;
            while i < 8 {
                out[i] = x[i] * cos[i] + sign * warp::exchange(x[i], half_lanes) * sin[i];
                i += 1;
            }
        }
        out
    }
}
